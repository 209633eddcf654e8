"""Writes a trained model as ONNX: a folder with model.onnx, tokenizer.json and config.json, checked against PyTorch and timed.

    python export_onnx.py --out_dir=out/ts                                 out/ts/onnx/model.onnx, float32, in one file
    python export_onnx.py --out_dir=out/ts --to=story --quantize=int8      also story/model_int8.onnx, about a quarter of the size
    python sample.py --onnx=out/ts/onnx                                    stories from it; --onnx=story/model_int8.onnx

The graph takes ids (B, T) and the keys and values of the tokens before, past_k.0 past_v.0 past_k.1 ... (P, B, n_kv_head, head_dim), and gives
logits (B, T, V) and present_k.0 ... (P + T, B, n_kv_head, head_dim), which are the next call's past. B, T and P may be anything, P also 0; that
P + T stays within block_size is the caller's to see to. The file has the parameters' size.
"""
import copy
import importlib.util
import json
import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import onnx_model
import prepare
import train
from config import Refusal, hf_name, is_hf, run
from device import resolve
from folders import new_folder
from measure import race
from model import attention_mask, num_params
from sample import finish, generate

OPSET = 18  # the lowest that torch.onnx writes without converting
LARGEST = 2 ** 31 - 2 ** 24  # bytes of parameters: protobuf ends at 2^31
ROUNDING = 3e-5  # of the largest number of a tensor: some 50 times what the demo model shows; an epsilon of 1e-6 for 1e-5 is above it
MOST_WORSE = 0.01  # of the validation loss, by int8


@dataclass
class Config:
    out_dir: str = "out"      # the folder of a trained model, a checkpoint file or hf:FOLDER_OR_NAME
    to: str = ""              # the folder to write; "" = OUT_DIR/onnx
    overwrite: bool = False   # move a folder that is in the way aside
    quantize: str = "none"    # none | int8 (model_int8.onnx beside model.onnx: matrices in 8 bits)
    dataset: str = ""         # int8 is judged by the validation split of data/NAME; "" = the one of the training
    eval_tokens: int = 16384  # tokens of it, evenly spaced; 0 = all
    seconds: float = 5.0      # of PyTorch and onnxruntime taking turns; three rounds at least

    def __post_init__(self):
        if self.to and (not Path(self.to).name or self.to.endswith(".onnx")):
            raise ValueError(f"to is a folder to write, not {self.to!r}")
        if self.quantize not in ("none", "int8"):
            raise ValueError(f"quantize must be none or int8, not {self.quantize!r}")
        if self.eval_tokens < 0 or not 0 <= self.seconds <= 3600:
            raise ValueError("eval_tokens cannot be negative, and seconds must be between 0 and 3600")
        for library in "onnx", "onnxscript", "onnxruntime":
            if not importlib.util.find_spec(library):
                raise ValueError(f"exporting needs {library}: pip install {library}")


# ---------------------------------------------------------------------------------------------------------------------
# The graph

class Computed:
    """In the place of a table of cos or sin: its rows for the positions (T,) that are asked for, so that no table is in the file."""

    def __init__(self, of, frequencies):
        self.of, self.frequencies = of, frequencies

    def __getitem__(self, pos):
        return self.of(pos.view(-1, *[1] * self.frequencies.dim()) * self.frequencies)


def join(*linears):
    """One Linear in the place of several that multiply the same states: it gives what they give, one after the other."""
    first = linears[0]
    joined = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), bias=first.bias is not None)
    joined.load_state_dict({name: torch.cat([linear.state_dict()[name] for linear in linears]) for name in first.state_dict()})
    return joined


