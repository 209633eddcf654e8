"""Trains variants of a model under one budget, and says what differs and whether that is a difference.

    python compare.py configs/compare_cpu.toml      what a file names; goes on where it was stopped
    python compare.py --variants="llama: configs/llama.toml; gpt: configs/gpt.toml" --budget=300

A variant is a name and a line of overrides, as train.py takes them; all keys of train.py that stand
outside the variants are every variant's. Each (variant, seed) is trained by train.py's loop and judged on
the whole validation split, story by story. out_dir gets results.jsonl, table.md and curves.png, and the
runs themselves, from which sample.py and eval.py read. Another process that runs the same command, here
or on another device, takes its share of the runs.
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from config import Refusal, configure, convert, nearest, run

# isort: split
import numpy as np
import torch

import folders
import measure
import train
from device import resolve, torchrun_ranks
from eval import fit_batch, split_documents, units
from log import read_log
from model import model_config
from score import document_nats
from sizes import model_sizes

BUDGETS = ("steps", "tokens", "seconds")
TRAIN_TYPES = {field.name: field.type for field in fields(train.Config)}
# what this script decides for each run
DECIDED = ("seed", "max_iters", "init_from", "eval_only", "overwrite", "out_dir")
PLACE = ("out_dir", "init_from", "device", "overwrite")  # what is no part of what a run computes
WRITTEN = ("timings", "trials", "runs", "results.jsonl", "table.md", "curves.png")
TIMING_STEPS = 50
CLOSE = 0.01  # how far apart the parameters of matched variants may be, as a share

# Student's t for a 95% interval with 1, 2 ... degrees of freedom; beyond, the last one is a little wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


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
    out_dir: str = "out/compare"    # where all of it goes
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        if self.by not in BUDGETS:
            raise ValueError(f"by must be one of {' | '.join(BUDGETS)}, not {self.by!r}")
        if self.budget <= 0 or self.by != "seconds" and self.budget < 1:
            raise ValueError(f"a budget of {self.budget:g} {self.by} trains nothing")
        if not 0 < self.sweep_budget <= 1:
            raise ValueError(f"sweep_budget must be above 0 and at most 1, not {self.sweep_budget}")


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
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise Refusal(f"seeds must be integers with commas between them, not {text!r:.60}")
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
        if key not in TRAIN_TYPES or key in DECIDED:
            raise Refusal(
                f"sweep: there is no key {key!r} to try values of; {nearest(key, TRAIN_TYPES)}"
            )
        if key in values:
            raise Refusal(f"sweep: {key} is given twice")
        texts = listed.split(",")
        values[key] = [convert(text, TRAIN_TYPES[key], f"sweep: {key}", parse=True) for text in texts]
        if len(set(values[key])) < len(texts):
            raise Refusal(f"sweep: a value of {key} is given twice")
    combinations = itertools.product(*values.values()) if values else []
    return [dict(zip(values, combination)) for combination in combinations]


def settings(cfg, overrides):
    """Returns the train.Config of a variant, of cfg's keys and its overrides over them, and whether those
    set n_inner. Raises Refusal.
    """
    shared = {
        key: value for key, value in cfg.values.items() if key in TRAIN_TYPES and key not in DECIDED
    }
    variant = configure(train.Config, overrides, defaults=shared | {"device": cfg.device})
    decided = [key for key in (*DECIDED, "device") if key in variant.given]
    if decided:
        raise Refusal(f"{decided[0]} is not a variant's to set")
    return with_keys(variant.values), "n_inner" in variant.given


def with_keys(values):
    """Returns a train.Config of these keys. Raises ValueError."""
    new = train.Config(**values)
    new.given = dict.fromkeys(values, "compare.py")
    new.values = values
    return new


def changed(base, values):
    """Returns a train.Config of base's keys and these over them. Raises ValueError."""
    return with_keys(base.values | values)


