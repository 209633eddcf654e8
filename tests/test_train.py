"""Training: batches, rates, accumulation, resuming to the bit, and that it learns."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import build, tokens

import checkpoint
import folders
import prepare
import toy_stories
import train
from config import Refusal, configure
from data import count_targets, epoch_starts, training_rows
from device import resolve
from model import ModelConfig, activation_bytes, model_sizes
from optim import plan_rates, saved_schedule
from score import document_nats, evaluate, floor_line

ROOT = Path(__file__).parents[1]
CPU = resolve("cpu", "float32", "false")
SMALL = [
    "--n_layer=2",
    "--n_embd=32",
    "--n_head=2",
    "--batch_size=4",
    "--max_iters=12",
    "--eval_interval=4",
    "--log_interval=1",
    "--eval_tokens=1024",
    "--device=cpu",
    "--dtype=float32",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with data/toy prepared."""
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.chdir(folder):
        prepare.prepare(configure(prepare.Config, ["--num_stories=2000", "--num_proc=1"]))
    return folder


def run_train(lab, *argv):
    with contextlib.chdir(lab):
        train.main(configure(train.Config, [*SMALL, *argv]))


def load(lab, out_dir, name="ckpt.pt"):
    return checkpoint.load(str(lab / out_dir / name))


def log(lab, out_dir):
    """The lines of a run's log, without what differs from run to run."""
    lines = [json.loads(line) for line in open(lab / out_dir / "log.jsonl", encoding="utf-8")]
    for line in lines:
        line.pop("tokens_per_s", None)
    return lines


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Batches


def test_targets_are_inputs_shifted_by_one_and_an_epoch_sees_each_block_once():
    data, T = np.arange(1000, dtype=np.uint16), 10
    per_epoch = len(epoch_starts(len(data), T, 7, 0))
    batch = training_rows(data, T, 7, 0, per_epoch)
    assert torch.equal(batch["idx"] + 1, batch["targets"]) and batch["idx"].dtype == torch.int64
    first, again = batch["idx"][:, 0], training_rows(data, T, 7, per_epoch, per_epoch)["idx"][:, 0]
    assert (
        per_epoch == 99
        and (first.sort().values.diff() == T).all()
        and (again.sort().values.diff() == T).all()
    )
    assert not torch.equal(again - again.min(), first - first.min()) and not (first.diff() > 0).all()