class JoinedAttention(nn.Module):
    """What an Attention computes, in fewer nodes, since in decoding a node costs much whatever is in it: q, k and v from one product and turned
    as one (v by nothing), q scaled by its weights. x @ roll is x.roll(D / 2), in one node."""

    def __init__(self, c, attn, roll):
        super().__init__()
        for p in (attn.q_norm if c.qk_norm else attn.q_proj).parameters():
            p.data /= math.sqrt(c.head_dim)
        self.qkv_proj, self.o_proj = join(attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.H, self.G, self.D, self.normed, self.roll = c.n_head, c.n_kv_head, c.head_dim, c.qk_norm, roll

    def forward(self, x, cos_sin, mask, past, present):
        """States (T * B, C) of states x, after a past k and v (P, B, G, D). Appends k and v of all tokens to present."""
        H, G, D, B = self.H, self.G, self.D, past[0].size(1)
        heads = self.qkv_proj(x).view(-1, B, H + 2 * G, D)  # (T, B, heads, D)
        if self.normed:
            q, k, v = heads.split((H, G, G), 2)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), 2)
        if cos_sin is not None:
            heads = heads * cos_sin[0] + heads @ self.roll * cos_sin[1]  # model.rotate
        q, k, v = heads.split((H, G, G), 2)
        k, v = (torch.cat(pair) for pair in zip(past, (k, v)))
        present += k, v
        q = q.permute(1, 2, 0, 3)  # onnxruntime's products take this and the like upon them
        if H != G:  # the queries of a group one after the other, so that k and v are not copied for each
            q = q.reshape(B, G, -1, D)
        y = (q @ k.permute(1, 2, 3, 0) + mask).softmax(-1) @ v.permute(1, 2, 0, 3)
        if H != G:
            y = y.reshape(B, H, -1, D)
        return self.o_proj(y.permute(2, 0, 1, 3).reshape(-1, H * D))


