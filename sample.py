"""Writes stories with a trained model, as they are sampled.

    python sample.py                                                       the model in out
    python sample.py --out_dir=out/ts --start="Once upon a time" --temperature=0.7 --top_p=0.95
    python sample.py --start=FILE:prompts.txt --max_new_tokens=100         prompts, <|endoftext|> between them
    python sample.py --adapter=out/lora --start="What is it?"              what finetune_lora.py has learned
    python sample.py --onnx=out/ts/onnx                                    what export_onnx.py wrote, run by onnxruntime
    python sample.py --out_dir=out/ts --draft=out/draft                    the same text sooner: speculative decoding
    python sample.py --out_dir=hf:FOLDER --chat                            a conversation in the terminal
    python sample.py --num_samples=64 --compile=true                       on a GPU: slow to start, then fast
    python sample.py --block_size=1024 --rope_scaling=yarn:8,128           past its own context, 128

generate.py has the loop, which other scripts import.
"""

import math
import os
import re
import time
from dataclasses import dataclass, replace
from functools import partial

from config import BOOLS, Refusal, check_choice, check_range, convert, new_lines, run

# isort: split
import torch

import lora
import onnx_model
import rmsnorm
from chat import Chat, has_own_template, start_of_answer, talk
from checkpoint import open_given
from checkpoint_file import settings_of
from data import MODELS_OWN, STRIPPED, by_text_rule, prompt_ids, text_rule
from device import fast_bfloat16, resolve
from drafts import DraftModel, load_draft
from generate import generate, start_rows
from graphs import decoding_message
from memory import check_memory
from quantized import dequantized, has_kernels
from rmsnorm import choose_rmsnorm
from sizes import Undrawn, kv_cache_bytes
from speculate import MOST_GUESSES, Speculation

# an ONNX file is compared with model.py on so many tokens, whose logits may differ by this share
COMPARED = 32
ROUNDING = 1e-3
SEPARATOR = re.compile(r"^<\|endoftext\|>\n|<\|endoftext\|>", re.MULTILINE)
GENERATION = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass
class Config:
    only_prints = True  # no key: see config.run

    # fmt: off
    out_dir: str = "out"             # a model's folder, a checkpoint file or hf:FOLDER_OR_NAME; an adapter's base
    adapter: str = ""                # the folder of a LoRA adapter, or its file
    onnx: str = "auto"               # auto (OUT_DIR/onnx of the same weights) | no | a folder or file of export_onnx.py
    raw: bool = False                # give --start as it is, without the template that the model was fine-tuned with
    chat: bool = False               # talk with it: a line, an answer; by the model's own chat template
    system: str = ""                 # chat: what the model is told first; given empty, an empty system message
    start: str = ""                  # the prompt, \n a new line, or FILE:path; given empty, a new document
    special: bool = False            # special tokens that --start spells, as <|im_start|>, are special
    num_samples: int = 1             # continuations of each prompt, written in one batch
    max_new_tokens: int = 500        # tokens at most, each
    temperature: float = 0.8         # 0 = always the likeliest token
    top_k: int = 200                 # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0               # keep the likeliest tokens that make up this probability; 1 = all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely (Keskar et al. 2019)
    draft: str = ""                  # guesses tokens for the model to check: a small model, or ngram (the text so far)
    speculate: int = 4               # draft: tokens that it guesses at a time
    past_end: str = "stop"           # at block_size: stop | recompute (from its last half) | slide (windows alone)
    block_size: int = 0              # another context than the model's: 0 = its own; not for learned positions
    rope_scaling: str = ""           # another rope_scaling than the model's, as in train.py -h: "" = its own
    seed: int = 1337                 # the same seed, the same story: to the letter in float32 on one kind of processor
    device: str = "auto"             # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"              # auto (float32 on a CPU, for floats) | float32 | tf32 | bfloat16 | float16
    compile: str = "auto"            # torch.compile: auto (false: its start-up is long) | true | false
    rmsnorm: str = "auto"            # auto | torch | cpu | cuda (our kernel)
    # fmt: on

    def __post_init__(self):
        check_range(self, "at least 1", "num_samples", "max_new_tokens")
        check_range(self, "at least 0", "temperature", "top_k")
        check_range(self, "above 0 and at most 1", "top_p")
        check_range(self, "above 0", "repetition_penalty")
        check_range(self, f"at least 1 and at most {MOST_GUESSES}", "speculate")
        check_choice(self, "past_end", ("stop", "recompute", "slide"))
        check_choice(self, "rmsnorm", rmsnorm.SETTINGS)
        if self.onnx_path and self.past_end == "slide":
            raise ValueError("an ONNX file keeps a text whole, until block_size: no slide")
        if self.is_compiled and (self.onnx_path or self.draft):
            raise ValueError("compile is for a model's own steps: leave out onnx and draft")
        if self.onnx_path and self.draft:
            raise ValueError(
                "an ONNX file cannot take tokens back, as guesses of a draft must be: leave out draft"
            )
        if self.chat and (self.start or self.num_samples != 1):
            raise ValueError("chat reads what you type: leave out start and num_samples")
        if self.chat and (self.raw or self.special):
            raise ValueError(
                "chat puts what you type into the model's template, as text: leave out raw and special"
            )
        if self.system and not self.chat:
            raise ValueError("system is what a chat begins with: --chat")
        if self.onnx_path and not self.is_plain:
            raise ValueError(
                "an ONNX file is whole and computed on the CPU, as it was written: "
                "leave out adapter, device, dtype, rmsnorm, block_size and rope_scaling"
            )

    @property
    def is_compiled(self):
        return BOOLS.get(self.compile.lower(), False)

    @property
    def onnx_path(self):
        """What --onnx names, "" where it names none."""
        return "" if self.onnx in ("auto", "no") else self.onnx

    @property
    def is_plain(self):
        """Whether a whole model is computed in float32 on the CPU, as it was trained."""
        is_float32_on_cpu = self.device in ("auto", "cpu") and self.dtype in ("auto", "float32")
        is_changed = self.adapter or self.block_size or self.rope_scaling or self.rmsnorm == "cuda"
        return is_float32_on_cpu and not is_changed


