"""Kills and damage, by the hundred: nothing that was saved is lost, and no file gets a traceback for an answer.

    make torture                                            1,000 kills, 500 damaged files, about half an hour
    python tests/torture.py --kills=30 --files=20 --seed=2  a taste of it

Three scripts are killed side by side (SIGKILL), each at random moments, again and again. After each kill
all that is on disk must open, and no older than before; then the script goes on, until it is done. What
it wrote by then must equal what an undisturbed run wrote, to the bit. The damaged files are cut, changed
or filled with junk at random, and given to the command that reads them, which works or ends with one
line. Exits with 1 if anything was lost, hung or answered with a traceback; the files stay where it says.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401  (paths, the network off, one thread)
from children import fork, start
from pyarrow import Table
from pyarrow.parquet import write_table
from test_fuzz import JUNK, make_files
from test_prepare import DOCS, write_rows
from test_train import same
from tqdm import tqdm

import checkpoint_file
import dataset
import prepare
from config import Refusal, configure
from folders import RUN, holds_run
from log import read_log

MODEL = "--n_layer=2 --n_embd=32 --n_head=2 --block_size=32 --dropout=0.1".split()
STEPS = "--batch_size=4 --max_iters=30 --eval_interval=2 --log_interval=3 --eval_tokens=64".split()
CPU = "--device=cpu --dtype=float32".split()
TIMEOUT = 120  # seconds: many times what any of these commands takes

# a child runs this file's imports anew, unless the process that it is forked from has them
fork.set_forkserver_preload(["torture"])


@dataclass
class Config:
    # fmt: off
    kills: int = 1000   # of train.py, finetune_lora.py and prepare.py together
    files: int = 500    # damaged ones
    seed: int = 1       # of the moments and the damage
    # fmt: on


def live(folder, script, argv, seconds=TIMEOUT):
    """Runs a script, and kills it after so many seconds. Returns (exit status, what it printed).

    The status is None where another thread took it away: Process.start() asks for that of all children.
    """
    process = start(folder, script, *argv)
    process.join(seconds)
    was_alive = process.is_alive()
    if was_alive:
        process.kill()
        process.join()
    status = process.exitcode
    if status == 255:  # multiprocessing's word for a status that it did not get
        status = -signal.SIGKILL if was_alive else None
    text = ""
    for kind in "out", "err":
        path = Path(folder, f"{kind}.{process.pid}")
        if path.exists():  # not yet, where it was killed at once
            text += path.read_text(errors="replace")
            path.unlink()
    return status, text


# -----------------------------------------------------------------------------------------------------
# Kills


class Training:
    """train.py or finetune_lora.py: their checkpoints open, never go back, and go on to the bit."""

    def __init__(self, folder, script, argv, last):
        self.folder = folder
        self.script = script
        self.argv = [*argv, *STEPS, *CPU]
        self.last = last  # the file that a run goes on from
        self.step = -1

    def first(self, name):
        self.step = -1
        return [*self.argv, f"--out_dir={name}"]

    def again(self, name):
        if (self.folder / name / self.last).exists():
            return [f"--out_dir={name}", "--init_from=resume"]
        overwrite = ["--overwrite"] if holds_run(self.folder / name) else []
        return [*self.argv, f"--out_dir={name}", *overwrite]

    def state(self, name, file):
        keys = checkpoint_file.ADAPTER_KEYS if file.startswith("adapter") else checkpoint_file.KEYS
        return checkpoint_file.load(str(self.folder / name / file), keys)

    def check(self, name):
        """Returns what was lost by a kill."""
        lost = []
        for file in RUN:
            if (self.folder / name / file).exists():
                try:
                    state = self.state(name, file)
                except Refusal as e:
                    lost.append(f"{name}/{file} is damaged: {e}")
                    continue
                if file == self.last and state["step"] < self.step:
                    lost.append(f"{name}/{file} went back from step {self.step} to {state['step']}")
                if file == self.last:
                    self.step = state["step"]
        if self.step >= 0 and not (self.folder / name / self.last).exists():
            lost.append(f"{name}/{self.last} is gone")
        return lost

    def compare(self, name):
        """Returns what differs from the undisturbed run."""
        differences = []
        for file in (self.last, self.last.replace(".pt", "_best.pt")):
            expected = self.state("whole-" + self.script, file)
            result = self.state(name, file)
            for key in expected.keys() - {"config", "base"}:
                if not same(expected[key], result[key]):
                    differences.append(f"{name}/{file} has another {key}")
        if self.log(name) != self.log("whole-" + self.script):
            differences.append(f"{name}/log.jsonl differs")
        files = sorted(os.listdir(self.folder / name))
        if files != sorted(os.listdir(self.folder / ("whole-" + self.script))):
            differences.append(f"{name} holds {files}")
        return differences

    def log(self, name):
        lines = read_log(self.folder / name / "log.jsonl")
        return [{key: line[key] for key in line.keys() - {"tokens_per_s"}} for line in lines]


class Preparing:
    """prepare.py --overwrite: the dataset that was there stays or is moved aside, whole; the new one is
    there or not.
    """

    script = "prepare"

    def __init__(self, folder):
        self.folder = folder
        make = ["--dataset=c.txt", "--vocab_size=300", "--num_proc=1"]
        live(folder, "prepare", [*make, "--name=before"])
        self.argv = ["--dataset=long.txt", "--vocab_size=320", "--num_proc=1"]

    def first(self, name):
        if name != "whole-prepare":
            shutil.copytree(self.folder / "data/before", self.folder / "data" / name)
        return [*self.argv, f"--name={name}", "--overwrite"]

    def again(self, name):
        return [*self.argv, f"--name={name}", "--overwrite"]

    def dataset(self, name):
        """Returns a dataset's files, all but meta.json, which has times."""
        paths = (self.folder / "data" / name).iterdir()
        return {path.name: path.read_bytes() for path in paths if path.name != "meta.json"}

    def check(self, name):
        names = [path.name for path in (self.folder / "data").glob(f"{name}*")]
        before = self.dataset("before")
        whole = self.dataset("whole-prepare")
        lost = []
        for each in names:
            if self.dataset(each) not in (before, whole):
                lost.append(f"data/{each} is neither the old nor the new dataset")
            with contextlib.chdir(self.folder):
                dataset.load(f"data/{each}")
        if all(self.dataset(each) != before for each in names):
            lost.append(f"the dataset that stood at data/{name} is gone")
        return lost

    def compare(self, name):
        differences = []
        if self.dataset(name) != self.dataset("whole-prepare"):
            differences.append(f"data/{name} differs")
        leftovers = [path.name for path in (self.folder / "data").glob(f".{name}.tmp-*")]
        if leftovers:
            differences.append(f"data holds {leftovers}")
        return differences