def matched(base, parameters):
    """Returns base with an n_inner that gives a model so many parameters, or close; base itself where none does."""

    def count(n_inner):
        return model_sizes(replace(model_config(base), n_inner=n_inner)).parameters

    slope = count(2) - count(1)
    exact = max(1, round((parameters - count(1)) / slope) + 1)
    for n_inner in (base.n_inner, max(8, 8 * round(exact / 8)), exact):  # multiples of 8 are fast
        if abs(count(n_inner) - parameters) <= CLOSE / 2 * parameters:
            return changed(base, {"n_inner": n_inner})
    return base


# -----------------------------------------------------------------------------------------------------
# One run


@dataclass
class Job:
    """One training run: a file FOLDER.json of its settings and result, and what train.py writes to FOLDER."""

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
                f"{self.path} is damaged ({e}); without it and {self.folder} the run starts anew"
            )
        for key, value in self.settings().items():
            if settings.get(key) != value:
                raise Refusal(
                    f"{self.folder} has {key}={settings.get(key)!r}, not {value!r}: --overwrite moves the whole "
                    "comparison aside, --out_dir=OTHER starts another"
                )
        return result

    def write(self, result):
        text = json.dumps({"settings": self.settings(), "result": result}, indent=1)
        folders.write_atomic(str(self.path), lambda f: f.write(text.encode()))

    def do(self, number):
        """Trains, judges and writes the result. Raises folders.InUse where another process is at it.

        number: a text, which job it is.
        """
        with folders.alone(self.folder):
            if self.read() is not None:  # that process was faster
                return
            print(f"{self.kind[:-1]} {number}: {self.folder.name}", file=sys.stderr)
            self.write(None)
            resume = folders.holds_run(self.folder, ["ckpt.pt"])
            cfg = changed(self.cfg, {"init_from": "resume" if resume else "scratch"})
            tasks = []
            try:
                with contextlib.redirect_stdout(None):  # each would say the same
                    device = resolve(cfg.device, cfg.dtype, cfg.compile).device
                    peak = measure.peak_memory(device, lambda: tasks.append(train.pretrain(cfg)))
            except train.Diverged as e:
                print(e, file=sys.stderr)
                self.write(self.head() | {"bits_per_byte": None})
                return
            except Refusal as e:
                if e.status <= 128:
                    raise
                raise Refusal("stopped; the same command goes on", status=e.status)
            self.write(self.figures(tasks.pop()) | {"peak_bytes": peak})
            if self.kind != "runs":
                for name in folders.RUN:
                    (self.folder / name).unlink(missing_ok=True)
            if (
                "torch._dynamo" in sys.modules
            ):  # else the next model is one too many for what was compiled
                torch.compiler.reset()

    def head(self):
        """Returns what a result begins with."""
        return {"variant": self.variant, "seed": self.cfg.seed, "values": self.values}

    def figures(self, task):
        """Returns the result of a task that was trained."""
        cfg, compute = task.cfg, task.compute
        lines = read_log(self.folder / "log.jsonl")
        speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
        tokens_per_s = statistics.median(speeds[1:] or speeds)  # the first has what is done once
        tokens = cfg.max_iters * tokens_a_step(cfg)
        result = self.head() | {
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


def tokens_a_step(cfg):
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def judge(task):
    """Returns the loss on the text of the whole validation split, each story from its own start: in nats
    a token and bits a byte.
    """
    tokenizer = task.tokenizer
    documents, _ = split_documents(task.data["val"], tokenizer)
    encoded = tokenizer.encode_batch(documents)
    losses = document_nats(task.model, encoded, tokenizer, task.compute, fit_batch(task.model))
    nats = np.concatenate([document[:-1] for document in losses])  # without its end, which is no text
    _, lengths = units(encoded, tokenizer, few=False)
    return {"nats": nats.mean(), "bits_per_byte": nats.sum() / lengths.sum() / math.log(2)}


# -----------------------------------------------------------------------------------------------------
# All runs


class Comparison:
    """What is compared, and the jobs of it: everything that can be wrong is checked first. Raises Refusal."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.seeds = read_seeds(cfg.seeds)
        self.sweep = read_sweep(cfg.sweep)
        self.variants = {}  # name: train.Config
        text_bytes = {}
        compute = resolve(cfg.device, cfg.dtype, cfg.compile)
        for name, overrides in read_variants(cfg.variants).items():
            variant, meta = self.check(name, overrides, compute)
            self.variants[name] = variant
            text_bytes[meta["splits"]["val"]["bytes"]] = name
        if len(text_bytes) > 1:
            names = " and ".join(text_bytes.values())
            raise Refusal(f"{names} are judged on texts of different length, which cannot be compared")

    def check(self, name, overrides, compute):
        """Returns the train.Config of a variant that can be trained, its n_inner solved for, and its data's meta."""
        try:
            variant, has_width = settings(self.cfg, overrides)
            _, meta, _, tokenizer = train.open_data(variant, compute)
            train.check_start(tokenizer, variant)
            variant.vocab_size = tokenizer.vocab_size
            first = next(iter(self.variants.values()), None)
            if first and self.cfg.match and not has_width:
                variant = matched(variant, model_sizes(first).parameters)
                variant.vocab_size = tokenizer.vocab_size
            train.check_training_memory(variant, compute)
            for values in self.sweep or [{}]:
                train.rows_each(changed(variant, values), compute)
        except (Refusal, ValueError) as e:
            raise Refusal(f"variant {name}: {e}")
        return variant, meta

    def job(self, kind, name, seed, steps, values, label="", **more):
        folder = os.path.join(self.cfg.out_dir, kind, f"{name}-{label or seed}")
        decided = {"seed": seed, "max_iters": steps, "out_dir": folder}
        return Job(kind, name, changed(self.variants[name], values | decided | more), values)

    def timings(self):
        """Returns the jobs that measure each variant's speed, there and back; none where it decides nothing."""
        if self.cfg.by != "seconds":
            return []
        names = [(0, name) for name in self.variants] + [(1, name) for name in reversed(self.variants)]
        return [self.job("timings", name, seed, TIMING_STEPS, {}, eval_tokens=1) for seed, name in names]

    def steps(self, name, values, share=1.0):
        """Returns the steps of a variant's run, or of one with that share of the budget."""
        amount = share * self.cfg.budget
        if self.cfg.by == "seconds":
            speeds = [job.read()["tokens_per_s"] for job in self.timings() if job.variant == name]
            amount *= statistics.mean(speeds)
        if self.cfg.by != "steps":
            amount /= tokens_a_step(changed(self.variants[name], values))
        return max(1, round(amount))

    def trials(self):
        """Returns the jobs of the sweep: all variants with the same values stand together."""
        jobs = []
        for values, names in there_and_back(self.sweep, list(self.variants)):
            label = ",".join(f"{key}={value}" for key, value in values.items())
            for name in names:
                steps = self.steps(name, values, self.cfg.sweep_budget)
                jobs.append(self.job("trials", name, self.seeds[0], steps, values, label))
        return jobs

    def taken(self, name):
        """Returns what a variant takes of the sweep: the values of its best trial. Raises Refusal."""
        trials = [job for job in self.trials() if job.variant == name]
        if not trials:
            return {}
        best = min(trials, key=lambda job: job.read()["bits_per_byte"] or math.inf)
        if best.read()["bits_per_byte"] is None:
            raise Refusal(f"every trial of {name} diverged: try a lower learning_rate", status=1)
        return best.values

    def runs(self):
        """Returns the jobs that count: all variants with the same seed stand together, there and back."""
        taken = {name: self.taken(name) for name in self.variants}
        return [
            self.job("runs", name, seed, self.steps(name, taken[name]), taken[name])
            for seed, names in there_and_back(self.seeds, list(self.variants))
            for name in names
        ]

    def done(self):
        """Returns those of runs() that have a result."""
        return [job for job in self.runs() if job.read() is not None]


def there_and_back(rounds, names):
    """Yields (round, names), every other time from the last name to the first: where a machine slows down
    or warms up, no name is always the later one.
    """
    for i, item in enumerate(rounds):
        yield item, names[::-1] if i % 2 else names


def finish(jobs, after=lambda: None):
    """Does jobs in their order, calling after() each time; those that other processes do are waited for."""
    left = [i for i, job in enumerate(jobs) if job.read() is None]
    while left:
        for i in left:
            with contextlib.suppress(folders.InUse):
                jobs[i].do(f"{i + 1} of {len(jobs)}")
                after()
        left = [i for i in left if jobs[i].read() is None]
        if left:
            time.sleep(1)


# -----------------------------------------------------------------------------------------------------
# What it says


def paired(results, others):
    """Returns the difference of two variants in bits a byte, mean over the seeds that both have, half its
    95% interval (Student's t), and the number of those seeds; None for what too few of them leave open.

    results, others: {seed: bits a byte}, None where the run diverged.
    """
    seeds = [seed for seed in results if results[seed] is not None and others.get(seed) is not None]
    n = len(seeds)
    differences = [results[seed] - others[seed] for seed in seeds]
    if n < 2:
        return *(differences or [None]), None, n
    error = statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), T95[min(n - 1, len(T95)) - 1] * error, n


