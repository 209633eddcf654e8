"""Writes a trained model as ONNX, compares the file with PyTorch and times both.

    python export_onnx.py --out_dir=out/ts                              # out/ts/onnx/model.onnx, float32
    python export_onnx.py --out_dir=out/ts --to=story --quantize=int8   # also story/model_int8.onnx, or int4
    python sample.py --onnx=out/ts/onnx                                 # or --onnx=story/model_int8.onnx

The folder also has tokenizer.json and config.json. model.onnx is one file, as large as the parameters;
model_int8.onnx is about a quarter of that. model_int4.onnx is smaller still, with the embedding and the head in
4 bits, too, where the loss allows it, and needs onnxruntime, whose own operators it has. Of a mixture of experts
each computes each token, and a file says so in its metadata, as "experts": right, but slower than the model here.

The graph takes ids (B, T) and the keys and values of the tokens before them, past_k.0 past_v.0
past_k.1 ..., each (P, B, n_kv_head, head_dim). It returns logits (B, T, V) and present_k.0 present_v.0
..., each (P + T, B, n_kv_head, head_dim), which are the past of the next call. P may be 0. The graph
does not check that P + T stays within block_size; its caller does.
"""

import copy
import importlib.util
import itertools
import json
import logging
import math
import signal
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import Refusal, end_at_once, hf_name, is_hf, run

# isort: split
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import onnx_model
import prepare
from device import resolve
from folders import new_folder, write_atomic
from generate import generate
from measure import race
from model import ComputedTable, attention_mask
from quantized import dequantized
from score import evaluate
from sizes import num_params, size_text

OPSET = 18  # the lowest that torch.onnx writes without converting
MAX_BYTES = 2**31 - 2**24  # of parameters: a protobuf ends at 2^31
# Of a tensor's largest number: some 50 times what the demo model shows, and less than an epsilon of 1e-6
# in place of 1e-5 would make
MAX_DIFFERENCE = 3e-5
# Deeper models round more: then, how often PyTorch's own difference from float64 is allowed
MAX_ROUNDING = 5
LONGEST = 256  # tokens of context that PyTorch, onnxruntime and int8 are compared at
MAX_LOSS_INCREASE = {"int8": 0.01, "int4": 0.1}  # of the validation loss
# How quantize() is tried, in turn: (its options, what they are, the increase at which no other way is tried)
WAYS = {
    "int8": [({}, "states of 1 byte", 0.01), ({"wide": True}, "states of 2 bytes", 0.01)],
    "int4": [
        ({"bits": 4, "table_bits": 4}, "embedding and head in 4 bits", 0.01),
        ({"bits": 4}, "embedding and head in 8 bits", 0.1),
        ({"bits": 4, "wide": True}, "embedding and head in 8 bits, states of 2 bytes", 0.1),
    ],
}
DENSE = "dense: each expert computes each token"
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
INT4_STATES = 4  # how exact its products are: with states of 8 bits, a scale for each group
INT4_GROUP = 32  # inputs that share a scale and a zero, of which onnxruntime has the quickest products
INT8_LARGEST = 64  # a CPU without VNNI adds two products in 16 bits and saturates: 2 * 255 * 64 < 2^15


@dataclass
class Config:
    out_dir: str = "out"  # the folder of a trained model, a checkpoint file or hf:FOLDER_OR_NAME
    to: str = ""  # the folder to write; "" = OUT_DIR/onnx
    overwrite: bool = False  # move a folder that is in the way aside
    block_size: int = 0  # another context than the model's, as in sample.py; 0 = its own
    rope_scaling: str = ""  # another one than the model's, as in sample.py; "" = its own
    quantize: str = "none"  # none | int8 | int4 (model_int8.onnx beside model.onnx: matrices in 8 bits)
    dataset: str = ""  # that is judged by the validation split of data/NAME; "" = the training's
    eval_tokens: int = 16384  # tokens of it, evenly spaced; 0 = all
    seconds: float = 5.0  # of PyTorch and onnxruntime taking turns; three rounds at least

    def __post_init__(self):
        if self.to and (not Path(self.to).name or self.to.endswith(".onnx")):
            raise ValueError(f"to is a folder to write, not {self.to!r}")
        if self.block_size < 0:
            raise ValueError("block_size must be at least 1, or 0 for the model's own")
        if self.quantize not in ("none", *MAX_LOSS_INCREASE):
            raise ValueError(f"quantize must be none, int8 or int4, not {self.quantize!r}")
        if self.eval_tokens < 0 or not 0 <= self.seconds <= 3600:
            raise ValueError("eval_tokens cannot be negative, and seconds must be between 0 and 3600")
        for library in "onnx", "onnxscript", "onnxruntime":
            if not importlib.util.find_spec(library):
                raise ValueError(f"exporting needs {library}: pip install {library}")


