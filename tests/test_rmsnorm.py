"""rmsnorm_kernel.cu, in three ways: its kernels on the processor (host; see cuda_on_host.h), compiled (nvcc), and on a GPU (device).

Which of them ran is said at the end of a run. The ops that torch sees are tested on the GPU where there is one, else on the kernels on the processor.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

import rmsnorm
import train
from config import configure
from data import padded, to
from device import resolve
from model import ModelConfig, Transformer
from optim import make_optimizers
from rmsnorm import use_rmsnorm

HERE = os.path.dirname(os.path.abspath(__file__))
TORCH = os.path.dirname(torch.__file__)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = shutil.which("g++")
DTYPES = [
    (torch.float32,) * 3,
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float16,) * 3,
    (torch.bfloat16,) * 3,
    (torch.bfloat16, torch.bfloat16, torch.float32),
]  # of x, a and the weight


def on_host(out, *flags, source=rmsnorm.SOURCE):
    """The .cu as a library for the processor."""
    command = [
        CXX,
        "-std=c++17",
        "-x",
        "c++",
        "-include",
        f"{HERE}/cuda_on_host.h",
        f"-I{TORCH}/include",
        "-fPIC",
        "-shared",
        source,
        "-o",
        out,
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Where the ops run: loads them."""
    if torch.cuda.is_available():
        missing = rmsnorm.load()
        assert not missing, missing
        return torch.device("cuda")
    if not CXX:
        pytest.skip("neither a GPU nor g++")
    torch.ops.load_library(
        on_host(
            str(tmp_path_factory.mktemp("kernel") / "host.so"),
            "-O1",
            f"-L{TORCH}/lib",
            "-ltorch_cpu",
            "-lc10",
        )
    )
    rmsnorm.register()
    return torch.device("cpu")


def draw(shape, dtype, device, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    return x.requires_grad_()


def run(ops, x, a, weight, dy, dsum):
    """Outputs and gradients of a norm, or of a sum and its norm."""
    if a is None:
        y = ops.norm(x, weight, 1e-5)
        return [y, *torch.autograd.grad(y, [x, weight], dy)]
    total, y = ops.add_norm(x, a, weight, 1e-5)
    return [total, y, *torch.autograd.grad([total, y], [x, a, weight], [dsum, dy])]


def error(out, reference):
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dim", [1, 7, 33, 64, 384, 768, 1000, 4096, 16384])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("add", [False, True])
def test_ops_are_as_float64(device, dim, dtypes, add, shape=None):
    shape = shape or ((2, 3, dim) if dim > 100 else (5, 27, dim))
    x, a, dy, dsum = (draw(shape, dtypes[i], device, i) for i in (0, 1, 0, 0))
    weight = draw(dim, dtypes[2], device, 9)
    a, dsum, dy = a if add else None, dsum.detach(), dy.detach().flip(0)
    results = run(rmsnorm.CUDA, x, a, weight, dy, dsum)
    rounded = (
        (x + a).detach().double() if add else x.detach().double()
    )  # the sum's gradient is taken where the sum was rounded to
    exact = rounded.requires_grad_(), weight.detach().double().requires_grad_()
    y = rmsnorm.TORCH.norm(*exact, 1e-5)
    dx, dweight = torch.autograd.grad(
        [y, *([exact[0] * 1] if add else [])], exact, [dy.double(), *([dsum.double()] if add else [])]
    )
    expected = [exact[0], y, dx, dx, dweight] if add else [y, dx, dweight]
    for out, reference, like in zip(results, expected, [x, x, x, a, weight] if add else [x, x, weight]):
        assert out.dtype == like.dtype and out.shape == like.shape
        unit = torch.finfo(out.dtype).eps
        assert error(out, reference.detach()) < (unit if unit > 1e-4 else 3e-6)
    for once, again in zip(results, run(rmsnorm.CUDA, x, a, weight, dy, dsum)):
        assert torch.equal(once, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    "rows, dim",
    [
        (20000, 768),
        (20001, 1024),
        (9001, 2560),
        (3000, 8192),
        (1500, 16384),
        (7, 40000),
        (7, 40001),
        (1500, 1025),
    ],
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("add", [False, True])
def test_device_with_many_rows_a_block(device, rows, dim, dtypes, add):
    """So many that a block of the backward pass takes several; and rows that are longer than a block keeps."""
    torch.full((8, rows, dim), torch.nan, device=device)  # what is freed here, the outputs will lie in
    test_ops_are_as_float64(device, dim, dtypes, add, (rows, dim))


def test_shapes_strides_and_offsets(device):
    weight = draw(40, torch.float32, device, 1)
    flat = draw(6 * 40 + 1, torch.float32, device, 2)
    whole = draw((40, 6), torch.float32, device, 3)
    for x in flat[1:].view(6, 40), whole.T, whole[:, 0], whole[:, :0].T, flat[:0].view(2, 0, 40):
        y, reference = (ops.norm(x, weight, 1e-5) for ops in (rmsnorm.CUDA, rmsnorm.TORCH))
        torch.testing.assert_close(y, reference)
        for one, other in zip(
            torch.autograd.grad(y.sum(), [x, weight]), torch.autograd.grad(reference.sum(), [x, weight])
        ):  # an expanded gradient
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_large_float16_does_not_overflow(device):
    x = torch.full((3, 512), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rmsnorm.CUDA.norm(x, torch.ones(512, device=device), 1e-5), torch.ones_like(x))


def test_frozen_weight_and_unused_outputs(device):
    x, a = draw((4, 24), torch.float32, device, 1), draw((4, 24), torch.float32, device, 2)
    frozen = draw(24, torch.float32, device, 3).detach()
    for pick in (lambda total, y: total, lambda total, y: y, lambda total, y: total + y):
        ours, peers = (
            torch.autograd.grad(pick(*ops.add_norm(x, a, frozen, 1e-5)).square().sum(), [x, a])
            for ops in (rmsnorm.CUDA, rmsnorm.TORCH)
        )
        for one, other in zip(ours, peers):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    questions = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.tinylm.rms_norm_backward.default:
                questions.append(args[-1])
            return op(*args, **(kwargs or {}))

    for weight in frozen, frozen.clone().requires_grad_():
        with Spy():
            rmsnorm.CUDA.norm(x, weight, 1e-5).sum().backward()
    assert questions == [False, True]  # a frozen weight's gradient is not even computed


def test_what_has_no_gradient_says_so(device):
    x, weight = draw((4, 24), torch.float32, device, 1), draw(24, torch.float32, device, 2)
    assert not torch.ops.tinylm.rms_norm(x, weight, 1e-5)[1].requires_grad
    with pytest.raises(NotImplementedError, match="--rmsnorm=torch"):
        torch.autograd.grad(rmsnorm.CUDA.norm(x, weight, 1e-5).square().sum(), x, create_graph=True)


def test_any_pair_of_dtypes_is_as_torchs(device):
    for x_dtype, a_dtype, w_dtype in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), repeat=3
    ):
        x, a, weight = (
            draw((4, 24), x_dtype, device, 1),
            draw((4, 24), a_dtype, device, 2),
            draw(24, w_dtype, device, 3),
        )
        for one, other in zip(
            *(ops.add_norm(x, a, weight, 1e-5) for ops in (rmsnorm.CUDA, rmsnorm.TORCH))
        ):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(*(ops.norm(x, weight, 1e-5) for ops in (rmsnorm.CUDA, rmsnorm.TORCH)))


