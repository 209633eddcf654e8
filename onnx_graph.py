"""The ONNX graph of a model, in float32: export(model). export_onnx.py says what it takes and returns.

export(model, fused=True) is that of a FusedGraph, for onnxruntime alone; onnx_integers.py makes its matrices integers.
"""

import logging
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import torch

from config import Refusal, end_at_once
from onnx_cache import cache_names
from onnx_modules import MICROSOFT, FusedGraph, Graph, can_fuse
from sizes import num_params

OPSET = 18  # the lowest that torch.onnx writes without converting
MAX_BYTES = 2**31 - 2**24  # of parameters: a protobuf ends at 2^31
DENSE = "dense: each expert computes each token"

# -----------------------------------------------------------------------------------------------------
# Nodes. onnx is imported where it is used, so that export_onnx.Config can say that it is missing


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
    """Replaces all nodes, removes initializers by name and appends the added ones, {name: array}."""
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
    """Returns whether a node is the embedding's look-up."""
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
    """The context in which Ctrl-C waits: it becomes a KeyboardInterrupt when the block has ended. A second Ctrl-C ends
    the process.

    While torch traces, a KeyboardInterrupt in a callback is lost, or torch aborts with a core dump.
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


def trace(graph):
    """Returns the ONNX model that torch.onnx writes for a Graph or a FusedGraph, with its free sizes."""
    c = graph.model.config
    inputs, axes = graph.example()
    past = inputs.pop("past")
    with hold_back_ctrl_c(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that axes share, and torch's own deprecations
        registration = logging.getLogger("torch.onnx._internal.exporter._registration")
        registration.setLevel(logging.ERROR)  # else it warns that torchvision is not installed
        program = torch.onnx.export(
            graph.eval(),
            (*inputs.values(), past),
            input_names=[*inputs, *cache_names(c, "past")],
            output_names=["logits", *cache_names(c, "present")],
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return program.model_proto


def is_fusible(model):
    """Returns whether export(model, fused=True) is possible: FusedGraph can compute the model, and 2 GB hold it."""
    tables = model.config.block_size * model.config.head_dim
    return can_fuse(model) and 4 * (num_params(model) + tables) <= MAX_BYTES


def export(model, fused=False):
    """Returns the float32 ONNX model (a protobuf) of a Transformer that is on the CPU, in eval mode. fused: with
    onnxruntime's own attention, which takes a model that is_fusible.

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
    proto = trace(FusedGraph(model) if fused else Graph(model))
    strip_metadata(proto)
    simplify(proto)
    if c.tie_embeddings:
        tie_head(proto)
    opsets = [(opset.domain, opset.version) for opset in proto.opset_import]
    expected = [("", OPSET)] + [(MICROSOFT, 1)] * fused
    if opsets != expected or proto.functions:
        message = f"torch {torch.__version__} wrote other operators than opset {OPSET}'s"
        raise Refusal(f"{message}: {opsets}", status=1)
    if c.mlp == "moe" and all(node.op_type != "MoE" for node in proto.graph.node):
        proto.metadata_props.add(key="experts", value=DENSE)
    return proto
