"""Runs that are killed, stopped by a signal, or out of disk go on as if nothing had been."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from children import finish, fork, said, start
from scripts import call
from test_train import lab, load, log, resume, same  # lab is a fixture

import checkpoint
import prepare
import train
from config import Refusal, configure

ARGV = [
    "--n_layer=2",
    "--n_embd=32",
    "--n_head=2",
    "--block_size=16",
    "--batch_size=4",
    "--eval_interval=1",
    "--log_interval=3",
    "--eval_tokens=64",
    "--dropout=0.1",
    "--learning_rate=1e-4",
    "--device=cpu",
    "--dtype=float32",
]


def assert_same_run(lab, a, b):
    """Asserts that out_dir b holds what a holds, to the bit."""
    for name in "ckpt.pt", "ckpt_best.pt":
        x, y = load(lab, a, name), load(lab, b, name)
        for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
            assert same(x[key], y[key]), (name, key)
    assert log(lab, a) == log(lab, b)
    assert sorted(os.listdir(lab / b)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]


def wait_for(path, n):
    """Waits until a file has n lines."""
    for _ in range(3000):
        if os.path.exists(path) and Path(path).read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def undisturbed(lab, steps):
    """Returns the out_dir of a run that nothing happens to, which is made once."""
    out_dir = f"whole{steps}"
    if not (lab / out_dir).exists():
        process = start(lab, "train", *ARGV, f"--max_iters={steps}", f"--out_dir={out_dir}")
        assert finish(process) == 0, said(lab, process)
    return out_dir


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_is_the_undisturbed_one(lab):
    began = time.time()
    whole = undisturbed(lab, 180)
    seconds_a_step = (time.time() - began) / 180
    rng = random.Random(0)
    steps = []
    process = start(lab, "train", *ARGV, "--max_iters=180", "--out_dir=killed")
    for _ in range(20):
        # an evaluation and its sample are printed once the step is saved
        wait_for(lab / f"err.{process.pid}", 3)
        time.sleep(rng.uniform(0, 3 * seconds_a_step))
        process.kill()
        assert finish(process) == -signal.SIGKILL, said(lab, process)
        for name in "ckpt.pt", "ckpt_best.pt":
            checkpoint.restore(load(lab, "killed", name), name)
        steps.append(load(lab, "killed")["step"])
        process = start(lab, "train", "--out_dir=killed", "--init_from=resume")
    assert finish(process) == 0, said(lab, process)
    assert steps == sorted(set(steps)), steps
    assert steps[-1] < 180
    assert_same_run(lab, whole, "killed")


@pytest.mark.parametrize(
    "place, count",
    [
        ("write", 1),
        ("write", 2),
        ("write", 4),
        ("fsync", 3),
        ("fsync", 4),
        ("fsync", 5),
        ("fsync", 8),
        ("fsync", 10),
        ("rename", 2),
        ("rename", 3),
        ("rename", 5),
        ("renamed", 2),
        ("renamed", 3),
        ("renamed", 4),
    ],
)
def test_a_run_killed_within_a_save_is_the_undisturbed_one(lab, place, count):
    whole = undisturbed(lab, 6)
    out_dir = f"{place}{count}"
    argv = [*ARGV, "--max_iters=6", f"--out_dir={out_dir}"]
    process = start(lab, "train", *argv, fault=(place, count))
    assert finish(process) == -signal.SIGKILL, said(lab, process)
    saved = [name for name in ("ckpt.pt", "ckpt_best.pt") if (lab / out_dir / name).exists()]
    for name in saved:
        checkpoint.restore(load(lab, out_dir, name), name)
    if "ckpt.pt" in saved:
        resume(lab, out_dir)
    else:  # killed before there was one: the run starts anew
        process = start(lab, "train", *argv, "--overwrite")
        assert finish(process) == 0, said(lab, process)
    assert_same_run(lab, whole, out_dir)


def training_losses(lab, out_dir):
    return [line for line in log(lab, out_dir) if "loss" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_advice_how_to_go_on(lab, number):
    whole = undisturbed(lab, 120)
    out_dir = f"stopped{number}"
    process = start(lab, "train", *ARGV, "--max_iters=120", "--eval_interval=50", f"--out_dir={out_dir}")
    wait_for(lab / out_dir / "log.jsonl", 5)
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    step = load(lab, out_dir)["step"]
    assert 9 <= step < 120
    assert log(lab, out_dir)[-1]["step"] >= 9
    assert said(lab, process).splitlines()[-1] == (
        f"train.py: stopped at step {step} by {number.name}; "
        f"python train.py --out_dir={out_dir} --init_from=resume goes on"
    )
    resume(lab, out_dir)
    for key in "model", "optimizers":
        assert same(load(lab, out_dir)[key], load(lab, whole)[key]), key
    assert training_losses(lab, out_dir) == training_losses(lab, whole)


def train_on_a_full_disk(folder, argv, limit):
    """Trains where no file may have more than limit bytes, and writes a Refusal to `refused`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        train.main(configure(train.Config, argv))
    except Refusal as e:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path("refused").write_text(f"{e.status} {e}")


@pytest.mark.parametrize(
    "limit, file", [(0, "log.jsonl"), ("a line more", "log.jsonl"), (50_000, "ckpt_best.pt")]
)
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(lab, limit, file):
    out_dir = f"full{limit}".replace(" ", "-")
    folder = lab / out_dir
    call(train, *ARGV, "--max_iters=4", f"--out_dir={out_dir}", folder=lab)
    before = {name: (folder / name).read_bytes() for name in ("ckpt.pt", "ckpt_best.pt")}
    if limit == "a line more":
        limit = (folder / "log.jsonl").stat().st_size + 50
    argv = [f"--out_dir={out_dir}", "--init_from=resume", "--max_iters=8", "--lr_decay_iters=8"]
    process = fork.Process(target=train_on_a_full_disk, args=(str(lab), argv, limit))
    process.start()
    assert finish(process) == 0
    message = (lab / "refused").read_text()
    assert message.startswith("1 cannot write ")
    assert f"{out_dir}/{file}: " in message
    assert "\n" not in message
    assert before == {name: (folder / name).read_bytes() for name in before}
    resume(lab, out_dir, "--max_iters=8")
    assert load(lab, out_dir)["step"] == 8


def test_an_out_dir_that_cannot_be_made_is_one_line(lab):
    (lab / "file").write_text("in the way")
    process = start(lab, "train", *ARGV, "--max_iters=2", "--out_dir=file/out")
    assert finish(process) == 1
    message = said(lab, process)
    assert message.startswith("train.py: cannot write file/out/")
    assert message.count("\n") == 1


def test_of_two_prepares_of_one_name_at_once_one_is_whole_and_one_is_refused(tmp_path):
    statuses = set()  # 1: lost at the rename, 2: the other had ended before this one began
    for i in range(4):
        argv = ["--num_stories=300", f"--name=d{i}", "--num_proc=1"]
        processes = [start(tmp_path, "prepare", *argv, f"--seed={seed}") for seed in (0, 1)]
        codes = [finish(process) for process in processes]
        messages = [said(tmp_path, process) for process in processes]
        assert sorted(codes) in ([0, 1], [0, 2]), messages
        winner = codes.index(0)
        loser = 1 - winner
        statuses.add(codes[loser])
        assert messages[loser].count("\n") == 1
        meta, _, _ = prepare.load(tmp_path / f"data/d{i}")
        assert meta["seed"] == winner
    assert 1 in statuses
    assert sorted(os.listdir(tmp_path / "data")) == ["d0", "d1", "d2", "d3"]
