"""The kernels of rmsnorm_kernel.cu on the processor, against float64: python rmsnorm_on_host.py LIBRARY. With numpy alone, so that it runs under sanitizers."""

import ctypes
import itertools
import mmap
import sys

import numpy as np

F32, F16, BF16 = 0, 1, 2
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # the largest relative error of one rounding
TYPES = [
    (F32, F32, F32),
    (F32, F16, F32),
    (F32, BF16, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
]  # x, a, weight
# rows of each width: several to a block and not all there; one to a block; longer than a block keeps, in chunks and number by number
SHAPES = {1: 70, 7: 133, 33: 9, 64: 37, 384: 13, 768: 7, 1000: 5, 4096: 3, 8192: 3, 16384: 2, 40000: 1}


def rounded(x, kind):
    """float64 -> the dtype's numbers as they are stored, to nearest even (by way of float32, which is exact for our sums of two)."""
    x = np.asarray(x, np.float32)
    if kind == F32:
        return x
    if kind == F16:
        return x.astype(np.float16)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def exact(x, kind):
    return (
        (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if kind == BF16
        else x.astype(np.float64)
    )


def placed(x, offset):
    """A copy of x at an address that is a multiple of 16 plus offset numbers, in memory of exactly its size."""
    room = np.empty(x.nbytes + 16 + offset * x.itemsize, np.uint8)
    start = -room.ctypes.data % 16 + offset * x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def unwritten(shape, like, offset=0):
    return placed(
        np.full(shape, -1, {4: np.int32, 2: np.int16}[like.itemsize]).view(like.dtype), offset
    )  # nan, whatever the dtype


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


def close(out, reference, unit, scale):
    """Within one rounding (float16 has steps of 2^-24 near 0), and float32 arithmetic on numbers of that scale."""
    return bool(
        (
            np.abs(out - reference)
            <= 1.01 * unit * np.abs(reference) + (2.0**-25 if unit == UNIT[F16] else 0) + 4e-6 * scale
        ).all()
    )


class Kernels:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.rmsnorm_forward.restype = self.lib.rmsnorm_backward.restype = ctypes.c_char_p
        self.lib.rmsnorm_parts.restype = ctypes.c_int64

    def set(self, name, value, kind=ctypes.c_int):
        kind.in_dll(self.lib, f"cuda_on_host_{name}").value = value

    def forward(self, x, a, weight, total, y, inv_rms, kinds, eps=1e-5):
        rows, dim = x.shape
        error = self.lib.rmsnorm_forward(
            *map(pointer, (x, a, weight, total, y, inv_rms)),
            ctypes.c_int64(rows),
            dim,
            ctypes.c_float(eps),
            *kinds,
            None,
        )
        assert error is None, error

    def backward(self, dy, ds, x, weight, inv_rms, dx, partial, dweight, kinds):
        rows, dim = x.shape
        error = self.lib.rmsnorm_backward(
            *map(pointer, (dy, ds, x, weight, inv_rms, dx, partial, dweight)),
            ctypes.c_int64(rows),
            dim,
            kinds[0],
            kinds[2],
            None,
        )
        assert error is None, error


def check(kernels, dim, rows, kinds, offset, add, scale):
    """One case, with the threads in one order and in the other: the same bits, and those near float64's."""
    rng = np.random.default_rng((dim, rows, *kinds, offset, add))
    x_kind, a_kind, w_kind = kinds
    x, dy, ds = (
        placed(rounded(scale * rng.standard_normal((rows, dim)), x_kind), offset)
        for scale in (scale, 1, 1)
    )
    a = placed(rounded(scale * rng.standard_normal((rows, dim)), a_kind), offset) if add else None
    weight = placed(rounded(1 + 0.5 * rng.standard_normal(dim), w_kind), offset)
    results = []
    for reverse in 0, 1:
        kernels.set("reverse", reverse)
        total, y, dx = (unwritten((rows, dim), x, offset) for _ in range(3))
        inv_rms, dweight = unwritten(rows, np.empty(0, np.float32)), unwritten(dim, weight)
        kernels.forward(x, a, weight, total if add else None, y, inv_rms, kinds)
        normed = total if add else x
        partial = unwritten((kernels.lib.rmsnorm_parts(ctypes.c_int64(rows)), dim), inv_rms)
        kernels.backward(dy, ds if add else None, normed, weight, inv_rms, dx, partial, dweight, kinds)
        frozen = unwritten((rows, dim), x, offset)
        kernels.backward(dy, ds if add else None, normed, weight, inv_rms, frozen, None, None, kinds)
        assert np.array_equal(frozen.view(np.uint8), dx.view(np.uint8)), "a frozen weight changes dx"
        results.append([t.copy() for t in (y, inv_rms, dx, dweight, *([total] if add else []))])
    for one, other in zip(*results):
        assert np.array_equal(one.view(np.uint8), other.view(np.uint8)), (
            "the order of threads matters: a barrier is missing"
        )
    if add:
        assert np.array_equal(
            total.view(np.uint8), rounded(exact(x, x_kind) + exact(a, a_kind), x_kind).view(np.uint8)
        ), "sum"
    s, w, dy, ds = (
        exact(normed, x_kind),
        exact(weight, w_kind),
        exact(dy, x_kind),
        exact(ds, x_kind) if add else 0,
    )
    r = 1 / np.sqrt((s**2).mean(1, keepdims=True) + 1e-5)
    g, n = dy * w, s * r
    reference = r * (g - n * (g * n).mean(1, keepdims=True))
    assert close(exact(inv_rms, F32)[:, None], r, UNIT[F32], r), "inv_rms"
    assert close(exact(y, x_kind), n * w, UNIT[x_kind], 0.3 * np.abs(n * w)), "y"
    assert close(
        exact(dx, x_kind), reference + ds, UNIT[x_kind], np.abs(r * g) + np.abs(r * n) + np.abs(ds)
    ), "dx"
    assert close(exact(dweight, w_kind), (dy * n).sum(0), UNIT[w_kind], np.abs(dy * n).sum(0)), "dweight"


def cases():
    for (dim, rows), kinds in itertools.product(SHAPES.items(), TYPES):
        yield (
            dim,
            rows,
            kinds,
            0,
            dim % 2 == 0,
            1.0,
        )  # the fused add for every other width, and for all where x and a differ
        if dim < 2000 or kinds[0] != kinds[2]:
            yield dim, rows, kinds, 1, True, 1.0  # misaligned
    for kinds in TYPES:
        yield 768, 5, kinds, 0, False, 300.0  # its squares do not fit in float16
    yield 0, 0, TYPES[0], 0, False, 1.0


def check_no_rows(kernels):
    empty, weight, dweight = (
        np.empty((0, 48), np.float32),
        np.ones(48, np.float32),
        unwritten(48, np.empty(0, np.float32)),
    )
    kernels.forward(empty, None, weight, None, empty, np.empty(0, np.float32), TYPES[0])
    kernels.backward(
        empty,
        None,
        empty,
        weight,
        np.empty(0, np.float32),
        empty,
        np.empty((0, 48), np.float32),
        dweight,
        TYPES[0],
    )
    assert (dweight == 0).all()


def check_far(kernels, dim=4096, last=3):
    """Rows past element 2^31: only the last blocks run, on memory that is only there where it is touched."""
    rows = 2**31 // dim + last
    room = [
        np.frombuffer(mmap.mmap(-1, 2 * rows * dim), np.float16).reshape(rows, dim) for _ in range(4)
    ]
    x, y, dy, dx = room
    weight, inv_rms = np.ones(dim, np.float16), np.zeros(rows, np.float32)
    rng = np.random.default_rng(0)
    x[-last:], dy[-last:] = rng.standard_normal((2, last, dim))
    kernels.set("first_block", rows - last, ctypes.c_int64)
    kernels.set("sms", rows)  # a block a row in the backward pass too
    try:
        kernels.forward(x, None, weight, None, y, inv_rms, (F16, F16, F16))
        kernels.backward(dy, None, x, weight, inv_rms, dx, None, None, (F16, F16, F16))
    finally:
        kernels.set("first_block", 0, ctypes.c_int64)
        kernels.set("sms", 1)
    s, g = x[-last:].astype(np.float64), dy[-last:].astype(np.float64)
    r = 1 / np.sqrt((s**2).mean(1, keepdims=True) + 1e-5)
    assert close(y[-last:], s * r, UNIT[F16], 1) and close(
        dx[-last:], r * (g - s * r * (g * s * r).mean(1, keepdims=True)), UNIT[F16], 1
    )
    assert not y[:last].any() and not dx[:last].any()


def main(path):
    kernels, done = Kernels(path), 0
    for case in cases():
        try:
            check_no_rows(kernels) if case[0] == 0 else check(kernels, *case)
        except AssertionError as e:
            raise SystemExit(f"dim, rows, (x, a, weight), offset, add, scale = {case}: {e}")
        done += 1
    check_far(kernels)
    launches = ctypes.c_int64.in_dll(kernels.lib, "cuda_on_host_launches").value
    print(f"{done} cases, {launches} launches")


if __name__ == "__main__":
    main(sys.argv[1])
