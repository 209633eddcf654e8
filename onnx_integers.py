"""The ONNX graph with integers for its matrices: quantize(proto)."""

import numpy as np

from onnx_graph import is_look_up, make_cast, make_node, read_arrays, replace

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
INT4_STATES = 4  # how exact its products are: with states of 8 bits, a scale for each group
INT4_GROUP = 32  # inputs that share a scale and a zero, of which onnxruntime has the quickest products
INT8_LARGEST = 64  # a CPU without VNNI adds two products in 16 bits and saturates: 2 * 255 * 64 < 2^15


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
                add_int4(added, table, weights[table])
                added |= int4_look_up_arrays(weights[table].shape[1])
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
                add_int4(added, weight, array)
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


def add_int4(arrays, name, weight):
    """Puts a weight (out, in) into arrays, where it is not there yet, as NAME.q4: (out, groups, 16) uint8, the first of
    two integers in the low half, NAME.scale4: (out, groups), and NAME.zero4: (out, groups / 2) uint8: w is about
    (q - zero) scale.

    A scale is the range of a group over 15 or, where that is nearer, over less: a group that has few values,
    as quantize.py chose them, keeps them.
    """
    if f"{name}.q4" in arrays:  # the head's, where the embedding is tied to it
        return
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
    arrays[f"{name}.q4"] = pack(integers)
    arrays[f"{name}.scale4"] = scales[..., 0].astype(np.float32)
    arrays[f"{name}.zero4"] = pack(np.pad(zeros[..., 0], [(0, 0), (0, zeros.shape[1] % 2)]))


def pack(integers):
    """Returns integers of 4 bits (..., n) as uint8 (..., n / 2), the first of two in the low half."""
    integers = integers.astype(np.uint8)
    return integers[..., ::2] | integers[..., 1::2] << 4


def int4_product_nodes(x, weight, shape, output):
    """Returns the nodes of x times a weight (out, in) of add_int4."""
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
    """Returns the nodes that look up rows of add_int4, scale them and leave out what fills up the last group."""
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
