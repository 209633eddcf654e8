"""Texts read by rules: is it whole, does it go round in circles, are its words real, is it copied?

    from lenses import reading
    print(reading.marks("Tom ran. Tom ran. Tom ran. Tom", ended=False))

A mark is a share from 0 to 1, and 1 is best. Rules are blunt: verse or dialogue may break some of them. So
compare a mark with that of real text, which eval.py prints next to it.
"""

import codecs
import math
import re

import numpy as np
import regex
from tqdm import tqdm

import toy_stories
from vocabulary import EOT

COPY = 12  # words in a row, the same as in the training text, that count as copied
PHRASE = 4  # words of a phrase that is better not said twice
DISTINCT_WORDS = 1000  # word pairs are counted in so many words, as longer texts repeat more of them
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio (Knuth, multiplicative hashing)

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
END = regex.compile(r"[.!?…。！？][\"'”’»)\]*]*\s*\Z")
SENTENCE_BREAK = regex.compile(
    r"(?<=[.!?…。！？])\s+"
    r"|(?<=[.!?…][\"'”’])\s+(?=[\"'“‘(]?[\p{Lu}\p{Lo}\p{N}])"  # "Why?" he asked. is one sentence
    r"|\n+"
)
WHOLE = regex.compile(
    r"[^\p{L}\p{N}]*[\p{Lu}\p{Lt}\p{Lo}\p{N}].*(?:[.!?…。！？][\"'”’»)\]*]*|:)",  # : opens a quotation
    regex.DOTALL,
)
# A phrase of up to eight words, three times in a row
LOOPS = re.compile(r"(?<!\S)(\S+(?: \S+){0,7}) \1 \1(?!\S)")

# What a rule asks of a text, and what is wrong with one that breaks it
MARKS = {
    "ends": ("ends properly: end of text, after a full stop", "no end"),
    "whole": ("sentences whole: a capital first, a full stop last", "broken sentence"),
    "quotes": ("quotation marks balanced in every paragraph", "quotes open"),
    "fresh": ("four-word phrases that are not said twice", "repeats"),
    "loops": ("no phrase three times in a row", "loop"),
    "known": ("words that the training text has", "made-up word"),
    "grammar": ("toy stories: one that the grammar can write, word for word", "not in the grammar"),
}


# ---- the rules


def words_in(text):
    """Returns the words of a text in lower case, without punctuation and digits."""
    return WORD.findall(text.lower())


def sentences(text):
    parts = [part.strip() for part in SENTENCE_BREAK.split(text)]
    return [part for part in parts if part]


def is_balanced(paragraph):
    """Returns whether each quotation mark of a paragraph has its counterpart."""
    return paragraph.count("“") == paragraph.count("”") and paragraph.count('"') % 2 == 0


def repeated(words):
    """Returns the share of phrases of PHRASE words that the text has said before."""
    phrases = list(zip(*(words[i:] for i in range(PHRASE))))
    if not phrases:
        return 0.0
    return 1 - len(set(phrases)) / len(phrases)


def distinct(texts):
    """Returns the share of distinct pairs among all pairs of neighbouring words (Li et al. 2016).

    It is counted in the first DISTINCT_WORDS words of the texts together.
    """
    words = " ".join(texts).split()[:DISTINCT_WORDS]
    pairs = set(zip(words, words[1:]))
    return len(pairs) / max(1, len(words) - 1)


def marks(text, ended, made_up=(), toy=False):
    """Returns {rule: mark}. A rule that does not apply has no mark.

    ended: whether the writer came to an end of text; None where texts have none.
    made_up: lower-case words that no training text has; None where there is none to compare with.
    toy: whether the text should be a toy story.
    """
    words = text.split()
    results = {}
    if ended is not None:
        results["ends"] = float(ended and END.search(text) is not None)
    parts = sentences(text)
    whole = sum(WHOLE.fullmatch(part) is not None for part in parts)
    results["whole"] = whole / max(1, len(parts))
    results["quotes"] = float(all(map(is_balanced, text.split("\n"))))
    results["fresh"] = 1 - repeated(words)
    results["loops"] = float(LOOPS.search(" ".join(words).lower()) is None)
    if made_up is not None:
        vocabulary = words_in(text)
        unknown = sum(word in made_up for word in vocabulary)
        results["known"] = 1 - unknown / max(1, len(vocabulary))
    if toy:
        results["grammar"] = float(toy_stories.log_prob(text) > -math.inf)
    return results if words else dict.fromkeys(results, 0.0)


def mean_marks(texts):
    """Returns the mean mark of each text that has its marks beside it, {"marks": {rule: mark}, ...}."""
    return [float(np.mean(list(text["marks"].values()))) for text in texts]


# ---- against the training text, which is read once, in pieces, so that memory does not grow with it


def pieces(ids, tokenizer, size=1 << 18):
    """Yields the text of ids, `size` tokens at a time, cut between words.

    What stands between documents is a word of its own.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    separators = [re.escape(tokenizer.tokens[id].decode()) for id in (tokenizer.eot, *tokenizer.head)]
    separator = re.compile("|".join(separators))
    rest = ""
    starts = range(0, len(ids), size)
    for start in tqdm(starts, "reading the training text", unit="piece", disable=None, leave=False):
        raw = tokenizer.decode_bytes(ids[start : start + size].tolist())
        text = rest + decoder.decode(raw)
        cut = max(text.rfind(" "), text.rfind("\n")) + 1
        rest = text[cut:]
        yield separator.sub(f" {EOT} ", text[:cut])
    yield separator.sub(f" {EOT} ", rest)


def word_hashes(words):
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def windows(hashes):
    """Returns a hash of each COPY words in a row, uint64 (n - COPY + 1,), from word hashes (n,)."""
    n = max(0, len(hashes) - COPY + 1)
    sums = np.zeros(n, np.uint64)
    for i in range(COPY):
        sums = sums * HASH_FACTOR + hashes[i : i + n]
    return sums


def copied_share(text, copied_windows):
    """Returns the share of a text's words in copied windows. copied_windows: bool (windows,)."""
    copied = np.zeros(len(text.split()), bool)
    for start in np.flatnonzero(copied_windows):
        copied[start : start + COPY] = True
    return float(copied.mean()) if len(copied) else 0.0


def against_training(texts, ids, tokenizer):
    """Compares texts with a training text. Returns (copied, made_up).

    copied: the share of each text's words that lie in COPY or more words in a row of the training text,
    float64 (texts,). made_up: the set of lower-case words of the texts that the training text lacks.
    """
    made_up = {word for text in texts for word in words_in(text)}
    text_windows = [windows(word_hashes(text.split())) for text in texts]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *text_windows]))  # sorted
    is_copied = np.zeros(len(wanted), bool)
    tail = np.zeros(0, np.uint64)  # the last words of the piece before
    for piece in pieces(ids, tokenizer):
        made_up.difference_update(words_in(piece))
        hashes = np.concatenate([tail, word_hashes(piece.split())])
        tail = hashes[max(0, len(hashes) - COPY + 1) :]
        if len(wanted):
            piece_windows = windows(hashes)
            places = np.searchsorted(wanted, piece_windows).clip(max=len(wanted) - 1)
            is_copied[places[wanted[places] == piece_windows]] = True
    copied = []
    for text, own_windows in zip(texts, text_windows):
        copied.append(copied_share(text, is_copied[np.searchsorted(wanted, own_windows)]))
    return np.array(copied), made_up
