"""Makes a trained model's matrices integers of 8 or 4 bits: a folder that sample.py, eval.py and
export_onnx.py read as they read any.

    python quantize.py --out_dir=out/ts --to=out/ts-int8                        8 bits, to the nearest
    python quantize.py --out_dir=out/ts --bits=4 --method=gptq --to=out/ts-int4
    python quantize.py --out_dir=out/ts --bits=4 --method=awq --text=t.txt --to=out/ts-awq
    python sample.py --out_dir=out/ts-int4

Methods (rounding.py computes them):

    rtn    rounds each number to the nearest
    gptq   rounds column by column; later columns make up for the errors of earlier ones
    awq    makes large inputs smaller and their weights larger, then rounds to the nearest

gptq and awq look at the inputs of each matrix, on training text of the model's own data or on --text, a block at a
time, when the blocks before it are integers already; for gptq so are the matrices before it in its block. An expert's
inputs are the tokens that go to it; where there are none, its numbers are rounded to the nearest.
"""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from config import Refusal, check_range, hf_name, run

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import checkpoint_file
import dataset
import prepare
from data import blocks, evenly
from device import resolve
from folders import new_folder
from interop.gguf_file import is_gguf
from quantized import Quantization, check_matrices, linears, quantized
from rounding import awq_scale, error_of, gptq, rtn, stacked_codes
from score import evaluate

BATCH = 8  # rows of text at a time
LONGEST = 2048  # tokens of a row of text, however long the model's context is
SHORTEST = 256  # the least tokens of a text to look at, or the context where that is shorter
MOST_CHANGED = 1e-4  # the share of a block's outputs that AWQ's scales may change: more is not rounding
HELD_OUT = 1 << 15  # tokens of the validation split, about so many, on which the loss is measured


@dataclass
class Config:
    out_dir: str = "out"  # a model's folder, a checkpoint file or hf:FOLDER_OR_NAME
    to: str = ""  # the folder to write
    overwrite: bool = False  # move a folder that is in the way aside
    method: str = "rtn"  # rtn | gptq | awq
    bits: int = 8  # of a matrix in a block, 8 | 4; embedding and head have 8 always
    group_size: int = 0  # inputs that share a scale with 4 bits: 32 | 64 | 128; 0 = 32
    text: str = ""  # gptq, awq: a file as prepare.py reads it; "" = the model's own training split
    tokens: int = 32768  # gptq, awq: of that text, about so many, evenly spaced
    damping: float = 0.01  # gptq: of the mean diagonal of X^T X, added to the diagonal
    act_order: bool = False  # gptq: columns with the largest inputs first

    def __post_init__(self):
        if not Path(self.to).name:
            raise ValueError(f"--to=FOLDER says where to write, not {self.to!r}")
        if is_gguf(self.to):
            raise ValueError(
                "quantize.py writes a folder: hf.py --to=FILE.gguf --bits=8 or 4 writes GGUF"
            )
        if self.bits == 8 and self.group_size:
            raise ValueError("8 bits have a scale a row: leave out group_size, or --bits=4")
        if self.bits == 4 and not self.group_size:
            self.group_size = 32
        Quantization(self.bits, self.group_size, self.method)
        if self.method == "rtn" and self.text:
            raise ValueError("rtn looks at no text: leave out text, or --method=gptq or awq")
        if self.act_order and self.method != "gptq":
            raise ValueError("act_order is gptq's order of columns: --method=gptq")
        check_range(self, "at least 1", "tokens")
        check_range(self, "above 0 and at most 1", "damping")


# -----------------------------------------------------------------------------------------------------
# What matrices are given


class Inputs:
    """The inputs X of n matrices, those of experts or the one of a Linear: H = X^T X (n, in, in), float64; sums of |X|
    over rows (n, in), float64; and n_rows (n,), how many rows there were.
    """

    def __init__(self, n, n_in):
        self.H = torch.zeros(n, n_in, n_in, dtype=torch.float64)
        self.sums = torch.zeros(n, n_in, dtype=torch.float64)
        self.n_rows = torch.zeros(n)

    def add(self, parts):
        """Adds rows (rows, in), a tensor a matrix."""
        for i, x in enumerate(parts):
            self.H[i] += (x.T @ x).double()
            self.sums[i] += x.abs().sum(0).double()
            self.n_rows[i] += len(x)

    def sizes(self, numbers):
        """Returns the mean absolute value of each input (in,) over matrices; numbers: a list, which of them."""
        return self.sums[numbers].sum(0) / self.n_rows[numbers].sum().clamp(min=1)