def test_a_row_depends_on_its_number_alone():
    data, T = np.arange(5000, dtype=np.uint16), 16
    whole = training_rows(data, T, 1, 0, 640)["idx"]
    parts = torch.cat([training_rows(data, T, 1, first, 5)["idx"] for first in range(0, 640, 5)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, training_rows(data, T, 2, 0, 640)["idx"])


@pytest.mark.parametrize("n", [11, 12, 19, 20, 21, 25, 30, 31])
def test_rows_stay_inside_a_short_split(n):
    for seed in range(20):
        batch = training_rows(np.arange(n, dtype=np.uint16), 10, seed, 0, 5)
        assert batch["targets"].shape == (5, 10) and torch.equal(batch["idx"] + 1, batch["targets"])


# Learning rate


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_at_the_ends(schedule):
    cfg = train.Config(
        max_iters=1000,
        warmup_iters=100,
        learning_rate=1e-2,
        min_lr=1e-3,
        schedule=schedule,
        decay_frac=0.5,
    )
    lr = [train.get_lr(step, cfg) for step in range(1001)]
    assert lr[0] == pytest.approx(1e-2 / 101) and lr[99] == pytest.approx(1e-2 * 100 / 101)
    assert lr[100] == 1e-2 == max(lr)
    assert lr[1000] == 1e-3 and 1e-3 < lr[999] < 1.03e-3
    assert all(a >= b for a, b in zip(lr[100:], lr[101:]))
    middle = {"cosine": 5.5e-3, "linear": 1e-2}[schedule]
    assert lr[550] == pytest.approx(middle)
    cfg.lr_decay_iters = 500
    assert train.get_lr(500, cfg) == train.get_lr(900, cfg) == 1e-3


def test_a_finished_run_is_lengthened_at_the_highest_rate_and_to_the_bit(lab, capsys):
    """In one stage, and in one that was interrupted; both by hand as well."""
    short = ["--max_iters=4", "--warmup_iters=2", "--dropout=0.1"]

    def resume(out_dir, *argv):
        with contextlib.chdir(lab):
            train.main(configure(train.Config, [f"--out_dir={out_dir}", "--init_from=resume", *argv]))
        return [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]

    for out_dir in "longer", "longer-in-parts":
        run_train(lab, *short, f"--out_dir={out_dir}")
    assert "learning rate" not in capsys.readouterr().out
    message = (
        "step 5: the learning rate goes from 0.00179 to 0.0025, the highest, as a finished run is made longer, "
        "and falls again until step 12"
    )
    assert resume("longer", "--max_iters=12") == [message]
    assert resume("longer-in-parts", "--max_iters=8", "--lr_decay_iters=12") == [message]
    assert resume("longer-in-parts", "--max_iters=12") == []
    assert resume("longer", "--max_iters=12") == []  # nothing is left to do
    rates = [line["lr"] for line in log(lab, "longer") if "lr" in line]
    heights = [1 / 3, 2 / 3, 1, 1 / 1.4, 1, 1, 1, 5 / 5.6, 4 / 5.6, 3 / 5.6, 2 / 5.6, 1 / 5.6]
    assert rates == pytest.approx([2.5e-3 * height for height in heights])
    a, b = load(lab, "longer"), load(lab, "longer-in-parts")
    assert all(same(a[key], b[key]) for key in ("step", "model", "optimizers", "val_loss"))
    assert log(lab, "longer") == log(lab, "longer-in-parts")


def test_rates_that_change_on_resume_are_said_with_both(lab, capsys):
    def lines(step, saved, **changes):
        cfg = configure(train.Config, [f"--{key}={value}" for key, value in (saved | changes).items()])
        ckpt = {"config": asdict(train.Config(**saved))}
        return plan_rates(step, saved_schedule(ckpt, cfg), cfg), cfg

    saved = {"max_iters": 100, "warmup_iters": 10, "schedule": "cosine", "min_lr": 1e-4}
    for step in 0, 5, 50, 100, 110:
        assert lines(step, saved)[0] == []
    assert lines(5, saved, max_iters=200)[0] == []  # still warming up
    # cos(40/190 pi) and cos(40/90 pi), from one of 49 to one of 50 steps
    [line], cfg = lines(50, saved, max_iters=200)
    before, after = (1e-4 + 2.4e-3 * (1 + math.cos(math.pi * done)) / 2 for done in (39 / 90, 40 / 190))
    assert line == f"step 51: the learning rate goes from {before:.3g} to {after:.3g}"
    assert cfg.warmup_iters == 10
    # a restart, and with another warm-up one run of the whole length
    [line], cfg = lines(100, saved, max_iters=200)
    assert "to 0.0025, the highest" in line and cfg.warmup_iters == 100
    [line], cfg = lines(100, saved, max_iters=200, warmup_iters=20)
    assert "highest" not in line and cfg.warmup_iters == 20
    [line], cfg = lines(50, saved, learning_rate=1e-3)
    assert line.endswith(f"to {1e-4 + 9e-4 * (1 + math.cos(math.pi * 40 / 90)) / 2:.3g}")
    with pytest.raises(Refusal, match="decay_frac must be above 0"):
        saved_schedule({"config": {"decay_frac": 0.0}}, train.Config())


def test_steps_at_a_rate_of_0_are_said(lab, capsys):
    message = (
        "steps 5 to 8 have a learning rate of 0 and change nothing: lr_decay_iters=4 is below max_iters; "
        "--lr_decay_iters=0 goes down until the end"
    )
    run_train(lab, "--out_dir=zero", "--max_iters=8", "--lr_decay_iters=4", "--warmup_iters=2")
    assert message in capsys.readouterr().out.splitlines()
    rates = [line["lr"] for line in log(lab, "zero") if "lr" in line]
    assert min(rates[:4]) > 0 and rates[4:] == [0] * 4
    for argv in ["--min_lr=1e-4", "--lr_decay_iters=8"]:
        cfg = configure(train.Config, ["--max_iters=8", "--lr_decay_iters=4", argv])
        assert plan_rates(0, None, cfg) == []
    cfg = configure(train.Config, ["--max_iters=8", "--lr_decay_iters=4"])
    assert plan_rates(6, None, cfg)[0].startswith("steps 7 to 8 have") and plan_rates(8, None, cfg) == []


# Optimizers and steps


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_is_in_one_group_by_role(optimizer, tie):
    model = build("layernorm", pos="learned", tie=tie)
    optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer), CPU)
    place = {
        id(p): (type(o).__name__, g["weight_decay"])
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
    }
    assert (
        sum(len(g["params"]) for o in optimizers for g in o.param_groups)
        == len(list(model.parameters()))
        == len(place)
    )
    for name, p in model.named_parameters():
        hidden = "Muon" if optimizer == "muon" else "AdamW"
        assert place[id(p)] == (
            ("AdamW", 0.0) if p.dim() == 1 else (hidden, 0.1) if "blocks" in name else ("AdamW", 0.1)
        ), name


