"""Writes a trained model as ONNX, compares the file with PyTorch and times both.

    python export_onnx.py --out_dir=out/ts                              # out/ts/onnx/model.onnx, float32
    python export_onnx.py --out_dir=out/ts --to=story --quantize=int8   # also story/model_int8.onnx, or int4
    python sample.py --onnx=out/ts/onnx                                 # or --onnx=story/model_int8.onnx

The folder also has tokenizer.json and config.json. model.onnx is one file, as large as the parameters;
model_int8.onnx is about a quarter of that. model_int4.onnx is smaller still, with the embedding and the head in
4 bits, too, where the loss allows it. Both need onnxruntime, whose own operators they have; model_plain_int8.onnx has
operators of ONNX alone. Of a mixture of experts each computes each token in model.onnx and model_plain_int8.onnx, and a
file says so in its metadata, as "experts": right, but slower than the model here where a token has less than a quarter.

The graph takes ids (B, T); places (K,), those among the T tokens, from 0 on, whose logits are wanted; and the keys and
values of the tokens before them, past_k.0 past_v.0 past_k.1 ..., each (P, B, n_kv_head, head_dim). It returns logits
(B, K, V) and present_k.0 present_v.0 ..., each (P + T, B, n_kv_head, head_dim), which are the past of the next call.
P may be 0, and places have any order. The graph does not check that P + T stays within block_size; its caller does.

model_int8.onnx and model_int4.onnx have onnxruntime's GroupQueryAttention where that computes what the model does (no
windows, no ALiBi, head_dim a multiple of 16), and its QMoE for experts, from version 1.32 on, so that a token goes
through its own alone. Then there is an input total, P + T as int32, and keys and values are
(B, n_kv_head, P, head_dim). They may also be of more than P + T tokens: whoever binds the same memory as past and as
present has new tokens written to their places, and nothing copied. Several rows take one token a call after a past.
"""

import copy
import importlib.util
import itertools
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from config import Refusal, check_choice, check_range, hf_name, is_hf, run

# isort: split
import torch

import checkpoint
import dataset
import onnx_model
from device import resolve
from folders import new_folder, write_atomic
from generate import generate
from onnx_graph import DENSE, OPSET, export, is_fusible
from onnx_integers import LEAST, quantize
from quantized import dequantized
from race import PAUSE, race
from score import evaluate
from sizes import num_params, size_text

# The largest difference that is allowed, as a share of a tensor's largest number: some 50 times that of the demo
# model, and less than an epsilon of 1e-6 in place of 1e-5 would make
MAX_DIFFERENCE = 3e-5
# Deeper models round more: they may differ by so many times PyTorch's own difference from float64
MAX_ROUNDING = 5
LONGEST = 256  # tokens of context that PyTorch, onnxruntime and int8 are compared at


class Way(NamedTuple):
    """How quantize() rewrites a graph."""

    options: dict
    words: str
    most: float  # the share by which it may raise the validation loss; else the next way is tried


WAYS = {
    "int8": [Way({}, "groups of 8 bits", 0.01)],
    "int4": [
        Way({"bits": 4, "table_bits": 4}, "embedding and head in 4 bits", 0.01),
        Way({"bits": 4}, "embedding and head in 8 bits", 0.1),
    ],
    "plain_int8": [Way({"plain": True}, "8 bits in operators of ONNX alone", 0.01)],
}


@dataclass
class Config:
    out_dir: str = "out"  # the folder of a trained model, a checkpoint file or hf:FOLDER_OR_NAME
    to: str = ""  # the folder to write; "" = OUT_DIR/onnx
    overwrite: bool = False  # move a folder that is in the way aside
    block_size: int = 0  # another context than the model's, as in sample.py; 0 = its own
    rope_scaling: str = ""  # another one than the model's, as in sample.py; "" = its own
    quantize: str = "none"  # none | int8 | int4 | plain_int8: integers too, beside model.onnx
    dataset: str = ""  # that is judged by the validation split of data/NAME; "" = the training's
    eval_tokens: int = 16384  # tokens of it, evenly spaced; 0 = all
    seconds: float = 5.0  # of PyTorch and onnxruntime taking turns; three rounds at least

    def __post_init__(self):
        if self.to and (not Path(self.to).name or self.to.endswith(".onnx")):
            raise ValueError(f"to is a folder to write, not {self.to!r}")
        check_choice(self, "quantize", ("none", *WAYS))
        check_range(self, "at least 0", "eval_tokens")
        check_range(self, "at least 0 and at most 3600", "seconds")
        for library in "onnx", "onnxscript", "onnxruntime":
            if not importlib.util.find_spec(library):
                raise ValueError(f"exporting needs {library}: pip install {library}")
        if self.quantize in ("int8", "int4"):
            least = LEAST[int(self.quantize[-1])]
            if problem := onnx_model.older_than(least):
                raise ValueError(f"{self.quantize} {problem}, or --quantize=plain_int8")


