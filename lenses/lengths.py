"""Bits a byte by position, far past the context of training: the report of eval.py --lengths.

All is made from one dict of figures, here `whole`, which compare returns. A way is a model under one
rope_scaling.
"""

import math

import numpy as np

from config import Refusal
from data import evenly
from lenses.likelihood import check_nats, fit_batch, units
from lenses.page import e, frame, html_table, line_plot
from lenses.stats import bits, bits_per_byte, bootstrap
from measure import align
from memory import check_memory
from score import position_nats
from sizes import mask_bytes

TIMES = 8  # contexts of training that are read, unless block_size is given
PARTS = 4  # windows that a context is cut into
MARKS = 8  # the most numbers at the axis of positions
TOKENS = 1 << 18  # of the joined texts that are read, about so many


def scalings_for(c, length, given):
    """Returns the rope_scalings under which to read a model of config c up to position `length`; "" is its own.

    A rope is read also under the one that is given. Where none is given and it was trained without any, it is
    read under each kind that stretches its context to that length, unless its windows see no further than in
    training.
    """
    if c.pos != "rope":
        return [""]
    if given:
        return ["", given]
    if c.rope_scaling != "none" or not c.what_ends_a_text:
        return [""]
    factor = f"{length / c.block_size:g}"
    return ["", f"linear:{factor}", f"ntk:{factor}", f"yarn:{factor},{c.block_size}"]


def window_edges(context, length):
    """Returns where windows of positions from 0 to length start, PARTS in a context, and where the last one ends."""
    n = math.ceil(PARTS * length / context)
    return np.unique(np.linspace(0, length, n + 1).astype(int))


def figures(nats, sizes, edges, cfg):
    """Returns bits a byte of each window with 95% intervals over texts: a dict of lists.

    nats, sizes: -log p and bytes of each target, (n texts, length) each; 0 where the target is not text.
    """
    rows = {"bits": [], "low": [], "high": []}
    for first, end in zip(edges, edges[1:]):
        window_nats = nats[:, first:end].sum(1)
        window_bytes = sizes[:, first:end].sum(1)
        if not window_bytes.any():
            raise Refusal(f"the text has no byte at positions {first + 1} to {end}: give a longer one")
        columns = np.column_stack([window_nats, np.zeros(len(nats)), window_bytes])
        low, high = bootstrap(columns, bits, cfg.resamples, cfg.seed)
        rows["bits"].append(bits_per_byte(window_nats, window_bytes))
        rows["low"].append(low)
        rows["high"].append(high)
    return rows


def long_rows(documents, tokenizer, length):
    """Returns rows of length + 1 ids of the documents, which are joined as in data: evenly spaced rows, of about
    TOKENS tokens together; and the bytes of each target (n, length), -1 where it is not text. Raises Refusal.
    """
    encoded = tokenizer.encode_batch(documents)
    _, sizes = units(encoded, tokenizer, few=False)
    head = tokenizer.head
    ids = np.concatenate([[*head, *document, tokenizer.eot] for document in encoded])
    flags = [[False] * len(head) + [True] * len(document) + [False] for document in encoded]
    stream_sizes = np.full(len(ids), -1)
    stream_sizes[np.concatenate(flags)] = sizes
    starts = np.arange(0, len(ids) - length, length)
    if not len(starts):
        problem = f"the text has {len(ids):,} tokens, and {length:,} positions need one more than that"
        raise Refusal(f"{problem}: give a longer one with --text=FILE, or a smaller block_size")
    starts = evenly(starts, math.ceil(TOKENS / length))
    rows = np.stack([ids[start : start + length + 1] for start in starts])
    return rows, np.stack([stream_sizes[start + 1 : start + length + 1] for start in starts])


def read_lengths(subject, documents, length, edges, compute, cfg):
    """Returns a dict of figures for each way to read a subject: as it is and, for rope, stretched.

    Raises Refusal.
    """
    own = subject.model.config
    rows, sizes = long_rows(documents, subject.tokenizer, length)
    is_text = sizes >= 0
    sizes = sizes * is_text
    results = []
    for scaling in scalings_for(own, length, cfg.rope_scaling):
        subject.checkpoint.stretch(scaling, length)
        model, _ = subject.checkpoint.restore()
        check_memory(compute.device, mask_bytes(model.config), "try a smaller block_size")
        model = model.to(compute.device)
        nats = position_nats(model, rows, compute, fit_batch(model)) * is_text
        check_nats(subject, nats)
        way = {
            "name": f"{subject.name}, {scaling}" if scaling else subject.name,
            "out_dir": subject.name,
            "rope_scaling": scaling or own.rope_scaling,
            "n": len(rows),
            "all": bits_per_byte(nats, sizes),
        }
        if not scaling:
            nats_restarted = position_nats(subject.model, rows, compute, fit_batch(subject.model))
            way["restarted"] = bits_per_byte(nats_restarted * is_text, sizes)
        results.append(way | figures(nats, sizes, edges, cfg))
    return results


