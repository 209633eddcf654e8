"""Measures this project on the machine at hand: every performance figure that it claims comes from here.

    python bench.py                             everything
    python bench.py train decode --n_layer=8    two of them, another shape; configs/*.toml work too
    python bench.py rmsnorm --plot --json       bench_rmsnorm.png in out_dir, and a last line of JSON
    python bench.py decode --init_from=hf:FOLDER    a model's shape and weights; a checkpoint's too
    python bench.py decode --init_from=out/ts --draft=out/draft    speculative decoding beside plain
    python bench.py quantize --init_from=out/ts     8 and 4 bits: what they lose, how large and fast they are
    python bench.py train --against=FOLDER      a step of nanoGPT too; FOLDER is a checkout of it
    python bench.py learning --against=FOLDER   the time to nanoGPT's validation loss, which trains 2,000 steps first
    python bench.py decode --init_from=out/ts --against=llama.cpp    beside llama.cpp, with 32, 16, 8 and 4 bits
    python bench.py scale --processes=64 --n_layer=22 --n_head=32 --n_embd=2048 --batch_size=64    a run in shards

Rivals take turns within one run, so that a machine whose speed drifts is fair to all. ms is a median,
ms_min and ms_max its spread; first_ms is the first call, where compiling and allocating happen. Weights
are random without init_from. Of train.py's keys those about data, files and the length of a run change
nothing here.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import Refusal, check_range, read_toml, run

# isort: split
import numpy as np
import torch

import checkpoint
import prepare
import readers
import rmsnorm
import shards
import toy_stories
import train
from bench_decode import LLAMA_CPP, bench_decode
from bench_learning import NANOGPT, START, bench_learning
from bench_ops import bench_attention, bench_rmsnorm, rmsnorm_kinds
from bench_processes import bench_processes
from bench_quantize import bench_quantize
from bench_scale import bench_scale
from bench_step import SLOW, build_model, make_slow_optimizers, make_training_step, untimed_steps
from data import to, tokens_a_step, training_rows
from device import DTYPES, fast_bfloat16, name_of, peak_flops, resolve
from graphs import captures_steps
from interop import nanogpt
from measure import (
    convert,
    count_bytes,
    device_name,
    git_commit,
    peak_memory,
    print_tables,
    state_bytes,
    to_megabytes,
)
from memory import check_training_memory
from model import KVCache, ModelConfig
from quantized import Quantization
from race import ms_columns, race
from runs import inherit
from sizes import flops_per_token, kv_cache_bytes, num_active_params, num_params
from speculate import MOST_GUESSES
from tokenizer import EOT, Tokenizer

CONFIGS = Path(__file__).parent / "configs"
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
ARCHITECTURE_KEYS = {"norm", "norm_position", "pos", "mlp"}


@dataclass
class Config(train.Config):
    """The keys of train.py, with a shape that depends on the device, and those of the bench."""

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
    against: str = ""  # train, learning: a checkout of nanoGPT, whose code is run | decode: llama.cpp
    steps: int = 2000  # learning: that nanoGPT makes
    share: float = 0.5  # learning: of so many, those that ours makes
    draft: str = ""  # decode: a smaller model, or ngram; speculative decoding is timed then
    speculate: int = 4  # draft: tokens that it guesses at a time
    group_size: int = 32  # quantize: inputs that share a scale with 4 bits: 32 | 64 | 128
    out_dir: str = "out/bench"  # where drawings go
    plot: bool = False  # draw decode, rmsnorm and attention
    json: bool = False  # end with a line of JSON

    @property
    def nanogpt(self):
        """The folder of nanoGPT where it is a rival, else ""."""
        return "" if self.against == LLAMA_CPP else self.against

    def __post_init__(self):
        on_gpu = self.device.startswith("cuda")
        if self.device == "auto":
            on_gpu = torch.cuda.is_available()
        shape = read_toml(CONFIGS / ("small.toml" if on_gpu else "tiny.toml"))
        for key in SHAPE_KEYS:
            if not getattr(self, key):
                setattr(self, key, shape[key])
        self.eval_only = False  # or no memory would be foreseen for training
        super().__post_init__()
        check_range(self, "at least 16", "block_size")  # of fewer there is little to measure
        check_range(self, "at least 1", "vocab_size")
        check_range(self, "at least 0", "processes")
        check_range(self, f"above {START}", "steps")
        check_range(self, "above 0 and at most 1", "share")
        check_range(self, "at least 0 and at most 3600", "seconds")
        check_range(self, f"at least 1 and at most {MOST_GUESSES}", "speculate")
        Quantization(4, self.group_size)  # raises for another size
        if self.against == LLAMA_CPP and self.init_from == "scratch":
            raise ValueError("llama.cpp wants a tokenizer: give init_from")
        if self.draft and self.init_from == "scratch":
            raise ValueError("a draft agrees with no random weights: draft needs init_from")
        if self.text:
            if not readers.file_kind(self.text) or not os.path.isfile(self.text):
                endings = " ".join(readers.READERS)
                raise ValueError(f"text must be a file that ends in {endings}, not {self.text!r}")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("plot needs matplotlib: pip install matplotlib")
        if self.against == LLAMA_CPP:
            for library in "gguf", "xllamacpp":
                if not importlib.util.find_spec(library):
                    raise ValueError(f"against=llama.cpp needs {library}: pip install {library}")


# -----------------------------------------------------------------------------------------------------
# What several benches need


def redrawn(cfg):
    """Returns cfg without init_from, whose weights fit no other shape."""
    return replace(cfg, init_from="scratch")


def take_shape(cfg):
    """Returns cfg with the shape of init_from, where that is a model, but with a block_size no longer than cfg's."""
    if cfg.init_from == "scratch":
        return cfg
    start = checkpoint.open_checkpoint(cfg.init_from)
    longest = cfg.block_size
    cfg = inherit(cfg, start.state, start.path, resume=False)
    cfg.block_size = min(longest, cfg.block_size)
    return cfg


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