# -----------------------------------------------------------------------------------------------------
# The module that is traced


def compute_tables(tables, frequencies, scale=None):
    """Exchanges the cos and sin of a model.Float32Tables for what computes them."""
    del tables.cos, tables.sin  # buffers, which an attribute of another type cannot replace
    tables.cos = ComputedTable(torch.cos, frequencies, scale)
    tables.sin = ComputedTable(torch.sin, frequencies, scale)


def join(*linears):
    """Returns one Linear whose outputs are those of several with the same input, one after the other."""
    width = sum(linear.out_features for linear in linears)
    joined = nn.Linear(linears[0].in_features, width, bias=linears[0].bias is not None)
    states = [linear.state_dict() for linear in linears]
    joined.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return joined


class JoinedAttention(nn.Module):
    """Computes what model.Attention does, in fewer nodes: a node costs time even for a single token.

    One product gives q, k and v. All heads are rotated together, those of v by an angle of 0. The
    weights of q hold the scale of the scores. x @ roll is x.roll(D / 2) in one node.
    """

    def __init__(self, c, attn, roll):
        super().__init__()
        scaled = attn.q_norm if c.qk_norm else attn.q_proj  # the last weights on the way to q
        for parameter in scaled.parameters():
            parameter.data /= math.sqrt(c.head_dim)
        self.config = c
        self.qkv_proj = join(attn.q_proj, attn.k_proj, attn.v_proj)
        self.o_proj = attn.o_proj
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm
        self.roll = roll

    def forward(self, x, context):
        """Maps states (T * B, C) to states (T * B, C), after a past k and v, each (P, B, G, D).

        context is (cos and sin, mask, past k and v, present): the k and v of all tokens, each
        (P + T, B, G, D), are appended to the list present.
        """
        cos_sin, mask, past, present = context
        c = self.config
        H, G, D = c.n_head, c.n_kv_head, c.head_dim
        B = past[0].size(1)
        heads = self.qkv_proj(x).view(-1, B, H + 2 * G, D)  # (T, B, heads, D)
        if c.qk_norm:
            q, k, v = heads.split((H, G, G), 2)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), 2)
        if cos_sin is not None:
            cos, sin = cos_sin
            heads = heads * cos + heads @ self.roll * sin  # model.rotate
        q, k, v = heads.split((H, G, G), 2)
        k = torch.cat((past[0], k))
        v = torch.cat((past[1], v))
        present += [k, v]

        q = q.permute(1, 2, 0, 3)  # onnxruntime's products take permutations upon themselves
        if H != G:  # a group's queries one after the other, so that k and v are not copied for each
            q = q.reshape(B, G, -1, D)
        scores = q @ k.permute(1, 2, 3, 0) + mask
        y = scores.softmax(-1) @ v.permute(1, 2, 0, 3)
        if H != G:
            y = y.reshape(B, H, -1, D)
        return self.o_proj(y.permute(2, 0, 1, 3).reshape(-1, H * D))


