"""log.jsonl, a JSON object a line with the step it is about, and loss.png, which draws it."""
import glob
import json
import os
from dataclasses import asdict

import checkpoint
from config import Refusal


class Log:
    """Writes out_dir/log.jsonl, from the first process alone; lines past the step that a run resumes from are dropped."""

    def __init__(self, cfg, step, compute):
        self.path, self.wandb, self.first = os.path.join(cfg.out_dir, "log.jsonl"), None, compute.first
        if not self.first:
            return
        if cfg.wandb_log:  # first: where it fails, nothing is written yet
            import wandb
            try:
                self.wandb = wandb.init(project="tinylm", name=os.path.basename(cfg.out_dir), config=asdict(cfg), resume="allow")
            except Exception as e:  # nobody is logged in, no network, settings: it has many kinds
                raise Refusal(f"wandb does not start ({(str(e) or type(e).__name__).splitlines()[0]:.200}); WANDB_MODE=offline keeps its log here")
        for left in glob.glob(os.path.join(glob.escape(cfg.out_dir), "*.tmp")):  # by a process that was killed while it wrote
            os.remove(left)
        kept = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= step]
        checkpoint.write_atomic(self.path, lambda f: f.write("".join(kept).encode()))

    def write(self, line):
        if not self.first:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise Refusal(f"cannot write {self.path}: {e.strerror}", status=1)
        if self.wandb:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self):
        if self.wandb:
            self.wandb.finish()


def read_log(path):
    """The lines of a log.jsonl as dicts, without what is no line of ours: a run that was killed may leave half of one."""
    def parsed(line):
        try:
            line = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return line if isinstance(line, dict) and type(line.get("step")) is int else None
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return list(filter(None, map(parsed, f)))
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")


def plot(out_dir):
    """Draws log.jsonl as loss.png. Returns a line to print."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which looks for a screen and takes as long to import as the drawing
    except ImportError:
        return "no loss plot: pip install matplotlib"
    lines = read_log(os.path.join(out_dir, "log.jsonl"))
    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.add_subplot()
    for key, label, style in ("loss", "training", {"alpha": 0.7, "lw": 1}), ("val_loss", "validation", {"marker": "o", "ms": 3}):
        ax.plot([x["step"] for x in lines if key in x], [x[key] for x in lines if key in x], label=label, **style)
    ax.set(xlabel="step", ylabel="loss, nats a token", yscale="log", title=out_dir)
    ax.grid(alpha=0.3)
    ax.legend()
    path = os.path.join(out_dir, "loss.png")
    checkpoint.write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=120))
    return f"loss plot: {path}"
