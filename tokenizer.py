"""Byte-level BPE written from scratch: train, save, load, encode, decode.

A text is cut into words by GPT-2's pattern, a word is its UTF-8 bytes, and merges learned from a corpus join them pair
by pair (Sennrich et al. 2016, arXiv:1508.07909; over bytes: Radford et al. 2019, GPT-2). Any text can be encoded.

    python
    >>> from tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.train(["the cat sat on the mat", "the cat ate the rat"], vocab_size=270)
    >>> ids = tokenizer.encode("the rat sat"); print(ids, [tokenizer.decode([i]) for i in ids])
    >>> tokenizer.save("tokenizer.json"); print(Tokenizer.load("tokenizer.json").decode(ids))

tokenizer.json is the layout of Hugging Face's tokenizers, and opens there. One thing differs: here <|endoftext|> is
added by id only, and text that spells it is ordinary text (there: encode_special_tokens=True). A lone surrogate in a
str, which UTF-8 cannot hold, counts as U+FFFD.
"""

import codecs
import hashlib
import heapq
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import zip_longest
from math import inf
from pathlib import Path

import regex
import tiktoken

import tokenizer_json
from tokenizer_json import BYTE_CHAR, EOT, byte_chars

# GPT-2's split: contractions; letters, digits or other marks, each with the space before; whitespace that is left over.
# (Written shorter than in its encoder.py; it splits the same.)
SPLIT = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GAP = 100_000  # whitespace in a row; from a million on, tiktoken's regular expressions panic (a BaseException)
LONG_GAP = regex.compile(r"(?<!\s)\s{%d}" % GAP)  # (?<!\s): tried once a run, not at each of its characters


