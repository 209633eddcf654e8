"""Runs that are killed, stopped by a signal, or out of disk go on as if nothing had been."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import error_output, finish, fork, ranks, start
from scripts import ROOT, call
from test_train import lab, load, log, resume, same  # lab is a fixture

import checkpoint_file
import dataset
import folders
import train
from config import Refusal, configure
from log import plot

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
        assert finish(process) == 0, error_output(lab, process)
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
        assert finish(process) == -signal.SIGKILL, error_output(lab, process)
        for name in "ckpt.pt", "ckpt_best.pt":
            checkpoint_file.restore(load(lab, "killed", name), name)
        steps.append(load(lab, "killed")["step"])
        process = start(lab, "train", "--out_dir=killed", "--init_from=resume")
    assert finish(process) == 0, error_output(lab, process)
    assert steps == sorted(set(steps)), steps
    assert steps[-1] < 180
    assert_same_run(lab, whole, "killed")


MORE_PLACES = [
    ("write", 4),
    ("fsync", 3),
    ("fsync", 4),
    ("fsync", 8),
    ("rename", 3),
    ("renamed", 2),
    ("renamed", 4),
]


@pytest.mark.parametrize(
    "place, count",
    [
        ("write", 1),
        ("write", 2),
        ("fsync", 5),
        ("fsync", 10),
        ("rename", 2),
        ("rename", 5),
        ("renamed", 3),
        *(pytest.param(*place, marks=pytest.mark.slow) for place in MORE_PLACES),
    ],
)
def test_a_run_killed_within_a_save_is_the_undisturbed_one(lab, place, count):
    whole = undisturbed(lab, 6)
    out_dir = f"{place}{count}"
    argv = [*ARGV, "--max_iters=6", f"--out_dir={out_dir}"]
    process = start(lab, "train", *argv, fault=(place, count))
    assert finish(process) == -signal.SIGKILL, error_output(lab, process)
    saved = [name for name in ("ckpt.pt", "ckpt_best.pt") if (lab / out_dir / name).exists()]
    for name in saved:
        checkpoint_file.restore(load(lab, out_dir, name), name)
    if "ckpt.pt" in saved:
        resume(lab, out_dir)
    else:  # killed before there was one: the run starts anew
        process = start(lab, "train", *argv, "--overwrite")
        assert finish(process) == 0, error_output(lab, process)
    assert_same_run(lab, whole, out_dir)


def training_losses(lab, out_dir):
    return [line for line in log(lab, out_dir) if "loss" in line]


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))],
)
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
    assert error_output(lab, process).splitlines()[-1] == (
        f"train.py: stopped at step {step} by {number.name}; "
        f"python train.py --out_dir={out_dir} --init_from=resume goes on"
    )
    resume(lab, out_dir)
    for key in "model", "optimizers":
        assert same(load(lab, out_dir)[key], load(lab, whole)[key]), key
    assert training_losses(lab, out_dir) == training_losses(lab, whole)


def test_a_checkpoint_by_the_clock_goes_on_to_the_bit(lab):
    """Here after each step; what it says of the losses and the log is as when a signal stops the run."""
    whole = undisturbed(lab, 120)
    argv = [*ARGV, "--max_iters=120", "--eval_interval=100", "--save_minutes=1e-9", "--out_dir=clock"]
    process = start(lab, "train", *argv)
    wait_for(lab / "clock/log.jsonl", 5)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert 11 <= load(lab, "clock")["step"] < 100  # line 5 is that of step 12, which is saved next
    resume(lab, "clock", "--save_minutes=10")
    for key in "model", "optimizers":
        assert same(load(lab, "clock")[key], load(lab, whole)[key]), key
    assert training_losses(lab, "clock") == training_losses(lab, whole)


def test_a_second_sighup_is_none_of_its_own(lab):
    """A terminal that goes away sends two, one by the shell and one by the kernel."""
    process = start(lab, "train", *ARGV, "--max_iters=100000", "--eval_interval=50", "--out_dir=twice")
    wait_for(lab / "twice/log.jsonl", 2)
    os.kill(process.pid, signal.SIGHUP)
    os.kill(process.pid, signal.SIGHUP)
    assert finish(process) == 128 + signal.SIGHUP
    step = load(lab, "twice")["step"]
    last_line = error_output(lab, process).splitlines()[-1]
    assert last_line.startswith(f"train.py: stopped at step {step} by SIGHUP; ")


@pytest.mark.slow
def test_a_run_under_nohup_goes_on(lab):
    whole = undisturbed(lab, 120)
    command = [sys.executable, ROOT / "train.py", *ARGV, "--max_iters=120", "--out_dir=nohup"]
    with open(lab / "nohup.out", "w", encoding="utf-8") as out:
        process = subprocess.Popen(["nohup", *command], cwd=lab, stdout=out, stderr=out)
    wait_for(lab / "nohup/log.jsonl", 2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0, (lab / "nohup.out").read_text()
    assert_same_run(lab, whole, "nohup")


def test_a_run_that_starts_anew_starts_its_log_anew(lab):
    """Killed before its first checkpoint, it leaves a log, which is not in the way."""
    whole = undisturbed(lab, 6)
    argv = [*ARGV, "--max_iters=6", "--out_dir=anew"]
    process = start(lab, "train", *argv, fault=("write", 1))
    assert finish(process) == -signal.SIGKILL
    assert [line["step"] for line in log(lab, "anew")] == [0, 1]
    assert list((lab / "anew").glob(".ckpt_best.pt.tmp-*"))
    assert finish(start(lab, "train", *argv)) == 0
    assert_same_run(lab, whole, "anew")


def test_what_is_no_number_in_a_log_is_not_drawn(tmp_path):
    """At the end of a run, which would end in a traceback."""
    lines = [
        {"step": 0, "loss": {}},
        {"step": 1, "loss": 1.5, "val_loss": "x"},
        {"step": 2, "loss": None},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot(str(tmp_path)) == f"loss plot: {tmp_path}/loss.png"
    assert (tmp_path / "loss.png").exists()


def test_a_run_goes_on_with_its_streams_closed(lab):
    def close_streams():
        os.close(1)
        os.close(2)

    whole = undisturbed(lab, 6)
    command = [sys.executable, ROOT / "train.py", *ARGV, "--max_iters=6", "--out_dir=unread"]
    assert subprocess.run(command, cwd=lab, preexec_fn=close_streams, timeout=120).returncode == 0
    assert_same_run(lab, whole, "unread")


@pytest.fixture
def living(lab):
    """A run that goes on in out_dir=living until it is told to stop, and a file of the user's beside it."""
    shutil.rmtree(lab / "living", ignore_errors=True)
    argv = [*ARGV, "--max_iters=100000", "--eval_interval=5", "--out_dir=living/run"]
    process = start(lab, "train", *argv)
    wait_for(lab / "living/run/log.jsonl", 5)
    (lab / "living/run/ckpt.pt.mine.tmp").write_text("notes")
    yield process
    process.kill()


