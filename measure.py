"""How bench.py and its parts measure and print: rivals in turn, memory, tables and drawings."""

import ctypes
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from folders import write_atomic
from optim import make_optimizers
from sharding import local

SLOW = 1e-7  # a learning rate
PAUSE = 0.1  # seconds: onnxruntime's threads spin for 20 to 50 ms after a call, on a core that the next rival needs
LARGE = 1 << 26  # float32 numbers: 256 MB, more than caches hold

# -----------------------------------------------------------------------------------------------------
# Time


def synchronize(device):
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_rival(rival, device, calls=1):
    """Returns the mean seconds of a call of the rival, over so many calls. A rival is as race() has it."""
    setup, function = rival if isinstance(rival, tuple) else (None, rival)
    arguments = [setup()] if setup else []
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    synchronize(device)
    return (time.perf_counter() - start) / calls


def count_calls(rival, seconds, device):
    """Returns how many calls, of `seconds` each, are timed together.

    The launch of a kernel takes longer than a kernel of microseconds, so a GPU is timed over 5 ms of calls; and a
    training step is launched while the one before runs, so it is timed over 20 ms or four calls.
    """
    if isinstance(rival, tuple) or device.type == "cpu":
        return 1
    calls = max(int(5e-3 / seconds), min(4, int(20e-3 / seconds)))
    return max(1, min(1000, calls))


def race(rivals, seconds, device, untimed=0, pause=0.0):
    """Times functions against each other; they take turns.

    Each is called once ("first"), `untimed` times more, and once to warm up. Then all are called in turn, every
    other round from the last to the first, until `seconds` from the warm-up on are over, for 100 rounds at most. On
    a processor, whose speed drifts, there are at least three rounds; on a GPU the warm-up counts where there was no
    time for a round.

    rivals: {name: function}. A function may be a pair (setup, function) instead: the function then gets what
    setup(), which is not timed, returns.
    pause: seconds before each turn, PAUSE where rivals have threads of their own.
    Returns {name: {"first", "median", "min", "max"}} in seconds a call.
    """
    first = {name: time_rival(rival, device) for name, rival in rivals.items()}
    for rival in list(rivals.values()) * untimed:
        time_rival(rival, device)
    end = time.perf_counter() + seconds
    warm = {name: time_rival(rival, device) for name, rival in rivals.items()}
    calls = {name: count_calls(rivals[name], warm[name], device) for name in rivals}
    times = {name: [] for name in rivals}
    least = 3 if device.type == "cpu" else 0
    for i in range(100):
        if i >= least and time.perf_counter() >= end:
            break
        # threads spin on after a call, so that no rival should always come after the same one
        names = reversed(rivals) if i % 2 else rivals
        for name in names:
            time.sleep(pause)
            times[name].append(time_rival(rivals[name], device, calls[name]))
    times = {name: times[name] or [warm[name]] for name in rivals}
    return {
        name: {
            "first": first[name],
            "median": statistics.median(times[name]),
            "min": min(times[name]),
            "max": max(times[name]),
        }
        for name in rivals
    }


def ms_columns(times):
    """Returns the columns of a table for what race() measured of a rival."""
    return {
        "ms": 1e3 * times["median"],
        "ms_min": 1e3 * times["min"],
        "ms_max": 1e3 * times["max"],
        "first_ms": 1e3 * times["first"],
    }


# -----------------------------------------------------------------------------------------------------
# Memory


def count_bytes(tensors):
    """Returns the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def to_megabytes(size):
    return None if size is None else size / 1e6


def make_slow_optimizers(model, cfg, compute):
    """Returns train.py's optimizers with a learning rate that leaves the weights where they are.

    Else random weights might diverge or become denormal, and steps would take another time.
    """
    return make_optimizers(model, replace(cfg, learning_rate=SLOW, min_lr=0.0), compute)


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


def large_tensor(device):
    """Returns a tensor of ones that is too large for any cache."""
    return torch.ones(LARGE, device=device)


def convert(to_hf, ours):
    """Returns to_hf(ours), Hugging Face's counterpart of ours. Where there is none, prints why and returns None."""
    try:
        return to_hf(ours)
    except ImportError as e:
        print(f"without {e.name}: pip install {e.name}")
    except ValueError as e:
        print(e)
    return None
