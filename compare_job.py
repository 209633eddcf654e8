"""A job of compare.py: one training run, which is judged, and its result in a file.

job = Job("runs", "llama", train_config(values), {})
finish([job])     # does those that have no result yet
job.read()        # {"bits_per_byte": ..., "tokens_per_s": ..., ...}
"""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import folders
import measure
import train
from config import Refusal
from data import tokens_a_step
from device import resolve
from lenses.likelihood import split_documents, text_nats, units
from lenses.stats import bits_per_byte
from log import read_log
from sizes import model_sizes

PLACE = ("out_dir", "init_from", "device", "overwrite")  # keys that do not change what a run computes


def train_config(values):
    """Returns a train.Config of these keys. Raises ValueError."""
    new = train.Config(**values)
    new.given = dict.fromkeys(values, "compare.py")
    new.values = values
    return new


@dataclass
class Job:
    """One training run. FOLDER.json has its settings and result, FOLDER what train.py writes."""

    kind: str  # timings | trials | runs
    variant: str
    cfg: train.Config
    values: dict  # of the sweep

    @property
    def folder(self):
        return Path(self.cfg.out_dir)

    @property
    def path(self):
        return self.folder.with_name(f"{self.folder.name}.json")

    def settings(self):
        return {key: value for key, value in asdict(self.cfg).items() if key not in PLACE}

    def read(self):
        """Returns the result, None where there is none yet. Raises Refusal where the file is of another run."""
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            settings, result = saved["settings"], saved["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Refusal(
                f"{self.path} is damaged ({e}); without it and {self.folder} the run starts anew",
                status=1,
            )
        if result is None and not self.is_begun:
            return None
        for key, value in self.settings().items():
            if settings.get(key) != value:
                raise Refusal(
                    f"{self.folder} has {key}={settings.get(key)!r}, not {value!r}: --overwrite moves the whole "
                    "comparison aside, --out_dir=OTHER starts another"
                )
        return result

    @property
    def is_begun(self):
        return folders.holds_run(self.folder, ["ckpt.pt"])

    def write(self, result):
        text = json.dumps({"settings": self.settings(), "result": result}, indent=1)
        folders.write_atomic(str(self.path), lambda f: f.write(text.encode()))

    def run(self, number):
        """Trains, judges and writes the result. Raises folders.InUse where another process is doing this job.

        number: which job it is, as "3 of 12".
        """
        with folders.alone(self.folder):
            if self.read() is not None:  # that process was faster
                return
            print(f"{self.kind[:-1]} {number}: {self.folder.name}", file=sys.stderr)
            self.write(None)
            try:
                task, peak = self.train()
                result = self.figures(task) | {"peak_bytes": peak}
            except train.Diverged as e:
                print(e, file=sys.stderr)
                result = {"bits_per_byte": None}
            self.write({"variant": self.variant, "seed": self.cfg.seed, "values": self.values} | result)
            if self.kind != "runs":
                self.remove_checkpoints()
            has_compiled = "torch._dynamo" in sys.modules
            if has_compiled:  # else the next model may be one too many for compiled functions
                torch.compiler.reset()

    def train(self):
        """Trains. Returns the task, and the most bytes that it took, None where that is not known."""
        resumes = self.is_begun
        if not resumes:  # a process was killed before it had saved a step
            self.remove_checkpoints()
        cfg = train_config(self.cfg.values | {"init_from": "resume" if resumes else "scratch"})
        tasks = []
        try:
            with contextlib.redirect_stdout(None):  # all runs would print the same
                device = resolve(cfg.device).device
                peak = measure.peak_memory(device, lambda: tasks.append(train.pretrain(cfg)))
        except Refusal as e:
            if e.status <= 128:
                raise
            raise Refusal("stopped; the same command goes on", status=e.status)
        return tasks.pop(), None if resumes else peak

    def remove_checkpoints(self):
        for name in folders.RUN:
            (self.folder / name).unlink(missing_ok=True)

    def figures(self, task):
        """Returns the result of a task that was trained."""
        cfg, compute = task.cfg, task.compute
        lines = read_log(self.folder / "log.jsonl")
        speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
        if not speeds or "val_bits_per_byte" not in lines[-1]:
            problem = f"{self.folder}/log.jsonl is damaged: it ends before its run"
            raise Refusal(f"{problem}; without {self.folder} the run starts anew", status=1)
        tokens_per_s = statistics.median(speeds[1:] or speeds)  # the first includes what is done once
        tokens = cfg.max_iters * tokens_a_step(cfg)
        result = {
            "parameters": model_sizes(cfg).parameters,
            "steps": cfg.max_iters,
            "tokens": tokens,
            "tokens_per_s": tokens_per_s,
            "seconds": tokens / tokens_per_s,
            "device": measure.device_name(compute.device),
            "dtype": compute.dtype_name,
        }
        if self.kind == "runs":
            result |= judge(task)
        elif self.kind == "trials":
            result["bits_per_byte"] = lines[-1]["val_bits_per_byte"]
        return result


def judge(task):
    """Returns the loss on the text of the whole validation split, each story from its own start: in nats
    a token and bits a byte.
    """
    tokenizer = task.tokenizer
    documents, _ = split_documents(task.data["val"], tokenizer)
    encoded = tokenizer.encode_batch(documents)
    _, nats = text_nats(task.model, tokenizer, encoded, task.compute)
    _, lengths = units(encoded, tokenizer, few=False)
    return {"nats": nats.mean(), "bits_per_byte": bits_per_byte(nats, lengths)}


def finish(jobs, after=lambda: None):
    """Does jobs in their order and calls after() after each. Waits for those that other processes are doing."""
    left = [i for i, job in enumerate(jobs) if job.read() is None]
    while left:
        for i in left:
            with contextlib.suppress(folders.InUse):
                jobs[i].run(f"{i + 1} of {len(jobs)}")
                after()
        left = [i for i in left if jobs[i].read() is None]
        if left:
            time.sleep(1)
