"""A model's loss: on a split, on each token, on documents, on completions, and above the toy stories' exact
entropy.

All of it is in nats, and each target counts once, however many processes share the work.
"""

import math
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy_stories
from data import blocks, count_targets, document_slices, evenly, padded, prompt_ids, to
from experts import recorded_routings

STORIES = 500  # toy stories on which a loss is compared with the exact entropy
ROUTED_TOKENS = 16384  # tokens of a split on which it is counted how many each expert gets
COMPLETION_TOKENS = 8192  # of completions and their contexts in a batch


def next_token_loss(model, batch):
    """Returns the cross-entropy in nats, summed over the batch's targets."""
    return model(**batch, reduction="sum")[1]


@contextmanager
def evaluating(model):
    """Puts a model into eval mode, without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def bits_per_nat(split):
    """Returns how many bits a byte one nat a token is on a split. split: its entry in meta.json."""
    return split["tokens"] / split["bytes"] / math.log(2)


def evaluate(model, data, T, batch_size, compute, tokens=0):
    """Returns nats a token on a split (1-D array of ids) in blocks of T, each target once; with `tokens`
    only on about so many, evenly spaced and always the same.
    """
    starts = evenly(np.arange(0, len(data) - 1, T), math.ceil(tokens / T))
    return mean_nats(model, starts, partial(blocks, data, T=T), batch_size, compute)


def mean_nats(model, rows, make_batch, batch_size, compute):
    """Returns the mean nats a target over rows (1-D array); make_batch(rows) makes a batch of some of them.
    Processes share the batches; the figure does not depend on how many processes there are.
    """

    def measure(batch):
        nats = next_token_loss(model, batch)
        return torch.stack([nats, count_targets(batch).to(nats.dtype)])

    [nats] = means(model, rows, make_batch, batch_size, compute, measure, 1)
    return nats


def means(model, rows, make_batch, batch_size, compute, measure, n):
    """Returns the means of n figures over rows, as mean_nats returns that of one. measure(batch) returns a tensor
    (n + 1,): the sums of the figures over a batch, and last the number that they are divided by.
    """
    batches = np.array_split(rows, math.ceil(len(rows) / batch_size))
    sums = torch.zeros(len(batches), n + 1, dtype=torch.float64)
    with evaluating(model):
        for i, is_counted in shared_batches(len(batches), compute):
            batch = to(make_batch(batches[i]), compute.device)
            with compute.autocast():
                figures = measure(batch).cpu().double()  # mps has no float64
            if is_counted:
                sums[i] = figures
    *totals, count = compute.sum(sums).sum(0).tolist()
    return [total / count for total in totals]


def shared_batches(n, compute):
    """Yields (number, whether it counts) of this process's share of n batches. Where weights are in shards each
    process needs the others', so all compute equally many batches: one that has a batch less repeats the last,
    which does not count.
    """
    for first in range(0, n, compute.world_size):
        i = first + compute.rank
        if i < n or compute.shards:
            yield min(i, n - 1), i < n


def expert_figures(model, data, T, batch_size, compute):
    """Returns how layers of experts share out a split's tokens (1-D array of ids), on ROUTED_TOKENS of
    them, evenly spaced and always the same: {"expert_share": for each layer the share of the tokens that
    each expert gets, "router_entropy": for each layer nats a token}. Without experts {}.
    """
    if model.config.mlp != "moe":
        return {}
    n_layer, n_expert = model.config.n_layer, model.config.n_expert

    def measure(batch):
        is_token = batch["targets"] != -100
        with recorded_routings(model) as routings:
            model.next_logits(batch["idx"])
        sums = []  # of each layer: the tokens of each expert, then the entropies of all tokens
        for probabilities, experts in routings:
            sums.append(torch.bincount(experts[is_token].flatten(), minlength=n_expert))
            sums.append(-torch.xlogy(probabilities, probabilities).sum(-1)[is_token].sum()[None])
        return torch.cat([*sums, is_token.sum()[None]])

    starts = evenly(np.arange(0, len(data) - 1, T), math.ceil(ROUTED_TOKENS / T))
    n = n_layer * (n_expert + 1)
    figures = means(model, starts, partial(blocks, data, T=T), batch_size, compute, measure, n)
    layers = np.reshape(figures, (n_layer, n_expert + 1)).tolist()
    return {
        "expert_share": [[round(share, 5) for share in shares] for *shares, _ in layers],
        "router_entropy": [round(entropy, 4) for *_, entropy in layers],
    }


def expert_line(figures, n_tokens, balance):
    """Returns a line about expert_figures of a split of n_tokens: which experts are dead, or how many tokens the
    least and the most used ones get.
    """
    shares = figures["expert_share"]
    entropy = figures["router_entropy"]
    seen = f"of {min(ROUTED_TOKENS, n_tokens):,} validation tokens"
    dead = [
        f"{expert} in layer {layer}"
        for layer, row in enumerate(shares)
        for expert, share in enumerate(row)
        if share == 0
    ]
    if dead:
        advice = f"a --balance above {balance:g} spreads tokens more evenly"
        return f"{len(dead)} experts are dead, they got none {seen}: {', '.join(dead)}; {advice}"
    least = min(map(min, shares))
    most = max(map(max, shares))
    return (
        f"no expert is dead: each got {least:.1%} to {most:.1%} {seen}; "
        f"the routers' entropy is {min(entropy):.2f} to {max(entropy):.2f} nats"
    )


def target_nats(model, rows, T, compute):
    """Returns -log p of each target of rows of at most T + 1 ids, in nats: float64 (rows, T)."""
    with compute.autocast():
        losses = model(**to(padded(rows, T), compute.device), reduction="none")[1]
    return losses.cpu().double().numpy()


def position_nats(model, rows, compute, batch_size=32):
    """Returns -log p of each target of rows of ids (n, L + 1), in nats: float64 (n, L).

    A row that is longer than the context is read in windows that overlap by half (document_windows).
    """
    length = rows.shape[1] - 1
    nats = np.zeros((len(rows), length))
    windows = document_windows(length, model.config.block_size)
    batches = [(window, i) for window in windows for i in range(0, len(rows), batch_size)]
    with evaluating(model):
        for (start, first, end), i in tqdm(batches, "lengths", unit="batch", disable=None, leave=False):
            pieces = rows[i : i + batch_size, start : end + 1]
            losses = target_nats(model, pieces, end - start, compute)
            nats[i : i + batch_size, first:end] = losses[:, first - start :]
    return nats


def document_nats(model, documents, tokenizer, compute, batch_size=32):
    """Returns -log p of each token of each document and of its end, in nats: a list of float64 (n + 1,).

    documents: lists of ids, of n each in the shapes above. Each is read from its own start; one that is
    longer than the context in windows that overlap by half (document_windows).
    """
    T = model.config.block_size
    head = prompt_ids(tokenizer, "")  # bos, or the end-of-text before a document
    texts = [[*head, *ids, tokenizer.eot] for ids in documents]
    nats = [np.zeros(len(text) - 1) for text in texts]
    windows = [
        (i, *window) for i, text in enumerate(texts) for window in document_windows(len(text) - 1, T)
    ]
    windows.sort(key=lambda window: window[3] - window[1])  # alike in length, so that little is padding
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    with evaluating(model):
        for batch in tqdm(batches, "likelihood", unit="batch", disable=None, leave=False):
            pieces = [texts[i][start : end + 1] for i, start, _, end in batch]
            longest = max(map(len, pieces)) - 1
            losses = target_nats(model, pieces, longest, compute)
            for row, (i, start, first, end) in zip(losses, batch):
                nats[i][first:end] = row[first - start : end - start]
    return nats


def document_windows(n, T):
    """Returns (start, first, end) of each window in which a model of context T reads a text of n targets: it
    reads from place `start` on, and the window's own targets, which no window before it predicts, are first
    to end. In all windows but the first one they have at least half a context before them.
    """
    windows = [(0, 0, min(n, T))]
    while windows[-1][2] < n:
        start = windows[-1][0] + max(1, T // 2)
        windows.append((start, windows[-1][2], min(n, start + T)))
    return windows


def context_lengths(n, T):
    """Returns how many tokens each of n targets is predicted from, int64 (n,)."""
    return np.concatenate(
        [np.arange(first, end) - start + 1 for start, first, end in document_windows(n, T)]
    )


def completion_nats(model, tokenizer, pairs, compute, context_ids=prompt_ids):
    """Returns -log p of each completion after its context, in nats: float64 (pairs,).

    pairs: (context, completion), texts. context_ids(tokenizer, context) returns the ids that a completion
    goes on from. A context that is too long for the model loses its beginning.
    """
    rows = []
    lengths = []  # of the completions, in tokens
    for context, completion in pairs:
        ids = tokenizer.encode_more(completion)
        row = context_ids(tokenizer, context) + ids
        rows.append(row[-model.config.block_size - 1 :])
        lengths.append(len(ids))
    nats = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with evaluating(model), tqdm(total=len(rows), desc="probes", disable=None, leave=False) as bar:
        while order:
            longest = len(rows[order[-1]])
            batch_size = max(1, COMPLETION_TOKENS // longest)
            batch = order[-batch_size:]
            del order[-batch_size:]
            batch_rows = [rows[i] for i in batch]
            batch_lengths = [lengths[i] for i in batch]
            nats[batch] = batch_nats(model, batch_rows, batch_lengths, compute)
            bar.update(len(batch))
    return nats


def batch_nats(model, rows, lengths, compute):
    """Returns -log p of the last lengths[i] ids of each row, float64 (rows,). rows: lists of ids."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    is_target = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (row, length) in enumerate(zip(rows, lengths)):
        ids[i, : len(row)] = torch.tensor(row)
        is_target[i, max(1, len(row) - length) : len(row)] = True
    ids = ids.to(compute.device)
    is_target = is_target[:, 1:].to(compute.device)
    targets = ids[:, 1:][is_target]
    with compute.autocast():
        hidden = model.hidden(ids[:, :-1])
        logits = model.logits(hidden[is_target])  # of the completions alone
        losses = F.cross_entropy(logits.float(), targets, reduction="none").cpu().double()
    nats = torch.zeros(is_target.shape, dtype=torch.double)
    nats.masked_scatter_(is_target.cpu(), losses)
    return nats.sum(1).numpy()


