"""Writes stories with a trained model, as they are sampled.

    python sample.py                                                       the model in out
    python sample.py --out_dir=out/ts --start="Once upon a time" --temperature=0.7 --top_p=0.95
    python sample.py --start=FILE:prompts.txt --max_new_tokens=100         a prompt, or several with <|endoftext|> between
    python sample.py --adapter=out/lora --start="What is it?"              with what finetune_lora.py has learned, in its template
    python sample.py --onnx=out/ts/onnx                                    what export_onnx.py wrote, run by onnxruntime

generate() is a Python generator that other scripts import.
"""
import time
from dataclasses import dataclass

import torch

import checkpoint
import lora
import onnx_model
import rmsnorm
from config import Refusal, run
from device import check_memory, resolve
from model import choose_rmsnorm, kv_cache_bytes


@dataclass
class Config:
    out_dir: str = "out"             # the folder of a trained model, a checkpoint file, or hf:FOLDER_OR_NAME; with an adapter: its base
    adapter: str = ""                # the folder of a LoRA adapter, or its file
    onnx: str = ""                   # a folder that export_onnx.py wrote, or an .onnx file in it; no out_dir then
    raw: bool = False                # give --start as it is, without the template that the model was fine-tuned with
    start: str = ""                  # the prompt, or FILE:path; "" starts a new document
    num_samples: int = 1             # continuations of each prompt, written in one batch
    max_new_tokens: int = 500        # tokens at most, each
    temperature: float = 0.8         # 0 = always the likeliest token
    top_k: int = 200                 # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0               # keep the likeliest tokens that make up this probability; 1 = all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely (Keskar et al. 2019)
    past_end: str = "stop"           # at block_size: stop | recompute (go on from the last half of the window)
    seed: int = 1337                 # the same seed, the same story: to the letter in float32 on one kind of processor
    device: str = "auto"             # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"              # auto (float32 on a CPU) | float32 | tf32 | bfloat16 | float16
    rmsnorm: str = "auto"            # auto | torch | cuda (our kernel)

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError("num_samples and max_new_tokens must be at least 1")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError("temperature and top_k cannot be negative; temperature 0 is greedy, top_k 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), not {self.repetition_penalty}")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise ValueError("seed must have at most 63 bits")
        if self.past_end not in ("stop", "recompute"):
            raise ValueError(f"past_end must be stop or recompute, not {self.past_end!r}")
        if self.rmsnorm not in rmsnorm.SETTINGS:
            raise ValueError(f"rmsnorm must be one of {' | '.join(rmsnorm.SETTINGS)}, not {self.rmsnorm!r}")
        if self.onnx and (self.adapter or self.device not in ("auto", "cpu") or self.dtype not in ("auto", "float32") or self.rmsnorm == "cuda"):
            raise ValueError("an ONNX file is whole and computed on the CPU, as it was written: leave out adapter, device, dtype and rmsnorm")


def next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """A token a row (B,) from logits (B, V). top_p keeps the token that crosses it (Holtzman et al. 2019)."""
    if temperature < 1e-5:  # divided by less, logits overflow
        return logits.argmax(-1)
    kept = None
    if 0 < top_k < logits.size(-1):  # the draw is over these alone, by id: rounding may not change whose is which
        kept = logits.topk(top_k, sorted=False).indices.sort(-1).values
        logits = logits.gather(-1, kept)
    logits = logits.float() / temperature
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p  # what is likelier already makes up top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    p = logits.softmax(-1)
    # p / Exponential(1) is largest at i with probability p[i]: a draw without waiting for the device
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return (drawn if kept is None else kept.gather(-1, drawn))[:, 0]


