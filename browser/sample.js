// The draw, as generate.py's next_token makes it, and the probabilities that the page shows.

/** The ids of the k largest logits and of those that equal the last of them, largest first, among equals the smallest id first. */
export function largest(logits, k) {
  const all = k > 1000;  // then it is faster to sort all
  // the k largest so far, ascending; few of the rest get into it
  const top = all ? logits.slice().sort().slice(-k) : logits.slice(0, k).sort();
  let least = top[0];
  for (let i = all ? logits.length : k; i < logits.length; i++) {
    const x = logits[i];
    if (!(x > least)) continue;
    let j = 1;
    for (; j < k && top[j] < x; j++) top[j - 1] = top[j];
    top[j - 1] = x;
    least = top[0];
  }
  const ids = [];
  for (let i = 0; i < logits.length; i++) if (logits[i] >= least) ids.push(i);
  return ids.sort((a, b) => logits[b] - logits[a] || a - b);
}

function finite(x) {
  if (!Number.isFinite(x)) throw Error("the model computes something that is not a number: is model.onnx damaged?");
  return x;
}

/** What a softmax divides by: the sum of exp((logit - max) / temperature), max being the largest logit. */
function total(logits, max, temperature = 1) {
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp((logits[i] - max) / temperature);
  return finite(sum);
}

const add = numbers => numbers.reduce((a, b) => a + b);

/** What next_token draws from: ids and their weights, which need not sum to 1. Not all logits are checked: score() does that. */
export function keep(logits, { temperature, top_k, top_p }) {
  const V = logits.length, greedy = temperature < 1e-5;
  const every = !(top_k > 0 && top_k < V);  // no token is left out by top_k
  const first = greedy || every ? 1 : top_k;
  let ids = largest(logits, first).slice(0, first);
  const max = finite(logits[ids[0]]);
  if (greedy) return { ids, weights: [1] };
  const weight = i => Math.exp((logits[i] - max) / temperature);
  if (every && top_p >= 1) {
    const all = { ids: new Uint32Array(V), weights: new Float64Array(V) };
    for (let i = 0; i < V; i++) all.weights[i] = weight(all.ids[i] = i);
    return all;
  }
  let weights = ids.map(weight);
  const sum = every ? total(logits, max, temperature) : add(weights);
  if (every)
    for (const k of [64, 512, V]) {  // more and more of the largest: few make up top_p, and to sort all is slow
      ids = largest(logits, Math.min(k, V));
      weights = ids.map(weight);
      if (k >= V || add(weights) >= top_p * sum) break;
    }
  let before = 0;
  const n = weights.findIndex(w => (before += w) >= top_p * sum);  // the token that crosses top_p is kept
  if (top_p >= 1 || n < 0) return { ids, weights };
  return { ids: ids.slice(0, n + 1), weights: weights.slice(0, n + 1) };
}

/** A number in [0, 1) for place n of a story: the same seed writes the same story, however often it was stopped on the way. */
export function uniform(seed, n) {
  let h = 0;
  for (const x of [seed, Math.floor(seed / 2 ** 32), n]) {  // murmur3's finalizer, once for each
    h = h + (x | 0) + 0x9e3779b9 | 0;  // x first becomes 32 bits, as a sum beyond 2 ** 53 would not be exact
    h = Math.imul(h ^ h >>> 16, 0x85ebca6b);
    h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
    h ^= h >>> 16;
  }
  return (h >>> 0) / 2 ** 32;
}

export function draw(logits, settings, n) {
  const { ids, weights } = keep(logits, settings);
  let left = uniform(settings.seed, n) * add(weights);
  return ids.find((_, i) => (left -= weights[i]) < 0) ?? ids.at(-1);
}

/** How likely a token was for the model itself, whatever the settings, and the n likeliest tokens. */
export function score(logits, id, n = 8) {
  const likely = largest(logits, Math.min(n, logits.length)).slice(0, n);
  const max = logits[likely[0]], sum = total(logits, max);
  const p = i => Math.exp(logits[i] - max) / sum;
  return { p: p(id), others: likely.map(i => [i, p(i)]) };
}
