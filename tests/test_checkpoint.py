"""Checkpoints: whole, safe, atomic."""

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import ROOT
from test_model import build, redraw, tokens

import checkpoint
import checkpoint_file
import train
from config import Refusal
from device import resolve
from model import ModelConfig, Transformer, model_config
from optim import load_optimizers, make_optimizers, step_unless
from tensors import is_finite
from tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint, and the model and the tokenizer in it."""
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, 270)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2)
    model = redraw(Transformer(config))
    path = str(tmp_path / "ckpt.pt")
    checkpoint_file.save(path, model, tokenizer, {"seed": 1}, checkpoint_file.RunState(7, 2.5, 2.25))
    return path, model, tokenizer


def test_a_checkpoint_restores_model_tokenizer_and_state(saved):
    path, model, tokenizer = saved
    ckpt = checkpoint_file.load(path)
    assert ckpt["step"] == 7
    assert ckpt["val_loss"] == 2.5
    assert ckpt["best_val_loss"] == 2.25
    assert ckpt["config"] == {"seed": 1}
    restored, restored_tokenizer = checkpoint_file.restore(ckpt, path)
    idx = torch.arange(20)[None]
    assert torch.equal(restored(idx)[0], model.eval()(idx)[0])
    assert restored.head.weight is restored.wte.weight
    assert not restored.training
    assert restored_tokenizer.to_str() == tokenizer.to_str()
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]


def test_a_base_is_the_same_one_with_later_settings_that_are_off(saved):
    """A base that is saved again has them in its file: adapters from before stay valid."""
    later = ["window", "window_pattern", "n_expert", "n_expert_per_token", "norm_topk_prob"]
    ckpt = checkpoint_file.load(saved[0])
    settings = ckpt["model_config"]
    older = {key: value for key, value in settings.items() if key not in later}
    assert len(settings) - len(older) == 5
    fingerprint = checkpoint_file.fingerprint(ckpt)
    assert checkpoint_file.fingerprint(ckpt | {"model_config": older}) == fingerprint
    windowed = settings | {"window": 4}
    assert checkpoint_file.fingerprint(ckpt | {"model_config": windowed}) != fingerprint


def test_a_base_that_computes_otherwise_with_the_same_weights_is_another_one(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    model = build(vocab_size=257, mlp="moe")
    checkpoint_file.save(
        path, model, Tokenizer.train(["ab"], 257), {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    ckpt = checkpoint_file.load(path)
    changes = [{"n_expert_per_token": 1}, {"norm_topk_prob": False}, {"window": 4}]
    changes += [{"norm_eps": 0.1}, {"rope_scaling": "linear:2"}]
    fingerprints = {checkpoint_file.fingerprint(ckpt)}
    for change in changes:
        other = ckpt | {"model_config": ckpt["model_config"] | change}
        fingerprints.add(checkpoint_file.fingerprint(other))
        restored, _ = checkpoint_file.restore(other, path)
        assert not torch.equal(restored(tokens())[0], model(tokens())[0]), change
    assert len(fingerprints) == 1 + len(changes)


def test_a_run_that_starts_from_a_checkpoint_has_its_own_context_and_dropout(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    model = build(vocab_size=257, pos="learned")
    checkpoint_file.save(
        path, model, Tokenizer.train(["ab"], 257), {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    cfg = replace(model.config, block_size=12, dropout=0.5)
    start = checkpoint.open_checkpoint(path)
    start.crop(cfg)
    cropped, _ = start.restore()
    assert cropped.config == cfg
    idx = tokens(T=12)
    assert torch.equal(cropped(idx)[0], model(idx)[0])
    assert not torch.equal(cropped.train()(idx)[0], model(idx)[0])


def test_stretching_changes_what_is_restored_and_nothing_else(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    tokenizer = Tokenizer.train(["ab"], 257)
    model = build(vocab_size=257)
    checkpoint_file.save(path, model, tokenizer, {}, checkpoint_file.RunState(1, 2.0, 2.0))
    ckpt = checkpoint.open_checkpoint(path)
    fingerprint = checkpoint_file.fingerprint(ckpt.state)
    ckpt.stretch("yarn:4,24", 96)
    stretched, _ = ckpt.restore()
    expected = Transformer(replace(model.config, rope_scaling="yarn:4,24", block_size=96))
    expected.load_state_dict(model.state_dict())
    idx = tokens(T=90)
    assert torch.equal(stretched(idx)[0], expected.eval()(idx)[0])
    assert checkpoint_file.fingerprint(ckpt.state) == fingerprint
    ckpt.stretch(block_size=96)
    longer, _ = ckpt.restore()
    assert longer.config == replace(model.config, block_size=96)
    ckpt.stretch()
    assert ckpt.restore()[0].config == model.config


@pytest.mark.parametrize(
    "pos, scaling, block_size, message",
    [
        ("learned", "", 48, "learned positions, a table of 24"),
        ("learned", "", 12, "learned positions, a table of 24"),
        ("learned", "linear:2", 0, "learned positions, a table of 24"),
        ("alibi", "linear:2", 0, "pos is alibi"),
        ("rope", "yarn:2", 0, "yarn:FACTOR,CONTEXT"),
        ("rope", "ntk:0.5", 0, "at least 1"),
        ("rope", "", 10**8, "block_size must be at least 1"),
    ],
)
def test_what_cannot_be_stretched_is_one_line(pos, scaling, block_size, message, tmp_path):
    tokenizer = Tokenizer.train(["ab"], 257)
    model = build(vocab_size=257, pos=pos)
    path = str(tmp_path / "ckpt.pt")
    checkpoint_file.save(path, model, tokenizer, {}, checkpoint_file.RunState(1, 2.0, 2.0))
    with pytest.raises(Refusal, match=message) as refusal:
        checkpoint.open_checkpoint(path).stretch(scaling, block_size)
    assert refusal.value.status == 2


def test_a_compiled_model_is_saved_unwrapped(saved):
    path, model, tokenizer = saved
    checkpoint_file.save(path, torch.compile(model), tokenizer, {}, checkpoint_file.RunState(1, 1, 1))
    assert checkpoint_file.load(path)["model"].keys() == model.state_dict().keys()


def test_code_in_a_checkpoint_is_refused_and_does_not_run(saved, tmp_path):
    path, *_ = saved
    mark = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    with_code = checkpoint_file.load(path) | {"config": Touch()}
    for write in (
        lambda: torch.save(with_code, path),
        lambda: Path(path).write_bytes(pickle.dumps(Touch())),
    ):
        write()
        with pytest.raises(Refusal, match="not a checkpoint that is safe to read"):
            checkpoint_file.load(path)
        assert not mark.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("model"), "model"),
        (lambda c: c.update(step="7"), "step"),
        (lambda c: c["model"].pop("norm.weight"), "norm.weight|Error"),
        (lambda c: c["model_config"].update(n_layer=3), "damaged"),
        (lambda c: c["model_config"].update(color=3), "color"),
        (lambda c: c.update(tokenizer_sha256="0" * 64), "tokenizer"),
        (lambda c: c.update(tokenizer="{}"), "damaged"),
        (lambda c: c.update(step=-1), "step is -1"),
        (lambda c: c.update(step=True), "step is True"),
        (lambda c: c.update(val_loss=-0.5), "val_loss is -0.5 at step 7"),
        (lambda c: c.update(val_loss=math.nan), "val_loss is nan at step 7"),
        (lambda c: c.update(best_val_loss=math.inf), "best_val_loss is inf at step 7"),
        (lambda c: c.update(losses=[2.5, "2.5"]), "losses has '2.5', which is no finite number"),
        (lambda c: c.update(losses=[2.5, math.inf]), "losses has inf, which is no finite number"),
        (lambda c: c.update(losses=[10**400]), "losses has 1000"),
        (lambda c: c.update(scaler=None), "scaler is missing or not a dict"),
        (lambda c: c["model_config"].update(norm_eps=math.nan), "norm_eps"),
        (lambda c: c["model_config"].update(n_layer=-1), "n_layer must be at least 1"),
        (lambda c: c["model_config"].update(n_layer=10**400), "n_layer must be at least 1"),
        (lambda c: c["model_config"].update(dropout=True), "dropout must be of type float"),
        (lambda c: c["model"].update({5: torch.ones(1)}), "5 is a Tensor, where tensors by name"),
        (lambda c: c["model"].update(more=None), "'more' is a NoneType, where tensors by name"),
        (lambda c: c["model"].update(more=torch.ones(1).to("meta")), "tensor more .strided, on meta."),
        (
            lambda c: c["model"].update(more=torch.ones(2).to_sparse()),
            "tensor more .sparse_coo, on cpu.",
        ),
        # a file of kilobytes, which would be read for hours
        (lambda c: c["model"].update(more=torch.ones(1).expand(10**13)), "more numbers than it holds"),
    ],
)
def test_damage_is_one_line(saved, change, message):
    path, *_ = saved
    ckpt = checkpoint_file.load(path)
    change(ckpt)
    torch.save(ckpt, path)
    with pytest.raises(Refusal, match=message) as e:
        checkpoint_file.restore(checkpoint_file.load(path), path)
    assert e.value.status == 1
    assert "\n" not in str(e.value)


def test_another_format_is_refused_as_no_file_of_ours(saved):
    path = saved[0]
    whole = checkpoint_file.load(path)
    for change, words in ({"format": 99}, "format 99"), ({"format": None}, "format None"):
        torch.save(whole | change, path)
        with pytest.raises(Refusal, match=words) as e:
            checkpoint_file.load(path)
        assert e.value.status == 2
    del whole["format"]
    torch.save(whole, path)
    with pytest.raises(Refusal, match="not a TinyLM checkpoint"):
        checkpoint_file.load(path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_of_other_kinds_are_refused(saved, dtype):
    path = saved[0]
    whole = checkpoint_file.load(path)
    name = "blocks.0.mlp.up_proj.weight"
    whole["model"][name] = whole["model"][name].to(dtype)
    torch.save(whole, path)
    shown = str(dtype).removeprefix("torch.")
    with pytest.raises(Refusal, match=f"is damaged: tensor {name} is {shown}: only float32") as e:
        checkpoint_file.load(path)
    assert e.value.status == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_that_is_not_finite_is_found_in_each_tensor(saved, dtype):
    path = saved[0]
    whole = checkpoint_file.load(path)
    weights = {name: x.to(dtype) for name, x in whole["model"].items()}
    torch.save(whole | {"model": weights}, path)
    checkpoint_file.restore(checkpoint_file.load(path), path)
    bad_numbers = [math.nan, math.inf, -math.inf]
    if dtype == torch.float64:
        bad_numbers.append(1e300)  # which is infinite in float32
    for i, (name, x) in enumerate(weights.items()):
        spoiled = x.clone()
        spoiled.view(-1)[i % x.numel()] = bad_numbers[i % len(bad_numbers)]
        torch.save(whole | {"model": weights | {name: spoiled}}, path)
        with pytest.raises(Refusal, match=f"is damaged: tensor {name} holds nan or infinity") as e:
            checkpoint_file.load(path)
        assert e.value.status == 1 and "\n" not in str(e.value)


def test_large_numbers_whose_sum_overflows_are_finite():
    largest = torch.finfo(torch.float32).max
    assert is_finite(torch.full((1000,), largest)) and is_finite(torch.full((1000,), -largest))
    assert is_finite(torch.empty(0))
    both = torch.tensor([math.inf, -math.inf])
    assert not is_finite(both) and not is_finite(torch.cat([torch.full((1000,), largest), both]))


# Optimizers


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The path of a checkpoint after two steps with AdamW and Muon in float16, and the config."""
    path = str(tmp_path_factory.mktemp("stopped") / "ckpt.pt")
    cfg = train.Config(vocab_size=270, n_layer=1, n_embd=32, n_head=2, block_size=8)
    model, optimizers, scaler = make_run(cfg)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        step_unless(optimizers, torch.tensor(False))
    state = checkpoint_file.RunState(2, 2.5, 2.25, [2.5], optimizers, scaler)
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, 270)
    checkpoint_file.save(path, model, tokenizer, {}, state)
    return path, cfg