def above_floor(stories, nats):
    """Returns two float64 (n,), in nats a story: the exact -log p of toy stories, and by how much the model's
    is higher.

    stories: texts; nats: what document_nats returns of them.
    """
    floor = -np.array([toy_stories.log_prob(text) for text in stories])
    return floor, np.array([losses.sum() for losses in nats]) - floor


def floor_line(model, tokenizer, ids, compute, n=STORIES):
    """Returns a line that says how far the model is above the exact entropy of the toy stories in ids,
    in nats a story.
    """
    documents = [document.tolist() for document in islice(document_slices(ids, tokenizer), n)]
    longest = max(map(len, documents), default=0)
    block_size = model.config.block_size
    if longest >= block_size:
        return f"the stories are not scored: they have up to {longest} tokens, and block_size is {block_size}"
    nats = document_nats(model, documents, tokenizer, compute)
    floor, gap = above_floor([tokenizer.decode(document) for document in documents], nats)
    # where there are few stories, the validation split is the end of the text and may begin within one
    is_whole = np.isfinite(floor)
    if not is_whole.any():
        return "the stories are not scored: no story is whole"
    floor = floor[is_whole]
    gap = gap[is_whole]
    error = gap.std() / len(gap) ** 0.5
    return (
        f"{len(gap)} unseen stories: {(floor + gap).mean():.2f} nats a story, "
        f"{100 * gap.mean() / floor.mean():.1f}% above their exact entropy of {floor.mean():.2f} "
        f"(standard error of the difference {error:.2f})"
    )
