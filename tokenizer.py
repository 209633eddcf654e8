"""Byte-level BPE written from scratch: train, save, load, encode, decode.

A text is cut into words by GPT-2's pattern, a word is its UTF-8 bytes, and merges learned from a corpus
join them pair by pair (Sennrich et al. 2016, arXiv:1508.07909; over bytes: Radford et al. 2019, GPT-2).
Any text can be encoded.

    python
    >>> from tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.train(["the cat sat on the mat", "the cat ate the rat"], vocab_size=270)
    >>> ids = tokenizer.encode("the rat sat"); print(ids, [tokenizer.decode([i]) for i in ids])
    >>> tokenizer.save("tokenizer.json"); print(Tokenizer.load("tokenizer.json").decode(ids))

tokenizer.json has the layout of Hugging Face's tokenizers (vocabulary.py), and opens there, in transformers
and in transformers.js. One thing differs: here <|endoftext|> is added by id only, and text that spells it is
ordinary text (there: encode_special_tokens=True). A lone surrogate in a str, which UTF-8 cannot hold,
counts as U+FFFD.
"""

import codecs
import hashlib
import heapq
import os
import re
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import pairwise, zip_longest
from math import inf
from pathlib import Path

import regex
import tiktoken

from vocabulary import (
    BYTE_CHAR,
    EOT,
    byte_chars,
    dump_vocabulary,
    parse_vocabulary,
    read_gpt2_vocabulary,
)

# GPT-2's split: contractions; letters, digits or other marks, each with the space before;
# whitespace that is left over. (Written shorter than in its encoder.py; it splits the same.)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT = regex.compile(PATTERN)
# the same for texts of ASCII alone, for which Python's own re takes half the time
ASCII_SPLIT = re.compile(PATTERN.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), re.ASCII)
GAP = 100_000  # whitespace in a row; from a million on, tiktoken panics (a BaseException)
LONG_GAP = regex.compile(r"(?<!\s)\s{%d}" % GAP)  # (?<!\s): tried once for each run of whitespace

# How much different words may take while merges are learned from them, in word_bytes: some 400,000 English ones, with
# which a process takes 250 MB. It takes more where each word has other pairs, as in random characters.
WORD_BYTES = 5_500_000


