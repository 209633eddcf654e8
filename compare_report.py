"""What compare.py says about its runs: the table with the verdicts under it, and the plot.

    table(comparison, results)     Markdown
    draw(comparison, path)         the loss by steps and by seconds of training

A comparison is a compare.Comparison; results are {variant: [what each of its jobs wrote]}.
"""

import statistics

import numpy as np

import folders
from lenses.stats import paired
from log import read_log

CLOSE = 0.01  # how far apart the parameters of matched variants may be, as a share


def verdict(results, others):
    """Returns in words what paired() shows."""
    mean, half, n = paired(results, others)
    lost = sum(losses[seed] is None for losses in (results, others) for seed in losses)
    diverged = f"; {lost} runs diverged" if lost else ""
    if n == 0:
        return f"no seed of which both runs ended{diverged}"
    if n == 1:
        return f"{mean:+.4f} bits a byte, and one seed does not show what it would be with another{diverged}"
    if abs(mean) <= half:
        return f"no difference that {n} seeds can show ({mean:+.4f} +- {half:.4f} bits a byte){diverged}"
    word = "better" if mean < 0 else "worse"
    return f"{word} by {abs(mean):.4f} +- {half:.4f} bits a byte ({n} seeds){diverged}"


def difference(results, others):
    """Returns paired() as a cell of the table."""
    mean, half, _ = paired(results, others)
    if mean is None:
        return ""
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} +- {half:.4f}"


def table(comparison, results):
    """Returns a Markdown table of {variant: its results}, and under it the verdicts."""
    names = list(results)
    first = names[0]
    losses = {name: {row["seed"]: row["bits_per_byte"] for row in results[name]} for name in names}
    swept = list(comparison.sweep[0]) if comparison.sweep else []
    lines = []
    for i, name in enumerate(names):
        values = results[name][0]["values"]
        line = {"variant": name} | {key: taken_cell(key, values[key], comparison.sweep) for key in swept}
        rows = [row for row in results[name] if row["bits_per_byte"] is not None]
        if rows:
            to_first = difference(losses[name], losses[first]) if i else ""
            to_above = difference(losses[name], losses[names[i - 1]]) if i else ""
            line |= loss_cells(rows) | {f"to {first}": to_first, "to the line above": to_above}
            line |= size_cells(rows)
        is_whole = len(rows) == len(results[name])
        line["seeds"] = f"{len(rows)}" if is_whole else f"{len(rows)} of {len(results[name])}"
        lines.append(line)
    keys = list(max(lines, key=len))
    cells = [keys, ["---"] * len(keys), *([line.get(key, "diverged") for key in keys] for line in lines)]
    text = [f"| {' | '.join(row)} |" for row in cells]
    verdicts = [
        f"- {name} against {first}: {verdict(losses[name], losses[first])}" for name in names[1:]
    ]
    return "\n".join([*text, "", *verdicts, "", *notes(comparison, results)])


def loss_cells(rows):
    """Returns {header: cell} of the losses of a variant's runs."""
    bits = [row["bits_per_byte"] for row in rows]
    return {
        "bits a byte": f"{statistics.mean(bits):.4f}",
        "spread": f"{statistics.stdev(bits):.4f}" if len(bits) > 1 else "",
    }


def size_cells(rows):
    """Returns {header: cell} of how large and how fast a variant's runs are."""
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return {
        "nats a token": f"{statistics.mean(row['nats'] for row in rows):.4f}",
        "parameters": f"{rows[0]['parameters']:,}",
        "steps": f"{rows[0]['steps']:,}",
        "tokens": f"{rows[0]['tokens']:,}",
        "tokens/s": f"{statistics.median(row['tokens_per_s'] for row in rows):,.0f}",
        "peak MB": f"{statistics.median(peaks) / 1e6:,.0f}" if peaks else "",
    }


def taken_cell(key, value, sweep):
    """Returns a value that a variant took, with a * where it is the lowest or highest of more than two in the sweep."""
    tried = {values[key] for values in sweep}
    is_end = type(value) in (int, float) and len(tried) > 2 and value in (min(tried), max(tried))
    return (f"{value:g}" if type(value) is float else str(value)) + "*" * is_end


def notes(comparison, results):
    """Yields the sentences that explain the table."""
    cfg = comparison.cfg
    rows = [row for rows in results.values() for row in rows if row["bits_per_byte"] is not None]
    yield (
        f"Equal: {cfg.by}, {cfg.budget:,.10g} a run. The loss is of the whole validation split, story by story; "
        "the spread is the standard deviation over seeds, and +- half the 95% interval of the paired difference. "
        "One verdict in twenty is wrong where there is no difference."
    )
    if comparison.sweep:
        yield (
            f"Each variant tried the same {len(comparison.sweep)} settings on {cfg.sweep_budget:.0%} of the "
            f"budget, with seed {comparison.seeds[0]}, and was trained with the best; * is an end of what was tried. "
            "The intervals are of these settings: how well they were chosen is not in them."
        )
    for name in results:
        sizes = [row["parameters"] for row in results[name] if row["bits_per_byte"] is not None]
        if sizes and abs(sizes[0] / rows[0]["parameters"] - 1) > CLOSE:
            yield f"{name} has {sizes[0] / rows[0]['parameters'] - 1:+.1%} parameters beside {rows[0]['variant']}."
    for device, dtype in sorted({(row["device"], row["dtype"]) for row in rows}):
        yield f"Trained on {device}, in {dtype}."


def curve(job):
    """Returns (steps, seconds, bits a byte) of the evaluations in the log of a job that did not diverge."""
    result = job.read()
    lines = [line for line in read_log(job.folder / "log.jsonl") if "val_bits_per_byte" in line]
    steps = np.array([line["step"] for line in lines])
    seconds = steps * (result["seconds"] / result["steps"])
    return steps, seconds, np.array([line["val_bits_per_byte"] for line in lines])


def draw_variant(by_step, by_second, name, curves):
    """Draws the mean of a variant's curves into two axes, their spread shaded."""
    longest = max(len(steps) for steps, _, _ in curves)  # a log may have been lost since
    curves = [curve for curve in curves if len(curve[0]) == longest]
    steps, _, _ = curves[0]
    seconds = np.mean([seconds for _, seconds, _ in curves], 0)
    bits = np.array([bits for _, _, bits in curves])
    for ax, x in ((by_step, steps), (by_second, seconds)):
        [line] = ax.plot(x[1:], bits.mean(0)[1:], marker="o", ms=2, lw=1, label=name)
        ax.fill_between(x[1:], bits.min(0)[1:], bits.max(0)[1:], color=line.get_color(), alpha=0.2, lw=0)


def draw(comparison, path):
    """Draws the loss of each variant by steps and by seconds of training, the spread over seeds shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    jobs = [job for job in comparison.finished() if job.read()["bits_per_byte"] is not None]
    for name in comparison.variants:
        curves = [curve(job) for job in jobs if job.variant == name]
        if curves:
            draw_variant(by_step, by_second, name, curves)
    by_step.set(xlabel="step", ylabel="validation loss, bits a byte")
    by_step.set_title(comparison.cfg.out_dir, parse_math=False)  # a name may have a $ in it
    by_second.set(xlabel="seconds of training")
    for ax in (by_step, by_second):
        ax.grid(alpha=0.3)
    if by_step.lines:  # none where all runs diverged
        by_step.legend()
    folders.write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=120))