def kill(task, kills, seed, bar):
    """Kills a task's script so many times. Returns (runs that ended, faults)."""
    moments = random.Random(f"{seed} {task.script}")
    whole = f"whole-{task.script}"
    began = time.time()
    status, text = live(task.folder, task.script, task.first(whole))
    duration = time.time() - began
    if status:
        return 0, [f"{task.script}.py ends with {status}: {text}"]
    killed = 0
    ended = 0
    faults = []
    while killed < kills:
        name = f"{task.script}-{ended:04}"
        argv = task.first(name)
        status = None
        while status != 0:
            status, text = live(task.folder, task.script, argv, moments.uniform(0, duration))
            if status == -signal.SIGKILL:
                killed += 1
                bar.update()
            elif status:
                faults.append(f"{task.script}.py {' '.join(argv)} ends with {status}: {text[-500:]}")
                break
            if "Traceback" in text:
                faults.append(f"{task.script}.py {' '.join(argv)}: {text[-500:]}")
            faults += task.check(name)
            argv = task.again(name)
        ended += 1
        if status == 0:
            faults += task.compare(name)
    return ended, faults


# -----------------------------------------------------------------------------------------------------
# Damage

# which commands read a file; {to} is a new name each time
READERS = {
    "ckpt.pt": (
        "sample --out_dir=ckpt.pt --max_new_tokens=4 --num_samples=1",
        "train --init_from=ckpt.pt --dataset=d --out_dir={to} --max_iters=1 --n_layer=1 --n_embd=8 --n_head=1",
        "hf --out_dir=ckpt.pt --to={to}",
        "finetune_lora --init_from=ckpt.pt --dataset=rows.json --out_dir={to} --max_iters=1",
    ),
    "adapter.pt": ("sample --adapter=adapter.pt --max_new_tokens=4 --num_samples=1",),
    "h/config.json": ("sample --out_dir=hf:h --max_new_tokens=4 --num_samples=1",),
    "h/model.safetensors": ("sample --out_dir=hf:h --max_new_tokens=4 --num_samples=1",),
    "h/tokenizer.json": ("sample --out_dir=hf:h --max_new_tokens=4 --num_samples=1",),
    "p/adapter_config.json": ("hf --out_dir=ckpt.pt --adapter=hf:p --to={to}",),
    "p/adapter_model.safetensors": ("hf --out_dir=ckpt.pt --adapter=hf:p --to={to}",),
    "f/tokenizer.json": ("prepare --dataset=c.txt --tokenizer=hf:f --name={to}",),
    "f/tokenizer_config.json": ("prepare --dataset=c.txt --tokenizer=hf:f --name={to}",),
    "data/d/meta.json": ("train --dataset=d --out_dir={to} --max_iters=1 --block_size=8",),
    "data/d/train.bin": ("train --dataset=d --out_dir={to} --max_iters=1 --block_size=8",),
    "data/d/tokenizer.json": ("train --dataset=d --out_dir={to} --max_iters=1 --block_size=8",),
    "c.txt": ("prepare --dataset=c.txt --vocab_size=300 --name={to}",),
    "c.jsonl": ("prepare --dataset=c.jsonl --vocab_size=300 --name={to}",),
    "c.parquet": ("prepare --dataset=c.parquet --vocab_size=300 --name={to}",),
    "c.toml": ("train c.toml --dataset=d --out_dir={to} --max_iters=1 --block_size=8",),
    "rows.json": ("finetune_lora --init_from=ckpt.pt --dataset=rows.json --out_dir={to} --max_iters=1",),
    "rows.jsonl": (
        "finetune_lora --init_from=ckpt.pt --dataset=rows.jsonl --out_dir={to} --max_iters=1",
    ),
    "rows.parquet": (
        "finetune_lora --init_from=ckpt.pt --dataset=rows.parquet --out_dir={to} --max_iters=1",
    ),
    "onnx/config.json": ("sample --onnx=onnx --max_new_tokens=4 --num_samples=1",),
    "onnx/model.onnx": ("sample --onnx=onnx --max_new_tokens=4 --num_samples=1",),
    # of these a copy is made, {to}, as the command writes into it
    "whole-train/ckpt.pt": ("train --init_from=resume --out_dir={to} --max_iters=31",),
    "whole-train/log.jsonl": ("train --init_from=resume --out_dir={to} --max_iters=31",),
    "whole-finetune_lora/adapter.pt": (
        "finetune_lora --init_from=resume --out_dir={to} --max_iters=31",
        "sample --adapter={to}/adapter.pt --max_new_tokens=4 --num_samples=1",
    ),
}


