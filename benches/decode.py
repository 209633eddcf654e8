"""What bench.py decode runs: writing text, by ourselves, transformers, a draft's guesses and llama.cpp."""

import functools
import itertools
import os
import tempfile
from pathlib import Path

import torch

import checkpoint
import onnx_model
from benches.step import build_model
from device import name_of
from drafts import load_draft
from experts import MoE
from export_onnx import write_on
from generate import generate
from graphs import CHUNK
from hf import to_transformers
from interop import gguf_file, llama_cpp
from interop.any_tokenizer import load_tokenizer
from measure import convert, count_bytes, draw, large_tensor
from race import PAUSE, ms_columns, race
from speculate import Speculation

LLAMA_CPP = "llama.cpp"
SAMPLES = 32  # prompts continued together

greedy_steps = functools.partial(generate, temperature=0)


def begun_steps(model, prompts, n, n_read=1, **settings):
    """Returns greedy_steps of which the first n_read were made already; the first one comes with the prefill."""
    steps = greedy_steps(model, prompts, n, **settings)
    for _ in range(n_read):
        next(steps)
    return steps


def timed_steps(device, n):
    """Returns (steps to be made before the clock starts, steps that it sees) of n: on a GPU replays alone, where n is
    large enough.
    """
    if device.type != "cuda" or n < 8 * CHUNK:
        return 1, n - 1
    n_read = 1 + 4 * CHUNK
    return n_read, n - n_read - CHUNK  # as the next chunk is launched before one is read


def generate_cached(model, prompts, n):
    """Returns n greedy ids a row, by generate.py."""
    *_, rows = greedy_steps(model, prompts, n)
    return [row.ids for row in rows]


@torch.inference_mode()
def generate_uncached(model, prompts, n):
    """Returns n greedy ids a row, each from the whole text read anew. Prompts are of one length."""
    ids = torch.tensor(prompts, device=model.device)
    for _ in range(n):
        logits = model.logits(model.hidden(ids)[:, -1])
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
    which it reads a row or two, and experts that get no row even where each row goes to others.
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
    """Returns {name: (rival, the tokens a row that it makes while it is timed)}, for prompts of half the context.

    On a GPU "decode" is the replays of a captured graph, of which the first are not timed, "compiled" those of a
    compiled step; and rivals that launch each step make a quarter of the tokens, as they take so long.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    n_prompt = model.config.block_size // 2
    ids = torch.randint(model.config.vocab_size, (batch_size, n_prompt))
    prompts = ids.tolist()
    ids = ids.to(device)
    n_new = n_slow = n_prompt if on_gpu else min(n_prompt, 64)
    n_read, n_decoded = timed_steps(device, n_new)
    if n_read > 1:
        n_slow = n_new // 4
    begun = functools.partial(begun_steps, model, prompts)
    prefill = functools.partial(begun, n_new)
    rivals = {
        "prefill": (prefill, n_prompt),
        "decode": ((functools.partial(prefill, n_read), list), n_decoded),
    }
    if on_gpu:
        by_step = functools.partial(begun, n_slow, graph=False)
        rivals["decode, step by step"] = ((by_step, list), n_slow - 1)
    if on_gpu and compiled:
        by_compiled = functools.partial(prefill, n_read, compile=True)
        rivals["decode, compiled"] = ((by_compiled, list), n_decoded)
    rivals["generate"] = (functools.partial(generate_cached, model, prompts, n_new), n_new)
    if hf_model:
        by_hf = functools.partial(generate_hf, hf_model, ids, n_slow)
        rivals["transformers generate"] = (by_hf, n_slow)
    return rivals


def decode_rows(model, hf_model, large, batch_size, seconds, compiled=False):
    """Yields the table's rows for one batch size.

    large: a tensor that no cache holds, whose sum shows the memory's speed.
    """
    rivals = decode_rivals(model, hf_model, batch_size, compiled)
    functions = {name: rival for name, (rival, _) in rivals.items()}
    # the sum last, as it fills the caches with its own numbers
    times = race(functions | {"memory": large.sum}, seconds, model.device)
    memory_speed = large.nbytes / times["memory"]["median"]
    for name, (rival, n) in rivals.items():
        median = times[name]["median"]
        row = {
            "what": name,
            "batch": batch_size,
            "prompt": model.config.block_size // 2,
            "new": 1 if name == "prefill" else n,
            "tokens_per_s": batch_size * n / median,
            **ms_columns(times[name]),
            **dict.fromkeys(("weights_gb_per_s", "memory_gb_per_s", "of_memory", "same_ids")),
        }
        if name.startswith("decode"):
            weights_speed = count_bytes_a_step(model, batch_size) * n / median
            row["weights_gb_per_s"] = weights_speed / 1e9
            row["memory_gb_per_s"] = memory_speed / 1e9
            row["of_memory"] = weights_speed / memory_speed
        if name == "transformers generate":
            generate_own, _ = rivals["generate"]
            row["same_ids"] = rival() == [ids[:n] for ids in generate_own()]
        yield row


def sample_rows(model, hf_model, seconds):
    """Yields the rows of SAMPLES prompts that are continued together by draws from the whole vocabulary, as
    finetune_ppo.py samples: first prompts of different lengths, then such that eight rows share, as by default
    there. With random weights two thirds end before the last step.
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


