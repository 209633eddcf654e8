"""The ONNX graph with integers for its matrices: quantize(proto)."""

import math

import numpy as np

from onnx_graph import find_head, is_look_up, make_cast, make_node, read_arrays, replace
from onnx_modules import EXPERTS_LEAST, MICROSOFT

STATES = 4  # how exact its products are: with states of 8 bits, a scale for each group
# the onnxruntime that looks rows of so many bits up rightly: before, each row's zeros stood after the last one's
# without a gap, also where a row has an odd number of groups (findings/gather_block_quantized_zeros.sh)
LEAST = {8: "1.23", 4: "1.27"}
GROUPS = {8: 64, 4: 32}  # inputs that share a scale, by bits: sizes that onnxruntime is quick at
INT8_LARGEST = 64  # a CPU without VNNI adds two products in 16 bits and saturates: 2 * 255 * 64 < 2^15


def quantize(proto, bits=8, table_bits=8, plain=False, group_size=0):
    """Rewrites the graph of export() so that it multiplies integers of 8 or 4 bits, in groups along the inputs that
    share a scale: onnxruntime's MatMulNBits. The embedding and the head have table_bits; group_size is that of all
    others, 0: one that onnxruntime is quick at. Groups of states become 8 bits at each call, too, so that one that
    is hundreds of times larger than all others, as SmolLM2 has, spoils its neighbours alone. A router stays
    float32: which experts a token gets must not depend on rounding.

    plain takes operators of ONNX alone, for other runtimes and the page, and 8 bits: a weight has one scale for each
    output, the embedding and a head tied to it one for each token. The states of a call have one scale, so that its
    tokens and rows change each other's logits a little. onnxruntime has quantize_dynamic for this, which leaves a
    tied head in float32.
    """
    weights = read_arrays(proto)
    transposed = {}  # the name of a transposed weight: the name of the weight
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            transposed[node.output[0]] = node.input[0]
    matrices = {name for name in weights if not name.endswith(("roll", "router.weight"))}
    matrices |= transposed.keys()
    if not plain:
        if all(opset.domain != MICROSOFT for opset in proto.opset_import):
            proto.opset_import.add(domain=MICROSOFT, version=1)
        has_experts = any(node.op_type == "MoE" for node in proto.graph.node)
        least = EXPERTS_LEAST if has_experts else LEAST[table_bits]
        proto.metadata_props.add(key="onnxruntime", value=least)
    added = {}  # arrays
    removed = set()
    nodes = []
    quantized = set()  # the states that are integers already
    head = find_head(proto).output[0]
    for node in proto.graph.node:
        output = node.output[0]
        if is_look_up(node):
            table = node.input[0]
            removed.add(table)
            added["last"] = np.array([-1])
            if plain:
                add_integers(added, table, weights[table])
                nodes += plain_look_up_nodes(table, output)
            else:
                width = weights[table].shape[1]
                add_groups(added, table, weights[table], table_bits, GROUPS[table_bits])
                added |= {"flat": np.array([0, -1]), "first": np.array([0]), "width": np.array([width])}
                nodes += look_up_nodes(table, table_bits, output)
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices:
            x, matrix, *bias = node.input
            product = f"{output}.product" if bias else output
            weight = transposed.get(matrix, matrix)
            removed.add(weight)
            is_by_row = node.op_type == "Gemm" or matrix in transposed  # (out, in), as torch has it
            array = weights[weight] if is_by_row else weights[weight].T
            if plain:
                add_integers(added, weight, array)
                if x not in quantized:
                    quantized.add(x)
                    nodes.append(states_node(x))
                nodes += plain_product_nodes(x, weight, product)
            else:
                n_bits, size = bits, group_size or GROUPS[bits]
                if output == head:
                    n_bits, size = table_bits, GROUPS[table_bits]
                add_groups(added, weight, array, n_bits, size)
                nodes.append(product_node(x, weight, array.shape, n_bits, size, product))
            if bias:
                nodes.append(make_node("Add", [product, *bias], [output]))
        elif node.op_type == "MoE":
            _, _, both, _, down = node.input
            widths = [weights[name].shape[2] for name in (both, down)]
            size = math.gcd(group_size or GROUPS[bits], *widths)  # both are cut into whole groups
            removed |= {both, down}
            for name in both, down:
                add_experts(added, name, weights[name], bits, size)
            nodes.append(experts_node(node, bits, size))
        elif output not in transposed:
            nodes.append(node)
    replace(proto, nodes, removed, added)


# -----------------------------------------------------------------------------------------------------
# Groups, by onnxruntime's operators


def add_groups(arrays, name, weight, bits, size):
    """Puts a weight (out, in), in groups of so many inputs, into arrays, where it is not there yet, as NAME.q:
    (out, groups, bytes of a group) uint8, of two integers of 4 bits the first in the low half; NAME.scale: (out,
    groups); and of 4 bits NAME.zero: (out, groups / 2) uint8. w is about (q - zero) scale, with a zero of 128 for
    8 bits.

    A scale of 4 bits is the range of a group over 15 or, where that is nearer, over less: a group that has few
    values, as quantize.py chose them, keeps them.
    """
    if f"{name}.q" in arrays:  # the head's, where the embedding is tied to it
        return
    n_out, n_in = weight.shape
    weight = np.pad(weight, [(0, 0), (0, -n_in % size)])
    groups = weight.reshape(n_out, -1, size)
    if bits == 8:
        scales = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-30) / 127
        arrays[f"{name}.q"] = (np.rint(groups / scales) + 128).astype(np.uint8)
    else:
        scales, zeros = ranges(groups)
        arrays[f"{name}.q"] = pack(np.rint(groups / scales + zeros).clip(0, 15))
        arrays[f"{name}.zero"] = pack(np.pad(zeros[..., 0], [(0, 0), (0, zeros.shape[1] % 2)]))
    arrays[f"{name}.scale"] = scales[..., 0].astype(np.float32)


