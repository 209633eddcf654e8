"""Training: batches, rates, accumulation, resuming to the bit, and that it learns."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import ROOT, call, printed, shell
from test_model import build, tokens
from torch.overrides import TorchFunctionMode

import checkpoint_file
import dataset
import device
import folders
import memory
import prepare
import rmsnorm
import runs
import toy_stories
import train
from config import Refusal, configure
from data import count_targets, epoch_starts, training_rows
from device import has_cpp_compiler, resolve
from experts import recorded_routings
from log import Meter
from model import ModelConfig, model_config
from optim import plan_rates, saved_schedule
from rmsnorm import use_rmsnorm
from score import completion_nats, document_nats, evaluate, expert_figures, expert_line, floor_line
from sizes import activation_bytes, model_sizes
from tokenizer import Tokenizer

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
    call(prepare, "--num_stories=800", "--num_proc=1", folder=folder)
    return folder


def run_train(lab, *argv):
    call(train, *SMALL, *argv, folder=lab)


def resume(lab, out_dir, *argv):
    call(train, f"--out_dir={out_dir}", "--init_from=resume", *argv, folder=lab)


def load(lab, out_dir, name="ckpt.pt"):
    return checkpoint_file.load(str(lab / out_dir / name))


def log(lab, out_dir):
    """Returns the lines of a run's log, without the speed, which differs from run to run."""
    text = (lab / out_dir / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line.pop("tokens_per_s", None)
    return lines


def copied(model):
    """Returns a copy of the model's parameters, in their order."""
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    """Returns whether two values of a checkpoint are equal, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Batches


def test_targets_are_inputs_shifted_by_one_and_an_epoch_sees_each_block_once():
    data = np.arange(1000, dtype=np.uint16)
    T = 10
    seed = 7
    per_epoch = len(epoch_starts(len(data), T, seed, 0))
    assert per_epoch == 99
    batch = training_rows(data, T, seed, 0, per_epoch)
    assert batch["idx"].dtype == torch.int64
    assert torch.equal(batch["idx"] + 1, batch["targets"])
    first = batch["idx"][:, 0]
    second = training_rows(data, T, seed, per_epoch, per_epoch)["idx"][:, 0]
    for starts in first, second:
        assert (starts.sort().values.diff() == T).all()
    assert not (first.diff() > 0).all()
    assert not torch.equal(first - first.min(), second - second.min())
    # epochs are cut anywhere: over some of them each token is a row's first
    for n_tokens in 1000, 1001, 1009:
        cuts = {epoch_starts(n_tokens, T, seed, epoch).min() for epoch in range(60)}
        assert cuts == set(range(T))


def test_a_row_depends_on_its_number_alone():
    data = np.arange(5000, dtype=np.uint16)

    def rows(seed, first, n):
        return training_rows(data, 16, seed, first, n)["idx"]

    whole = rows(1, 0, 640)
    assert torch.equal(whole, torch.cat([rows(1, first, 5) for first in range(0, 640, 5)]))
    assert not torch.equal(whole, rows(2, 0, 640))


@pytest.mark.parametrize("n", [11, 12, 19, 20, 21, 25, 30, 31])
def test_rows_stay_inside_a_short_split(n):
    for seed in range(20):
        batch = training_rows(np.arange(n, dtype=np.uint16), 10, seed, 0, 5)
        assert batch["targets"].shape == (5, 10)
        assert torch.equal(batch["idx"] + 1, batch["targets"])


def test_a_split_of_one_token_more_than_the_context_is_the_shortest():
    cfg = configure(train.Config, ["--block_size=10"])
    runs.check_data(cfg, "data/d", {"train": np.arange(11)}, None)
    with pytest.raises(Refusal, match="has 10 tokens, not enough for block_size=10"):
        runs.check_data(cfg, "data/d", {"train": np.arange(10)}, None)


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
    assert lr[0] == pytest.approx(1e-2 / 101)
    assert lr[99] == pytest.approx(1e-2 * 100 / 101)
    assert lr[100] == max(lr) == 1e-2
    assert 1e-3 < lr[999] < 1.03e-3
    assert lr[1000] == 1e-3
    assert lr[100:] == sorted(lr[100:], reverse=True)
    middle = {"cosine": 5.5e-3, "linear": 1e-2}[schedule]
    assert lr[550] == pytest.approx(middle)
    cfg.lr_decay_iters = 500
    assert train.get_lr(500, cfg) == train.get_lr(900, cfg) == 1e-3


def test_a_finished_run_is_lengthened_at_the_highest_rate_and_to_the_bit(lab, capsys):
    """In one stage, and in one that was interrupted; both by hand as well."""
    short = ["--max_iters=4", "--warmup_iters=2", "--dropout=0.1"]

    def resume(out_dir, *argv):
        output = printed(capsys, train, f"--out_dir={out_dir}", "--init_from=resume", *argv, folder=lab)
        return [line for line in output.splitlines() if "learning rate" in line]

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
@pytest.mark.parametrize("tie, mlp", [(True, "swiglu"), (False, "moe")])
def test_each_parameter_is_in_one_group_by_role(optimizer, tie, mlp):
    model = build("layernorm", pos="learned", tie=tie, mlp=mlp)
    settings = dict(weight_decay=0.3, embd_lr_scale=2.5, beta1=0.7, beta2=0.8, momentum=0.6)
    optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer, **settings), CPU)
    groups = [(type(o).__name__, group) for o in optimizers for group in o.param_groups]
    roles = [(id(p), (name, group)) for name, group in groups for p in group["params"]]
    assert len(roles) == len(dict(roles)) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        is_muons = p.dim() > 1 and "blocks" in name and optimizer == "muon"
        kind, group = dict(roles)[id(p)]
        assert kind == ("Muon" if is_muons else "AdamW"), name
        assert group["weight_decay"] == (0.0 if p.dim() == 1 else 0.3), name
        assert group["lr_scale"] == (2.5 if optimizer == "muon" and not is_muons else 1.0), name
        assert group["momentum"] == 0.6 if is_muons else group["betas"] == (0.7, 0.8), name
        assert is_muons or group["eps"] == signature(torch.optim.AdamW).parameters["eps"].default, name


def test_muon_multiplies_in_the_dtype_of_the_run_but_in_no_float16():
    for name in "float32", "bfloat16", "float16":
        compute = replace(CPU, dtype_name=name)
        _, muon = train.make_optimizers(build(), train.Config(optimizer="muon"), compute)
        assert muon.dtype == (torch.float32 if name == "float16" else compute.dtype)


def test_frozen_parameters_are_in_no_group():
    model = build()
    model.wte.weight.requires_grad_(False)
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert not any(p is model.wte.weight for group in groups for p in group["params"])


def largest_distance(params, reference, start):
    """Returns the largest distance of a parameter to its reference, as a share of the step to that."""
    return max(
        ((p - r).abs().max() / (r - s).abs().max()).item() for p, r, s in zip(params, reference, start)
    )


def unequal_rows():
    """Returns idx and targets (6, T) whose rows have unequal numbers of targets."""
    idx, targets = tokens(6), tokens(6, seed=2)
    targets[0, :15] = -100
    targets[1, :3] = -100
    targets[4, 5:] = -100
    return idx, targets


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_k_accumulation_steps_are_one_k_times_batch(optimizer, dtype):
    """Within 8 times what the order of summation changes, which is measured on shuffled rows."""
    compute = resolve("cpu", dtype, "false")
    idx, targets = unequal_rows()
    start = copied(build())

    def update(order, sizes):
        model = build().train()
        cfg = train.Config(optimizer=optimizer, learning_rate=1e-2)
        optimizers = train.make_optimizers(model, cfg, compute)
        # AdamW's first step is as long for a gradient of 1e-9; a large eps keeps it in proportion
        for group in optimizers[0].param_groups:
            group["eps"] = 1.0
        parts = zip(idx[order].split(sizes), targets[order].split(sizes))
        batches = [{"idx": i, "targets": t} for i, t in parts]
        loss, norm = train.train_step(model, optimizers, batches, compute, (0, 0), grad_clip=1.0)
        return loss.item(), norm.item(), copied(model)

    in_order = torch.arange(6)
    loss, norm, params = update(in_order, [2, 2, 2])
    rounding = 0
    for seed in range(4):
        shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        _, _, others = update(shuffled, [2, 2, 2])
        rounding = max(rounding, largest_distance(others, params, start))
    # Muon's iteration in bfloat16 enlarges it
    assert 0 < rounding < {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    for sizes in [6], [1, 5], [1] * 6:
        other_loss, other_norm, others = update(in_order, sizes)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-3)
        assert largest_distance(others, params, start) < 8 * rounding


def test_balance_is_learned_alike_whatever_the_micro_batches():
    """In float64, of rows with unequal numbers of targets and of tokens; the loss is that without it."""
    idx, targets = unequal_rows()
    doc = torch.zeros_like(idx)
    doc[4, 5:] = -1

    def gradient(sizes, balance=0.5):
        model = build(mlp="moe").double().train()
        model.balance = balance
        before = copied(model)
        parts = zip(idx.split(sizes), targets.split(sizes), doc.split(sizes))
        batches = [{"idx": i, "targets": t, "doc": d} for i, t, d in parts]
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        loss, _ = train.train_step(model, [sgd], batches, CPU)
        return loss, [a - b for a, b in zip(before, copied(model))]

    loss, expected = gradient([6])
    for sizes in [2, 2, 2], [1, 5], [1] * 6:
        _, other = gradient(sizes)
        for a, b in zip(other, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    plain_loss, plain = gradient([6], balance=0.0)
    assert loss == plain_loss
    assert max((a - b).abs().max() for a, b in zip(plain, expected)) > 1e-3


def test_a_placed_model_is_trained_as_the_settings_say():
    """model.py's tests say what these do; without it experts would be spread by the default, whatever is given."""

    def router_gradient(model):
        batch = {"idx": tokens(), "targets": tokens(seed=2)}
        train.next_token_loss(model.train(), batch).backward()
        return model.blocks[0].mlp.router.weight.grad

    gradients = []
    for balance in 0.0, 0.5:
        expected = build(mlp="moe")
        expected.balance = balance
        gradients.append(router_gradient(expected))
        placed = build(mlp="moe")
        assert train.place(placed, train.Config(balance=balance), CPU) is placed
        assert torch.equal(router_gradient(placed), gradients[-1])
        assert not placed.gradient_checkpointing and not placed.chunked_loss
    assert not torch.equal(*gradients)
    assert train.place(build(), train.Config(gradient_checkpointing=True), CPU).gradient_checkpointing


def test_a_loss_that_is_not_finite_changes_nothing():
    model = build()
    model.norm.weight.data[0] = math.nan
    before = copied(model)
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    loss, _ = train.train_step(model, optimizers, [{"idx": tokens(), "targets": tokens()}], CPU)
    assert math.isnan(loss)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.parameters(), before))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer):
    """Weights, moments and counts of steps: a run with such steps is, to the bit, the one without."""

    def scaled_loss(model, batch):
        batch = dict(batch)
        factor = batch.pop("factor")
        return factor * train.next_token_loss(model, batch)

    def states_after(factors):
        model = build().train()
        optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer), CPU)
        step = 0
        for factor in factors:
            batch = {"idx": tokens(seed=step), "targets": tokens(seed=step + 9), "factor": factor}
            loss, norm = train.train_step(
                model, optimizers, [batch], CPU, (0, step), grad_clip=1.0, loss_fn=scaled_loss
            )
            usable = train.is_usable(loss.item(), norm.item(), None)
            assert usable == (factor == 1.0)
            if usable:
                step += 1
        return model.state_dict(), [o.state_dict()["state"] for o in optimizers]

    assert same(states_after([1.0, 1.0, 1.0]), states_after([1.0, math.nan, 1.0, math.inf, 1.0]))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_loss_scaler_changes_nothing_where_all_is_finite(optimizer):
    """To the bit, as its scale is a power of 2: losses and norms, which the log has, and weights."""

    def trained(scaler):
        model = build().train()
        optimizers = train.make_optimizers(model, train.Config(optimizer=optimizer), CPU)
        figures = []
        for step in range(4):
            halves = zip(tokens(seed=step).split(1), tokens(seed=step + 9).split(1))
            batches = [{"idx": idx, "targets": targets} for idx, targets in halves]
            figures += train.train_step(
                model, optimizers, batches, CPU, (0, step), grad_clip=0.5, scaler=scaler
            )
        return torch.stack(figures), copied(model)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    assert same(trained(scaler), trained(None))
    assert scaler.get_scale() == 16.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_with_a_loss_scaler_one_bad_gradient_skips_all_optimizers(bad, grad_clip):
    model = build().train()
    optimizers = train.make_optimizers(model, train.Config(), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batch = {"idx": tokens(), "targets": tokens(seed=9)}

    def step():
        return train.train_step(model, optimizers, [batch], CPU, grad_clip=grad_clip, scaler=scaler)

    step()
    before = copied(model)
    weight = model.blocks[0].attn.q_proj.weight  # one of Muon's
    hook = weight.register_hook(lambda grad: grad * bad)
    loss, norm = step()
    assert train.is_usable(loss.item(), norm.item(), scaler)
    assert not math.isfinite(norm)
    assert same(copied(model), before)
    assert scaler.get_scale() == 2.0
    hook.remove()
    step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_optimizers_of_another_device_go_on():
    """AdamW is fused on a CPU and on CUDA, and not on MPS; a checkpoint keeps what it was."""
    model = build().train()
    cfg = train.Config(optimizer="adamw")
    optimizers = train.make_optimizers(model, cfg, CPU)
    saved = [optimizer.state_dict() for optimizer in optimizers]
    for group in saved[0]["param_groups"]:
        group["fused"] = False
    ckpt = {"step": 0, "optimizers": saved, "losses": [], "scaler": {}}
    train.load_optimizers(optimizers, None, ckpt, cfg)
    assert all(group["fused"] for group in optimizers[0].param_groups)
    before = copied(model)
    train.train_step(model, optimizers, [{"idx": tokens(), "targets": tokens(seed=9)}], CPU)
    assert not same(copied(model), before)


def test_a_run_whose_loss_is_not_finite_names_the_step_and_keeps_its_checkpoint(lab, monkeypatch):
    """Step 6 has no targets here, so that its loss is divided by zero."""
    batches = train.Pretraining.batches

    def counted_batches(self, step):
        count = 0 if step == 6 else 64
        return [batch | {"count": count} for batch in batches(self, step)]

    def count(batch):
        return torch.tensor(batch.pop("count"))

    monkeypatch.setattr(train.Pretraining, "batches", counted_batches)
    monkeypatch.setattr(train.Pretraining, "count", staticmethod(count))
    message = (
        "the loss is (nan|inf) and its gradient norm .* at step 6; "
        ".*the last checkpoint in naned is as it was"
    )
    with pytest.raises(Refusal, match=message) as e:
        run_train(lab, "--out_dir=naned", "--log_interval=5")
    assert e.value.status == 1
    assert load(lab, "naned")["step"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_targets_are_counted_exactly(dtype):
    """At one nat a target the mean is 1 to the bit: a sum in bfloat16 would stop at 256."""
    compute = resolve("cpu", dtype, "false")

    class OneNat(torch.nn.Module):
        def forward(self, idx, targets, reduction):
            return None, (targets != -100).sum().float()

    assert evaluate(OneNat(), np.zeros(100_001, np.uint16), 24, 700, compute) == 1.0
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
    model = build()
    ids = tokens(1, 107)
    data = ids[0].numpy().astype(np.uint16)
    nats = 0.0
    with torch.no_grad():
        for i in range(0, 106, 24):
            block = ids[:, i : i + 25]
            nats += model(block[:, :-1], block[:, 1:], reduction="sum")[1].item()
    assert evaluate(model, data, 24, 2, CPU) == pytest.approx(nats / 106, rel=1e-5)
    blocks = [evaluate(model, data[i : i + 25], 24, 2, CPU) for i in range(0, 106, 24)]
    # five blocks, the last of 10 targets: 48 targets are the first block's and the last's
    spread = (24 * blocks[0] + 10 * blocks[4]) / 34
    assert evaluate(model, data, 24, 2, CPU, tokens=48) == pytest.approx(spread, rel=1e-5)
    assert evaluate(model, data[:25], 24, 2, CPU, tokens=48) == pytest.approx(blocks[0], rel=1e-5)


class WithoutFloat64(TorchFunctionMode):
    """Stands in for mps, which has no float64: refuses double() of a tensor that cpu() has not returned."""

    def __enter__(self):
        self.on_host = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double and not any(args[0] is x for x in self.on_host):
            raise TypeError("Cannot convert a MPS Tensor to float64")
        result = function(*args, **kwargs or {})
        if function is torch.Tensor.cpu:
            self.on_host.append(result)
        return result


def test_figures_need_no_float64_of_the_device():
    model = build(mlp="moe")
    tokenizer = Tokenizer.char(["abc "])
    data = tokens(1, 108)[0].numpy().astype(np.uint16)

    def figures():
        return [
            evaluate(model, data, 24, 2, CPU),
            expert_figures(model, data, 24, 2, CPU),
            document_nats(model, [[1, 2, 3]], tokenizer, CPU)[0].tolist(),
            completion_nats(model, tokenizer, [("a", "b c")], CPU).tolist(),
        ]

    expected = figures()
    with WithoutFloat64():
        assert figures() == expected


def test_the_speed_is_that_of_all_processes_while_they_train(monkeypatch):
    """By a clock that stands still: 32 tokens in each of two processes a step."""
    now = 0.0
    monkeypatch.setattr("log.time.perf_counter", lambda: now)
    monkeypatch.setattr("log.peak_flops", lambda device, dtype: 1e6)
    meter = Meter(SimpleNamespace(flops_per_token=500), replace(CPU, world_size=2))
    batches = [{"idx": torch.zeros(3, 8)}, {"idx": torch.zeros(1, 8)}]
    for n_steps, speed in (1, 16), (4, 64), (1, 16):
        for _ in range(n_steps):
            meter.add(batches)
        now += 3
        with meter.paused():
            now += 100
        now += 1
        assert meter.measure() == meter.speed == {"tokens_per_s": speed, "mfu": speed * 500 / 1e6 / 2}
    monkeypatch.setattr("log.peak_flops", lambda device, dtype: None)  # no data sheet has it
    meter = Meter(SimpleNamespace(flops_per_token=500), CPU)
    now += 1
    assert meter.measure() == {"tokens_per_s": 0}


def test_dead_experts_are_named():
    """Shares and entropies against a count by hand, and an expert whose score is never among the first two."""
    model = build(mlp="moe", qk_norm=False)
    data = tokens(1, 108)[0].numpy().astype(np.uint16)
    figures = expert_figures(model, data, 24, 2, CPU)
    with torch.no_grad(), recorded_routings(model) as routings:
        for start in range(0, 107, 24):
            model.hidden(tokens(1, 108)[:, start : min(start + 24, 107)])
    for layer in range(2):
        experts = torch.cat([experts[0] for _, experts in routings[layer::2]])
        probabilities = torch.cat([probabilities[0] for probabilities, _ in routings[layer::2]])
        assert len(experts) == 107
        shares = [(experts == expert).any(1).float().mean().item() for expert in range(8)]
        assert figures["expert_share"][layer] == pytest.approx(shares, abs=1e-5)
        entropy = torch.distributions.Categorical(probabilities).entropy().mean().item()
        assert figures["router_entropy"][layer] == pytest.approx(entropy, abs=1e-4)
    line = expert_line(figures, len(data), 0.01)
    assert line.startswith("no expert is dead: each got ")
    assert "of 108 validation tokens" in line

    router = model.blocks[1].mlp.router.weight.data
    router[1] = 2 * router[0]
    router[2:4] = -router[:2]  # 0 and 1, or 2 and 3, are above 0
    router[7] = 0
    figures = expert_figures(model, data, 24, 2, CPU)
    dead = [expert for expert in range(8) if figures["expert_share"][1][expert] == 0]
    assert 7 in dead
    line = expert_line(figures, len(data), 0.01)
    assert f"{len(dead)} experts are dead" in line
    assert "7 in layer 1" in line
    assert "--balance above 0.01" in line
    assert expert_figures(build(), data, 24, 2, CPU) == {}


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e9])
def test_a_gradient_is_clipped_to_its_norm(clip):
    model = build()
    before = copied(model)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = {"idx": tokens(), "targets": tokens()}
    _, norm = train.train_step(model, [sgd], [batch], CPU, grad_clip=clip)
    step = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before)])
    assert norm > 0.2
    assert step.norm().item() == pytest.approx(min(norm.item(), clip or math.inf), rel=1e-3)


