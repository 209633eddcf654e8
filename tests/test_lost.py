"""Nothing is lost: runs that are killed, told to stop, or out of disk go on as if nothing had been."""

import contextlib
import errno
import fcntl
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
from test_train import lab, load, log, same  # noqa: F401  (lab is a fixture)

import checkpoint
import folders
import prepare
import train
from config import Refusal, configure

ROOT = Path(__file__).parents[1]
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


def go_on(lab, out_dir, *argv):
    with contextlib.chdir(lab):
        train.main(configure(train.Config, [f"--out_dir={out_dir}", "--init_from=resume", *argv]))


def assert_same_run(lab, a, b):
    for name in "ckpt.pt", "ckpt_best.pt":
        x, y = load(lab, a, name), load(lab, b, name)
        for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
            assert same(x[key], y[key]), (name, key)
    assert log(lab, a) == log(lab, b)
    assert sorted(os.listdir(lab / b)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]


def wait_for(path, n=1):
    """Until a file has n lines."""
    for _ in range(3000):
        if os.path.exists(path) and Path(path).read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def undisturbed(lab, steps):
    if not (lab / f"whole{steps}").exists():
        assert finish(start(lab, "train", *ARGV, f"--max_iters={steps}", f"--out_dir=whole{steps}")) == 0
    return f"whole{steps}"


@pytest.mark.slow
def test_killed_at_20_random_moments(lab):
    began, whole, moments, steps = time.time(), undisturbed(lab, 180), random.Random(0), []
    a_step = (time.time() - began) / 180
    process = start(lab, "train", *ARGV, "--max_iters=180", "--out_dir=killed")
    for _ in range(20):
        wait_for(
            lab / f"err.{process.pid}", 3
        )  # an evaluation and its sample are printed once the step is saved
        time.sleep(moments.uniform(0, 3 * a_step))
        process.kill()
        assert finish(process) == -signal.SIGKILL, error_output(lab, process)
        for name in "ckpt.pt", "ckpt_best.pt":
            checkpoint.restore(load(lab, "killed", name), name)
        steps.append(load(lab, "killed")["step"])
        process = start(lab, "train", "--out_dir=killed", "--init_from=resume")
    assert finish(process) == 0, error_output(lab, process)
    assert steps == sorted(steps) and len(set(steps)) == 20 and steps[-1] < 180, steps
    assert_same_run(lab, whole, "killed")