def mend(text):
    """text without surrogates: a pair becomes the character it means, a lone one U+FFFD (as tiktoken does)."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def merge_pair(ids, pair, new):
    """ids with every occurrence of pair, from left to right, replaced by new."""
    left, right = pair
    out = []
    for i in ids:
        if i == right and out and out[-1] == left:
            out[-1] = new
        else:
            out.append(i)
    return out


def merge_word(ids, merges):
    """The ids of one word after all merges: always the pair that was learned first, until no known pair is left."""
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda p: merges.get(p, inf))
        if pair not in merges:
            break
        ids = merge_pair(ids, pair, merges[pair])
    return ids


def learn_merges(words, counts, first, stop):
    """{(left, right): id} for ids first to stop - 1: each the most frequent pair by then, among equals the smallest.

    words (lists of ids) are merged in place. A merge touches only the words that hold its pair, so the counts are kept
    up to date instead of taken again. A pair is never more frequent than when it was born (a merge makes only pairs
    with the new id), so it has one heap entry, never too low; one found too high goes back with today's count.
    """
    pair_count, pair_words = defaultdict(int), defaultdict(set)
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += counts[w]
            pair_words[pair].add(w)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)
    merges = {}
    while heap and first + len(merges) < stop:
        n, pair = heapq.heappop(heap)
        if -n != pair_count[pair]:
            if pair_count[pair]:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        new = merges[pair] = first + len(merges)
        born = set()
        for w in pair_words.pop(pair):
            before, words[w] = words[w], merge_pair(words[w], pair, new)
            for p in zip(before, before[1:]):
                pair_count[p] -= counts[w]
            for p in zip(words[w], words[w][1:]):
                pair_count[p] += counts[w]
                if new in p:
                    pair_words[p].add(w)
                    born.add(p)
        for p in born:
            heapq.heappush(heap, (-pair_count[p], p))
    return merges


def recover_merges(tokens, eot):
    """The merges that make tokens (bytes, by id): the earlier ones must leave each token in exactly two parts.

    Where that holds, merging by the rank of the joined bytes (tiktoken) and by the rank of the pair (here, Hugging
    Face) agree. It holds for every vocabulary that came out of training; an edited one may fail, and is refused.
    """
    byte_id = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    if missing := [b for b in range(256) if b not in byte_id]:
        raise ValueError(f"byte {missing[0]} ({BYTE_CHAR[missing[0]]!r}) has no token; byte-level BPE needs all 256")
    merges = {}
    for i, token in enumerate(tokens):
        if i != eot and len(token) != 1:
            parts = merge_word([byte_id[b] for b in token], merges)
            if len(parts) != 2:
                raise ValueError(f"token {i} ({token!r:.60}) is not made by one merge of two tokens with smaller ids")
            merges[tuple(parts)] = i
    return merges


class Tokenizer:
    """Made by train, char, gpt2, load or from_str. kind is "bpe" or "char", eot the id of <|endoftext|>.

    Wrong input is a ValueError of one sentence. An instance never changes.
    """

    def __init__(self, kind, tokens, eot, merges=None):
        self.kind = kind
        self.tokens = tokens        # id -> bytes
        self.eot = eot
        self.merges = merges or {}  # (left id, right id) -> id, in the order learned, which is the order of ids
        self.vocab_size = len(tokens)
        self.bos = eot              # what a prompt starts with
        self.ids = {token: i for i, token in enumerate(tokens) if i != eot}

    @classmethod
    def train(cls, docs, vocab_size=4096):
        """Learn from an iterable of str, read once, keeping only word counts (Sennrich et al. 2016, algorithm 1).

        <|endoftext|> is id 0, then the 256 bytes, then the merges: exactly those of Hugging Face's BpeTrainer. Fewer
        than vocab_size where the text has no more pairs. ValueError: vocab_size below 257, no text, docs one str.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size {vocab_size} is too small: {EOT} and the 256 bytes already make 257")
        if isinstance(docs, str):
            raise ValueError("docs is one str, where an iterable of documents was expected, such as [text]")
        words = Counter()
        for doc in docs:
            words.update(SPLIT.findall(mend(doc)))
        if not words:
            raise ValueError("there is no text to train on: no document, or only empty ones")
        tokens = [EOT.encode(), *(bytes([b]) for b in BYTE_CHAR)]
        byte_id = {b: i for i, b in enumerate(BYTE_CHAR, 1)}
        word_ids = [[byte_id[b] for b in word.encode()] for word in words]
        merges = learn_merges(word_ids, list(words.values()), len(tokens), vocab_size)
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        return cls("bpe", tokens, 0, merges)

    @classmethod
    def char(cls, docs):
        """One token a character: <|endoftext|> is id 0, then the sorted characters of docs. ValueError: no text."""
        chars = set()
        for doc in docs:
            chars.update(mend(doc))
        if not chars:
            raise ValueError("there is no text to take characters from: no document, or only empty ones")
        return cls("char", [EOT.encode(), *(c.encode() for c in sorted(chars))], 0)

    @classmethod
    def gpt2(cls, folder=None):
        """GPT-2's vocabulary: encoder.json and vocab.bpe in folder, else tiktoken's cache or download. eot is 50256.

        ValueError: no download, or files that do not hold a byte-level BPE. OSError: files that are not there.
        """
        try:
            return cls._checked(*tokenizer_json.gpt2(folder))
        except (ValueError, RecursionError) as e:
            where = f"{folder}: encoder.json and vocab.bpe do not hold GPT-2's vocabulary: " if folder else ""
            raise ValueError(f"{where}{e}") from None

    @classmethod
    def load(cls, path):
        """from_str of a file. ValueError: as there, after the path. OSError: no such file."""
        try:
            return cls.from_str(Path(path).read_bytes().decode("utf-8"))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_str(cls, text):
        """The tokenizer in the text of a tokenizer.json, ours or a foreign one with GPT-2's split.

        ValueError: what tokenizer_json.loads refuses, bytes without a token, merges that do not make the tokens.
        """
        return cls._checked(*tokenizer_json.loads(text))

    @classmethod
    def _checked(cls, kind, tokens, eot, given):
        merges = recover_merges(tokens, eot) if kind == "bpe" else {}
        needed = [[byte_chars(tokens[left]), byte_chars(tokens[right])] for left, right in merges]
        for n, (got, need) in enumerate(zip_longest(needed if given is None else given, needed)):
            if got != need:
                raise ValueError(f"merge {n} is {got!r:.60}, but the tokens in order of id need {need!r:.60} there")
        return cls(kind, tokens, eot, merges)

    def to_str(self):
        """The text of tokenizer.json: the same for the same tokenizer, and from_str gives that tokenizer again."""
        return tokenizer_json.dumps(self.kind, self.tokens, self.eot, self.merges)

    tokenizer_json = to_str  # as Hugging Face's libraries read it

    def save(self, path):
        """Write tokenizer.json under a temporary name, then rename: never half a file. OSError: cannot be written."""
        partial = Path(f"{path}.partial")
        partial.write_bytes(self.tokenizer_json().encode())
        os.replace(partial, path)

    @property
    def head(self):
        """The ids that a document starts with in data: bos, where it is not the end-of-text before it already."""
        return [self.bos] * (self.bos != self.eot)

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.to_str().encode()).hexdigest()

    @cached_property
    def _fast(self):
        return tiktoken.Encoding("tinylm", pat_str=SPLIT.pattern, mergeable_ranks=self.ids, special_tokens={})

    def encode(self, text):
        """encode_plain, but through tiktoken's Rust core. ValueError: as there."""
        if self.kind == "char" or len(text) > GAP and LONG_GAP.search(text):
            return self.encode_plain(text)
        return self._fast.encode_ordinary(text)

    def encode_more(self, text):
        """encode for a text that goes on where another ended; to a ForeignTokenizer that makes a difference."""
        return self.encode(text)

    def encode_batch(self, texts, num_threads=os.cpu_count()):
        """encode for each of texts, on num_threads threads (tiktoken lets go of the interpreter lock)."""
        texts = list(texts)
        size = len(texts) // (8 * num_threads) + 1  # to hand over one short text takes longer than to encode it
        shares = [texts[i:i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads) as pool:
            return [ids for share in pool.map(lambda share: [self.encode(text) for text in share], shares) for ids in share]

    def encode_plain(self, text):
        """The ids of a str, never eot; to read, and to test encode with. ValueError: a character that char lacks."""
        text = mend(text)
        if self.kind == "char":
            try:
                return [self.ids[c.encode()] for c in text]
            except KeyError as e:
                c = e.args[0].decode()
                raise ValueError(f"character {c!r} (U+{ord(c):04X}) is not one of the {len(self.ids)} known") from None
        ids = []
        for word in SPLIT.findall(text):
            ids += merge_word([self.ids[bytes([b])] for b in word.encode()], self.merges)
        return ids

    def decode_bytes(self, ids):
        """The bytes of any ids; eot's are its name. ValueError: an id outside the vocabulary."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside this vocabulary of {self.vocab_size} tokens, ids from 0 on")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids):
        """The text of any ids, with U+FFFD for bytes that are no UTF-8. ValueError: an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    decode_more = decode  # of ids that go on where others ended
    prefix = 0            # bytes that encode puts before a text

    def stream(self):
        """A function from the next id to the text it completes, which may be none yet; None at the end gives the rest.

        Joined, the texts are decode of all ids. A character spread over several tokens comes with its last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: decoder.decode(b"" if i is None else self.decode_bytes([i]), final=i is None)
