"""What bench.py train, experts, optimizer and data run: a training step, and what it consists of."""

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import rmsnorm
import shards
from benches.learning import NANOGPT
from benches.ops import rmsnorm_kinds
from benches.step import (
    SLOW,
    build_model,
    make_slow_optimizers,
    make_training_step,
    redrawn,
    untimed_steps,
)
from config import read_toml
from data import to, tokens_a_step, training_rows
from device import DTYPES, Compute, fast_bfloat16, peak_flops, resolve
from graphs import captures_steps
from interop import nanogpt
from measure import count_bytes, peak_memory, state_bytes, to_megabytes
from race import ms_columns, race
from sizes import flops_per_token, num_active_params, num_params

CONFIGS = Path(__file__).parents[1] / "configs"
ARCHITECTURE_KEYS = {"norm", "norm_position", "pos", "mlp"}


def parameter_columns(model):
    """Returns how many parameters a model has, and how many of them a token uses."""
    return {"parameters": num_params(model), "active": num_active_params(model)}


# -----------------------------------------------------------------------------------------------------
# train


class Settings(NamedTuple):
    """What is timed."""

    architecture: str  # a name of architectures(), or nanoGPT
    optimizer: str
    dtype: str
    compiled: bool
    rmsnorm: Any  # a name of norm_kinds()


class Training(NamedTuple):
    """A training step, step(), and what it works with."""

    compute: Compute
    step: Any
    model: Any
    optimizers: list


def train_dtypes(cfg, compute):
    """Returns the dtypes, by their names, in which training is timed."""
    if cfg.dtype != "auto":
        return [compute.dtype_name]
    if fast_bfloat16(compute.device):
        return ["float32", "bfloat16"]
    print(
        "bfloat16 is left out: this device would emulate it, and a step takes minutes; "
        "--dtype=bfloat16 insists"
    )
    return ["float32"]


def architectures(cfg):
    """Returns {name: config}: LLaMA's settings and GPT-2's, each with the given keys over them.

    Where the given keys choose an architecture, or init_from has one, that is the only one.
    """
    if ARCHITECTURE_KEYS & cfg.given.keys() or cfg.init_from != "scratch":
        return {"as given": cfg}
    configs = {}
    for name in "llama", "gpt2":
        settings = {"n_inner": 0} | read_toml(CONFIGS / f"{name}.toml")
        settings = {key: value for key, value in settings.items() if key not in cfg.given}
        configs[name] = replace(cfg, **settings)
    return configs


def norm_kinds(cfg, device, compiled):
    """Returns {name: rmsnorm.Ops} that a model is timed with: on a processor the one that train.py would choose."""
    if cfg.norm != "rmsnorm" and not cfg.qk_norm:
        return {None: rmsnorm.TORCH}
    if device.type == "cpu":
        return {"torch": rmsnorm.TORCH} if compiled else {"cpu": rmsnorm.CPU}
    return rmsnorm_kinds(device)


def train_rivals(cfg, compute, dtypes):
    """Returns {Settings: Training}."""
    rivals = {}
    gpt = nanogpt.load(cfg.nanogpt) if cfg.nanogpt else None
    optimizers = ["adamw", "muon"] if gpt and "optimizer" not in cfg.given else [cfg.optimizer]
    compiles = {compute.compile} if "compile" in cfg.given else {False, compute.compile}
    for dtype, compiled in itertools.product(dtypes, sorted(compiles)):
        compute = resolve(cfg.device, dtype, str(compiled))
        if gpt:
            settings = Settings(NANOGPT, "adamw", dtype, compiled, None)
            rivals[settings] = Training(compute, *nanogpt.make_step(gpt, cfg, compute, SLOW))
        for (name, config), optimizer in itertools.product(architectures(cfg).items(), optimizers):
            config = replace(config, optimizer=optimizer)
            for kind, ops in norm_kinds(config, compute.device, compiled).items():
                settings = Settings(name, optimizer, dtype, compiled, kind)
                rivals[settings] = Training(compute, *make_training_step(config, compute, ops))
    return rivals


def square_products(dtypes, device):
    """Returns ({dtype: a function that multiplies two large square matrices}, the FLOPs of a call)."""
    n = 8192 if device.type == "cuda" else 1024
    products = {}
    for dtype in dtypes:
        square = torch.randn(n, n, device=device).to(DTYPES[dtype])
        products[dtype] = functools.partial(torch.matmul, square, square)
    return products, 2 * n**3


def step_peak(training):
    """Returns the most bytes that are in use during a step, None where the system does not tell."""
    compute, step, model, optimizers = training
    peak = peak_memory(compute.device, step)
    if peak is None:
        return None
    return peak + state_bytes(model, optimizers) + count_bytes(model.buffers())


