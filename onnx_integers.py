"""The ONNX graph with integers for its matrices: quantize(proto)."""

import math

import numpy as np

from onnx_graph import find_head, is_look_up, make_cast, make_node, read_arrays, replace
from onnx_modules import EXPERTS_LEAST, MICROSOFT

STATES = 4  # the accuracy_level of products: states become 8 bits, with a scale for each group
# the first onnxruntime that looks up rows of so many bits rightly: before 1.27 it took the zeros of 4 bits for a run
# without a gap after a row that has an odd number of groups (findings/gather_block_quantized_zeros.sh)
LEAST = {8: "1.23", 4: "1.27"}
GROUPS = {8: 64, 4: 32}  # inputs that share a scale, by bits: sizes that onnxruntime is quick at
INT8_LARGEST = 64  # a CPU without VNNI adds two products in 16 bits and saturates: 2 * 255 * 64 < 2^15


def quantize(proto, bits=8, table_bits=8, plain=False, group_size=0):
    """Rewrites the graph of export() so that it multiplies integers of 8 or 4 bits: see Groups or, with plain, Plain.

    The embedding and the head have table_bits; group_size is that of all others, 0: one that onnxruntime is quick
    at. A router stays float32: which experts a token gets must not depend on rounding.
    """
    weights = read_arrays(proto)
    way = Plain(weights) if plain else Groups(weights, bits, table_bits, group_size)
    transposed = {}  # the name of a transposed weight: the name of the weight
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            transposed[node.output[0]] = node.input[0]
    matrices = {name for name in weights if not name.endswith(("roll", "router.weight"))}
    matrices |= transposed.keys()
    if not plain:
        name_operators(proto, table_bits)
    removed = set()
    nodes = []
    head = find_head(proto).output[0]
    for node in proto.graph.node:
        output = node.output[0]
        if is_look_up(node):
            table = node.input[0]
            removed.add(table)
            nodes += way.look_up(table, output)
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices:
            x, matrix, *bias = node.input
            product = f"{output}.product" if bias else output
            weight = transposed.get(matrix, matrix)
            removed.add(weight)
            is_by_row = node.op_type == "Gemm" or matrix in transposed  # (out, in), as torch has it
            array = weights[weight] if is_by_row else weights[weight].T
            nodes += way.multiply(x, weight, array, product, is_head=output == head)
            if bias:
                nodes.append(make_node("Add", [product, *bias], [output]))
        elif node.op_type == "MoE":
            _, _, both, _, down = node.input
            removed |= {both, down}
            nodes.append(way.mix(node))
        elif output not in transposed:
            nodes.append(node)
    replace(proto, nodes, removed, way.arrays)


