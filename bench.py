"""Measures this project on the machine at hand: every performance figure that it claims comes from here.

    python bench.py                                            everything
    python bench.py train decode --n_layer=8 --dtype=float32   some of it, with other settings; configs/*.toml work too
    python bench.py rmsnorm attention --plot --json            drawings bench_NAME.png in out_dir, and a last line of JSON

Rivals take turns within one run, so that a machine whose speed drifts is fair to all. ms is a median, ms_min and ms_max its spread;
first_ms is the first call, where compiling and allocating happen. Weights are random. Of train.py's keys those about data, files and
the length of a run change nothing here.
"""
import functools
import importlib.util
import itertools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import prepare
import rmsnorm
import toy_stories
import train
from config import Refusal, read_toml, run
from device import DTYPES, check_memory, fast_bfloat16, name_of, peak_flops, resolve
from hf import to_transformers
from measure import commit, device_name, draw, ms, nbytes, peak_memory, race, show, synchronize
from model import KVCache, ModelConfig, Transformer, flops_per_token, kv_cache_bytes, num_params, num_weights, use_rmsnorm
from optim import make_optimizers
from sample import finish, generate
from tokenizer import EOT, Tokenizer

CONFIGS = Path(__file__).parent / "configs"
LARGE = 1 << 26  # float32 numbers: 256 MB, more than caches hold


@dataclass
class Config(train.Config):
    n_layer: int = 0              # blocks; this and the next four: 0 = as in tiny.toml, on a GPU as in small.toml
    n_head: int = 0               # query heads
    n_embd: int = 0               # width
    block_size: int = 0           # context length, tokens
    batch_size: int = 0           # rows of block_size tokens in a micro-batch
    vocab_size: int = 4096        # tokens
    seconds: float = 10.0         # time for each bench's rounds, of which there are at least three
    text: str = ""                # tokenizer: a .txt .md .jsonl or .parquet file instead of toy stories
    out_dir: str = "out/bench"    # where drawings go
    plot: bool = False            # draw decode, rmsnorm and attention
    json: bool = False            # end with a line of JSON

    def __post_init__(self):
        gpu = self.device.startswith("cuda") or self.device == "auto" and torch.cuda.is_available()
        shape = read_toml(CONFIGS / ("small.toml" if gpu else "tiny.toml"))
        for key in "n_layer", "n_head", "n_embd", "block_size", "batch_size":
            setattr(self, key, getattr(self, key) or shape[key])
        super().__post_init__()
        if self.block_size < 16 or self.vocab_size < 1:
            raise ValueError("there is little to measure: block_size must be at least 16 and vocab_size at least 1")
        if not 0 <= self.seconds <= 3600:
            raise ValueError(f"seconds must be between 0 and 3600, not {self.seconds}")
        if self.text and (not os.path.isfile(self.text) or Path(self.text).suffix.lower() not in prepare.READERS):
            raise ValueError(f"text must be a file that ends in {' '.join(prepare.READERS)}, not {self.text!r}")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("plot needs matplotlib: pip install matplotlib")


def build(cfg):
    torch.manual_seed(cfg.seed)
    return Transformer(ModelConfig(**{key: getattr(cfg, key) for key in train.MODEL_KEYS}))


def slow_optimizers(model, cfg, compute):
    """train.py's, whose learning rate keeps the weights where they are: random ones that diverged, or became denormal, would be
    timed as something else."""
    return make_optimizers(model, replace(cfg, learning_rate=1e-7, min_lr=0.0), compute)


def trainee(cfg, compute, ops=rmsnorm.TORCH):
    """(step, model, optimizers): step() is one real training step."""
    model = build(cfg).to(compute.device)
    model.gradient_checkpointing, model.chunked_loss = cfg.gradient_checkpointing, cfg.loss == "chunked"
    use_rmsnorm(model, ops)
    optimizers = slow_optimizers(model, cfg, compute)
    scaler = torch.amp.GradScaler(compute.device.type) if compute.dtype == torch.float16 else None
    rows = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1))
    batches = [train.to(train.padded(rows, cfg.block_size), compute.device)] * cfg.gradient_accumulation_steps
    trained = torch.compile(model) if compute.compile else model

    def step():
        loss, norm = train.train_step(trained, optimizers, batches, compute, grad_clip=cfg.grad_clip, scaler=scaler)
        if not train.usable(loss, norm, scaler):
            raise Refusal(f"the loss is {loss} and its gradient norm {norm}: the step that was timed was none", status=1)
    return step, model, optimizers


