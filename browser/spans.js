// The story as spans, one a token, and the list of what else a token might have been.

const $ = id => document.getElementById(id);
const story = $("story"), others = $("others");

const spans = [];    // {token, span, p}: p is the token's probability as it was drawn
let app;             // what connect() was given
let chosen = -1;     // the token whose others are shown
let pinned = false;  // they were asked for by click or key, and stay when the mouse leaves
let over;            // the element that the mouse was last moved to: no list opens because the story moves under it
let timer;

/** Takes the functions of the page that are called here: isEnd(id), show(id), take(token, id) and change(draft, caret). */
export function connect(functions) {
  app = functions;
}

// ---------------------------------------------------------------------------------------------------------------------
// The spans

/** Draws the tokens of a story; those that were drawn before keep their spans. */
export function drawTokens(tokens) {
  let same = 0;
  while (same < spans.length && same < tokens.length && spans[same].token === tokens[same]) same++;
  if (chosen >= same) hideOthers();
  for (const { span } of spans.splice(same)) span.remove();
  for (const token of tokens.slice(same)) {
    const span = makeSpan(token);
    story.append(span);
    spans.push({ token, span });
  }
  for (const s of spans) {
    if (s.p === s.token.p) continue;
    s.p = s.token.p;
    s.span.style.setProperty("--heat-of", Math.min(1, -Math.log(s.p) / Math.log(100)).toFixed(3));  // full at one in a hundred
  }
  if (!story.querySelector("[tabindex='0']")) spans.find(s => s.span.textContent)?.span.setAttribute("tabindex", "0");
}

function makeSpan(token) {
  const span = document.createElement("span"), end = app.isEnd(token.id) && spans.length > 0;
  span.textContent = end ? "∎" : token.text;
  span.className = end ? "end" : /^\n+$/.test(token.text) ? "line" : "";
  span.classList.toggle("given", Boolean(token.given));
  span.classList.toggle("spaced", token.text.startsWith(" "));
  span.tabIndex = -1;
  if (span.textContent) {
    span.role = "button";
    span.ariaHasPopup = "true";
    if (end) span.ariaLabel = "∎ the end";
    else if (!token.text.trim()) span.ariaLabel = token.text.includes("\n") ? "new line" : "space";
  }
  return span;
}

const indexOf = target => spans.findIndex(s => s.span === target);

/** The next token from i on, in steps of by = 1 or -1, that has text. */
function step(i, by) {
  do i += by; while (spans[i] && !spans[i].span.textContent);
  return i;
}

function focusToken(i) {
  if (!spans[i]?.span.textContent) return;
  story.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  spans[i].span.tabIndex = 0;
  spans[i].span.focus();
  showOthers(i, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// The list

export const isListOpen = () => chosen >= 0;

function showOthers(i, pin = false) {
  const { token, span } = spans[i];
  hideOthers();
  [chosen, pinned] = [i, pin];
  span.classList.add("on");
  const head = document.createElement("p"), close = document.createElement("button");
  if (token.p !== undefined) head.textContent = `Probability ${percent(token.p)}. Take another:`;
  else head.textContent = i ? "The model has not read this token." : "The first token: nothing comes before it.";
  close.textContent = "Close";
  close.onclick = closeOthers;
  head.append(close);
  others.replaceChildren(head, ...(token.others ?? []).map(([id, p]) => otherButton(token, id, p)));
  others.hidden = false;
  place(span);
}

/** The button that takes an id, of probability p, in place of a token. */
function otherButton(token, id, p) {
  const button = document.createElement("button"), name = document.createElement("span"), share = document.createElement("span");
  name.append(...(app.isEnd(id) ? ["∎ the end"] : visible(app.show(id))));
  share.textContent = percent(p);
  button.append(name, share);
  button.style.setProperty("--p", p.toFixed(4));
  if (id === token.id) button.setAttribute("aria-current", "true");
  button.onclick = () => app.take(token, id);
  return button;
}

/** Puts the list below the first line of a span, or above it where there is no room. */
function place(span) {
  const paper = $("paper").getBoundingClientRect(), [line] = span.getClientRects();
  const { offsetWidth: width, offsetHeight: height } = others;
  const above = line.bottom + height > Math.min(innerHeight, paper.bottom) && line.top > height;
  others.style.left = `${Math.max(8, Math.min(line.left - paper.left, paper.width - width - 8))}px`;
  others.style.top = `${(above ? line.top - height : line.bottom) - paper.top}px`;
  if (getComputedStyle(others).position === "fixed")  // on a phone: at the bottom
    scrollBy(0, Math.max(0, line.bottom + 8 - (innerHeight - height)));
}

export function hideOthers() {
  clearTimeout(timer);
  spans[chosen]?.span.classList.remove("on");
  chosen = -1;
  others.hidden = true;
}

/** Hides the list; the focus goes from it back to its token. */
export function closeOthers() {
  if (others.contains(document.activeElement)) spans[chosen].span.focus();
  hideOthers();
}

const percent = p => p >= 0.9995 ? "100%" : p < 0.0005 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`;

/** A token's text with its spaces made visible. */
function visible(text) {
  return Array.from(text, c => {
    const mark = { " ": "·", "\n": "↵", "\t": "⇥" }[c];
    if (!mark) return c;
    const i = document.createElement("i");
    i.textContent = mark;
    return i;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Mouse, finger and keys

story.addEventListener("pointermove", e => {
  if (e.pointerType !== "mouse" || e.target === over) return;
  over = e.target;
  clearTimeout(timer);  // the way down to the list may cross other tokens
  const i = indexOf(over);
  if (!(pinned && chosen >= 0)) timer = setTimeout(() => i < 0 ? hideOthers() : i !== chosen && showOthers(i), 90);
});
others.addEventListener("pointermove", () => {
  over = null;
  clearTimeout(timer);
});
$("paper").addEventListener("pointerleave", e => {
  over = null;
  clearTimeout(timer);
  if (e.pointerType === "mouse" && !pinned) hideOthers();
});
document.addEventListener("pointerdown", e => {
  if (!$("paper").contains(e.target)) hideOthers();
});
story.addEventListener("click", e => {
  const i = indexOf(e.target);
  if (i >= 0 && !(pinned && chosen === i)) focusToken(i);
  else if (i >= 0 || chosen >= 0) hideOthers();
  else if (!getSelection().toString()) app.change();
});
story.addEventListener("dblclick", e => {
  const i = indexOf(e.target);
  if (i >= 0) app.change(undefined, spans.slice(0, i + 1).map(s => s.token.text).join("").length);
});
story.addEventListener("focusin", e => {
  const i = indexOf(e.target);
  if (i >= 0 && i !== chosen && e.target.matches(":focus-visible")) showOthers(i, true);
});
story.addEventListener("keydown", e => {
  const i = indexOf(e.target);
  if (i < 0 || e.ctrlKey || e.metaKey || e.altKey) return;
  const to = { ArrowLeft: step(i, -1), ArrowRight: step(i, 1), Home: step(-1, 1), End: step(spans.length, -1) }[e.key];
  if (to !== undefined) focusToken(to);
  else if (["ArrowDown", "Enter", " "].includes(e.key)) {
    if (chosen !== i) showOthers(i, true);
    others.querySelector(":scope > button")?.focus();
  } else return;
  e.preventDefault();
});
others.addEventListener("keydown", e => {
  const by = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[e.key];
  if (!by) return;
  e.preventDefault();
  const to = e.target[by];
  if (to?.matches("button")) to.focus();
  else if (e.key === "ArrowUp") spans[chosen].span.focus();
});