def damage(content, rng):
    """Returns content with something cut out, changed or put in."""
    start = rng.randrange(len(content) + 1)
    kind = rng.choice(("cut", "end", "flip", "junk", "zeros"))
    if kind == "end":
        return content[:start]
    if kind == "cut":
        return content[:start] + content[start + rng.randrange(1, 64) :]
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 8, 64))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == "zeros":
        return content[:start] + bytes(min(1000, len(content) - start)) + content[start + 1000 :]
    return content[:start] + rng.choice(JUNK) + content[start:]


def spoil(folder, files, seed, bar):
    """Gives damaged files to the commands that read them. Returns (files refused, faults)."""
    rng = random.Random(f"{seed} damage")
    pairs = [(file, command) for file, commands in READERS.items() for command in commands]
    refused = 0
    faults = []
    for n in range(len(pairs) + files):  # each whole first: what works on no file shows nothing
        file, command = pairs[n % len(pairs)]
        to = f"spoilt{n}"
        script, *argv = command.format(to=to).split()
        path = folder / file
        if file.startswith("whole-"):
            shutil.copytree(path.parent, folder / to)
            path = folder / to / path.name
        content = path.read_bytes()
        spoilt = content if n < len(pairs) else damage(content, rng)
        path.write_bytes(spoilt)
        status, text = live(folder, script, argv)
        error = ""
        if n < len(pairs) and status:
            error = f"the whole file is refused with {status}"
        elif status not in (0, 1, 2):
            error = f"ends with {status}"
        elif "Traceback" in text:
            error = "a traceback"
        elif status and not text.splitlines()[-1].startswith(f"{script}.py: "):
            error = "its last line is no refusal"
        if error:
            (folder / f"fault{n}").write_bytes(spoilt)
            faults.append(f"{command} with fault{n} as {file}: {error}: {text[-500:]}")
        refused += status != 0
        path.write_bytes(content)
        shutil.rmtree(folder / to, ignore_errors=True)
        shutil.rmtree(folder / "data" / to, ignore_errors=True)
        bar.update(n >= len(pairs))
    return refused, faults


