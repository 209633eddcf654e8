// The page. A story is a list of tokens, yours and the model's; what the model writes becomes text nodes, never markup.

import { get } from "./get.js";
import { keep, keepSettings, kept, readSettings, restoreSettings, showSettings } from "./settings.js";
import { closeOthers, connect, drawTokens, hideOthers, isListOpen } from "./spans.js";
import { Tokenizer } from "./tokenizer.js";

const $ = id => document.getElementById(id);
const edit = $("edit"), story = $("story");
const CHUNK = 64;  // tokens read at once: the page can stop between, and their logits stay small

let config, tokenizer;
// {id, text, given, p, others}: given means by you; p and others are those of score() in sample.js, once it was read
let tokens = [];
let decode;          // from the next id to its text
let from = 0;        // the first token that the model still sees
let cached = 0;      // how many from there on are in the worker's cache

// ---------------------------------------------------------------------------------------------------------------------
// The worker answers one message after the other

let worker, waiting, bytes = 0;

function startWorker() {
  worker = new Worker("model.js", { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.failed) waiting.reject(Error(data.failed));
    else if (data.done) waiting.resolve();
    else if (data.bytes) showLoading(data.bytes, data.of);
    else waiting.heard(data);
  };
  worker.onerror = e => waiting.reject(Error(e.message || "model.js did not come whole: reload the page."));
}

function showLoading(soFar, of) {
  bytes = soFar;
  $("speed").textContent = `Loading the model: ${mega(bytes)}${of ? ` of ${mega(of)}` : ""} MB`;
}