def mend(text):
    """Returns text without surrogates: pairs become characters, lone ones U+FFFD (as in tiktoken)."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split(text):
    """Returns the words of a text, which together are the text."""
    return (ASCII_SPLIT if text.isascii() else SPLIT).findall(text)


# ---- merges


def check_vocab_size(vocab_size):
    """Raises ValueError where a vocabulary of this size has no room for end-of-text and the bytes."""
    if vocab_size < 257:
        needed = f"{EOT} and the 256 bytes already make 257"
        raise ValueError(f"vocab_size {vocab_size} is too small: {needed}")


def count_words(docs):
    """Returns {word: how often it occurs} of texts, an iterable.

    Memory is bounded: where different words take more than WORD_BYTES, the rarest are forgotten until the
    others take three quarters of that, and count from 0 if they come again, as in word2vec.c (ReduceVocab).
    """
    words = Counter()
    look_at = 0  # the number of words at which to look next how much they take
    for doc in docs:
        words.update(split(mend(doc)))
        if len(words) < look_at:
            continue
        if word_bytes(words) > WORD_BYTES:
            words = most_frequent(words, WORD_BYTES * 3 // 4)
        look_at = len(words) + len(words) // 20 + 10_000
    return words


def word_bytes(words):
    """Returns about how much memory different words take, in units of some 40 bytes."""
    return sum(len(word.encode()) + 5 for word in words)


def most_frequent(words, limit):
    """Returns the most frequent words, as many as take no more than limit; among equals those that were seen first."""
    kept = Counter()
    total = 0
    for word, count in words.most_common():
        total += word_bytes([word])
        if total > limit and kept:
            break
        kept[word] = count
    return kept


def merge_pair(ids, pair, new):
    """Returns ids with every occurrence of pair, from left to right, replaced by new."""
    left, right = pair
    out = []
    for i in ids:
        if i == right and out and out[-1] == left:
            out[-1] = new
        else:
            out.append(i)
    return out


def merge_word(ids, merges):
    """Returns the ids of one word after all merges: the pair learned first is always merged first."""
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda p: merges.get(p, inf))
        if pair not in merges:
            break
        ids = merge_pair(ids, pair, merges[pair])
    return ids


def learn_merges(words, counts, first, stop, progress=iter):
    """Returns {(left, right): id} for ids first to stop - 1, or fewer where no pair is left.

    words: an iterable of lists of ids, counts: how often each word occurs. Each id merges the pair that is
    most frequent by then, among equals the smallest. progress: a function from an iterable to one that
    shows how far it is, such as tqdm.

    The words stand in one linked list, and a merge visits only the places of its pair, so a word as
    long as the text takes no longer than many short ones.
    """
    ids = []  # None between words, and where an id was merged into the one before it
    weights = []  # how often each id's word occurs
    for word, count in zip(words, counts):
        ids += [*word, None]
        weights += [count] * (len(word) + 1)
    before = array("i", range(-1, len(ids) - 1))  # ids[-1] is None, too
    after = array("i", range(1, len(ids) + 1))
    pair_count = defaultdict(int)
    # the places of each pair's left id, in order; from some the pair may be gone
    pair_places = defaultdict(partial(array, "i"))
    for i, pair in enumerate(pairwise(ids)):
        if None not in pair:
            pair_count[pair] += weights[i]
            pair_places[pair].append(i)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)
    merges = {}
    for new in progress(range(first, min(stop, first + len(ids)))):
        pair = pop_most_frequent(heap, pair_count)
        if pair is None:
            break
        merges[pair] = new
        left, right = pair
        born = set()
        for i in pair_places.pop(pair):
            j = after[i]
            if ids[i] != left or ids[j] != right:
                continue
            count = weights[i]
            h, k = before[i], after[j]
            previous, following = ids[h], ids[k]
            if previous is not None:
                pair_count[previous, left] -= count
                p = previous, new
                pair_count[p] += count
                pair_places[p].append(h)
                born.add(p)
            if following is not None:
                pair_count[right, following] -= count
                p = new, following
                pair_count[p] += count
                pair_places[p].append(i)
                born.add(p)
            ids[i], ids[j] = new, None
            after[i], before[k] = k, i
        pair_count[pair] = 0
        for p in born:
            if pair_count[p]:  # in a run of the new id, a pair may be gone already
                heapq.heappush(heap, (-pair_count[p], p))
    return merges


def pop_most_frequent(heap, pair_count):
    """Returns the pair that is most frequent by now, or None where no pair is left, and takes it off the heap of
    (-count, pair).

    A pair has one entry, whose count is never too low: no pair gets more frequent after it came up, as a merge
    makes only pairs with the new id. An entry whose count is too high goes back with the count of the moment.
    """
    while heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count == pair_count[pair]:
            return pair
        if pair_count[pair]:
            heapq.heappush(heap, (-pair_count[pair], pair))
    return None


def merge_by_heap(ids, merges):
    """Returns what merge_word does, but in n log n steps for n ids: pairs wait in a heap.

    merges must have each pair with a merged id after the pair that made that id, as recover_merges does.
    """
    ids = [*ids, None]  # a ring; None also where an id was merged into the one before it
    before = list(range(-1, len(ids) - 1))
    after = [*range(1, len(ids)), 0]
    heap = [(merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges]
    heapq.heapify(heap)
    while heap:
        new, i = heapq.heappop(heap)
        j = after[i]
        if merges.get((ids[i], ids[j])) != new:  # another merge has taken this pair apart
            continue
        ids[i], ids[j] = new, None
        after[i] = after[j]
        before[after[i]] = i
        for left in (before[i], i):
            pair = ids[left], ids[after[left]]
            if pair in merges:
                heapq.heappush(heap, (merges[pair], left))
    return [i for i in ids if i is not None]


def recover_merges(tokens, eot):
    """Returns the merges that make tokens, a list of bytes: each token is made of the two parts in which the merges
    before it leave its bytes.

    Where that works, merging by the rank of the joined bytes (tiktoken) and by the rank of the pair (here,
    Hugging Face) give the same ids. It works for every vocabulary that was learned; for an edited one it may
    not, which is a ValueError.
    """
    byte_id = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    if missing := [b for b in range(256) if b not in byte_id]:
        char = BYTE_CHAR[missing[0]]
        raise ValueError(f"byte {missing[0]} ({char!r}) has no token; byte-level BPE needs all 256")
    merges = {}
    for i, token in enumerate(tokens):
        if i == eot or len(token) == 1:
            continue
        parts = merge_by_heap([byte_id[b] for b in token], merges)
        if len(parts) != 2:
            problem = "is not made by one merge of two tokens with smaller ids"
            raise ValueError(f"token {i} ({token!r:.60}) {problem}")
        merges[tuple(parts)] = i
    return merges


class Tokenizer:
    """Made by train, char, gpt2, load or from_str. kind is "bpe" or "char", eot the id of <|endoftext|>.

    Wrong input is a ValueError of one sentence. An instance never changes.
    """

    # a ForeignTokenizer may have these
    prefix = 0  # bytes that encode puts before a text
    files = {}
    chat_template = None
    generation = {}  # generation_config.json
    tuning = {}  # {"template", "text_rule"}, what hf.py's folder of our own says that its model was fine-tuned with

    def __init__(self, kind, tokens, eot, merges=None):
        self.kind = kind
        self.tokens = tokens  # id -> bytes
        self.eot = eot
        self.merges = merges or {}  # (left id, right id) -> id, in the order learned, that of ids
        self.vocab_size = len(tokens)
        self.bos = eot  # what a text starts with; None in a ForeignTokenizer: nothing
        self.ends = (eot,)  # what generation stops at
        self.ids = {token: i for i, token in enumerate(tokens) if i != eot}

    @classmethod
    def train(cls, docs, vocab_size=4096, progress=iter):
        """Learns from an iterable of str, which is read once: only counts of words are kept, and of very many
        words the rarest are left out (count_words).

        This is algorithm 1 of Sennrich et al. 2016. <|endoftext|> is id 0, then come the 256 bytes, then
        the merges, exactly those of Hugging Face's BpeTrainer. There are fewer than vocab_size tokens where
        the text has no more pairs. progress: as in learn_merges. Raises ValueError for a vocab_size below
        257, for no text, and for docs that are one str.
        """
        check_vocab_size(vocab_size)
        if isinstance(docs, str):
            expected = "an iterable of documents was expected, such as [text]"
            raise ValueError(f"docs is one str, where {expected}")
        words = count_words(docs)
        if not words:
            raise ValueError("there is no text to train on: no document, or only empty ones")
        tokens = [EOT.encode(), *(bytes([b]) for b in BYTE_CHAR)]
        byte_id = {b: i for i, b in enumerate(BYTE_CHAR, 1)}
        word_ids = ([byte_id[b] for b in word.encode()] for word in words)
        merges = learn_merges(word_ids, words.values(), len(tokens), vocab_size, progress)
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        return cls("bpe", tokens, 0, merges)

    @classmethod
    def char(cls, docs):
        """Makes one token a character: <|endoftext|> is id 0, then the sorted characters of docs.

        ValueError: no text.
        """
        chars = set()
        for doc in docs:
            chars.update(mend(doc))
        if not chars:
            raise ValueError("there is no text to take characters from: no document, or only empty ones")
        return cls("char", [EOT.encode(), *(c.encode() for c in sorted(chars))], 0)

    @classmethod
    def gpt2(cls, folder=None):
        """Reads GPT-2's encoder.json and vocab.bpe in folder, else tiktoken's cache or download.

        eot is 50256. ValueError: no download, or files that do not hold a byte-level BPE. OSError: files
        that are not there.
        """
        try:
            return cls._checked(*read_gpt2_vocabulary(folder))
        except (ValueError, RecursionError) as e:
            if not folder:
                raise ValueError(f"{e}") from None
            problem = "encoder.json and vocab.bpe do not hold GPT-2's vocabulary"
            raise ValueError(f"{folder}: {problem}: {e}") from None

    @classmethod
    def load(cls, path):
        """Reads a file as from_str does. ValueError: as there, after the path. OSError: no such file."""
        try:
            return cls.from_str(Path(path).read_bytes().decode("utf-8"))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_str(cls, text):
        """Reads the text of a tokenizer.json, ours or a foreign one with GPT-2's split.

        ValueError: as in parse_vocabulary, bytes without a token, merges that do not make the tokens.
        """
        return cls._checked(*parse_vocabulary(text))

    @classmethod
    def _checked(cls, kind, tokens, eot, pairs):
        """Returns the tokenizer of a vocabulary, as vocabulary.py has it. ValueError: merges that do not make the
        tokens.
        """
        merges = recover_merges(tokens, eot) if kind == "bpe" else {}
        needed_pairs = [[byte_chars(tokens[left]), byte_chars(tokens[right])] for left, right in merges]
        if pairs is not None:
            for n, (pair, needed) in enumerate(zip_longest(pairs, needed_pairs)):
                if pair != needed:
                    place = f"the tokens in order of id need {needed!r:.60} there"
                    raise ValueError(f"merge {n} is {pair!r:.60}, but {place}")
        return cls(kind, tokens, eot, merges)

    def to_str(self):
        """Returns the text of tokenizer.json, from which from_str makes this tokenizer again."""
        return dump_vocabulary(self.kind, self.tokens, self.eot, self.merges)

    tokenizer_json = to_str  # as Hugging Face's libraries read it

    def save(self, path):
        """Writes tokenizer.json under a temporary name, then renames it: never half a file.

        OSError: it cannot be written.
        """
        temporary = Path(f"{path}.partial")
        temporary.write_bytes(self.tokenizer_json().encode())
        os.replace(temporary, path)

    def save_files(self, folder):
        """Writes what a model's folder holds of its tokenizer: tokenizer.json."""
        self.save(Path(folder, "tokenizer.json"))

    @property
    def first_id(self):
        """The id that a prompt starts with; None where it starts with its text, as for a character model, which
        may never have seen bos.
        """
        return None if self.kind == "char" else self.bos

    @property
    def head(self):
        """The ids that a document in data starts with: bos, or none where that is the end-of-text before it."""
        return [] if self.bos in (None, self.eot) else [self.bos]

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.to_str().encode()).hexdigest()

    @cached_property
    def _fast(self):
        return tiktoken.Encoding("tinylm", pat_str=PATTERN, mergeable_ranks=self.ids, special_tokens={})

    def encode(self, text):
        """Returns what encode_plain does, but through tiktoken's Rust core. ValueError: as there."""
        if self.kind == "char" or len(text) > GAP and LONG_GAP.search(text):
            return self.encode_plain(text)
        return self._fast.encode_ordinary(text)

    def encode_more(self, text):
        """Encodes a text that goes on where another ended. A ForeignTokenizer may have other ids for it."""
        return self.encode(text)

    def encode_special(self, text):
        """Returns the ids of a text in which special tokens are written out: <|endoftext|> is eot.

        ValueError: as encode.
        """
        ids = []
        for n, part in enumerate(text.split(EOT)):
            if n > 0:
                ids.append(self.eot)
            ids += self.encode_more(part)
        return ids

    encode_special_more = encode_special  # of a text that goes on where another ended

    def encode_batch(self, texts, num_threads=os.cpu_count()):
        """Encodes each of texts, on num_threads threads (tiktoken lets go of the interpreter lock)."""

        def encode_share(share):
            return [self.encode(text) for text in share]

        texts = list(texts)
        # in shares, as to hand a short text over to a thread takes longer than to encode it
        size = len(texts) // (8 * num_threads) + 1
        shares = [texts[i : i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads) as pool:
            return [ids for share in pool.map(encode_share, shares) for ids in share]

    def encode_plain(self, text):
        """Returns the ids of a str, never eot; this is to read, and to test encode with.

        ValueError: a character that a char tokenizer lacks.
        """
        text = mend(text)
        if self.kind == "char":
            try:
                return [self.ids[c.encode()] for c in text]
            except KeyError as e:
                c = e.args[0].decode()
                known = f"one of the {len(self.ids)} known"
                raise ValueError(f"character {c!r} (U+{ord(c):04X}) is not {known}") from None
        ids = []
        for word in split(text):
            ids += merge_word([self.ids[bytes([b])] for b in word.encode()], self.merges)
        return ids

    def decode_bytes(self, ids):
        """Returns the bytes of any ids; eot's are its name. ValueError: an id outside the vocabulary."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                size = f"this vocabulary of {self.vocab_size} tokens"
                raise ValueError(f"id {i} is outside {size}, ids from 0 on")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids):
        """Returns the text of any ids, with U+FFFD for bytes that are no UTF-8.

        ValueError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    decode_more = decode  # for ids that go on where others ended

    def stream(self):
        """Returns a function from the next id to the text it completes, which may be none yet.

        None at the end gives the rest. Joined, the texts are decode of all ids. A character spread over
        several tokens comes with its last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def next_text(i):
            if i is None:
                return decoder.decode(b"", final=True)
            return decoder.decode(self.decode_bytes([i]))

        return next_text