def test_frozen_parameters_are_in_no_group():
    model = build()
    model.wte.weight.requires_grad_(False)
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    assert id(model.wte.weight) not in {
        id(p) for o in optimizers for g in o.param_groups for p in g["params"]
    }


def furthest(params, reference, start):
    """The largest distance of parameters to a reference, as a share of that parameter's largest move from its start."""
    return max(
        ((p - r).abs().max() / (r - s).abs().max()).item() for p, r, s in zip(params, reference, start)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_k_accumulation_steps_are_one_k_times_batch(optimizer, dtype):
    """Within 8 times what the order of summation changes, which is measured: by the same rows, shared out otherwise to three micro-batches."""
    compute = resolve("cpu", dtype, "false")
    idx, targets = tokens(6), tokens(6, seed=2)
    targets[0, :15], targets[1, :3], targets[4, 5:] = -100, -100, -100  # unequal numbers of targets
    start = list(build().parameters())

    def update(rows, parts):
        model = build().train()
        cfg = train.Config(optimizer=optimizer, learning_rate=1e-2)
        batches = [
            {"idx": i, "targets": t} for i, t in zip(idx[rows].split(parts), targets[rows].split(parts))
        ]
        optimizers = train.make_optimizers(model, cfg, compute)
        # AdamW's first step has full size for a gradient of 1e-9 as well; a large eps keeps the comparison about gradients
        for g in optimizers[0].param_groups:
            g["eps"] = 1.0
        loss, norm = train.train_step(model, optimizers, batches, compute, (0, 0), grad_clip=1.0)
        return loss.item(), norm.item(), [p.detach() for p in model.parameters()]

    in_order, thirds = torch.arange(6), [2, 2, 2]
    loss, norm, params = update(in_order, thirds)
    orders = [
        update(torch.randperm(6, generator=torch.Generator().manual_seed(seed)), thirds)[2]
        for seed in range(4)
    ]
    rounding = max(furthest(order, params, start) for order in orders)
    assert (
        0 < rounding < {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    )  # of a parameter's largest move; Muon's iteration in bfloat16 enlarges it
    for parts in [6], [1, 5], [1] * 6:
        other_loss, other_norm, others = update(in_order, parts)
        assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(
            norm, rel=1e-3
        )
        assert furthest(others, params, start) < 8 * rounding


def test_a_loss_that_is_not_finite_changes_nothing():
    model = build()
    model.norm.weight.data[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    loss, _ = train.train_step(model, optimizers, [{"idx": tokens(), "targets": tokens()}], CPU)
    assert math.isnan(loss)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.parameters(), before))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer):
    """Weights, moments and the counts of steps: a run with such a step in it is, to the bit, the one without."""

    def loss(model, batch):
        return (
            train.next_token_loss(model, {key: batch[key] for key in ("idx", "targets")})
            * batch["factor"]
        )

    runs = []
    for factors in [1.0, 1.0, 1.0], [1.0, math.nan, 1.0, math.inf, 1.0]:
        model = build().train()
        optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer), CPU)
        seed = 0
        for factor in factors:
            batch = {"idx": tokens(seed=seed), "targets": tokens(seed=seed + 9)}
            batch["factor"] = factor
            step_loss, norm = train.train_step(
                model, optimizers, [batch], CPU, (0, seed), grad_clip=1.0, loss_fn=loss
            )
            assert train.is_usable(step_loss.item(), norm.item(), None) == (factor == 1.0)
            seed += factor == 1.0
        runs.append((model.state_dict(), [o.state_dict()["state"] for o in optimizers]))
    assert same(*runs)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_with_a_loss_scaler_one_bad_gradient_skips_all_optimizers(bad, grad_clip):
    model = build().train()
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batch = {"idx": tokens(), "targets": tokens(seed=9)}
    train.train_step(model, optimizers, [batch], CPU, grad_clip=grad_clip, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    hook = model.blocks[0].attn.q_proj.weight.register_hook(lambda grad: grad * bad)  # one of Muon's
    loss, norm = train.train_step(model, optimizers, [batch], CPU, grad_clip=grad_clip, scaler=scaler)
    assert train.is_usable(loss.item(), norm.item(), scaler) and not math.isfinite(norm)
    assert (
        all(torch.equal(a, b) for a, b in zip(model.parameters(), before)) and scaler.get_scale() == 2.0
    )
    hook.remove()
    train.train_step(model, optimizers, [batch], CPU, grad_clip=grad_clip, scaler=scaler)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_optimizers_of_another_device_go_on(tmp_path):
    """AdamW is fused on a CPU and on CUDA, and not on MPS; a checkpoint keeps what it was."""
    model = build().train()
    optimizers = train.make_optimizers(model, train.Config(optimizer="adamw"), CPU)
    saved = [optimizer.state_dict() for optimizer in optimizers]
    for group in saved[0]["param_groups"]:
        group["fused"] = False
    ckpt = {"step": 0, "optimizers": saved, "losses": [], "scaler": {}}
    train.load_optimizers(optimizers, None, ckpt, train.Config(optimizer="adamw"))
    train.train_step(model, optimizers, [{"idx": tokens(), "targets": tokens(seed=9)}], CPU)


def test_a_run_whose_loss_is_not_finite_names_the_step_and_keeps_its_checkpoint(lab, monkeypatch):
    batches = train.Pretraining.batches
    monkeypatch.setattr(
        train.Pretraining, "count", staticmethod(lambda batch: torch.tensor(batch.pop("count")))
    )
    monkeypatch.setattr(
        train.Pretraining,
        "batches",
        lambda self, step: [b | {"count": 0 if step == 6 else 64} for b in batches(self, step)],
    )
    with pytest.raises(
        Refusal,
        match="the loss is (nan|inf) and its gradient norm .* at step 6; .*the last checkpoint in naned is as it was",
    ) as e:
        run_train(lab, "--out_dir=naned", "--log_interval=5")
    assert e.value.status == 1 and load(lab, "naned")["step"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_targets_are_counted_exactly(dtype):
    """Where every target costs one nat, the mean is 1 to the bit, however many there are: a sum in bfloat16 would stop at 256."""
    compute, data = resolve("cpu", dtype, "false"), np.zeros(100_001, np.uint16)

    class OneNat(torch.nn.Module):
        def forward(self, idx, targets, reduction):
            return None, (targets != -100).sum().float()

    assert evaluate(OneNat(), data, 24, 700, compute) == 1.0
    targets = torch.zeros(3, 1000, dtype=torch.long)
    targets[1, 7:] = -100
    weight = torch.nn.Parameter(torch.ones(()))
    loss, norm = train.train_step(
        torch.nn.Module(),
        [torch.optim.SGD([weight], lr=0.5)],
        [{"targets": t} for t in targets.split(1)],
        compute,
        loss_fn=lambda _, batch: weight * count_targets(batch),
    )
    assert (loss.item(), norm.item(), weight.item()) == (1.0, 1.0, 0.5)


def test_evaluate_counts_each_target_once():
    data, model = tokens(1, 107)[0].numpy().astype(np.uint16), build()
    with torch.no_grad():
        nats = sum(
            model(
                torch.from_numpy(data[i : i + 25][:-1].astype(np.int64))[None],
                torch.from_numpy(data[i + 1 : i + 25].astype(np.int64))[None],
                reduction="sum",
            )[1].item()
            for i in range(0, 106, 24)
        )
    assert evaluate(model, data, 24, 2, CPU) == pytest.approx(nats / 106, rel=1e-5)
    blocks = [evaluate(model, data[i : i + 25], 24, 2, CPU) for i in range(0, 106, 24)]
    # five blocks, the last of 10 targets
    few = (24 * blocks[0] + 10 * blocks[4]) / 34
    assert evaluate(model, data, 24, 2, CPU, tokens=48) == pytest.approx(few, rel=1e-5)
    assert evaluate(model, data[:25], 24, 2, CPU, tokens=48) == pytest.approx(blocks[0], rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e9])
def test_a_gradient_is_clipped_to_its_norm(clip):
    model = build()
    before = [p.detach().clone() for p in model.parameters()]
    _, norm = train.train_step(
        model,
        [torch.optim.SGD(model.parameters(), lr=1.0)],
        [{"idx": tokens(), "targets": tokens()}],
        CPU,
        grad_clip=clip,
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before)]).norm()
    assert norm > 0.2 and moved.item() == pytest.approx(min(norm.item(), clip or math.inf), rel=1e-3)


