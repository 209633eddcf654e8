"""Several processes train as one does, to the bit where they add up the same parts, and resume so."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import error_output, finish, fork, free_port, ranks, start
from scripts import ROOT, call
from test_lost import ARGV, assert_same_run, wait_for
from test_model import build
from test_train import copied, lab, load, log, resume, same, unequal_rows  # lab is a fixture

import train
from device import resolve

TWO = [
    *ARGV,
    "--log_interval=1",
    "--eval_interval=4",
    "--eval_tokens=1024",
    "--gradient_accumulation_steps=2",
]


def run_together(folder, script, n, *argv, status=0):
    """Runs a script as n processes to its end; returns them, in the order of their ranks."""
    processes = [start(folder, script, *argv, **env) for env in ranks(n)]
    statuses = [finish(process) for process in processes]
    assert statuses == [status] * n, [error_output(folder, process) for process in processes]
    return processes


def fork_together(n, function, *args):
    """Runs function(*args, rank, env) in n processes to its end."""
    processes = [
        fork.Process(target=function, args=(*args, rank, env)) for rank, env in enumerate(ranks(n))
    ]
    for process in processes:
        process.start()
    assert [finish(process) for process in processes] == [0] * n


@pytest.fixture(scope="module")
def one(lab):
    call(train, *TWO, "--max_iters=12", "--out_dir=one", folder=lab)
    return load(lab, "one")


@pytest.mark.parametrize(
    "n, optimizer, dtype, mlp",
    [
        (2, "muon", "float32", "swiglu"),
        (2, "adamw", "float32", "swiglu"),
        (2, "muon", "bfloat16", "swiglu"),
        pytest.param(3, "muon", "float32", "moe", marks=pytest.mark.slow),
    ],
)
def test_processes_with_a_micro_batch_each_are_one_with_all_to_the_bit(lab, n, optimizer, dtype, mlp):
    argv = [*TWO, f"--optimizer={optimizer}", "--max_iters=8", f"--dtype={dtype}", f"--mlp={mlp}"]
    argv.append(f"--gradient_accumulation_steps={n}")
    one, two = f"1-{optimizer}-{dtype}-{mlp}", f"{n}-{optimizer}-{dtype}-{mlp}"
    call(train, *argv, f"--out_dir={one}", folder=lab)
    first, second, *_ = run_together(lab, "train", n, *argv, f"--out_dir={two}")
    a, b = load(lab, one), load(lab, two)
    for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
        assert same(a[key], b[key]), key
    # only one of them writes and prints
    assert log(lab, one) == log(lab, two)
    assert sorted(os.listdir(lab / two)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]
    assert "bits a byte" in (lab / f"out.{first.pid}").read_text()
    assert (lab / f"out.{second.pid}").read_text() == ""
    assert error_output(lab, second) == ""


def test_a_run_goes_on_with_two_processes_and_with_one_again(lab, one):
    call(train, *TWO, "--max_iters=4", "--lr_decay_iters=12", "--out_dir=mixed", folder=lab)
    run_together(lab, "train", 2, "--out_dir=mixed", "--init_from=resume", "--max_iters=8")
    resume(lab, "mixed", "--max_iters=12")
    mixed = load(lab, "mixed")
    for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
        assert same(one[key], mixed[key]), key
    assert log(lab, "one") == log(lab, "mixed")


def save_gradient(path, n, rank, env):
    """Saves loss, gradient norm and gradient (a step of plain descent) of one of n processes."""
    os.environ.update(env)
    torch.set_num_threads(1)
    compute = resolve("cpu", "float32", "false", join=n > 1)
    model = build().train()
    before = copied(model)
    idx, targets = unequal_rows()
    batch = {"idx": idx.chunk(n)[rank], "targets": targets.chunk(n)[rank]}
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, norm = train.train_step(model, [sgd], [batch], compute)
    gradient = [a - b for a, b in zip(before, copied(model))]
    torch.save((loss.item(), norm.item(), gradient), f"{path}.{rank}")


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process(tmp_path, n):
    save_gradient(tmp_path / "one", 1, 0, {})
    fork_together(n, save_gradient, tmp_path / "all", n)
    expected_loss, expected_norm, expected = torch.load(tmp_path / "one.0")
    for rank in range(n):
        loss, norm, gradient = torch.load(tmp_path / f"all.{rank}")
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        for a, b in zip(gradient, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rows_that_cannot_be_shared_are_refused(lab):
    argv = [*ARGV, "--batch_size=3", "--out_dir=odd"]
    for process in run_together(lab, "train", 2, *argv, status=2):
        assert "2 processes cannot share the 3 rows" in error_output(lab, process)
    assert not (lab / "odd").exists()


def torchrun_command(*argv, n=2, **options):
    """Returns the command that starts train.py in n processes by the real launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    options |= {"master_port": free_port()}
    return [
        *launcher,
        *(f"--{key}={value}" for key, value in options.items()),
        ROOT / "train.py",
        *ARGV,
        *argv,
    ]