# -----------------------------------------------------------------------------------------------------
# Checks


@torch.inference_mode()
def parity(model, other):
    """Compares logits, keys and values of two models, Transformers or OnnxModels, over pasts and batch
    sizes.

    Returns the largest difference, and the largest as a share of its tensor's largest number, or of 1
    where that is smaller. Both are inf where a number is not finite.
    """
    c = model.config
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    largest_share = 0.0
    for B, (P, T) in itertools.product((1, 3), call_sizes(c.block_size)):
        idx = torch.randint(c.vocab_size, (B, P + T), generator=generator)
        for expected, computed in zip(run_after(model, idx, P), run_after(other, idx, P)):
            difference = (expected - computed[-len(expected) :]).abs()
            if not difference.isfinite().all():
                return math.inf, math.inf
            difference = difference.max().item()
            size = max(1, expected.abs().max().item())
            largest = max(largest, difference)
            largest_share = max(largest_share, difference / size)
    return largest, largest_share


def call_sizes(block_size):
    """Returns pairs (P, T) of a past's length and a number of new tokens, together no more than block_size and
    LONGEST: 8,192 tokens with 135 million parameters took 13 GB and a quarter of an hour.
    """
    block_size = min(block_size, LONGEST)
    pasts = {min(P, block_size - 1) for P in (0, 1, 7, block_size // 2, block_size - 1)}
    return [(P, T) for P in sorted(pasts) for T in sorted({1, min(5, block_size - P)})]


def run_after(model, idx, P):
    """Returns what run_pytorch or run_onnx does, by the kind of the model."""
    if isinstance(model, onnx_model.OnnxModel):
        return run_onnx(model, idx, P)
    return run_pytorch(model, idx, P)


def run_pytorch(model, idx, P):
    """Returns the logits of idx after its first P tokens, and all keys and values in the graph's layout; in a layer
    with a window only the last ones, which its cache keeps.
    """
    cache = model.new_cache(*idx.shape)
    if P:
        model.hidden(idx[:, :P], cache)
    logits, _ = model(idx[:, P:], cache=cache)
    outputs = [logits]
    for pair in zip(cache.k, cache.v):
        order = cache.slot_places(pair[0].size(2), 0).argsort()  # a ring's last token may stand anywhere
        outputs += [tensor[:, :, order].permute(2, 0, 1, 3) for tensor in pair]
    return outputs


def run_onnx(exported, idx, P):
    """Returns what run_pytorch does."""
    past = exported.new_past(*idx.shape)
    if P:
        exported.run(idx[:, :P], past)
    logits = exported.run(idx[:, P:], past)
    return [torch.from_numpy(array) for array in (logits, *past.keys_and_values())]


def write_greedy(model, prompt, n):
    """Returns the ids of the likeliest n tokens after a prompt."""
    *_, [row] = generate(model, [prompt], n, temperature=0, past_end="recompute")
    return row.ids


def is_rounding(model, share):
    """Returns whether a share, as parity returns it, comes from rounding. For a deep model prints PyTorch's own."""
    if not MAX_DIFFERENCE < share < math.inf:
        return share <= MAX_DIFFERENCE
    _, rounding = parity(copy.deepcopy(model).double(), model)
    print(f"PyTorch differs from itself in float64 by {rounding:.2g} of the largest number")
    return share <= max(MAX_DIFFERENCE, MAX_ROUNDING * rounding)


def check(model, exported, prompt, n):
    """Prints by how much an OnnxModel differs from its Transformer. Raises Refusal where that is too much."""
    largest, share = parity(model, exported)
    pasts = sorted({P for P, _ in call_sizes(model.config.block_size)})
    print(
        f"PyTorch and onnxruntime differ by {largest:.2g} at most, {share:.2g} of the largest number "
        f"(past {', '.join(str(P) for P in pasts)}; batch 1 and 3)"
    )
    if not is_rounding(model, share):
        message = "the ONNX file does not compute what PyTorch does"
        advice = (
            "where model.py was changed, so must be onnx_modules.py, which has its own Attention and MoE"
        )
        raise Refusal(f"{message}: {largest:.2g} is more than rounding; {advice}", status=1)
    pytorch_ids = write_greedy(model, prompt, n)
    onnx_ids = write_greedy(exported, prompt, n)
    for i, (pytorch_id, onnx_id) in enumerate(zip(pytorch_ids, onnx_ids)):
        if pytorch_id != onnx_id:
            message = f"greedy text differs from token {i} of {len(pytorch_ids)} on: {pytorch_id}"
            raise Refusal(f"{message}, from onnxruntime {onnx_id}", status=1)
    print(f"greedy text: {len(pytorch_ids)} tokens, all equal")


def load_validation(cfg, trained_on, tokenizer):
    """Returns the ids of the validation split on which integers are judged. Raises Refusal where there is none."""
    name = cfg.dataset or trained_on
    advice = f"--dataset=NAME names data that {cfg.quantize} can be judged by"
    if not name:
        raise Refusal(f"what {cfg.out_dir} was trained on is not known: {advice}")
    folder = f"data/{name}"
    try:
        _, data, data_tokenizer = dataset.load(folder)
    except Refusal as e:
        message = (
            f"{cfg.quantize} is judged by a validation split, and --dataset=NAME would name another"
        )
        raise Refusal(f"{message}: {e}")
    if data_tokenizer.sha256 != tokenizer.sha256:
        raise Refusal(f"{folder} has another tokenizer than the model; {advice}")
    return data["val"]


def validation_loss(model, ids, tokens):
    """Returns the nats a token of an OnnxModel on about so many ids."""
    compute = resolve("cpu", "float32", "false")
    return evaluate(model, ids, min(model.config.block_size, LONGEST), 4, compute, tokens)


# -----------------------------------------------------------------------------------------------------
# Speed


def write_on(threads, model, prompt, n):
    """Returns write_greedy's ids, on so many of torch's threads: onnxruntime has its own, see sample.load_onnx."""
    torch.set_num_threads(threads)
    return write_greedy(model, prompt, n)


def compare_speed(models, prompt, n, seconds):
    """Prints the tokens/s of {name: model}, each writing n tokens after a prompt, in turns."""
    threads = torch.get_num_threads()
    rivals = {}
    for name, model in models.items():
        rivals[name] = partial(write_on, threads if name == "PyTorch" else 1, model, prompt, n)
    times = race(rivals, seconds, torch.device("cpu"), pause=PAUSE)
    torch.set_num_threads(threads)
    speeds = ", ".join(f"{name} {n / time['median']:,.0f}" for name, time in times.items())
    print(f"tokens/s, one text of {n} tokens, {threads} threads, in turns: {speeds}")


# -----------------------------------------------------------------------------------------------------
# The folder


def write_graph(proto, path):
    """Writes the file. Returns its bytes."""
    write_atomic(str(path), lambda f: f.write(proto.SerializeToString()))
    return path.stat().st_size


def fused_graph(model, folder):
    """Returns the graph with onnxruntime's own attention; None where the model has another attention, or where the
    onnxruntime here does not take the graph or computes something else.
    """
    if not is_fusible(model):
        return None
    proto = export(model, fused=True)
    path = folder / "model_fused.onnx"
    write_graph(proto, path)
    try:
        _, share = parity(model, onnx_model.open_session(str(path), model.config))
        problem = f"differs by {share:.2g} of the largest number"
    except Refusal:  # its message names a file that nobody asked for
        share = math.inf
        problem = "does not run here"
    finally:
        path.unlink(missing_ok=True)
    if is_rounding(model, share):
        return proto
    print(f"onnxruntime's own attention {problem}: integers get that of model.onnx, which is slower")
    return None


def write_integers(cfg, proto, quantization, ids, float_loss, folder):
    """Writes a float32 graph in integers as cfg.quantize says, by the first of its ways that is good enough, else by
    the last. In 4 bits a model that had 4 bits already keeps its groups. Returns the OnnxModel of the file, and the
    share by which it raises the loss on ids.
    """
    keeps_groups = cfg.quantize == "int4" and quantization is not None
    group_size = quantization.group_size if keeps_groups else 0
    path = folder / f"model_{cfg.quantize}.onnx"
    for way in WAYS[cfg.quantize]:
        integers = copy.deepcopy(proto)
        quantize(integers, **way.options, group_size=group_size)
        size = write_graph(integers, path)
        model, _, _ = onnx_model.load(str(path))
        loss = validation_loss(model, ids, cfg.eval_tokens)
        increase = loss / float_loss - 1
        print(f"{path.name}: {size / 1e6:.2f} MB, {way.words}")
        print(
            f"validation loss: float32 {float_loss:.4f}, {cfg.quantize} {loss:.4f} nats a token, "
            f"{100 * increase:+.2f}%"
        )
        if increase <= way.most:
            break
    return model, increase


def write_description(model, tokenizer, ckpt, fingerprint, folder):
    """Writes config.json and the tokenizer's files. fingerprint: ckpt's."""
    start = str(ckpt.config.get("start", ""))
    description = onnx_model.describe(
        model.config, tokenizer, start, ckpt.template, fingerprint, ckpt.text_rule
    )
    text = json.dumps(description, indent=1)
    tokenizer.save_files(folder)
    write_atomic(str(folder / "config.json"), lambda f: f.write(text.encode()))


def write_float(model, fingerprint, folder):
    """Writes model.onnx, and prints what is in it. Returns its graph."""
    proto = export(model)
    proto.metadata_props.add(key="fingerprint", value=fingerprint)
    path = folder / "model.onnx"
    size = write_graph(proto, path)
    operators = " ".join(sorted({node.op_type for node in proto.graph.node}))
    print(
        f"{path.name}: {size / 1e6:.2f} MB for {num_params(model):,} parameters, "
        f"{4 * num_params(model) / 1e6:.2f} MB; opset {OPSET}: {operators}"
    )
    if model.config.mlp == "moe":
        print(f"{size_text(model)}; in the file experts are {DENSE}")
    return proto


def write_folder(cfg, model, tokenizer, ckpt, ids, folder):
    """Fills the folder, prints what is in it, and checks and times the models in it.

    ids: the validation split, on which integers are judged. Returns the share by which they raise the loss there,
    0 where none are written. Raises Refusal where model.onnx does not compute what the model does.
    """
    fingerprint = ckpt.fingerprint  # which reads all weights
    write_description(model, tokenizer, ckpt, fingerprint, folder)
    quantization = model.quantization
    if quantization:
        print(f"{ckpt.path} is quantized: in model.onnx its integers are written out as float32")
        model = dequantized(model)
    proto = write_float(model, fingerprint, folder)
    exported, _, _ = onnx_model.load(str(folder))
    prompt = [tokenizer.eot]
    check(model, exported, prompt, 200)

    models = {"PyTorch": model, "onnxruntime": exported}
    increase = 0.0
    if cfg.quantize != "none":
        float_loss = validation_loss(exported, ids, cfg.eval_tokens)
        fused = None if cfg.quantize == "plain_int8" else fused_graph(model, folder)
        if fused:
            fused.metadata_props.add(key="fingerprint", value=fingerprint)
            proto = fused
        models[cfg.quantize], increase = write_integers(
            cfg, proto, quantization, ids, float_loss, folder
        )
    compare_speed(models, prompt, min(200, model.config.block_size), cfg.seconds)
    return increase


def main(cfg):
    ckpt = checkpoint.open_checkpoint(cfg.out_dir, takes_integers=True)
    ckpt.stretch(cfg.rope_scaling, cfg.block_size)
    if is_hf(ckpt.path) and not cfg.to:
        raise Refusal("name the folder to write: --to=FOLDER")
    folder = Path(cfg.to) if cfg.to else Path(ckpt.path).parent / "onnx"
    ways = "--overwrite moves it aside, --to=OTHER writes elsewhere"
    with new_folder(folder, cfg.overwrite, ways, [hf_name(ckpt.path)]) as tmp:
        model, tokenizer = ckpt.restore()
        ids = load_validation(cfg, ckpt.dataset, tokenizer) if cfg.quantize != "none" else None
        increase = write_folder(cfg, model, tokenizer, ckpt, ids, tmp)
        limit = WAYS[cfg.quantize][-1].most if cfg.quantize in WAYS else 0
        is_good = increase <= limit  # nan is not
        if not is_good:
            (tmp / f"model_{cfg.quantize}.onnx").unlink()
    if not is_good:
        message = f"{cfg.quantize} makes the validation loss {100 * increase:.1f}% worse"
        limit = f"more than {100 * limit:.0f}%"
        raise Refusal(f"{message}, {limit}: {folder} is written without it", status=1)
    file = "" if cfg.quantize == "none" else f"/model_{cfg.quantize}.onnx"
    print(f"next: python sample.py --onnx={folder}{file}")


if __name__ == "__main__":
    run(main, Config)