def rows_of(x, ends=None):
    """Returns the rows (n, in) that each matrix of a Linear or an ExpertLinear is called with, a list of tensors."""
    return [x.flatten(0, -2)] if ends is None else x.tensor_split(ends[:-1].long())


def collect(block, names, states):
    """Calls a block with states, [(x, context)], and returns {name: Inputs} of its Linears with these names, those of
    experts too, in the order in which they are called. Linears that get the same tensor share their Inputs.
    """
    inputs = {}
    last = None  # the tensor that was given last
    shared = None  # the Inputs that it is in

    def note(name, module, arguments):
        nonlocal last, shared
        if arguments[0] is not last:
            last = arguments[0]
            parts = rows_of(*arguments)
            shared = inputs.get(name) or Inputs(len(parts), last.size(-1))
            shared.add(parts)
        inputs[name] = shared

    with ExitStack() as hooks:
        for name in names:
            module = block.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
        for x, context in states:
            block(x, context)
    return inputs


def block_inputs(model, rows):
    """Returns [(x, context)], with which the first block is called for each batch of rows (n, T) of ids."""
    states = []
    with model.blocks[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments)):
        for batch in rows.split(BATCH):
            model.hidden(batch)
    return states


# -----------------------------------------------------------------------------------------------------
# A block. Each function yields (name, Codes, their error, the error of rounding to the nearest) for each Linear of a
# block, those of experts too. The caller puts the Codes in their place before it asks for the next ones


def stacked(module):
    """Returns the matrices (n, out, in) of a module, n = 1 for a Linear, in the module's own memory."""
    weight = module.weight
    return weight.view(-1, *weight.shape[-2:])


def names_by_inputs(inputs):
    """Returns lists of the names in {name: Inputs} that share their Inputs, in the order of their calls."""
    groups = {}
    for name, shared in inputs.items():
        groups.setdefault(id(shared), []).append(name)
    return list(groups.values())


def rtn_block(block, names, states, cfg, c):
    """Rounds to the nearest, and looks at no states: errors are None."""
    for name in names:
        yield name, rtn(block.get_submodule(name).weight, cfg.bits, cfg.group_size), None, None


def gptq_block(block, names, states, cfg, c):
    """Makes integers of each Linear after those before it."""
    inputs = collect(block, names, states)
    for i, group in enumerate(names_by_inputs(inputs)):
        if i:
            inputs = collect(block, group, states)
        for name in group:
            H = inputs[name].H
            W = stacked(block.get_submodule(name))
            nearest = error_of(W, rtn(W, cfg.bits, cfg.group_size), H)
            rules = cfg.bits, cfg.group_size, cfg.damping, cfg.act_order
            codes = stacked_codes([gptq(*pair, *rules) for pair in zip(W, H)])
            yield name, codes, error_of(W, codes, H), nearest


class Fold(NamedTuple):
    """Where AWQ's scale goes: the inputs of some matrices are divided by it in the norm or Linear that makes them. That
    is so for the classes of model.py; awq_block takes the scale back where one was changed and it is not.
    """

    before: Any  # tensors of the norm or Linear before, whose rows are in proportion to the inputs
    names: Any  # of the Linears that read the inputs
    experts: Any = (0,)  # the numbers of the matrices in those Linears that read them
    unrounded: Any = ()  # matrices that read them too, and stay float


def folds(block, c):
    """Returns the Folds of a block."""
    result = []
    mlp = block.mlp
    # a post-norm's output is the residual stream, which others read too
    if c.norm_position == "pre" and c.norm in ("rmsnorm", "layernorm"):
        norm1, norm2 = list(block.norm1.parameters()), list(block.norm2.parameters())
        result.append(Fold(norm1, ["attn.q_proj", "attn.k_proj", "attn.v_proj"]))
        if c.mlp == "gelu":
            result.append(Fold(norm2, ["mlp.up_proj"]))
        if c.mlp == "swiglu":
            result.append(Fold(norm2, ["mlp.gate_proj", "mlp.up_proj"]))
        if c.mlp == "moe":
            experts = list(range(c.n_expert))
            result.append(Fold(norm2, ["mlp.gate_proj", "mlp.up_proj"], experts, [mlp.router.weight]))
    if c.norm_position in ("pre", "post"):
        result.append(Fold(list(block.attn.v_proj.parameters()), ["attn.o_proj"]))
        if c.mlp == "swiglu":  # in GELU's MLP a function that does not keep proportions is between them
            result.append(Fold(list(mlp.up_proj.parameters()), ["mlp.down_proj"]))
        if c.mlp == "moe":
            for expert, matrix in enumerate(mlp.up_proj.weight):
                result.append(Fold([matrix], ["mlp.down_proj"], [expert]))
    return result