# Whole runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(lab, optimizer, dtype):
    whole_dir, parts_dir = f"whole-{optimizer}-{dtype}", f"parts-{optimizer}-{dtype}"
    argv = [
        f"--optimizer={optimizer}",
        "--dropout=0.1",
        "--gradient_accumulation_steps=2",
        f"--dtype={dtype}",
    ]
    run_train(lab, *argv, f"--out_dir={whole_dir}")
    run_train(lab, *argv, f"--out_dir={parts_dir}", "--max_iters=8", "--lr_decay_iters=12")
    resume(lab, parts_dir, "--max_iters=12")
    whole, parts = load(lab, whole_dir), load(lab, parts_dir)
    assert whole["step"] == parts["step"] == 12
    assert parts["config"]["dtype"] == dtype
    for key in "model", "optimizers", "val_loss", "best_val_loss":
        assert same(whole[key], parts[key]), key
    assert log(lab, whole_dir) == log(lab, parts_dir)


@pytest.fixture
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_and_learns_what_a_plain_one_does(
    lab, four_threads, monkeypatch
):
    """With enough rows that threads share out the embedding's gradient. What auto compiled stays so when it is resumed,
    where auto would compile it no longer.
    """
    if not has_cpp_compiler():
        pytest.skip("needs a C++ compiler")
    argv = [
        "--dtype=float32",
        "--batch_size=64",
        "--max_iters=30",
        "--eval_interval=10",
    ]
    run_train(lab, *argv, "--compile=true", "--out_dir=whole-compiled")
    with monkeypatch.context() as patch:
        patch.setattr(device, "choose_cpu_compile", lambda *_: (True, "compile=True (pays)"))
        run_train(lab, *argv, "--out_dir=parts-compiled", "--max_iters=10", "--lr_decay_iters=30")
    resume(lab, "parts-compiled", "--max_iters=30")
    run_train(lab, *argv, "--out_dir=plain")
    whole, parts, plain = (load(lab, name) for name in ("whole-compiled", "parts-compiled", "plain"))
    assert plain["config"]["compile"] == "auto"
    assert parts["config"]["compile"] == "true"
    for key in "model", "optimizers", "val_loss", "best_val_loss":
        assert same(whole[key], parts[key]), key
    assert log(lab, "whole-compiled") == log(lab, "parts-compiled")
    assert whole["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_cpp_compiler(),
    reason="needs a processor with AVX-512, and a C++ compiler",
)
def test_a_processors_compiled_code_is_not_anothers(lab, tmp_path):
    """In one cache: code for vectors of 16 numbers, compiled where they have 8, computes half of the numbers."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for name, more in ("wide", {}), ("narrow", {"ATEN_CPU_CAPABILITY": "avx2"}):
        argv = [*SMALL, "--max_iters=2", "--compile=true", f"--out_dir={name}"]
        assert shell("train", *argv, folder=lab, env=environment | more).returncode == 0
    for wide, narrow in zip(log(lab, "wide"), log(lab, "narrow")):
        assert narrow == pytest.approx(wide, rel=1e-4)


def test_experts_stop_and_resume_to_the_bit_and_are_logged(lab, capsys):
    argv = ["--mlp=moe", "--n_inner=12", "--n_expert=4", "--gradient_accumulation_steps=2"]
    run_train(lab, *argv, "--out_dir=whole-moe")
    output = capsys.readouterr().out
    assert "are active for a token" in output
    assert "expert is dead" in output or "experts are dead" in output
    run_train(lab, *argv, "--out_dir=parts-moe", "--max_iters=8", "--lr_decay_iters=12")
    resume(lab, "parts-moe", "--max_iters=12")
    whole, parts = load(lab, "whole-moe"), load(lab, "parts-moe")
    for key in "model", "optimizers", "val_loss":
        assert same(whole[key], parts[key]), key
    assert log(lab, "whole-moe") == log(lab, "parts-moe")
    last = [line for line in log(lab, "whole-moe") if "val_loss" in line][-1]
    assert [len(shares) for shares in last["expert_share"]] == [4, 4]
    for shares, entropy in zip(last["expert_share"], last["router_entropy"]):
        assert sum(shares) == pytest.approx(2, abs=1e-4)
        assert 0 < entropy <= math.log(4)


def test_a_setting_that_came_later_has_its_default():
    older = asdict(ModelConfig(n_embd=96, n_head=2, vocab_size=300))
    del older["head_dim"]
    ckpt = {"config": {}, "model_config": older}
    plain = configure(train.Config, [])
    changed = configure(train.Config, ["--head_dim=16"])
    for resumed in True, False:
        assert runs.inherit(plain, ckpt, "old.pt", resumed).head_dim == 48
        with pytest.raises(Refusal, match="head_dim=0, which cannot become 16"):
            runs.inherit(changed, ckpt, "old.pt", resumed)


def test_a_setting_of_0_is_what_the_checkpoints_own_make_of_it():
    """As n_kv_head in configs/llama.toml, and not what the default n_head makes of it."""
    c = ModelConfig(n_embd=96, n_head=6, n_kv_head=6, vocab_size=300)
    for resumed in True, False:
        cfg = configure(train.Config, [f"--{key}=0" for key in ("n_kv_head", "head_dim", "n_inner")])
        cfg = runs.inherit(cfg, {"config": {}, "model_config": asdict(c)}, "x.pt", resumed)
        assert model_config(cfg) == c
        cfg = configure(train.Config, ["--n_kv_head=0"])
        grouped = {"config": {}, "model_config": asdict(replace(c, n_kv_head=2))}
        with pytest.raises(Refusal, match="n_kv_head=2, which cannot become 6"):
            runs.inherit(cfg, grouped, "x.pt", resumed)


def test_resume_keeps_the_settings_and_refuses_another_model_or_data(lab):
    run_train(lab, "--out_dir=r", "--weight_decay=0.3")
    for key, message in (
        ("--n_layer=3", "n_layer=2"),
        ("--dataset=other", "dataset"),
        ("--pos=alibi", "pos"),
        ("--seed=3", "seed"),
    ):
        with pytest.raises(Refusal, match=message):
            resume(lab, "r", key)
    # the same n_layer is no change
    resume(lab, "r", "--max_iters=16", "--n_layer=2", "--learning_rate=1e-4", "--momentum=0.5")
    ckpt = load(lab, "r")
    assert ckpt["step"] == 16
    assert ckpt["config"]["weight_decay"] == 0.3
    assert ckpt["config"]["learning_rate"] == 1e-4
    adamw, muon = ckpt["optimizers"]
    assert adamw["param_groups"][0]["weight_decay"] == 0.3
    assert muon["param_groups"][0]["momentum"] == 0.5


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
    [aside] = lab.glob("o.old-*")
    assert (aside / "ckpt.pt").read_bytes() == before
    assert load(lab, "o")["step"] == 2


def test_init_from_a_checkpoint_takes_its_weights_and_shape(lab):
    run_train(lab, "--out_dir=a", "--max_iters=4")
    argv = ["--out_dir=b", "--max_iters=1", "--learning_rate=1e-9", "--device=cpu"]
    call(train, "--init_from=a", *argv, folder=lab)
    a, b = load(lab, "a", "ckpt_best.pt"), load(lab, "b")
    assert b["step"] == 1
    assert b["model_config"] == a["model_config"]
    for name, weight in a["model"].items():
        assert (weight - b["model"][name]).abs().max() < 1e-6, name


def test_eval_only_prints_the_saved_loss_and_writes_nothing(lab, capsys):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in (lab / "e").iterdir()}

    run_train(lab, "--out_dir=e", "--max_iters=4", "--eval_tokens=0")
    before = times()
    capsys.readouterr()
    resume(lab, "e", "--eval_only", "--device=cpu", "--dtype=float32")
    assert f"{load(lab, 'e')['val_loss']:.4f} nats a token" in capsys.readouterr().out
    assert times() == before


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
            "--learning_rate=1e5",
            "--grad_clip=0",
            "--lr_decay_iters=1000",
        )
    assert e.value.status == 1
    assert (lab / "n/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "argv, refusal",
    [
        (["--learning_rate=1e308"], "1e36 at most"),
        (["--embd_lr_scale=1e308"], "1e36 at most"),
        (["--learning_rate=1e200", "--embd_lr_scale=1e200"], "1e36 at most"),
        (["--weight_decay=1e308"], "1e36 at most"),
        ([f"--warmup_iters={2**63}"], "warmup_iters must .* below 2\\^63"),
        ([f"--max_iters={10**400}"], "max_iters must .* below 2\\^63"),
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
        assert all(
            weight.isfinite().all() for weight in checkpoint_file.load(str(path))["model"].values()
        )


@pytest.fixture(scope="module")
def torch_bytes():
    """The addresses that a process takes for torch: 0.6 GiB, or of a build for CUDA 3.1."""
    code = (
        "import torch; print(*[line for line in open('/proc/self/status') if line.startswith('VmPeak')])"
    )
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc")
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return 1024 * int(output.split()[1])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--block_size=60000", "--batch_size=1", "--pos=alibi"], "this needs more than 54 GiB"),
        (["--block_size=32", "--batch_size=100000"], "this needs more than"),
        # what a step takes beyond what is foreseen: a third copy of the logits
        pytest.param(
            ["--block_size=32", "--batch_size=7500", "--gradient_checkpointing"],
            "out of memory: a smaller batch_size or block_size or n_layer or n_embd takes less",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_want_of_memory_is_one_line(lab, argv, message, torch_bytes):
    """Where 2.4 GiB beside torch are allowed, as by ulimit -v."""
    resource = pytest.importorskip("resource")
    limits = 2 * [torch_bytes + int(2.4 * 2**30)]
    result = shell(
        "train",
        *SMALL,
        *argv,
        "--out_dir=small-machine",
        folder=lab,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    assert result.returncode in (1, 2)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("train.py: ")
    assert message in error
    assert "Traceback" not in result.stderr


def test_only_what_this_process_takes_is_counted():
    cfg = train.Config(vocab_size=300, gradient_accumulation_steps=4)
    bytes_of = {}
    for world_size in 1, 8:
        compute = replace(CPU, world_size=world_size)
        bytes_of[world_size] = memory.training_bytes(cfg, cfg, compute)
    sizes = model_sizes(cfg)
    kept = activation_bytes(cfg, partial(use_rmsnorm, ops=rmsnorm.CPU)) + 8 * 300
    moments = 8 * sizes.parameters - 4 * sizes.hidden
    tokens = 16 * 128
    assert bytes_of[1] == sizes.bytes + moments + 4 * 16 * tokens + tokens * kept
    # of the 64 rows of a step 8 are each process's: half a micro-batch
    assert bytes_of[8] == sizes.bytes + moments + 16 * tokens // 2 + tokens // 2 * kept
    # nobody asked for the compiler that auto takes, so that a run which is too large is still refused
    compiled = replace(CPU, compile=True)
    assert memory.training_bytes(cfg, cfg, compiled) == bytes_of[1]
    cfg.compile = "true"
    assert memory.training_bytes(cfg, cfg, compiled) < bytes_of[1]
    cfg.eval_only = True
    assert memory.training_bytes(cfg, cfg, CPU) == sizes.bytes


@pytest.mark.parametrize(
    "line, folder, name",
    [
        ("0::/job_7/step_0", "", "memory.max"),
        ("4:memory:/job_7/step_0", "memory/", "memory.limit_in_bytes"),
    ],
)
def test_the_memory_of_a_schedulers_job_is_what_a_process_has(line, folder, name, tmp_path, monkeypatch):
    """The least of its own group of processes and of those that this one is in, in both versions of cgroups."""
    (tmp_path / "own").write_text(f"9:cpuset:/elsewhere\n{line}\n")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    assert memory.group_limits() == []
    step = tmp_path / folder / "job_7/step_0"
    step.mkdir(parents=True)
    (step / name).write_text("max\n")
    (step.parent / name).write_text("3000000\n")
    assert memory.machine_memory() == 3000000
    (step / name).write_text("2000000\n")
    (tmp_path / folder / name).write_text("9000000\n")
    assert memory.machine_memory() == 2000000
    with pytest.raises(Refusal, match="this needs more than 0 GiB and cpu has 0: advice"):
        memory.check_memory(torch.device("cpu"), 2000001, "advice")


def test_memory_is_foreseen_without_the_import_of_torchs_compiler():
    """Which would take a second of each start."""
    lines = [
        "import sys, memory, train",
        "from device import resolve",
        "memory.check_training_memory(train.Config(vocab_size=300), resolve('cpu'))",
        "sys.exit('torch._dynamo' in sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


def test_the_log_the_best_checkpoint_and_the_plot(lab):
    pytest.importorskip("matplotlib")
    run_train(lab, "--out_dir=p$^$")  # no formula
    lines = log(lab, "p$^$")
    val_losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert list(val_losses) == [0, 4, 8, 12]
    _, data, tokenizer = dataset.load(lab / "data/toy")
    ids = data["val"]
    n_bytes = len(tokenizer.decode(ids[ids != tokenizer.eot].tolist()).encode())
    bits = [line["val_bits_per_byte"] for line in lines if "val_loss" in line]
    assert bits == pytest.approx(
        [nats * len(ids) / math.log(2) / n_bytes for nats in val_losses.values()]
    )
    del val_losses[0]  # before the first step there is nothing to save
    assert load(lab, "p$^$", "ckpt_best.pt")["val_loss"] == min(val_losses.values())
    assert (lab / "p$^$/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(lab / "p$^$")) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl", "loss.png"]


def test_a_loss_in_the_log_is_the_mean_of_its_steps_and_the_last_one_that_of_the_whole_split(
    lab, capsys
):
    argv = [*SMALL, "--n_layer=1", "--max_iters=6", "--eval_interval=6", "--eval_tokens=128"]
    losses = []
    for n in 1, 3:
        output = printed(capsys, train, *argv, f"--log_interval={n}", f"--out_dir=each-{n}", folder=lab)
        losses.append([line["loss"] for line in log(lab, f"each-{n}") if "loss" in line])
    each, means = losses
    assert means == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])
    model, _ = checkpoint_file.restore(load(lab, "each-3"), "each-3")
    _, data, _ = dataset.load(lab / "data/toy")
    loss = evaluate(model, data["val"], model.config.block_size, 4, CPU)
    assert f"tokens: {loss:.4f} nats a token" in output


def test_the_best_checkpoint_is_the_best_of_all_parts_of_a_run(lab, monkeypatch):
    """And of equal ones the first. The losses of evaluations are given, as those of a short run only fall."""
    validate = train.Pretraining.validate
    losses = iter([9.0, 2.0, 2.5, 2.0])  # before the first step, and after 2, 4 and 6

    def given(task, tokens=None):
        figures = validate(task, tokens)
        return figures if tokens == 0 else figures | {"val_loss": next(losses)}

    saved = {}  # the last evaluation's loss in the checkpoint of each step
    save = train.Pretraining.save

    def noted(task, name, state):
        saved[state.step] = state.val_loss
        save(task, name, state)

    monkeypatch.setattr(train.Pretraining, "validate", given)
    monkeypatch.setattr(train.Pretraining, "save", noted)
    run_train(lab, "--out_dir=up", "--max_iters=2", "--eval_interval=2", "--n_layer=1")
    resume(lab, "up", "--max_iters=6", "--save_minutes=1e-9")
    assert saved == {2: 2.0, 3: 2.0, 4: 2.5, 5: 2.5, 6: 2.0}
    last, best = load(lab, "up"), load(lab, "up", "ckpt_best.pt")
    assert (last["step"], best["step"]) == (6, 2)
    assert last["best_val_loss"] == last["val_loss"] == best["val_loss"] == 2.0


def test_from_the_command_line_with_the_default_data_and_then_a_story(tmp_path):
    result = shell("train", *SMALL, "--max_iters=2", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in "bits a byte", "unseen stories", "device=cpu":
        assert words in result.stdout
    start = "--start=Once upon a time"
    argv = [start, "--max_new_tokens=20", "--num_samples=2", "--device=cpu"]
    result = shell("sample", *argv, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Once upon a time") == 2
    assert "decode" in result.stdout.splitlines()[-1]


def test_a_chunked_loss_trains_the_same(lab, monkeypatch):
    run_train(lab, "--out_dir=loss-plain", "--loss=plain", "--gradient_checkpointing")
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 5000)
    run_train(lab, "--out_dir=loss-chunked", "--loss=chunked", "--gradient_checkpointing")
    plain, chunked = load(lab, "loss-plain"), load(lab, "loss-chunked")
    assert plain["val_loss"] == pytest.approx(chunked["val_loss"], rel=1e-3)


def test_a_wandb_that_does_not_start_is_one_line_and_leaves_nothing(lab, tmp_path, monkeypatch):
    code = "def init(**keys):\n    raise RuntimeError('No API key configured.')\n"
    (tmp_path / "wandb.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"wandb does not start \(No API key configured.\); WANDB_MODE=offline"
    with pytest.raises(Refusal, match=message):
        run_train(lab, "--out_dir=logged", "--max_iters=1", "--wandb_log")
    assert not (lab / "logged").exists()


def test_other_runs_and_a_run_without_a_checkpoint_are_not_in_the_way(tmp_path):
    out = tmp_path / "out"

    def is_in_the_way(*argv):
        return runs.is_in_the_way(configure(train.Config, [f"--out_dir={out}", *argv]))

    checkpoints = "demo/ckpt.pt", "lora/adapter_best.pt"
    exports = "demo-hf/config.json", "demo.gguf", "bench_decode.png"
    for path in *checkpoints, *exports, "log.jsonl":
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(path)
    assert not is_in_the_way()
    (out / "ckpt.pt").write_text("a run")
    with pytest.raises(Refusal, match="--init_from=resume goes on with it"):
        is_in_the_way()
    assert is_in_the_way("--overwrite")
    (out / "onnx").mkdir()
    folders.move_aside(out, folders.others_in(out))
    [aside] = tmp_path.glob("out.old-*")
    assert sorted(os.listdir(out)) == ["demo", "lora"]
    exported = ["bench_decode.png", "ckpt.pt", "demo-hf", "demo.gguf", "log.jsonl", "onnx"]
    assert sorted(os.listdir(aside)) == exported
    (out / "thesis.txt").write_text("not ours")
    with pytest.raises(Refusal, match="already: --overwrite moves it aside"):
        is_in_the_way()


def test_what_is_in_a_linked_out_dir_is_moved_aside_on_its_own_disk(tmp_path):
    disk = tmp_path / "disk"
    (disk / "out").mkdir(parents=True)
    (disk / "out/ckpt.pt").touch()
    out = tmp_path / "out"
    out.symlink_to(disk / "out")
    folders.move_aside(f"{out}/", folders.others_in(out))
    [aside] = disk.glob("out.old-*")
    assert os.listdir(aside) == ["ckpt.pt"]
    assert out.is_symlink() and os.listdir(out) == []


def test_the_current_folder_is_not_moved_aside(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for folder in tmp_path, here:
        (folder / "thesis.txt").write_text("not ours")
    monkeypatch.chdir(here)
    for out_dir in ".", "..", here:
        with pytest.raises(Refusal, match="cannot be written: the current folder is in it"):
            runs.is_in_the_way(configure(train.Config, [f"--out_dir={out_dir}", "--overwrite"]))


def test_embeddings_learn_so_many_times_as_fast(lab):
    embeddings = {}
    projections = {}
    for scale in 1, 2, 4:
        out_dir = f"scale{scale}"
        argv = ["--max_iters=1", "--warmup_iters=0", f"--embd_lr_scale={scale}"]
        run_train(lab, *argv, f"--out_dir={out_dir}")
        weights = load(lab, out_dir)["model"]
        embeddings[scale] = weights["wte.weight"]
        projections[scale] = weights["blocks.0.attn.q_proj.weight"]
    step = embeddings[2] - embeddings[1]
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(embeddings[4] - embeddings[1], 3 * step, rtol=1e-2, atol=1e-6)
    assert torch.equal(projections[1], projections[4])


def test_a_split_without_a_whole_toy_story_is_reported(tmp_path, capsys):
    call(prepare, "--num_stories=9", folder=tmp_path)
    for T in 64, 256:
        run_train(tmp_path, "--max_iters=1", f"--block_size={T}", f"--out_dir=out{T}")
        assert "the stories are not scored: no story is whole" in capsys.readouterr().out
    # the validation split of 40 begins within a story, and has whole ones after it
    call(prepare, "--num_stories=40", "--overwrite", folder=tmp_path)
    run_train(tmp_path, "--max_iters=1", "--block_size=256", "--out_dir=out40")
    scored = r"\d unseen stories: \d+\.\d+ nats a story, \d+\.\d% above"
    assert re.search(scored, capsys.readouterr().out)


# Learning


LARGER = ["--n_embd=64", "--n_head=4", "--batch_size=8"]


def bigram_nats(data, V):
    """Returns the validation nats a token of a bigram model with add-0.01 counts."""
    counts = np.full((V, V), 0.01)
    np.add.at(counts, (data["train"][:-1], data["train"][1:]), 1)
    logp = np.log(counts / counts.sum(1, keepdims=True))
    return -logp[data["val"][:-1], data["val"][1:]].mean()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llama", "gpt", "gpt2"])
def test_each_architecture_trained_briefly_beats_a_bigram_model(lab, preset):
    out_dir = f"bigram-{preset}"
    argv = [str(ROOT / f"configs/{preset}.toml"), *LARGER, "--max_iters=200", "--eval_interval=200"]
    run_train(lab, *argv, f"--out_dir={out_dir}")
    _, data, tokenizer = dataset.load(lab / "data/toy")
    assert load(lab, out_dir)["val_loss"] < bigram_nats(data, tokenizer.vocab_size)


@pytest.mark.slow
def test_no_model_is_below_the_floor(lab):
    """No model knows unseen stories better than their grammar: 3 standard errors below it is a bug."""
    run_train(lab, *LARGER, "--max_iters=300", "--eval_interval=300", "--out_dir=floor")
    model, tokenizer = checkpoint_file.restore(load(lab, "floor"), "floor")
    texts, logp = zip(*toy_stories.stories(200, seed=99))
    documents = tokenizer.encode_batch(texts)
    nats = [losses.sum() for losses in document_nats(model, documents, tokenizer, CPU)]
    gap = np.array(nats) + np.array(logp)
    assert gap.mean() > -3 * gap.std() / len(gap) ** 0.5
    assert gap.mean() < -np.mean(logp)  # below twice the floor, or nothing was learned to compare


def test_floor_line_compares_like_with_like(lab):
    """A model that gives each story its exact probability is at the floor: the line must say 0.0%. One that is above it
    by a part of a story's length is so by a mean and with an error that are known.
    """
    _, data, tokenizer = dataset.load(lab / "data/toy")

    class Oracle(torch.nn.Module):
        config = ModelConfig(vocab_size=tokenizer.vocab_size)
        nats_a_token = 0.0  # too many
        stories = {}  # (exact nats, how many more)

        def forward(self, idx, targets, reduction):
            nats = torch.zeros(targets.shape)
            for row, ids in zip(nats, targets):
                ids = ids[ids != -100].tolist()
                assert ids[-1] == tokenizer.eot
                text = tokenizer.decode(ids[:-1])
                self.stories[text] = -toy_stories.log_prob(text), self.nats_a_token * len(ids)
                row[0], row[len(ids) - 1] = self.stories[text]
            return None, nats

    oracle = Oracle()
    assert " 0.0% above" in floor_line(oracle, tokenizer, data["val"], CPU, n=50)
    oracle.nats_a_token = 0.4
    line = floor_line(oracle, tokenizer, data["val"], CPU, n=50)
    exact, more = map(np.array, zip(*(nats for nats in oracle.stories.values() if nats[0] < math.inf)))
    assert line == (
        f"{len(exact)} unseen stories: {np.mean(exact + more):.2f} nats a story, "
        f"{100 * more.sum() / exact.sum():.1f}% above their exact entropy of {exact.mean():.2f} "
        f"(standard error of the difference {np.sqrt(more.var() / len(more)):.2f})"
    )


def test_a_window_that_hides_nothing_is_named(lab, capsys):
    for window, is_named in (15, False), (16, True):
        argv = ["--block_size=16", f"--window={window}", "--max_iters=1", f"--out_dir=w{window}"]
        out = printed(capsys, train, *SMALL, *argv, folder=lab)
        assert (f"window={window} hides nothing in block_size=16" in out) == is_named