def train_rivals(cfg, compute, dtypes):
    """Returns {(settings, optimizer, dtype, compiled, rmsnorm): (compute, step, model, optimizers)}."""
    rivals = {}
    gpt = nanogpt.load(cfg.nanogpt) if cfg.nanogpt else None
    names = [cfg.optimizer]
    if gpt and "optimizer" not in cfg.given:
        names = ["adamw", "muon"]
    compiles = {compute.compile} if "compile" in cfg.given else {False, compute.compile}
    for dtype, compiled in itertools.product(dtypes, sorted(compiles)):
        variant_compute = resolve(cfg.device, dtype, str(compiled))
        if gpt:
            training = nanogpt.make_step(gpt, cfg, variant_compute, SLOW)
            rivals[NANOGPT, "adamw", dtype, compiled, None] = variant_compute, *training
        for (settings, config), optimizer in itertools.product(architectures(cfg).items(), names):
            config = replace(config, optimizer=optimizer)
            kinds = {None: rmsnorm.TORCH}
            if config.norm == "rmsnorm" or config.qk_norm:
                kinds = rmsnorm_kinds(compute.device)
            if "cpu" in kinds:  # on a processor only the one that train.py would choose
                kinds = {"torch": rmsnorm.TORCH} if compiled else {"cpu": rmsnorm.CPU}
            for kind, ops in kinds.items():
                training = make_training_step(config, variant_compute, ops)
                rivals[settings, optimizer, dtype, compiled, kind] = variant_compute, *training
    return rivals


def train_rows(cfg, compute, dtypes):
    """Yields the table's rows."""
    rivals = train_rivals(cfg, compute, dtypes)
    steps = {key: step for key, (_, step, _, _) in rivals.items()}
    n = 8192 if compute.device.type == "cuda" else 1024
    products = {}
    for dtype in dtypes:
        square = torch.randn(n, n, device=compute.device).to(DTYPES[dtype])
        products[dtype] = functools.partial(torch.matmul, square, square)
    times = race(steps | products, cfg.seconds, compute.device, untimed_steps(cfg, compute))
    tokens = tokens_a_step(cfg)
    for key, (compute, step, model, optimizers) in rivals.items():
        settings, optimizer, dtype, compiled, kind = key
        tokens_per_s = tokens / times[key]["median"]
        if settings == NANOGPT:
            flops = nanogpt.flops_per_token(model) * tokens_per_s
        else:
            flops = flops_per_token(model, cfg.block_size) * tokens_per_s
        matmul_flops = 2 * n**3 / times[dtype]["median"]
        data_sheet_flops = peak_flops(compute.device, compute.dtype)
        is_graph = settings != NANOGPT and captures_steps(cfg, compute)
        # a graph keeps its memory between steps
        peak = None if is_graph else peak_memory(compute.device, step)
        if peak is not None:
            peak += state_bytes(model, optimizers) + count_bytes(model.buffers())
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
            training = make_training_step(replace(config, optimizer=optimizer), compute)
            rivals[name, optimizer] = training
    steps = {key: step for key, (step, _, _) in rivals.items()}
    times = race(steps, cfg.seconds, compute.device, untimed_steps(dense, compute))
    tokens = tokens_a_step(cfg)
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


