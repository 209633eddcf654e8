"""Weights that processes share out train as whole ones do: the same losses, checkpoints and resumed runs."""

import contextlib
import gc
import os
import signal
import warnings
from dataclasses import replace

import pytest
import torch
from children import error_output, finish, ranks, start
from scripts import call
from test_lost import ARGV, assert_same_run
from test_processes import fork_together, run_together
from test_train import lab, load, log, resume  # lab is a fixture

import bench
import benches.scale as bench_scale
import sharding
import train
from benches.step import make_training_step
from config import configure
from device import resolve
from optim import orthogonalize
from sizes import meta_model

THIRTY = [
    *ARGV,
    "--n_embd=36",  # 3 processes have 12 rows each, and of the 96 of an MLP's matrix 32; 2 have 18
    "--dropout=0",
    "--learning_rate=1e-3",
    "--log_interval=1",
    "--eval_interval=15",
    "--eval_tokens=720",  # of three batches two processes have one and two
    "--batch_size=6",
    "--gradient_accumulation_steps=2",
    "--max_iters=30",
]


def losses(lab, out_dir):
    return [line["loss"] for line in log(lab, out_dir) if "loss" in line]


def assert_close_runs(lab, a, b, weights, moments):
    """Asserts that two runs have the same losses, and up to so much the same weights and moments."""
    assert len(losses(lab, a)) == 30
    assert losses(lab, b) == pytest.approx(losses(lab, a), abs=1e-5)
    x, y = load(lab, a), load(lab, b)
    assert y["val_loss"] == pytest.approx(x["val_loss"], abs=1e-5)
    torch.testing.assert_close(y["model"], x["model"], rtol=0, atol=weights)
    for one, other in zip(x["optimizers"], y["optimizers"], strict=True):
        assert other["param_groups"] == one["param_groups"]
        torch.testing.assert_close(other["state"], one["state"], rtol=0, atol=moments)


