"""Trains variants of a model under one budget, and says by how much they differ and whether that is more than chance.

    python compare.py configs/compare_cpu.toml      what a file names; goes on where it was stopped
    python compare.py --variants="llama: configs/llama.toml; gpt: configs/gpt.toml" --budget=300

A variant is a name and a line of overrides, as train.py takes them; keys of train.py that are given outside
the variants hold for all of them. Each (variant, seed) is trained by train.py's loop and judged on
the whole validation split, story by story. out_dir gets results.jsonl, table.md and curves.png, and the
runs themselves, which sample.py and eval.py read. Another process that runs the same command, here or on
another device, takes its share of the runs.
"""

import contextlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from config import COMMAND_LINE, Refusal, check_choice, check_range, configure, convert, nearest, run

# isort: split
import torch

import folders
import measure
import train
from compare_job import Job, finish, train_config
from compare_report import CLOSE, draw, table
from data import tokens_a_step
from device import resolve, torchrun_ranks
from memory import check_training_memory
from model import model_config
from runs import check_data, check_start, open_data
from sizes import model_sizes

BUDGETS = ("steps", "tokens", "seconds")
TRAIN_TYPES = {field.name: field.type for field in fields(train.Config)}
# keys that this script decides for each run. In a file they are ignored, as max_iters of configs/tiny.toml
DECIDED = {
    "seed": "--seeds names them",
    "max_iters": "--budget says how long a run is",
    "lr_decay_iters": "a schedule ends with its run",
    "init_from": "a comparison starts from scratch",
    "eval_only": "a comparison trains",
    "overwrite": "it is of the whole comparison",
    "out_dir": "it is of the whole comparison",
    "device": "it is of the whole comparison",
}
WHOLE = ("out_dir", "overwrite", "device")  # those of them that may be set for the whole comparison
# keys that do not change how long a step takes
RATES = (
    "learning_rate embd_lr_scale min_lr warmup_iters schedule decay_frac weight_decay "
    "beta1 beta2 momentum grad_clip balance"
).split()
KINDS = ("timings", "trials", "runs")  # of jobs; their folders have these names
TIMING_STEPS = 50
# a change to these changes results, and no setting tells
CODE = ("model.py", "masks.py", "experts.py", "optim.py", "train.py")


@dataclass
class Config(train.Config):
    # fmt: off
    variants: str = ""              # NAME: overrides, on a line or before a ; each; all are compared with the first
    by: str = "steps"               # what runs have the same of: steps | tokens | seconds (by a speed measured first)
    budget: float = 500.0           # how many of them; the schedule of rates ends there
    seeds: str = "1337,1338,1339"   # each variant is trained with each
    sweep: str = ""                 # KEY:VALUE,VALUE and more: each variant tries all combinations, takes the best
    sweep_budget: float = 0.25      # what of the budget a trial of the sweep gets
    match: bool = True              # solve for n_inner, so that each variant has the first one's parameters within 1%
    devices: str = ""               # as cuda:0,cuda:1 or cpu,cpu: a process on each, they share the runs; "": one
    out_dir: str = "out/comparison" # where all of it goes
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "by", BUDGETS)
        if self.budget <= 0 or self.by != "seconds" and self.budget < 1:
            raise ValueError(f"a budget of {self.budget:g} {self.by} trains nothing")
        if self.budget >= 2**53:  # where a float no longer counts each step
            raise ValueError(f"budget must be below 9e15 {self.by}, not {self.budget:g}")
        check_range(self, "above 0 and at most 1", "sweep_budget")


# -----------------------------------------------------------------------------------------------------
# What is compared


def read_variants(text):
    """Returns {name: its overrides, a list as of a command line}. Raises Refusal."""
    variants = {}
    for line in text.replace(";", "\n").splitlines():
        if not line.strip():
            continue
        name, colon, overrides = line.partition(":")
        name = name.strip()
        if not colon or not name or not all(c.isalnum() or c in "-_+." for c in name):
            raise Refusal(
                f"variants: {line.strip()!r:.60} is no NAME: overrides; a name has letters, digits and -_+."
            )
        if name in variants:
            raise Refusal(f"variants: two are called {name}")
        try:
            variants[name] = shlex.split(overrides)
        except ValueError as e:
            raise Refusal(f"variants: {name}: {e}")
    if not variants:
        raise Refusal(
            'there is nothing to compare: --variants="llama: configs/llama.toml; gpt: configs/gpt.toml"'
        )
    return variants


