"""Speculative decoding: a draft guesses the next tokens, and the model checks them in one call.

    speculation = Speculation(DraftModel(small), 4)            # or Lookup(): as the text went on before
    *_, rows = speculation.generate(model, prompts, 100)       # the same rows as generate.generate
    print(speculation.line())

A call that reads five tokens takes hardly longer than one that reads one, as both read all weights.

At each place the model's own token is drawn, with noise that depends only on the seed, the row and the
place. A guess is right where it is that token; the guesses after the first wrong one are thrown away. So
the text is what the model writes by itself, whatever the draft, the number of guesses, the other rows and
the clock: only rounding could make a difference. The draft draws its guesses with the same noise, so that
two models that nearly agree mostly draw the same token (Daliri, Musco and Suresh 2025).

The usual way is to accept a guess with probability min(1, p/q) (Leviathan et al. 2023, Chen et al. 2023).
It keeps a few more guesses: 1 - TV of them, and this way at least (1 - TV) / (1 + TV), where TV is the
total variation distance between p and q. But there the text depends on the guesses, and so on the clock
too, where speculation is given up because it is slow.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from generate import (
    GREEDY,
    distribution,
    documents_of,
    likeliest,
    penalized,
    prefill,
    seen_tokens,
    start_rows,
)

MOST_GUESSES = 64  # in one call
TRIAL = 64  # tokens a row after which it is decided whether speculation pays
LEAST_ROUNDS = 4  # of either kind that must be counted for that


# -----------------------------------------------------------------------------------------------------
# Drawing


def seen_after(seen, guesses):
    """Returns which tokens have occurred before each of the guesses (B, n), and after the last one, as
    (B, n + 1, V). seen (B, V): those that had occurred before the first.
    """
    n = guesses.size(1)
    seen = seen[:, None].repeat(1, n + 1, 1)
    for i in range(n):
        later = guesses[:, i, None, None].expand(-1, n - i, 1)
        seen[:, i + 1 :].scatter_(2, later, True)
    return seen


class Draws:
    """Draws tokens for the model and its draft, from the same distribution as next_token, with noise that
    depends only on the seed, the row and the place in its text.
    """

    def __init__(self, model, prompts, seed, repetition_penalty, temperature, top_k, top_p):
        self.shape = (len(prompts), model.config.vocab_size)
        self.device = model.device
        self.seed = seed % 2**64
        self.penalty = repetition_penalty
        self.seen = seen_tokens(prompts, model, repetition_penalty)
        self.rules = (temperature, top_k, top_p)
        self.is_greedy = temperature < GREEDY
        self.noise = []  # of the next places, (B, V) each

    def begin(self, rows):
        """Goes on to the next places of each row."""
        self.rows = rows
        self.noise = []

    def add_noise(self):
        """Makes the noise (B, V) of one more place in each row."""
        # float64: in float32 one number in 2^23 would be 0, which wins against any probability
        noise = np.ones(self.shape)
        for number, row in enumerate(self.rows):
            if not row.end:
                place = len(row.ids) + len(self.noise)
                rng = np.random.default_rng((self.seed, number, place))
                rng.standard_exponential(out=noise[number])
        self.noise.append(torch.from_numpy(noise).float().to(self.device))

    def draw(self, logits, guesses):
        """Returns tokens (B, T) from logits (B, T, V): for the place after guesses (B, n), and for the T - 1
        places before that.
        """
        T = logits.size(1)
        n = guesses.size(1)
        places = slice(n + 1 - T, n + 1)
        if self.seen is not None:
            logits = penalized(logits, seen_after(self.seen, guesses)[:, places], self.penalty)
        if self.is_greedy:
            return likeliest(logits)
        while len(self.noise) <= n:
            self.add_noise()
        noise = torch.stack(self.noise[places], 1).flatten(0, 1)
        p, ids = distribution(logits.flatten(0, 1), *self.rules)
        if ids is not None:
            noise = noise.gather(-1, ids)
        # p / Exponential(1) is largest at i with probability p[i]
        drawn = (p / noise).argmax(-1, keepdim=True)
        return (drawn if ids is None else ids.gather(-1, drawn)).view(-1, T)

    def see(self, pieces):
        """Counts the new ids of each row as seen, for the penalty."""
        if self.seen is not None:
            for row, ids in enumerate(pieces):
                self.seen[row, ids] = True


# -----------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Tally:
    """What rounds of one kind wrote, and how long they took. The first round does not count: memory is
    allocated in it, and the draft reads the prompt.
    """

    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens, seconds):
        self.rounds += 1
        if self.rounds > 1:
            self.tokens += tokens
            self.seconds += seconds

    @property
    def seconds_a_token(self):
        return self.seconds / self.tokens


def count_right(guesses, ids):
    """Returns how many of the guesses, ids, are right before the first one that is not."""
    for n, (guess, id) in enumerate(zip(guesses, ids)):
        if guess != id:
            return n
    return len(guesses)


class Speculation:
    """Writes what a model writes by itself, but checks up to n_guesses of a draft in each call of it.

    For the first TRIAL tokens a row, and until LEAST_ROUNDS of either kind have counted, plain rounds take
    turns with speculative ones. If the speculative ones were not faster, all later rounds are plain. A
    conversation has one trial. clock: returns seconds; without one there is no trial, and all rounds are
    speculative.
    """

    def __init__(self, draft, n_guesses=4, clock=time.perf_counter):
        self.draft = draft
        self.n_guesses = n_guesses
        self.clock = clock
        self.n_guessed = 0
        self.n_right = 0
        self.n_checks = 0  # how often a row's guesses were checked
        self.plain = Tally()
        self.speculative = Tally()
        self.n_tokens = 0.0  # of a row in the trial so far, on average
        self.gain = None  # speed of speculative rounds by that of plain ones, once the trial has ended

    @property
    def is_trial(self):
        return self.clock is not None and self.gain is None

    @property
    def is_off(self):
        return self.gain is not None and self.gain <= 1

    def count_guesses(self, rows, limits):
        """Returns how many guesses the next round has room and use for. rows: those that go on."""
        left = max(limits.max_new_tokens - len(row.ids) for row in rows)
        room = min(limits.block_size - len(row.window) for row in rows)
        return min(self.n_guesses, left - 1, room)

    def check(self, model, cache, rows, guesses, draws):
        """Returns the new ids of each row: its right guesses up to the first wrong one, then the model's own
        token. The row's last token and its right guesses are in the cache then.
        """
        n = max(map(len, guesses))
        device = model.device
        padded = torch.tensor([[*ids, *[0] * (n - len(ids))] for ids in guesses], device=device).long()
        last = torch.tensor([row.window[-1:] for row in rows], device=device)
        doc = documents_of(rows, n + 1, device)
        logits, _ = model(torch.cat((last, padded), 1), cache=cache, doc=doc)
        pieces = []
        for row, row_guesses, ids in zip(rows, guesses, draws.draw(logits, padded).tolist()):
            pieces.append([] if row.end else ids[: count_right(row_guesses, ids) + 1])
        counts = [n + 1 - len(piece) for piece in pieces]
        if any(counts):
            cache.rewind(counts)
        return pieces

    def read(self, model, rows, limits, draws):
        """Reads each row's window anew; returns (the one new id of each row, a cache)."""
        left = max(limits.max_new_tokens - len(row.ids) for row in rows if not row.end)
        windows = [row.window for row in rows]
        # a row that ends with the first token of a call is padding in the next calls
        logits, cache = prefill(model, windows, left, spare=2 * self.n_guesses + 2)
        none = torch.empty(len(rows), 0, dtype=torch.long, device=model.device)
        ids = draws.draw(logits[:, None], none).tolist()
        self.draft.skip()
        return [[] if row.end else row_ids for row, row_ids in zip(rows, ids)], cache

    def round(self, model, cache, rows, limits, draws):
        """Returns the new ids of each row, by one call of the model: with guesses, or in a plain round without."""
        going = [row for row in rows if not row.end]
        n = self.count_guesses(going, limits)
        is_plain = self.is_off or self.is_trial and self.plain.rounds <= self.speculative.rounds
        start = self.clock() if self.is_trial else 0.0
        guesses = [[] for _ in rows]
        if n > 0 and not is_plain:
            guesses = self.draft.guess(rows, n, draws)
        pieces = self.check(model, cache, rows, guesses, draws)
        if any(guesses):
            self.draft.keep(rows, [len(piece) - 1 for piece in pieces])
            self.count(guesses, pieces)
        else:
            self.draft.skip()
        if n > 0 and self.is_trial:
            n_new = sum(map(len, pieces))
            tally = self.plain if is_plain else self.speculative
            tally.add(n_new, self.clock() - start)
            self.n_tokens += n_new / len(going)
            self.judge()
        return pieces

    def count(self, guesses, pieces):
        """Counts a round's guesses, and how many of them were right, for line()."""
        for row_guesses, piece in zip(guesses, pieces):
            if row_guesses:
                self.n_guessed += len(row_guesses)
                self.n_right += len(piece) - 1
                self.n_checks += 1

    def judge(self):
        """Ends the trial where it has lasted long enough."""
        least = min(self.plain.rounds, self.speculative.rounds)
        if self.n_tokens >= TRIAL and least > LEAST_ROUNDS:
            self.gain = self.plain.seconds_a_token / self.speculative.seconds_a_token

    @torch.inference_mode()
    def generate(
        self,
        model,
        prompts,
        max_new_tokens,
        temperature=0.8,
        top_k=200,
        top_p=1.0,
        repetition_penalty=1.0,
        stop=(),
        seed=1337,
        past_end="stop",
    ):
        """Continues prompts as generate.generate does; yields the list of their Rows after each token. Where
        a round gave a row fewer tokens than another, its `new` is None while the other's come.

        The model must be in eval mode. Sampled text differs from what generate writes for that seed, but has
        the same distribution. Raises ValueError as generate does.
        """
        rows, limits = start_rows(model, prompts, max_new_tokens, stop, past_end)
        draws = Draws(model, prompts, seed, repetition_penalty, temperature, top_k, top_p)
        self.draft.begin(prompts, max_new_tokens, self.n_guesses)
        cache = None
        while True:
            draws.begin(rows)
            if cache is None:
                pieces, cache = self.read(model, rows, limits, draws)
            else:
                pieces = self.round(model, cache, rows, limits, draws)
            draws.see(pieces)
            for i in range(max(map(len, pieces))):
                for row, piece in zip(rows, pieces):
                    row.new = None
                    if not row.end and i < len(piece) and row.take(piece[i], limits):
                        cache = None
                yield rows
                if all(row.end for row in rows):
                    return

    @property
    def share_right(self):
        return self.n_right / max(1, self.n_guessed)

    @property
    def tokens_a_call(self):
        """How many new tokens a row got from a call that checked its guesses, on average."""
        return 1 + self.n_right / max(1, self.n_checks)

    def line(self):
        """Returns a line about the guesses and the speed."""
        if not self.n_guessed:
            return f"{self.draft.name} guessed nothing"
        share, n = self.share_right, self.n_guessed
        text = f"{self.draft.name}: {share:.0%} of {n:,} guesses right, {self.tokens_a_call:.1f} tokens a call"
        if self.gain is None:
            return f"{text}; too short a text to compare its speed"
        text += (
            f"; {self.gain:.2f} x the speed of plain decoding over the first {self.n_tokens:.0f} tokens"
        )
        return f"{text}, so the rest was plain" if self.is_off else text