class JoinedSwiGLU(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.both_proj, self.down_proj = join(mlp.gate_proj, mlp.up_proj), mlp.down_proj

    def forward(self, x):
        gate, up = self.both_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Graph(nn.Module):
    """A Transformer, told with the tokens of all rows in one axis, (T * B, C): a product and the sum with the residual stream can be one Gemm
    then (where the product has no bias). In keys and values the tokens are the first axis, so that new ones come after all that is there, whatever B."""

    def __init__(self, model):
        super().__init__()
        self.model, c = copy.deepcopy(model), model.config
        roll = nn.Buffer(torch.eye(c.head_dim).roll(c.head_dim // 2, 1))
        for block in self.model.blocks:
            block.attn = JoinedAttention(c, block.attn, roll)
            if c.mlp == "swiglu":
                block.mlp = JoinedSwiGLU(block.mlp)
        if c.pos in ("rope", "sinusoidal"):
            tables = self.model.rope or self.model.add_pos
            freq = tables.frequencies
            if c.pos == "rope":
                freq = torch.cat((freq.expand(c.n_head + c.n_kv_head, -1), torch.zeros(c.n_kv_head, len(freq))))
            del tables.cos, tables.sin
            tables.cos, tables.sin = Computed(torch.cos, freq), Computed(torch.sin, freq)

    def forward(self, ids, past):
        m, c, (B, T), P, present = self.model, self.model.config, ids.shape, past[0].size(0), []
        pos = torch.arange(P, P + T)
        mask, _ = attention_mask(P, T, None, m.alibi, torch.float32, "cpu")
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
        if c.n_head != c.n_kv_head:  # a group's queries one after the other, as in JoinedAttention
            mask = mask.repeat(c.n_head // c.n_kv_head, 1) if mask.dim() == 2 else mask.reshape(c.n_kv_head, -1, P + T)  # ALiBi's (H, T, S)
        cos_sin = m.rope and [rows[:, None] for rows in m.rope.at(pos)]  # (T, 1, heads, D)
        x = m.wte(ids)
        x = (m.add_pos(x, pos) if m.add_pos is not None else x).transpose(0, 1).flatten(0, 1)
        for layer, block in enumerate(m.blocks):
            x = block(x, cos_sin, mask, past[2 * layer:2 * layer + 2], present)
        return m.head(m.norm(x).view(T, B, -1).transpose(0, 1)), *present


def export(model):
    """The float32 ONNX model (a protobuf) of a Transformer that is on the CPU, in eval mode."""
    c = model.config
    if c.block_size < 7:
        raise Refusal(f"tracing takes 4 + 3 tokens, and block_size is {c.block_size}")
    if 4 * num_params(model) > LARGEST:
        raise Refusal(f"an ONNX file in one piece holds 2 GB, and this model has {4 * num_params(model) / 1e9:.1f} GB of parameters")
    # B, T, P = 2, 3, 4 as the example: torch.export takes a size of 1 for a constant, and says nothing
    ids, past = torch.zeros(2, 3, dtype=torch.long), tuple(torch.zeros(4, 2, c.n_kv_head, c.head_dim) for _ in range(2 * c.n_layer))
    B, T, P = torch.export.Dim("B"), *(torch.export.Dim(name, max=c.block_size) for name in "TP")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that axes share, and torch's own deprecations
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is not installed
        program = torch.onnx.export(
            Graph(model).eval(), (ids, past), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
            dynamic_shapes={"ids": {0: B, 1: T}, "past": tuple({0: P, 1: B} for _ in past)},
            input_names=["ids", *onnx_model.names(c, "past")], output_names=["logits", *onnx_model.names(c, "present")])
    proto = program.model_proto
    strip(proto)
    tidy(proto)
    if c.tie_embeddings:
        share(proto)
    if [(o.domain, o.version) for o in proto.opset_import] != [("", OPSET)] or proto.functions:
        raise Refusal(f"torch {torch.__version__} wrote other operators than opset {OPSET}'s: {proto.opset_import}", status=1)
    return proto


def strip(proto):
    """Removes what tracing left: file names and lines of this machine, and shapes that a runtime infers itself."""
    graph = proto.graph
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for x in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del x.metadata_props[:]
        x.doc_string = ""


def arrays(proto):
    """{name: array} of the initializers."""
    import onnx
    return {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}


def replace(proto, remove, nodes, **add):
    """Takes initializers out, puts others (name=array) in, and exchanges the nodes."""
    import onnx
    kept = [x for x in proto.graph.initializer if x.name not in remove]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *(onnx.numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in add.items())])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def tidy(proto):
    """Says in fewer nodes what torch's exporter says in many; the results are the same but for rounding."""
    import onnx
    made = {n.output[0]: n for n in proto.graph.node}

    def of(name, op):
        return made[name] if name in made and made[name].op_type == op else None

    for n in proto.graph.node:
        if n.op_type == "Mul" and (r := of(n.input[1], "Reciprocal")):  # x / sqrt(): as onnxruntime knows, and fuses, a norm
            n.CopyFrom(onnx.helper.make_node("Div", [n.input[0], r.input[0]], n.output))
        elif n.op_type == "Add" and (g := of(n.input[1], "Gemm")) and len(g.input) == 2:  # a residual stream, where there is no bias
            residual, output = n.input[0], n.output[0]
            n.CopyFrom(g)
            n.input.append(residual)
            n.output[:] = [output]
    nodes, used = [], {x.name for x in proto.graph.output}
    for n in reversed(proto.graph.node):
        if used & set(n.output):
            used |= set(n.input)
            nodes.append(n)
    replace(proto, {x.name for x in proto.graph.initializer} - used, nodes[::-1])


def share(proto):
    """A small tied head has been folded into a transposed copy of the embedding: makes it a Transpose again."""
    import onnx
    weights, head = arrays(proto), next(n for n in proto.graph.node if n.output[0] == "logits")
    table = next(n.input[0] for n in proto.graph.node if n.op_type == "Gather" and n.input[1] == "ids")
    if (copy := head.input[1]) in weights:
        head.input[1] = f"{table}.T"
        replace(proto, [copy], [onnx.helper.make_node("Transpose", [table], [f"{table}.T"], perm=[1, 0]), *proto.graph.node])


# ---------------------------------------------------------------------------------------------------------------------
# int8

def quantize(proto):
    """Rewrites the graph: matrices become int8 with a scale for each output, for each token where that is also the embedding; what they are
    multiplied with becomes uint8 as it comes, with a scale a tensor: the tokens of a call, and its rows, move each other's logits a little.
    onnxruntime's quantize_dynamic leaves a tied head in float32.

    A CPU without VNNI adds two products in 16 bits and saturates. So weights stay within 64: 2 * 255 * 64 < 2^15.
    """
    import onnx
    node, weights, nodes, new, quantized = onnx.helper.make_node, arrays(proto), [], {}, {}
    transposed = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in weights}

    def integers(name, axis):
        """The names of a weight's integers and scales, the largest along `axis` being 64; made once."""
        if f"{name}.q" not in new:
            w = weights[name]
            scale = np.maximum(np.abs(w).max(axis, keepdims=True), 1e-30) / 64
            new[f"{name}.q"], new[f"{name}.scale"] = np.rint(w / scale).astype(np.int8), scale.squeeze(axis)
        return f"{name}.q", f"{name}.scale"

    for n in proto.graph.node:
        y = n.output[0]
        if n.op_type == "Gather" and n.input[1] == "ids":
            q, scale = integers(n.input[0], axis=1)
            new["last"] = np.array([-1])
            nodes += [node("Gather", [q, "ids"], [f"{y}.row"]), node("Cast", [f"{y}.row"], [f"{y}.float"], to=onnx.TensorProto.FLOAT),
                      node("Gather", [scale, "ids"], [f"{y}.flat"]), node("Unsqueeze", [f"{y}.flat", "last"], [f"{y}.of_row"]),
                      node("Mul", [f"{y}.float", f"{y}.of_row"], [y])]
        elif n.op_type == "Gemm" or n.op_type == "MatMul" and (n.input[1] in weights or n.input[1] in transposed) and not n.input[1].endswith("roll"):
            x, w, *added = n.input
            by_row = n.op_type == "Gemm" or w in transposed  # (out, in), as torch has it
            q, scale = integers(transposed.get(w, w), axis=1 if by_row else 0)
            if by_row:
                nodes.append(node("Transpose", [q], [f"{y}.w"], perm=[1, 0]))
                q = f"{y}.w"
            if x not in quantized:
                quantized[x] = [f"{x}.q", f"{x}.scale", f"{x}.zero"]
                nodes.append(node("DynamicQuantizeLinear", [x], quantized[x]))
            xq, x_scale, x_zero = quantized[x]
            nodes += [node("MatMulInteger", [xq, q, x_zero], [f"{y}.sum"]), node("Cast", [f"{y}.sum"], [f"{y}.float"], to=onnx.TensorProto.FLOAT),
                      node("Mul", [x_scale, scale], [f"{y}.both"]), node("Mul", [f"{y}.float", f"{y}.both"], [f"{y}.product" if added else y]),
                      *(node("Add", [f"{y}.product", c], [y]) for c in added)]
        elif y not in transposed:
            nodes.append(n)
    replace(proto, {name.removesuffix(".q") for name in new}, nodes, **new)


# ---------------------------------------------------------------------------------------------------------------------
# Checks

@torch.inference_mode()
def parity(model, there):
    """(largest difference of logits, keys and values, largest as a share of its tensor's largest number, or of 1) of a Transformer and an
    OnnxModel, over past lengths and batches. inf: something is no number."""
    c, worst, share = model.config, 0.0, 0.0
    g = torch.Generator().manual_seed(0)
    for B in 1, 3:
        for P in sorted({min(P, c.block_size - 1) for P in (0, 1, 7, c.block_size // 2, c.block_size - 1)}):
            for T in sorted({1, min(5, c.block_size - P)}):
                idx = torch.randint(c.vocab_size, (B, P + T), generator=g)
                cache, past = model.new_cache(B, P + T), there.new_past(B, P + T)
                if P:
                    model.hidden(idx[:, :P], cache)
                    there.run(idx[:, :P], past)
                want, got = model(idx[:, P:], cache=cache)[0], there.run(idx[:, P:], past)
                ours = [x.permute(2, 0, 1, 3) for kv in zip(cache.k, cache.v) for x in kv]
                for a, b in zip([want, *ours], map(torch.from_numpy, [got, *past.arrays])):
                    if not (a - b).isfinite().all():
                        return np.inf, np.inf
                    apart = (a - b).abs().max().item()
                    worst, share = max(worst, apart), max(share, apart / max(1, a.abs().max().item()))
    return worst, share


def greedy(model, prompt, n):
    return finish(generate(model, [prompt], n, temperature=0, past_end="recompute"))[0][0]


def check(model, there, prompt, n):
    """Says how near the file is to PyTorch. Raises Refusal (status 1) where that is not near enough."""
    worst, share = parity(model, there)
    print(f"PyTorch and onnxruntime differ by {worst:.2g} at most, {share:.2g} of the largest number (past 0, 1, 7, half the context and all but "
          f"a token of it; batch 1 and 3)")
    if not share <= ROUNDING:
        raise Refusal(f"the ONNX file does not compute what PyTorch does: {worst:.2g} is more than rounding", status=1)
    ours, theirs = greedy(model, prompt, n), greedy(there, prompt, n)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    if same < len(ours):
        raise Refusal(f"greedy text differs from token {same} of {len(ours)} on: {ours[same]}, from onnxruntime {theirs[same]}", status=1)
    print(f"greedy text: {len(ours)} tokens, all equal")


def validation(cfg, ckpt, tokenizer):
    """The ids of the validation split that int8 is judged by. Raises Refusal where there is none."""
    name = cfg.dataset or checkpoint.dataset_of(ckpt)
    if not name:
        raise Refusal(f"what {cfg.out_dir} was trained on is not known: --dataset=NAME names data that int8 can be judged by")
    folder = os.path.join("data", name)
    try:
        _, data, there = prepare.load(folder)
    except Refusal as e:
        raise Refusal(f"int8 is judged by a validation split, and --dataset=NAME would name another: {e}")
    if there.sha256 != tokenizer.sha256:
        raise Refusal(f"{folder} has another tokenizer than the model; --dataset=NAME names data that int8 can be judged by")
    return data["val"]


def worse(model, int8, data, tokens):
    """The share by which int8's validation loss is above float32's, both from onnxruntime; says both."""
    compute = resolve("cpu", "float32", "false")
    losses = [train.evaluate(m, data, model.config.block_size, 4, compute, tokens) for m in (model, int8)]
    share = losses[1] / losses[0] - 1
    print(f"validation loss: float32 {losses[0]:.4f}, int8 {losses[1]:.4f} nats a token, {100 * share:+.2f}%")
    return share


# ---------------------------------------------------------------------------------------------------------------------

def save(proto, path):
    checkpoint.write_atomic(str(path), lambda f: f.write(proto.SerializeToString()))
    return f"{path.name}: {path.stat().st_size / 1e6:.2f} MB"


def build(cfg, model, tokenizer, ckpt, data, folder):
    """Fills the folder. Raises Refusal where a file is not what it should be; an int8 file that is not is removed, and the rest stays."""
    c, config = model.config, ckpt["config"]
    about = onnx_model.describe(c, tokenizer, str(config.get("start", "")), str(config.get("template", "")), checkpoint.fingerprint(ckpt))
    tokenizer.save(folder / "tokenizer.json")
    checkpoint.write_atomic(str(folder / "config.json"), lambda f: f.write(json.dumps(about, indent=1).encode()))
    proto = export(model)
    proto.metadata_props.add(key="fingerprint", value=about["fingerprint"])
    print(f"{save(proto, folder / 'model.onnx')} for {num_params(model):,} parameters, {4 * num_params(model) / 1e6:.2f} MB; opset {OPSET}: "
          f"{' '.join(sorted({n.op_type for n in proto.graph.node}))}")
    there, _, _ = onnx_model.load(str(folder))
    prompt, n = [tokenizer.eot], min(200, c.block_size)
    check(model, there, prompt, 200)
    rivals = {"PyTorch": model, "onnxruntime": there}
    share = 0.0
    if cfg.quantize == "int8":
        quantize(proto)
        said = save(proto, folder / "model_int8.onnx")
        int8, _, _ = onnx_model.load(str(folder / "model_int8.onnx"))
        print(f"{said}, {(folder / 'model_int8.onnx').stat().st_size / (folder / 'model.onnx').stat().st_size:.2f} of that")
        share = worse(there, int8, data, cfg.eval_tokens)
        rivals["int8"] = int8
    threads = torch.get_num_threads()
    times = race({name: (lambda m=m: torch.set_num_threads(threads if m is model else 1),  # as sample.py has it
                         lambda _, m=m: greedy(m, prompt, n)) for name, m in rivals.items()}, cfg.seconds, model.device)
    torch.set_num_threads(threads)
    print(f"tokens/s, one text of {n} tokens, {threads} threads, in turns: " +
          ", ".join(f"{name} {n / t['median']:,.0f}" for name, t in times.items()))
    return share


def main(cfg):
    path = checkpoint.find(cfg.out_dir)
    ckpt = checkpoint.load(path)
    if is_hf(path) and not cfg.to:
        raise Refusal("name the folder to write with --to")
    to = Path(cfg.to or os.path.join(os.path.dirname(path), "onnx"))
    with new_folder(to, cfg.overwrite, "--overwrite moves it aside, --to=OTHER writes elsewhere", [hf_name(path)]) as tmp:
        model, tokenizer = checkpoint.restore(ckpt, path)
        data = validation(cfg, ckpt, tokenizer) if cfg.quantize == "int8" else None
        share = build(cfg, model, tokenizer, ckpt, data, tmp)
        if not share <= MOST_WORSE:  # nan too
            (tmp / "model_int8.onnx").unlink()
    if not share <= MOST_WORSE:
        raise Refusal(f"int8 makes the validation loss {100 * share:.1f}% worse, more than {100 * MOST_WORSE:.0f}%: {to} is written without it",
                      status=1)
    print(f"next: python sample.py --onnx={to}")


if __name__ == "__main__":
    run(main, Config)