# -----------------------------------------------------------------------------------------------------


def main(cfg):
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    make_files(folder)
    (folder / "long.txt").write_text("\n".join(DOCS * 400))
    pairs = [{"prompt": f"{document} and", "response": "then"} for document in DOCS]
    (folder / "rows.json").write_text(json.dumps(pairs))
    write_rows(folder / "rows.jsonl", pairs)
    write_table(Table.from_pylist(pairs), folder / "rows.parquet")
    live(folder, "prepare", ["--num_stories=2000", "--num_proc=1"])
    live(folder, "export_onnx", ["--out_dir=ckpt.pt", "--to=onnx", "--seconds=0"])
    rows = ["--init_from=ckpt.pt", "--dataset=rows.jsonl", "--rank=2"]
    tasks = [
        Training(folder, "train", MODEL, "ckpt.pt"),
        Training(folder, "finetune_lora", rows, "adapter.pt"),
        Preparing(folder),
    ]
    began = time.time()
    faults = []
    with tqdm(total=cfg.kills, unit="kill") as bar, ThreadPoolExecutor(len(tasks)) as pool:
        shares = [cfg.kills // 2, cfg.kills // 4, cfg.kills - cfg.kills // 2 - cfg.kills // 4]
        results = list(pool.map(lambda task, kills: kill(task, kills, cfg.seed, bar), tasks, shares))
    for task, kills, (ended, task_faults) in zip(tasks, shares, results):
        faults += task_faults
        print(f"{task.script}.py: {kills} kills, {ended} runs to their end, {len(task_faults)} faults")
    with tqdm(total=cfg.files, unit="file") as bar:
        refused, file_faults = spoil(folder, cfg.files, cfg.seed, bar)
    faults += file_faults
    print(f"{cfg.files} damaged files: {refused} refused, {len(file_faults)} faults")
    print(f"{time.time() - began:.0f} seconds, seed {cfg.seed}, {len(faults)} faults")
    if faults:
        print("\n".join(faults), file=sys.stderr)
        raise Refusal(f"{len(faults)} faults; the files are in {folder}", status=1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    try:
        main(configure(Config, sys.argv[1:]))
    except Refusal as e:
        print(f"torture.py: {e}", file=sys.stderr)
        raise SystemExit(e.status)