def listed(lab, out_dir):
    """Returns the names in a folder of the lab, sorted."""
    return sorted(os.listdir(lab / out_dir))


def test_a_second_run_in_an_out_dir_is_refused_with_the_pid_of_the_first(lab, living):
    line = f"process {living.pid} is training in living/run: wait until it has ended, or name another folder\n"
    again = [*ARGV, "--max_iters=2", "--out_dir=living/run"]
    first_of_two = dict(ranks(2)[0])
    for script, argv, env in [
        ("train", again, {}),
        ("train", [*again, "--overwrite"], {}),
        ("train", ["--out_dir=living/run", "--init_from=resume"], {}),
        ("train", again, first_of_two),
        ("finetune_lora", ["--init_from=living/run", "--out_dir=living/run", "--overwrite"], {}),
        ("finetune_lora", ["--out_dir=living/run", "--merge"], {}),
    ]:
        process = start(lab, script, *argv, **env)
        assert finish(process) == 2, (script, argv)
        assert error_output(lab, process) == f"{script}.py: {line}"
    with pytest.raises(Refusal, match=f"process {living.pid} is training in living/run: "):
        with contextlib.chdir(lab), folders.new_folder("living", True, ""):
            pass
    resume(lab, "living/run", "--eval_only")  # to look on is allowed

    os.kill(living.pid, signal.SIGTERM)
    assert finish(living) == 128 + signal.SIGTERM, error_output(lab, living)
    files = ["ckpt.pt", "ckpt.pt.mine.tmp", "ckpt_best.pt", "log.jsonl"]
    assert listed(lab, "living/run") == files
    assert listed(lab, "living") == ["run"]
    step = load(lab, "living/run")["step"]
    resume(lab, "living/run", f"--max_iters={step + 1}")


def test_a_lock_dies_with_its_process(lab, living):
    living.kill()
    assert finish(living) == -signal.SIGKILL
    assert {".lock", ".pid"} < set(listed(lab, "living/run"))
    argv = [*ARGV, "--max_iters=1", "--out_dir=living/run", "--overwrite"]
    assert finish(start(lab, "train", *argv)) == 0
    assert listed(lab, "living/run") == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]
    [aside] = (lab / "living").glob("run.old-*")
    assert {"ckpt.pt.mine.tmp", "ckpt.pt", "log.jsonl"} <= set(os.listdir(aside))