# -----------------------------------------------------------------------------------------------------
# The model


def written_onnx(cfg, ckpt):
    """Returns the folder that export_onnx.py wrote for a checkpoint, where it has the same weights and writes what
    cfg asks for, but faster; else "".
    """
    is_one_text = cfg.num_samples == 1 and not cfg.start.startswith("FILE:")
    is_beyond = cfg.draft or cfg.is_compiled or cfg.past_end == "slide" or cfg.rmsnorm != "auto"
    if cfg.onnx == "no" or is_beyond or not (cfg.is_plain and is_one_text):
        return ""
    folder = os.path.join(os.path.dirname(ckpt.path), "onnx")
    c = settings_of(ckpt.state, ckpt.path)
    # in the file each expert computes each token, which PyTorch's slower reading of memory makes up for four times
    is_slower = c.mlp == "moe" and c.n_expert > 4 * c.n_expert_per_token
    written = onnx_model.fingerprint(folder)
    if is_slower or not written or written != ckpt.fingerprint:
        return ""
    return folder


@torch.inference_mode()
def still_computes(ckpt, exported):
    """Returns whether an OnnxModel of a checkpoint's weights computes what model.py does, which may have changed since
    it was exported.
    """
    with Undrawn():  # all weights are read from the checkpoint
        model, _ = ckpt.restore()
    c = model.config
    idx = torch.arange(min(c.block_size, COMPARED))[None] * 7 % c.vocab_size
    expected = dequantized(model)(idx)[0] if model.quantization else model(idx)[0]
    computed = torch.from_numpy(exported.run(idx, exported.new_past(*idx.shape)))
    if expected.shape != computed.shape:
        return False
    return bool((expected - computed).norm() <= ROUNDING * expected.norm())


def load_onnx(path, ckpt=None):
    """Returns (model, tokenizer, its settings, Compute, what to print of them) for what export_onnx.py wrote. Returns
    None where that is to stand for a checkpoint, ckpt, and computes something else.
    """
    model, tokenizer, config = onnx_model.load(path)
    if ckpt and not still_computes(ckpt, model):
        return None
    message = f"{model.path}: onnxruntime, {torch.get_num_threads()} threads"
    # torch only draws tokens: two pools of threads that spin on the same cores slow each other down to a third
    torch.set_num_threads(1)
    return model, tokenizer, config, resolve("cpu", "float32", "false"), message


def load(cfg):
    """Returns (model, tokenizer, its settings, Compute, what to print of them) for --out_dir and --adapter."""
    ckpt = open_given(cfg, cfg.adapter, takes_integers=True)
    ckpt.stretch(cfg.rope_scaling, cfg.block_size)
    compile = "false" if cfg.compile == "auto" else cfg.compile
    compute = resolve(cfg.device, cfg.dtype, compile)
    onnx_message = ""
    if compute.device.type == "cpu" and (folder := written_onnx(cfg, ckpt)):
        reason = f"{folder} computes what model.py did before it was changed"
        try:
            if written := load_onnx(folder, ckpt):
                *results, message = written
                return *results, f"{message}; --onnx=no is PyTorch"
        except Refusal as e:  # damaged, or of another onnxruntime: the checkpoint is whole
            reason = e
        onnx_message = f"\n{reason}, and is left out"
    model, tokenizer = ckpt.restore()
    if (
        cfg.dtype == "auto"
        and model.quantization
        and has_kernels(model.config)
        and fast_bfloat16(compute.device)
    ):
        compute = resolve(cfg.device, "bfloat16", compile)  # the only dtype that the kernels take
    paths = ckpt.path
    if ckpt.adapter:
        lora.merge(model)  # in float32; the model is as fast as its base then
        paths = f"{ckpt.path} and {ckpt.adapter_path}"
    model = model.to(compute.device, compute.dtype)
    rmsnorm_message = choose_rmsnorm(model, cfg.rmsnorm, compute)
    graph_message = decoding_message(
        compute.device, cfg.max_new_tokens, bool(cfg.draft), cfg.is_compiled
    )
    message = f"{paths}: {compute.message}{rmsnorm_message}{graph_message}{onnx_message}"
    return model, tokenizer, ckpt.config, compute, message


