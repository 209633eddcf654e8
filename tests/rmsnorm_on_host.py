"""The kernels of rmsnorm_kernel.cu on the processor, against float64: python rmsnorm_on_host.py LIBRARY

With numpy alone, so that it runs under sanitizers.
"""

import ctypes
import itertools
import mmap
import sys

import numpy as np

F32, F16, BF16 = 0, 1, 2
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # the largest relative error of one rounding
EPS = 1e-5
# of x, a and the weight
TYPES = [
    (F32, F32, F32),
    (F32, F16, F32),
    (F32, BF16, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
]
# Rows of each width: a block has several of them, and the last block fewer; or one;
# or one that is longer than it keeps, in chunks and number by number.
SHAPES = {1: 70, 7: 133, 33: 9, 64: 37, 384: 13, 768: 7, 1000: 5, 4096: 3, 8192: 3, 16384: 2, 40000: 1}


def rounded(x, kind):
    """Rounds float64 to the stored numbers of a dtype, to nearest even.

    It goes by way of float32, which is exact for our sums of two.
    """
    x = np.asarray(x, np.float32)
    if kind == F32:
        return x
    if kind == F16:
        return x.astype(np.float16)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def exact(x, kind):
    """Returns stored numbers as float64."""
    if kind == BF16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def placed(x, offset):
    """Copies x to an address of a multiple of 16 plus offset numbers, in memory of exactly its size."""
    memory = np.empty(x.nbytes + 16 + offset * x.itemsize, np.uint8)
    start = -memory.ctypes.data % 16 + offset * x.itemsize
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def unwritten(shape, dtype, offset=0):
    """Returns an array of nan, whatever the dtype: all bits are 1."""
    integers = np.full(shape, -1, f"i{dtype.itemsize}")
    return placed(integers.view(dtype), offset)


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


def same_bits(a, b):
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def close(out, reference, kind, scale):
    """Within one rounding to kind, and the errors of float32 arithmetic on numbers of that scale."""
    rounding = 1.01 * UNIT[kind] * np.abs(reference)
    if kind == F16:
        rounding += 2.0**-25  # near 0 its steps are 2^-24
    return bool((np.abs(out - reference) <= rounding + 4e-6 * scale).all())


class Kernels:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.rmsnorm_forward.restype = ctypes.c_char_p
        self.lib.rmsnorm_backward.restype = ctypes.c_char_p
        self.lib.rmsnorm_parts.restype = ctypes.c_int64

    def set(self, name, value, kind=ctypes.c_int):
        """Sets a variable of cuda_on_host.h."""
        kind.in_dll(self.lib, f"cuda_on_host_{name}").value = value

    def parts(self, rows):
        return self.lib.rmsnorm_parts(ctypes.c_int64(rows))

    def forward(self, x, a, weight, total, y, inv_rms, kinds):
        rows, dim = x.shape
        error = self.lib.rmsnorm_forward(
            *map(pointer, (x, a, weight, total, y, inv_rms)),
            ctypes.c_int64(rows),
            dim,
            ctypes.c_float(EPS),
            *kinds,
            None,
        )
        assert error is None, error

    def backward(self, dy, ds, x, weight, inv_rms, dx, partial, dweight, kinds):
        rows, dim = x.shape
        x_kind, _, weight_kind = kinds
        error = self.lib.rmsnorm_backward(
            *map(pointer, (dy, ds, x, weight, inv_rms, dx, partial, dweight)),
            ctypes.c_int64(rows),
            dim,
            x_kind,
            weight_kind,
            None,
        )
        assert error is None, error


def expected(x, weight, dy):
    """Returns (1 / rms, y, dx, the rows that add up to dweight, the scale of dx's terms) in float64."""
    inv_rms = 1 / np.sqrt((x**2).mean(1, keepdims=True) + EPS)
    normed = x * inv_rms
    gradient = dy * weight
    dx = inv_rms * (gradient - normed * (gradient * normed).mean(1, keepdims=True))
    scale = np.abs(inv_rms * gradient) + np.abs(inv_rms * normed)
    return inv_rms, normed * weight, dx, dy * normed, scale


def check(kernels, dim, rows, kinds, offset, add, scale):
    """One case, with the threads in both orders: the same bits, and those near float64's."""
    rng = np.random.default_rng((dim, rows, *kinds, offset, add))
    x_kind, a_kind, weight_kind = kinds
    shape = (rows, dim)

    def draw(scale, kind):
        return placed(rounded(scale * rng.standard_normal(shape), kind), offset)

    x = draw(scale, x_kind)
    dy = draw(1, x_kind)
    ds = draw(1, x_kind)
    a = draw(scale, a_kind) if add else None
    weight = placed(rounded(1 + 0.5 * rng.standard_normal(dim), weight_kind), offset)
    ds = ds if add else None

    runs = []
    for reverse in 0, 1:
        kernels.set("reverse", reverse)
        y = unwritten(shape, x.dtype, offset)
        inv_rms = unwritten(rows, np.dtype(np.float32))
        total = unwritten(shape, x.dtype, offset) if add else None
        kernels.forward(x, a, weight, total, y, inv_rms, kinds)
        normed = total if add else x

        dx = unwritten(shape, x.dtype, offset)
        partial = unwritten((kernels.parts(rows), dim), np.dtype(np.float32))
        dweight = unwritten(dim, weight.dtype)
        kernels.backward(dy, ds, normed, weight, inv_rms, dx, partial, dweight, kinds)

        frozen_dx = unwritten(shape, x.dtype, offset)
        kernels.backward(dy, ds, normed, weight, inv_rms, frozen_dx, None, None, kinds)
        assert same_bits(frozen_dx, dx), "a frozen weight changes dx"
        runs.append([y, inv_rms, dx, dweight, *([total] if add else [])])
    for forwards, backwards in zip(*runs):
        assert same_bits(forwards, backwards), "the order of threads matters: a barrier is missing"

    if add:
        total_in_float64 = exact(x, x_kind) + exact(a, a_kind)
        assert same_bits(total, rounded(total_in_float64, x_kind)), "sum"
    r, y_reference, dx_reference, dw_terms, dx_scale = expected(
        exact(normed, x_kind), exact(weight, weight_kind), exact(dy, x_kind)
    )
    if add:
        dx_reference += exact(ds, x_kind)
        dx_scale += np.abs(exact(ds, x_kind))
    dw_scale = np.abs(dw_terms).sum(0)
    assert close(exact(inv_rms, F32)[:, None], r, F32, r), "inv_rms"
    assert close(exact(y, x_kind), y_reference, x_kind, 0.3 * np.abs(y_reference)), "y"
    assert close(exact(dx, x_kind), dx_reference, x_kind, dx_scale), "dx"
    assert close(exact(dweight, weight_kind), dw_terms.sum(0), weight_kind, dw_scale), "dweight"


def cases():
    """Yields (dim, rows, the dtypes of x, a and the weight, offset, whether a is added, scale)."""
    for (dim, rows), kinds in itertools.product(SHAPES.items(), TYPES):
        x_kind, _, weight_kind = kinds
        yield dim, rows, kinds, 0, dim % 2 == 0, 1.0
        # misaligned, and added: of long rows only where x and the weight differ, for time
        if dim < 2000 or x_kind != weight_kind:
            yield dim, rows, kinds, 1, True, 1.0
    for kinds in TYPES:
        yield 768, 5, kinds, 0, False, 300.0  # its squares do not fit in float16


def check_no_rows(kernels, dim=48):
    no_rows = np.empty((0, dim), np.float32)
    inv_rms = np.empty(0, np.float32)
    weight = np.ones(dim, np.float32)
    dweight = unwritten(dim, weight.dtype)
    kinds = (F32, F32, F32)
    kernels.forward(no_rows, None, weight, None, no_rows, inv_rms, kinds)
    kernels.backward(no_rows, None, no_rows, weight, inv_rms, no_rows, no_rows, dweight, kinds)
    assert (dweight == 0).all(), "no rows: dweight"


def check_far(kernels, dim=4096, last=3):
    """Rows past element 2^31: the last blocks alone run, on memory that exists where it is touched."""
    rows = 2**31 // dim + last
    x, y, dy, dx = (
        np.frombuffer(mmap.mmap(-1, 2 * rows * dim), np.float16).reshape(rows, dim) for _ in range(4)
    )
    weight = np.ones(dim, np.float16)
    inv_rms = np.zeros(rows, np.float32)
    rng = np.random.default_rng(0)
    x[-last:], dy[-last:] = rng.standard_normal((2, last, dim))
    kinds = (F16, F16, F16)
    kernels.set("first_block", rows - last, ctypes.c_int64)
    kernels.set("sms", rows)  # a block a row in the backward pass too
    try:
        kernels.forward(x, None, weight, None, y, inv_rms, kinds)
        kernels.backward(dy, None, x, weight, inv_rms, dx, None, None, kinds)
    finally:
        kernels.set("first_block", 0, ctypes.c_int64)
        kernels.set("sms", 1)
    _, y_reference, dx_reference, _, _ = expected(exact(x[-last:], F16), 1, exact(dy[-last:], F16))
    assert close(y[-last:], y_reference, F16, 1), "far rows: y"
    assert close(dx[-last:], dx_reference, F16, 1), "far rows: dx"
    assert not y[:last].any(), "far rows: y of the first ones"
    assert not dx[:last].any(), "far rows: dx of the first ones"


def main(path):
    kernels = Kernels(path)
    count = 0
    for case in cases():
        try:
            check(kernels, *case)
        except AssertionError as e:
            raise SystemExit(f"dim, rows, (x, a, weight), offset, add, scale = {case}: {e}")
        count += 1
    check_no_rows(kernels)
    check_far(kernels)
    launches = ctypes.c_int64.in_dll(kernels.lib, "cuda_on_host_launches").value
    print(f"{count} cases, {launches} launches")


if __name__ == "__main__":
    main(sys.argv[1])
