"""The ONNX graph of a model, in float32: export(model). export_onnx.py says what it takes and returns."""

import copy
import logging
import math
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import onnx_model
from config import Refusal, end_at_once
from model import ComputedTable, attention_mask
from sizes import num_params

OPSET = 18  # the lowest that torch.onnx writes without converting
MAX_BYTES = 2**31 - 2**24  # of parameters: a protobuf ends at 2^31
DENSE = "dense: each expert computes each token"

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


def computes_silu(mlp):
    """Returns whether an MLP computes what JoinedSwiGLU does, and is not one that was changed in model.py."""
    x = torch.linspace(0, 9, 2 * mlp.up_proj.in_features).sin().view(2, -1)
    with torch.no_grad():
        expected = mlp(x)
        return (JoinedSwiGLU(mlp)(x) - expected).norm() <= 1e-4 * expected.norm()


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
            if c.mlp == "swiglu" and computes_silu(block.mlp):
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
        return model.logits(x), *present


# -----------------------------------------------------------------------------------------------------
# The graph. onnx is imported where it is used, so that Config can say that it is missing


def make_node(op, inputs, outputs, **attributes):
    import onnx

    return onnx.helper.make_node(op, inputs, outputs, **attributes)


def make_cast(name, output):
    """Returns the node that makes numbers float32."""
    import onnx

    return make_node("Cast", [name], [output], to=onnx.TensorProto.FLOAT)


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


def find_head(proto):
    """Returns the head's node: the last product, after which logits may be capped."""
    return next(node for node in reversed(proto.graph.node) if node.op_type in ("Gemm", "MatMul"))


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
    head = find_head(proto)
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