def compare(subjects, documents, text, compute, cfg):
    """Returns the figures of the report on lengths, a dict. Raises Refusal."""
    contexts = {subject.model.config.block_size for subject in subjects}
    if len(contexts) > 1:
        numbers = ", ".join(f"{s.name} has {s.model.config.block_size}" for s in subjects)
        raise Refusal(f"lengths compares models of one context, and {numbers}")
    [context] = contexts
    length = cfg.block_size or TIMES * context
    if length <= context:
        raise Refusal(f"lengths goes past the context of {context}: block_size={length} does not")
    edges = window_edges(context, length)
    ways = []
    for subject in subjects:
        ways += read_lengths(subject, documents, length, edges, compute, cfg)
    return {
        "text": text,
        "context": context,
        "length": length,
        "edges": edges.tolist(),
        "ways": ways,
        "seed": cfg.seed,
        "computed": compute.message,
    }


# ---- the report


def introduction(whole):
    halves = [(high - low) / 2 for way in whole["ways"] for low, high in zip(way["low"], way["high"])]
    return (
        f"Bits a byte at positions of {whole['ways'][0]['n']} texts of {whole['length']:,} tokens, on "
        f"{whole['text']}; training saw {whole['context']:,} positions. "
        f"95% of the bootstrap over texts is within ± {max(halves):.3f} of each figure or less. "
        "Documents follow each other in a text, so that far positions ask whether a model still works "
        "there, not whether it uses what stood far before. "
        f"Restarted: in windows of {whole['context']:,} tokens that overlap by half, as without any of this."
    )


def table(whole):
    """Returns (header, rows): a column a way, a row a window."""
    header = ["positions", *(way["name"] for way in whole["ways"])]
    rows = []
    edges = whole["edges"]
    for i, (first, end) in enumerate(zip(edges, edges[1:])):
        cells = [f"{way['bits'][i]:.3f}" for way in whole["ways"]]
        rows.append([f"{first + 1:,} – {end:,}", *cells])
    rows.append(["all", *(f"{way['all']:.3f}" for way in whole["ways"])])
    restarted = [f"{way['restarted']:.3f}" if "restarted" in way else "–" for way in whole["ways"]]
    rows.append(["all, restarted", *restarted])
    return header, rows


def text(whole):
    """Returns the report as text."""
    header, rows = table(whole)
    notes = [f"Note: {note}" for note in whole["notes"]]
    return "\n\n".join([introduction(whole), align([header, *rows], str.rjust), *notes])


def plot(whole):
    """Returns bits a byte over the position as SVG: a line a way, which is flat where its model holds."""
    edges = np.array(whole["edges"])
    middles = (edges[:-1] + edges[1:]) / 2
    lines = [list(zip(middles.tolist(), way["bits"])) for way in whole["ways"]]
    low = 0.95 * min(y for line in lines for _, y in line)
    length = whole["length"]
    step = whole["context"] * math.ceil(length / whole["context"] / MARKS)
    marks = range(0, length + 1, step)
    caption = "Bits a byte, over the position in the text"
    names = [way["name"] for way in whole["ways"]]
    label = "position, tokens"
    return line_plot(lines, names, lambda x: x / length, marks, low, caption, label)


def page(whole):
    """Returns the report as HTML."""
    header, rows = table(whole)
    names = e(", ".join(dict.fromkeys(way["out_dir"] for way in whole["ways"])))
    notes = "".join(f"<p class=soft>{e(note)}</p>" for note in whole["notes"])
    return frame(
        f"{names}: lengths",
        f"""<h1>{names}</h1><p class=soft>{e(introduction(whole))}</p>{notes}
{plot(whole)}{html_table(header, rows, top="all")}""",
        whole,
    )
