"""How bench.py and benches/ measure memory, and print and draw what was measured. race.py has the times."""

import ctypes
import gc
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from folders import write_atomic
from sharding import local

LARGE = 1 << 26  # float32 numbers: 256 MB, more than caches hold

# -----------------------------------------------------------------------------------------------------
# Memory


def count_bytes(tensors):
    """Returns the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def to_megabytes(size):
    return None if size is None else size / 1e6


def state_bytes(model, optimizers):
    """Returns the bytes of weights and moments, which stay between steps; in shards those of this process."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [x for state in states for x in state.values()]
    return count_bytes(map(local, [*model.parameters(), *moments]))


def peak_resident_bytes():
    status = Path("/proc/self/status").read_text()
    kilobytes = status.partition("VmHWM:")[2].split()[0]
    return 1024 * int(kilobytes)


def peak_gpu_memory(device, work):  # as torch hands it out, which does not wait for the GPU
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def peak_process_memory(work):
    try:
        # else work() would take memory that was freed but not given back, and the process would not grow
        ctypes.CDLL(None).malloc_trim(0)
        # The peak starts anew: man 5 proc
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_resident_bytes()
    except (OSError, AttributeError):  # not allowed here, or another libc
        work()
        return None
    work()
    # the kernel counts pages in batches, and may not have counted a few
    return peak_resident_bytes() - before or None


def peak_memory(device, work):
    """Returns the most bytes that were in use during work() beyond those in use before it.

    Returns None where the system does not tell, as it may not of a few pages.
    """
    gc.collect()
    if device.type == "cuda":
        return peak_gpu_memory(device, work)
    if device.type == "cpu" and sys.platform == "linux":
        return peak_process_memory(work)
    work()
    return None


def large_tensor(device):
    """Returns a tensor of ones that is too large for any cache."""
    return torch.ones(LARGE, device=device)


# -----------------------------------------------------------------------------------------------------
# Tables and drawings


def format_cell(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def align(lines, justify):
    """Returns lines of cells as a table in text. justify: str.ljust or str.rjust."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(justify, line, widths)).rstrip() for line in lines)


def print_tables(rows):
    """Prints dicts as tables, one for each run of dicts with the same keys."""
    for keys, group in itertools.groupby(rows, tuple):
        lines = [keys]
        for row in group:
            lines.append([format_cell(value) for value in row.values()])
        print(align(lines, str.rjust))


def draw(cfg, device, name, rows, x, y, by):
    """Draws column y over column x to out_dir/bench_NAME.png, where cfg.plot asks for it.

    Both axes are logarithmic. There is a line for each combination of values in the columns `by`.
    """
    if not cfg.plot:
        return
    from matplotlib.figure import Figure

    points = {}
    for row in rows:
        label = ", ".join(row[key] for key in by)
        points.setdefault(label, []).append((row[x], row[y]))
    ticks = sorted({row[x] for row in rows})

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, pairs in points.items():
        axes.plot(*zip(*sorted(pairs)), marker="o", ms=3, label=label)
    title = f"{name}: {device_name(device)}"
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log", title=title)
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(cfg.out_dir, f"bench_{name}.png")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"drawn: {path}")


# -----------------------------------------------------------------------------------------------------
# Where it was measured


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = text.partition("model name\t: ")[2].partition("\n")[0]
    return name or platform.processor() or platform.machine()


def device_name(device):
    """Returns the model of the GPU, or that of the processor and how many threads torch has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def git_commit():
    """Returns the commit of this folder, with -dirty where files differ from it; None where it is no git folder."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


# -----------------------------------------------------------------------------------------------------
# Rivals by Hugging Face


def convert(to_hf, ours):
    """Returns to_hf(ours), Hugging Face's counterpart of ours. Where there is none, prints why and returns None."""
    try:
        return to_hf(ours)
    except ImportError as e:
        print(f"without {e.name}: pip install {e.name}")
    except ValueError as e:
        print(e)
    return None
