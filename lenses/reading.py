"""Texts read by rules: is it whole, does it go round in circles, are its words real, is it copied?

    from lenses import reading; print(reading.marks("Tom ran. Tom ran. Tom ran. Tom", ended=False))

A mark is a share from 0 to 1, the more the better. Rules are blunt, and verse or dialogue breaks some of them by right: so read a mark
beside that of real text, which eval.py prints next to it.
"""
import codecs
import math
import re

import numpy as np
import regex
from tqdm import tqdm

import toy_stories
from tokenizer import EOT

COPY = 12            # words in a row, the same as in the training text, that count as copied
LOOP = 8             # longest phrase, in words, whose immediate repetition is looked for
DISTINCT_WORDS = 1000  # word pairs are counted in so many words, since longer texts repeat more of them

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
END = regex.compile(r"[.!?…。！？][\"'”’»)\]*]*\s*\Z")
SENTENCE_BREAK = regex.compile(r"(?<=[.!?…。！？])\s+|(?<=[.!?…][\"'”’])\s+(?=[\"'“‘(]?[\p{Lu}\p{Lo}\p{N}])|\n+")  # "Why?" he asked. is one
WHOLE = regex.compile(r"[^\p{L}\p{N}]*[\p{Lu}\p{Lt}\p{Lo}\p{N}].*(?:[.!?…。！？][\"'”’»)\]*]*|:)", regex.DOTALL)  # : opens a quotation

MARKS = {"ends": "ends properly: end of text, after a full stop", "whole": "sentences whole: a capital first, a full stop last",
         "quotes": "quotation marks balanced in every paragraph", "fresh": "four-word phrases that are not said twice",
         "loops": "no phrase three times in a row", "known": "words that the training text has",
         "grammar": "toy stories: one that the grammar can write, word for word"}


def sentences(text):
    return [s.strip() for s in SENTENCE_BREAK.split(text) if s.strip()]


def balanced(text):
    return all(p.count('"') % 2 == 0 and p.count("“") == p.count("”") for p in text.split("\n"))


def repeated(words):
    """The share of four-word phrases that occurred before in the text."""
    grams = list(zip(*(words[i:] for i in range(4))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(words):
    """Whether some phrase of up to LOOP words is said three times in a row."""
    for n in range(1, LOOP + 1):
        run = 0
        for word, before in zip(words[n:], words):
            run = run + 1 if word == before else 0
            if run == 2 * n:
                return True
    return False


def distinct(texts):
    """Distinct pairs of words among all pairs in the first DISTINCT_WORDS words of the texts together (Li et al. 2016)."""
    words = " ".join(texts).split()[:DISTINCT_WORDS]
    return len(set(zip(words, words[1:]))) / max(1, len(words) - 1)


def marks(text, ended, made_up=(), toy=False):
    """The mark of each rule. ended: whether the writer came to an end of text, None where texts have none; made_up: lower-case words that no
    training text has, None where there is none to compare with; toy: whether it should be a toy story. What does not apply has no mark."""
    words, said, parts = text.split(), WORD.findall(text.lower()), sentences(text)
    found = {"whole": sum(WHOLE.fullmatch(part) is not None for part in parts) / max(1, len(parts)), "quotes": float(balanced(text)),
             "fresh": 1 - repeated(words), "loops": float(not loops([w.lower() for w in words]))}
    if ended is not None:
        found = {"ends": float(ended and END.search(text) is not None)} | found
    if made_up is not None:
        found["known"] = 1 - sum(word in made_up for word in said) / max(1, len(said))
    if toy:
        found["grammar"] = float(toy_stories.log_prob(text) > -math.inf)
    return found if words else dict.fromkeys(found, 0.0)


# ---- against the training text, which is read once, in pieces: what is kept does not grow with it

def pieces(ids, tokenizer, size=1 << 18):
    """The text of ids, `size` tokens at a time, cut between words; what stands between documents is a word of its own."""
    decoder, left = codecs.getincrementaldecoder("utf-8")("replace"), ""
    between = re.compile("|".join(re.escape(tokenizer.tokens[i].decode()) for i in (tokenizer.eot, tokenizer.bos)))
    for i in tqdm(range(0, len(ids), size), "reading the training text", unit="piece", disable=None, leave=False):
        text = left + decoder.decode(tokenizer.decode_bytes(ids[i:i + size].tolist()))
        cut = max(text.rfind(" "), text.rfind("\n")) + 1
        left = text[cut:]
        yield between.sub(f" {EOT} ", text[:cut])
    yield between.sub(f" {EOT} ", left)


def windows(hashes):
    """A hash (n - COPY + 1,) uint64 of each COPY words in a row, from those of the words (n,)."""
    sums = np.zeros(max(0, len(hashes) - COPY + 1), np.uint64)
    for i in range(COPY):
        sums = sums * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + len(sums)]
    return sums


def word_hashes(words):
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def against_training(texts, ids, tokenizer):
    """(copied, made_up): the share of each text's words that lie in COPY or more words in a row of the training text, (n,); and the
    lower-case words of the texts that it does not have."""
    hashed = [windows(word_hashes(text.split())) for text in texts]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashed]))
    found, made_up, last = np.zeros(len(wanted), bool), {w for text in texts for w in WORD.findall(text.lower())}, np.zeros(0, np.uint64)
    for piece in pieces(ids, tokenizer):
        made_up.difference_update(WORD.findall(piece.lower()))
        hashes = np.concatenate([last, word_hashes(piece.split())])
        last = hashes[max(0, len(hashes) - COPY + 1):]
        if len(wanted):
            there = windows(hashes)
            at = np.searchsorted(wanted, there).clip(max=len(wanted) - 1)
            found[at[wanted[at] == there]] = True
    copied = []
    for text, own in zip(texts, hashed):
        inside = np.zeros(len(text.split()), bool)
        for i in np.flatnonzero(found[np.searchsorted(wanted, own)]) if len(own) else ():
            inside[i:i + COPY] = True
        copied.append(float(inside.mean()) if len(inside) else 0.0)
    return np.array(copied), made_up
