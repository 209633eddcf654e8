"""Drafts, which guess the next tokens of texts for speculate.py: the text so far, or a smaller model.

    draft = load_draft("ngram", model, tokenizer, 4, compute, "auto")     # or a model's folder, as out_dir

A draft is an object with a name and four methods, which speculate.Speculation calls:

    begin(prompts, most, n_guesses)   before texts of up to `most` new tokens, with up to n_guesses at a time
    guess(rows, n, draws)             returns up to n ids a row
    keep(rows, counts)                after a guess: how many of each row's ids were right
    skip()                            in place of both: the model has written a token by itself
"""

import math
import os

import torch

from cache import REWIND
from checkpoint import open_checkpoint
from config import Refusal, is_hf
from generate import distribution, documents_of, likeliest, next_token, prefill
from rmsnorm import choose_rmsnorm

MOST_IN_RING = REWIND - 2  # guesses: a window's ring must be able to forget them and two tokens before
DRAWS = 8192  # that show whether next_token has a rule of its own


class Lookup:
    """Guesses that a text goes on as it did after the last occurrence of its last tokens (prompt lookup,
    Saxena 2023).
    """

    name = "ngram"
    lengths = (3, 2)  # tokens that must be the same, the longest first

    def begin(self, prompts, most, n_guesses):
        self.prompts = prompts
        self.texts = [list(prompt) for prompt in prompts]
        # for each row {tokens: the place after their last occurrence}, and the place up to which that is made
        self.indexes = [{} for _ in prompts]
        self.ends = [0] * len(prompts)

    def guess(self, rows, n, draws):
        return [[] if row.end else self.look_up(number, row, n) for number, row in enumerate(rows)]

    def look_up(self, number, row, n):
        text = self.texts[number]
        index = self.indexes[number]
        text += row.ids[len(text) - len(self.prompts[number]) :]
        for place in range(self.ends[number], len(text)):
            for length in self.lengths:
                if place >= length:
                    index[tuple(text[place - length : place])] = place
        self.ends[number] = len(text)
        for length in self.lengths:
            place = index.get(tuple(text[-length:]))
            if place is not None:  # where the text ends, the guesses go on from their own beginning
                return [text[place + i % (len(text) - place)] for i in range(n)]
        return []

    def keep(self, rows, counts):
        pass

    def skip(self):
        pass