def test_torch_accepts_the_ops(device):
    x, a, weight = (
        draw((3, 5, 24), torch.float32, device, 1),
        draw((3, 5, 24), torch.float32, device, 2),
        draw(24, torch.float32, device, 3),
    )
    torch.library.opcheck(torch.ops.tinylm.rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.tinylm.add_rms_norm, (x, a, weight, 1e-5))
    x, inv_rms = x.detach(), torch.ones(3, 5, device=device)
    for ds, weight_grad in (None, True), (x, False):
        torch.library.opcheck(
            torch.ops.tinylm.rms_norm_backward, (x, ds, x, weight.detach(), inv_rms, weight_grad)
        )


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x, w: (x, w[1:]), "weight must be 1-D and as long"),
        (lambda x, w: (x, w[None]), "weight must be 1-D and as long"),
        (lambda x, w: (x[0, 0], w), "weight must be 1-D"),
        (lambda x, w: (x[:, :0], w[:0]), "last dimension must be"),
        (lambda x, w: (x.double(), w), "x must be float32, float16 or bfloat16"),
        (lambda x, w: (x.double(), w.double()), "x must be float32, float16 or bfloat16"),
        (lambda x, w: (x.int(), w), "x must be float32, float16 or bfloat16"),
        (lambda x, w: (x, w.int()), "weight must be of floating point"),
        (lambda x, w: (x, w.to("meta")), "on meta"),
    ],
)
def test_wrong_inputs_are_refused_before_a_launch(device, wrong, words):
    x, weight = wrong(torch.ones(4, 24, device=device), torch.ones(24, device=device))
    for call in (
        (lambda: rmsnorm.CUDA.norm(x, weight, 1e-5)),
        (lambda: rmsnorm.CUDA.add_norm(x, x, weight, 1e-5)),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: x[:2], "a must be of x's shape"),
        (lambda x: x[0], "a must be of x's shape"),
        (lambda x: x.double(), "a must be float32"),
        (lambda x: x.to("meta"), "on meta"),
    ],
)
def test_a_wrong_summand_is_refused(device, wrong, words):
    x = torch.ones(4, 24, device=device)
    with pytest.raises(RuntimeError, match=words):
        rmsnorm.CUDA.add_norm(x, wrong(x), torch.ones(24, device=device), 1e-5)


