// tokenizer.json in the browser: the ids that tokenizer.py gives, and the text.

const EOT = "<|endoftext|>";

// GPT-2's split. \p{White_Space} is what \s means elsewhere; JavaScript's own \s lacks U+0085 and has U+FEFF.
const SPLIT = new RegExp(String.raw`'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
  .replaceAll(String.raw`\s`, String.raw`\p{White_Space}`).replaceAll(String.raw`\S`, String.raw`\P{White_Space}`), "gu");

// In JSON, GPT-2 writes a byte as one visible character: its own in Latin-1, or one from U+0100 on where that is not visible.
const BYTE_CHAR = [];
for (let b = 0, n = 256; b < 256; b++) {
  const visible = b > 32 && b < 127 || b > 160 && b !== 173;
  BYTE_CHAR.push(String.fromCharCode(visible ? b : n++));
}
const CHAR_BYTE = new Map(BYTE_CHAR.map((c, b) => [c, b]));

const utf8 = new TextEncoder();

export class Tokenizer {
  /** From the parsed tokenizer.json. Throws an Error of one sentence for what tokenizer.py does not write or read either. */
  constructor(data) {
    const { model, added_tokens = [], pre_tokenizer: split, normalizer } = data ?? {};
    this.kind = { BPE: "bpe", WordLevel: "char" }[model?.type];
    if (!this.kind || typeof model.vocab !== "object")
      throw Error(`its model is ${model?.type ?? "missing"}, where BPE or WordLevel was expected`);
    if (normalizer || this.kind === "bpe" && !(split?.type === "ByteLevel" && !split.add_prefix_space && split.use_regex !== false))
      throw Error("it splits text in another way than GPT-2's");
    if (added_tokens.length !== 1 || added_tokens[0].content !== EOT)
      throw Error(`its added tokens are not ${EOT} alone`);
    this.eot = added_tokens[0].id;
    this.ids = new Map(Object.entries(model.vocab)).set(EOT, this.eot);
    this.size = this.ids.size;
    this.texts = [];  // id -> what the file says: byte characters, or a character
    for (const [text, id] of this.ids) this.texts[id] = text;
    if (this.texts.length !== this.size || this.texts.includes(undefined))
      throw Error(`the ids of its ${this.size} tokens are not 0 to ${this.size - 1}`);
    this.ids.delete(EOT);  // text that spells it is ordinary text
    if (this.kind === "bpe") this.check(model.merges ?? []);
    this.words = new Map();  // word -> ids, as words come again and again
  }

  /** encode() merges by the id of what results, which is right where merges and ids are in one order. */
  check(merges) {
    const made = merges.map(m => this.ids.get((typeof m === "string" ? m.split(" ") : m).join("")));
    const long = this.texts.filter((text, id) => id !== this.eot && text.length > 1).length;
    if (BYTE_CHAR.some(c => !this.ids.has(c)) || this.texts.some((t, id) => id !== this.eot && [...t].some(c => !CHAR_BYTE.has(c))))
      throw Error("its tokens are not made of all 256 bytes and of nothing else");
    if (made.length !== long || made.some((id, i) => id === undefined || i && id <= made[i - 1]))
      throw Error("its merges do not make its tokens in the order of their ids");
  }

  /** The ids of a text, never eot. Throws for a character that a character vocabulary lacks. */
  encode(text) {
    text = text.toWellFormed();  // a lone surrogate counts as U+FFFD
    if (this.kind === "bpe") return (text.match(SPLIT) ?? []).flatMap(word => this.word(word));
    return [...text].map(c => {
      if (this.ids.has(c)) return this.ids.get(c);
      throw Error(`The model does not know the character ${JSON.stringify(c)}, only ${this.ids.size} others.`);
    });
  }

  word(word) {
    if (this.words.has(word)) return this.words.get(word);
    const parts = Array.from(utf8.encode(word), b => BYTE_CHAR[b]);
    const merged = i => (i + 1 < parts.length ? this.ids.get(parts[i] + parts[i + 1]) : undefined) ?? Infinity;
    const ranks = parts.map((_, i) => merged(i));
    for (;;) {  // always the pair that was learned first, wherever it stands
      const best = ranks.reduce((a, b) => Math.min(a, b), Infinity);
      if (best === Infinity) break;
      let n = 0, here, before;
      for (let i = 0; i < parts.length; i++, n++, before = here) {
        here = ranks[i] === best;
        parts[n] = here ? this.texts[best] : parts[i];
        if (here) i++;
        ranks[n] = ranks[i];
        if (n && (here || before)) ranks[n - 1] = merged(n - 1);
      }
      parts.length = ranks.length = n;
    }
    const ids = parts.map(part => this.ids.get(part));
    if (this.words.size < 1e5) this.words.set(word, ids);
    return ids;
  }

  /** A function from the next id to the text it completes: a character spread over several tokens comes with its last one. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return id => decoder.decode(this.bytes(id), { stream: true });
  }

  bytes(id) {
    if (this.kind === "char" || id === this.eot) return utf8.encode(this.texts[id]);
    return Uint8Array.from(this.texts[id], c => CHAR_BYTE.get(c));
  }

  /** One token alone, for a list: U+FFFD where it is a part of a character. */
  show(id) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes(id));
  }
}
