// What sample.py's next_token does, and what the page tells of it.

/** The ids of the k largest logits and of those that equal the last of them, largest first, among equals the smallest id first. */
export function largest(logits, k) {
  const all = k > 1000;  // then to sort is faster
  const top = all ? logits.slice().sort().slice(-k) : logits.slice(0, k).sort();  // the k largest so far, ascending; few of the rest get into it
  for (let i = all ? logits.length : k; i < logits.length; i++) {
    if (!(logits[i] > top[0])) continue;
    let j = 1;
    for (; j < k && top[j] < logits[i]; j++) top[j - 1] = top[j];
    top[j - 1] = logits[i];
  }
  const ids = [];
  for (let i = 0; i < logits.length; i++) if (logits[i] >= top[0]) ids.push(i);
  return ids.sort((a, b) => logits[b] - logits[a] || a - b);
}

/** exp(logit - the largest), and their sum: a softmax before the division. */
function softmax(logits, temperature = 1) {
  let max = -Infinity, sum = 0;
  for (const x of logits) if (!(x <= max)) max = x;  // nan gets in, too
  const p = new Float64Array(logits.length);
  for (let i = 0; i < p.length; i++) sum += p[i] = Math.exp((logits[i] - max) / temperature);
  if (!Number.isFinite(sum)) throw Error("the model computes something that is not a number: is model.onnx damaged?");
  return { p, sum };
}

/** What next_token draws from: ids and their weights, which need not sum to 1. */
export function keep(logits, { temperature, top_k, top_p }) {
  const V = logits.length, every = !(top_k > 0 && top_k < V);
  if (temperature < 1e-5) return { ids: largest(logits, 1).slice(0, 1), weights: [1] };
  const { p, sum } = softmax(logits, temperature);
  let ids, total = sum;
  if (every && top_p >= 1) {
    ids = [...p.keys()];
  } else {
    for (let k = every ? 64 : top_k; ; k = k < 512 ? 512 : V) {  // to sort all is slow, and few make up top_p
      ids = largest(logits, Math.min(k, V)).slice(0, every ? V : top_k);
      const mass = ids.reduce((s, i) => s + p[i], 0);
      if (!every) total = mass;
      if (!every || k >= V || mass >= top_p * sum) break;
    }
    let before = 0;
    const n = ids.findIndex(i => (before += p[i]) >= top_p * total);  // the token that crosses top_p is kept
    if (top_p < 1 && n >= 0) ids = ids.slice(0, n + 1);
  }
  return { ids, weights: ids.map(i => p[i]) };
}

/** A number in [0, 1) for place n of a story: the same seed writes the same story, however often it was stopped on the way. */
export function uniform(seed, n) {
  let h = 0;
  for (const x of [seed, Math.floor(seed / 2 ** 32), n]) {  // murmur3's finalizer, once for each
    h = h + x + 0x9e3779b9 | 0;
    h = Math.imul(h ^ h >>> 16, 0x85ebca6b);
    h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
    h ^= h >>> 16;
  }
  return (h >>> 0) / 2 ** 32;
}

export function draw(logits, settings, n) {
  const { ids, weights } = keep(logits, settings);
  let left = uniform(settings.seed, n) * weights.reduce((a, b) => a + b);
  return ids.find((_, i) => (left -= weights[i]) < 0) ?? ids.at(-1);
}

/** How likely a token was to the model itself, whatever the settings, and what it might have been. */
export function score(logits, id, n = 8) {
  const { p, sum } = softmax(logits);
  const likely = largest(logits, Math.min(n, logits.length)).slice(0, n);
  return { p: p[id] / sum, others: likely.map(i => [i, p[i] / sum]) };
}