class JoinedSwiGLU(nn.Module):
    """Computes what model.SwiGLU does, with one product for gate and up."""

    def __init__(self, mlp):
        super().__init__()
        self.both_proj = join(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x):
        gate, up = self.both_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DenseMoE(nn.Module):
    """Computes what model.MoE does with each expert on each token, most of them weighted by 0: two
    products with all experts side by side, and nothing is sorted.
    """

    def __init__(self, moe):
        super().__init__()
        n_expert, n_inner, n_embd = moe.up_proj.weight.shape
        self.n_expert = n_expert
        self.route = moe.route
        self.both_proj = nn.Linear(n_embd, 2 * n_expert * n_inner, bias=False)
        self.down_proj = nn.Linear(n_expert * n_inner, n_embd, bias=False)
        both = torch.cat((moe.gate_proj.weight.flatten(0, 1), moe.up_proj.weight.flatten(0, 1)))
        self.both_proj.weight.data = both.detach()
        self.down_proj.weight.data = moe.down_proj.weight.detach().transpose(0, 1).flatten(1)
        self.router = moe.router  # a part of route

    def forward(self, x):
        """Maps states (T * B, C) to states (T * B, C)."""
        routing, scores = self.route(x)
        weights = torch.zeros_like(routing.probabilities).scatter(1, routing.experts, scores)
        gate, up = self.both_proj(x).chunk(2, -1)
        inner = (F.silu(gate) * up).view(-1, self.n_expert, gate.size(1) // self.n_expert)
        return self.down_proj((inner * weights[..., None]).flatten(1))


def additive_mask(model, P, T, window):
    """Returns what JoinedAttention adds to the scores of T new tokens after P in a layer with this window:
    biases, and -inf.

    The shape is (T, P + T), with ALiBi (H, T, P + T). Where H / G query heads share keys, their tokens
    follow each other: (H / G * T, P + T), with ALiBi (G, H / G * T, P + T).
    """
    c = model.config
    places = torch.arange(P, P + T)
    mask, _ = attention_mask(places, torch.arange(P + T), bias=model.score_bias, window=window)
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    if c.n_head == c.n_kv_head:
        return mask
    if model.score_bias is not None:
        return mask.expand(c.n_head, T, P + T).reshape(c.n_kv_head, -1, P + T)
    return mask.repeat(c.n_head // c.n_kv_head, 1)


class Graph(nn.Module):
    """A copy of a Transformer in the form in which it is traced.

    The tokens of all rows lie in one axis, (T * B, C), so that a product without a bias and the sum with
    the residual stream can be one Gemm. In keys and values the tokens are the first axis, so that new
    ones lie behind all old ones, whatever B is.
    """

    def __init__(self, model):
        super().__init__()
        c = model.config
        self.model = copy.deepcopy(model)
        roll = nn.Buffer(torch.eye(c.head_dim).roll(c.head_dim // 2, 1))
        for block in self.model.blocks:
            block.attn = JoinedAttention(c, block.attn, roll)
            if c.mlp == "swiglu":
                block.mlp = JoinedSwiGLU(block.mlp)
            elif c.mlp == "moe":
                block.mlp = DenseMoE(block.mlp)
        if c.pos == "rope":
            frequencies = self.model.rotary.frequencies
            rotated = frequencies.expand(c.n_head + c.n_kv_head, -1)
            unrotated = torch.zeros(c.n_kv_head, len(frequencies))  # v
            scale = None
            if self.model.rotary.scale != 1:  # YaRN's, of q and k alone
                scale = torch.ones(len(rotated) + c.n_kv_head, 1)
                scale[: len(rotated)] = self.model.rotary.scale
            compute_tables(self.model.rotary, torch.cat((rotated, unrotated)), scale)  # (heads, D / 2)
        elif c.pos == "sinusoidal":
            compute_tables(self.model.add_pos, self.model.add_pos.frequencies)

    def rotation_by_head(self, table, neutral):
        """Returns a table (T, D) for the heads of q, k and v: (T, heads, D), neutral for v."""
        c = self.model.config
        T, D = table.shape
        rotated = table[:, None].expand(T, c.n_head + c.n_kv_head, D)
        unrotated = torch.full((1, c.n_kv_head, D), neutral).expand(T, c.n_kv_head, D)
        return torch.cat((rotated, unrotated), 1)

    def forward(self, ids, past):
        """Returns the logits (B, T, V), and the keys and values of all tokens in the order of past."""
        model = self.model
        B, T = ids.shape
        P = past[0].size(0)
        pos = torch.arange(P, P + T)
        masks = {window: additive_mask(model, P, T, window) for window in model.windows}
        cos_sin = None
        if model.rotary is not None:
            cos, sin = model.rotary(pos)
            if cos.dim() == 2:  # a class of one's own: one rotation for all heads, and none for v
                cos = self.rotation_by_head(cos, 1.0)
                sin = self.rotation_by_head(sin, 0.0)
            cos_sin = (cos[:, None], sin[:, None])  # each (T, 1, heads, D)
        x = model.wte(ids)
        if model.add_pos is not None:
            x = model.add_pos(x, pos)
        x = x.transpose(0, 1).flatten(0, 1)  # (T * B, C)
        present = []
        for layer, block in enumerate(model.blocks):
            layer_past = past[2 * layer : 2 * layer + 2]
            mask = masks[model.config.window_of(layer)]
            x = block(x, (cos_sin, mask, layer_past, present))
        x = model.norm(x).view(T, B, -1).transpose(0, 1)
        return model.head(x), *present


# -----------------------------------------------------------------------------------------------------
# The graph. onnx is imported where it is used, so that Config can say that it is missing


def make_node(op, inputs, outputs, **attributes):
    import onnx

    return onnx.helper.make_node(op, inputs, outputs, **attributes)


def make_cast(name, output, kind="FLOAT"):
    """Returns the node that makes numbers float32, or of another type of ONNX."""
    import onnx

    return make_node("Cast", [name], [output], to=onnx.TensorProto.DataType.Value(kind))


def read_arrays(proto):
    """Returns the initializers as {name: array}."""
    import onnx

    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def replace(proto, nodes, removed, added):
    """Exchanges all nodes, removes initializers by name and appends the added ones, {name: array}."""
    import onnx

    graph = proto.graph
    tensors = [tensor for tensor in graph.initializer if tensor.name not in removed]
    for name, array in added.items():
        tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    del graph.node[:]
    graph.node.extend(nodes)


def is_look_up(node):
    """Tells the embedding's node from all others."""
    return node.op_type == "Gather" and node.input[1] == "ids"


def strip_metadata(proto):
    """Removes file names and line numbers of this machine, and shapes that a runtime infers itself."""
    graph = proto.graph
    del proto.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""


def simplify(proto):
    """Merges pairs of nodes that torch's exporter writes; results stay the same but for rounding."""
    producers = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type not in ("Mul", "Add"):
            continue
        producer = producers.get(node.input[1])
        if producer is None:
            continue
        if node.op_type == "Mul" and producer.op_type == "Reciprocal":
            # x / sqrt(...) is the form of a norm that onnxruntime knows and fuses
            node.CopyFrom(make_node("Div", [node.input[0], producer.input[0]], node.output))
        elif node.op_type == "Add" and producer.op_type == "Gemm" and len(producer.input) == 2:
            add_to_product(node, producer)
    remove_unused(proto)


def add_to_product(node, gemm):
    """Turns an Add of a residual stream and a Gemm into one Gemm, with the stream in place of a bias."""
    residual = node.input[0]
    output = node.output[0]
    node.CopyFrom(gemm)
    node.input.append(residual)
    node.output[:] = [output]


def remove_unused(proto):
    """Removes nodes and initializers that no output depends on."""
    used = {output.name for output in proto.graph.output}
    nodes = []
    for node in reversed(proto.graph.node):
        if not used.isdisjoint(node.output):
            used.update(node.input)
            nodes.append(node)
    nodes.reverse()
    unused = {tensor.name for tensor in proto.graph.initializer} - used
    replace(proto, nodes, removed=unused, added={})


def tie_head(proto):
    """Makes a tied head a Transpose of the embedding where torch has made a transposed copy of it."""
    head = next(node for node in proto.graph.node if node.output[0] == "logits")
    look_up = next(node for node in proto.graph.node if is_look_up(node))
    folded = head.input[1]
    if all(tensor.name != folded for tensor in proto.graph.initializer):
        return
    table = look_up.input[0]
    head.input[1] = f"{table}.T"
    transpose = make_node("Transpose", [table], [f"{table}.T"], perm=[1, 0])
    replace(proto, [transpose, *proto.graph.node], removed={folded}, added={})


@contextmanager
def hold_back_ctrl_c():
    """Ends the block before Ctrl-C is a KeyboardInterrupt, or the process when it comes twice.

    While it traces, torch loses one that falls into a callback, or aborts with a core dump.
    """
    handler = signal.getsignal(signal.SIGINT)
    was_pressed = False

    def note(number, frame):
        nonlocal was_pressed
        was_pressed = True
        signal.signal(number, end_at_once)

    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if was_pressed:
        raise KeyboardInterrupt


def trace(model):
    """Returns the ONNX model that torch.onnx writes for a Transformer, with B, T and P as free sizes."""
    c = model.config
    # The example has B, T, P = 2, 3, 4: torch.export silently takes a size of 1 for a constant
    ids = torch.zeros(2, 3, dtype=torch.long)
    past = tuple(torch.zeros(4, 2, c.n_kv_head, c.head_dim) for _ in range(2 * c.n_layer))
    B = torch.export.Dim("B")
    T = torch.export.Dim("T", max=c.block_size)
    P = torch.export.Dim("P", max=c.block_size)
    with hold_back_ctrl_c(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that axes share, and torch's own deprecations
        registration = logging.getLogger("torch.onnx._internal.exporter._registration")
        registration.setLevel(logging.ERROR)  # it warns that torchvision is not installed
        program = torch.onnx.export(
            Graph(model).eval(),
            (ids, past),
            input_names=["ids", *onnx_model.names(c, "past")],
            output_names=["logits", *onnx_model.names(c, "present")],
            dynamic_shapes={"ids": {0: B, 1: T}, "past": tuple({0: P, 1: B} for _ in past)},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return program.model_proto


def export(model):
    """Returns the float32 ONNX model (a protobuf) of a Transformer that is on the CPU, in eval mode.

    Raises Refusal for a model that is too large or whose context is too short to trace.
    """
    c = model.config
    num_bytes = 4 * num_params(model)
    if c.block_size < 7:
        raise Refusal(f"tracing takes 4 + 3 tokens, and block_size is {c.block_size}")
    if num_bytes > MAX_BYTES:
        raise Refusal(
            "an ONNX file in one piece holds 2 GB, and this model has "
            f"{num_bytes / 1e9:.1f} GB of parameters"
        )
    proto = trace(model)
    strip_metadata(proto)
    simplify(proto)
    if c.tie_embeddings:
        tie_head(proto)
    opsets = [(opset.domain, opset.version) for opset in proto.opset_import]
    if opsets != [("", OPSET)] or proto.functions:
        message = f"torch {torch.__version__} wrote other operators than opset {OPSET}'s"
        raise Refusal(f"{message}: {proto.opset_import}", status=1)
    if c.mlp == "moe":
        proto.metadata_props.add(key="experts", value=DENSE)
    return proto


# -----------------------------------------------------------------------------------------------------
# Integers


def quantize(proto, wide=False, bits=8, table_bits=8):
    """Rewrites the graph of export() so that it multiplies 8-bit integers. With 4 bits the matrices of the
    blocks, but a router, become groups of 4-bit integers, whose products are onnxruntime's MatMulNBits; with
    table_bits=4 the embedding and the head, too.

    A matrix becomes int8 with a scale for each output; the embedding, and a head tied to it, with a
    scale for each token. The states that a matrix multiplies become uint8 at each call, with one scale
    for the whole tensor, so the tokens and rows of a call change each other's logits a little. Where a
    few numbers are hundreds of times larger than all others, as in SmolLM2, little is left of those:
    wide makes each state two bytes, with a scale for each token, and takes longer.
    onnxruntime has quantize_dynamic for this, which leaves a tied head in float32. A router stays
    float32: which experts a token gets must not depend on its neighbours.
    """
    weights = read_arrays(proto)
    transposed = {}  # the name of a transposed weight: the name of the weight
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            transposed[node.output[0]] = node.input[0]
    matrices = {name for name in weights if not name.endswith(("roll", "router.weight"))}
    matrices |= transposed.keys()
    if bits == 4:
        proto.opset_import.add(domain=MICROSOFT, version=1)
    added = {}
    nodes = []
    quantized = set()  # the states that are integers already
    for node in proto.graph.node:
        output = node.output[0]
        if is_look_up(node):
            table = node.input[0]
            if table_bits == 4:
                added |= int4_arrays(table, weights[table]) | int4_look_up_arrays(
                    weights[table].shape[1]
                )
                nodes += int4_look_up_nodes(table, output)
                continue
            add_integers(added, table, weights[table], axis=1)
            added["last"] = np.array([-1])
            nodes += look_up_nodes(table, output)
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices:
            x, matrix, *bias = node.input
            product = f"{output}.product" if bias else output
            weight = transposed.get(matrix, matrix)
            by_row = node.op_type == "Gemm" or matrix in transposed  # (out, in), as torch has it
            if (table_bits if output == "logits" else bits) == 4:
                array = weights[weight] if by_row else weights[weight].T
                added |= int4_arrays(weight, array)
                nodes += int4_product_nodes(x, weight, array.shape, product)
            else:
                add_integers(added, weight, weights[weight], axis=1 if by_row else 0)
                integers = f"{weight}.q"
                if by_row:
                    integers = f"{output}.w"
                    nodes.append(make_node("Transpose", [f"{weight}.q"], [integers], perm=[1, 0]))
                if x not in quantized:
                    quantized.add(x)
                    nodes += wide_nodes(x) if wide else narrow_nodes(x)
                if wide:
                    sums = added[f"{weight}.q"].sum(1 if by_row else 0, dtype=np.int32)
                    added[f"{weight}.sum"] = (sums * added[f"{weight}.scale"]).astype(np.float32)
                    nodes += wide_product_nodes(x, integers, weight, product)
                else:
                    nodes += product_nodes(x, integers, f"{weight}.scale", product)
            if bias:
                nodes.append(make_node("Add", [product, *bias], [output]))
        elif output not in transposed:
            nodes.append(node)
    float_weights = {name.removesuffix(".q").removesuffix(".q4") for name in added}
    if wide:
        numbers = {"steps": 2**16 - 1, "byte": 2**8, "tiny": 1e-30}
        added |= {"last": np.array([-1])} | {name: np.float32(x) for name, x in numbers.items()}
    replace(proto, nodes, removed=float_weights, added=added)


def add_integers(arrays, name, weight, axis):
    """Puts a weight as NAME.q (int8) and NAME.scale (float32) into arrays, where it is not there yet.

    The largest number along the axis becomes INT8_LARGEST.
    """
    if f"{name}.q" in arrays:
        return
    largest = np.abs(weight).max(axis, keepdims=True)
    scale = np.maximum(largest, 1e-30) / INT8_LARGEST
    arrays[f"{name}.q"] = np.rint(weight / scale).astype(np.int8)
    arrays[f"{name}.scale"] = scale.squeeze(axis)


def int4_arrays(name, weight):
    """Returns a weight (out, in) as {NAME.q4: (out, groups, 16) uint8, the first of two integers in the low half,
    NAME.scale4: (out, groups), NAME.zero4: (out, groups / 2) uint8}: w is about (q - zero) scale.

    A scale is the range of a group over 15 or, where that is nearer, over less: a group that has few values,
    as quantize.py chose them, keeps them.
    """
    n_out, n_in = weight.shape
    weight = np.pad(weight, [(0, 0), (0, -n_in % INT4_GROUP)])
    groups = weight.reshape(n_out, -1, INT4_GROUP)
    lowest = groups.min(-1, keepdims=True, initial=0)
    width = np.maximum(groups.max(-1, keepdims=True, initial=0) - lowest, 1e-30)
    scales = width / 15
    least = np.full_like(scales, np.inf)
    for steps in range(15, 0, -1):
        scale = width / steps
        zero = np.rint(-lowest / scale)
        numbers = scale * (np.rint(groups / scale + zero).clip(0, 15) - zero)
        error = np.square(numbers - groups).sum(-1, keepdims=True)
        is_nearer = error < 0.01 * least  # nothing but its own grid is so near
        scales = np.where(is_nearer, scale, scales)
        least = np.where(is_nearer, error, least)
    zeros = np.rint(-lowest / scales)
    integers = np.rint(groups / scales + zeros).clip(0, 15)
    return {
        f"{name}.q4": pack(integers),
        f"{name}.scale4": scales[..., 0].astype(np.float32),
        f"{name}.zero4": pack(np.pad(zeros[..., 0], [(0, 0), (0, zeros.shape[1] % 2)])),
    }


def pack(integers):
    """Returns integers of 4 bits (..., n) as uint8 (..., n / 2), the first of two in the low half."""
    integers = integers.astype(np.uint8)
    return integers[..., ::2] | integers[..., 1::2] << 4


def int4_product_nodes(x, weight, shape, output):
    """Returns the nodes of x times a weight (out, in) of int4_arrays."""
    n_out, n_in = shape
    inputs = [x, f"{weight}.q4", f"{weight}.scale4", f"{weight}.zero4"]
    sizes = {"N": n_out, "K": n_in, "bits": 4, "block_size": INT4_GROUP}
    nodes = [
        make_node("MatMulNBits", inputs, [output], domain=MICROSOFT, accuracy_level=INT4_STATES, **sizes)
    ]
    return nodes


def int4_look_up_arrays(width):
    """Returns the sizes that int4_look_up_nodes of a table so wide ask for."""
    return {
        "flat": np.array([0, -1]),
        "first": np.array([0]),
        "width": np.array([width]),
        "last": np.array([-1]),
    }


def int4_look_up_nodes(table, output):
    """Returns the nodes that look up rows of int4_arrays, scale them and leave out what fills up the last group."""
    inputs = [f"{table}.rows4", "ids", f"{table}.scale4", f"{table}.zero4"]
    sizes = {"bits": 4, "block_size": INT4_GROUP, "gather_axis": 0, "quantize_axis": 1}
    return [
        make_node("Reshape", [f"{table}.q4", "flat"], inputs[:1]),
        make_node("GatherBlockQuantized", inputs, [f"{output}.filled"], domain=MICROSOFT, **sizes),
        make_node("Slice", [f"{output}.filled", "first", "width", "last"], [output]),
    ]


def look_up_nodes(table, output):
    """Returns the nodes that look up rows of integers and scale them."""
    return [
        make_node("Gather", [f"{table}.q", "ids"], [f"{output}.row"]),
        make_cast(f"{output}.row", f"{output}.float"),
        make_node("Gather", [f"{table}.scale", "ids"], [f"{output}.flat"]),
        make_node("Unsqueeze", [f"{output}.flat", "last"], [f"{output}.of_row"]),
        make_node("Mul", [f"{output}.float", f"{output}.of_row"], [output]),
    ]


def narrow_nodes(x):
    """Returns the node that makes states uint8: x is about (q - zero) * scale."""
    return [make_node("DynamicQuantizeLinear", [x], [f"{x}.q", f"{x}.scale", f"{x}.zero"])]


def wide_nodes(x):
    """Returns the nodes that make states uint8, all high bytes before all low ones: x is about
    (256 * high + low) * scale + lowest, the last two of each token.
    """
    return [
        make_node("ReduceMin", [x, "last"], [f"{x}.lowest"]),
        make_node("ReduceMax", [x, "last"], [f"{x}.highest"]),
        make_node("Sub", [f"{x}.highest", f"{x}.lowest"], [f"{x}.range"]),
        make_node("Max", [f"{x}.range", "tiny"], [f"{x}.positive"]),
        make_node("Div", [f"{x}.positive", "steps"], [f"{x}.scale"]),
        make_node("Sub", [x, f"{x}.lowest"], [f"{x}.above"]),
        make_node("Div", [f"{x}.above", f"{x}.scale"], [f"{x}.real"]),
        make_node("Round", [f"{x}.real"], [f"{x}.both"]),
        make_node("Div", [f"{x}.both", "byte"], [f"{x}.quotient"]),
        make_node("Floor", [f"{x}.quotient"], [f"{x}.high"]),
        make_node("Mul", [f"{x}.high", "byte"], [f"{x}.high_part"]),
        make_node("Sub", [f"{x}.both", f"{x}.high_part"], [f"{x}.low"]),
        make_node("Concat", [f"{x}.high", f"{x}.low"], [f"{x}.bytes"], axis=0),
        make_cast(f"{x}.bytes", f"{x}.q", "UINT8"),
    ]


def wide_product_nodes(x, integers, weight, output):
    """Returns the nodes of what product_nodes does: the product of the lowest is a sum of weights."""
    halves = [f"{output}.of_high", f"{output}.of_low"]
    nodes = [
        make_node("MatMulInteger", [f"{x}.q", integers], [f"{output}.sum"]),
        make_cast(f"{output}.sum", f"{output}.float"),
        make_node("Split", [f"{output}.float"], halves, axis=0, num_outputs=2),
        make_node("Mul", [halves[0], "byte"], [f"{output}.high_part"]),
        make_node("Add", [f"{output}.high_part", halves[1]], [f"{output}.whole"]),
        make_node("Mul", [f"{x}.scale", f"{weight}.scale"], [f"{output}.both"]),
        make_node("Mul", [f"{output}.whole", f"{output}.both"], [f"{output}.steps"]),
        make_node("Mul", [f"{x}.lowest", f"{weight}.sum"], [f"{output}.base"]),
        make_node("Add", [f"{output}.steps", f"{output}.base"], [output]),
    ]
    return nodes


def product_nodes(x, integers, scale, output):
    """Returns the nodes of x @ integers, scaled."""
    nodes = [
        make_node("MatMulInteger", [f"{x}.q", integers, f"{x}.zero"], [f"{output}.sum"]),
        make_cast(f"{output}.sum", f"{output}.float"),
        make_node("Mul", [f"{x}.scale", scale], [f"{output}.both"]),
        make_node("Mul", [f"{output}.float", f"{output}.both"], [output]),
    ]
    return nodes


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
    """Returns pairs (P, T) of a past's length and a number of new tokens, together within block_size, and
    within LONGEST: 8,192 tokens of 135 million parameters took 13 GB and a quarter of an hour.
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
    """Returns the logits of idx after P tokens, and all keys and values in the graph's layout; of a layer
    with a window the last of them, which its cache has.
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
    return [torch.from_numpy(array) for array in (logits, *past.arrays)]


def write_greedy(model, prompt, n):
    """Returns the ids of the likeliest n tokens after a prompt."""
    *_, [row] = generate(model, [prompt], n, temperature=0, past_end="recompute")
    return row.ids


def check(model, exported, prompt, n):
    """Prints how near an OnnxModel is to its Transformer. Raises Refusal where it is not near enough."""
    largest, share = parity(model, exported)
    pasts = sorted({P for P, _ in call_sizes(model.config.block_size)})
    print(
        f"PyTorch and onnxruntime differ by {largest:.2g} at most, {share:.2g} of the largest number "
        f"(past {', '.join(str(P) for P in pasts)}; batch 1 and 3)"
    )
    limit = MAX_DIFFERENCE
    if limit < share < math.inf:
        _, rounding = parity(copy.deepcopy(model).double(), model)
        print(f"PyTorch differs from itself in float64 by {rounding:.2g} of the largest number")
        limit = max(limit, MAX_ROUNDING * rounding)
    if not share <= limit:
        message = "the ONNX file does not compute what PyTorch does"
        raise Refusal(f"{message}: {largest:.2g} is more than rounding", status=1)
    pytorch_ids = write_greedy(model, prompt, n)
    onnx_ids = write_greedy(exported, prompt, n)
    for i, (pytorch_id, onnx_id) in enumerate(zip(pytorch_ids, onnx_ids)):
        if pytorch_id != onnx_id:
            message = f"greedy text differs from token {i} of {len(pytorch_ids)} on: {pytorch_id}"
            raise Refusal(f"{message}, from onnxruntime {onnx_id}", status=1)
    print(f"greedy text: {len(pytorch_ids)} tokens, all equal")


def load_validation(cfg, dataset, tokenizer):
    """Returns the ids of the validation split that judges integers. Raises Refusal where there is none."""
    name = cfg.dataset or dataset
    advice = f"--dataset=NAME names data that {cfg.quantize} can be judged by"
    if not name:
        raise Refusal(f"what {cfg.out_dir} was trained on is not known: {advice}")
    folder = f"data/{name}"
    try:
        _, data, data_tokenizer = prepare.load(folder)
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


def use_threads(model, threads):
    """Sets torch's threads. Returns the model, which race() hands to what it times."""
    torch.set_num_threads(threads)
    return model


def compare_speed(models, prompt, n, seconds):
    """Prints the tokens/s of {name: model}, each writing n tokens after a prompt, in turns."""
    threads = torch.get_num_threads()
    rivals = {}
    for name, model in models.items():
        model_threads = threads if name == "PyTorch" else 1  # onnxruntime has its own; see sample.load
        set_up = partial(use_threads, model, model_threads)
        rivals[name] = (set_up, partial(write_greedy, prompt=prompt, n=n))
    times = race(rivals, seconds, torch.device("cpu"))
    torch.set_num_threads(threads)
    speeds = ", ".join(f"{name} {n / time['median']:,.0f}" for name, time in times.items())
    print(f"tokens/s, one text of {n} tokens, {threads} threads, in turns: {speeds}")


# -----------------------------------------------------------------------------------------------------


def write_graph(proto, path):
    """Writes the file. Returns its bytes."""
    write_atomic(str(path), lambda f: f.write(proto.SerializeToString()))
    return path.stat().st_size


def write_integers(cfg, proto, ids, float_loss, folder):
    """Writes the float32 graph as cfg.quantize says, by the first of its ways that is good enough, else by the
    last. Returns its OnnxModel, and the share by which it raises the loss on ids.
    """
    path = folder / f"model_{cfg.quantize}.onnx"
    for options, words, good_enough in WAYS[cfg.quantize]:
        integers = copy.deepcopy(proto)
        quantize(integers, **options)
        size = write_graph(integers, path)
        model, _, _ = onnx_model.load(str(path))
        loss = validation_loss(model, ids, cfg.eval_tokens)
        increase = loss / float_loss - 1
        print(f"{path.name}: {size / 1e6:.2f} MB, {words}")
        print(
            f"validation loss: float32 {float_loss:.4f}, {cfg.quantize} {loss:.4f} nats a token, "
            f"{100 * increase:+.2f}%"
        )
        if increase <= good_enough:
            break
    return model, increase


def write_folder(cfg, model, tokenizer, ckpt, ids, folder):
    """Fills the folder, prints what is in it, and checks and times the models in it.

    ids are those of the validation split, for integers. Returns the share by which they raise the loss
    there, 0 without them. Raises Refusal where model.onnx does not compute what the model does.
    """
    start = str(ckpt.config.get("start", ""))
    fingerprint = checkpoint.fingerprint(ckpt.stretched)
    description = onnx_model.describe(
        model.config, tokenizer, start, ckpt.template, fingerprint, ckpt.text_rule
    )
    text = json.dumps(description, indent=1)
    tokenizer.save_files(folder)
    write_atomic(str(folder / "config.json"), lambda f: f.write(text.encode()))

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
    exported, _, _ = onnx_model.load(str(folder))
    prompt = [tokenizer.eot]
    check(model, exported, prompt, 200)

    models = {"PyTorch": model, "onnxruntime": exported}
    increase = 0.0
    if cfg.quantize != "none":
        float_loss = validation_loss(exported, ids, cfg.eval_tokens)
        models[cfg.quantize], increase = write_integers(cfg, proto, ids, float_loss, folder)
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
        if model.quantization:
            print(f"{ckpt.path} is quantized: its integers are written out as float32")
            model = dequantized(model)
        ids = load_validation(cfg, ckpt.dataset, tokenizer) if cfg.quantize != "none" else None
        increase = write_folder(cfg, model, tokenizer, ckpt, ids, tmp)
        limit = MAX_LOSS_INCREASE.get(cfg.quantize, 0)
        is_good = increase <= limit  # nan is not
        if not is_good:
            (tmp / f"model_{cfg.quantize}.onnx").unlink()
    if not is_good:
        message = f"{cfg.quantize} makes the validation loss {100 * increase:.1f}% worse"
        limit = f"more than {100 * limit:.0f}%"
        raise Refusal(f"{message}, {limit}: {folder} is written without it", status=1)
    print(f"next: python sample.py --onnx={folder}")


if __name__ == "__main__":
    run(main, Config)