def train_rows(cfg, compute, dtypes):
    """Yields the table's rows."""
    rivals = train_rivals(cfg, compute, dtypes)
    steps = {settings: training.step for settings, training in rivals.items()}
    products, product_flops = square_products(dtypes, compute.device)
    times = race(steps | products, cfg.seconds, compute.device, untimed_steps(cfg, compute))
    for settings, training in rivals.items():
        name, optimizer, dtype, compiled, kind = settings
        median = times[settings]["median"]
        is_nanogpt = name == NANOGPT
        if is_nanogpt:
            flops = nanogpt.flops_per_token(training.model)
        else:
            flops = flops_per_token(training.model, cfg.block_size)
        tokens_per_s = tokens_a_step(cfg) / median
        flops_per_s = flops * tokens_per_s
        product_flops_per_s = product_flops / times[dtype]["median"]
        data_sheet_flops = peak_flops(compute.device, training.compute.dtype)
        is_graph = not is_nanogpt and captures_steps(cfg, training.compute)
        against = {}
        if cfg.nanogpt:
            rival = Settings(NANOGPT, "adamw", dtype, compiled, None)
            against = {"against": times[rival]["median"] / median}
        yield {
            "settings": name,
            "optimizer": optimizer,
            "dtype": dtype,
            "compiled": compiled,
            "graph": is_graph,
            "rmsnorm": kind,
            "tokens_per_s": tokens_per_s,
            **against,
            **ms_columns(times[settings]),
            "mfu": flops_per_s / data_sheet_flops if data_sheet_flops else None,
            "of_matmul": flops_per_s / product_flops_per_s,
            # a graph keeps its memory between steps
            "peak_mb": None if is_graph else to_megabytes(step_peak(training)),
            **parameter_columns(training.model),
        }


def bench_train(cfg, compute):
    """Times train.py's own step, in tokens/s.

    mfu is its share of the GPU's FLOP/s by data sheet, of_matmul that of a large matrix product's here,
    against its speed by nanoGPT's in the same dtype.
    """
    return list(train_rows(cfg, compute, train_dtypes(cfg, compute)))


# -----------------------------------------------------------------------------------------------------
# experts


def bench_experts(cfg, compute):
    """Times a training step of a mixture of experts against that of a dense model of the same active size.

    Its SwiGLUs are n_expert_per_token times as narrow, and a token goes through so many of n_expert. against
    is the time by that of the dense model with the same optimizer; muon orthogonalizes the matrices of all experts.
    """
    dense = replace(redrawn(cfg), mlp="swiglu")
    experts = replace(dense, mlp="moe", n_inner=max(1, cfg.n_inner // cfg.n_expert_per_token))
    rivals = {}
    for optimizer in "adamw", "muon":
        for name, config in ("dense", dense), ("experts", experts):
            config = replace(config, optimizer=optimizer)
            rivals[name, optimizer] = make_training_step(config, compute)
    steps = {key: step for key, (step, _, _) in rivals.items()}
    times = race(steps, cfg.seconds, compute.device, untimed_steps(dense, compute))
    for (name, optimizer), (_, model, _) in rivals.items():
        median = times[name, optimizer]["median"]
        yield {
            "what": name,
            "optimizer": optimizer,
            "tokens_per_s": tokens_a_step(cfg) / median,
            **ms_columns(times[name, optimizer]),
            "against": median / times["dense", optimizer]["median"],
            **parameter_columns(model),
            "mflop_a_token": flops_per_token(model, cfg.block_size) / 1e6,
            "weights_mb": count_bytes(model.parameters()) / 1e6,
        }


# -----------------------------------------------------------------------------------------------------
# optimizer


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()


def bench_optimizer(cfg, compute):
    """Times one update of all weights, without the backward pass: ours (muon, adamw) and torch's."""
    model = build_model(cfg).to(compute.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    rivals = {}
    for name in "muon", "adamw":
        named = replace(cfg, optimizer=name)
        rivals[f"ours, {name}"] = make_slow_optimizers(model, named, compute)
    adamw = functools.partial(torch.optim.AdamW, lr=SLOW, foreach=True)
    rivals["torch AdamW foreach"] = [adamw(model.parameters())]
    if fast_bfloat16(compute.device):
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        remainder = set(model.parameters()).difference(matrices)
        muon = torch.optim.Muon(matrices, lr=SLOW)
        rivals["torch Muon, AdamW foreach"] = [muon, adamw(list(remainder))]
    else:
        print("torch's Muon is left out: it computes in bfloat16, which this device would emulate")
    steps = {name: functools.partial(step_all, optimizers) for name, optimizers in rivals.items()}
    times = race(steps, cfg.seconds, compute.device)
    parameters = num_params(model)
    return [
        {"optimizer": name, "parameters": parameters, **ms_columns(rival_times)}
        for name, rival_times in times.items()
    ]


# -----------------------------------------------------------------------------------------------------
# data


def read_batches(cfg, data, device):
    """Yields batches of data as train.py reads them."""
    for first in itertools.count(0, cfg.batch_size):
        batch = training_rows(data, cfg.block_size, cfg.seed, first, cfg.batch_size)
        yield to(batch, device)


def bench_data(cfg, compute):
    """Times batches from a memory-mapped file, moved to the device.

    against_training is their speed by that of the training step (not compiled) that reads them.
    """
    step, _, _ = make_training_step(cfg, replace(compute, compile=False))
    dtype = shards.id_type(cfg.vocab_size)
    ids = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=10**7).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        path.write_bytes(ids)
        batches = read_batches(cfg, np.memmap(path, dtype, mode="r"), compute.device)
        reading = functools.partial(next, batches)
        untimed = untimed_steps(cfg, compute)
        times = race({"reading": reading, "training": step}, cfg.seconds, compute.device, untimed)
        del batches, reading  # Windows removes no file that is open
    tokens = cfg.batch_size * cfg.block_size
    speeds = {
        "reading": tokens / times["reading"]["median"],
        "training": tokens * cfg.gradient_accumulation_steps / times["training"]["median"],
    }
    return [
        {
            "what": name,
            "tokens_per_s": speed,
            **ms_columns(times[name]),
            "against_training": speed / speeds["training"],
        }
        for name, speed in speeds.items()
    ]
