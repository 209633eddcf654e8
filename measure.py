"""How bench.py measures and tells: rivals in turn, memory, tables and drawings."""
import ctypes
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from checkpoint import write_atomic


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def race(rivals, seconds, device):
    """Times {name: function} against each other: {name: {"first", "median", "min", "max"}} in seconds a call.

    Each is called once (first), once to warm up, and then all in turn, there and back: three rounds, and more until `seconds` are over.
    A rival may be (setup, function): what setup() returns, untimed, is the function's argument.
    """
    rivals = {name: f if isinstance(f, tuple) else (None, f) for name, f in rivals.items()}

    def timed(name, calls=1):
        setup, f = rivals[name]
        arguments = [setup()] if setup else []
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            f(*arguments)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    first = {name: timed(name) for name in rivals}
    warm = {name: timed(name) for name in rivals}
    # A kernel of microseconds would be hidden by its launch, so a GPU is timed over 5 ms of calls
    calls = {name: 1 if setup or device.type == "cpu" else max(1, min(1000, int(5e-3 / warm[name]))) for name, (setup, _) in rivals.items()}
    times, end = {name: [] for name in rivals}, time.perf_counter() + seconds
    for i in range(100):
        if i >= 3 and time.perf_counter() >= end:
            break
        for name in list(rivals)[::-1 if i % 2 else 1]:  # threads spin on after a call: nobody always follows the same one
            times[name].append(timed(name, calls[name]))
    return {name: {"first": first[name], "median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def ms(t):
    """The columns for what race() says of a rival."""
    return {"ms": 1e3 * t["median"], "ms_min": 1e3 * t["min"], "ms_max": 1e3 * t["max"], "first_ms": 1e3 * t["first"]}


def peak_memory(device, work):
    """The most bytes that were in use during work() beyond those before it; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return None

    def peak():
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else work() takes what was freed and kept, and nothing grows
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
        before = peak()
    except (OSError, AttributeError):  # not allowed here, or another libc
        return None
    work()
    return peak() - before


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


def show(rows):
    """Prints dicts as tables, one for each run of dicts with the same keys."""
    for keys, group in itertools.groupby(rows, tuple):
        lines = [keys, *([cell(value) for value in row.values()] for row in group)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        print("\n".join("  ".join(x.rjust(width) for x, width in zip(line, widths)) for line in lines))


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def draw(cfg, compute, name, rows, x, y, by):
    """With --plot, out_dir/bench_NAME.png: y over x, both logarithmic, a line for each value of the columns `by`."""
    if not cfg.plot:
        return
    from matplotlib.figure import Figure
    ax = (fig := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for label in dict.fromkeys(tuple(row[key] for key in by) for row in rows):
        mine = sorted((row[x], row[y]) for row in rows if tuple(row[key] for key in by) == label)
        ax.plot(*zip(*mine), marker="o", ms=3, label=", ".join(label))
    ax.set(xlabel=x, ylabel=y, xscale="log", yscale="log", title=f"{name}: {device_name(compute.device)}")
    ax.set_xticks(ticks := sorted({row[x] for row in rows}), map(str, ticks), minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    ax.legend()
    path = os.path.join(cfg.out_dir, f"bench_{name}.png")
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=120))
    print(f"drawn: {path}")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    except OSError:
        cpu = ""
    return f"{cpu or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def commit():
    """The commit of this folder, -dirty where files differ from it; None where git does not know it."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
