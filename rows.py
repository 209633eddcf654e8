"""From rows of examples to batches for tuning: a file's or the hub's rows, conversations, ids, rows of
the context.

A row is an object with prompt and response; with instruction, output and perhaps input (Alpaca); or with
messages, each with a role (system, user, assistant) and content. Responses and the end of text after
each are learned, prompts are not. Examples share a row of the context, but none sees another.
"""

import functools
import json
import os
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import prepare
import toy_stories
from config import Refusal, hf_name, is_hf
from data import prompt_ids, render

MORAL_SEED = 0  # other stories than data/toy's: a test looks


# -----------------------------------------------------------------------------------------------------
# Rows: (place, row), where place says in words which one it is


def read_rows(dataset, split="train"):
    """Returns (place, row) of all rows, of a dataset on the hub those of a split; None where it has no
    such split.

    Raises Refusal for what cannot be read.
    """
    if is_hf(dataset):
        with prepare.hub_splits(hf_name(dataset)) as splits:
            if split not in splits:
                return None
            return [(dataset, row) for row in splits[split]]
    readers = {".json": json_rows, ".jsonl": prepare.jsonl_rows, ".parquet": prepare.parquet_rows}
    suffix = os.path.splitext(dataset)[1].lower()
    if suffix not in readers:
        raise Refusal(f"dataset must be moral, a .json .jsonl .parquet file or hf:NAME, not {dataset!r}")
    try:
        return list(readers[suffix](dataset))
    except OSError as e:
        raise Refusal(f"cannot read {dataset}: {e.strerror}")


def json_rows(path):
    """Returns (place, row) of the rows of a .json file. Raises Refusal."""
    with prepare.opened(path) as f:
        text = f.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Refusal(f"{path} is not JSON ({e})")
    if not isinstance(rows, list):
        raise Refusal(f"{path} is not an array of rows but a {type(rows).__name__}")
    return [(f"{path} row {n}", row) for n, row in enumerate(rows, 1)]


def split_rows(cfg):
    """Returns (rows to learn from, rows held out), each a list of (place, row). Raises Refusal."""
    if cfg.dataset == "moral":
        rows = [(f"moral {n}", row) for n, row in enumerate(toy_stories.moral_rows(400, MORAL_SEED))]
        return rows[:200], rows[200:]
    rows = read_rows(cfg.dataset)
    held_out = None
    if cfg.val_dataset:
        held_out = read_rows(cfg.val_dataset)
    elif is_hf(cfg.dataset):
        held_out = read_rows(cfg.dataset, "validation")
    if held_out is not None:
        return rows, held_out
    conversations(rows)  # what is wrong is said of the first row that it is wrong with
    if len(rows) < 2:
        raise Refusal(
            f"{cfg.dataset} needs two rows, as one is held out, and has {len(rows)}; "
            "--val_dataset names others to hold out"
        )
    order = np.random.default_rng(cfg.seed).permutation(len(rows))
    n = max(1, round(cfg.val_fraction * len(rows)))
    return [rows[i] for i in order[n:]], [rows[i] for i in order[:n]]


# -----------------------------------------------------------------------------------------------------
# Conversations: [(prompt, response), ...] of a row, its turns


def turns_of_pair(row, text):
    return [(text(row, "prompt"), text(row, "response"))]


def turns_of_alpaca(row, text):
    parts = [text(row, key) for key in ("instruction", "input") if key in row]
    return [("\n".join(filter(None, parts)), text(row, "output"))]


def turns_of_chat(row, text):
    """What stands before an answer is its prompt; what stands after the last one is left out."""
    messages = row["messages"]
    turns = []
    prompt = []
    for message in messages if isinstance(messages, list) else [messages]:
        role = text(message, "role")
        if role == "assistant":
            turns.append(("\n".join(prompt), text(message, "content")))
            prompt = []
        elif role in ("system", "user"):
            prompt.append(text(message, "content"))
        else:
            raise ValueError(f"a role is {role!r:.40}; system, user and assistant are known")
    return turns


class Kind(NamedTuple):
    columns: tuple  # by which rows of this kind are known
    turns: Callable  # (row, text) -> its turns
    template: str  # where neither the user nor the base has one


KINDS = [
    Kind(("prompt", "response"), turns_of_pair, "{prompt}\n"),
    Kind(("instruction", "output"), turns_of_alpaca, "### Instruction:\n{prompt}\n\n### Response:\n"),
    Kind(("messages",), turns_of_chat, "User:\n{prompt}\n\nAssistant:\n"),
]
EXPECTED = "rows have prompt and response, instruction and output, or messages; here is"


def field_text(place, row, key):
    """Returns the text of a row's column, without space around it. Raises Refusal where there is none."""
    return prepare.field(row, key, place, EXPECTED).strip()


def conversations(rows):
    """Returns ([turns of each row], the default template of the first row's kind). Raises Refusal."""
    turns = []
    template = ""
    for place, row in rows:
        columns = row.keys() if isinstance(row, dict) else ()
        kinds = [kind for kind in KINDS if all(column in columns for column in kind.columns)]
        kind = kinds[0] if kinds else KINDS[0]
        try:
            turns.append(kind.turns(row, functools.partial(field_text, place)))
        except ValueError as e:
            raise Refusal(f"{place}: {e}")
        template = template or kind.template
    return turns, template


# -----------------------------------------------------------------------------------------------------
# Examples: a conversation as (idx, targets), targets one token ahead and -100 where nothing is learned


def encode(turns, tokenizer, template):
    """Returns (idx, targets), or None where no response has text. Prompt and response are encoded apart:
    their boundary is one between tokens, and a prompt's ids are those that sample.py makes of it.
    """
    ids = []
    is_learned = []
    for prompt, response in turns:
        text = render(template, prompt)
        new_ids = tokenizer.encode_more(text) if ids else prompt_ids(tokenizer, text)
        response_ids = tokenizer.encode_more(response) + [tokenizer.eot] if response else []
        ids += new_ids + response_ids
        is_learned += [False] * len(new_ids) + [True] * len(response_ids)
    if not any(is_learned):
        return None
    ids = np.array(ids, np.int64)
    return ids[:-1], np.where(is_learned, ids, -100)[1:]


def encode_rows(conversations, tokenizer, template, T, name):
    """Returns (the examples that fit in T tokens and have a response, a line about them). Raises Refusal
    where none is left.
    """
    try:
        tokenizer.encode(template.replace("{prompt}", ""))
    except ValueError as e:
        raise Refusal(f"the template {template!r:.120}: {e}; --template=... is another")
    try:
        encoded = [encode(turns, tokenizer, template) for turns in conversations]
    except ValueError as e:  # a character that a character model lacks
        raise Refusal(f"{name}: {e}")
    answered = [example for example in encoded if example]
    examples = [example for example in answered if len(example[0]) <= T]
    if not examples:
        raise Refusal(f"{name}: none of its {len(encoded)} rows has a response and fits in {T} tokens")
    message = f"{name}: {len(examples):,} rows"
    if len(encoded) > len(examples):
        message += (
            f"; left out: {len(answered) - len(examples):,} that are longer than {T} tokens, "
            f"{len(encoded) - len(answered):,} without a response"
        )
    return examples, message


# -----------------------------------------------------------------------------------------------------
# Packs: the examples that share a row of the context


def pack(lengths, T):
    """Returns lists of indices whose lengths add up to at most T: the longest first, each where it
    leaves the least room.
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