def ranges(groups):
    """Returns scales and zeros (out, groups, 1) for groups (out, groups, inputs) in 4 bits; see add_groups."""
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
    return scales, np.rint(-lowest / scales)


def pack(integers):
    """Returns integers of 4 bits (..., n) as uint8 (..., n / 2), the first of two in the low half."""
    integers = integers.astype(np.uint8)
    return integers[..., ::2] | integers[..., 1::2] << 4


def quantized_inputs(weight, bits):
    """Returns the names of the arrays of add_groups."""
    return [f"{weight}.q", f"{weight}.scale"] + ([f"{weight}.zero"] if bits == 4 else [])


def product_node(x, weight, shape, bits, size, output):
    """Returns the node of x times a weight (out, in) of add_groups."""
    n_out, n_in = shape
    inputs = [x, *quantized_inputs(weight, bits)]
    sizes = {"N": n_out, "K": n_in, "bits": bits, "block_size": size}
    return make_node("MatMulNBits", inputs, [output], domain=MICROSOFT, accuracy_level=STATES, **sizes)


def add_experts(arrays, name, weight, bits, size):
    """Puts the weights (n_expert, out, in) of experts into arrays as add_groups does, each with an axis of experts,
    and the bytes of a row in one axis.
    """
    n_expert, n_out, n_in = weight.shape
    add_groups(arrays, name, weight.reshape(-1, n_in), bits, size)
    for array in quantized_inputs(name, bits):
        arrays[array] = arrays[array].reshape(n_expert, n_out, -1)


def experts_node(node, bits, size):
    """Returns the node of integers for one of float32, MoE, whose weights add_experts has rounded."""
    x, router, both, _, down = node.input
    both, both_scale, *both_zero = quantized_inputs(both, bits)
    down, down_scale, *down_zero = quantized_inputs(down, bits)
    inputs = [x, router, both, both_scale, "", down, down_scale, "", "", "", "", *both_zero, *down_zero]
    sizes = {"expert_weight_bits": bits, "block_size": size, "weights_prepacked": 0}
    integers = make_node("QMoE", inputs, node.output, domain=MICROSOFT, accuracy_level=STATES, **sizes)
    integers.attribute.extend(node.attribute)
    return integers


def look_up_nodes(table, bits, output):
    """Returns the nodes that look up rows of add_groups, scale them and leave out what fills up the last group."""
    integers, *scales = quantized_inputs(table, bits)
    rows = f"{table}.rows"
    sizes = {"bits": bits, "block_size": GROUPS[bits], "gather_axis": 0, "quantize_axis": 1}
    return [
        make_node("Reshape", [integers, "flat"], [rows]),
        make_node(
            "GatherBlockQuantized",
            [rows, "ids", *scales],
            [f"{output}.filled"],
            domain=MICROSOFT,
            **sizes,
        ),
        make_node("Slice", [f"{output}.filled", "first", "width", "last"], [output]),
    ]


# -----------------------------------------------------------------------------------------------------
# 8 bits in plain operators


def add_integers(arrays, name, weight):
    """Puts a weight (out, in) as NAME.q (int8) and NAME.scale (out,) into arrays, where it is not there yet.

    The largest number of an output becomes INT8_LARGEST.
    """
    if f"{name}.q" in arrays:
        return
    scales = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-30) / INT8_LARGEST
    arrays[f"{name}.q"] = np.rint(weight / scales).astype(np.int8)
    arrays[f"{name}.scale"] = scales[:, 0]


def plain_look_up_nodes(table, output):
    """Returns the nodes that look up rows of add_integers and scale them."""
    return [
        make_node("Gather", [f"{table}.q", "ids"], [f"{output}.row"]),
        make_cast(f"{output}.row", f"{output}.float"),
        make_node("Gather", [f"{table}.scale", "ids"], [f"{output}.flat"]),
        make_node("Unsqueeze", [f"{output}.flat", "last"], [f"{output}.of_row"]),
        make_node("Mul", [f"{output}.float", f"{output}.of_row"], [output]),
    ]


def states_node(x):
    """Returns the node that makes states uint8: x is about (q - zero) * scale."""
    return make_node("DynamicQuantizeLinear", [x], [f"{x}.q", f"{x}.scale", f"{x}.zero"])


def plain_product_nodes(x, weight, output):
    """Returns the nodes of x times a weight of add_integers, scaled. A reader turns the weight once, when it loads."""
    return [
        make_node("Transpose", [f"{weight}.q"], [f"{output}.w"], perm=[1, 0]),
        make_node("MatMulInteger", [f"{x}.q", f"{output}.w", f"{x}.zero"], [f"{output}.sum"]),
        make_cast(f"{output}.sum", f"{output}.float"),
        make_node("Mul", [f"{x}.scale", f"{weight}.scale"], [f"{output}.both"]),
        make_node("Mul", [f"{output}.float", f"{output}.both"], [output]),
    ]
