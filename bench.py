"""Measures this project on the machine at hand: every performance figure that it claims comes from here.

    python bench.py                             everything
    python bench.py train decode --n_layer=8    two of them, another shape; configs/*.toml work too
    python bench.py rmsnorm --plot --json       bench_rmsnorm.png in out_dir, and a last line of JSON
    python bench.py decode --init_from=hf:FOLDER    a model's shape and weights; a checkpoint's too
    python bench.py decode --init_from=out/ts --draft=out/small    speculative decoding beside plain
    python bench.py quantize --init_from=out/ts     8 and 4 bits: what they lose, how large and fast they are
    python bench.py train --against=FOLDER      a step of nanoGPT too, of which FOLDER is a checkout
    python bench.py decode --init_from=out/ts --against=llama.cpp    and llama.cpp, with 32, 8 and 4 bits
    python bench.py scale --processes=64 --n_layer=22 --n_head=32 --n_embd=2048    what a run in shards would take

Rivals take turns within one run, so that a machine whose speed drifts is fair to all. ms is a median,
ms_min and ms_max its spread; first_ms is the first call, where compiling and allocating happen. Weights
are random without init_from. Of train.py's keys those about data, files and the length of a run change
nothing here.
"""

import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import Refusal, read_toml, run

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import onnx_model
import prepare
import quantize
import quantized
import rmsnorm
import shards
import sources
import toy_stories
import train
from bench_processes import bench_processes
from bench_scale import bench_scale
from bench_step import build_model, make_training_step
from data import to, training_rows
from device import DTYPES, fast_bfloat16, name_of, peak_flops, resolve
from eval import data_folder, load_data
from export_onnx import write_greedy
from generate import generate
from graphs import CHUNK, captures_steps
from hf import to_transformers
from interop import gguf_file, llama_cpp, nanogpt
from measure import (
    SLOW,
    count_bytes,
    device_name,
    draw,
    git_commit,
    make_slow_optimizers,
    moments,
    ms_columns,
    peak_memory,
    print_tables,
    race,
    to_megabytes,
)
from model import KVCache, ModelConfig, MoE
from score import evaluate
from sizes import flops_per_token, kv_cache_bytes, num_active_params, num_params
from speculate import MOST_GUESSES, Speculation, load_draft
from tokenizer import EOT, Tokenizer

CONFIGS = Path(__file__).parent / "configs"
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
ARCHITECTURE_KEYS = {"norm", "norm_position", "pos", "mlp"}
NANOGPT = "nanoGPT"
LLAMA_CPP = "llama.cpp"
SAMPLES = 32  # prompts continued together
LARGE = 1 << 26  # float32 numbers: 256 MB, more than caches hold


@dataclass
class Config(train.Config):
    """The keys of train.py, of which the shape depends on the device, and those of the bench."""

    only_prints = True  # no key: see config.run

    n_layer: int = 0  # blocks; this and the next four: 0 = as in tiny.toml, on a GPU as in small.toml
    n_head: int = 0  # query heads
    n_embd: int = 0  # width
    block_size: int = 0  # context length, tokens
    batch_size: int = 0  # rows of block_size tokens in a micro-batch
    vocab_size: int = 4096  # tokens
    seconds: float = 10.0  # time for each bench's rounds, of which there are at least three
    text: str = ""  # tokenizer: a file as prepare.py reads it instead of toy stories
    processes: int = 0  # scale: foresee a run by so many GPUs; 0 = run small models by two processes
    against: str = ""  # train: a folder, a checkout of nanoGPT, whose code is run | decode: llama.cpp
    draft: str = (
        ""  # decode: a smaller model than init_from's, or ngram; speculative decoding is timed then
    )
    speculate: int = 4  # draft: tokens that it guesses at a time
    group_size: int = 32  # quantize: inputs that share a scale with 4 bits: 32 | 64 | 128
    out_dir: str = "out/bench"  # where drawings go
    plot: bool = False  # draw decode, rmsnorm and attention
    json: bool = False  # end with a line of JSON

    @property
    def nanogpt(self):
        """The folder of nanoGPT, where it is a rival: then both optimizers are timed."""
        return "" if self.against == LLAMA_CPP else self.against

    def __post_init__(self):
        on_gpu = self.device.startswith("cuda")
        if self.device == "auto":
            on_gpu = torch.cuda.is_available()
        shape = read_toml(CONFIGS / ("small.toml" if on_gpu else "tiny.toml"))
        for key in SHAPE_KEYS:
            if not getattr(self, key):
                setattr(self, key, shape[key])
        super().__post_init__()
        if self.block_size < 16 or self.vocab_size < 1:
            raise ValueError(
                "there is little to measure: block_size must be at least 16 and vocab_size at least 1"
            )
        if self.processes < 0:
            raise ValueError(f"processes cannot be negative, not {self.processes}")
        if not 0 <= self.seconds <= 3600:
            raise ValueError(f"seconds must be between 0 and 3600, not {self.seconds}")
        if not 1 <= self.speculate <= MOST_GUESSES:
            raise ValueError(
                f"speculate must be at least 1 and at most {MOST_GUESSES}, not {self.speculate}"
            )
        if self.against == LLAMA_CPP and self.init_from == "scratch":
            raise ValueError("llama.cpp wants a tokenizer: give init_from")
        if self.draft and self.init_from == "scratch":
            raise ValueError("a draft agrees with no random weights: draft needs init_from")
        if self.text:
            if not sources.file_kind(self.text) or not os.path.isfile(self.text):
                endings = " ".join(sources.READERS)
                raise ValueError(f"text must be a file that ends in {endings}, not {self.text!r}")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("plot needs matplotlib: pip install matplotlib")


# -----------------------------------------------------------------------------------------------------
# What several benches need


def take_shape(cfg):
    """Returns cfg with the shape of init_from, where that is a model; texts are no longer than without."""
    if cfg.init_from == "scratch":
        return cfg
    start = checkpoint.open_checkpoint(cfg.init_from)
    longest = cfg.block_size
    cfg = checkpoint.inherit(cfg, start.state, start.path, resume=False)
    cfg.block_size = min(longest, cfg.block_size)
    return cfg


