// The worker: model.onnx, its KV cache, and the draw. Beside it the page stays smooth, and is not waited for.
//
//   {load: config}    reads model.onnx, telling {bytes, of} while it comes
//   {keep, ids, scored, settings, place, most}
//                     keeps the first `keep` tokens in the cache and reads ids, telling {scores}: scores[j] of ids[j], unless they are scored;
//                     with settings it draws up to `most` tokens then, the first for place `place` of the story, telling {next, at} of each:
//                     at is the worker's clock in ms
//   {stop: true}      ends that after the token at hand
//
// The answer to the first two ends with {done: true} or {failed: why}.

import { get } from "./get.js";
import { draw, score } from "./sample.js";

const DIST = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;

let ort, session, config;
let fused;         // the file has onnxruntime's own attention: export_onnx.py
let counts;        // inputs beside ids and the cache: places, which a file of an older format lacks, and fused: total
let cache = {};    // {past_k.0, past_v.0, ...}: [length, 1, n_kv_head, head_dim] each; fused: [1, n_kv_head, length, head_dim]
let length = 0;    // tokens in the cache
let stopped;
let held = null;   // the logits after the last of them; null after a rewind

async function load(described) {
  config = described;
  ort = await import(`${DIST}ort.wasm.min.mjs`).catch(() => {  // not imported at the top, where Firefox may not tell that it is missing
    throw Error("onnxruntime-web is not there: make browser installs it.");
  });
  ort.env.wasm.wasmPaths = DIST;
  ort.env.wasm.numThreads = 1;  // two were no faster on two cores
  const file = await get("model.onnx", (bytes, of) => postMessage({ bytes, of }));
  try {
    session = await ort.InferenceSession.create(file, { logSeverityLevel: 4 });  // the page says what is wrong, not the console
  } catch (e) {
    if (/no available backend/.test(e)) throw Error(`onnxruntime-web does not start; npm ci in browser/ installs it again: ${short(e)}`);
    if (/unrecognized attribute|not a registered function|find an implementation/i.test(e))
      throw Error(`onnxruntime-web lacks an operator of this file; the files of float32 and of --quantize=plain_int8 need none: ${short(e)}`);
    throw Error(`model/model.onnx cannot be read, it is damaged or no ONNX file: ${short(e)}`);
  }
  counts = ["places", "total"].filter(name => session.inputNames.includes(name));
  fused = counts.includes("total");
  if ([...session.inputNames].sort().join() !== ["ids", ...pasts(), ...counts].sort().join())
    throw Error("model/model.onnx and model/config.json are not of one model: export it again.");
  cut(0);
  try {
    await forward([config.eot]);  // also as the first call is slow
  } catch (e) {
    throw Error(`model/model.onnx does not work as model/config.json says it should: ${short(e)}`);
  }
  cut(0);
}

const pasts = () => Array.from({ length: config.n_layer }, (_, i) => [`past_k.${i}`, `past_v.${i}`]).flat();

const short = e => String(e?.message ?? e).replace(/\s+/g, " ").slice(0, 200);

/** Forgets all but the first n tokens. */
function cut(n) {
  const { n_kv_head: H, head_dim: D } = config;
  const heads = fused ? H : 1, width = fused ? D : H * D;  // pieces that a tensor consists of, and numbers of a token in each
  for (const name of pasts()) {
    const data = new Float32Array(n * H * D);
    for (let h = 0; n && h < heads; h++)
      data.set(cache[name].data.subarray(h * length * width, (h * length + n) * width), h * n * width);
    cache[name] = new ort.Tensor("float32", data, fused ? [1, H, n, D] : [n, 1, H, D]);
  }
  length = n;
  held = null;
}

const int64 = (numbers, dims) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);

/** Reads ids after what is in the cache, which has them then. Returns their scores, none where they are scored. */
async function forward(ids, scored) {
  const V = config.vocab_size, T = ids.length;
  const places = scored ? [T - 1] : [...ids.keys()];  // of the tokens whose logits are wanted
  const feeds = { ids: int64(ids, [1, T]), ...cache };
  if (counts.includes("places")) feeds.places = int64(places, [places.length]);
  if (fused) feeds.total = new ort.Tensor("int32", [length + T], []);
  const { logits, ...present } = await session.run(feeds);
  if (logits.dims.at(-1) !== V) throw Error("its vocabulary is another");
  const first = T - logits.dims[1];  // the place whose logits come first: 0 where all are there, else T - 1
  const row = j => j < 0 ? held : logits.data.subarray((j - first) * V, (j - first + 1) * V);
  const scores = scored ? [] : ids.map((id, j) => row(j - 1) && score(row(j - 1), id));
  cache = Object.fromEntries(Object.entries(present).map(([name, t]) => [name.replace("present", "past"), t]));
  length += T;
  held = row(T - 1);
  return scores;
}

async function read({ keep, ids, scored, settings, place, most }) {
  stopped = false;
  if (keep < length) cut(keep);
  postMessage({ scores: ids.length ? await forward(ids, scored) : [] });
  for (let n = 0; settings && n < most && !stopped; n++) {
    const id = draw(held, settings, place + n);
    postMessage({ next: { id, ...score(held, id) }, at: performance.now() });
    if (config.ends.includes(id) || n + 1 === most) break;
    await tick();
    if (stopped) break;
    await forward([id], true);
  }
}

const ticks = new MessageChannel();

/** Lets messages come in. To await onnxruntime does not, as it computes before it returns. */
function tick() {
  return new Promise(resolve => {
    ticks.port1.onmessage = resolve;
    ticks.port2.postMessage(0);
  });
}

onmessage = async ({ data }) => {
  if (data.stop) {
    stopped = true;
    return;
  }
  try {
    if (data.load) await load(data.load);
    else await read(data);
    postMessage({ done: true });
  } catch (e) {
    postMessage({ failed: short(e) });
  }
};