def penalized(logits, seen, penalty):
    """Logits (B, V) with those of seen tokens (B, V bool) made smaller: divided where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def prefill(model, windows, more):
    """Reads one window of ids a row, padded on the left: (the last tokens' logits (B, V), a cache with room for `more`)."""
    lengths, device = [len(w) for w in windows], model.device
    longest = max(lengths)
    idx = torch.tensor([[0] * (longest - n) + w for n, w in zip(lengths, windows)], device=device)
    doc = None
    if min(lengths) < longest:
        doc = torch.tensor([[-1] * (longest - n) + [0] * n for n in lengths], device=device)
    cache = model.new_cache(len(windows), min(longest + more, model.config.block_size + longest - min(lengths)))
    return model.next_logits(idx, cache, doc), cache


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=0.8, top_k=200, top_p=1.0, repetition_penalty=1.0, stop=None,
             seed=1337, past_end="stop"):
    """Continues prompts (lists of ids, of any lengths) together: a step yields a list with an id, or None, for each row.

    A row ends at the token `stop`, which is not yielded, after max_new_tokens, or when block_size tokens are in its context;
    past_end="recompute" then reads the last half of the window again and goes on. The return value (StopIteration.value) says
    for each row which: "stop", "length" or "block_size". Raises ValueError for a prompt that is empty or too long.
    """
    c, device = model.config, model.device
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt must have at least one token")
        if len(prompt) > c.block_size and past_end == "stop":
            raise ValueError(f"the prompt has {len(prompt)} tokens and the context {c.block_size}: shorten it, or keep only its "
                             f"end with --past_end=recompute")
    rng, half = torch.Generator(device).manual_seed(seed), max(1, c.block_size // 2)
    windows = [list(p) if len(p) <= c.block_size else list(p[-half:]) for p in prompts]  # what the model sees of each row
    if repetition_penalty != 1:
        seen, every_row = torch.zeros(len(prompts), c.vocab_size, dtype=torch.bool, device=device), torch.arange(len(prompts), device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
    ended, cache, was_training = [None] * len(prompts), None, model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            if cache is None:
                logits, cache = prefill(model, windows, max_new_tokens - step)
            else:  # a row that has ended goes on as padding
                doc = torch.tensor([[-1 if e else 0] for e in ended], device=device) if any(ended) else None
                logits = model.next_logits(ids[:, None], cache, doc)
            if repetition_penalty != 1:
                logits = penalized(logits, seen, repetition_penalty)
            ids = next_token(logits, temperature, top_k, top_p, rng)
            if repetition_penalty != 1:
                seen[every_row, ids] = True
            new = ids.tolist()
            for row, id in enumerate(new):
                windows[row].append(id)
                if id == stop:
                    ended[row] = ended[row] or "stop"
            if all(ended):
                break
            yield [None if end else id for end, id in zip(ended, new)]
            for row in range(len(prompts)):
                if ended[row]:
                    windows[row] = windows[row][-1:]
                elif len(windows[row]) > c.block_size and past_end == "stop":
                    ended[row] = "block_size"
                elif len(windows[row]) > c.block_size:
                    windows[row], cache = windows[row][-half:], None
            if all(ended):
                break
    finally:
        model.train(was_training)
    return [end or "length" for end in ended]


def finish(steps, heard=lambda ids: None):
    """Runs generate() to its end: (a list of ids a row, why each ended); heard(ids) after each step."""
    rows = []
    while True:
        try:
            ids = next(steps)
        except StopIteration as e:
            return rows or [[] for _ in e.value], e.value
        rows = rows or [[] for _ in ids]
        for row, id in zip(rows, ids):
            row += [] if id is None else [id]
        heard(ids)


def render(template, prompt):
    """The text that a fine-tuned model expects: its template is a text with {prompt} in it."""
    return template.replace("{prompt}", prompt.strip())


def prompt_ids(tokenizer, text):
    """The ids to start from: documents start after end-of-text. A character model may never have seen that token."""
    ids = tokenizer.encode(text)
    return ids if tokenizer.kind == "char" and ids else [tokenizer.bos, *ids]


def read_start(start):
    """The prompts that --start means."""
    if not start.startswith("FILE:"):
        return [start]
    try:
        with open(start[5:], encoding="utf-8-sig") as f:
            return [text.strip() for text in f.read().split("<|endoftext|>")]
    except OSError as e:
        raise Refusal(f"cannot read {start[5:]}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise Refusal(f"{start[5:]} is not UTF-8 text: byte {e.start}")


def load(cfg):
    """(model, tokenizer, its settings, Compute, what to say of them) for --out_dir, --adapter or --onnx."""
    if cfg.onnx:
        if "out_dir" in cfg.given:
            raise Refusal("onnx takes the place of out_dir: give one of them")
        model, tokenizer, config = onnx_model.load(cfg.onnx)
        said = f"{model.path}: onnxruntime, {torch.get_num_threads()} threads"
        torch.set_num_threads(1)  # for the draw: two pools of threads that spin on the same cores slow each other down to a third
        return model, tokenizer, config, resolve("cpu", "float32", "false"), said
    adapter_path = cfg.adapter and checkpoint.find(cfg.adapter, "adapter_best.pt")
    adapter = checkpoint.load(adapter_path, checkpoint.ADAPTER_KEYS) if cfg.adapter else None
    path = checkpoint.base_of(adapter, adapter_path) if adapter and "out_dir" not in cfg.given else checkpoint.find(cfg.out_dir)
    ckpt = checkpoint.load(path)
    compute = resolve(cfg.device, cfg.dtype, "false")
    model, tokenizer = checkpoint.restore(ckpt, path)
    if adapter:
        checkpoint.restore_adapters(adapter, adapter_path, ckpt, path, model)
        lora.merge(model)  # in float32; then it is as fast as its base
    model = model.to(compute.device, compute.dtype)
    said = choose_rmsnorm(model, cfg.rmsnorm, compute)
    return model, tokenizer, (adapter or ckpt)["config"], compute, f"{path}{f' and {adapter_path}' if adapter else ''}: {compute.said}{said}"


def main(cfg):
    model, tokenizer, config, compute, said = load(cfg)
    starts = read_start(cfg.start) if cfg.start else [str(config.get("start", ""))]  # a model's own is text: it names no file here
    template = "" if cfg.raw else str(config.get("template", ""))
    if template:
        starts = [start and render(template, start) for start in starts]  # an empty one starts a document, as ever
    needs = kv_cache_bytes(model.config, cfg.num_samples * len(starts), min(cfg.max_new_tokens, model.config.block_size), compute.dtype.itemsize)
    check_memory(compute.device, needs, "try a smaller num_samples")
    texts = [t for t in starts for _ in range(cfg.num_samples)]
    try:
        prompts = [prompt_ids(tokenizer, t) for t in texts]
        print(said)
        if template and any(starts):
            print(f"each prompt is put into {template!r}; --raw leaves it as it is")
        write(generate(model, prompts, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty,
                       tokenizer.eot, cfg.seed, cfg.past_end), texts, prompts, tokenizer, model.config)
    except ValueError as e:
        raise Refusal(e)


def write(steps, texts, prompts, tokenizer, c):
    """Prints the first row as it comes, then the others, then the speed."""
    streams, rest = [tokenizer.stream() for _ in texts], list(texts)
    start, times = time.perf_counter(), []
    print("-" * 80 + "\n" + texts[0], end="", flush=True)

    def heard(ids):
        times.append(time.perf_counter())
        for row, id in enumerate(ids):
            piece = "" if id is None else streams[row](id)
            rest[row] += piece
            if row == 0:
                print(piece, end="", flush=True)

    rows, ended = finish(steps, heard)
    for row, end in enumerate(ended):
        print("\n" + "-" * 80 + "\n" + rest[row] if row else "", end="")
        if end == "block_size":
            print(f"\n[the context of {c.block_size} tokens is full; --past_end=recompute goes on]", end="")
    read, made, times = sum(map(len, prompts)), sum(map(len, rows)), times or [time.perf_counter()]
    decoding = times[-1] - times[0]
    print("\n" + "-" * 80)
    print(f"prefill {read} tokens, {read / (times[0] - start):,.0f} tokens/s; decode {made} tokens" +
          (f", {(made - len(prompts)) / decoding:,.0f} tokens/s" if decoding and made > len(prompts) else ""))


if __name__ == "__main__":
    run(main, Config)