def model_defaults(cfg, tokenizer):
    """Returns cfg with the settings of a model's generation_config.json where the command line has none, and
    a line about them, "" where there are none. Raises Refusal.
    """
    given = cfg.given
    generation = tokenizer.generation
    if generation.get("do_sample") is False:  # always the likeliest token, whatever else stands there
        generation = generation | {"temperature": 0.0}
    values = {}
    for key in GENERATION:
        value = generation.get(key)
        if value is not None and key not in given:
            kind = type(getattr(cfg, key))
            values[key] = convert(value, kind, f"{key} in generation_config.json", parse=False)
    try:
        cfg = replace(cfg, **values)
    except ValueError as e:
        raise Refusal(f"generation_config.json: {e}")
    cfg.given = given
    texts = [f"{key} {value}" for key, value in values.items()]
    return cfg, f"{', '.join(texts)}, as the model's generation_config.json says" if texts else ""


def load_speculation(cfg, model, tokenizer, compute):
    """Returns the Speculation that --draft asks for, None without it. Raises Refusal."""
    if cfg.draft:
        draft = load_draft(cfg.draft, model, tokenizer, cfg.speculate, compute, cfg.rmsnorm)
        return Speculation(draft, cfg.speculate)
    if "speculate" in cfg.given:
        raise Refusal(
            "speculate is the number of a draft's guesses: --draft=FOLDER or --draft=ngram makes them"
        )
    return None


def check_caches(cfg, model, context, speculation, n_rows, compute):
    """Raises Refusal where the device has no memory for the caches of so many rows: the model's and a draft model's."""
    caches = [(model.config, context)]
    if speculation and isinstance(speculation.draft, DraftModel):
        caches.append((speculation.draft.model.config, speculation.draft.context))
    needs = 0
    for c, longest in caches:
        length = min(cfg.max_new_tokens, longest)
        needs += kv_cache_bytes(c, n_rows, length, compute.dtype.itemsize)
    check_memory(compute.device, needs, "try a smaller num_samples")


# -----------------------------------------------------------------------------------------------------
# The prompts


def read_start(start):
    """Returns the prompts that --start means, as they stand.

    In a file <|endoftext|> stands between prompts, in a line of its own or not, and the newline that ends
    a prompt's last line does not belong to it. Raises Refusal for a file that cannot be read.
    """
    if not start.startswith("FILE:"):
        return [new_lines(start)]
    path = start[5:]
    try:
        with open(path, encoding="utf-8-sig") as f:
            return [text.removesuffix("\n") for text in SEPARATOR.split(f.read())]
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise Refusal(f"{path} is not UTF-8 text: byte {e.start}")


def encode_starts(cfg, starts, tokenizer, template, rule):
    """Returns (texts, prompts): how each row's text starts, and its ids, num_samples rows a start. Raises
    ValueError.
    """
    if cfg.special and template not in ("", MODELS_OWN):
        raise ValueError(
            f"the model was fine-tuned on prompts in {template!r:.60}, and all of that is text: leave out special, "
            "or take --raw, which leaves out the template"
        )
    texts = []
    prompts = []
    for start in starts:
        text, ids = start, None
        if template and start:  # an empty start begins a document, with a template too
            text, ids = start_of_answer(tokenizer, by_text_rule(start, rule), template)
        texts += [text] * cfg.num_samples
        prompts += [ids or prompt_ids(tokenizer, text, cfg.special)] * cfg.num_samples
    return texts, prompts


def template_line(template, rule):
    """Returns the line that says what prompts are put into."""
    shown = "the model's chat template" if template == MODELS_OWN else repr(template)
    stripped = ", without the space around it" if rule == STRIPPED else ""
    return f"each prompt is put into {shown}{stripped}; --raw leaves it as it is"


# -----------------------------------------------------------------------------------------------------
# The texts


