"""A Transformer whose matrices are integers of 8 or 4 bits: what quantize.py writes and restore reads.

    8 bits   w = q scale             q in -127 ... 127, a scale a row
    4 bits   w = (q - zero) scale    q and zero in 0 ... 15, a scale and a zero for each group of inputs

Every Linear in a block has the checkpoint's bits, those of experts too. The embedding and the head always
have 8 bits, in one table for both where they are tied; norms, biases, routers and learned positions stay
float. Scales are rounded to bfloat16 before integers are chosen, so that they are the same numbers in
every dtype and (q - zero) scale is exact in float32.

In bfloat16 torch's own kernels multiply a few rows, as decoding has them, where their limits hold
(kernel_of), but not those of experts. Everything else is a product with the matrix written out: for many
rows it is written out at each call, for a few rows once, and kept. So in float32 a model that samples has
all its matrices twice, as integers and as numbers, but for the embedding's rows, and is as fast as its
float model. In bfloat16 the kernel for 4 bits keeps the integers in an order of its own, a second copy. A
tied table is in memory once, as embedding and as head.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import lora
from config import check_choice
from experts import ExpertLinear
from products import Linear, product_dtype

METHODS = ("rtn", "gptq", "awq")
GROUP_SIZES = (32, 64, 128)
FEW = 16  # rows, up to which torch's kernels are faster than a product with the matrix written out
LARGEST = {8: 127, 4: 15}  # codes


@dataclass
class Quantization:
    """How a model's matrices are stored. Raises ValueError where they cannot be."""

    bits: int = 8
    group_size: int = 0  # inputs that share a scale; 0: all of a row, with 8 bits
    method: str = "rtn"  # that chose the integers; nothing depends on it when they are read

    def __post_init__(self):
        check_choice(self, "bits", LARGEST)
        sizes = GROUP_SIZES if self.bits == 4 else (0,)
        if self.group_size not in sizes:
            choices = " | ".join(map(str, sizes))
            raise ValueError(
                f"group_size of {self.bits} bits must be {choices}, not {self.group_size!r:.60}"
            )
        check_choice(self, "method", METHODS)


class Codes(NamedTuple):
    """A matrix (out, in) as integers."""

    codes: Any  # (out, in) int8 for 8 bits, uint8 for 4
    scales: Any  # (out, groups), of numbers that are bfloat16
    zeros: Any  # (out, groups) uint8; None for 8 bits

    def dense(self):
        """Returns the matrix, in the dtype of the scales."""
        G = self.scales.size(1)
        codes = self.codes.unflatten(1, (G, -1)).to(self.scales.dtype)
        if self.zeros is not None:
            codes = codes - self.zeros[..., None].to(codes.dtype)
        return (codes * self.scales[..., None]).flatten(1)


# -----------------------------------------------------------------------------------------------------
# Kernels: torch's own. Each takes only some shapes and dtypes, and others may end the process


class Kernel(NamedTuple):
    """A product of a few rows x (R, in), bfloat16, with a matrix of integers."""

    prepare: Any  # prepare(linear) returns the kernel's other arguments
    multiply: Any  # multiply(x, *tensors) returns (R, out)


def scales_and_zeros(linear):
    """Returns (groups, out, 2) bfloat16: with torch's int4 kernels w = (q - 8) scale + zero."""
    scales = linear.scales4.float()
    zeros = (8 - linear.zeros4.float()) * scales
    return torch.stack((scales, zeros), -1).transpose(0, 1).bfloat16().contiguous()


def prepare_int8(linear):
    return linear.codes8, linear.scales8[:, 0].bfloat16()


def prepare_int4_cpu(linear):
    packed = torch._convert_weight_to_int4pack_for_cpu(linear.codes().codes.int(), 1)
    return packed, linear.group_size, scales_and_zeros(linear)