def verdict(results, others):
    """Returns what paired() allows one to say, in words."""
    mean, half, n = paired(results, others)
    if n == 0:
        return "no seed of which both runs ended"
    if n == 1:
        return f"{mean:+.4f} bits a byte, and one seed does not show what it would be with another"
    if abs(mean) <= half:
        return f"no difference that {n} seeds can show ({mean:+.4f} +- {half:.4f} bits a byte)"
    word = "better" if mean < 0 else "worse"
    return f"{word} by {abs(mean):.4f} +- {half:.4f} bits a byte ({n} seeds)"


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
            bits = [row["bits_per_byte"] for row in rows]
            peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
            line |= {
                "bits a byte": f"{statistics.mean(bits):.4f}",
                "spread": f"{statistics.stdev(bits):.4f}" if len(bits) > 1 else "",
                f"to {first}": difference(losses[name], losses[first]) if i else "",
                "to the line above": difference(losses[name], losses[names[i - 1]]) if i else "",
                "nats a token": f"{statistics.mean(row['nats'] for row in rows):.4f}",
                "parameters": f"{rows[0]['parameters']:,}",
                "steps": f"{rows[0]['steps']:,}",
                "tokens": f"{rows[0]['tokens']:,}",
                "tokens/s": f"{statistics.median(row['tokens_per_s'] for row in rows):,.0f}",
                "peak MB": f"{statistics.median(peaks) / 1e6:,.0f}" if peaks else "",
            }
        line["seeds"] = (
            f"{len(rows)} of {len(results[name])}" if len(rows) < len(results[name]) else f"{len(rows)}"
        )
        lines.append(line)
    keys = list(max(lines, key=len))
    cells = [keys, ["---"] * len(keys), *([line.get(key, "diverged") for key in keys] for line in lines)]
    text = [f"| {' | '.join(row)} |" for row in cells]
    verdicts = [
        f"- {name} against {first}: {verdict(losses[name], losses[first])}" for name in names[1:]
    ]
    return "\n".join([*text, "", *verdicts, "", *notes(comparison, results)])


