"""log.jsonl, a JSON object a line with the step it is about; loss.png, which draws it; and the speed of a run."""

import contextlib
import json
import os
import time
from dataclasses import asdict

from config import Refusal
from device import peak_flops
from folders import write_atomic


class Log:
    """Writes out_dir/log.jsonl, from the first process alone.

    Lines past saved_step are dropped. It is the step of the checkpoint that a run goes on from, -1 where
    the run starts anew. Raises Refusal.
    """

    def __init__(self, cfg, saved_step, compute):
        self.path = os.path.join(cfg.out_dir, "log.jsonl")
        self.is_main = compute.is_main
        self.wandb = None
        if not self.is_main:
            return
        if cfg.wandb_log:  # before anything is written, as it may fail
            self.wandb = start_wandb(cfg)
        lines = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= saved_step]
        write_atomic(self.path, lambda f: f.write("".join(lines).encode()))

    def write(self, line):
        if not self.is_main:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise Refusal(f"cannot write {self.path}: {e.strerror}", status=1)
        if self.wandb:
            figures = {key: value for key, value in line.items() if key != "step"}
            self.wandb.log(figures, step=line["step"])

    def close(self):
        if self.wandb:
            self.wandb.finish()


def start_wandb(cfg):
    import wandb

    name = os.path.basename(cfg.out_dir)
    try:
        return wandb.init(project="tinylm", name=name, config=asdict(cfg), resume="allow")
    except Exception as e:  # of many kinds: nobody is logged in, no network, settings
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise Refusal(f"wandb does not start ({reason:.200}); WANDB_MODE=offline keeps its log here")


class Meter:
    """Tokens a second of training, and MFU where the GPU's peak is known; what is not training does not count."""

    def __init__(self, task, compute):
        self.peak = peak_flops(compute.device, compute.dtype)
        self.flops_per_token = task.flops_per_token
        self.world_size = compute.world_size
        self.tokens = 0
        self.start = time.perf_counter()
        self.speed = {}  # as last measured

    def add(self, batches):
        self.tokens += sum(batch["idx"].numel() for batch in batches) * self.world_size

    @contextlib.contextmanager
    def paused(self):
        """Leaves out the time of what is done meanwhile."""
        pause = time.perf_counter()
        yield
        self.start += time.perf_counter() - pause

    def measure(self):
        """Returns the speed since the last call."""
        now = time.perf_counter()
        tokens_per_s = self.tokens / (now - self.start)
        self.speed = {"tokens_per_s": round(tokens_per_s)}
        if self.peak and self.flops_per_token:
            self.speed["mfu"] = round(
                self.flops_per_token * tokens_per_s / self.peak / self.world_size, 4
            )
        self.tokens = 0
        self.start = now
        return self.speed


def evaluation_line(step, figures, speed):
    """Returns the line that an evaluation prints: of the figures those that are numbers."""
    numbers = {name: value for name, value in figures.items() if not isinstance(value, list)}
    parts = [f"{name} {value:.4f}" for name, value in numbers.items()]
    parts += [f"{name} {value:,}" for name, value in speed.items()]
    return f"step {step}: {', '.join(parts)}"


def read_log(path):
    """Returns the lines of a log.jsonl as dicts. Raises Refusal where the file cannot be read.

    Leaves out lines that are none of a log: a killed run may end it with half a line.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [parse_line(text) for text in f]
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    return [line for line in lines if line is not None]


def parse_line(text):
    """Returns a line of a log as a dict, None where it is no such line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and type(line.get("step")) is int
    return line if is_line else None


LOSSES = ("loss", "val_loss")
PANELS = (("loss, nats a token", LOSSES),)
NAMES = {"loss": "training", "val_loss": "validation"}


def plot(out_dir, panels=PANELS):
    """Draws log.jsonl as loss.png, a panel for each (label, keys of the log). Returns a line to print."""
    try:
        # pyplot would look for a screen, and takes as long to import as the drawing
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss plot: pip install matplotlib"
    lines = read_log(os.path.join(out_dir, "log.jsonl"))
    fig = Figure(figsize=(7 * len(panels), 4))
    fig.subplots_adjust(left=0.1 / len(panels), right=0.98, bottom=0.12, top=0.92)
    for ax, (label, keys) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for key in keys:
            style = {"alpha": 0.7} if key == "loss" else {"marker": "o", "ms": 3}
            draw_curve(ax, lines, key, label=NAMES.get(key, key), lw=1, **style)
        ax.set(xlabel="step", ylabel=label)
        ax.set_title(out_dir, parse_math=False)  # a name may have a $ in it
        if keys == LOSSES:
            ax.set_yscale("log", subs=(1.5, 2, 3, 4, 5, 7))  # 8 and 9 would lie over 10
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.grid(alpha=0.3)
        ax.legend()
    path = os.path.join(out_dir, "loss.png")
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=120))
    return f"loss plot: {path}"


def draw_curve(ax, lines, key, **style):
    points = [(line["step"], line[key]) for line in lines if type(line.get(key)) in (int, float)]
    ax.plot([step for step, _ in points], [value for _, value in points], **style)