def make_steps(cfg, model, speculation, ends):
    """Returns the function from prompts to the steps of their texts: generate's, or those of a Speculation."""
    options = {"compile": True} if cfg.is_compiled else {}
    return partial(
        speculation.generate if speculation else generate,
        model,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=ends,
        seed=cfg.seed,
        past_end=cfg.past_end,
        **options,
    )


def converse(steps, tokenizer, block_size, template, system, rule):
    """Talks with a model in the terminal; steps: the function of make_steps. Raises Refusal where the model
    was never taught to talk.
    """
    template = template or MODELS_OWN
    if template == MODELS_OWN and not has_own_template(tokenizer):
        raise Refusal(
            "the model has no chat template, it writes texts: --start=TEXT begins one; "
            "finetune_lora.py teaches a model to answer"
        )
    talk(Chat(steps, tokenizer, block_size, template, system, rule))


def compile_seconds(steps, prompts):
    """Makes the first steps of a text, which compiles them. Returns how many seconds that took."""
    start = time.perf_counter()
    text = steps(prompts)
    next(text)
    next(text, None)  # None where all rows have ended with their first token
    text.close()
    return time.perf_counter() - start


def past_end_advice(model):
    """Returns how a text goes on past the end of a model's context."""
    can_slide = not (isinstance(model, onnx_model.OnnxModel) or model.config.what_ends_a_text)
    return f"--past_end={'slide' if can_slide else 'recompute'} goes on"


def write(steps, texts, prompts, tokenizer, context, advice):
    """Prints the first row as it comes, then the others, then the speed; advice: what to do about a full context."""
    line = "-" * 80
    stream = tokenizer.stream()
    start = time.perf_counter()
    times = []
    print(f"{line}\n{texts[0]}", end="", flush=True)
    for rows in steps:
        times.append(time.perf_counter())
        if rows[0].new is not None:
            print(stream(rows[0].new), end="", flush=True)
    print(stream(None), end="")  # of a character that was not finished
    for i, row in enumerate(rows):
        if i > 0:
            # not as it comes: to decode a large batch at each step would keep a GPU waiting
            print(f"\n{line}\n{texts[i]}{tokenizer.decode_more(row.ids)}", end="")
        if row.end == "block_size":
            print(f"\n[the context of {context} tokens is full; {advice}]", end="")
    print(f"\n{line}\n{speed_line(prompts, rows, start, times)}")


def speed_line(prompts, rows, start, times):
    """Returns a line about the speed: the prompts' tokens until the first step, then the new ones."""
    n_read = sum(len(prompt) for prompt in prompts)
    n_new = sum(len(row.ids) for row in rows)
    message = (
        f"prefill {n_read} tokens, {n_read / (times[0] - start):,.0f} tokens/s; decode {n_new} tokens"
    )
    seconds = times[-1] - times[0]
    if seconds and n_new > len(prompts):
        message += f", {(n_new - len(prompts)) / seconds:,.0f} tokens/s"
    return message


def main(cfg):
    if cfg.onnx_path and "out_dir" in cfg.given:
        raise Refusal("onnx takes the place of out_dir: give one of them")
    model, tokenizer, config, compute, message = load_onnx(cfg.onnx_path) if cfg.onnx_path else load(cfg)
    cfg, generation_message = model_defaults(cfg, tokenizer)
    message = "\n".join(filter(None, (message, generation_message)))
    # a model's own start is text: it names no file here
    starts = read_start(cfg.start) if "start" in cfg.given else [str(config.get("start", ""))]
    template = "" if cfg.raw else str(config.get("template", ""))
    rule = text_rule(config)
    context = math.inf if cfg.past_end == "slide" else model.config.block_size
    speculation = load_speculation(cfg, model, tokenizer, compute)
    check_caches(cfg, model, context, speculation, cfg.num_samples * len(starts), compute)
    steps = make_steps(cfg, model, speculation, tokenizer.ends)
    if cfg.chat:
        print(message)
        system = cfg.system if "system" in cfg.given else None  # an empty one is a message too
        converse(steps, tokenizer, context, template, system, rule)
    else:
        try:
            texts, prompts = encode_starts(cfg, starts, tokenizer, template, rule)
            # refuses what generate would, before a prompt is printed
            start_rows(model, prompts, cfg.max_new_tokens, tokenizer.ends, cfg.past_end)
            print(message)
            if template and any(starts):
                print(template_line(template, rule))
            if cfg.is_compiled:
                print(f"compiled in {compile_seconds(steps, prompts):.1f} s")
            write(steps(prompts), texts, prompts, tokenizer, context, past_end_advice(model))
        except ValueError as e:
            raise Refusal(e)
    if speculation:
        print(speculation.line())


if __name__ == "__main__":
    run(main, Config)