def taken_cell(key, value, sweep):
    """Returns a value that was taken, with a * where it is the lowest or highest of more than two."""
    tried = sorted({values[key] for values in sweep})
    return f"{value:g}" + ("*" if len(tried) > 2 and value in (tried[0], tried[-1]) else "")


def notes(comparison, results):
    """Yields what one has to know to read the table."""
    cfg = comparison.cfg
    rows = [row for rows in results.values() for row in rows if row["bits_per_byte"] is not None]
    yield (
        f"Equal: {cfg.by}, {cfg.budget:,.0f} a run. The loss is of the whole validation split, story by story; "
        "the spread is the standard deviation over seeds, and +- half the 95% interval of the paired difference."
    )
    if comparison.sweep:
        yield (
            f"Each variant tried the same {len(comparison.sweep)} settings on {cfg.sweep_budget:.0%} of the "
            f"budget, with seed {comparison.seeds[0]}, and was trained with the best; * is an end of what was tried."
        )
    for name, variant_rows in results.items():
        for row in variant_rows[:1]:
            share = row.get("parameters", 0) / rows[0]["parameters"] - 1 if rows else 0
            if row["bits_per_byte"] is not None and abs(share) > CLOSE:
                yield f"{name} has {share:+.1%} parameters beside {rows[0]['variant']}."
    for device, dtype in sorted({(row["device"], row["dtype"]) for row in rows}):
        yield f"Trained on {device}, in {dtype}."