def architectures(cfg):
    """{name: config}: what was given, or LLaMA's and GPT-2's settings under what was given."""
    if {"norm", "norm_position", "pos", "mlp"} & cfg.given.keys():
        return {"as given": cfg}
    found = {}
    for name in "llama", "gpt2":
        settings = {"n_inner": 0} | read_toml(CONFIGS / f"{name}.toml")
        found[name] = replace(cfg, **{key: value for key, value in settings.items() if key not in cfg.given})
    return found


@functools.cache
def norm_kinds(device):
    """The implementations of RMSNorm that work here."""
    if device.type != "cuda":
        return {"torch": rmsnorm.TORCH}
    if missing := rmsnorm.load():
        print(f"without the CUDA kernel: {missing}")
        return {"torch": rmsnorm.TORCH}
    return {"torch": rmsnorm.TORCH, "cuda": rmsnorm.CUDA}


def bench_train(cfg, compute):
    """train.py's own step: tokens/s first, then its share of the GPU's data sheet (mfu) and of a large matrix product's FLOP/s here."""
    dtypes = [compute.dtype_name]
    if cfg.dtype == "auto":
        dtypes = ["float32", "bfloat16"]
        if not fast_bfloat16(compute.device):
            print("bfloat16 is left out: this device would emulate it, and a step takes minutes; --dtype=bfloat16 insists")
            dtypes.pop()
    import torch._dynamo
    entries = {}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):  # many models share one forward
        for (name, c), dtype, compiled in itertools.product(architectures(cfg).items(), dtypes, sorted({False, compute.compile})):
            for by, ops in norm_kinds(compute.device).items() if c.norm == "rmsnorm" or c.qk_norm else [(None, rmsnorm.TORCH)]:
                where = resolve(cfg.device, dtype, str(compiled))
                entries[name, dtype, compiled, by] = where, *trainee(c, where, ops)
        n = 8192 if compute.device.type == "cuda" else 1024
        squares = {dtype: torch.randn(n, n, device=compute.device).to(DTYPES[dtype]) for dtype in dtypes}
        products = {dtype: functools.partial(torch.matmul, x, x) for dtype, x in squares.items()}
        times = race({key: step for key, (_, step, *_) in entries.items()} | products, cfg.seconds, compute.device)
        rows = []
        for key, (where, step, model, optimizers) in entries.items():
            tokens = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps / times[key]["median"]
            flops = flops_per_token(model, cfg.block_size) * tokens
            kept = nbytes([*model.parameters(), *model.buffers()]) + nbytes(
                x for o in optimizers for state in o.state.values() for x in state.values())
            grown = peak_memory(compute.device, step)
            rows.append({**dict(zip(("settings", "dtype", "compiled", "rmsnorm"), key)), "tokens_per_s": tokens, **ms(times[key]),
                         "mfu": flops / peak_flops(where) if peak_flops(where) else None,
                         "of_matmul": flops * times[key[1]]["median"] / (2 * n ** 3),
                         "peak_mb": None if grown is None else (kept + grown) / 1e6, "parameters": num_params(model)})
    return rows


@torch.inference_mode()
def uncached(model, prompts, n):
    """n greedy ids a row, each from the whole text read anew."""
    ids = torch.tensor(prompts, device=model.device)
    for _ in range(n):
        ids = torch.cat((ids, model.head(model.hidden(ids)[:, -1]).argmax(-1, keepdim=True)), 1)
    return ids[:, len(prompts[0]):].tolist()


def store(results, key, function, *arguments):
    """Calls a function and keeps what it returns."""
    results[key] = function(*arguments)


def cached(model, prompts, n):
    """n greedy ids a row, from sample.generate."""
    return finish(generate(model, prompts, n, temperature=0))[0]