def make_run(cfg):
    torch.manual_seed(0)
    model = Transformer(model_config(cfg))
    compute = resolve("cpu", "float32", "false")
    scaler = torch.amp.GradScaler("cpu")
    return model, make_optimizers(model, cfg, compute), scaler


def test_an_optimizers_state_comes_back_and_settings_are_the_configs(stopped):
    path, cfg = stopped
    ckpt = checkpoint_file.load(path)
    again = replace(cfg, weight_decay=0.3, beta1=0.5, momentum=0.6, embd_lr_scale=2.0)
    _, optimizers, scaler = make_run(again)
    load_optimizers(optimizers, scaler, ckpt, again)
    assert scaler.state_dict() == ckpt["scaler"]
    for optimizer, saved in zip(optimizers, ckpt["optimizers"]):
        state = optimizer.state_dict()["state"]
        assert state.keys() == saved["state"].keys()
        for i, moments in saved["state"].items():
            assert state[i].keys() == moments.keys()
            assert all(torch.equal(state[i][name], x) for name, x in moments.items())
    adamw, muon = optimizers
    assert adamw.param_groups[0]["betas"] == (0.5, 0.95) and adamw.param_groups[0]["lr_scale"] == 2.0
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert muon.param_groups[0]["momentum"] == 0.6 and muon.param_groups[0]["weight_decay"] == 0.3


