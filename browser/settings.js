// The form of settings, and what this tab and the next one that opens find again.

const inputs = () => Array.from(document.querySelectorAll("#settings input"));

/** The settings by name, as numbers. Throws an Error that names the one that is wrong. */
export function readSettings() {
  const settings = {};
  for (const input of inputs()) {
    settings[input.id] = Number(input.value);
    if (!input.checkValidity()) throw Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
  }
  return settings;
}

/** Shows beside each slider the number that it stands for. */
export function showSettings() {
  for (const output of document.querySelectorAll("#settings output"))
    output.value = Number(document.getElementById(output.htmlFor).value).toFixed(2);
}

export function keepSettings() {
  keep("tinylm settings", Object.fromEntries(inputs().map(input => [input.id, input.value])));
}

export function restoreSettings() {
  const settings = kept("tinylm settings");
  for (const input of inputs()) input.value = settings?.[input.id] ?? input.value;
  showSettings();
}

/** Keeps a value by name, without its texts and with numbers rounded. */
export function keep(name, value) {
  const shorter = (key, v) => {
    if (key === "text") return undefined;
    return typeof v === "number" && !Number.isInteger(v) ? Number(v.toPrecision(4)) : v;
  };
  try {
    for (const store of [sessionStorage, localStorage]) store.setItem(name, JSON.stringify(value, shorter));
  } catch { /* then a reload starts anew */ }
}

export function kept(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name) ?? localStorage.getItem(name));
  } catch {
    return null;
  }
}