def bench_decode(cfg, compute):
    """sample.generate, greedy: tokens/s, and GB/s of weights read against what the memory gives; then with against without a cache."""
    device, gpu, T = compute.device, compute.device.type == "cuda", cfg.block_size
    model = build(cfg).to(device, compute.dtype).eval()
    peer = hugging_face(model)
    looked_up = ([] if cfg.tie_embeddings else [model.wte.weight]) + ([model.add_pos.weight] if cfg.pos == "learned" else [])
    weights = nbytes(model.parameters()) - nbytes(looked_up)  # of look-ups a step reads a row or two, of all else everything
    large = torch.ones(LARGE, device=device)
    P, n, batches, rows = T // 2, T // 2 if gpu else min(T // 2, 64), (1, 8, 64) if gpu else (1, 8), []
    for B in batches:
        ids = torch.randint(cfg.vocab_size, (B, P))
        prompts, found = ids.tolist(), {}

        def start():
            steps = generate(model, prompts, n, temperature=0)
            next(steps)  # the first new token comes with the prefill
            return steps

        rivals = {"prefill": start, "decode": (start, list), "generate": lambda: found.update(ours=cached(model, prompts, n))}
        if peer:
            ids = ids.to(device)
            options = {"do_sample": False, "max_new_tokens": n, "use_cache": True, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
            rivals["transformers generate"] = lambda: found.update(theirs=peer.generate(ids, **options)[:, P:].tolist())
        times = race(rivals | {"memory": large.sum}, cfg.seconds / 2 / len(batches), device)  # last, where no rival finds caches that it emptied
        memory = large.nbytes / times.pop("memory")["median"]
        for what, t in times.items():
            tokens = B * {"prefill": P, "decode": n - 1}.get(what, n)
            read = weights * (n - 1) / t["median"] if what == "decode" else None  # bytes a second
            rows.append({"what": what, "batch": B, "prompt": P, "new": n, "tokens_per_s": tokens / t["median"], **ms(t),
                         "weights_gb_per_s": read and read / 1e9, "memory_gb_per_s": read and memory / 1e9, "of_memory": read and read / memory,
                         "same_ids": found["theirs"] == found["ours"] if what.startswith("transformers") else None})
    return rows + cache_rows(cfg, compute, model)


def cache_rows(cfg, compute, model):
    """The time of n greedy tokens with a cache, which grows with n, and without one, which grows with its square and faster."""
    gpu, ids = compute.device.type == "cuda", {}
    lengths = [cfg.block_size >> k for k in ((3, 2, 1, 0) if gpu else (4, 3, 2, 1))]
    rivals = {(how, n): functools.partial(store, ids, (how, n), decode, model, [[0]], n)
              for how, decode in (("cached", cached), ("uncached", uncached)) for n in lengths}
    times, rows = race(rivals, cfg.seconds / 2, compute.device), []
    for (how, n), t in times.items():
        rows.append({"what": how, "tokens": n, **ms(t), "against_half": t["median"] / times[how, n // 2]["median"] if n > lengths[0] else None,
                     "same_ids": ids["cached", n] == ids["uncached", n]})
    same = all(row["same_ids"] for row in rows)
    print(f"greedy ids with and without a cache: {'equal' if same else f'NOT equal, which in {name_of(compute.dtype)} may be rounding'}")
    draw(cfg, compute, "decode", rows, x="tokens", y="ms", by=("what",))
    return rows


def hugging_face(model):
    """The same weights in transformers, or None and a line that says why."""
    try:
        return to_transformers(model)
    except ImportError:
        print("without transformers: pip install transformers")
    except ValueError as e:
        print(e)


def bench_kvcache(cfg, compute):
    """Bytes of keys and values: by formula at the 7B shape, and by formula and as allocated at the shape here."""
    rows, device, B, T = [], compute.device, cfg.batch_size, cfg.block_size
    for heads in 32, 8, 1:
        c = ModelConfig(n_layer=32, n_head=32, n_kv_head=heads, n_embd=4096, block_size=2048)
        rows.append(cache_row("7B", c, 1, 2048, torch.float16))
    for heads in [n for n in range(cfg.n_head, 0, -1) if cfg.n_head % n == 0]:
        model = build(replace(cfg, n_kv_head=heads)).to(device, compute.dtype)
        synchronize(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        cache = KVCache(model, B, T)
        stored = sum(x.untyped_storage().nbytes() for x in cache.k + cache.v)
        rows.append({**cache_row(f"{cfg.n_layer} x {cfg.n_embd}", model.config, B, T, compute.dtype), "stored_bytes": stored,
                     "allocated_bytes": None if before is None else torch.cuda.memory_allocated(device) - before})
        del cache
    return rows


def cache_row(shape, c, batch, tokens, dtype):
    size = kv_cache_bytes(c, batch, tokens, dtype.itemsize)
    return {"shape": shape, "attention": kind(c), "n_kv_head": c.n_kv_head, "batch": batch, "tokens": tokens, "dtype": name_of(dtype),
            "bytes": size, "mib": size / 2 ** 20}


def kind(c):
    return "MHA" if c.n_kv_head == c.n_head else "MQA" if c.n_kv_head == 1 else "GQA"


def both_ways(functions, inputs, gradients, seconds, device):
    """{(way, name): times} of functions of the inputs, forward and backward alone, for gradients of their outputs."""
    import torch._functorch.config
    with torch._functorch.config.patch(donated_buffer=False):  # else a compiled backward refuses to run twice
        forward = race({name: functools.partial(f, *inputs) for name, f in functions.items()}, seconds / 2, device)
        backward = race({name: functools.partial(torch.autograd.grad, f(*inputs), inputs, gradients, retain_graph=True)
                         for name, f in functions.items()}, seconds / 2, device)
    return {(way, name): t for way, times in (("forward", forward), ("backward", backward)) for name, t in times.items()}


def double(x):
    return (x.cpu() if x.device.type == "mps" else x).double()


def forward_backward(f, inputs, gradients):
    """The outputs of f, then the gradients of its inputs."""
    y = f(*inputs)
    return [*(y if isinstance(y, tuple) else (y,)), *torch.autograd.grad(y, inputs, gradients)]


def errors(functions, exact, inputs, gradients):
    """{name: the largest ||f - exact|| / ||exact|| among outputs and gradients}, `exact` computed in float64."""
    want = forward_backward(exact, [double(x.detach()).requires_grad_() for x in inputs], [double(g) for g in gradients])
    return {name: max(((double(a) - b).norm() / b.norm()).item() for a, b in zip(forward_backward(f, inputs, gradients), want))
            for name, f in functions.items()}


def stock_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def stock_add_norm(x, a, weight, eps):
    x = x + a
    return x, stock_norm(x, weight, eps)


STOCK = rmsnorm.Ops(stock_norm, stock_add_norm)


def bench_rmsnorm(cfg, compute):
    """RMSNorm, and the sum with its norm (add), against torch's: GB/s of the bytes that must move, of what a plain copy moves."""
    device, gpu, eps, rows = compute.device, compute.device.type == "cuda", cfg.norm_eps, []
    roomy = gpu and torch.cuda.mem_get_info(device)[1] > 40e9
    shapes = [(32768 if roomy else 4096, n) for n in (1024, 2048, 4096, 8192)] if gpu else [(4096, 1024)]
    shapes = [(cfg.batch_size * cfg.block_size, cfg.n_embd), *shapes]
    halves = [torch.bfloat16] if fast_bfloat16(device) else [torch.float16] if gpu else []
    dtypes = [compute.dtype] if cfg.dtype != "auto" else [*halves, torch.float32]
    large, target, kinds = torch.ones(LARGE, device=device), torch.ones(LARGE, device=device), norm_kinds(device)
    copy = 2 * large.nbytes / race({"copy": lambda: target.copy_(large)}, 0.5, device)["copy"]["median"]  # read and written
    print(f"a copy of 256 MB: {copy / 1e9:,.1f} GB/s read and written")
    for (n, hidden), dtype in itertools.product(shapes, dtypes):
        torch.manual_seed(cfg.seed)
        x, a, dy, dh = (torch.randn(n, hidden, device=device).to(dtype) for _ in range(4))
        weight = (1 + 0.1 * torch.randn(hidden, device=device)).to(dtype)  # in x's dtype: otherwise F.rms_norm leaves its fused path
        x, a, weight = (t.requires_grad_() for t in (x, a, weight))
        size, once = x.nbytes, 4 * n + weight.nbytes  # inv_rms, float32, and the weight or its gradient
        moved = {("norm", "forward"): 2 * size + once, ("norm", "backward"): 3 * size + once + weight.nbytes,  # x -> y; dy, x -> dx
                 ("add", "forward"): 4 * size + once, ("add", "backward"): 4 * size + once + weight.nbytes}    # x, a -> h, y; dy, dh, h -> dx
        print(f"{n} x {hidden} {name_of(dtype)}: at the speed of a copy " + ", ".join(
            f"{what} {way} {b / 1e6:.4g} MB in {1e3 * b / copy:.3g} ms" for (what, way), b in moved.items()))

        rivals = {"F.rms_norm": STOCK}
        if compute.compile:
            torch.compiler.reset()
            rivals["compiled"] = rmsnorm.Ops(*(torch.compile(f, dynamic=False) for f in STOCK))
        rivals |= {f"ours, {name}": ops for name, ops in kinds.items()}
        norms = {name: functools.partial(ops.norm, eps=eps) for name, ops in rivals.items()}
        adds = {name: functools.partial(ops.add_norm, eps=eps) for name, ops in rivals.items()}
        for what, functions, inputs, gradients in ("norm", norms, (x, weight), (dy,)), ("add", adds, (x, a, weight), (dh, dy)):
            times = both_ways(functions, inputs, gradients, cfg.seconds / 2 / len(shapes) / len(dtypes), device)
            wrong = errors(functions, functions["ours, torch"], inputs, gradients)
            for (way, name), t in times.items():
                speed = moved[what, way] / t["median"]
                rows.append({"what": what, "way": way, "rows": n, "hidden": hidden, "dtype": name_of(dtype), "by": name, **ms(t),
                             "bytes": moved[what, way], "gb_per_s": speed / 1e9, "of_copy": speed / copy, "error": wrong[name]})
    draw(cfg, compute, "rmsnorm", [row for row in rows if row["what"] == "norm" and row["dtype"] == name_of(dtypes[0])],
         x="hidden", y="of_copy", by=("by", "way"))
    return rows


def explicit_attention(q, k, v):
    T = q.size(-2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf).softmax(-1) @ v


def bench_attention(cfg, compute):
    """Causal attention over length, one row: scaled_dot_product_attention, as model.py calls it, against the matrices written out."""
    device, D, rows = compute.device, cfg.head_dim, []
    lengths = (512, 1024, 2048, 4096, 8192) if device.type == "cuda" else (128, 256, 512, 1024)
    functions = {"sdpa": functools.partial(F.scaled_dot_product_attention, is_causal=True), "explicit": explicit_attention}
    for T in lengths:
        torch.manual_seed(cfg.seed)
        *inputs, dy = (torch.randn(1, cfg.n_head, T, D, device=device).to(compute.dtype) for _ in range(4))
        inputs = [x.requires_grad_() for x in inputs]
        times = both_ways(functions, inputs, [dy], cfg.seconds / len(lengths), device)
        short = [x.detach()[:, :, :1024].clone().requires_grad_() for x in inputs]  # in float64 the matrices of 8,192 are large
        wrong = errors(functions, explicit_attention, short, [dy[:, :, :1024]])
        peak = {name: peak_memory(device, functools.partial(forward_backward, f, inputs, [dy])) for name, f in functions.items()}
        for (way, name), t in times.items():
            rows.append({"way": way, "tokens": T, "by": name, **ms(t), "against_sdpa": t["median"] / times[way, "sdpa"]["median"],
                         "peak_mb": None if peak[name] is None else peak[name] / 1e6, "error": wrong[name]})
    draw(cfg, compute, "attention", rows, x="tokens", y="ms", by=("by", "way"))
    return rows


def step_all(optimizers):
    for o in optimizers:
        o.step()


def bench_optimizer(cfg, compute):
    """One update of all weights, without the backward pass: ours (muon, adamw) and torch's."""
    model = build(cfg).to(compute.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    rivals = {f"ours, {name}": slow_optimizers(model, replace(cfg, optimizer=name), compute) for name in ("muon", "adamw")}
    rivals["torch AdamW foreach"] = [torch.optim.AdamW(model.parameters(), lr=1e-7, foreach=True)]
    if fast_bfloat16(compute.device):
        rivals["torch Muon, AdamW foreach"] = [torch.optim.Muon(matrices, lr=1e-7), torch.optim.AdamW(others, lr=1e-7, foreach=True)]
    else:
        print("torch's Muon is left out: it computes in bfloat16, which this device would emulate")
    steps = {name: functools.partial(step_all, optimizers) for name, optimizers in rivals.items()}
    times = race(steps, cfg.seconds, compute.device)
    return [{"optimizer": name, "parameters": num_params(model), **ms(t)} for name, t in times.items()]


def bench_tokenizer(cfg, compute):
    """Learning a vocabulary and encoding with it, MB/s of text, beside Hugging Face's tokenizers."""
    if cfg.text:
        docs = list(prepare.documents([Path(cfg.text)], prepare.Config(dataset=cfg.text)))
    else:
        docs = [text for text, _ in toy_stories.stories(9000, cfg.seed)]
    size = sum(len(text.encode()) for text in docs)
    try:
        tokenizer = Tokenizer.train(docs, cfg.vocab_size)
    except ValueError as e:
        raise Refusal(e)
    found, learn = {}, {"ours": lambda: Tokenizer.train(docs, cfg.vocab_size)}
    encode = {"ours": lambda: found.update(ours=tokenizer.encode_batch(docs))}
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        print("without tokenizers: pip install tokenizers")
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        theirs = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        theirs.encode_special_tokens = True  # text that spells a special token is text, as with ours

        def learn_theirs():
            found["learned"] = tokenizers.Tokenizer(models.BPE())
            found["learned"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            found["learned"].train_from_iterator(docs, trainers.BpeTrainer(
                vocab_size=cfg.vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False))
        learn["tokenizers"] = learn_theirs
        encode["tokenizers"] = lambda: found.update(theirs=theirs.encode_batch_fast(docs))
    rows = []
    for what, rivals in ("learning", learn), ("encoding", encode):
        for name, t in race(rivals, cfg.seconds / 2, torch.device("cpu")).items():
            rows.append({"what": what, "by": name, "mb": size / 1e6, "mb_per_s": size / 1e6 / t["median"], **ms(t), "same": None})
            if name == "tokenizers" and what == "learning":
                rows[-1]["same"] = found["learned"].get_vocab() == theirs.get_vocab()
            elif name == "tokenizers":
                rows[-1]["same"] = [e.ids for e in found["theirs"]] == found["ours"]
    return rows


def bench_data(cfg, compute):
    """Batches from a memory-mapped file, moved to the device, against the training step (not compiled) that uses them up."""
    B, T, step = cfg.batch_size, cfg.block_size, trainee(cfg, replace(compute, compile=False))[0]
    dtype, numbers = prepare.id_type(cfg.vocab_size), itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=10 ** 7).astype(dtype).tofile(path)
        data = np.memmap(path, dtype, mode="r")
        times = race({"reading": lambda: train.to(train.training_rows(data, T, cfg.seed, B * next(numbers), B), compute.device),
                      "training": step}, cfg.seconds, compute.device)
        del data  # Windows removes no file that is open
    work = {"reading": B * T, "training": B * T * cfg.gradient_accumulation_steps}
    speed = {what: work[what] / t["median"] for what, t in times.items()}
    return [{"what": what, "tokens_per_s": speed[what], **ms(t), "against_training": speed[what] / speed["training"]} for what, t in times.items()]


BENCHES = {"train": bench_train, "decode": bench_decode, "kvcache": bench_kvcache, "rmsnorm": bench_rmsnorm, "attention": bench_attention,
           "optimizer": bench_optimizer, "tokenizer": bench_tokenizer, "data": bench_data}


def main(cfg):
    compute = resolve(cfg.device, cfg.dtype, cfg.compile)
    check_memory(compute.device, train.training_bytes(cfg, cfg, num_weights(cfg)), "try a smaller model or batch_size")
    print(f"{device_name(compute.device)}; {compute.said}; torch {torch.__version__}\n{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
          f"context {cfg.block_size}, {cfg.batch_size} rows, vocabulary {cfg.vocab_size}")
    figures = {}
    for name in dict.fromkeys(cfg.words or BENCHES):
        print(f"\n{name}: {BENCHES[name].__doc__}", flush=True)
        try:
            figures[name] = BENCHES[name](cfg, compute)
        except torch.OutOfMemoryError:  # a GPU's
            raise Refusal(f"{name} took more memory than {compute.device} has: try a smaller model or batch_size", status=1)
        show(figures[name])
    if cfg.json:
        print(json.dumps({"device": device_name(compute.device), "dtype": compute.dtype_name, "torch": torch.__version__, "commit": commit(),
                          "config": asdict(cfg), "figures": figures}))


if __name__ == "__main__":
    run(main, Config, words=BENCHES)