@contextlib.contextmanager
def torchrun(lab, *argv, **options):
    """Starts train.py in two processes by the real launcher, waits for four steps, and gives (the launcher,
    the workers' pids).
    """
    out_dir = next(arg for arg in argv if arg.startswith("--out_dir=")).removeprefix("--out_dir=")
    command = torchrun_command(*argv, **options)
    launcher = subprocess.Popen(
        command,
        cwd=lab,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lab / out_dir / "log.jsonl", 5)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        yield launcher, [int(pid) for pid in children.split()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def test_torchrun_and_a_signal_that_stops_all_at_one_step(lab):
    """SIGTERM reaches one of two workers, and both stop at the same step."""
    argv = ["--max_iters=100000", "--eval_interval=1000", "--out_dir=torchrun"]
    with torchrun(lab, *argv) as (launcher, [_, worker]):
        os.kill(worker, signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    step = load(lab, "torchrun")["step"]
    assert step >= 4
    # by both workers where torchrun has not ended the other one first
    assert 1 <= err.count(f"stopped at step {step} by ") <= 2, err
    assert "2 processes" in out
    resume(lab, "torchrun", f"--max_iters={step + 1}")
    assert load(lab, "torchrun")["step"] == step + 1


@pytest.mark.slow
def test_a_mistake_is_told_once_for_all_processes(lab):
    """Or by some of them, but not by all, on a machine so busy that the first is seconds late."""
    command = torchrun_command("--n_layer=0", n=4)
    launcher = subprocess.run(command, cwd=lab, capture_output=True, text=True, timeout=60)
    assert launcher.returncode == 1
    assert 1 <= launcher.stderr.count("n_layer must be at least 1") < 4


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_run_is_the_undisturbed_one(lab):
    argv = ["--max_iters=60", "--eval_interval=4", "--log_interval=1", "--gradient_accumulation_steps=2"]
    run_together(lab, "train", 2, *ARGV, *argv, "--out_dir=undisturbed")
    with torchrun(lab, *argv, "--out_dir=elastic", max_restarts=2) as (launcher, [_, worker]):
        os.kill(worker, signal.SIGKILL)
        out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert out.count("2 processes") == 2  # once a start
    assert_same_run(lab, "undisturbed", "elastic")
    # a run of another launch is never taken for its own, however often it starts
    with torchrun(lab, *argv, "--out_dir=elastic", max_restarts=1) as (launcher, _):
        out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    # once a start, or twice
    assert 2 <= err.count("elastic is there already") <= 4
    assert "2 processes" not in out
    assert_same_run(lab, "undisturbed", "elastic")


@pytest.mark.slow
@pytest.mark.parametrize("hanging, shard", [(0, "full"), (1, "none")])
def test_a_process_that_hangs_is_named_and_ends_the_run(lab, hanging, shard):
    out_dir = f"hangs-{hanging}-{shard}"
    argv = ["--max_iters=100000", "--eval_interval=1000", f"--shard={shard}", f"--out_dir={out_dir}"]
    with torchrun(lab, *argv) as (launcher, workers):
        os.kill(workers[hanging], signal.SIGSTOP)
        _, err = launcher.communicate(timeout=180)  # a minute, on a quiet machine
    assert f"process {hanging} of 2 hangs: the others have waited" in err, err


class OneExpertARank(torch.nn.Module):
    """A parameter that only some processes have a gradient of, as an expert without tokens."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ParameterList([torch.ones(2), torch.ones(2)])

    def forward(self, batch):
        return (self.experts[batch["expert"]] * batch["x"]).sum()


def train_one_expert(path, rank, env):
    """Saves the weights after a step in which each rank has a gradient for its own expert alone."""
    os.environ.update(env)
    compute = resolve("cpu", "float32", "false", join=True)
    model = OneExpertARank()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = {"expert": rank, "x": torch.tensor([1.0, 2.0])}
    loss, _ = train.train_step(
        model,
        [sgd],
        [batch],
        compute,
        loss_fn=lambda model, batch: model(batch),
        count=lambda batch: 1,
    )
    # a number of its own, which keeps no message between processes alive
    assert loss.untyped_storage().nbytes() == 4
    torch.save(copied(model), f"{path}.{rank}")


def test_a_parameter_without_a_gradient_on_one_process_counts_as_zeros_there(tmp_path):
    fork_together(2, train_one_expert, tmp_path / "weights")
    for rank in range(2):
        for weight in torch.load(tmp_path / f"weights.{rank}"):
            assert weight.tolist() == [0.5, 0.0]  # 1 - (1, 2) / 2, of two processes' targets