def inner_tiles(n_in):
    """Returns the largest tile of CUDA's int4 kernel that divides the inputs, or 0."""
    return next((tiles for tiles in (8, 4, 2) if n_in % (16 * tiles) == 0), 0)


def prepare_int4_cuda(linear):
    packed = torch._convert_weight_to_int4pack(linear.codes4, inner_tiles(linear.in_features))
    return packed, linear.group_size, scales_and_zeros(linear)


INT8 = Kernel(prepare_int8, lambda x, *tensors: torch._weight_int8pack_mm(x, *tensors))
INT4_CPU = Kernel(prepare_int4_cpu, lambda x, *tensors: torch._weight_int4pack_mm_for_cpu(x, *tensors))
INT4_CUDA = Kernel(prepare_int4_cuda, lambda x, *tensors: torch._weight_int4pack_mm(x, *tensors))


def has_operator(name, device):
    """Returns whether this torch has the operator aten::NAME for a kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not hasattr(torch, name):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def kernel_of(linear, dtype):
    """Returns the Kernel that multiplies with a QuantizedLinear in a dtype, or None.

    Only in bfloat16: in float32 torch's kernels go number by number, slower than the matrix written out. The
    number of inputs must be a multiple of the vectors that are read (32 numbers), or they would be read past
    a row's end; that of outputs a multiple of the blocks that are packed. On a GPU a kernel is tried once: it
    must agree with the matrix written out.
    """
    device = linear.scales.device
    n_out, n_in = linear.out_features, linear.in_features
    if dtype != torch.bfloat16 or n_in % 32:
        return None
    if linear.bits == 8:
        kernel = INT8 if has_operator("_weight_int8pack_mm", device) else None
    elif device.type == "cpu":
        is_known = has_operator("_weight_int4pack_mm_for_cpu", device)
        kernel = INT4_CPU if is_known and n_out % 16 == 0 else None
    else:
        is_known = has_operator("_weight_int4pack_mm", device)
        kernel = INT4_CUDA if is_known and n_out % 8 == 0 else None
    if device.type != "cuda" or kernel is None:
        return kernel
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return kernel if agrees(kernel, linear) else None


def has_kernels(c):
    """Returns whether kernels, which take bfloat16, multiply most integers of a model of config c: no experts'."""
    return c.mlp != "moe"


def agrees(kernel, linear):
    """Returns whether a kernel computes what the matrix written out does, on two rows."""
    x = torch.linspace(-1, 1, 2 * linear.in_features, device=linear.scales.device).sin()
    x = x.view(2, -1).bfloat16()
    expected = F.linear(x.float(), linear.codes().dense().float())
    try:
        y = kernel.multiply(x, *kernel.prepare(linear)).float()
    except RuntimeError:
        return False
    return bool((y - expected).norm() <= 0.02 * expected.norm())


# -----------------------------------------------------------------------------------------------------
# Modules