def moments(ckpt):
    return ckpt["optimizers"][0]["state"][0]


def momentum(ckpt):
    return ckpt["optimizers"][1]["state"][0]


def group(ckpt):
    return ckpt["optimizers"][0]["param_groups"][0]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda c: moments(c).pop("exp_avg"),
            "parameter 0 has exp_avg_sq, step and not exp_avg, exp_avg",
        ),
        (
            lambda c: moments(c).update(max_exp_avg_sq=0),
            "parameter 0 has exp_avg, exp_avg_sq, max_exp_avg",
        ),
        (lambda c: momentum(c).clear(), "parameter 0 has nothing and not momentum_buffer"),
        (lambda c: group(c).update(amsgrad=True), "amsgrad is True and not False"),
        (lambda c: group(c).update(eps="x"), "eps is 'x' and not 1e-08"),
        (lambda c: group(c).update(eps=math.nan), "eps is nan and not 1e-08"),
        (lambda c: group(c).update(eps=torch.ones(3)), "eps is tensor"),
        (lambda c: group(c).update(betas=0.9), "betas is 0.9 and not"),
        (lambda c: group(c).update(params=[1]), r"params is \[1\] and not \[0\]"),
        (lambda c: c["optimizers"][1]["param_groups"][0].update(ns_steps=0), "ns_steps is 0 and not 5"),
        (lambda c: c["optimizers"][0]["param_groups"].pop(), "1 groups of parameters and not 2"),
        (lambda c: c["optimizers"][0]["state"].pop(1), "not the state of"),
        (lambda c: c["optimizers"][0]["state"].update({99: {}}), "not the state of"),
        (lambda c: c["optimizers"][0].pop("state"), "state"),
        (lambda c: c["optimizers"].reverse(), "groups of parameters"),
        (lambda c: c.update(optimizers=[torch.ones(2), None]), "it is a Tensor"),
        (lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].to("meta")), "strided, on meta"),
        (
            lambda c: momentum(c).update(momentum_buffer=torch.ones(32, 32).to("meta")),
            "strided, on meta",
        ),
        (lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].int()), "is int32: only float32"),
        (lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].double()), "torch.float64 and not"),
        (
            lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"][1:]),
            r"is \(269, 32\) .* and not \(270, 32\)",
        ),
        (lambda c: moments(c).update(exp_avg=torch.ones(1, 1).expand(270, 32)), "shares its memory"),
        (lambda c: moments(c).update(exp_avg=moments(c)["exp_avg_sq"]), "shares its memory"),
        (lambda c: moments(c)["exp_avg"][3].fill_(math.nan), "exp_avg of parameter 0 holds nan"),
        (
            lambda c: momentum(c)["momentum_buffer"][3].fill_(math.inf),
            "momentum_buffer of parameter 0 holds",
        ),
        (lambda c: moments(c)["exp_avg_sq"][3].fill_(-1), "a mean of squares, is negative"),
        (lambda c: moments(c)["step"].fill_(-5), "step of parameter 0 is -5 after 2 steps"),
        (lambda c: moments(c)["step"].fill_(3), "step of parameter 0 is 3 after 2 steps"),
        (lambda c: moments(c)["step"].fill_(1.5), "step of parameter 0 is 1.5 after 2 steps"),
        (lambda c: moments(c).update(step=2), "'step of parameter 0' is a int"),
        (lambda c: c["scaler"].pop("scale"), "the loss scaler has growth_factor"),
        (lambda c: c["scaler"].update(scale=-1.0), "the loss scaler's scale is -1.0"),
        (lambda c: c["scaler"].update(scale=math.nan), "the loss scaler's scale is nan"),
        (lambda c: c["scaler"].update(scale="x"), "the loss scaler's scale is 'x'"),
        (lambda c: c["scaler"].update(growth_factor=0.5), "the loss scaler's growth_factor is 0.5"),
        (lambda c: c["scaler"].update(_growth_tracker=-1), "the loss scaler's _growth_tracker is -1"),
    ],
)
def test_an_optimizers_damage_is_one_line(stopped, change, words):
    path, cfg = stopped
    ckpt = checkpoint_file.load(path)
    change(ckpt)
    _, optimizers, scaler = make_run(cfg)
    with pytest.raises(Refusal, match=f"the checkpoint's optimizer state is damaged: .*{words}") as e:
        load_optimizers(optimizers, scaler, ckpt, cfg)
    assert e.value.status == 1 and "\n" not in str(e.value)