# Whole runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(lab, optimizer, dtype):
    whole_dir, parts_dir = f"whole-{optimizer}-{dtype}", f"parts-{optimizer}-{dtype}"
    args = [
        f"--optimizer={optimizer}",
        "--dropout=0.1",
        "--gradient_accumulation_steps=2",
        f"--dtype={dtype}",
    ]
    run_train(lab, *args, f"--out_dir={whole_dir}")
    run_train(lab, *args, f"--out_dir={parts_dir}", "--max_iters=8", "--lr_decay_iters=12")
    with contextlib.chdir(lab):
        train.main(
            configure(train.Config, [f"--out_dir={parts_dir}", "--init_from=resume", "--max_iters=12"])
        )
    whole, parts = load(lab, whole_dir), load(lab, parts_dir)
    assert whole["step"] == parts["step"] == 12 and parts["config"]["dtype"] == dtype
    for key in "model", "optimizers", "val_loss", "best_val_loss":
        assert same(whole[key], parts[key]), key
    assert log(lab, whole_dir) == log(lab, parts_dir)


def test_a_setting_that_came_later_has_its_default():
    saved = {
        key: value
        for key, value in asdict(ModelConfig(n_embd=96, n_head=2, vocab_size=300)).items()
        if key != "head_dim"
    }
    for resume in True, False:
        ckpt = {"config": {}, "model_config": saved}
        assert checkpoint.inherit(configure(train.Config, []), ckpt, "old.pt", resume).head_dim == 48
        with pytest.raises(Refusal, match="head_dim=0, which cannot become 16"):
            checkpoint.inherit(configure(train.Config, ["--head_dim=16"]), ckpt, "old.pt", resume)