class QuantizedLinear(nn.Module):
    """A Linear of integers. Its tensors have names of their own, so that a program that does not know
    them misses `weight` and does not read integers as numbers:

        codes8 (out, in) int8, scales8 (out, 1); or
        codes4 (out, in / 2) uint8, the input of even number in the high half; scales4, zeros4 (out, groups)
    """

    def __init__(self, in_features, out_features, quantization, bias=False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = quantization.bits
        self.group_size = quantization.group_size or in_features
        G = in_features // self.group_size
        if self.bits == 8:
            self.codes8 = nn.Buffer(torch.zeros(out_features, in_features, dtype=torch.int8))
            self.scales8 = nn.Buffer(torch.zeros(out_features, G, dtype=torch.bfloat16))
        else:
            self.codes4 = nn.Buffer(torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
            self.scales4 = nn.Buffer(torch.zeros(out_features, G, dtype=torch.bfloat16))
            self.zeros4 = nn.Buffer(torch.zeros(out_features, G, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.forget()

    def forget(self):
        """Forgets what was made of the integers for the device and the dtype of the last call."""
        self.made_for = None
        self.kernel = None  # a Kernel, where one fits
        self.tensors = ()  # its arguments
        self.matrix = None  # the matrix written out, where none fits

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    @property
    def scales(self):
        return self.scales8 if self.bits == 8 else self.scales4

    @property
    def n_weights(self):
        return self.in_features * self.out_features

    @property
    def weight(self):
        """The matrix written out, (out, in), in the dtype of the scales."""
        return self.codes().dense()

    def codes(self):
        """Returns the integers, unpacked."""
        if self.bits == 8:
            return Codes(self.codes8, self.scales8, None)
        codes = torch.stack((self.codes4 >> 4, self.codes4 & 15), -1).flatten(1)
        return Codes(codes, self.scales4, self.zeros4)

    @torch.no_grad()
    def set_codes(self, codes):
        """Takes the integers of a matrix."""
        self.forget()
        self.scales.copy_(codes.scales)
        if self.bits == 8:
            self.codes8.copy_(codes.codes)
            return
        pairs = codes.codes.unflatten(1, (-1, 2))
        self.codes4.copy_(pairs[..., 0] << 4 | pairs[..., 1])
        self.zeros4.copy_(codes.zeros)

    def prepare(self, dtype):
        """Makes what products of a few rows in a dtype need, unless that is made already."""
        if self.made_for == dtype:
            return
        self.forget()
        self.made_for = dtype
        self.kernel = self.choose_kernel(dtype)
        if self.kernel:
            self.tensors = self.kernel.prepare(self)
        else:
            self.matrix = self.weight.to(dtype)

    def choose_kernel(self, dtype):
        return kernel_of(self, dtype)

    def written_out(self, dtype):
        """Returns the weight in a dtype: the one that is kept, or a new one."""
        is_kept = self.matrix is not None and self.made_for == dtype
        return self.matrix if is_kept else self.weight.to(dtype)

    def forward(self, x):
        dtype = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        rows = x.to(dtype).flatten(0, -2)
        if len(rows) <= FEW:
            self.prepare(dtype)
        if len(rows) <= FEW and self.kernel:
            y = self.kernel.multiply(rows.contiguous(), *self.tensors)
            y = y if bias is None else y + bias
        else:
            y = F.linear(rows, self.written_out(dtype), bias)
        return y.unflatten(0, x.shape[:-1])


class QuantizedExpertLinear(QuantizedLinear):
    """An ExpertLinear of integers: one matrix (n_expert out, in), of all experts below each other."""

    def __init__(self, n_expert, in_features, out_features, quantization):
        super().__init__(in_features, n_expert * out_features, quantization)
        self.n_expert = n_expert

    @property
    def weight(self):
        """The matrices written out, (n_expert, out, in), in the dtype of the scales."""
        return super().weight.unflatten(0, (self.n_expert, -1))

    def choose_kernel(self, dtype):
        return None

    def forward(self, rows, ends):
        dtype = product_dtype(rows)
        if len(rows) <= FEW:
            self.prepare(dtype)
        return ExpertLinear.multiply(rows, self.written_out(dtype), ends)


class QuantizedEmbedding(nn.Module):
    """An embedding of integers; `table` may be the head, too."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    @property
    def weight(self):
        return self.table.weight

    def forward(self, idx):
        return self.table.codes8[idx] * self.table.scales8[idx]


# -----------------------------------------------------------------------------------------------------
# Models


def linears(model):
    """Returns {name: Linear or ExpertLinear} of those that have the checkpoint's bits: all in blocks but routers,
    which decide where a token goes.
    """
    modules = model.blocks.named_modules(prefix="blocks")
    kinds = nn.Linear, ExpertLinear, QuantizedLinear
    return {
        name: module
        for name, module in modules
        if isinstance(module, kinds) and not name.endswith("router")
    }


def check_matrices(model, group_size):
    """Raises ValueError where a model's matrices cannot be integers, in groups of a size or, with 0, in rows."""
    check_classes(model)
    check_groups(model, group_size)


def check_classes(model):
    """Raises ValueError where a matrix is in a class of one's own, whose forward integers would leave out."""
    for name, module in (linears(model) | {"head": model.head, "wte": model.wte}).items():
        if type(module) not in (nn.Linear, Linear, ExpertLinear, nn.Embedding):
            raise ValueError(
                f"{name} is a {type(module).__name__}: integers stand for the matrices of Linear, ExpertLinear and "
                "Embedding alone, and would leave out what it computes"
            )


def check_groups(model, group_size):
    """Raises ValueError where a Linear's inputs are no multiple of the group."""
    if not group_size:
        return
    for name, linear in linears(model).items():
        if linear.in_features % group_size:
            sizes = {linear.in_features for linear in linears(model).values()}
            fitting = [g for g in GROUP_SIZES if all(size % g == 0 for size in sizes)]
            advice = f"--group_size={fitting[-1]} fits" if fitting else "no group fits, --bits=8 does"
            raise ValueError(
                f"{name} has {linear.in_features} inputs, no multiple of group_size={group_size}: {advice}"
            )


def empty(linear, quantization):
    """Returns a Linear or ExpertLinear of integers, all 0, of the same shape as a float one."""
    *n_expert, n_out, n_in = linear.weight.shape
    if n_expert:
        return QuantizedExpertLinear(*n_expert, n_in, n_out, quantization)
    return QuantizedLinear(n_in, n_out, quantization, linear.bias is not None)


def install(model, quantization):
    """Puts modules of integers, all 0, in the place of a Transformer's matrices. Raises ValueError."""
    check_matrices(model, quantization.group_size)
    for name, linear in linears(model).items():
        lora.replace(model, name, empty(linear, quantization))
    c = model.config
    rows = Quantization(8, 0, quantization.method)
    model.head = QuantizedLinear(c.n_embd, c.vocab_size, rows)
    table = model.head if c.tie_embeddings else QuantizedLinear(c.n_embd, c.vocab_size, rows)
    model.wte = QuantizedEmbedding(table)
    model.quantization = quantization


@torch.no_grad()
def quantized(model, quantization, codes):
    """Returns a copy of a Transformer with integers for its matrices: codes is {name: Codes} of each Linear in
    blocks, with experts below each other, of the head and of wte. Its scales are bfloat16, as in a file;
    .float() computes with them exactly.
    """
    other = copy.deepcopy(model)
    install(other, quantization)
    own = linears(other)
    for name, linear in linears(model).items():
        for bias in own[name].parameters():
            bias.copy_(linear.bias)
    own |= {"head": other.head, "wte": other.wte.table}
    for name, linear in own.items():
        linear.set_codes(codes[name])
    return other.eval()


def dense(linear):
    """Returns the Linear or ExpertLinear in float32 that computes what one of integers does."""
    *n_expert, n_out, n_in = linear.weight.shape
    if n_expert:
        other = ExpertLinear(*n_expert, n_in, n_out)
    else:
        other = nn.Linear(n_in, n_out, bias=linear.bias is not None)
    other.load_state_dict(dict(linear.named_parameters()) | {"weight": linear.weight})
    return other


@torch.no_grad()
def dequantized(model):
    """Returns the float Transformer that computes what a quantized one does, in float32."""
    other = copy.deepcopy(model)
    for name, linear in linears(model).items():
        lora.replace(other, name, dense(linear))
    V, C = model.head.out_features, model.head.in_features
    other.wte = nn.Embedding(V, C, _weight=model.wte.weight.float())
    other.head = nn.Linear(C, V, bias=False)
    other.head.weight = other.wte.weight
    if not model.config.tie_embeddings:
        other.head.weight = nn.Parameter(model.head.weight.float())
    other.quantization = None
    return other.eval()
