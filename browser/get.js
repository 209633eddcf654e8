/** A file of the model, as bytes; heard(bytes so far, of) while it comes. Throws an Error of one sentence for the reader. */
export async function get(name, heard = () => {}) {
  const answer = await fetch(`model/${name}`).catch(() => {
    throw Error("The page lost its server: start it again with make browser, then reload.");
  });
  if (!answer.ok) throw Error(`model/${name} is not there (${answer.status}): make browser writes it, or export_onnx.py.`);
  const of = Number(answer.headers.get("content-length")), parts = [];
  let bytes = 0;
  try {
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      heard(bytes += value.length, of);
    }
  } catch { /* the size tells */ }
  if (bytes < of) throw Error(`model/${name} did not come whole: reload the page.`);
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