def bench_windows(cfg, compute):
    """Times windows in all layers (--window, an eighth of block_size) against full attention: a training
    step, and the step of one token early and late in the context.
    """
    full = replace(redrawn(cfg), window=0)
    models = {"full": full, "windows": replace(full, window=cfg.window or cfg.block_size // 8)}
    steps = {name: make_training_step(model_cfg, compute)[0] for name, model_cfg in models.items()}
    times = race(steps, cfg.seconds / 2, compute.device, untimed_steps(cfg, compute))
    tokens = tokens_a_step(cfg)
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
        docs = list(readers.documents([cfg.text], prepare.Config(dataset=cfg.text, name="text")))
    else:
        docs = toy_stories.texts(9000, cfg.seed)
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
LONG = {"learning": bench_learning}  # run where they are named


def many_models(compute):
    """Returns the context of a bench, in which many models may share one forward, which is compiled anew for each."""
    if not compute.compile:
        return contextlib.nullcontext()
    import torch._dynamo

    torch.compiler.reset()  # those of the bench before count, too
    return torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)


def refuse_strays(cfg, names):
    """Raises Refusal for keys of benches that are not among the names, and for a nanoGPT that cannot be loaded."""
    if cfg.processes and names != ["scale"]:
        raise Refusal(
            "processes is what scale foresees, by itself: python bench.py scale --processes=..."
        )
    if "learning" in names and (not cfg.nanogpt or cfg.init_from != "scratch"):
        raise Refusal("learning is from scratch, against nanoGPT: --against=FOLDER, a checkout of it")
    if cfg.nanogpt and not {"train", "learning"} & {*names}:
        rival = f"decode's rival is --against={LLAMA_CPP}"
        raise Refusal(f"against={cfg.against} is a checkout of nanoGPT, for train and learning; {rival}")
    if (cfg.draft or cfg.against == LLAMA_CPP) and "decode" not in names:
        raise Refusal(f"draft and against={LLAMA_CPP} are decode's: python bench.py decode ...")
    if cfg.nanogpt:
        nanogpt.load(cfg.nanogpt)  # refused before minutes are over


def run_benches(names, cfg, compute):
    """Runs benches and prints their tables. Returns {name: the table's rows}. Raises Refusal."""
    figures = {}
    for name in names:
        bench = (BENCHES | LONG)[name]
        title = " ".join(bench.__doc__.split())
        print(f"\n{name}: {title}", flush=True)
        try:
            with many_models(compute):
                figures[name] = list(bench(cfg, compute))
        except torch.OutOfMemoryError:  # a GPU's
            message = f"{name} took more memory than {compute.device} has"
            raise Refusal(f"{message}: try a smaller model or batch_size", status=1)
        print_tables(figures[name])
    return figures


def main(cfg):
    names = list(dict.fromkeys(cfg.words or BENCHES))
    refuse_strays(cfg, names)
    cfg = take_shape(cfg)
    compute = resolve(cfg.device, cfg.dtype, cfg.compile)
    if not cfg.processes:  # else nothing of this size is run
        check_training_memory(cfg, compute)
    print(f"{device_name(compute.device)}; {compute.message}; torch {torch.__version__}")
    print(
        f"{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, context {cfg.block_size}, "
        f"{cfg.batch_size} rows, vocabulary {cfg.vocab_size}"
    )
    figures = run_benches(names, cfg, compute)
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
    run(main, Config, words=BENCHES | LONG)