def test_a_wrong_gradient_is_refused(device):
    y = rmsnorm.CUDA.norm(
        torch.ones(4, 24, device=device, requires_grad=True), torch.ones(24, device=device), 1e-5
    )
    with pytest.raises(RuntimeError):
        y.backward(torch.ones(2, 24, device=device))


def tiny(**more):
    torch.manual_seed(1)
    return Transformer(
        ModelConfig(
            **{"vocab_size": 50, "n_layer": 2, "n_embd": 48, "n_head": 4, "block_size": 16, **more}
        )
    )


@pytest.mark.parametrize(
    "norm_position, dtype, compiled",
    [
        ("pre", "float32", False),
        ("post", "float32", False),
        ("pre", "bfloat16", False),
        ("post", "bfloat16", False),
        ("pre", "bfloat16", True),
    ],
)
def test_a_model_trains_alike(device, norm_position, dtype, compiled):
    """Three steps with the kernel and with torch: under autocast (a float32 stream, bfloat16 branches), and through torch.compile's fake tensors."""
    losses = {}
    for ops in rmsnorm.TORCH, rmsnorm.CUDA:
        model = tiny(norm_position=norm_position).to(device)
        use_rmsnorm(model, ops)
        compute = resolve(device.type, dtype, "false")
        cfg = configure(train.Config, ["--n_embd=48"])
        optimizers = make_optimizers(model, cfg, compute)
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        idx = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(3))
        batch = to(padded(idx, 16), device)
        losses[ops] = [train.train_step(step, optimizers, [batch], compute) for _ in range(3)]
        assert (
            model.state_dict().keys() == tiny(norm_position=norm_position).state_dict().keys()
        )  # a checkpoint does not know
    torch.testing.assert_close(
        torch.tensor(losses[rmsnorm.CUDA]),
        torch.tensor(losses[rmsnorm.TORCH]),
        rtol=3e-5 if dtype == "float32" else 2e-2,
        atol=0,
    )


def test_the_choice_is_explained(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert rmsnorm.choose("torch", cpu) == rmsnorm.choose("auto", cpu) == (rmsnorm.TORCH, "")
    ops, why = rmsnorm.choose("cuda", cpu)
    assert ops is rmsnorm.TORCH and "device=cpu" in why
    from torch.utils import cpp_extension

    if not torch.cuda.is_available():
        assert rmsnorm.whats_missing(cpp_extension) == "there is no CUDA GPU"
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, home, ninja, cxx, word in [
        ((7, 5), None, True, "sh", "8.0"),
        ((9, 0), None, True, "sh", "nvcc"),
        ((9, 0), tmp_path, True, "sh", "nvcc"),
        ((9, 0), tmp_path, False, "sh", "ninja"),
        ((9, 0), tmp_path, True, "no-such-compiler", "no-such-compiler"),
        ((9, 0), tmp_path, True, "sh", ""),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(home))
        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: ninja)
        monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: cxx)
        missing = rmsnorm.whats_missing(cpp_extension)
        assert word in missing and bool(word) == bool(missing)
        if home:  # from the second case with a folder on, there is an nvcc in it
            (bin / "nvcc").write_text("")
            (bin / "nvcc").chmod(0o755)


def test_a_stale_lock_is_named_and_a_live_one_waited_for(tmp_path):
    lock = tmp_path / "lock"
    assert rmsnorm.locked(str(lock)) == ""
    lock.write_text("")
    os.utime(lock, (time.time() - rmsnorm.BUILD_SECONDS - 1,) * 2)
    assert str(lock) in rmsnorm.locked(str(lock))
    os.utime(lock)
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import rmsnorm; print(repr(rmsnorm.locked({str(lock)!r})))"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(rmsnorm.SOURCE),
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.5)
    lock.unlink()
    assert waiting.communicate(timeout=60)[0] == "''\n"


def test_importing_builds_nothing():
    code = "import model, torch; assert not hasattr(torch.ops.tinylm, 'rms_norm'); import sys; assert 'torch.utils.cpp_extension' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(rmsnorm.SOURCE))


# ---------------------------------------------------------------------------------------------------------------------
# The kernels themselves


