"""From ids to batches: which tokens a step sees.

    batch = {"idx": (B, T) int64, "targets": (B, T) int64}     targets are one token ahead, -100 where there is none

Row r of step s is a pure function of (seed, s, r), and micro-batches and processes take slices of a
step's rows. So a resumed run needs no saved position, and k processes see what one would.
"""

import functools

import numpy as np
import torch

from config import Refusal


@functools.lru_cache(maxsize=2)
def epoch_starts(n_tokens, T, seed, epoch):
    """Returns where the rows of an epoch start: the stream cut into blocks of T from a random offset, in
    random order.
    """
    rng = np.random.default_rng((seed, epoch))
    n = max(1, (n_tokens - T) // T)
    offset = rng.integers(min(T, n_tokens - n * T))
    return offset + T * rng.permutation(n)


def training_rows(data, T, seed, first, n):
    """Returns rows first .. first+n of the endless stream of rows of data, a 1-D array of ids, as a batch of n."""
    per_epoch = len(epoch_starts(len(data), T, seed, 0))
    starts = []
    for row in range(first, first + n):
        epoch, place = divmod(row, per_epoch)
        starts.append(epoch_starts(len(data), T, seed, epoch)[place])
    return blocks(data, starts, T)


def blocks(data, starts, T):
    """Returns a batch of data[start:start + T] for each start; beyond the end of data there is no target."""
    return padded([data[start : start + T + 1] for start in starts], T)


def padded(pieces, T):
    """Returns pieces of up to T + 1 ids as a batch."""
    rows = np.full((len(pieces), T + 1), -100, dtype=np.int64)
    for row, piece in zip(rows, pieces):
        row[: len(piece)] = piece
    rows = torch.from_numpy(rows)
    return {"idx": rows[:, :-1].clamp(min=0), "targets": rows[:, 1:]}


def to(batch, device):
    """Moves a batch to the device, without waiting for a GPU."""
    if device.type != "cuda":
        return {key: x.to(device) for key, x in batch.items()}
    return {key: x.contiguous().pin_memory().to(device, non_blocking=True) for key, x in batch.items()}


def count_targets(batch):
    """Returns the number of targets of a batch, a tensor on its device: to read it is to wait for the device."""
    return (batch["targets"] != -100).sum()


def evenly(rows, n):
    """Returns n of the rows, a 1-D array, evenly spaced; all of them for 0, or where there are no more."""
    n = min(n or len(rows), len(rows))
    return rows[np.linspace(0, len(rows) - 1, n).astype(int)]


def rows_each(cfg, compute):
    """Returns how many rows of a step each process takes. Raises Refusal where they cannot be shared evenly."""
    rows = cfg.gradient_accumulation_steps * cfg.batch_size
    if rows % compute.world_size:
        raise Refusal(
            f"{compute.world_size} processes cannot share the {rows} rows of a step evenly: choose another batch_size"
        )
    return rows // compute.world_size


def tokens_a_step(cfg):
    """Returns how many tokens a step has, of all processes together."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def micro_batches(step, cfg, compute):
    """Returns (first row, number of rows) of each micro-batch of a step that is this process's."""
    share = rows_each(cfg, compute)
    start = (step * compute.world_size + compute.rank) * share
    return [(start + row, min(cfg.batch_size, share - row)) for row in range(0, share, cfg.batch_size)]


def document_slices(ids, tokenizer):
    """Yields the documents of a split that end in it, as slices, without a bos at their start."""
    ends = np.flatnonzero(ids == tokenizer.eot)
    starts = [0, *ends + 1]
    for start, end in zip(starts, ends):
        has_bos = ids[start] == tokenizer.bos
        yield ids[start + 1 : end] if has_bos else ids[start:end]


def prompt_ids(tokenizer, text, special=False):
    """Returns the ids of a prompt; with special, a text that spells a special token means that token.

    A prompt starts with the tokenizer's first_id where it has one, as our own has end-of-text. Where it has
    none an empty text becomes bos, or without that end-of-text, after which a document starts.
    """
    ids = tokenizer.encode_special(text) if special else tokenizer.encode(text)
    if ids and tokenizer.first_id is None:
        return ids
    return [tokenizer.eot if tokenizer.bos is None else tokenizer.bos, *ids]


# -----------------------------------------------------------------------------------------------------
# Templates of fine-tuned models, texts with {prompt} in them

MODELS_OWN = "{messages}"  # in a template's place: the chat template that came with the model
AS_IT_STANDS = "as it stands"
STRIPPED = "stripped"  # without the space around it


def text_rule(config):
    """Returns how a model took the text that it learned, AS_IT_STANDS or STRIPPED, as its config says. A model
    that was fine-tuned before configs kept this took it STRIPPED.
    """
    older = STRIPPED if config.get("template") else AS_IT_STANDS
    return str(config.get("text_rule", older))


def by_text_rule(text, rule):
    """Returns a row's or a prompt's text as the model learned such texts."""
    return text.strip() if rule == STRIPPED else text


def render(template, prompt):
    """Returns the text that a fine-tuned model expects, the prompt as it stands in its template."""
    return template.replace("{prompt}", prompt)