def awq_block(block, names, states, cfg, c):
    """Scales the inputs of all Linears, then rounds to the nearest."""
    inputs = collect(block, names, states)
    W = {name: stacked(block.get_submodule(name)) for name in names}
    H = {name: inputs[name].H.clone() for name in names}
    nearest = {}
    for name in names:
        codes = rtn(W[name], cfg.bits, cfg.group_size)
        nearest[name] = error_of(W[name], codes, H[name])
    x, context = states[0]
    expected = block(x, context)
    # all experts together: to try the block after each of them would take longer than to find their scales
    for readers, group in groupby(folds(block, c), key=lambda fold: fold.names):
        group = list(group)
        tensors = [tensor for name in readers for tensor in (W[name], H[name])]
        tensors += [tensor for fold in group for tensor in (*fold.before, *fold.unrounded)]
        saved = [tensor.clone() for tensor in tensors]
        for fold in group:
            scale_inputs(fold, W, H, inputs[readers[0]], cfg, c)
        if (block(x, context) - expected).norm() > MOST_CHANGED * expected.norm():
            for tensor, old in zip(tensors, saved):
                tensor.copy_(old)
            tqdm.write(f"awq: no scale for {', '.join(readers)}: what comes before takes none")
    for name in names:
        codes = rtn(W[name], cfg.bits, cfg.group_size)
        yield name, codes, error_of(W[name], codes, H[name]), nearest[name]


def scale_inputs(fold, W, H, inputs, cfg, c):
    """Divides the inputs of a Fold's matrices by AWQ's scale and multiplies their weights by it, in place: in W, {name:
    (n, out, in)}, in H, {name: (n, in, in)}, and in what stands before. inputs: the Inputs of the matrices.
    """
    experts = list(fold.experts)
    sizes = inputs.sizes(experts)
    spread = None
    if fold.names == ["attn.o_proj"]:  # several heads read one's values
        of_heads = c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim
        sizes = sizes.view(of_heads).mean(1).flatten()

        def spread(s):
            return s.view(c.n_kv_head, 1, c.head_dim).expand(of_heads).flatten()

    pairs = [(W[name][expert].double(), H[name][expert]) for name in fold.names for expert in experts]
    s = awq_scale(pairs, sizes, cfg.bits, cfg.group_size, spread)
    for tensor in fold.before:
        tensor.div_(s.view(-1, *[1] * (tensor.dim() - 1)))
    s = spread(s) if spread else s
    for matrix in fold.unrounded:
        matrix.mul_(s)
    for name in fold.names:
        W[name][experts] *= s
        H[name][experts] /= s * s[:, None]


BLOCKS = {"rtn": rtn_block, "gptq": gptq_block, "awq": awq_block}  # by method


@torch.no_grad()
def quantize_model(model, cfg, rows=None):
    """Returns ({name: Codes} of a Transformer's matrices, {name: (error, that of rounding to the nearest)} of
    those in blocks; rtn has None for both errors). rows (n, T): ids for a method that looks at text.

    The model's own matrices become what the integers stand for; AWQ changes norms, too.
    """
    tables = {"wte": model.wte, "head": model.head}  # perhaps with one matrix
    codes = {name: rtn(table.weight, 8, 0) for name, table in tables.items()}
    for name, table in tables.items():
        table.weight.copy_(codes[name].dense())
    errors = {}
    states = block_inputs(model, rows) if rows is not None else []
    all_names = list(linears(model))
    options = dict(total=len(all_names), unit="matrix", dynamic_ncols=True, disable=None)
    with tqdm(desc=cfg.method, **options) as bar:
        for number, block in enumerate(model.blocks):
            prefix = f"blocks.{number}."
            names = [name.removeprefix(prefix) for name in all_names if name.startswith(prefix)]
            results = BLOCKS[cfg.method](block, names, states, cfg, model.config)
            for name, chosen, error, nearest in results:
                codes[prefix + name] = chosen
                errors[prefix + name] = error, nearest
                weight = block.get_submodule(name).weight
                weight.copy_(chosen.dense().view_as(weight))
                bar.update()
            states = [(block(x, context), context) for x, context in states]
    return codes, errors


# -----------------------------------------------------------------------------------------------------
# From the command line