@functools.cache
def rmsnorm_kinds(device):
    """Returns {name: rmsnorm.Ops}, our implementations of RMSNorm that work on the device.

    Prints, once, why a GPU does without the CUDA kernel.
    """
    kinds = {"torch": rmsnorm.TORCH}
    if device.type == "cpu":
        kinds["cpu"] = rmsnorm.CPU
    if device.type == "cuda":
        missing = rmsnorm.load()
        if missing:
            print(f"without the CUDA kernel: {missing}")
        else:
            kinds["cuda"] = rmsnorm.CUDA
    return kinds


def race_both_ways(functions, inputs, gradients, seconds, device):
    """Times functions of the inputs, the forward and the backward pass alone.

    gradients are those of the outputs. Returns {(way, name): times}, the times as race() has them.
    """
    import torch._functorch.config

    times = {}
    # A compiled backward pass that may reuse its buffers refuses to run twice
    with torch._functorch.config.patch(donated_buffer=False):
        for way in "forward", "backward":
            rivals = {}
            for name, function in functions.items():
                rival = functools.partial(function, *inputs)
                if way == "backward":
                    rival = functools.partial(
                        torch.autograd.grad, rival(), inputs, gradients, retain_graph=True
                    )
                rivals[way, name] = rival
            times |= race(rivals, seconds / 2, device)
    return times


def forward_and_backward(function, inputs, gradients):
    """Returns the outputs of a function, then the gradients of its inputs."""
    outputs = function(*inputs)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]


def to_float64(x):
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    return x.double()


def relative_error(tensor, reference):
    difference = to_float64(tensor) - reference
    return (difference.norm() / reference.norm()).item()


def relative_errors(functions, exact, inputs, gradients):
    """Returns {name: error}, the largest ||f - exact|| / ||exact|| among outputs and gradients.

    The function `exact` is computed in float64.
    """
    exact_inputs = [to_float64(x.detach()).requires_grad_() for x in inputs]
    exact_gradients = [to_float64(gradient) for gradient in gradients]
    references = forward_and_backward(exact, exact_inputs, exact_gradients)
    errors = {}
    for name, function in functions.items():
        tensors = forward_and_backward(function, inputs, gradients)
        errors[name] = max(map(relative_error, tensors, references))
    return errors


def convert(to_hf, ours):
    """Returns what of ours to_hf makes Hugging Face's, or None, and prints why."""
    try:
        return to_hf(ours)
    except ImportError as e:
        print(f"without {e.name}: pip install {e.name}")
    except ValueError as e:
        print(e)
    return None


# -----------------------------------------------------------------------------------------------------
# train


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
    """Returns {name: config}: LLaMA's and GPT-2's settings under the given ones.

    Where those choose an architecture themselves, it is the only one.
    """
    if ARCHITECTURE_KEYS & cfg.given.keys():
        return {"as given": cfg}
    configs = {}
    for name in "llama", "gpt2":
        settings = {"n_inner": 0} | read_toml(CONFIGS / f"{name}.toml")
        settings = {key: value for key, value in settings.items() if key not in cfg.given}
        configs[name] = replace(cfg, **settings)
    return configs


def train_rivals(cfg, compute, dtypes):
    """Returns {(settings, optimizer, dtype, compiled, rmsnorm): (compute, step, model, optimizers)}."""
    rivals = {}
    gpt = nanogpt.load(cfg.nanogpt) if cfg.nanogpt else None
    names = [cfg.optimizer]
    if gpt and "optimizer" not in cfg.given:
        names = ["adamw", "muon"]
    for dtype, compiled in itertools.product(dtypes, sorted({False, compute.compile})):
        variant_compute = resolve(cfg.device, dtype, str(compiled))
        if gpt:
            training = nanogpt.make_step(gpt, cfg, variant_compute, SLOW)
            rivals[NANOGPT, "adamw", dtype, compiled, None] = variant_compute, *training
        for (settings, config), optimizer in itertools.product(architectures(cfg).items(), names):
            config = replace(config, optimizer=optimizer)
            kinds = {None: rmsnorm.TORCH}
            if config.norm == "rmsnorm" or config.qk_norm:
                kinds = rmsnorm_kinds(compute.device)
            if "cpu" in kinds:  # train.py's choice there
                kinds = {"torch": rmsnorm.TORCH} if compiled else {"cpu": rmsnorm.CPU}
            for kind, ops in kinds.items():
                training = make_training_step(config, variant_compute, ops)
                rivals[settings, optimizer, dtype, compiled, kind] = variant_compute, *training
    return rivals


def count_state_bytes(model, optimizers):
    """Returns the bytes that stay between steps: weights, tables and the optimizers' state."""
    return count_bytes([*model.parameters(), *model.buffers(), *moments(optimizers)])


def train_rows(cfg, compute, dtypes):
    """Yields the table's rows."""
    rivals = train_rivals(cfg, compute, dtypes)
    steps = {key: step for key, (_, step, _, _) in rivals.items()}
    n = 8192 if compute.device.type == "cuda" else 1024
    products = {}
    for dtype in dtypes:
        square = torch.randn(n, n, device=compute.device).to(DTYPES[dtype])
        products[dtype] = functools.partial(torch.matmul, square, square)
    times = race(steps | products, cfg.seconds, compute.device)
    tokens = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps
    for key, (compute, step, model, optimizers) in rivals.items():
        settings, optimizer, dtype, compiled, kind = key
        tokens_per_s = tokens / times[key]["median"]
        if settings == NANOGPT:
            flops = nanogpt.flops_per_token(model) * tokens_per_s
        else:
            flops = flops_per_token(model, cfg.block_size) * tokens_per_s
        matmul_flops = 2 * n**3 / times[dtype]["median"]
        data_sheet_flops = peak_flops(compute)
        is_graph = settings != NANOGPT and captures_steps(cfg, compute)
        # a graph keeps its memory between steps
        peak = None if is_graph else peak_memory(compute.device, step)
        if peak is not None:
            peak += count_state_bytes(model, optimizers)
        against = {}
        if cfg.nanogpt:
            rival = times[NANOGPT, "adamw", dtype, compiled, None]
            against = {"against": rival["median"] / times[key]["median"]}
        yield {
            "settings": settings,
            "optimizer": optimizer,
            "dtype": dtype,
            "compiled": compiled,
            "graph": is_graph,
            "rmsnorm": kind,
            "tokens_per_s": tokens_per_s,
            **against,
            **ms_columns(times[key]),
            "mfu": flops / data_sheet_flops if data_sheet_flops else None,
            "of_matmul": flops / matmul_flops,
            "peak_mb": to_megabytes(peak),
            **parameter_columns(model),
        }