def test_a_state_may_be_empty_where_no_step_was_taken(stopped):
    path, cfg = stopped
    ckpt = checkpoint_file.load(path)
    for saved in ckpt["optimizers"]:
        saved["state"] = {}
    _, optimizers, scaler = make_run(cfg)
    # a loss scaler leaves steps out
    load_optimizers(optimizers, scaler, ckpt, cfg)
    load_optimizers(optimizers, None, ckpt | {"scaler": {}, "step": 0}, cfg)
    with pytest.raises(Refusal, match="not the state of"):
        load_optimizers(optimizers, None, ckpt | {"scaler": {}}, cfg)


def test_truncated_empty_and_foreign_files_are_one_line(saved, tmp_path):
    whole = Path(saved[0]).read_bytes()
    path = tmp_path / "bad.pt"
    for content in (
        whole[: len(whole) // 2],
        whole[:100],
        b"",
        b"hello world",
        b"\x80\x02.",
        pickle.dumps([1, 2]),
    ):
        path.write_bytes(content)
        with pytest.raises(Refusal) as e:
            checkpoint_file.load(str(path))
        assert "\n" not in str(e.value)
    with pytest.raises(Refusal, match="cannot read"):
        checkpoint_file.load(str(tmp_path / "none.pt"))
    with pytest.raises(Refusal, match="no checkpoint in"):
        checkpoint.find(str(tmp_path / "nowhere"))


def test_a_write_that_fails_leaves_the_old_file(saved):
    """A full disk, by a limit on the size of files: torch then raises RuntimeError."""
    path, *_ = saved
    before = Path(path).read_bytes()
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoint_file, config
ckpt = checkpoint_file.load({path!r})
model, tokenizer = checkpoint_file.restore(ckpt, {path!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    checkpoint_file.save({path!r}, model, tokenizer, {{}}, checkpoint_file.RunState(8, 1, 1))
except config.Refusal as e:
    print(e.status, e)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith("1 cannot write"), result.stderr
    assert result.stdout.count("\n") == 1
    assert Path(path).read_bytes() == before
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_written(saved, value):
    """Of a run that is told to stop just after the step that spoiled them."""
    path, model, tokenizer = saved
    before = Path(path).read_bytes()
    model.blocks[0].attn.q_proj.weight.data[3, 4] = value
    with pytest.raises(Refusal, match="blocks.0.attn.q_proj.weight holds nan or infinity") as e:
        checkpoint_file.save(path, model, tokenizer, {}, checkpoint_file.RunState(8, 1.0, 1.0))
    assert e.value.status == 1 and Path(path).read_bytes() == before


def test_best_is_preferred_for_reading_and_last_for_resuming(tmp_path):
    last, best = tmp_path / "ckpt.pt", tmp_path / "ckpt_best.pt"
    last.touch()
    best.touch()
    assert checkpoint.find(str(tmp_path)) == str(best)
    assert checkpoint.find(str(tmp_path), "ckpt.pt") == str(last)
    assert checkpoint.find(str(last)) == str(last)
    best.unlink()
    assert checkpoint.find(str(tmp_path)) == str(last)
