"""From rows of examples to batches for tuning: rows of a file or of the hub become conversations (messages.py),
conversations become ids, and several examples share a row of the context.

Responses and the end of text after each are learned, prompts are not. Examples that share a row do not see each
other.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import readers
import sources
import toy_stories
from chat import encode_answers, encode_turns
from config import Refusal, hf_name, is_hf
from data import MODELS_OWN
from messages import EQUAL, NO_RESPONSE, chat_messages

MORAL_SEED = 0  # of other stories than those of data/toy, which a test checks


# -----------------------------------------------------------------------------------------------------
# Rows are (place, row); place names the row in messages, as "rows.jsonl line 3"


def read_rows(dataset, split="train", built_in=""):
    """Yields (place, row) of all rows of a file, or of a split of a dataset on the hub; none where it has no
    such split.

    built_in: the other name that --dataset may be, "" for --val_dataset; only for the message. Raises Refusal for
    what cannot be read.
    """
    if is_hf(dataset):
        rows = sources.hub_splits(hf_name(dataset)).get(split, ())
        for n, row in enumerate(rows, 1):
            yield f"{dataset} row {n}", row
        return
    kind = readers.file_kind(dataset)
    if kind not in readers.ROW_READERS:
        key = f"dataset must be {built_in}," if built_in else "val_dataset must be"
        raise Refusal(f"{key} a {' '.join(readers.ROW_READERS)} file or hf:NAME, not {dataset!r}")
    yield from readers.ROW_READERS[kind](dataset)


class BuiltIn(NamedTuple):
    """Rows that are made here. The first ones are to learn from."""

    make: Callable  # (n, seed) -> n rows
    n_learned: int
    n_held_out: int

    def rows(self):
        return self.make(self.n_learned + self.n_held_out, MORAL_SEED)


BUILT_IN = {
    "moral": BuiltIn(toy_stories.moral_rows, 200, 200),
    "toy": BuiltIn(toy_stories.preference_rows, 1800, 600),
}


def read_both(cfg):
    """Returns (rows to learn from, rows to hold out), both iterables of (place, row). The latter is empty
    where rows of the former are held out. Raises Refusal, also while they are read.
    """
    if cfg.dataset == cfg.built_in:
        built_in = BUILT_IN[cfg.dataset]
        rows = [(f"{cfg.dataset} {n}", row) for n, row in enumerate(built_in.rows())]
        return rows[: built_in.n_learned], rows[built_in.n_learned :]
    rows = read_rows(cfg.dataset, built_in=cfg.built_in)
    if cfg.val_dataset:
        return rows, read_rows(cfg.val_dataset)
    return rows, read_rows(cfg.dataset, "validation") if is_hf(cfg.dataset) else ()


def split_numbers(cfg, n, n_held_out):
    """Returns (numbers of rows to learn from, numbers of rows held out), two arrays. The n rows of the first
    dataset of read_both() are numbered first, then the n_held_out rows of the second. Raises Refusal.
    """
    numbers = np.arange(n + n_held_out)
    if cfg.val_dataset or n_held_out:
        return numbers[:n], numbers[n:]
    if n < 2:
        raise Refusal(
            f"{cfg.dataset} needs two rows, as one is held out, and has {n}; "
            "--val_dataset names others to hold out"
        )
    order = np.random.default_rng(cfg.seed).permutation(n)
    n_val = min(n - 1, max(1, round(cfg.val_fraction * n)))
    return order[n_val:], order[:n_val]


def split_rows(cfg, convert):
    """Returns (what to learn from, what is held out), two lists. convert(rows) returns a list with an item for
    each (place, row). Raises Refusal.
    """
    # converted before they are shuffled, so that a Refusal is about the first wrong row
    learned, held_out = [convert(rows) for rows in read_both(cfg)]
    both = [*learned, *held_out]
    return tuple([both[i] for i in side] for side in split_numbers(cfg, len(learned), len(held_out)))


# -----------------------------------------------------------------------------------------------------
# Examples: a conversation as (idx, targets), targets one token ahead and -100 where nothing is learned


def encode(conversation, tokenizer, template):
    """Returns (ids, whether each is learned), two lists. Raises ValueError for a character that a character
    model lacks, and messages that the model's chat template refuses.
    """
    if template == MODELS_OWN:
        return encode_answers(tokenizer, chat_messages(conversation.messages), conversation.is_learned)
    return encode_turns(tokenizer, conversation.turns, template)


def example(ids, is_learned):
    """Returns (idx, targets), int64 arrays, of ids and whether each is learned."""
    ids = np.asarray(ids, np.int64)
    return ids[:-1], np.where(is_learned, ids, -100)[1:]


class LeftOut(NamedTuple):
    place: str
    reason: str  # in words that follow a number of rows


def encode_row(row, tokenizer, template, T):
    """Returns encode() of each conversation of a row, which has one, or as a preference two; or a LeftOut for the
    whole row where one has no response or more than T tokens. Raises Refusal.
    """
    place, problem = row[0].place, row[0].problem
    if problem:
        return LeftOut(place, problem)
    try:
        encoded = [encode(conversation, tokenizer, template) for conversation in row]
    except ValueError as e:
        raise Refusal(f"{place}: {e}")
    if len(encoded) == 2 and encoded[0] == encoded[1]:  # a template may drop what told their texts apart
        return LeftOut(place, EQUAL)
    if not all(True in is_learned for _, is_learned in encoded):
        return LeftOut(place, NO_RESPONSE)
    if max(len(ids) for ids, _ in encoded) - 1 > T:
        return LeftOut(place, f"that are longer than {T} tokens")
    return encoded


def check_template(template, tokenizer):
    """Raises Refusal where the tokenizer lacks a character of the template."""
    try:
        tokenizer.encode(template.replace("{prompt}", ""))
    except ValueError as e:
        raise Refusal(f"the template {template!r:.120}: {e}; --template=... is another")


def side_names(cfg):
    """Returns the names of both sides in messages: the rows to learn from, and those held out."""
    return f"{cfg.dataset}, to learn from", f"{cfg.val_dataset or cfg.dataset}, held out"


def side_line(name, n, left_out, T, need="has a response and fits in"):
    """Returns a line about the n rows of a side; left_out: a LeftOut for each that is. Raises Refusal where there is
    no row, or where all are left out, as none of them does what `need` says.
    """
    if not n:
        raise Refusal(f"{name}: there is no row in it")
    places = {}  # the reason: where
    for place, reason in left_out:
        places.setdefault(reason, []).append(place)
    reasons = "; left out: " if left_out else ""
    reasons += ", ".join(
        f"{len(where):,} {reason} ({first_places(where)})" for reason, where in places.items()
    )
    if len(left_out) == n:
        raise Refusal(f"{name}: none of its {n} rows {need} {T} tokens{reasons}")
    return f"{name}: {n - len(left_out):,} rows{reasons}"


def first_places(places):
    """Returns the first three places, in words."""
    more = ", ..." if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


# -----------------------------------------------------------------------------------------------------
# Packs: the examples that share a row of the context


def pack(lengths, T):
    """Returns lists of indices whose lengths add up to at most T. The longest ones are placed first, each into
    the list where it leaves the least room.
    """
    packs = []
    room = []  # sorted (tokens left, pack)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[i], 0))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = T, len(packs)
            packs.append([])
        packs[number].append(i)
        insort(room, (left - lengths[i], number))
    return packs


def packed_batch(packs, examples, T):
    """Returns {"idx", "targets", "doc"} (rows, T) int64: a row holds the examples that a pack names,
    each its own document.
    """
    batch = {
        "idx": torch.full((len(packs), T), 0),
        "targets": torch.full((len(packs), T), -100),
        "doc": torch.full((len(packs), T), -1),
    }
    for row, numbers in enumerate(packs):
        end = 0
        for doc, number in enumerate(numbers):
            idx, targets = examples[number]
            start, end = end, end + len(idx)
            batch["idx"][row, start:end] = torch.from_numpy(idx)
            batch["targets"][row, start:end] = torch.from_numpy(targets)
            batch["doc"][row, start:end] = doc
    return batch


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_packs(packs, seed, first, n):
    """Returns packs first .. first+n of the endless stream: all of them in random order, then in another."""
    numbers = []
    for row in range(first, first + n):
        epoch, place = divmod(row, len(packs))
        numbers.append(epoch_order(len(packs), seed, epoch)[place])
    return [packs[number] for number in numbers]