def test_resume_keeps_what_was_saved_and_refuses_another_model_or_data(lab):
    run_train(lab, "--out_dir=r", "--weight_decay=0.3")
    with contextlib.chdir(lab):

        def resume(*argv):
            train.main(configure(train.Config, ["--out_dir=r", "--init_from=resume", *argv]))

        for argv, words in (
            (["--n_layer=3"], "n_layer=2"),
            (["--dataset=other"], "dataset"),
            (["--pos=alibi"], "pos"),
            (["--seed=3"], "seed"),
        ):
            with pytest.raises(Refusal, match=words):
                resume(*argv)
        resume(
            "--max_iters=16", "--n_layer=2", "--learning_rate=1e-4", "--momentum=0.5"
        )  # the same n_layer is no change
    ckpt = load(lab, "r")
    assert (
        ckpt["optimizers"][1]["param_groups"][0]["momentum"] == 0.5
        and ckpt["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.3
    )
    assert (
        ckpt["step"] == 16
        and ckpt["config"]["weight_decay"] == 0.3
        and ckpt["config"]["learning_rate"] == 1e-4
    )


def test_an_existing_out_dir_is_refused_or_moved_aside(lab):
    run_train(lab, "--out_dir=o", "--max_iters=1")
    before = (lab / "o/ckpt.pt").read_bytes()
    with pytest.raises(Refusal, match="--init_from=resume"):
        run_train(lab, "--out_dir=o", "--max_iters=1")
    assert (lab / "o/ckpt.pt").read_bytes() == before
    with pytest.raises(Refusal, match="no dataset"):
        run_train(lab, "--out_dir=o", "--dataset=none", "--overwrite")
    assert (lab / "o/ckpt.pt").read_bytes() == before  # moved aside only once nothing else is wrong
    run_train(lab, "--out_dir=o", "--max_iters=2", "--overwrite")
    aside = [p for p in lab.iterdir() if p.name.startswith("o.old-")]
    assert len(aside) == 1 and (aside[0] / "ckpt.pt").read_bytes() == before
    assert load(lab, "o")["step"] == 2


def test_init_from_a_checkpoint_takes_its_weights_and_shape(lab, capsys):
    run_train(lab, "--out_dir=a", "--max_iters=4")
    with contextlib.chdir(lab):
        train.main(
            configure(
                train.Config,
                [
                    "--init_from=a",
                    "--out_dir=b",
                    "--max_iters=1",
                    "--learning_rate=1e-9",
                    "--device=cpu",
                ],
            )
        )
    a, b = load(lab, "a", "ckpt_best.pt"), load(lab, "b")
    assert b["model_config"] == a["model_config"] and b["step"] == 1
    assert all((a["model"][k] - b["model"][k]).abs().max() < 1e-6 for k in a["model"])


def test_eval_only_prints_the_saved_loss_and_writes_nothing(lab, capsys):
    run_train(lab, "--out_dir=e", "--max_iters=4", "--eval_tokens=0")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (lab / "e").iterdir())
    capsys.readouterr()
    with contextlib.chdir(lab):
        train.main(
            configure(
                train.Config,
                ["--out_dir=e", "--init_from=resume", "--eval_only", "--device=cpu", "--dtype=float32"],
            )
        )
    assert f"{load(lab, 'e')['val_loss']:.4f} nats a token" in capsys.readouterr().out
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (lab / "e").iterdir()) == before