def load_speculations(cfg, compute, model, tokenizer):
    """Returns {temperature: Speculation}. Raises Refusal for a draft that cannot be the model's."""
    speculations = {}
    for temperature in (0.0, 0.8):
        draft = load_draft(cfg.draft, model, tokenizer, cfg.speculate, compute, "torch")
        speculations[temperature] = Speculation(draft, cfg.speculate, clock=None)
    return speculations


def speculation_rows(cfg, compute, model, tokenizer, speculations):
    """Yields the table's rows of plain and of speculative decoding, greedy and at temperature 0.8. Each text goes on
    by itself, after one of four beginnings that the model has written.
    """
    *_, rows = generate(model, [[tokenizer.eot]] * 4, 16, 1.0, seed=cfg.seed)
    prompts = [[tokenizer.eot, *row.ids] for row in rows]
    n = min(cfg.block_size - len(prompts[0]), 128)
    rivals = {}
    for temperature, speculation in speculations.items():
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


def llama_cpp_rows(cfg, compute, model, tokenizer):
    """Returns the rows of one greedy text, written by this model, by its ONNX files where export_onnx.py wrote some,
    and by llama.cpp with 32, 16, 8 and 4 bits a number. same: how many of its first ids are those of this model.
    """
    n_threads = torch.get_num_threads()
    n_written = min(40, cfg.block_size // 2)
    *_, [row] = generate(model, [[tokenizer.eot]], n_written, 1.0, seed=cfg.seed)
    prompt = [tokenizer.eot, *row.ids]
    n_new = min(cfg.block_size - len(prompt), 120)
    own = f"PyTorch {name_of(compute.dtype)}"
    rivals = {own: functools.partial(write_on, n_threads, model, prompt, n_new)}
    for path in sorted(Path(checkpoint.find(cfg.init_from)).parent.glob("onnx/*.onnx")):
        exported, _, _ = onnx_model.load(str(path))
        rivals[f"onnx/{path.name}"] = functools.partial(write_on, 1, exported, prompt, n_new)
    with tempfile.TemporaryDirectory() as folder:
        for bits, name in gguf_file.BITS.items():
            path = f"{folder}/{name}.gguf"
            gguf_file.write(path, model, tokenizer, bits=bits)
            llama = llama_cpp.Server(path, cfg.block_size, n_threads)
            rivals[f"{LLAMA_CPP} {name}"] = functools.partial(llama.write, prompt, n_new)
        times = race(rivals, cfg.seconds / 2, compute.device, pause=PAUSE)
    expected = rivals[own]()
    rows = [
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
    torch.set_num_threads(n_threads)
    return rows


def bench_decode(cfg, compute):
    """Times generate.py, greedy, in tokens/s; and in samples/s, drawn, for prompts of different lengths.

    of_memory is the speed at which weights are read, as a share of the memory's speed. The next table compares the
    time with a cache and without one; with a draft the last one is speculative decoding. Against llama.cpp there is
    only a text by both.
    """
    model = build_model(cfg).to(compute.device, compute.dtype).eval()
    if cfg.draft or cfg.against == LLAMA_CPP:
        tokenizer = load_tokenizer(checkpoint.open_checkpoint(cfg.init_from).state["tokenizer"])
    if cfg.draft:  # refused before minutes are over
        speculations = load_speculations(cfg, compute, model, tokenizer)
    rows = []
    if cfg.against != LLAMA_CPP:  # beside which these would take a quarter of an hour of 135M parameters
        hf_model = convert(to_transformers, model)
        large = large_tensor(compute.device)
        batch_sizes = (1, 8, 64) if compute.device.type == "cuda" else (1, 8)
        seconds = cfg.seconds / 2 / (len(batch_sizes) + 1)
        for batch_size in batch_sizes:
            rows += decode_rows(model, hf_model, large, batch_size, seconds, compute.compile)
        rows += sample_rows(model, hf_model, seconds)
        rows += cached_and_uncached_rows(cfg, compute, model)
    if cfg.draft:
        rows += speculation_rows(cfg, compute, model, tokenizer, speculations)
    if cfg.against == LLAMA_CPP:
        rows += llama_cpp_rows(cfg, compute, model, tokenizer)
    return rows
