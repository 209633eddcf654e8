"""The rule for dtype=auto on both sorts of processor, the dtype of a resumed run, and GPUs by name."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scripts import printed, written
from test_model import build
from test_train import lab, load, resume, run_train  # lab is a fixture

import checkpoint_file
import device
import sample
import train
from config import Refusal, configure
from device import (
    BFLOAT16_WIDTH,
    COMPILE_SECONDS,
    LAUNCH_SECONDS,
    Work,
    choose_compile,
    peak_flops,
    resolve,
    training_seconds,
)
from model import Transformer, model_config
from optim import make_optimizers
from sizes import num_params, step_flops

needs_bfloat16 = pytest.mark.skipif(
    not device.fast_bfloat16(torch.device("cpu")), reason="needs a processor with avx512_bf16 or AMX"
)


def pretend(monkeypatch, fast):
    """Lets the processor have instructions for bfloat16, or not."""
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: fast)


@pytest.fixture(params=[False, True], ids=["no bfloat16", "bfloat16"])
def fast(request, monkeypatch):
    """Both sorts of processor, on any machine."""
    pretend(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("width", [0, 64, BFLOAT16_WIDTH - 1, BFLOAT16_WIDTH, 768])
def test_auto_is_bfloat16_where_a_wide_model_is_trained_on_a_fast_processor(fast, width):
    dtype = "bfloat16" if fast and width >= BFLOAT16_WIDTH else "float32"
    compute = resolve("cpu", "auto", "false", train_width=width)
    assert compute.dtype_name == dtype
    assert compute.dtype is getattr(torch, dtype)
    assert f"dtype={dtype} (" in compute.message


def test_a_given_dtype_rules(fast):
    for name, dtype in ("float32", torch.float32), ("bfloat16", torch.bfloat16):
        compute = resolve("cpu", name, "false", train_width=768)
        assert (compute.dtype, compute.dtype_name) == (dtype, name)
        is_slow = name == "bfloat16" and not fast
        assert ("slow" in compute.message) == is_slow
        _, muon = make_optimizers(build(), train.Config(), compute)
        assert muon.dtype == dtype


def test_float16_leaves_muon_in_float32():
    compute = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, compile=False)
    _, muon = make_optimizers(build(), train.Config(), compute)
    assert muon.dtype == torch.float32


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(Refusal, match="use --dtype=float32"):
        resolve("cpu", "tf32", "false")


def test_several_processes_may_not_share_one_gpu():
    with pytest.raises(Refusal, match="a GPU each: --device=cuda, not cuda:0"):
        device.choose_device("cuda:0", local_rank=1)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no CUDA GPU with TF32",
)
def test_float32_is_float32_on_a_gpu():
    x = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in "float32", "tf32":
        x_gpu = x.float().to(resolve("cuda", name, "false").device)
        product = (x_gpu @ x_gpu).double().cpu()
        errors[name] = (product - x @ x).abs().max().item()
    resolve("cuda", "float32", "false")
    assert errors["float32"] < 1e-3 < errors["tf32"]


def test_a_resumed_run_keeps_its_dtype_on_another_processor(lab, monkeypatch, capsys):
    argv = [
        f"--n_embd={BFLOAT16_WIDTH}",
        "--n_layer=1",
        "--batch_size=1",
        "--block_size=16",
        "--eval_interval=1",
        "--eval_tokens=16",
    ]
    for fast, dtype in (True, "bfloat16"), (False, "float32"):
        out_dir = f"kept-{dtype}"
        pretend(monkeypatch, fast)
        run_train(lab, *argv, "--dtype=auto", "--max_iters=1", f"--out_dir={out_dir}")
        assert load(lab, out_dir)["config"]["dtype"] == dtype
        assert f"Muon in {dtype}" in capsys.readouterr().out
        pretend(monkeypatch, not fast)
        resume(lab, out_dir, "--max_iters=2")
        assert load(lab, out_dir)["config"]["dtype"] == dtype
        assert f"dtype={dtype}" in capsys.readouterr().out
    resume(lab, "kept-bfloat16", "--max_iters=3", "--dtype=float32")  # given anew, it changes
    assert load(lab, "kept-bfloat16")["config"]["dtype"] == "float32"


def test_a_checkpoint_of_auto_goes_on_by_the_rule(lab):
    """Checkpoints from before runs kept their dtype."""
    run_train(lab, "--max_iters=1", "--out_dir=older")
    path = str(lab / "older/ckpt.pt")
    ckpt = checkpoint_file.load(path)
    ckpt["config"]["dtype"] = "auto"
    torch.save(ckpt, path)
    resume(lab, "older", "--max_iters=2")
    assert load(lab, "older")["config"]["dtype"] == "float32"


def test_a_sample_is_the_same_text_on_both_sorts(fast, lab, capsys):
    run_train(lab, "--max_iters=1", "--overwrite", "--out_dir=text")
    argv = ["--out_dir=text", "--max_new_tokens=40", "--device=cpu"]
    auto, float32 = (
        written(printed(capsys, sample, *argv, f"--dtype={dtype}", folder=lab))
        for dtype in ("auto", "float32")
    )
    assert auto == float32


@needs_bfloat16
def test_bfloat16_learns_as_float32_does(lab):
    losses = {}
    for dtype in "float32", "bfloat16":
        out_dir = f"learns-{dtype}"
        run_train(
            lab, "--max_iters=40", "--eval_interval=40", f"--dtype={dtype}", f"--out_dir={out_dir}"
        )
        losses[dtype] = load(lab, out_dir)["val_loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == flops
    assert peak_flops(cuda, torch.float32) is None


@pytest.mark.parametrize(
    "argv, is_compiled",
    [
        ([], False),  # the toy stories
        (["configs/small.toml"], True),
        (["configs/small.toml", "--max_iters=200"], False),
        (["configs/medium.toml"], True),
        (["configs/medium.toml", "--max_iters=200"], False),
        (["configs/medium.toml", "--max_iters=2000"], True),
    ],
)
def test_auto_compiles_on_a_gpu_where_the_steps_take_longer(argv, is_compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(device.shutil, "which", lambda _: "/usr/bin/cc")
    cfg = configure(train.Config, argv)
    gpu = torch.device("cuda")
    work = Work(step_flops(cfg), cfg.max_iters, is_static=True, dropout=cfg.dropout)
    compiles, reason = choose_compile(gpu, "auto", torch.bfloat16, work)
    assert compiles == is_compiled
    assert f"compile={is_compiled} (" in reason
    for setting in "true", "false":
        assert choose_compile(gpu, setting, torch.bfloat16, work)[0] == (setting == "true")
    assert choose_compile(gpu, "auto")[0]  # as bench.py has it, where nobody knows the steps


@pytest.mark.parametrize(
    "argv, settings, is_compiled",
    [
        (["configs/tiny.toml"], {}, True),
        (["configs/tiny.toml", "--max_iters=300"], {}, False),
        ([], {}, False),  # the toy stories
        (["configs/tiny.toml", "--dropout=0.1"], {}, False),
        (["configs/tiny.toml"], dict(dtype=torch.float32), False),
        (["configs/tiny.toml"], dict(world_size=2), False),
    ],
)
def test_auto_compiles_on_a_cpu_in_bfloat16_where_the_steps_take_longer(
    argv, settings, is_compiled, monkeypatch
):
    monkeypatch.setattr(device, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cfg = configure(train.Config, argv)
    work = Work(step_flops(cfg), cfg.max_iters, is_static=True, dropout=cfg.dropout)
    cpu = torch.device("cpu")
    settings = dict(dtype=torch.bfloat16, work=work) | settings
    compiles, reason = choose_compile(cpu, "auto", **settings)
    assert compiles == is_compiled
    assert f"compile={is_compiled} (" in reason
    assert not choose_compile(cpu, "auto", **settings | dict(work=work._replace(is_static=False)))[0]
    assert not choose_compile(cpu, "auto", **settings | dict(work=None))[0]


def test_a_cpu_without_a_compiler_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(device.sys, "platform", "linux")
    cpu = torch.device("cpu")
    work = Work(1e15, 1000, is_static=True)
    compiles, reason = choose_compile(cpu, "auto", torch.bfloat16, work)
    assert not compiles and "a C++ compiler (g++, or what CXX names)" in reason
    with pytest.raises(Refusal, match="a C\\+\\+ compiler .* or give --compile=false"):
        choose_compile(cpu, "true")


def test_the_rule_of_thumb_for_a_runs_seconds():
    assert training_seconds(1.0, 50) == 50 * LAUNCH_SECONDS  # a step is never shorter
    assert training_seconds(1e15, 50, peak=1e15) == pytest.approx(200)  # at a quarter of the peak
    assert training_seconds(1e15, 100, peak=1e15) == pytest.approx(400)
    assert training_seconds(1e15, 1, peak=2e15) == pytest.approx(2)
    assert training_seconds(1e15, 1) > training_seconds(1e15, 1, peak=1e15)
    assert training_seconds(1.0, 0) == 0 < COMPILE_SECONDS  # of --eval_only


def test_a_steps_operations_are_six_a_parameter_and_token():
    cfg = configure(train.Config, ["--vocab_size=4096", "--gradient_accumulation_steps=3"])
    model = Transformer(model_config(cfg))
    assert step_flops(cfg) == 6 * num_params(model) * 3 * cfg.batch_size * cfg.block_size
    sizes = ["--n_embd=10000000", "--n_head=1", "--n_inner=10000000", "--mlp=moe", "--n_expert=10000000"]
    cfg = configure(train.Config, sizes)  # more than check_training_memory can count, and refuses
    assert step_flops(cfg) == math.inf


def test_a_resumed_run_counts_its_steps_as_a_new_one_which_knows_no_vocabulary():
    """Else one that was not worth a compiler might be, and not go on to the bit."""
    cfg = configure(train.Config, ["configs/tiny.toml"])
    assert step_flops(cfg) == step_flops(replace(cfg, vocab_size=50257))


def test_attention_is_cudnns_only_where_shapes_stay(monkeypatch):
    """It plans for each new shape anew. resolve turns it off on a GPU."""
    monkeypatch.setattr(train, "train_step", lambda *_, **__: torch.backends.cuda.cudnn_sdp_enabled())
    cfg = train.Config(vocab_size=8)
    several = device.Compute(torch.device("cuda"), "bfloat16", True, "", world_size=2)
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        for task, expected in (None, True), (SimpleNamespace(loss=None, count=None), False):
            assert train.make_step(None, [], cfg, several, task)() is expected
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
