"""What bench.py kvcache and windows run: the bytes of keys and values, and windows, with which fewer are read."""

import functools
from dataclasses import replace

import torch

from benches.step import build_model, make_training_step, redrawn, untimed_steps
from cache import KVCache
from data import tokens_a_step
from device import name_of
from measure import peak_memory
from model import ModelConfig
from race import ms_columns, race
from sizes import kv_cache_bytes

# -----------------------------------------------------------------------------------------------------
# kvcache


def kv_cache_row(shape, config, batch_size, tokens, dtype):
    size = kv_cache_bytes(config, batch_size, tokens, dtype.itemsize)
    kinds = {1: "MQA", config.n_head: "MHA"}
    return {
        "shape": shape,
        "attention": kinds.get(config.n_kv_head, "GQA"),
        "n_kv_head": config.n_kv_head,
        "window": config.window or None,
        "batch": batch_size,
        "tokens": tokens,
        "dtype": name_of(dtype),
        "bytes": size,
        "mib": size / 2**20,
    }


def allocated_cache_row(cfg, compute):
    """Returns a row of the table with what a cache really stores, and what it takes from a GPU."""
    model = build_model(cfg).to(compute.device, compute.dtype)
    make_cache = functools.partial(KVCache, model, cfg.batch_size, cfg.block_size)
    on_gpu = compute.device.type == "cuda"
    allocated = peak_memory(compute.device, make_cache) if on_gpu else None
    cache = make_cache()
    stored = sum(x.untyped_storage().nbytes() for x in cache.k + cache.v)
    shape = f"{cfg.n_layer} x {cfg.n_embd}"
    row = kv_cache_row(shape, model.config, cfg.batch_size, cfg.block_size, compute.dtype)
    return row | {"stored_bytes": stored, "allocated_bytes": allocated}


def bench_kvcache(cfg, compute):
    """Counts the bytes of keys and values.

    For the shape of a 7B model they are computed; for the shape at hand also those that are stored and allocated.
    """
    for heads, window in (32, 0), (8, 0), (1, 0), (8, 512):
        config = ModelConfig(n_layer=32, n_head=32, n_kv_head=heads, n_embd=4096, window=window)
        yield kv_cache_row("7B", config, 1, 2048, torch.float16)
    for heads in range(cfg.n_head, 0, -1):
        if cfg.n_head % heads == 0:
            yield allocated_cache_row(replace(redrawn(cfg), n_kv_head=heads), compute)
    if not cfg.window:
        yield allocated_cache_row(replace(redrawn(cfg), window=cfg.block_size // 8), compute)


# -----------------------------------------------------------------------------------------------------
# windows


def next_token_step(model, position):
    """Returns a function that reads one token at a position, the same one at each call."""
    cache = model.new_cache(1, position + 1)
    id = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model.hidden(id.expand(1, position), cache)

    @torch.inference_mode()
    def step():
        logits = model.next_logits(id, cache)
        cache.rewind(1)
        return logits

    return step


def window_step_rows(cfg, compute, configs):
    """Yields the rows of a training step of each config in {name: config}."""
    steps = {name: make_training_step(config, compute)[0] for name, config in configs.items()}
    times = race(steps, cfg.seconds / 2, compute.device, untimed_steps(cfg, compute))
    for name, rival_times in times.items():
        yield {
            "what": "training step",
            "attention": name,
            "window": configs[name].window or None,
            "tokens": tokens_a_step(cfg),
            **ms_columns(rival_times),
            "against_full": rival_times["median"] / times["full"]["median"],
        }


def window_token_rows(cfg, compute, configs):
    """Yields the rows of the step of one token, early and late in the context, of each config in {name: config}."""
    early = max(1, cfg.block_size // 20)
    late = cfg.block_size - max(1, cfg.block_size // 40)
    steps = {}
    for name, config in configs.items():
        model = build_model(config).to(compute.device, compute.dtype).eval()
        for position in early, late:
            steps[name, position] = next_token_step(model, position)
    times = race(steps, cfg.seconds / 2, compute.device)
    for (name, position), rival_times in times.items():
        yield {
            "what": "one token",
            "attention": name,
            "window": configs[name].window or None,
            "tokens": position,
            **ms_columns(rival_times),
            "against_full": rival_times["median"] / times["full", position]["median"],
            "against_early": rival_times["median"] / times[name, early]["median"],
        }


def bench_windows(cfg, compute):
    """Times windows in all layers (--window, an eighth of block_size) against full attention: a training
    step, and the step of one token early and late in the context.
    """
    full = replace(redrawn(cfg), window=0)
    configs = {"full": full, "windows": replace(full, window=cfg.window or cfg.block_size // 8)}
    yield from window_step_rows(cfg, compute, configs)
    yield from window_token_rows(cfg, compute, configs)