def curve(folder, tokens, tokens_per_s):
    """Returns (steps, seconds, bits a byte) of the evaluations in a run's log; tokens: of a step."""
    lines = [line for line in read_log(folder / "log.jsonl") if "val_bits_per_byte" in line]
    steps = np.array([line["step"] for line in lines])
    return steps, steps * tokens / tokens_per_s, np.array([line["val_bits_per_byte"] for line in lines])


def draw(comparison, path):
    """Draws the loss of each variant by steps and by seconds of training, the spread over seeds shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for name in comparison.variants:
        curves = []
        for job in comparison.done():
            result = job.read()
            if job.variant == name and result["bits_per_byte"] is not None:
                curves.append(curve(job.folder, tokens_a_step(job.cfg), result["tokens_per_s"]))
        if not curves:
            continue
        steps = curves[0][0]
        seconds = np.mean([curve[1] for curve in curves], 0)
        bits = np.array([curve[2] for curve in curves])
        for ax, x in ((by_step, steps), (by_second, seconds)):
            [line] = ax.plot(x[1:], bits.mean(0)[1:], marker="o", ms=2, lw=1, label=name)
            ax.fill_between(
                x[1:], bits.min(0)[1:], bits.max(0)[1:], color=line.get_color(), alpha=0.2, lw=0
            )
    by_step.set(xlabel="step", ylabel="validation loss, bits a byte", title=comparison.cfg.out_dir)
    by_second.set(xlabel="seconds of training")
    for ax in (by_step, by_second):
        ax.grid(alpha=0.3)
    by_step.legend()
    folders.write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=120))


def publish(comparison):
    """Writes results.jsonl and table.md of the runs that are done. Returns the table."""
    results = {}
    for job in comparison.done():
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
    """Runs this command once more on each of the devices, as long as the block goes on and until they end."""
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
        for process in processes:
            process.wait()


def check_devices(cfg):
    """Returns the devices that share the runs. Raises Refusal."""
    devices = [device.strip() for device in cfg.devices.split(",") if device.strip()]
    if torchrun_ranks()[1] > 1:
        raise Refusal(
            "compare.py shares runs, not their rows: --devices=cuda:0,cuda:1 instead of torchrun"
        )
    if cfg.by == "seconds" and len(set(devices)) < len(devices):
        raise Refusal("runs that share a device take longer: by=seconds needs each device once")
    for device in devices:
        resolve(device)
    return devices or [cfg.device]


def main(cfg):
    decided = [key for key in DECIDED if key in cfg.given and key not in ("out_dir", "overwrite")]
    if decided:
        ways = {"seed": "--seeds names them", "max_iters": "--budget says how long a run is"}
        raise Refusal(
            f"{decided[0]} is not to be set here: {ways.get(decided[0], 'a comparison starts from scratch')}"
        )
    cfg.device, *others = check_devices(cfg)
    if others and cfg.device == "cpu":
        threads = max(1, torch.get_num_threads() // (1 + others.count("cpu")))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the others' too
    comparison = Comparison(cfg)
    if os.path.isdir(cfg.out_dir) and set(os.listdir(cfg.out_dir)) - set(WRITTEN) or cfg.overwrite:
        ways = "--overwrite moves it aside, --out_dir=OTHER writes elsewhere"
        if folders.in_the_way(cfg.out_dir, cfg.overwrite, ways):
            folders.move_aside(cfg.out_dir)
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