class DraftModel:
    """Guesses with a smaller model of the same tokenizer, in eval mode, which has a cache of its own. Where
    its context is full it reads the last half again.

    After a round its cache lacks the last two tokens of each row: the one that the model itself wrote last, and
    the one before. (Where all guesses were right, that is the last guess, which the draft never read.) A
    round of three guesses d, e, f after a, b, c:

        the model writes   the text         the cache, rewound   behind
        d, x               a b c d x        a b c                d x
        d, e, f, y         a b c d e f y    a b c d e            f y
    """

    def __init__(self, model, name="the draft"):
        self.model = model
        self.name = name
        c = model.config
        self.context = c.block_size if c.what_ends_a_text else math.inf

    def begin(self, prompts, most, n_guesses):
        # a row that has ended goes on as padding, in the reads and the guesses of a round
        self.capacity = most + n_guesses
        self.spare = n_guesses + 3
        self.cache = None
        self.behind = 0  # tokens of each row that the cache lacks
        self.lengths = []  # of each row: tokens in the cache and behind

    def can_go_on(self, rows, n):
        """Returns whether the cache has room for n more guesses, and lacks few tokens."""
        if self.cache is None or self.behind > 3:
            return False
        return all(
            row.end or length + n - 1 <= self.context and len(row.window) >= self.behind
            for row, length in zip(rows, self.lengths)
        )

    def window_of(self, row, n):
        """Returns the ids that the draft reads of a row, so few that n guesses fit in its context too."""
        longest = self.context - n + 1
        if len(row.window) <= longest:
            return row.window
        return row.window[-max(1, min(self.context // 2, longest)) :]

    def read(self, rows, n):
        """Reads what is new in each row, before n guesses; returns the logits (B, V) of the first."""
        if not self.can_go_on(rows, n):
            windows = [self.window_of(row, n) for row in rows]
            self.lengths = [len(window) for window in windows]
            self.n_read = 0
            logits, self.cache = prefill(self.model, windows, self.capacity, self.spare)
            return logits
        self.n_read = self.behind
        idx = [[0] * self.behind if row.end else row.window[-self.behind :] for row in rows]
        idx = torch.tensor(idx, device=self.model.device)
        return self.model.next_logits(idx, self.cache, documents_of(rows, self.behind, idx.device))

    def guess(self, rows, n, draws):
        n = min(n, self.context)
        logits = self.read(rows, n)
        doc = documents_of(rows, 1, logits.device)
        guesses = torch.empty(len(rows), 0, dtype=torch.long, device=logits.device)
        guesses = draws.draw(logits[:, None], guesses)
        for _ in range(n - 1):
            logits = self.model.next_logits(guesses[:, -1:], self.cache, doc)
            guesses = torch.cat((guesses, draws.draw(logits[:, None], guesses)), 1)
        self.n_read += n - 1
        self.n_guesses = n
        return [[] if row.end else ids for row, ids in zip(rows, guesses.tolist())]

    def keep(self, rows, counts):
        pairs = list(zip(rows, counts))
        self.cache.rewind([self.n_read if row.end else self.n_guesses - count for row, count in pairs])
        self.behind = 2
        self.lengths = [length + count + 1 for length, count in zip(self.lengths, counts)]

    def skip(self):
        self.behind += 1
        self.lengths = [length + 1 for length in self.lengths]


# -----------------------------------------------------------------------------------------------------
# From the command line


def load_draft(path, model, tokenizer, n_guesses, compute, rmsnorm):
    """Returns the draft that path means for a model with this tokenizer: a Lookup for ngram, else the model of a
    checkpoint, which path names as out_dir does, on the model's device and in its dtype.

    Raises Refusal where it cannot be this model's draft, n_guesses are too many, or next_token has a rule of its own.
    """
    if next_token_has_a_rule():
        raise Refusal(
            "next_token in generate.py was changed and draws otherwise than distribution, by which guesses of a draft "
            "are checked: put the rule there, or leave out draft"
        )
    configs = [model.config]
    draft = Lookup()
    if path != Lookup.name:
        draft = DraftModel(*restore_draft(path, tokenizer))
        configs.append(draft.model.config)
        draft.model.to(compute.device, compute.dtype)
        choose_rmsnorm(draft.model, rmsnorm, compute)
    if any(c.window for c in configs) and n_guesses > MOST_IN_RING:
        raise Refusal(
            f"with windows speculate can be {MOST_IN_RING} at most: their layers keep {REWIND} tokens to go back by"
        )
    longest = model.config.block_size
    if configs[-1].block_size > longest:
        raise Refusal(
            f"the draft {path} has a context of {configs[-1].block_size} tokens and the model {longest}: "
            "a draft's can be as long at most"
        )
    return draft


def restore_draft(path, tokenizer):
    """Returns (model, the path of its file). Raises Refusal."""
    if not os.path.exists(path) and not is_hf(path):
        raise Refusal(
            f"there is no {path}: a draft is a smaller model's folder, or ngram, the text so far"
        )
    start = open_checkpoint(path, takes_integers=True)
    model, draft_tokenizer = start.restore()
    if draft_tokenizer.sha256 != tokenizer.sha256:
        raise Refusal(
            f"the draft {start.path} has another tokenizer than the model: train one on the model's dataset"
        )
    return model, start.path


def next_token_has_a_rule():
    """Returns whether next_token was changed so that it draws otherwise than `distribution`, all that Draws knows."""
    tail = torch.linspace(-2, -5, 31)  # unlikely tokens, which rules cut off
    logits = torch.cat([torch.zeros(1), tail])[None]
    uniform = (torch.arange(DRAWS, dtype=torch.float64)[:, None] + 0.5) / DRAWS
    for rules in (1.0, 0, 1.0), (0.7, 9, 0.9):
        p, ids = distribution(logits, *rules)
        if ids is not None:
            p = torch.zeros_like(logits).scatter(1, ids, p)
        drawn = next_token(logits.expand(DRAWS, -1), *rules, uniform)
        shares = torch.bincount(drawn, minlength=logits.size(1)) / DRAWS
        if (shares - p[0]).abs().sum() > 0.09:  # another way to draw, without a rule, gives some 0.04
            return True
    return not torch.equal(next_token(logits, 0.0), likeliest(logits))