@pytest.mark.parametrize(
    "n, optimizer, argv",
    [
        (2, "adamw", []),
        pytest.param(2, "muon", ["--mlp=moe", "--n_inner=32"], marks=pytest.mark.slow),
        pytest.param(3, "adamw", ["--tie_embeddings=false", "--pos=learned"], marks=pytest.mark.slow),
        pytest.param(3, "muon", ["--gradient_checkpointing=true"], marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_is_the_whole_one_up_to_rounding(lab, n, optimizer, argv):
    argv = [*THIRTY, f"--optimizer={optimizer}", *argv]
    one, sharded = f"whole-{n}-{optimizer}", f"sharded-{n}-{optimizer}"
    call(train, *argv, f"--out_dir={one}", folder=lab)
    first, *others = run_together(lab, "train", n, *argv, "--shard=full", f"--out_dir={sharded}")
    output = (lab / f"out.{first.pid}").read_text()
    assert f"{n} processes, weights in shards" in output
    assert "rmsnorm=torch" not in output
    for process in others:
        assert (lab / f"out.{process.pid}").read_text() == ""
    assert_close_runs(lab, one, sharded, weights=2e-5, moments=2e-6)
    assert sorted(os.listdir(lab / sharded)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_other_numbers_of_processes(lab):
    argv = [*THIRTY, "--optimizer=muon"]
    call(train, *argv, "--out_dir=one-muon", folder=lab)
    start = [*argv, "--lr_decay_iters=30", "--max_iters=8", "--shard=full", "--out_dir=parts"]
    run_together(lab, "train", 2, *start)
    run_together(lab, "train", 3, "--out_dir=parts", "--init_from=resume", "--max_iters=16")
    resume(lab, "parts", "--max_iters=20")  # which has nobody to share with
    argv = ["--out_dir=parts", "--init_from=resume", "--shard=none", "--max_iters=30"]
    run_together(lab, "train", 2, *argv)
    assert_close_runs(lab, "one-muon", "parts", weights=2e-5, moments=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("place, count", [("write", 3), ("rename", 4), ("renamed", 5)])
def test_a_sharded_run_killed_within_a_save_is_the_undisturbed_one(lab, place, count):
    argv = [*THIRTY, "--eval_interval=4", "--max_iters=12", "--optimizer=muon", "--shard=full"]
    if not (lab / "shards").exists():
        run_together(lab, "train", 2, *argv, "--out_dir=shards")
    out_dir = f"--out_dir=killed-{place}"
    faults = (place, count), None  # the first process writes
    processes = [
        start(lab, "train", *argv, out_dir, fault=fault, **env) for fault, env in zip(faults, ranks(2))
    ]
    assert [finish(process) for process in processes] == [-signal.SIGKILL, 1]
    assert "lost another one" in error_output(lab, processes[1])
    run_together(lab, "train", 2, out_dir, "--init_from=resume")
    assert_same_run(lab, "shards", f"killed-{place}")


def save_orthogonal(path, n, rank, env):
    """Saves what each process has of five matrices, made orthogonal whole, and of a tensor of many."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(env)
    torch.set_num_threads(1)
    compute = resolve("cpu", "float32", "false", join=True, shard=True)
    mesh = init_device_mesh("cpu", (n,))
    matrices = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    params = [distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in matrices]
    result = sharding.apply_to_whole(orthogonalize, [sharding.local(p) for p in params], params)
    torch.save(torch.stack(result), f"{path}.{rank}")
    compute.close()


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_process_makes_its_share_of_the_matrices_orthogonal(tmp_path, n):
    fork_together(n, save_orthogonal, tmp_path / "rows", n)
    matrices = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.load(tmp_path / f"rows.{rank}") for rank in range(n)], 1)
    torch.testing.assert_close(rows, orthogonalize(matrices), rtol=0, atol=1e-6)


def save_messages(path, cfg, rank, env):
    """Saves what a process's messages bring of a step in shards."""
    os.environ.update(env)
    torch.set_num_threads(1)
    compute = resolve("cpu", cfg.dtype, "false", join=True, shard=True)
    step, _, _ = make_training_step(cfg, compute)
    step()
    with bench_scale.Counter() as counter:
        step()
    torch.save(counter.sizes, f"{path}.{rank}")
    compute.close()


@pytest.mark.parametrize(
    "n, argv",
    [
        (2, ["--optimizer=muon", "--dtype=float32"]),
        pytest.param(
            3, ["--optimizer=adamw", "--dtype=bfloat16", "--pos=learned"], marks=pytest.mark.slow
        ),
        pytest.param(2, ["--mlp=moe", "--n_inner=32", "--dtype=float32"], marks=pytest.mark.slow),
    ],
)
def test_the_messages_of_a_step_are_foreseen(tmp_path, n, argv):
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=36", "--block_size=16", "--batch_size=2"]
    cfg = configure(bench.Config, [*shape, *argv, "--gradient_accumulation_steps=2"])
    fork_together(n, save_messages, tmp_path / "sizes", cfg)
    model = meta_model(cfg)
    every = replace(cfg, gradient_accumulation_steps=2 * n)
    compute = replace(resolve("cpu", cfg.dtype, "false"), world_size=n, shards=True)
    foreseen = bench_scale.messages(model, every, compute)
    number, size = map(sum, zip(*foreseen.values()))
    sizes = torch.load(tmp_path / "sizes.0")
    assert len(sizes) == number
    assert sum(sizes) * (n - 1) / n == pytest.approx(size, rel=1e-9)


def held_bytes():
    """Returns the bytes of all tensors of this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what other libraries have
        storages = [
            x.untyped_storage()
            for x in gc.get_objects()
            if isinstance(x, torch.Tensor) and not sharding.is_sharded(x)
        ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def save_held_bytes(path, argv, rank, env):
    """Trains, and saves what a process holds before its second step."""
    os.environ.update(env)
    torch.set_num_threads(1)
    held = []
    train_step = train.train_step

    def noted(*args, **options):
        held.append(held_bytes())
        return train_step(*args, **options)

    train.train_step = noted
    call(train, *argv)
    torch.save(held[1], f"{path}.{rank}")


@pytest.mark.slow
def test_a_resumed_process_holds_its_part_alone(lab):
    argv = [
        *ARGV,
        "--n_embd=64",
        "--n_head=2",
        "--n_inner=256",
        "--batch_size=2",
        "--shard=full",
        "--out_dir=held",
    ]
    with contextlib.chdir(lab):
        fork_together(2, save_held_bytes, lab / "first", [*argv, "--max_iters=4"])
        resumed = ["--out_dir=held", "--init_from=resume", "--max_iters=8"]
        fork_together(2, save_held_bytes, lab / "resumed", resumed)
    for rank in 0, 1:
        first, resumed = (torch.load(lab / f"{name}.{rank}") for name in ("first", "resumed"))
        assert resumed < 1.05 * first