def parameter_columns(model):
    """Returns how many parameters a model has, and how many of them a token uses."""
    return {"parameters": num_params(model), "active": num_active_params(model)}


def bench_train(cfg, compute):
    """Times train.py's own step, in tokens/s.

    mfu is its share of the GPU's FLOP/s by data sheet, of_matmul that of a large matrix product's here,
    against its speed by nanoGPT's in the same dtype.
    """
    import torch._dynamo

    # Many models share one forward, which is compiled anew for each
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        return list(train_rows(cfg, compute, train_dtypes(cfg, compute)))


# -----------------------------------------------------------------------------------------------------
# experts


def bench_experts(cfg, compute):
    """Times a training step of a mixture of experts against that of a dense model of the same active size.

    Of n_expert SwiGLUs that are n_expert_per_token times as narrow a token goes through so many. against
    is the time by the dense model's with the same optimizer; muon has all experts' matrices to turn.
    """
    dense = replace(cfg, mlp="swiglu")
    experts = replace(cfg, mlp="moe", n_inner=max(1, cfg.n_inner // cfg.n_expert_per_token))
    rivals = {}
    for optimizer, (name, config) in itertools.product(
        ("adamw", "muon"), {"dense": dense, "experts": experts}.items()
    ):
        training = make_training_step(replace(config, optimizer=optimizer), compute)
        rivals[name, optimizer] = training
    steps = {key: step for key, (step, _, _) in rivals.items()}
    times = race(steps, cfg.seconds, compute.device)
    tokens = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps
    rows = []
    for (name, optimizer), (_, model, _) in rivals.items():
        median = times[name, optimizer]["median"]
        flops = flops_per_token(model, cfg.block_size)
        rows.append(
            {
                "what": name,
                "optimizer": optimizer,
                "tokens_per_s": tokens / median,
                **ms_columns(times[name, optimizer]),
                "against": median / times["dense", optimizer]["median"],
                **parameter_columns(model),
                "mflop_a_token": flops / 1e6,
                "weights_mb": count_bytes(model.parameters()) / 1e6,
            }
        )
    return rows


# -----------------------------------------------------------------------------------------------------
# decode


greedy_steps = functools.partial(generate, temperature=0)


def begun_steps(model, prompts, n, n_read=1, **settings):
    """Returns greedy_steps after the first ones: one, which comes with the prefill, or so many more."""
    steps = greedy_steps(model, prompts, n, **settings)
    for _ in range(n_read):
        next(steps)
    return steps


def generate_cached(model, prompts, n):
    """Returns n greedy ids a row, by generate.py."""
    *_, rows = greedy_steps(model, prompts, n)
    return [row.ids for row in rows]


@torch.inference_mode()
def generate_uncached(model, prompts, n):
    """Returns n greedy ids a row, each from the whole text read anew. Prompts are of one length."""
    ids = torch.tensor(prompts, device=model.device)
    for _ in range(n):
        logits = model.head(model.hidden(ids)[:, -1])
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids[:, len(prompts[0]) :].tolist()


def generate_hf(hf_model, ids, n):
    """Returns n greedy ids a row, by transformers, after ids (B, T)."""
    mask = torch.ones_like(ids)
    new_ids = hf_model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=n, pad_token_id=0
    )
    return new_ids[:, ids.size(1) :].tolist()


def count_bytes_a_step(model, batch_size):
    """Returns the bytes of weights that a decoding step of so many rows reads: all but look-up tables, of
    which it reads a row or two, and experts that no row can go to.
    """
    tables = []
    if not model.config.tie_embeddings:
        tables.append(model.wte.weight)
    if model.config.pos == "learned":
        tables.append(model.add_pos.weight)
    idle = 0.0
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        share = max(0, 1 - batch_size * moe.top_k / moe.router.out_features)
        idle += share * (count_bytes(moe.parameters()) - count_bytes(moe.router.parameters()))
    return count_bytes(model.parameters()) - count_bytes(tables) - idle


def decode_rivals(model, hf_model, batch_size, compiled):
    """Returns {name: rival} of a batch size, the tokens a row that each makes in its time, and its prompts'.

    On a GPU "decode" are the replays of a captured graph, of which the first are untimed, "compiled" those of
    a compiled step, and rivals that launch each step make a quarter of the tokens, as they take so long.
    """
    device = model.device
    n_prompt = model.config.block_size // 2
    ids = torch.randint(model.config.vocab_size, (batch_size, n_prompt))
    prompts = ids.tolist()
    ids = ids.to(device)
    n_new = n_slow = n_prompt if device.type == "cuda" else min(n_prompt, 64)
    n_read, n_decoded = 1, n_new - 1
    if device.type == "cuda" and n_new >= 8 * CHUNK:
        n_slow = n_new // 4
        n_read = 1 + 4 * CHUNK
        n_decoded = n_new - n_read - CHUNK  # as the next chunk is launched before one is read
    begun = functools.partial(begun_steps, model, prompts)
    prefill = functools.partial(begun, n_new)
    rivals = {"prefill": prefill, "decode": (functools.partial(prefill, n_read), list)}
    tokens = {"prefill": n_prompt, "decode": n_decoded}
    if device.type == "cuda":
        rivals["decode, step by step"] = (functools.partial(begun, n_slow, graph=False), list)
        tokens["decode, step by step"] = n_slow - 1
    if device.type == "cuda" and compiled:
        rivals["decode, compiled"] = (functools.partial(prefill, n_read, compile=True), list)
        tokens["decode, compiled"] = n_decoded
    rivals["generate"] = functools.partial(generate_cached, model, prompts, n_new)
    tokens["generate"] = n_new
    if hf_model:
        rivals["transformers generate"] = functools.partial(generate_hf, hf_model, ids, n_slow)
        tokens["transformers generate"] = n_slow
    return rivals, tokens, n_prompt


def decode_rows(model, hf_model, large, batch_size, seconds, compiled=False):
    """Yields the table's rows for one batch size.

    large: a tensor that no cache holds, whose sum shows the memory's speed.
    """
    rivals, tokens, n_prompt = decode_rivals(model, hf_model, batch_size, compiled)
    # last, where no rival finds caches that it emptied
    times = race(rivals | {"memory": large.sum}, seconds, model.device)
    memory_speed = large.nbytes / times.pop("memory")["median"]
    for name, rival_times in times.items():
        row = {
            "what": name,
            "batch": batch_size,
            "prompt": n_prompt,
            "new": 1 if name == "prefill" else tokens[name],
            "tokens_per_s": batch_size * tokens[name] / rival_times["median"],
            **ms_columns(rival_times),
            **dict.fromkeys(("weights_gb_per_s", "memory_gb_per_s", "of_memory", "same_ids")),
        }
        if name.startswith("decode"):
            weights_speed = count_bytes_a_step(model, batch_size) * tokens[name] / rival_times["median"]
            row["weights_gb_per_s"] = weights_speed / 1e9
            row["memory_gb_per_s"] = memory_speed / 1e9
            row["of_memory"] = weights_speed / memory_speed
        if name == "transformers generate":
            expected = [ids[: tokens[name]] for ids in rivals["generate"]()]
            row["same_ids"] = rivals[name]() == expected
        yield row


def sample_rows(model, hf_model, seconds):
    """Yields the rows of SAMPLES prompts of different lengths that are continued together, by draws from all
    of the vocabulary, as finetune_ppo.py samples, then of prompts that eight rows share, as it does by
    default. With random weights two thirds end before the last step.
    """
    n_prompt = n_new = model.config.block_size // 2
    if model.device.type == "cuda":  # where a rival that launches each step takes long
        n_new = max(1, n_new // 4)
    ends = list(range(0, model.config.vocab_size, n_new))
    for group in (1, 8):
        lengths = torch.linspace(max(1, n_prompt // 4), n_prompt, SAMPLES // group).long()
        lengths = lengths.repeat_interleave(group).tolist()
        ids = torch.randint(model.config.vocab_size, (SAMPLES // group, n_prompt))
        ids = ids.repeat_interleave(group, 0)
        prompts = [row[-length:].tolist() for row, length in zip(ids, lengths)]
        mask = torch.tensor([[0] * (n_prompt - length) + [1] * length for length in lengths])
        begin = functools.partial(generate, model, prompts, n_new, 1.0, top_k=0, stop=ends)
        rivals = {"samples": (begin, list)}
        if hf_model:
            rivals["transformers samples"] = functools.partial(
                hf_model.generate,
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                top_k=0,
                max_new_tokens=n_new,
                eos_token_id=ends,
                pad_token_id=0,
            )
        for name, times in race(rivals, seconds / 2, model.device).items():
            yield {
                "what": name,
                "batch": SAMPLES,
                "a_prompt": group,
                "prompt": f"{lengths[0]} to {n_prompt}",
                "new": n_new,
                "samples_per_s": SAMPLES / times["median"],
                **ms_columns(times),
            }


def cached_and_uncached_rows(cfg, compute, model):
    """Times n greedy tokens with a cache and without one.

    With a cache the time grows with n, without one with its square and faster.
    """
    lengths = [cfg.block_size >> shift for shift in (4, 3, 2, 1)]
    generators = {"cached": generate_cached, "uncached": generate_uncached}
    rivals = {}
    for (name, generator), n in itertools.product(generators.items(), lengths):
        rivals[name, n] = functools.partial(generator, model, [[0]], n)
    times = race(rivals, cfg.seconds / 2, compute.device)
    same_ids = {n: rivals["cached", n]() == rivals["uncached", n]() for n in lengths}
    rows = []
    for (name, n), rival_times in times.items():
        half = times.get((name, n // 2))
        rows.append(
            {
                "what": name,
                "tokens": n,
                **ms_columns(rival_times),
                "against_half": rival_times["median"] / half["median"] if half else None,
                "same_ids": same_ids[n],
            }
        )
    verdict = "equal"
    if not all(same_ids.values()):
        verdict = f"NOT equal, which in {name_of(compute.dtype)} may be rounding"
    print(f"greedy ids with and without a cache: {verdict}")
    draw(cfg, compute.device, "decode", rows, x="tokens", y="ms", by=("what",))
    return rows


def write_each(write, model, prompts, n, temperature):
    """Returns n ids after each prompt, one after the other, by generate.generate or Speculation's."""
    texts = []
    for prompt in prompts:
        *_, [row] = write(model, [prompt], n, temperature)
        texts.append(row.ids)
    return texts


def speculation_rows(cfg, compute, model):
    """Yields the table's rows of plain and of speculative decoding, greedy and at temperature 0.8, after four
    beginnings of texts that the model itself has written, each by itself.
    """
    _, tokenizer = checkpoint.open_checkpoint(cfg.init_from).restore()
    *_, rows = generate(model, [[tokenizer.eot]] * 4, 16, 1.0, seed=cfg.seed)
    prompts = [[tokenizer.eot, *row.ids] for row in rows]
    n = min(cfg.block_size - len(prompts[0]), 128)
    rivals = {}
    speculations = {}
    for temperature in (0.0, 0.8):
        draft = load_draft(cfg.draft, model, tokenizer, cfg.speculate, compute, "torch")
        speculation = Speculation(draft, cfg.speculate, clock=None)
        speculations[temperature] = speculation
        for name, write in {"plain": generate, "speculative": speculation.generate}.items():
            arguments = (write, model, prompts, n, temperature)
            rivals[name, temperature] = functools.partial(write_each, *arguments)
    times = race(rivals, cfg.seconds / 2, compute.device)
    for (name, temperature), rival_times in times.items():
        plain = ("plain", temperature)
        row = {
            "what": name,
            "temperature": temperature,
            "new": n,
            "tokens_per_s": len(prompts) * n / rival_times["median"],
            **ms_columns(rival_times),
            **dict.fromkeys(("against_plain", "guesses", "right", "tokens_a_call", "same_ids")),
        }
        if name == "speculative":
            speculation = speculations[temperature]
            row["against_plain"] = times[plain]["median"] / rival_times["median"]
            row["guesses"] = cfg.speculate
            row["right"] = speculation.share_right
            row["tokens_a_call"] = speculation.tokens_a_call
            if temperature == 0:
                row["same_ids"] = rivals[name, temperature]() == rivals[plain]()
        yield row


def llama_cpp_rows(cfg, compute, model):
    """Returns the rows of one greedy text: by this model, its ONNX files where export_onnx.py wrote some, and
    llama.cpp with 32, 8 and 4 bits a number. same: how many of its first ids are this model's.
    """
    start = checkpoint.open_checkpoint(cfg.init_from)
    _, tokenizer = start.restore()
    n_threads = torch.get_num_threads()
    n_new = min(cfg.block_size - 41, 120)
    *_, [row] = generate(model, [[tokenizer.eot]], 40, 1.0, seed=cfg.seed)
    prompt = [tokenizer.eot, *row.ids]
    rivals = {"PyTorch float32": functools.partial(write_greedy, model, prompt, n_new)}
    for path in sorted(Path(start.path).parent.glob("onnx/*.onnx")):
        exported, _, _ = onnx_model.load(str(path))
        rivals[f"onnx/{path.name}"] = functools.partial(write_greedy, exported, prompt, n_new)
    with tempfile.TemporaryDirectory() as folder:
        for bits, name in gguf_file.BITS.items():
            path = f"{folder}/{name}.gguf"
            gguf_file.write(path, model, tokenizer, bits=bits)
            llama = llama_cpp.Server(path, cfg.block_size, n_threads)
            rivals[f"{LLAMA_CPP} {name}"] = functools.partial(llama.write, prompt, n_new)
        times = race(rivals, cfg.seconds / 2, compute.device)
    expected = rivals["PyTorch float32"]()
    return [
        {
            "what": name,
            "prompt": len(prompt),
            "new": n_new,
            "tokens_per_s": n_new / rival_times["median"],
            **ms_columns(rival_times),
            "same": len(os.path.commonprefix([rivals[name](), expected])),
        }
        for name, rival_times in times.items()
    ]


def bench_decode(cfg, compute):
    """Times generate.py, greedy, in tokens/s; and in samples/s, drawn, for prompts of different lengths.

    of_memory is the speed at which weights are read against what the memory gives. The next table has
    the time with a cache against that without one, and with a draft the last one speculative decoding.
    """
    model = build_model(cfg).to(compute.device, compute.dtype).eval()
    hf_model = convert(to_transformers, model)
    model.lay_out_for_writing()
    large = torch.ones(LARGE, device=compute.device)
    batch_sizes = (1, 8, 64) if compute.device.type == "cuda" else (1, 8)
    seconds = cfg.seconds / 2 / (len(batch_sizes) + 1)
    rows = []
    for batch_size in batch_sizes:
        rows += decode_rows(model, hf_model, large, batch_size, seconds, compute.compile)
    rows += sample_rows(model, hf_model, seconds)
    rows += cached_and_uncached_rows(cfg, compute, model)
    if cfg.draft:
        rows += speculation_rows(cfg, compute, model)
    if cfg.against == LLAMA_CPP:
        rows += llama_cpp_rows(cfg, compute, model)
    return rows


# -----------------------------------------------------------------------------------------------------
# quantize


def held_out(cfg, model):
    """Returns (rows of ids to look at, ids of the held-out text, bits a byte of a nat a token). Without
    data of init_from's own random ids, None and None, and prints why.
    """
    T = model.config.block_size
    reason = "weights are random"
    if cfg.init_from != "scratch":
        start = checkpoint.open_checkpoint(cfg.init_from)
        folder = data_folder(start)
        load = functools.cache(prepare.load)  # which reads all of the data, to check it
        try:
            data, tokenizer = load_data(folder, start, load)
            meta, *_ = load(folder)
            split = meta["splits"]["val"]
            bits = split["tokens"] / split["bytes"] / math.log(2)
            settings = quantize.Config(to="nowhere")
            return quantize.read_rows(settings, data, "", tokenizer, T), data["val"], bits
        except Refusal as e:
            reason = str(e)
    print(f"without losses: {reason}")
    return torch.randint(model.config.vocab_size, (8, T)), None, None


def quantized_models(cfg, model, rows):
    """Yields (name, model) for each way to store a float model's weights: float32 first."""
    yield "float32", model
    ways = {"int8 rtn": dict(method="rtn", bits=8)}
    ways |= {f"int4 {method}": dict(method=method, bits=4) for method in quantized.METHODS}
    ways["int4 gptq act_order"] = dict(method="gptq", bits=4, act_order=True)
    for name, way in ways.items():
        size = cfg.group_size if way["bits"] == 4 else 0
        settings = quantize.Config(to="nowhere", group_size=size, **way)
        try:
            quantized.check_groups(model, settings.group_size)
        except ValueError as e:
            print(f"without {name}: {e}")
            continue
        numbers = copy.deepcopy(model)
        codes, _ = quantize.quantize_model(numbers, settings, None if settings.method == "rtn" else rows)
        quantization = quantized.Quantization(settings.bits, settings.group_size, settings.method)
        yield name, quantized.quantized(numbers, quantization, codes)


def torchao_models(cfg, model, dtype):
    """Yields (name, model) of what torchao makes of a float model's matrices, where it is installed, for products
    in dtype: of 8 bits, and with bfloat16 also of 4 with a head of 8, as ours are. The embedding stays float.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("without torchao: pip install torchao")
        return
    numbers = copy.deepcopy(model).to(dtype)
    quantize_(numbers, Int8WeightOnlyConfig())
    yield "torchao int8", numbers
    if dtype != torch.bfloat16:
        return
    numbers = copy.deepcopy(model).to(dtype)
    quantize_(numbers.blocks, PrototypeInt4WeightOnlyConfig(group_size=cfg.group_size))
    quantize_(numbers, Int8WeightOnlyConfig(), lambda module, _: module is numbers.head)
    yield "torchao int4", numbers


def file_bytes(model):
    """Returns how large a file of the model's weights is."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def bench_quantize(cfg, compute):
    """Compares a model's weights in 8 and 4 bits, by quantize.py, with float32: bits a byte on about
    eval_tokens of held-out text, the size of their file, and greedy tokens/s, one row, on a CPU in bfloat16
    where that is what sample.py takes. torchao's, where it is installed, are evaluated in that dtype too.

    of_gap is how much of what rounding to the nearest loses at 4 bits a method wins back.
    """
    model = build_model(cfg).eval()
    rows, ids, bits_per_nat = held_out(cfg, model)
    plain = resolve("cpu", "float32", "false")
    sizes, losses, rivals, dtypes = {}, {}, {}, {}
    n = min(64, model.config.block_size // 2)
    fast = compute.dtype
    if cfg.dtype == "auto" and fast_bfloat16(compute.device):
        fast = torch.bfloat16

    def add(name, other, dtype):
        """Evaluates a model on a CPU as it is, and has it timed in dtype."""
        losses[name] = None
        if ids is not None:
            nats = evaluate(other, ids, model.config.block_size, cfg.batch_size, plain, cfg.eval_tokens)
            losses[name] = nats * bits_per_nat
        dtypes[name] = dtype
        other = copy.deepcopy(other).to(compute.device, dtype)
        rivals[name] = (functools.partial(begun_steps, other, [[0]], n), list)

    for name, other in quantized_models(cfg, model, rows):
        sizes[name] = file_bytes(other)
        add(name, other.float(), fast if other.quantization else compute.dtype)
    for name, other in torchao_models(cfg, model, fast):
        sizes[name] = file_bytes(other)
        add(name, other, fast)
    times = race(rivals, cfg.seconds, compute.device)
    exact, nearest = losses["float32"], losses.get("int4 rtn")
    for name, rival_times in times.items():
        loss = losses[name]
        is_better = name.startswith(("int4 gptq", "int4 awq")) and loss is not None
        yield {
            "weights": name,
            "bits_per_byte": loss,
            "more": loss / exact - 1 if loss is not None and name != "float32" else None,
            "of_gap": (nearest - loss) / (nearest - exact) if is_better else None,
            "mb": sizes[name] / 1e6,
            "of_float32": sizes[name] / sizes["float32"],
            "dtype": name_of(dtypes[name]),
            "tokens_per_s": (n - 1) / rival_times["median"],
            **ms_columns(rival_times),
        }


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

    At the 7B shape they are those of the formula, at the shape here also those that are allocated.
    """
    for heads, window in (32, 0), (8, 0), (1, 0), (8, 512):
        config = ModelConfig(n_layer=32, n_head=32, n_kv_head=heads, n_embd=4096, window=window)
        yield kv_cache_row("7B", config, 1, 2048, torch.float16)
    for heads in range(cfg.n_head, 0, -1):
        if cfg.n_head % heads == 0:
            yield allocated_cache_row(replace(cfg, n_kv_head=heads), compute)
    if not cfg.window:
        yield allocated_cache_row(replace(cfg, window=cfg.block_size // 8), compute)


# -----------------------------------------------------------------------------------------------------
# windows


def next_token_step(model, position):
    """Returns what reads one token at a position, again and again."""
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


def bench_windows(cfg, compute):
    """Times windows in all layers (--window, an eighth of block_size) against full attention: a training
    step, and the step of one token early and late in the context.
    """
    models = {"full": replace(cfg, window=0)}
    models["windows"] = replace(cfg, window=cfg.window or cfg.block_size // 8)
    steps = {name: make_training_step(model_cfg, compute)[0] for name, model_cfg in models.items()}
    times = race(steps, cfg.seconds / 2, compute.device)
    tokens = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps
    for name, rival_times in times.items():
        row = {"what": "training step", "attention": name, "window": models[name].window or None}
        yield row | {
            "tokens": tokens,
            **ms_columns(rival_times),
            "against_full": rival_times["median"] / times["full"]["median"],
        }
    positions = (max(1, cfg.block_size // 20), cfg.block_size - max(1, cfg.block_size // 40))
    steps = {}
    for name, model_cfg in models.items():
        model = build_model(model_cfg).to(compute.device, compute.dtype).eval()
        for position in positions:
            steps[name, position] = next_token_step(model, position)
    times = race(steps, cfg.seconds / 2, compute.device)
    for (name, position), rival_times in times.items():
        row = {"what": "one token", "attention": name, "window": models[name].window or None}
        yield row | {
            "tokens": position,
            **ms_columns(rival_times),
            "against_full": rival_times["median"] / times["full", position]["median"],
            "against_early": rival_times["median"] / times[name, positions[0]]["median"],
        }


# -----------------------------------------------------------------------------------------------------
# rmsnorm


def norm_shapes(cfg, device):
    """Returns (rows, hidden) of the tensors to norm: the model's own first."""
    shapes = [(cfg.batch_size * cfg.block_size, cfg.n_embd)]
    if device.type != "cuda":
        return [*shapes, (4096, 1024)]
    memory = torch.cuda.mem_get_info(device)[1]
    n_rows = 32768 if memory > 40e9 else 4096
    return shapes + [(n_rows, hidden) for hidden in (1024, 2048, 4096, 8192)]


def norm_dtypes(cfg, compute):
    if cfg.dtype != "auto":
        return [compute.dtype]
    if fast_bfloat16(compute.device):
        return [torch.bfloat16, torch.float32]
    if compute.device.type == "cuda":
        return [torch.float16, torch.float32]
    return [torch.float32]


def measure_copy(device):
    """Returns the bytes a second that a plain copy reads and writes."""
    source = torch.ones(LARGE, device=device)
    target = torch.ones(LARGE, device=device)
    times = race({"copy": functools.partial(target.copy_, source)}, 0.5, device)
    speed = 2 * source.nbytes / times["copy"]["median"]
    print(f"a copy of 256 MB: {speed / 1e9:,.1f} GB/s read and written")
    return speed


def least_traffic(x, weight):
    """Returns {(operation, way): bytes} that must be read and written."""
    size = x.nbytes
    inv_rms = 4 * len(x)  # one float32 a row
    forward = inv_rms + weight.nbytes
    backward = inv_rms + 2 * weight.nbytes  # the weight and its gradient
    return {
        ("norm", "forward"): 2 * size + forward,  # x -> y
        ("norm", "backward"): 3 * size + backward,  # dy, x -> dx
        ("add", "forward"): 4 * size + forward,  # x, a -> h, y
        ("add", "backward"): 4 * size + backward,  # dy, dh, h -> dx
    }


def stock_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


STOCK = rmsnorm.separate(stock_norm)


def norm_rivals(compute):
    """Returns {name: rmsnorm.Ops}: torch's own, compiled too where compute says so, and ours."""
    rivals = {"F.rms_norm": STOCK}
    if compute.compile:
        torch.compiler.reset()
        compiled = [torch.compile(function, dynamic=False) for function in STOCK]
        rivals["compiled"] = rmsnorm.Ops(*compiled)
    for kind, ops in rmsnorm_kinds(compute.device).items():
        rivals[f"ours, {kind}"] = ops
    return rivals


def norm_rows(cfg, compute, n_rows, hidden, dtype, copy_speed, seconds):
    """Yields the table's rows for one shape and dtype. copy_speed: bytes a second."""
    device = compute.device
    eps = cfg.norm_eps
    torch.manual_seed(cfg.seed)
    x, a, dy, dh = (torch.randn(n_rows, hidden, device=device).to(dtype) for _ in range(4))
    weight = 1 + 0.1 * torch.randn(hidden, device=device)
    weight = weight.to(dtype)  # in x's dtype: otherwise F.rms_norm leaves its fused path
    for tensor in x, a, weight:
        tensor.requires_grad_()

    traffic = least_traffic(x, weight)
    limits = []
    for (operation, way), size in traffic.items():
        milliseconds = 1e3 * size / copy_speed
        limits.append(f"{operation} {way} {size / 1e6:.4g} MB in {milliseconds:.3g} ms")
    shape = f"{n_rows} x {hidden} {name_of(dtype)}"
    print(f"{shape}: at the speed of a copy {', '.join(limits)}")

    rivals = norm_rivals(compute)
    norms = {name: functools.partial(ops.norm, eps=eps) for name, ops in rivals.items()}
    adds = {name: functools.partial(ops.add_norm, eps=eps) for name, ops in rivals.items()}
    operations = (
        ("norm", norms, (x, weight), (dy,)),
        ("add", adds, (x, a, weight), (dh, dy)),
    )
    for operation, functions, inputs, gradients in operations:
        times = race_both_ways(functions, inputs, gradients, seconds / 2, device)
        errors = relative_errors(functions, functions["ours, torch"], inputs, gradients)
        for (way, name), rival_times in times.items():
            size = traffic[operation, way]
            speed = size / rival_times["median"]
            yield {
                "what": operation,
                "way": way,
                "rows": n_rows,
                "hidden": hidden,
                "dtype": name_of(dtype),
                "by": name,
                **ms_columns(rival_times),
                "bytes": size,
                "gb_per_s": speed / 1e9,
                "of_copy": speed / copy_speed,
                "error": errors[name],
            }


def bench_rmsnorm(cfg, compute):
    """Times RMSNorm, and the sum with its norm (add), against torch's.

    gb_per_s is of the bytes that must move, of_copy their share of what a plain copy moves.
    """
    rmsnorm_kinds(compute.device)  # builds the kernel
    copy_speed = measure_copy(compute.device)
    shapes = norm_shapes(cfg, compute.device)
    dtypes = norm_dtypes(cfg, compute)
    seconds = cfg.seconds / len(shapes) / len(dtypes)
    rows = []
    for (n_rows, hidden), dtype in itertools.product(shapes, dtypes):
        rows += norm_rows(cfg, compute, n_rows, hidden, dtype, copy_speed, seconds)
    norms = [row for row in rows if row["what"] == "norm"]
    drawn = [row for row in norms if row["dtype"] == name_of(dtypes[0])]
    draw(cfg, compute.device, "rmsnorm", drawn, x="hidden", y="of_copy", by=("by", "way"))
    return rows


# -----------------------------------------------------------------------------------------------------
# attention


def explicit_attention(q, k, v):
    """Returns causal attention of q, k, v (..., T, D), by its matrix of scores."""
    T = q.size(-2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def attention_rows(cfg, compute, length, seconds):
    device = compute.device
    functions = {
        "sdpa": functools.partial(F.scaled_dot_product_attention, is_causal=True),  # as in model.py
        "explicit": explicit_attention,
    }
    torch.manual_seed(cfg.seed)
    shape = (1, cfg.n_head, length, cfg.head_dim)
    *inputs, dy = (torch.randn(shape, device=device).to(compute.dtype) for _ in range(4))
    for tensor in inputs:
        tensor.requires_grad_()
    times = race_both_ways(functions, inputs, [dy], seconds, device)

    # In float64 the scores of 8,192 tokens are large
    short_inputs = [x.detach()[:, :, :1024].clone().requires_grad_() for x in inputs]
    short_dy = dy[:, :, :1024]
    errors = relative_errors(functions, explicit_attention, short_inputs, [short_dy])
    peaks = {}
    for name, function in functions.items():
        work = functools.partial(forward_and_backward, function, inputs, [dy])
        peaks[name] = peak_memory(device, work)
    return [
        {
            "way": way,
            "tokens": length,
            "by": name,
            **ms_columns(rival_times),
            "against_sdpa": rival_times["median"] / times[way, "sdpa"]["median"],
            "peak_mb": to_megabytes(peaks[name]),
            "error": errors[name],
        }
        for (way, name), rival_times in times.items()
    ]


def bench_attention(cfg, compute):
    """Times causal attention over length, one row.

    sdpa is scaled_dot_product_attention, as model.py calls it; explicit has the matrices written out.
    """
    lengths = (128, 256, 512, 1024)
    if compute.device.type == "cuda":
        lengths = (512, 1024, 2048, 4096, 8192)
    rows = []
    for length in lengths:
        rows += attention_rows(cfg, compute, length, cfg.seconds / len(lengths))
    draw(cfg, compute.device, "attention", rows, x="tokens", y="ms", by=("by", "way"))
    return rows


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
# tokenizer


def to_tokenizers(tokenizer):
    """Returns our tokenizer in Hugging Face's library. Raises ImportError without it."""
    import tokenizers

    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    # Text that spells a special token is text, as with ours
    hf_tokenizer.encode_special_tokens = True
    return hf_tokenizer


def train_hf_tokenizer(docs, vocab_size):
    """Returns a byte-level BPE like ours, learned by Hugging Face's library."""
    import tokenizers

    hf_tokenizer = tokenizers.ByteLevelBPETokenizer()
    settings = {"vocab_size": vocab_size, "min_frequency": 0, "special_tokens": [EOT]}
    hf_tokenizer.train_from_iterator(docs, show_progress=False, **settings)
    return hf_tokenizer


def bench_tokenizer(cfg, compute):
    """Times learning a vocabulary and encoding with it, in MB/s of text, beside Hugging Face's."""
    if cfg.text:
        docs = list(sources.documents([cfg.text], prepare.Config(dataset=cfg.text)))
    else:
        docs = [text for text, _ in toy_stories.stories(9000, cfg.seed)]
    try:
        tokenizer = Tokenizer.train(docs, cfg.vocab_size)
    except ValueError as e:
        raise Refusal(e)
    tasks = {
        "learning": {"ours": functools.partial(Tokenizer.train, docs, cfg.vocab_size)},
        "encoding": {"ours": functools.partial(tokenizer.encode_batch, docs)},
    }
    hf_tokenizer = convert(to_tokenizers, tokenizer)
    if hf_tokenizer:
        learn = functools.partial(train_hf_tokenizer, docs, cfg.vocab_size)
        tasks["learning"]["tokenizers"] = learn
        tasks["encoding"]["tokenizers"] = functools.partial(hf_tokenizer.encode_batch_fast, docs)
    cpu = torch.device("cpu")
    times = {task: race(rivals, cfg.seconds / 2, cpu) for task, rivals in tasks.items()}
    same = {}  # whether Hugging Face's result is ours
    if hf_tokenizer:
        hf_ids = [encoding.ids for encoding in hf_tokenizer.encode_batch_fast(docs)]
        same["encoding", "tokenizers"] = hf_ids == tokenizer.encode_batch(docs)
        same["learning", "tokenizers"] = learn().get_vocab() == hf_tokenizer.get_vocab()
    megabytes = sum(len(text.encode()) for text in docs) / 1e6
    return [
        {
            "what": task,
            "by": name,
            "mb": megabytes,
            "mb_per_s": megabytes / rival_times["median"],
            **ms_columns(rival_times),
            "same": same.get((task, name)),
        }
        for task in tasks
        for name, rival_times in times[task].items()
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

    against_training compares them with the training step (not compiled) that uses them up.
    """
    step, _, _ = make_training_step(cfg, replace(compute, compile=False))
    dtype = shards.id_type(cfg.vocab_size)
    ids = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=10**7).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        ids.tofile(path)
        batches = read_batches(cfg, np.memmap(path, dtype, mode="r"), compute.device)
        reading = functools.partial(next, batches)
        times = race({"reading": reading, "training": step}, cfg.seconds, compute.device)
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


# -----------------------------------------------------------------------------------------------------

BENCHES = {
    "train": bench_train,
    "experts": bench_experts,
    "decode": bench_decode,
    "quantize": bench_quantize,
    "kvcache": bench_kvcache,
    "windows": bench_windows,
    "rmsnorm": bench_rmsnorm,
    "attention": bench_attention,
    "optimizer": bench_optimizer,
    "tokenizer": bench_tokenizer,
    "data": bench_data,
    "processes": bench_processes,
    "scale": bench_scale,
}


def main(cfg):
    names = list(dict.fromkeys(cfg.words or BENCHES))
    if cfg.processes and names != ["scale"]:
        raise Refusal(
            "processes is what scale foresees, by itself: python bench.py scale --processes=..."
        )
    cfg = take_shape(cfg)
    compute = resolve(cfg.device, cfg.dtype, cfg.compile)
    if not cfg.processes:  # else nothing of this size is run
        train.check_training_memory(cfg, compute)
    print(f"{device_name(compute.device)}; {compute.message}; torch {torch.__version__}")
    print(
        f"{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, context {cfg.block_size}, "
        f"{cfg.batch_size} rows, vocabulary {cfg.vocab_size}"
    )
    figures = {}
    for name in names:
        bench = BENCHES[name]
        title = " ".join(bench.__doc__.split())
        print(f"\n{name}: {title}", flush=True)
        try:
            figures[name] = list(bench(cfg, compute))
        except torch.OutOfMemoryError:  # a GPU's
            message = f"{name} took more memory than {compute.device} has"
            raise Refusal(f"{message}: try a smaller model or batch_size", status=1)
        print_tables(figures[name])
    if cfg.json:
        report = {
            "device": device_name(compute.device),
            "dtype": compute.dtype_name,
            "torch": torch.__version__,
            "commit": git_commit(),
            "config": asdict(cfg),
            "figures": figures,
        }
        print(json.dumps(report))


if __name__ == "__main__":
    run(main, Config, words=BENCHES)