def read_seeds(text):
    """Returns the seeds in "1,2,3". Raises Refusal."""
    seeds = [convert(word, int, "seeds", parse=True) for word in text.split(",")]
    for seed in seeds:
        if seed < 0:
            raise Refusal(f"seeds: {seed} cannot be negative")
        if seeds.count(seed) > 1:
            raise Refusal(f"seeds: {seed} is given twice")
    return seeds


def read_sweep(text):
    """Returns the combinations of a sweep as dicts, [] without one. Raises Refusal.

    text: "learning_rate:1e-3,2e-3 warmup_iters:20,60".
    """
    values = {}
    for word in text.replace(";", " ").split():
        key, _, listed = word.partition(":")
        if key in DECIDED or key == "dataset":
            raise Refusal(f"sweep: {key} is the same for all trials")
        if key not in TRAIN_TYPES:
            raise Refusal(
                f"sweep: there is no key {key!r} to try values of; {nearest(key, TRAIN_TYPES)}"
            )
        if key in values:
            raise Refusal(f"sweep: {key} is given twice")
        words = listed.split(",")
        values[key] = [convert(word, TRAIN_TYPES[key], f"sweep: {key}", parse=True) for word in words]
        if len(set(values[key])) < len(words):
            raise Refusal(f"sweep: a value of {key} is given twice")
    combinations = itertools.product(*values.values()) if values else []
    return [dict(zip(values, combination)) for combination in combinations]


def variant_config(cfg, overrides):
    """Returns the train.Config of a variant, cfg's keys with its overrides over them, and {key: what set it} of the
    overrides. Raises Refusal.
    """
    shared = {
        key: value for key, value in cfg.values.items() if key in TRAIN_TYPES and key not in DECIDED
    }
    variant = configure(train.Config, overrides, defaults=shared | {"device": cfg.device})
    refuse_decided(variant.given)
    values = {key: value for key, value in variant.values.items() if key not in DECIDED}
    return train_config(values | {"device": cfg.device}), variant.given


def refuse_decided(given, allowed=()):
    """Raises Refusal where the command line sets what this script decides."""
    for key, reason in DECIDED.items():
        if given.get(key) == COMMAND_LINE and key not in allowed:
            raise Refusal(f"{key} is not to be set here: {reason}")


def matched(variant, parameters):
    """Returns a variant with the n_inner that brings its parameters nearest to so many, but with a multiple of 8,
    which is fast, where that is near enough.
    """

    def count(n_inner):
        return model_sizes(replace(model_config(variant), n_inner=n_inner)).parameters

    def distance(n_inner):
        return abs(count(n_inner) - parameters)

    slope = count(2) - count(1)
    if not slope:  # an MLP that does not look at n_inner
        return variant
    exact = max(1, round((parameters - count(1)) / slope) + 1)
    near = [variant.n_inner, max(8, 8 * round(exact / 8))]
    near = [n_inner for n_inner in near if distance(n_inner) <= CLOSE / 2 * parameters]
    n_inner = near[0] if near else min(exact, variant.n_inner, key=distance)
    return train_config(variant.values | {"n_inner": n_inner})


# -----------------------------------------------------------------------------------------------------
# All runs


