"""The first lens of eval.py: how well a model predicts text, by document and by position."""

import math
from itertools import islice

import numpy as np

import toy_stories
from config import Refusal
from data import document_slices
from lenses.stats import bits, bits_per_byte, bootstrap, ratio
from score import STORIES, above_floor, context_lengths, document_nats

FEW = 30  # documents; with fewer, text is resampled in slices, and paragraphs stand for documents
SLICE = 1000  # bytes
BINS = 24  # at most, of the loss by position
LOGITS = 1 << 26  # that are held at once: 256 MB
TRAINING_TOKENS = 1 << 16  # of the training text on which the loss is measured, about so many


def split_documents(ids, tokenizer):
    """Returns the documents of a split (ids, 1-D) as texts, and whether the last one has an end."""
    closed = len(ids) > 0 and bool(ids[-1] == tokenizer.eot)
    if not closed:
        ids = np.r_[ids, tokenizer.eot]
    documents = [document for document in document_slices(ids, tokenizer) if len(document)]
    return [tokenizer.decode(document.tolist()) for document in documents], closed


def units(documents, tokenizer, few):
    """Returns the unit that each token belongs to, and each token's bytes, both int64 (n,).

    documents: lists of ids. A unit is a document or, where documents are few, a slice of SLICE bytes. All
    tokenizers give the same units for the same text.
    """
    sizes = np.array([len(token) for token in tokenizer.tokens])
    lengths = [sizes[ids] for ids in documents]
    for document in lengths:
        document[0] -= tokenizer.prefix  # bytes that are not in the text
    n_tokens = [len(document) for document in lengths]
    lengths = np.concatenate(lengths)
    if few:  # a token belongs to the slice that its last byte is in
        last_byte = (np.cumsum(lengths) - 1).clip(0)
        return last_byte // SLICE, lengths
    return np.repeat(np.arange(len(documents)), n_tokens), lengths


def unigram_nats(targets):
    """Returns the entropy of the frequencies of target ids, nats a token."""
    frequencies = np.bincount(targets) / len(targets)
    frequencies = frequencies[frequencies > 0]
    return -(frequencies * np.log(frequencies)).sum()


def perplexity(loss):
    return math.exp(min(loss, 700))


def fit_batch(model):
    """Returns how many rows of the whole context to read at once. Makes a model chunk its loss where the logits
    of a single row are too many.
    """
    rows = LOGITS // (model.config.block_size * model.config.vocab_size)
    model.chunked_loss = rows == 0
    return min(32, max(1, rows))


def check_nats(subject, nats):
    """Raises Refusal where a loss is not finite."""
    if not np.isfinite(nats).all():
        raise Refusal(f"{subject.path}: its loss is not finite; it was damaged in training", status=1)


def text_nats(model, tokenizer, encoded, compute):
    """Returns what score.document_nats returns of documents, lists of ids, and -log p of all their tokens together,
    in nats (n,), without the ends, which are not text.
    """
    losses = document_nats(model, encoded, tokenizer, compute, fit_batch(model))
    return losses, np.concatenate([document[:-1] for document in losses])


def measure(subject, documents, closed, compute, cfg):
    """Returns the figures of the likelihood lens, and what to resample: float64 (units, 3).

    The columns are nats, tokens and bytes of the text alone, each document read from its own start, so that
    models with different tokenizers are compared on the same bytes. The loss on ends is a figure by itself.
    closed: whether the last document has an end. Raises Refusal.
    """
    tokenizer = subject.tokenizer
    T = subject.model.config.block_size
    encoded = tokenizer.encode_batch(documents)
    document_losses, nats = text_nats(subject.model, tokenizer, encoded, compute)
    with_ends = document_losses if closed else document_losses[:-1]
    ends = np.array([losses[-1] for losses in with_ends])
    check_nats(subject, nats)
    few = len(documents) < FEW
    unit, lengths = units(encoded, tokenizer, few)
    columns = np.column_stack([np.bincount(unit, nats), np.bincount(unit), np.bincount(unit, lengths)])
    loss = nats.mean()
    loss_low, loss_high = bootstrap(columns, ratio, cfg.resamples, cfg.seed)
    bits_low, bits_high = bootstrap(columns, bits, cfg.resamples, cfg.seed)
    unigram = unigram_nats(np.concatenate(encoded))
    context = np.concatenate([context_lengths(len(ids) + 1, T)[:-1] for ids in encoded])
    figures = {
        "loss": loss,
        "loss_low": loss_low,
        "loss_high": loss_high,
        "bits_per_byte": bits_per_byte(nats, lengths),
        "tokens": len(nats),
        "bytes": int(lengths.sum()),
        "units": len(columns),
        "unit": f"slices of {SLICE:,} bytes" if few else "documents",
        "unigram": unigram,
        "explained": 1 - loss / unigram if unigram else 0.0,
        "by_position": by_position(nats, context),
        "perplexity": perplexity(loss),
        "perplexity_low": perplexity(loss_low),
        "perplexity_high": perplexity(loss_high),
        "bits_low": bits_low,
        "bits_high": bits_high,
    }
    if len(ends):
        figures["end"] = ends.mean()
    if subject.has_training:
        figures["training_loss"] = training_loss(subject, compute)
    return figures | toy_gap(documents, encoded, document_losses, T), columns


def training_loss(subject, compute):
    """Returns the loss on documents of the training text, evenly spaced, of about TRAINING_TOKENS together."""
    ids, tokenizer = subject.training
    ends = np.count_nonzero(ids == tokenizer.eot)
    if ends:
        every = max(1, len(ids) // TRAINING_TOKENS)
        documents = islice(document_slices(ids, tokenizer), 0, None, every)
    else:
        documents = [ids]
    documents = [document[:TRAINING_TOKENS].tolist() for document in documents if len(document)]
    _, nats = text_nats(subject.model, tokenizer, documents, compute)
    return nats.mean()


def by_position(nats, context):
    """Returns the loss over the tokens of context, from 1 on: [[first, last, mean nats, targets]].

    nats, context: of each target (n,). There are at most BINS bins, narrow ones first.
    """
    sums = np.bincount(context, nats)
    counts = np.bincount(context)
    end = len(counts)
    edges = np.geomspace(1, end, BINS + 1).astype(int)
    edges = np.unique(np.r_[edges, end])
    bins = []
    for first, after in zip(edges, edges[1:]):
        targets = counts[first:after].sum()
        mean = sums[first:after].sum() / targets
        bins.append([int(first), int(after - 1), float(mean), int(targets)])
    return bins


def is_toy(documents):
    """Returns whether the documents are toy stories, by the first 20."""
    return all(toy_stories.log_prob(text) > -math.inf for text in documents[:20])


def toy_gap(documents, encoded, nats, block_size):
    """Returns the nats a story above the exact entropy of toy stories, with their standard error.

    nats: what document_nats returns of the documents, encoded. Returns nothing for other texts, or where
    a story is longer than the context.
    """
    longest = max(map(len, encoded[:STORIES]))
    if not is_toy(documents) or longest >= block_size:
        return {}
    floor, gap = above_floor(documents[:STORIES], nats[:STORIES])
    if not np.isfinite(floor).all():  # stories of another kind among them
        return {}
    return {
        "floor": floor.mean(),
        "above_floor": gap.mean(),
        "above_floor_error": gap.std() / len(gap) ** 0.5,
        "stories": len(gap),
    }
