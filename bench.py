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
import importlib.util
import json
import os
from dataclasses import asdict, dataclass

from config import Refusal, check_range, read_toml, run

# isort: split
import torch

import checkpoint
import readers
import train
from benches.cache import bench_kvcache, bench_windows
from benches.decode import LLAMA_CPP, bench_decode
from benches.learning import START, bench_learning
from benches.ops import bench_attention, bench_rmsnorm
from benches.processes import bench_processes
from benches.quantize import bench_quantize
from benches.scale import bench_scale
from benches.tokenizer import bench_tokenizer
from benches.train import CONFIGS, bench_data, bench_experts, bench_optimizer, bench_train
from device import resolve
from interop import nanogpt
from measure import device_name, git_commit, print_tables
from memory import check_training_memory
from quantized import Quantization
from runs import inherit
from speculate import MOST_GUESSES

SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")


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


def take_shape(cfg):
    """Returns cfg with the shape of init_from, where that is a model, but with a block_size no longer than cfg's."""
    if cfg.init_from == "scratch":
        return cfg
    start = checkpoint.open_checkpoint(cfg.init_from)
    longest = cfg.block_size
    cfg = inherit(cfg, start.state, start.path, resume=False)
    cfg.block_size = min(longest, cfg.block_size)
    return cfg


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