@pytest.mark.parametrize(
    "place, call",
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
def test_killed_at_each_point_of_a_save(lab, place, call):
    whole, out_dir = undisturbed(lab, 6), f"{place}{call}"
    process = start(lab, "train", *ARGV, "--max_iters=6", f"--out_dir={out_dir}", fault=(place, call))
    assert finish(process) == -signal.SIGKILL, error_output(lab, process)
    saved = [name for name in ("ckpt.pt", "ckpt_best.pt") if (lab / out_dir / name).exists()]
    for name in saved:
        checkpoint.restore(load(lab, out_dir, name), name)
    if "ckpt.pt" in saved:
        go_on(lab, out_dir)
    else:  # killed before there was one: the run starts anew
        assert (
            finish(start(lab, "train", *ARGV, "--max_iters=6", f"--out_dir={out_dir}", "--overwrite"))
            == 0
        )
    assert_same_run(lab, whole, out_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(lab, number):
    whole, out_dir = undisturbed(lab, 120), f"stopped{number}"
    process = start(lab, "train", *ARGV, "--max_iters=120", "--eval_interval=50", f"--out_dir={out_dir}")
    wait_for(lab / out_dir / "log.jsonl", 5)
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    ckpt = load(lab, out_dir)
    assert log(lab, out_dir)[-1]["step"] >= 9
    line = f"train.py: stopped at step {ckpt['step']} by {number.name}; python train.py --out_dir={out_dir} --init_from=resume goes on"
    assert error_output(lab, process).splitlines()[-1] == line and 9 <= ckpt["step"] < 120
    go_on(lab, out_dir)
    for key in "model", "optimizers":
        assert same(load(lab, out_dir)[key], load(lab, whole)[key])
    assert [x for x in log(lab, out_dir) if "loss" in x] == [x for x in log(lab, whole) if "loss" in x]


def test_a_checkpoint_by_the_clock_goes_on_to_the_bit(lab):
    """Here after each step; what it says of the losses and the log is as when a signal stops the run."""
    whole = undisturbed(lab, 120)
    argv = [*ARGV, "--max_iters=120", "--eval_interval=100", "--save_minutes=1e-9", "--out_dir=clock"]
    process = start(lab, "train", *argv)
    wait_for(lab / "clock/log.jsonl", 5)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert 11 <= load(lab, "clock")["step"] < 100  # line 5 is that of step 12, which is saved next
    go_on(lab, "clock", "--save_minutes=10")
    for key in "model", "optimizers":
        assert same(load(lab, "clock")[key], load(lab, whole)[key])
    assert [x for x in log(lab, "clock") if "loss" in x] == [x for x in log(lab, whole) if "loss" in x]


def test_a_second_sighup_is_none_of_its_own(lab):
    """A terminal that goes away sends two, one by the shell and one by the kernel."""
    process = start(lab, "train", *ARGV, "--max_iters=100000", "--eval_interval=50", "--out_dir=twice")
    wait_for(lab / "twice/log.jsonl", 2)
    os.kill(process.pid, signal.SIGHUP)
    os.kill(process.pid, signal.SIGHUP)
    assert finish(process) == 128 + signal.SIGHUP
    assert (
        error_output(lab, process)
        .splitlines()[-1]
        .startswith(f"train.py: stopped at step {load(lab, 'twice')['step']} by SIGHUP; ")
    )


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
    assert list((lab / "anew").glob("ckpt_best.pt.*.tmp"))
    assert finish(start(lab, "train", *argv)) == 0
    assert_same_run(lab, whole, "anew")


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
    process = start(
        lab, "train", *ARGV, "--max_iters=100000", "--eval_interval=5", "--out_dir=living/run"
    )
    wait_for(lab / "living/run/log.jsonl", 5)
    (lab / "living/run/ckpt.pt.mine.tmp").write_text("notes")
    yield process
    process.kill()


def listed(lab, out_dir):
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
    with contextlib.chdir(lab):  # to look on is allowed
        train.main(
            configure(train.Config, ["--out_dir=living/run", "--init_from=resume", "--eval_only"])
        )

    os.kill(living.pid, signal.SIGTERM)
    assert finish(living) == 128 + signal.SIGTERM, error_output(lab, living)
    files = ["ckpt.pt", "ckpt.pt.mine.tmp", "ckpt_best.pt", "log.jsonl"]
    assert listed(lab, "living/run") == files and listed(lab, "living") == ["run"]
    go_on(lab, "living/run", f"--max_iters={load(lab, 'living/run')['step'] + 1}")


def test_a_lock_dies_with_its_process(lab, living):
    living.kill()
    assert finish(living) == -signal.SIGKILL
    assert {".lock", ".pid"} < set(listed(lab, "living/run"))
    argv = [*ARGV, "--max_iters=1", "--out_dir=living/run", "--overwrite"]
    assert finish(start(lab, "train", *argv)) == 0
    assert listed(lab, "living/run") == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]
    old = next((lab / "living").glob("run.old-*"))
    assert {"ckpt.pt.mine.tmp", "ckpt.pt", "log.jsonl"} <= set(os.listdir(old))


def test_a_run_that_goes_on_is_not_moved_aside_with_the_folder_around_it(lab, living):
    (lab / "living/ckpt.pt").write_bytes(b"of a run")
    for path in (lab / "living/run").glob("ckpt*.pt"):
        path.unlink()  # as before its first checkpoint
    argv = [*ARGV, "--max_iters=1", "--out_dir=living", "--overwrite"]
    process = start(lab, "train", *argv)
    assert finish(process) == 0, error_output(lab, process)
    assert "run" in listed(lab, "living") and living.is_alive()
    assert os.listdir(next(lab.glob("living.old-*"))) == ["ckpt.pt"]


def test_only_what_a_dead_run_half_wrote_is_removed(tmp_path):
    ours = ["ckpt.pt.1.tmp", "adapter_best.pt.22.tmp", "log.jsonl.3.tmp", "loss.png.4.tmp"]
    users = ["ckpt.pt.tmp", "notes.tmp", "notes.1.tmp", "ckpt.pt.1.tmp.txt", "my_ckpt.pt.1.tmp"]
    for name in [*ours, *users]:
        (tmp_path / name).touch()
    with folders.alone(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted([*users, ".lock", ".pid"])
    assert sorted(os.listdir(tmp_path)) == sorted(users)


def test_a_disk_without_locks_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "ckpt.pt.1.tmp").touch()  # of a run that may be going on
    with folders.alone(tmp_path):
        (tmp_path / "ckpt.pt").touch()
    out, _ = capsys.readouterr()
    assert out.startswith(f"{tmp_path} is on a disk without locks (") and out.count("\n") == 1
    assert {"ckpt.pt", "ckpt.pt.1.tmp"} <= set(os.listdir(tmp_path))


def test_a_folder_that_is_locked_for_nothing_is_gone_again(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal), folders.alone(tmp_path / "out/a/b"):
        raise Refusal("there is no such dataset")
    with folders.alone(tmp_path / "out/c", make=False):
        assert os.listdir(tmp_path / "out") == []


def limited(folder, argv, limit):
    """A training run in a forked process that may write no file larger than limit bytes, as on a disk that is nearly full."""
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
    with contextlib.chdir(lab):
        train.main(configure(train.Config, [*ARGV, "--max_iters=4", f"--out_dir={out_dir}"]))
    before = {name: (lab / out_dir / name).read_bytes() for name in ("ckpt.pt", "ckpt_best.pt")}
    if limit == "a line more":
        limit = (lab / out_dir / "log.jsonl").stat().st_size + 50
    argv = [f"--out_dir={out_dir}", "--init_from=resume", "--max_iters=8", "--lr_decay_iters=8"]
    process = fork.Process(target=limited, args=(str(lab), argv, limit))
    process.start()
    assert finish(process) == 0
    words = (lab / "refused").read_text()
    assert (
        words.startswith("1 cannot write ") and "\n" not in words and f"{out_dir}/{file}: " in words
    ), words
    assert before == {name: (lab / out_dir / name).read_bytes() for name in before}
    go_on(lab, out_dir, "--max_iters=8")
    assert load(lab, out_dir)["step"] == 8


def test_an_out_dir_that_cannot_be_made_is_one_line(lab):
    (lab / "file").write_text("in the way")
    process = start(lab, "train", *ARGV, "--max_iters=2", "--out_dir=file/out")
    assert finish(process) == 1
    assert error_output(lab, process).count("\n") == 1 and error_output(lab, process).startswith(
        "train.py: cannot write file/out/"
    )


def test_two_prepares_of_one_name_at_once(tmp_path):
    lost = []  # 1: at the rename, 2: the other had ended before this one began
    for i in range(4):
        running = [
            start(
                tmp_path,
                "prepare",
                "--num_stories=300",
                f"--seed={seed}",
                f"--name=d{i}",
                "--num_proc=1",
            )
            for seed in (1, 2)
        ]
        codes = [finish(process) for process in running]
        lost.append(max(codes))
        assert sorted(codes) in ([0, 1], [0, 2]), [
            error_output(tmp_path, process) for process in running
        ]
        meta, _, _ = prepare.load(tmp_path / f"data/d{i}")
        assert meta["seed"] == codes.index(0) + 1  # the winner's, whole
        loser = running[1 - codes.index(0)]
        assert error_output(tmp_path, loser).count("\n") == 1
    assert (
        sorted(p.name for p in (tmp_path / "data").iterdir()) == ["d0", "d1", "d2", "d3"] and 1 in lost
    )