def load_ids(ckpt):
    """Returns ({"train": ids, "val": ids} of the model's own data, ""), or ({}, why that cannot be read)."""
    try:
        _, data, _ = dataset.load_data(dataset.data_folder(ckpt), ckpt)
    except Refusal as e:
        return {}, str(e)
    return data, ""


def read_rows(cfg, data, reason, tokenizer, T):
    """Returns the ids to look at (n, T). Raises Refusal where there is no text, or too little."""
    if cfg.text:
        documents, _ = prepare.read_file(cfg.text)
        ids = []
        for document in tokenizer.encode_batch(documents):
            ids += [*tokenizer.head, *document, tokenizer.eot]
        ids = np.array(ids)
    elif data:
        ids = data["train"]
    else:
        problem = f"{cfg.method} looks at text, and the model's own is not here ({reason})"
        raise Refusal(f"{problem}: --text=FILE, or --method=rtn")
    if len(ids) <= min(SHORTEST, T):
        problem = f"the text has {len(ids)} tokens, too few for {cfg.method}"
        raise Refusal(f"{problem}: give a longer --text=FILE, or --method=rtn")
    T = min(T, len(ids) - 1)
    starts = np.arange(0, len(ids) - T, T)
    return blocks(ids, evenly(starts, math.ceil(cfg.tokens / T)), T)["idx"]


def summary(cfg, errors):
    """Returns the lines about errors, {name: (error, that of rounding to the nearest)}."""
    if cfg.method == "rtn":
        return []
    # without matrices that rounding does not change, and those whose outputs are all 0
    ratios = {
        name: error / nearest for name, (error, nearest) in errors.items() if 0 < nearest < math.inf
    }
    if not ratios:
        return [f"{cfg.method}: no matrix in which rounding to the nearest makes an error"]
    mean = math.exp(np.mean([math.log(max(ratio, 1e-9)) for ratio in ratios.values()]))
    lines = [
        f"{cfg.method}: {len(ratios)} matrices with {mean:.2f} of the error of rounding to the nearest "
        f"({min(ratios.values()):.2f} to {max(ratios.values()):.2f})"
    ]
    if cfg.method == "gptq":
        for name, ratio in ratios.items():
            if ratio >= 1:
                lines.append(f"{name}: {ratio:.3f} of that error, gptq is no better there")
    return lines


def loss_on(model, data, T):
    """Returns nats a token of a model, in float32 on the CPU, on the held-out text."""
    return evaluate(model, data["val"], T, BATCH, resolve("cpu", "float32", "false"), HELD_OUT)


def quantize_and_report(cfg, ckpt, model, tokenizer):
    """Returns the model in integers, and prints what they lose. Raises Refusal."""
    try:
        check_matrices(model, cfg.group_size)
    except ValueError as e:
        raise Refusal(e)
    T = min(model.config.block_size, LONGEST)
    data, reason = load_ids(ckpt)
    rows = None if cfg.method == "rtn" else read_rows(cfg, data, reason, tokenizer, T)
    before = loss_on(model, data, T) if data else None
    codes, errors = quantize_model(model, cfg, rows)
    for line in summary(cfg, errors):
        print(line)
    if data:
        after = loss_on(model, data, T)
        print(
            f"held-out loss: {before:.4f} nats a token, with {cfg.bits} bits {after:.4f}, "
            f"{100 * (after / before - 1):+.2f}%"
        )
    else:
        print(f"no held-out loss, as the model's own data is not here ({reason})")
    return quantized(model, Quantization(cfg.bits, cfg.group_size, cfg.method), codes)


def write(folder, model, tokenizer, ckpt):
    """Writes the checkpoint of a quantized model, with the settings of the one that it was made of."""
    state = checkpoint_file.RunState(*[ckpt.state[key] for key in ("step", "val_loss", "best_val_loss")])
    config = ckpt.config | {"quantized_from": ckpt.path}
    checkpoint_file.save(str(folder / "ckpt.pt"), model, tokenizer, config, state)


def main(cfg):
    ckpt = checkpoint.open_checkpoint(cfg.out_dir)
    to = Path(os.path.abspath(cfg.to))
    with new_folder(to, cfg.overwrite, "--overwrite moves it aside", [hf_name(ckpt.path)]) as tmp:
        model, tokenizer = ckpt.restore()
        model = quantize_and_report(cfg, ckpt, model, tokenizer)
        write(tmp, model, tokenizer, ckpt)
    size = (to / "ckpt.pt").stat().st_size
    print(f"{cfg.to}/ckpt.pt: {size:,} bytes")
    print(f"next: python sample.py --out_dir={cfg.to}")


if __name__ == "__main__":
    run(main, Config)