def test_a_run_that_goes_on_is_not_moved_aside_with_the_folder_around_it(lab, living):
    (lab / "living/ckpt.pt").write_bytes(b"of a run")
    for path in (lab / "living/run").glob("ckpt*.pt"):
        path.unlink()  # as before its first checkpoint
    argv = [*ARGV, "--max_iters=1", "--out_dir=living", "--overwrite"]
    process = start(lab, "train", *argv)
    assert finish(process) == 0, error_output(lab, process)
    assert "run" in listed(lab, "living")
    assert living.is_alive()
    [aside] = lab.glob("living.old-*")
    assert os.listdir(aside) == ["ckpt.pt"]


def test_only_what_a_dead_run_half_wrote_is_removed(tmp_path):
    older = ["ckpt.pt.1.tmp", "adapter_best.pt.22.tmp", "log.jsonl.3.tmp", "loss.png.4.tmp"]
    ours = [*older, ".ckpt.pt.tmp-0badcafe-1-5"]  # of another machine
    users = [
        ".notes.tmp-0badcafe-1-5",
        ".ckpt.pt.tmp-mine",
        "ckpt.pt.tmp",
        "notes.tmp",
        "notes.1.tmp",
        "ckpt.pt.1.tmp.txt",
        "my_ckpt.pt.1.tmp",
    ]
    for name in [*ours, *users]:
        (tmp_path / name).touch()
    with folders.alone(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted([*users, ".lock", ".pid"])
    assert sorted(os.listdir(tmp_path)) == sorted(users)


def test_the_next_write_of_a_file_removes_what_killed_ones_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    machine = folders.machine()
    swept = [f".a.gguf.tmp-{machine}-{ended.pid}-5", f".a.gguf.tmp-{machine}-{ended.pid}-6"]
    left = [
        f".a.gguf.tmp-{machine}-{os.getppid()}-5",  # of a process that is alive
        f".a.gguf.tmp-0badcafe-{ended.pid}-5",  # of another machine on a shared disk
        f".b.gguf.tmp-{machine}-{ended.pid}-5",
    ]
    for name in [*swept, *left]:
        (tmp_path / name).touch()
    folders.write_atomic(str(tmp_path / "a.gguf"), lambda f: f.write(b"whole"))
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "a.gguf"])


def test_a_disk_without_locks_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "ckpt.pt.1.tmp").touch()  # of a run that may be going on
    with folders.alone(tmp_path):
        (tmp_path / "ckpt.pt").touch()
    out, _ = capsys.readouterr()
    assert out.startswith(f"{tmp_path} is on a disk without locks (")
    assert out.count("\n") == 1
    assert {"ckpt.pt", "ckpt.pt.1.tmp"} <= set(os.listdir(tmp_path))


def test_a_folder_that_is_locked_for_nothing_is_gone_again(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal), folders.alone(tmp_path / "out/a/b"):
        raise Refusal("there is no such dataset")
    with folders.alone(tmp_path / "out/c", make=False):
        assert os.listdir(tmp_path / "out") == []


def train_on_a_full_disk(folder, argv, limit):
    """Trains where no file may have more than limit bytes, and writes a Refusal to `refused`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        call(train, *argv)
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
    message = error_output(lab, process)
    assert message.startswith("train.py: cannot write file/out/")
    assert message.count("\n") == 1


def test_of_two_prepares_of_one_name_at_once_one_is_whole_and_one_is_refused(tmp_path):
    statuses = set()  # 1: lost at the rename, 2: the other had ended before this one began
    for i in range(4):
        argv = ["--num_stories=300", f"--name=d{i}", "--num_proc=1"]
        processes = [start(tmp_path, "prepare", *argv, f"--seed={seed}") for seed in (0, 1)]
        codes = [finish(process) for process in processes]
        messages = [error_output(tmp_path, process) for process in processes]
        assert sorted(codes) in ([0, 1], [0, 2]), messages
        winner = codes.index(0)
        loser = 1 - winner
        statuses.add(codes[loser])
        assert messages[loser].count("\n") == 1
        meta, _, _ = dataset.load(tmp_path / f"data/d{i}")
        assert meta["seed"] == winner
    assert 1 in statuses
    assert sorted(os.listdir(tmp_path / "data")) == ["d0", "d1", "d2", "d3"]