class Comparison:
    """What is compared, and the jobs of that. All that can be wrong is checked at the start. Raises Refusal."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.seeds = read_seeds(cfg.seeds)
        self.sweep = read_sweep(cfg.sweep)
        self.variants = {}  # name: train.Config
        text_bytes = {}
        swept = self.sweep[0] if self.sweep else {}
        others = [key for key in swept if key not in RATES]
        if cfg.by == "seconds" and others:
            raise Refusal(
                f"by=seconds measures a variant's speed once, which {others[0]} may change: sweep rates"
            )
        for name, overrides in read_variants(cfg.variants).items():
            variant, meta = self.check(name, overrides)
            self.variants[name] = variant
            text_bytes[meta["splits"]["val"]["bytes"]] = name
        if len(text_bytes) > 1:
            names = " and ".join(text_bytes.values())
            raise Refusal(f"{names} are judged on texts of different length, which cannot be compared")

    def check(self, name, overrides):
        """Returns the train.Config of a variant that can be trained, with its n_inner, and its data's meta."""
        first = next(iter(self.variants.values()), None)
        try:
            variant, given = variant_config(self.cfg, overrides)
            if not first:  # this is the first variant, whose width decides what dtype=auto means for all
                compute = resolve(self.cfg.device, variant.dtype, train_width=variant.n_embd)
                self.dtype = compute.dtype_name
            if "dtype" not in given:
                variant = train_config(variant.values | {"dtype": self.dtype})
            compute = resolve(self.cfg.device, variant.dtype, variant.compile)
            folder, meta, data, tokenizer = open_data(variant, compute)
            variant = train_config(variant.values | {"vocab_size": tokenizer.vocab_size})
            if first and self.cfg.match and "n_inner" not in given:
                variant = matched(variant, model_sizes(first).parameters)
            for values in self.sweep or [{}]:
                trial = train_config(variant.values | values)
                compute = resolve(self.cfg.device, trial.dtype, trial.compile)
                check_data(trial, folder, data, tokenizer)
                check_start(tokenizer, trial)
                check_training_memory(trial, compute)
        except (Refusal, ValueError) as e:
            raise Refusal(f"variant {name}: {e}")
        return variant, meta

    def job(self, kind, name, seed, steps, values, label="", **more):
        folder = os.path.join(self.cfg.out_dir, kind, f"{name}-{label or seed}")
        decided = {"seed": seed, "max_iters": steps, "out_dir": folder}
        return Job(
            kind, name, train_config(self.variants[name].values | values | decided | more), values
        )

    def timings(self):
        """Returns the jobs that measure each variant's speed, there and back; [] unless by is seconds."""
        if self.cfg.by != "seconds":
            return []
        return [
            self.job("timings", name, number, TIMING_STEPS, {}, eval_tokens=1, log_interval=10)
            for number, name in there_and_back([0, 1], list(self.variants))
        ]

    def steps(self, name, values, share=1.0):
        """Returns how many steps a variant's run has, or one with a share of the budget."""
        amount = share * self.cfg.budget
        if self.cfg.by == "seconds":
            timings = [job.read() for job in self.timings() if job.variant == name]
            if any("tokens_per_s" not in timing for timing in timings):
                raise Refusal(
                    f"{name} diverged while its speed was measured: a lower learning_rate", status=1
                )
            amount *= statistics.mean(timing["tokens_per_s"] for timing in timings)
        if self.cfg.by != "steps":
            amount /= tokens_a_step(train_config(self.variants[name].values | values))
        return max(1, round(amount))

    def trial(self, name, values):
        label = ",".join(f"{key}={value}" for key, value in values.items())
        steps = self.steps(name, values, self.cfg.sweep_budget)
        return self.job("trials", name, self.seeds[0], steps, values, label)

    def trials(self):
        """Returns the jobs of the sweep; those of all variants with the same values follow each other."""
        return [
            self.trial(name, values) for values, name in there_and_back(self.sweep, list(self.variants))
        ]

    def best_values(self, name):
        """Returns the values of a variant's best trial in the sweep, {} without one. Raises Refusal."""
        if not self.sweep:
            return {}
        results = [(self.trial(name, values).read()["bits_per_byte"], values) for values in self.sweep]
        results = [(loss, values) for loss, values in results if loss is not None]
        if not results:
            raise Refusal(f"every trial of {name} diverged: try a lower learning_rate", status=1)
        _, best = min(results, key=lambda result: result[0])
        return best

    def runs(self):
        """Returns the jobs whose results count; those of all variants with a seed follow each other, there and back."""
        best = {name: self.best_values(name) for name in self.variants}
        return [
            self.job("runs", name, seed, self.steps(name, best[name]), best[name])
            for seed, name in there_and_back(self.seeds, list(self.variants))
        ]

    def finished(self):
        """Returns those of runs() that have a result."""
        return [job for job in self.runs() if job.read() is not None]