/** Sends a message and waits until it is done. heard is called with what the worker tells on the way. */
function ask(message, heard) {
  return new Promise((resolve, reject) => {
    waiting = { resolve, reject, heard };
    worker.postMessage(message);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The story

const text = () => tokens.map(t => t.text).join("");
const isStart = i => i === 0 && tokens[0].id === config.eot;  // a document starts after end-of-text
const blank = () => !tokens.some((_, i) => !isStart(i));
const isEnd = id => config.ends.includes(id);
const ended = () => tokens.length > 1 && isEnd(tokens.at(-1).id);
const full = () => tokens.length - from > config.block_size;

function push(id, more) {
  tokens.push({ id, text: isEnd(id) ? "" : decode(id), ...more });
}

/** Forgets the tokens from n on. The one before them is read again, as the logits after it are needed. */
function cut(n) {
  tokens.splice(n);
  decode = tokenizer.stream();
  for (const { id } of tokens) if (!isEnd(id)) decode(id);
  if (lastHalf() < from) [from, cached] = [lastHalf(), 0];
  else cached = Math.max(0, Math.min(cached, n - 1 - from));
}

/** The first token of the last half of a window; sample.py's --past_end=recompute goes on from there. */
const lastHalf = () => Math.max(0, tokens.length - Math.max(1, Math.floor(config.block_size / 2)));

const EDGES = /^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu;  // what Python's strip() takes away
const byTextRule = prompt => config.text_rule === "as it stands" ? prompt : prompt.replace(EDGES, "");  // as in data.py

/** The ids of a text as a story, with the token that one starts with. Throws for text that the tokenizer cannot encode. */
function encodeStory(now) {
  let ids = tokenizer.encode(now);
  if (config.template && ids[0] !== tokens.find((_, i) => !isStart(i))?.id)  // another story: its text is a prompt
    ids = tokenizer.encode(config.template.split("{prompt}").join(byTextRule(now)));
  const startsWithToken = !ids.length || config.bos !== null && tokenizer.kind !== "char";  // as data.prompt_ids
  return startsWithToken ? [config.bos ?? config.eot, ...ids] : ids;
}

/** Makes this text the story; tokens that are the same at its start stay, in the cache too. Throws as encodeStory does. */
function setText(now) {
  if (tokens.length && now === text()) return;
  const ids = encodeStory(now);
  let n = 0, m = 0;  // tokens alike at the start, and at the end
  const old = ended() ? tokens.slice(0, -1) : [...tokens];
  const most = Math.min(ids.length, old.length);
  while (n < most && old[n].id === ids[n]) n++;
  while (m < most - n && old.at(-1 - m).id === ids.at(-1 - m)) m++;
  cut(n);
  for (let i = n; i < ids.length; i++) {
    const isNew = i < ids.length - m;
    push(ids[i], { given: isNew || old[i - ids.length + old.length].given });
  }
}

/** Reads what is not in the cache yet; with settings it writes on, until the end, the end of the context, or stop(). */
async function read(settings) {
  speed = null;
  for (let last = false; !last && !stopped;) {
    const part = tokens.slice(from + cached, from + Math.min(cached + CHUNK, config.block_size));
    last = from + cached + part.length === tokens.length;
    if (!part.length && !last) return;  // past the end of the context
    const message = {
      keep: cached,
      ids: part.map(t => t.id),
      scored: part.every(t => t.others),
      settings: last && settings,
      place: tokens.length,
      most: config.block_size + 1 - (tokens.length - from),
    };
    await ask(message, told => hear(part, told));
  }
}

/** Takes what the worker tells of the tokens that it was given to read, or of one that it has written. */
function hear(part, { scores, next, at }) {
  scores?.forEach((score, j) => {
    if (!part[j].others) Object.assign(part[j], score);  // a token keeps its first score when the window moves on
  });
  cached = next ? tokens.length - from : cached + part.length;
  if (next) {
    push(next.id, next);
    speed = { made: (speed?.made ?? 0) + 1, first: speed?.first ?? at, now: at };
  }
  draw();
}

/** Makes a change and writes on. Where the settings are wrong, it throws before the change. */
async function write(change = () => {}) {
  const settings = readSettings();
  change();
  return read(ended() || full() ? null : settings);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the buttons do: one thing after the other

let working = null;  // a promise while the model reads or writes
let stopped = false;
let editing = true;  // then nothing works
let speed = null;
let turns = 0;
let before = null;   // the story that "New story" put away, as onDesk() has it

/** Stops what is under way and waits for it. Resolves to false if something else was asked for meanwhile. */
async function rest() {
  stop();
  const turn = turns;
  await working;
  return turn === turns;
}

/** Does what once nothing else is under way, and says how it ended. */
async function work(what) {
  if (!await rest()) return;
  stopped = false;
  say("");
  const mine = working = (async () => {
    try {
      await what();
      say(where());
    } catch (e) {
      cached = 0;  // whatever the worker holds
      say(e.message, true);
    }
  })();
  draw();
  await mine;
  if (working === mine) working = null;
  save();
  draw();
}

/** Why the model writes no more. */
function where() {
  if (ended()) return "The model ended its story here.";
  if (tokens.length - from > config.block_size + 1)
    return `This text has ${tokens.length} tokens, and the model sees ${config.block_size} at a time.`;
  if (full()) return `The context of ${config.block_size} tokens is full.`;
  return stopped ? "Stopped." : "";
}

function stop() {
  turns++;
  stopped = true;
  worker.postMessage({ stop: true });
}

/** Takes over what was typed, then works on it: what is write or read. */
function finish(what) {
  try {
    setText(edit.value);
  } catch (e) {
    return say(e.message, true);
  }
  if (what === read && blank()) return;
  editing = false;
  work(what);
  $("write").focus({ preventScroll: true });
}

/** Opens the editor, with a draft or the story, and the caret at its place or at the end. */
async function change(draft, caret) {
  if (!await rest()) return;
  editing = true;
  hideOthers();
  say("");
  edit.value = draft ?? text();
  save();
  redraw();
  edit.focus({ preventScroll: true });
  caret ??= edit.value.length;
  edit.setSelectionRange(caret, caret);
}

function press() {
  if (working) stop();
  else if (editing) finish(write);
  else if (ended()) return;  // in the moment before the button, which has just said Stop, is hidden
  else work(() => write(() => {
    if (full()) [from, cached] = [lastHalf(), 0];
  }));
}

/** Writes on after your last token in another way: with the next seed. */
function again() {
  work(() => {
    $("seed").value = (Number($("seed").value) + 1) % 2 ** 53;
    const yours = tokens.findLastIndex(t => t.given && !isEnd(t.id)) + 1;  // an end goes, even if you took it
    return write(() => cut(Math.max(1, yours)));
  });
}

/** Puts an id in the place of a token, and writes on from there. */
function take(token, id) {
  hideOthers();
  $("write").focus({ preventScroll: true });
  work(() => write(() => {
    if (!tokens.includes(token)) return;  // something else was faster
    cut(tokens.indexOf(token));
    push(id, { given: true });
  }));
}

const onDesk = () => ({ tokens, from, draft: editing ? edit.value : null, fingerprint: config.fingerprint });

const nothing = () => ({ tokens: [], from: 0, draft: config.start });
const unwritten = () => editing && blank() && ["", config.start.trim()].includes(edit.value.trim());

/** Puts a story on the desk. */
function lay(story) {
  tokens = [];
  cut(0);
  // else p and others are those of another model with this tokenizer
  const isJudged = story.fingerprint === config.fingerprint;
  for (const { id, given, p, others } of story.tokens) push(id, isJudged ? { given, p, others } : { given });
  from = story.from;
  editing = blank() || story.draft !== null;
  edit.value = story.draft ?? "";
}

/** Puts the story away for a new one, or brings the last one back. */
async function clear() {
  if (unwritten() && before) {
    lay(before);
    before = null;
    return editing ? change(edit.value) : work(read);
  }
  if (!await rest()) return;
  before = blank() ? before : onDesk();
  lay(nothing());
  await change(config.start);
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing, at most once a frame

let frame = null;

function draw() {
  frame ??= requestAnimationFrame(redraw);
}

function redraw() {
  cancelAnimationFrame(frame);
  frame = null;
  edit.hidden = !editing;
  story.hidden = editing;
  if (editing) fit();
  else drawTokens(tokens);
  story.classList.toggle("writing", Boolean(working));
  const done = !working && !editing && ended();
  $("write").textContent = working ? "Stop" : editing ? "Write" : full() ? "Go on from the last half" : "Continue";
  $("again").classList.toggle("main", done);
  $("again").hidden = editing || !tokens.some(t => !t.given);
  if (done && document.activeElement === $("write")) $("again").focus({ preventScroll: true });
  $("write").hidden = done;  // after the focus has moved, as a hidden button loses it, in some browsers later
  $("change").hidden = editing && blank();
  $("change").textContent = editing ? "Done" : "Edit";
  const back = before && unwritten();
  $("clear").hidden = editing && blank() && !back;
  $("clear").textContent = back ? "Bring the last one back" : "New story";
  $("speed").textContent = editing ? "" : [speedText(), contextText()].filter(Boolean).join(" · ");
}

function speedText() {
  if (!(speed?.made > 1)) return "";
  const rate = 1000 * (speed.made - 1) / (speed.now - speed.first);
  return `${Math.round(rate).toLocaleString("en")} tokens/s`;
}

function contextText() {
  if (blank()) return "";
  return `${Math.min(tokens.length - from, config.block_size)} of ${config.block_size} tokens of context`;
}

/** Makes the editor as high as its text. */
function fit() {
  const y = scrollY;
  edit.style.height = "auto";
  edit.style.height = `${edit.scrollHeight}px`;
  scrollTo(scrollX, y);  // back, as for a moment the page was too short for this place
}

function say(what, bad = false) {
  $("said").textContent = what;
  $("said").className = bad ? "bad" : "";
}

const mega = n => (n / 1e6).toFixed(1);

function fatal(message) {
  const p = document.createElement("p");
  p.className = "error";
  p.setAttribute("role", "alert");
  p.textContent = message;
  $("paper").replaceChildren(p);
  document.querySelector(".buttons").hidden = true;
  $("speed").textContent = "";
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys, settings, and what a reload finds again

document.addEventListener("keydown", e => {
  if (e.key !== "Escape" || e.isComposing) return;
  if (isListOpen()) closeOthers();
  else if (working) stop();
  else if (editing && !$("change").hidden) finish(read);
});
edit.addEventListener("keydown", e => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing || matchMedia("(pointer: coarse)").matches) return;
  e.preventDefault();
  press();
});
edit.addEventListener("input", () => {
  draw();
  save();
});
addEventListener("resize", () => {
  hideOthers();
  draw();
});
$("write").onclick = press;
// the Enter that began writing does not stop it while it is held down
$("write").onkeydown = e => !(e.repeat && e.key === "Enter");
$("again").onclick = again;
$("change").onclick = () => editing ? finish(read) : change();
$("clear").onclick = clear;
$("settings").onsubmit = e => e.preventDefault();
$("settings").oninput = () => {
  showSettings();
  save();
};
addEventListener("pagehide", save);
document.addEventListener("visibilitychange", save);

const storyName = () => `tinylm ${config.tokenizer_sha256} ${config.block_size}`;

function save() {
  keepSettings();
  if (!edit.disabled) keep(storyName(), { ...onDesk(), before });  // else the old one is still to come
}

// ---------------------------------------------------------------------------------------------------------------------
// The start

async function getJson(name) {
  const bytes = await get(name);
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw Error(`model/${name} is damaged: it is not JSON.`);
  }
}

/** Reads config.json. Throws an Error of one sentence where this page cannot do with it. */
async function getConfig() {
  const config = await getJson("config.json");
  if (![4, 5, 6].includes(config?.format)) {
    const format = JSON.stringify(config?.format);
    throw Error(`model/config.json has format ${format}; this page reads format 6: `
      + "export the model again, with --overwrite.");
  }
  config.ends ??= [config.eot];  // format 4
  for (const key of ["n_layer", "n_kv_head", "head_dim", "block_size", "vocab_size"])
    if (!(Number.isInteger(config[key]) && config[key] > 0))
      throw Error(`model/config.json is damaged: its ${key} is ${JSON.stringify(config[key])}.`);
  config.template = String(config.template ?? "");
  if (config.template === "{messages}")
    throw Error("This model answers by its own chat template, which this page does not know: "
      + "python sample.py --chat --onnx=FOLDER talks with it.");
  config.start = String(config.start ?? "");
  return config;
}

/** Reads tokenizer.json. Throws an Error of one sentence where it is damaged or does not belong to config.json. */
async function getTokenizer() {
  const file = await getJson("tokenizer.json");
  let tokenizer;
  try {
    tokenizer = new Tokenizer(file);
  } catch (e) {
    throw Error(`model/tokenizer.json cannot be used: ${e.message}.`);
  }
  if (tokenizer.size !== config.vocab_size || tokenizer.eot !== config.eot)
    throw Error("model/tokenizer.json and model/config.json are not of one model: export it again.");
  return tokenizer;
}

async function start() {
  config = await getConfig();
  tokenizer = await getTokenizer();
  startWorker();
  await ask({ load: config });
  const size = `${config.n_layer} layers and ${mega(bytes)} MB`;
  $("about").textContent = `A language model of ${size}. It writes in this page, on your own machine.`;
  const story = kept(storyName()) ?? nothing();
  try {
    lay(story);
    before = story.before ?? null;
  } catch {
    lay(nothing());
  }
  say("");
  edit.disabled = $("write").disabled = false;
  if (editing) edit.focus({ preventScroll: true });
  else await work(read);
  redraw();
}

connect({ isEnd, show: id => tokenizer.show(id), take, change });
restoreSettings();
start().catch(e => fatal(e.message));