def name_operators(proto, table_bits):
    """Notes in a graph that it has onnxruntime's own operators, and the least onnxruntime that has them right."""
    if all(opset.domain != MICROSOFT for opset in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    has_experts = any(node.op_type == "MoE" for node in proto.graph.node)
    least = EXPERTS_LEAST if has_experts else LEAST[table_bits]
    proto.metadata_props.add(key="onnxruntime", value=least)


# -----------------------------------------------------------------------------------------------------
# Groups, by onnxruntime's operators


class Groups:
    """Integers in groups along the inputs, each with its scale, by onnxruntime's MatMulNBits. Groups of states become
    8 bits at each call, too, so that a state that is hundreds of times larger than all others, as SmolLM2 has,
    spoils only its neighbours.

    weights: {name: array} of the graph; arrays: {name: array}, those that take their place.
    """

    def __init__(self, weights, bits, table_bits, group_size):
        self.weights = weights
        self.arrays = {}
        self.bits = bits
        self.size = group_size or GROUPS[bits]
        self.table_bits = table_bits

    def look_up(self, table, output):
        """Returns the nodes that look up rows of the embedding, scale them and cut off what fills up the last group."""
        bits = self.table_bits
        self.arrays["last"] = np.array([-1])
        add_groups(self.arrays, table, self.weights[table], bits, GROUPS[bits])
        self.arrays["flat"] = np.array([0, -1])
        self.arrays["first"] = np.array([0])
        self.arrays["width"] = np.array([self.weights[table].shape[1]])
        integers, *scales = quantized_inputs(table, bits)
        rows = f"{table}.rows"
        filled = f"{output}.filled"
        sizes = {"bits": bits, "block_size": GROUPS[bits], "gather_axis": 0, "quantize_axis": 1}
        return [
            make_node("Reshape", [integers, "flat"], [rows]),
            make_node(
                "GatherBlockQuantized", [rows, "ids", *scales], [filled], domain=MICROSOFT, **sizes
            ),
            make_node("Slice", [filled, "first", "width", "last"], [output]),
        ]

    def multiply(self, x, weight, array, output, is_head):
        """Returns the node of x times a weight, as a list. array (out, in): the weight's numbers."""
        bits, size = self.bits, self.size
        if is_head:
            bits, size = self.table_bits, GROUPS[self.table_bits]
        add_groups(self.arrays, weight, array, bits, size)
        n_out, n_in = array.shape
        inputs = [x, *quantized_inputs(weight, bits)]
        sizes = {"N": n_out, "K": n_in, "bits": bits, "block_size": size}
        return [
            make_node("MatMulNBits", inputs, [output], domain=MICROSOFT, accuracy_level=STATES, **sizes)
        ]

    def mix(self, node):
        """Returns the node of integers, QMoE, for one of float32, MoE."""
        x, router, both, _, down = node.input
        widths = [self.weights[name].shape[2] for name in (both, down)]
        size = math.gcd(self.size, *widths)  # both are cut into whole groups
        for name in both, down:
            add_experts(self.arrays, name, self.weights[name], self.bits, size)
        both, both_scale, *both_zero = quantized_inputs(both, self.bits)
        down, down_scale, *down_zero = quantized_inputs(down, self.bits)
        inputs = [x, router, both, both_scale, "", down, down_scale, ""]
        inputs += ["", "", "", *both_zero, *down_zero]
        sizes = {"expert_weight_bits": self.bits, "block_size": size, "weights_prepacked": 0}
        integers = make_node(
            "QMoE", inputs, node.output, domain=MICROSOFT, accuracy_level=STATES, **sizes
        )
        integers.attribute.extend(node.attribute)
        return integers


def add_groups(arrays, name, weight, bits, size):
    """Puts a weight (out, in), in groups of so many inputs, into arrays, where it is not there yet:

        NAME.q       (out, groups, bytes of a group) uint8; of two integers of 4 bits the first is in the low half
        NAME.scale   (out, groups) float32
        NAME.zero    (out, groups / 2) uint8, with 4 bits alone; with 8 bits zeros are 128

    w is about (q - zero) scale. A scale of 4 bits is the range of a group over 15 or, where that is nearer, over a
    smaller number: a group of few different values, as quantize.py makes them, keeps them.
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


def add_experts(arrays, name, weight, bits, size):
    """Puts the weights (n_expert, out, in) of experts into arrays as add_groups does, each with an axis of experts,
    and the bytes of a row in one axis.
    """
    n_expert, n_out, n_in = weight.shape
    add_groups(arrays, name, weight.reshape(-1, n_in), bits, size)
    for array in quantized_inputs(name, bits):
        arrays[array] = arrays[array].reshape(n_expert, n_out, -1)


# -----------------------------------------------------------------------------------------------------
# 8 bits in plain operators


class Plain:
    """Integers of 8 bits by operators of ONNX alone, for other runtimes and the page. A weight has one scale for each
    output, the embedding and a head tied to it one for each token. The states of a call have one scale, so that its
    tokens and rows change each other's logits a little. onnxruntime has quantize_dynamic for this, which leaves a
    tied head in float32.

    weights and arrays: as in Groups.
    """

    def __init__(self, weights):
        self.weights = weights
        self.arrays = {}
        self.states = set()  # the names of those that are integers already

    def look_up(self, table, output):
        """Returns the nodes that look up rows of the embedding and scale them."""
        self.arrays["last"] = np.array([-1])
        add_integers(self.arrays, table, self.weights[table])
        return [
            make_node("Gather", [f"{table}.q", "ids"], [f"{output}.row"]),
            make_cast(f"{output}.row", f"{output}.float"),
            make_node("Gather", [f"{table}.scale", "ids"], [f"{output}.flat"]),
            make_node("Unsqueeze", [f"{output}.flat", "last"], [f"{output}.of_row"]),
            make_node("Mul", [f"{output}.float", f"{output}.of_row"], [output]),
        ]

    def multiply(self, x, weight, array, output, is_head):
        """Returns the nodes of x times a weight. array (out, in): the weight's numbers. x becomes integers first,
        unless it has already: x is about (q - zero) * scale. A reader transposes the weight once, when it loads.
        """
        add_integers(self.arrays, weight, array)
        nodes = []
        if x not in self.states:
            self.states.add(x)
            nodes.append(make_node("DynamicQuantizeLinear", [x], [f"{x}.q", f"{x}.scale", f"{x}.zero"]))
        return nodes + [
            make_node("Transpose", [f"{weight}.q"], [f"{output}.w"], perm=[1, 0]),
            make_node("MatMulInteger", [f"{x}.q", f"{output}.w", f"{x}.zero"], [f"{output}.sum"]),
            make_cast(f"{output}.sum", f"{output}.float"),
            make_node("Mul", [f"{x}.scale", f"{weight}.scale"], [f"{output}.both"]),
            make_node("Mul", [f"{output}.float", f"{output}.both"], [output]),
        ]


def add_integers(arrays, name, weight):
    """Puts a weight (out, in) as NAME.q (int8) and NAME.scale (out,) into arrays, where it is not there yet.

    The largest number of an output becomes INT8_LARGEST.
    """
    if f"{name}.q" in arrays:
        return
    scales = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-30) / INT8_LARGEST
    arrays[f"{name}.q"] = np.rint(weight / scales).astype(np.int8)
    arrays[f"{name}.scale"] = scales[:, 0]
