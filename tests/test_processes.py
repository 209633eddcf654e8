"""Several processes train as one does: to the bit where they add up the same parts, and whoever they are when a run goes on."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import error_output, finish, fork, free_port, ranks, start
from test_lost import ARGV, wait_for
from test_model import build, tokens
from test_train import lab, load, log, same  # noqa: F401  (lab is a fixture)

import train
from config import configure
from device import resolve

ROOT = Path(__file__).parents[1]
TWO = [
    *ARGV,
    "--log_interval=1",
    "--eval_interval=4",
    "--eval_tokens=1024",
    "--gradient_accumulation_steps=2",
]


def run_together(lab, n, *argv):
    running = [start(lab, "train", *argv, **env) for env in ranks(n)]
    assert [finish(p) for p in running] == [0] * n, [error_output(lab, p) for p in running]
    return running


@pytest.fixture(scope="module")
def one(lab):
    with contextlib.chdir(lab):
        train.main(configure(train.Config, [*TWO, "--max_iters=12", "--out_dir=one"]))
    return load(lab, "one")


@pytest.mark.parametrize(
    "optimizer, dtype", [("muon", "float32"), ("adamw", "float32"), ("muon", "bfloat16")]
)
def test_two_processes_with_a_micro_batch_each_are_one_with_two_to_the_bit(lab, optimizer, dtype):
    argv = [*TWO, f"--optimizer={optimizer}", "--max_iters=8", f"--dtype={dtype}"]
    one, two = f"1-{optimizer}-{dtype}", f"2-{optimizer}-{dtype}"
    with contextlib.chdir(lab):
        train.main(configure(train.Config, [*argv, f"--out_dir={one}"]))
    first, second = run_together(lab, 2, *argv, f"--out_dir={two}")
    a, b = load(lab, one), load(lab, two)
    for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
        assert same(a[key], b[key]), key
    assert log(lab, one) == log(lab, two)  # and only one of them has written it
    assert sorted(os.listdir(lab / two)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]
    assert (
        "bits a byte" in (lab / f"out.{first.pid}").read_text()
        and not (lab / f"out.{second.pid}").read_text()
        and not error_output(lab, second)
    )


def test_a_run_goes_on_with_two_processes_and_with_one_again(lab, one):
    with contextlib.chdir(lab):
        train.main(
            configure(train.Config, [*TWO, "--max_iters=4", "--lr_decay_iters=12", "--out_dir=mixed"])
        )
    run_together(lab, 2, "--out_dir=mixed", "--init_from=resume", "--max_iters=8")
    with contextlib.chdir(lab):
        train.main(configure(train.Config, ["--out_dir=mixed", "--init_from=resume", "--max_iters=12"]))
    for key in "step", "model", "optimizers", "val_loss", "best_val_loss":
        assert same(one[key], load(lab, "mixed")[key]), key
    assert log(lab, "one") == log(lab, "mixed")


def gradient(path, n, rank, env):
    """Saves what a step of plain gradient descent takes off the weights, which is the gradient: n processes, each with its rows."""
    os.environ.update(env)
    torch.set_num_threads(1)
    compute = resolve("cpu", "float32", "false", join=n > 1)
    model = build().train()
    before = [p.detach().clone() for p in model.parameters()]
    idx, targets = tokens(6), tokens(6, seed=2)
    targets[0, :15], targets[1, :3], targets[4, 5:] = -100, -100, -100  # unequal numbers of targets
    batch = {key: x.chunk(n)[rank] for key, x in (("idx", idx), ("targets", targets))}
    loss, norm = train.train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], [batch], compute)
    torch.save(
        (loss.item(), norm.item(), [b - p.detach() for b, p in zip(before, model.parameters())]),
        f"{path}.{rank}",
    )


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_are_those_of_one_process(tmp_path, n):
    gradient(tmp_path / "one", 1, 0, {})
    running = [
        fork.Process(target=gradient, args=(tmp_path / "all", n, rank, env))
        for rank, env in enumerate(ranks(n))
    ]
    for process in running:
        process.start()
    assert [finish(process) for process in running] == [0] * n
    loss, norm, expected = torch.load(tmp_path / "one.0")
    for rank in range(n):
        l, g, result = torch.load(tmp_path / f"all.{rank}")
        assert l == pytest.approx(loss, rel=1e-6) and g == pytest.approx(norm, rel=1e-6)
        for a, b in zip(result, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rows_that_cannot_be_shared_are_refused(lab):
    running = [start(lab, "train", *ARGV, "--batch_size=3", "--out_dir=odd", **env) for env in ranks(2)]
    assert [finish(p) for p in running] == [2, 2]
    assert (
        all("2 processes cannot share the 3 rows" in error_output(lab, p) for p in running)
        and not (lab / "odd").exists()
    )


def test_torchrun_and_a_signal_that_stops_all_at_one_step(lab):
    """The real launcher, with the default batch: a step's rows are split. SIGTERM reaches one worker alone, and all stop with it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        ROOT / "train.py",
        *ARGV,
        "--max_iters=100000",
        "--eval_interval=1000",
        "--out_dir=torchrun",
    ]
    launcher = subprocess.Popen(
        command,
        cwd=lab,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lab / "torchrun/log.jsonl", 5)
        workers = [
            int(pid)
            for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    step = load(lab, "torchrun")["step"]
    assert step >= 4 and err.count(f"stopped at step {step} by ") == 2 and "2 processes" in out, err
    with contextlib.chdir(lab):
        train.main(
            configure(
                train.Config, ["--out_dir=torchrun", "--init_from=resume", f"--max_iters={step + 1}"]
            )
        )
    assert load(lab, "torchrun")["step"] == step + 1


class OneExpertARank(torch.nn.Module):
    """A parameter that only some processes have a gradient of, as an expert without tokens."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ParameterList([torch.ones(2), torch.ones(2)])

    def forward(self, batch):
        return (self.experts[batch["expert"]] * batch["x"]).sum()


def unequal_gradients(path, rank, env):
    os.environ.update(env)
    compute = resolve("cpu", "float32", "false", join=True)
    model = OneExpertARank()
    batch = {"expert": rank, "x": torch.tensor([1.0, 2.0])}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, _ = train.train_step(
        model,
        [optimizer],
        [batch],
        compute,
        loss_fn=lambda model, batch: model(batch),
        count=lambda batch: 1,
    )
    assert loss.untyped_storage().nbytes() == 4  # it does not keep the message that it came in
    torch.save([p.detach() for p in model.parameters()], f"{path}.{rank}")


def test_a_parameter_without_a_gradient_on_one_process_counts_as_zeros_there(tmp_path):
    running = [
        fork.Process(target=unequal_gradients, args=(tmp_path / "w", rank, env))
        for rank, env in enumerate(ranks(2))
    ]
    for process in running:
        process.start()
    assert [finish(process) for process in running] == [0, 0]
    for rank in range(2):
        weights = torch.load(tmp_path / f"w.{rank}")
        assert all(w.tolist() == [0.5, 0.0] for w in weights)  # 1 - (1, 2) / 2 of two processes' targets