@pytest.mark.slow
@pytest.mark.skipif(not CXX, reason="no g++")
def test_host(tmp_path):
    """Every case under the sanitizers, threads in both orders: tests/rmsnorm_on_host.py."""
    library = on_host(
        str(tmp_path / "checked.so"),
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-DRMSNORM_KERNELS_ONLY",
    )
    runtimes = [
        subprocess.run(
            [CXX, f"-print-file-name={name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    done = subprocess.run(
        [sys.executable, f"{HERE}/rmsnorm_on_host.py", library],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": "",
        },
    )
    assert done.returncode == 0 and re.fullmatch(r"\d{3,} cases, \d{4,} launches\n", done.stdout), (
        done.stdout + done.stderr[-3000:]
    )


@pytest.mark.slow
@pytest.mark.skipif(not CXX, reason="no g++")
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("  __syncthreads();\n  v = lane", "  v = lane"),  # the sums are read before they are written
        (
            "  __syncthreads();  // everyone has read the last row's\n",
            "",
        ),  # ... and written before they are read
        (
            "const int chunks = row < rows ? dim / N : 0;\n    const float r",
            "if (row >= rows) break;\n    const int chunks = dim / N;\n    const float r",
        ),  # not all threads reach the barrier
        ("out.set(j, values.get(j) * r * w.get(j));", "out.set(j, values.get(j) * r);"),
    ],
)
def test_host_finds_mistakes(tmp_path, right, wrong):
    with open(rmsnorm.SOURCE, encoding="utf-8") as f:
        source = f.read()
    assert right in source
    (tmp_path / "wrong.cu").write_text(source.replace(right, wrong), encoding="utf-8")
    library = on_host(
        str(tmp_path / "wrong.so"), "-O1", "-DRMSNORM_KERNELS_ONLY", source=str(tmp_path / "wrong.cu")
    )
    done = subprocess.run(
        [sys.executable, f"{HERE}/rmsnorm_on_host.py", library], capture_output=True, text=True
    )
    assert done.returncode != 0 and re.search("dim, rows, .* = |divergent barrier", done.stderr), (
        done.stdout + done.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_nvcc(tmp_path, arch):
    """Nothing spilt, nothing in local memory, loads and stores of 16 bytes; with the flags that cpp_extension adds."""
    done = subprocess.run(
        [
            NVCC,
            "-c",
            "-O3",
            "-std=c++20",
            "-DRMSNORM_KERNELS_ONLY",
            *COMMON_NVCC_FLAGS,
            "-gencode",
            f"arch=compute_{arch},code=sm_{arch}",
            "-Xptxas",
            "-v",
            rmsnorm.SOURCE,
            "-o",
            str(tmp_path / "k.o"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(frames) == 27 and set(frames) == {("0", "0", "0")}, done.stderr
    ptx = tmp_path / "k.ptx"
    subprocess.run(
        [
            NVCC,
            "-ptx",
            "-O3",
            "-std=c++17",
            "-DRMSNORM_KERNELS_ONLY",
            f"-arch=compute_{arch}",
            rmsnorm.SOURCE,
            "-o",
            str(ptx),
        ],
        check=True,
    )
    wide = [
        kernel
        for kernel in re.split(r"\.entry ", ptx.read_text())[1:]
        if re.match(r"\w*(forward|backward)_kernel\w*Li[48]E", kernel)
    ]
    assert len(wide) == 12 and all(
        "ld.global.nc.v4.u32" in kernel and "st.global.v4" in kernel for kernel in wide
    )


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="no nvcc")
def test_nvcc_with_the_bindings(tmp_path):
    """The stable ABI wants no CUDA headers of torch, so this compiles beside a CPU build of torch; for sm_90a, and as PTX for what comes later."""
    subprocess.run(
        [
            NVCC,
            "-c",
            "-O1",
            "-std=c++17",
            "-gencode",
            "arch=compute_90a,code=sm_90a",
            "-gencode",
            "arch=compute_90,code=compute_90",
            f"-I{TORCH}/include",
            rmsnorm.SOURCE,
            "-o",
            str(tmp_path / "k.o"),
        ],
        check=True,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_device_takes_the_callers_stream(device):
    x, weight = draw((300, 768), torch.bfloat16, device, 1), draw(768, torch.float32, device, 2)
    expected, busy, side = rmsnorm.CUDA.norm(x, weight, 1e-5), torch.cuda.Event(), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second of the default stream
    busy.record()
    with torch.cuda.stream(side):
        y = rmsnorm.CUDA.norm(x, weight, 1e-5).cpu()
    assert not busy.query() and torch.equal(y, expected.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_device_compiled(device):
    """By inductor, with blocks computed anew in the backward pass."""
    losses = []
    for ops in rmsnorm.TORCH, rmsnorm.CUDA:
        model = tiny().to(device)
        use_rmsnorm(model, ops)
        model.gradient_checkpointing = True
        idx = torch.arange(16, device=device)[None]
        loss = torch.compile(model)(idx, idx)[1]
        loss.backward()
        losses.append(torch.stack([loss.detach(), model.wte.weight.grad.norm()]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