def there_and_back(rounds, names):
    """Yields (round, name) for all names of each round, in every other round from the last name to the first, so that
    where a machine slows down or warms up no name always comes later.
    """
    for i, item in enumerate(rounds):
        for name in names[::-1] if i % 2 else names:
            yield item, name


def make_room(cfg):
    """Moves out_dir aside with --overwrite. Raises Refusal for an out_dir that holds something else than a comparison
    without it.
    """
    is_comparison = any(os.path.isdir(os.path.join(cfg.out_dir, kind)) for kind in KINDS)
    if is_comparison and not cfg.overwrite:
        return
    ways = "--overwrite moves it aside, --out_dir=OTHER writes elsewhere"
    if folders.in_the_way(cfg.out_dir, cfg.overwrite, ways):
        folders.move_aside(cfg.out_dir)


def warn_of_changes(out_dir):
    """Prints how many results are of runs from before the code was changed, if there are any."""
    changed = max(os.path.getmtime(Path(__file__).with_name(name)) for name in CODE)
    results = list(Path(out_dir).glob("*/*.json"))
    if n := sum(os.path.getmtime(path) < changed for path in results):
        print(
            f"{n} of {len(results)} runs in {out_dir} are older than the last change of {', '.join(CODE)}: "
            "--overwrite makes all of them anew",
            file=sys.stderr,
        )


def publish(comparison):
    """Writes results.jsonl and table.md for the runs that are done. Returns the table."""
    results = {}
    for job in comparison.finished():
        results.setdefault(job.variant, []).append(job.read())
    results = {name: results[name] for name in comparison.variants if name in results}
    text = table(comparison, results)
    rows = [row for name in results for row in sorted(results[name], key=lambda row: row["seed"])]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    out_dir = comparison.cfg.out_dir
    folders.write_atomic(f"{out_dir}/results.jsonl", lambda f: f.write(lines.encode()))
    folders.write_atomic(f"{out_dir}/table.md", lambda f: f.write(f"{text}\n".encode()))
    return text


# -----------------------------------------------------------------------------------------------------
# From the command line


@contextlib.contextmanager
def helpers(devices):
    """The context in which this command also runs on each of the devices; it ends when these processes have ended."""
    processes = []
    if devices:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for device in devices:
            command = [sys.executable, *sys.argv, "--devices=", f"--device={device}", "--no-overwrite"]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        statuses = [process.wait() for process in processes]
        for device, status in zip(devices, statuses):
            if status:
                print(f"the process on {device} ended with status {status}", file=sys.stderr)


def check_devices(cfg):
    """Returns the devices that share the runs. Raises Refusal."""
    names = [name.strip() for name in cfg.devices.split(",") if name.strip()]
    if torchrun_ranks()[1] > 1:
        raise Refusal(
            "compare.py shares runs, not their rows: --devices=cuda:0,cuda:1 instead of torchrun"
        )
    devices = [resolve(name).device for name in names]
    places = {(device.type, device.index or 0) for device in devices}
    kinds = {measure.device_name(device) for device in devices}
    if cfg.by == "seconds" and (len(places) < len(devices) or len(kinds) > 1):
        raise Refusal("by=seconds needs devices of one kind, and each once")
    return names or [cfg.device]


def main(cfg):
    refuse_decided(cfg.given, WHOLE)
    cfg.device, *others = check_devices(cfg)
    if others and cfg.device == "cpu":
        threads = max(1, torch.get_num_threads() // (1 + others.count("cpu")))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the others' too
    comparison = Comparison(cfg)
    make_room(cfg)
    warn_of_changes(cfg.out_dir)
    if others:
        print(f"{1 + len(others)} processes share the runs")
    for name, variant in comparison.variants.items():
        print(f"{name}: {model_sizes(variant).parameters:,} parameters")
    with helpers(others):
        finish(comparison.timings())
        finish(comparison.trials())
        finish(comparison.runs(), lambda: publish(comparison))
    print(publish(comparison))
    with contextlib.suppress(ImportError):  # no matplotlib: train.py does without, too
        draw(comparison, f"{cfg.out_dir}/curves.png")


if __name__ == "__main__":
    run(main, Config)