def test_a_run_that_blows_up_says_the_step_and_keeps_the_last_good_checkpoint(lab):
    run_train(lab, "--out_dir=n", "--max_iters=4")
    before = (lab / "n/ckpt.pt").read_bytes()
    with pytest.raises(Refusal, match=r"at step \d+") as e:
        run_train(
            lab,
            "--out_dir=n",
            "--init_from=resume",
            "--max_iters=60",
            "--eval_interval=60",
            "--learning_rate=1e30",
            "--grad_clip=0",
            "--lr_decay_iters=1000",
        )
    assert e.value.status == 1 and (lab / "n/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "argv, refusal",
    [
        (["--learning_rate=1e308"], "1e36 at most"),
        (["--embd_lr_scale=1e308"], "1e36 at most"),
        (["--learning_rate=1e200", "--embd_lr_scale=1e200"], "1e36 at most"),
        (["--weight_decay=1e308"], "1e36 at most"),
        ([f"--warmup_iters={2**63}"], "warmup_iters must be below 2\\^63"),
        ([f"--max_iters={10**400}"], "max_iters must be below 2\\^63"),
        (["--learning_rate=1e35", "--embd_lr_scale=1", "--grad_clip=0"], "at step [012]"),
        (["--weight_decay=1e36"], "at step [012]"),
        (["--learning_rate=5e-324"], None),
        (["--beta1=0.9999999999999999", "--beta2=0.9999999999999999"], None),
        (["--momentum=0.9999999999999999", "--optimizer=muon"], None),
        (["--grad_clip=1e308"], None),
        (["--grad_clip=5e-324", "--decay_frac=5e-324"], None),
        ([f"--warmup_iters={2**63 - 1}", f"--lr_decay_iters={2**63 - 1}"], None),
        ([f"--eval_tokens={2**63 - 1}", f"--eval_interval={2**63 - 1}"], None),
    ],
)
def test_numbers_at_the_edge_are_refused_or_work(lab, argv, refusal):
    argv = ["--max_iters=3", "--warmup_iters=0", *argv, "--out_dir=edge", "--overwrite"]
    if refusal:
        with pytest.raises(Refusal, match=refusal):
            run_train(lab, *argv)
    else:
        run_train(lab, *argv)
        assert load(lab, "edge")["step"] == 3
    for path in (lab / "edge").glob("*.pt"):
        assert all(weight.isfinite().all() for weight in checkpoint.load(str(path))["model"].values())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--block_size=60000", "--batch_size=1", "--pos=alibi"], "this needs more than 54 GiB"),
        (["--block_size=32", "--batch_size=100000"], "this needs more than"),
        # what a step takes beyond what is foreseen: a third copy of the logits
        (
            ["--block_size=32", "--batch_size=7500", "--gradient_checkpointing"],
            "out of memory: a smaller batch_size or block_size or n_layer or n_embd takes less",
        ),
    ],
)
def test_want_of_memory_is_one_line(lab, argv, message):
    """Where 3 GiB are allowed, as by ulimit -v."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *SMALL, *argv, "--out_dir=small-machine"],
        cwd=lab,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)),
    )
    assert done.returncode in (1, 2)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("train.py: ") and message in error and "Traceback" not in done.stderr


def test_only_what_this_process_takes_is_counted():
    cfg = train.Config(vocab_size=300, gradient_accumulation_steps=4)
    bytes_of = {}
    for world_size in 1, 8:
        compute = replace(CPU, world_size=world_size)
        bytes_of[world_size] = train.training_bytes(cfg, cfg, compute)
    sizes = model_sizes(cfg)
    kept = activation_bytes(cfg) + 8 * 300
    moments = 8 * sizes.parameters - 4 * sizes.hidden
    tokens = 16 * 128
    assert bytes_of[1] == sizes.bytes + moments + 4 * 16 * tokens + tokens * kept
    # of the 64 rows of a step 8 are each process's: half a micro-batch
    assert bytes_of[8] == sizes.bytes + moments + 16 * tokens // 2 + tokens // 2 * kept
    cfg.eval_only = True
    assert train.training_bytes(cfg, cfg, CPU) == sizes.bytes


def test_the_log_the_best_checkpoint_and_the_plot(lab):
    pytest.importorskip("matplotlib")
    run_train(lab, "--out_dir=p")
    lines = [json.loads(line) for line in open(lab / "p/log.jsonl", encoding="utf-8")]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 13))
    assert [x["step"] for x in lines if "val_loss" in x] == [0, 4, 8, 12]
    assert load(lab, "p", "ckpt_best.pt")["val_loss"] == min(
        x["val_loss"] for x in lines if "val_loss" in x and x["step"]
    )
    assert (lab / "p/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(lab / "p")) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]


def test_from_the_command_line_with_the_default_data_and_then_a_story(lab, tmp_path):
    def script(name, *argv):
        return subprocess.run(
            [sys.executable, ROOT / name, *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = script("train.py", *SMALL, "--max_iters=2")
    assert done.returncode == 0, done.stderr
    assert (
        "bits a byte" in done.stdout and "unseen stories" in done.stdout and "device=cpu" in done.stdout
    )
    written = script(
        "sample.py", "--start=Once upon a time", "--max_new_tokens=20", "--num_samples=2", "--device=cpu"
    )
    assert written.returncode == 0, written.stderr
    assert written.stdout.count("Once upon a time") == 2 and "decode" in written.stdout.splitlines()[-1]


def test_a_chunked_loss_trains_the_same(lab, monkeypatch):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    for loss in "plain", "chunked":
        if loss == "chunked":  # which does without
            monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)
        run_train(lab, f"--out_dir=loss-{loss}", f"--loss={loss}", "--gradient_checkpointing")
    assert load(lab, "loss-plain")["val_loss"] == pytest.approx(
        load(lab, "loss-chunked")["val_loss"], rel=1e-3
    )


def test_a_wandb_that_does_not_start_is_one_line_and_leaves_nothing(lab, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "def init(**keys):\n    raise RuntimeError('No API key configured.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        Refusal, match=r"wandb does not start \(No API key configured.\); WANDB_MODE=offline"
    ):
        run_train(lab, "--out_dir=logged", "--max_iters=1", "--wandb_log")
    assert not (lab / "logged").exists()


def test_other_runs_and_a_run_without_a_checkpoint_are_not_in_the_way(tmp_path):
    def moving(*argv):
        return train.is_in_the_way(configure(train.Config, [f"--out_dir={out}", *argv]))

    out = tmp_path / "out"
    for path in "demo/ckpt.pt", "lora/adapter_best.pt", "log.jsonl":
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(path)
    assert not moving()
    (out / "ckpt.pt").write_text("a run")
    with pytest.raises(Refusal, match="--init_from=resume goes on with it"):
        moving()
    assert moving("--overwrite")
    (out / "onnx").mkdir()
    folders.move_aside(out, folders.others_in(out))
    assert sorted(os.listdir(out)) == ["demo", "lora"] and sorted(
        os.listdir(next(tmp_path.glob("out.old-*")))
    ) == ["ckpt.pt", "log.jsonl", "onnx"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match="already: --overwrite moves it aside"):
        moving()


def test_embeddings_learn_so_many_times_as_fast(lab):
    result = []
    for scale in 1, 2, 4:
        run_train(
            lab,
            f"--out_dir=scale{scale}",
            "--max_iters=1",
            "--warmup_iters=0",
            f"--embd_lr_scale={scale}",
        )
        result.append(load(lab, f"scale{scale}")["model"])
    a, b, c = (model["wte.weight"] for model in result)
    torch.testing.assert_close(c - a, 3 * (b - a), rtol=1e-2, atol=1e-6)
    assert (b - a).abs().max() > 1e-4 and torch.equal(
        result[0]["blocks.0.attn.q_proj.weight"], result[2]["blocks.0.attn.q_proj.weight"]
    )


def test_toy_stories_that_are_not_scored_are_said_so(lab, tmp_path, capsys):
    with contextlib.chdir(tmp_path):
        prepare.prepare(configure(prepare.Config, ["--num_stories=9"]))
        for T in 64, 256:
            train.main(
                configure(
                    train.Config, [*SMALL, "--max_iters=1", f"--block_size={T}", f"--out_dir=out{T}"]
                )
            )
            assert "the stories are not scored: no story is whole" in capsys.readouterr().out
        prepare.prepare(
            configure(prepare.Config, ["--num_stories=40", "--overwrite"])
        )  # its validation split begins within a story
        train.main(
            configure(train.Config, [*SMALL, "--max_iters=1", "--block_size=256", "--out_dir=out40"])
        )
        assert re.search(
            r"\d unseen stories: \d+\.\d+ nats a story, \d+\.\d% above", capsys.readouterr().out
        )


# Learning


def bigram_nats(data, V):
    """Validation nats a token of a bigram model with add-0.01 counts."""
    counts = np.full((V, V), 0.01)
    np.add.at(counts, (data["train"][:-1], data["train"][1:]), 1)
    logp = np.log(counts / counts.sum(1, keepdims=True))
    return -logp[data["val"][:-1], data["val"][1:]].mean()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llama", "gpt", "gpt2"])
def test_each_architecture_trained_briefly_beats_a_bigram_model(lab, preset):
    with contextlib.chdir(lab):
        _, data, tokenizer = prepare.load("data/toy")
        train.main(
            configure(
                train.Config,
                [
                    str(ROOT / f"configs/{preset}.toml"),
                    *SMALL,
                    "--n_embd=64",
                    "--n_head=4",
                    "--batch_size=8",
                    "--max_iters=200",
                    "--eval_interval=200",
                    f"--out_dir=bigram-{preset}",
                ],
            )
        )
    assert load(lab, f"bigram-{preset}")["val_loss"] < bigram_nats(data, tokenizer.vocab_size)


@pytest.mark.slow
def test_no_model_is_below_the_floor(lab):
    """A model cannot know more about unseen stories than the grammar that wrote them. Below by 3 standard errors is a bug."""
    with contextlib.chdir(lab):
        _, data, tokenizer = prepare.load("data/toy")
        train.main(
            configure(
                train.Config,
                [
                    *SMALL,
                    "--n_embd=64",
                    "--n_head=4",
                    "--batch_size=8",
                    "--max_iters=300",
                    "--eval_interval=300",
                    "--out_dir=floor",
                ],
            )
        )
        model, _ = checkpoint.restore(load(lab, "floor"), "floor")
        texts, logp = zip(*toy_stories.stories(200, seed=99))
        nats = document_nats(model, tokenizer.encode_batch(texts), tokenizer, CPU)
        gap = np.array([losses.sum() for losses in nats]) + np.array(logp)
    assert gap.mean() > -3 * gap.std() / len(gap) ** 0.5
    assert gap.mean() < -np.mean(
        logp
    )  # and it has learned enough for the comparison to mean something: below twice the floor


def test_floor_line_compares_like_with_like(lab):
    """A model that gives every story its exact probability is at the floor: the line must say 0.0%."""
    with contextlib.chdir(lab):
        _, data, tokenizer = prepare.load("data/toy")

    class Oracle(torch.nn.Module):
        config = ModelConfig(vocab_size=tokenizer.vocab_size)

        def forward(self, idx, targets, reduction):
            nats = torch.zeros(targets.shape)
            for row, ids in zip(nats, targets):
                ids = ids[ids != -100].tolist()
                assert ids[-1] == tokenizer.eot
                row[0] = -toy_stories.log_prob(tokenizer.decode(ids[:-1]))
            return None, nats

    assert " 0.0% above" in floor_line(Oracle(), tokenizer, data["val"], CPU, n=50)
