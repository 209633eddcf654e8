"""rmsnorm_kernel.cu, in three ways: on the processor, compiled, and on a GPU.

test_host* run its kernels on the processor (see cuda_on_host.h), test_nvcc* compile it, and
test_device* need a GPU. The others test the ops that torch sees, on the GPU where there is one, else by
the kernels on the processor.
Which of them ran is printed at the end.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm
import rmsnorm_build
import train
from config import configure
from data import padded, to
from device import resolve
from model import NORMS, ModelConfig, PreNorm, RMSNorm, Transformer, rms_norm
from optim import make_optimizers
from rmsnorm import use_rmsnorm

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(rmsnorm_build.SOURCE)
TORCH = os.path.dirname(torch.__file__)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = shutil.which("g++")
EPS = 1e-5
# of x, a and the weight
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_cxx = pytest.mark.skipif(not CXX, reason="no g++")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc")


def names(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def build_for_host(path, *flags, source=rmsnorm_build.SOURCE):
    """Compiles the .cu into a library for the processor; returns its path."""
    header = ["-include", f"{HERE}/cuda_on_host.h", f"-I{TORCH}/include"]
    command = [CXX, "-std=c++17", "-x", "c++", *header, "-fPIC", "-shared", source, "-o", str(path)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(path)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The device where the ops run; loads them."""
    if torch.cuda.is_available():
        missing = rmsnorm_build.load()
        assert not missing, missing
        return torch.device("cuda")
    if not CXX:
        pytest.skip("neither a GPU nor g++")
    path = tmp_path_factory.mktemp("kernel") / "host.so"
    library = build_for_host(path, "-O1", f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10")
    torch.ops.load_library(library)
    rmsnorm_build.register()
    return torch.device("cpu")


def draw(shape, dtype, device, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    return x.requires_grad_()


# -----------------------------------------------------------------------------------------------------
# The ops


def outputs_and_gradients(ops, x, a, weight, dy, dsum):
    """Of a norm, (y, dx, dweight); of a sum and its norm, (sum, y, dx, da, dweight)."""
    if a is None:
        y = ops.norm(x, weight, EPS)
        return [y, *torch.autograd.grad(y, [x, weight], dy)]
    total, y = ops.add_norm(x, a, weight, EPS)
    return [total, y, *torch.autograd.grad([total, y], [x, a, weight], [dsum, dy])]


def check_ops(device, shape, dtypes, add):
    """Outputs and gradients are those of float64 within a rounding, and the same bits a second time."""
    x_dtype, a_dtype, weight_dtype = dtypes
    x = draw(shape, x_dtype, device, 0)
    a = draw(shape, a_dtype, device, 1) if add else None
    weight = draw(shape[-1], weight_dtype, device, 9)
    dsum = x.detach()
    dy = dsum.flip(0)
    results = outputs_and_gradients(rmsnorm.CUDA, x, a, weight, dy, dsum)

    # the gradient is taken at the sum as it was rounded
    total = x + a if add else x
    exact_total = total.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact_y = rmsnorm.TORCH.norm(exact_total, exact_weight, EPS)
    outputs = [exact_y]
    gradients = [dy.double()]
    if add:
        outputs.append(exact_total * 1)
        gradients.append(dsum.double())
    dx, dweight = torch.autograd.grad(outputs, [exact_total, exact_weight], gradients)

    if add:
        references = [exact_total, exact_y, dx, dx, dweight]
        peers = [x, x, x, a, weight]
    else:
        references = [exact_y, dx, dweight]
        peers = [x, x, weight]
    for result, reference, peer in zip(results, references, peers):
        assert result.dtype == peer.dtype
        assert result.shape == peer.shape
        difference = (result.double() - reference.detach()).norm()
        unit = torch.finfo(result.dtype).eps
        tolerance = unit if unit > 1e-4 else 3e-6
        assert difference / reference.detach().norm().clamp(min=1e-30) < tolerance
    for result, repeated in zip(results, outputs_and_gradients(rmsnorm.CUDA, x, a, weight, dy, dsum)):
        assert torch.equal(result, repeated)


@pytest.mark.parametrize("dim", [1, 7, 33, 64, 384, 768, 1000, 4096, 16384])
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("add", [False, True])
def test_ops_are_as_float64(device, dim, dtypes, add):
    shape = (2, 3, dim) if dim > 100 else (5, 27, dim)
    check_ops(device, shape, dtypes, add)


@needs_gpu
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
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("add", [False, True])
def test_device_with_many_rows_a_block(device, rows, dim, dtypes, add):
    """Of the backward pass; and rows that are longer than a block keeps."""
    # the outputs will lie in the memory that is freed here
    torch.full((8, rows, dim), torch.nan, device=device)
    check_ops(device, (rows, dim), dtypes, add)


def test_shapes_strides_and_offsets(device):
    weight = draw(40, torch.float32, device, 1)
    flat = draw(6 * 40 + 1, torch.float32, device, 2)
    columns = draw((40, 6), torch.float32, device, 3)
    misaligned = flat[1:].view(6, 40)
    no_rows = [columns[:, :0].T, flat[:0].view(2, 0, 40)]
    for x in misaligned, columns.T, columns[:, 0], *no_rows:
        y = rmsnorm.CUDA.norm(x, weight, EPS)
        reference = rmsnorm.TORCH.norm(x, weight, EPS)
        torch.testing.assert_close(y, reference)
        # sum() has an expanded gradient, of stride 0
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), [x, weight]),
            torch.autograd.grad(reference.sum(), [x, weight]),
            rtol=1e-4,
            atol=1e-5,
        )


def test_large_float16_does_not_overflow(device):
    x = torch.full((3, 512), 300.0, dtype=torch.float16, device=device)
    weight = torch.ones(512, device=device)
    assert torch.equal(rmsnorm.CUDA.norm(x, weight, EPS), torch.ones_like(x))


@pytest.mark.parametrize(
    "output",
    [
        lambda total, y: total,
        lambda total, y: y,
        lambda total, y: total + y,
    ],
    ids=["sum", "norm", "both"],
)
def test_gradients_beside_a_frozen_weight_and_unused_outputs(device, output):
    x = draw((4, 24), torch.float32, device, 1)
    a = draw((4, 24), torch.float32, device, 2)
    frozen = draw(24, torch.float32, device, 3).detach()
    gradients = []
    for ops in rmsnorm.CUDA, rmsnorm.TORCH:
        loss = output(*ops.add_norm(x, a, frozen, EPS)).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, a]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_frozen_weights_gradient_is_not_computed(device):
    x = draw((4, 24), torch.float32, device, 1)
    frozen = draw(24, torch.float32, device, 3).detach()
    weight_grads = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.tinylm.rms_norm_backward.default:
                weight_grads.append(args[-1])
            return op(*args, **(kwargs or {}))

    for weight in frozen, frozen.clone().requires_grad_():
        with Recorder():
            rmsnorm.CUDA.norm(x, weight, EPS).sum().backward()
    assert weight_grads == [False, True]


def test_a_second_derivative_is_refused(device):
    x = draw((4, 24), torch.float32, device, 1)
    weight = draw(24, torch.float32, device, 2)
    loss = rmsnorm.CUDA.norm(x, weight, EPS).square().sum()
    with pytest.raises(NotImplementedError, match="--rmsnorm=torch"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_any_dtypes_of_x_a_and_weight_give_torchs_result(device):
    for x_dtype, a_dtype, weight_dtype in itertools.product(rmsnorm.DTYPES, repeat=3):
        x = draw((4, 24), x_dtype, device, 1)
        a = draw((4, 24), a_dtype, device, 2)
        weight = draw(24, weight_dtype, device, 3)
        torch.testing.assert_close(
            rmsnorm.CUDA.add_norm(x, a, weight, EPS), rmsnorm.TORCH.add_norm(x, a, weight, EPS)
        )
        torch.testing.assert_close(rmsnorm.CUDA.norm(x, weight, EPS), rmsnorm.TORCH.norm(x, weight, EPS))


def test_torch_accepts_the_ops(device):
    x = draw((3, 5, 24), torch.float32, device, 1).detach()
    a = draw((3, 5, 24), torch.float32, device, 2).detach()
    weight = draw(24, torch.float32, device, 3).detach()
    ops = torch.ops.tinylm
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
    torch.library.opcheck(ops.add_rms_norm, (x, a, weight, EPS))
    inv_rms = torch.ones(15, device=device)
    torch.library.opcheck(ops.rms_norm_backward, (x, None, x, weight, inv_rms, True))
    torch.library.opcheck(ops.rms_norm_backward, (x, x, x, weight, inv_rms, False))


# -----------------------------------------------------------------------------------------------------
# What the ops refuse


@pytest.mark.parametrize(
    "change, message",
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
def test_wrong_inputs_are_refused_before_a_launch(device, change, message):
    x, weight = change(torch.ones(4, 24, device=device), torch.ones(24, device=device))
    with pytest.raises(RuntimeError, match=message):
        rmsnorm.CUDA.norm(x, weight, EPS)
    with pytest.raises(RuntimeError, match=message):
        rmsnorm.CUDA.add_norm(x, x, weight, EPS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:2], "a must be of x's shape"),
        (lambda x: x[0], "a must be of x's shape"),
        (lambda x: x.double(), "a must be float32"),
        (lambda x: x.to("meta"), "on meta"),
    ],
)
def test_a_wrong_summand_is_refused(device, change, message):
    x = torch.ones(4, 24, device=device)
    weight = torch.ones(24, device=device)
    with pytest.raises(RuntimeError, match=message):
        rmsnorm.CUDA.add_norm(x, change(x), weight, EPS)


def test_a_gradient_of_another_shape_is_refused(device):
    x = torch.ones(4, 24, device=device, requires_grad=True)
    y = rmsnorm.CUDA.norm(x, torch.ones(24, device=device), EPS)
    with pytest.raises(RuntimeError):
        y.backward(torch.ones(2, 24, device=device))


# -----------------------------------------------------------------------------------------------------
# A model with the ops, and the choice between them


def tiny(norm_position="pre"):
    torch.manual_seed(1)
    return Transformer(
        ModelConfig(
            vocab_size=50, n_layer=2, n_embd=48, n_head=4, block_size=16, norm_position=norm_position
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
    """Three steps with the kernel and with torch.

    In bfloat16 the stream is float32 and the branches are bfloat16, by autocast; torch.compile brings
    fake tensors.
    """
    compute = resolve(device.type, dtype, "false")
    cfg = configure(train.Config, ["--n_embd=48"])
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(3))
    batch = to(padded(ids, 16), device)
    losses = []
    for ops in rmsnorm.CUDA, rmsnorm.TORCH:
        model = tiny(norm_position).to(device)
        use_rmsnorm(model, ops)
        # a checkpoint does not remember which
        assert model.state_dict().keys() == tiny(norm_position).state_dict().keys()
        optimizers = make_optimizers(model, cfg, compute)
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        steps = [train.train_step(step, optimizers, [batch], compute) for _ in range(3)]
        losses.append(torch.tensor(steps))
    tolerance = 3e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)


class OnePlusNorm(RMSNorm):
    """Gemma's, which counts its gain from 1."""

    def forward(self, x):
        return rms_norm(x, 1 + self.weight, self.eps)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_norm_that_is_made_of_rmsnorm_stays_itself(device, norm_position, monkeypatch):
    """In a model whose queries and keys are normed by RMSNorm."""
    monkeypatch.setitem(NORMS, "rmsnorm", OnePlusNorm)
    model = tiny(norm_position).to(device)
    ids = torch.arange(16, device=device)[None]
    expected = model(ids)[0]
    for ops in rmsnorm.CUDA, rmsnorm.CPU, rmsnorm.TORCH:
        use_rmsnorm(model, ops)
        torch.testing.assert_close(model(ids)[0], expected, rtol=1e-4, atol=1e-5)


CHANGES = {
    "gains from 1 on": lambda self, x: rms_norm(x, 1 + self.weight, self.eps),
    "no eps": lambda self, x: rms_norm(x, self.weight, 0.0),
    "no root": lambda self, x: x / x.abs().mean(-1, keepdim=True) * self.weight,
    "no gain": lambda self, x: rms_norm(x, torch.ones_like(self.weight), self.eps),
    "the mean taken off": lambda self, x: rms_norm(x - x.mean(-1, keepdim=True), self.weight, self.eps),
    "no gradient of the size": lambda self, x: (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps).detach() * self.weight
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_one_changes_in_rmsnorm_is_what_is_trained(device, change, monkeypatch):
    """And not what rmsnorm.py computes, as sample.py would then write by another formula."""
    monkeypatch.setattr(RMSNorm, "forward", CHANGES[change])
    model = tiny("pre").to(device)
    ids = torch.arange(16, device=device)[None]
    expected = model(ids)[0]
    compute = resolve(device.type, "float32", "false")
    for setting in "auto", "cpu", "cuda":
        line = rmsnorm.choose_rmsnorm(model, setting, compute)
        assert "rmsnorm=torch" in line or setting == "auto" and device.type == "cuda"
        assert torch.equal(model(ids)[0], expected)


def test_a_gain_or_bias_that_one_adds_to_rmsnorm_is_trained(monkeypatch):
    """The bias is 0 at first, as a LayerNorm's: only its learning tells."""
    norm = RMSNorm(48, EPS)
    norm.weight = torch.nn.Parameter(torch.ones(1))
    assert not rmsnorm.agrees(norm, rmsnorm.CPU)
    norm = RMSNorm(48, EPS)
    norm.bias = torch.nn.Parameter(torch.zeros(48))
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: forward(self, x) + self.bias)
    assert not rmsnorm.agrees(norm, rmsnorm.CPU)


def test_an_rmsnorm_that_takes_states_alone_agrees(monkeypatch):
    def forward(self, x):
        B, T, C = x.shape
        return rms_norm(x.view(B * T, C), self.weight, self.eps).view(B, T, C)

    monkeypatch.setattr(RMSNorm, "forward", forward)
    assert rmsnorm.agrees(RMSNorm(48, EPS), rmsnorm.CPU)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_switch_back_leaves_the_modules_that_were(device, position):
    model = tiny(position).to(device)
    kinds = [type(module) for module in model.modules()]
    for ops in rmsnorm.CPU, rmsnorm.CUDA, rmsnorm.CPU:
        assert rmsnorm.use_rmsnorm(model, ops)
        assert [type(module) for module in model.modules()] != kinds
    assert rmsnorm.use_rmsnorm(model, rmsnorm.TORCH)
    assert [type(module) for module in model.modules()] == kinds


def test_the_shapes_of_any_model_agree_and_a_norm_without_eps_does_not(device):
    for dim in 2, 7, 48, 4096:
        for dtype in torch.float32, torch.bfloat16, torch.float64:
            norm = RMSNorm(dim, EPS).to(device, dtype)
            assert all(rmsnorm.agrees(norm, ops) for ops in (rmsnorm.CPU, rmsnorm.CUDA))
        for eps in 1e-12, 1.0:
            assert rmsnorm.agrees(RMSNorm(dim, eps).to(device), rmsnorm.CPU)
    del norm.eps
    assert not rmsnorm.agrees(norm, rmsnorm.CPU)


def parallel(self, x, context):
    y = self.norm1(x)
    return x + self.attn(y, context) + self.mlp(self.norm2(x))


def halved(self, x, context):
    x = x + 0.5 * self.attn(self.norm1(x), context)
    return x + self.mlp(self.norm2(x))


def by_place(self, x, context):
    x = x + self.attn(self.norm1(x), context) * context.places[:, None]
    return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("forward", [parallel, halved, by_place])
def test_what_one_changes_in_a_block_is_what_is_computed(device, forward, monkeypatch):
    """And not what the fused block does, whose norms are the kernel's still."""
    model = tiny("pre").to(device)
    use_rmsnorm(model, rmsnorm.CUDA)
    assert type(model.blocks[0]) is rmsnorm.CudaPreNorm
    use_rmsnorm(model, rmsnorm.TORCH)
    monkeypatch.setattr(PreNorm, "forward", forward)
    ids = torch.arange(16, device=device)[None]
    expected = model(ids)[0]
    use_rmsnorm(model, rmsnorm.CUDA)
    assert type(model.blocks[0].norm2) is rmsnorm.CudaRMSNorm
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 2, 1), (0, 4)])
def test_layer_norms_gradient_is_rms_norms(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], generator=g, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, generator=g, dtype=torch.float64)
    y = rmsnorm.CPU.norm(x, weight, EPS)
    expected = rmsnorm.TORCH.norm(x, weight, EPS)
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    for a, b in zip(gradients, torch.autograd.grad(expected, (x, weight), dy)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
def test_on_a_processor_gains_keep_their_gradients_over_many_rows(dtype, error):
    """LayerNorm, RMSNorm by torch and by LayerNorm's gradient, each against itself in float64."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 64, generator=g).to(dtype)
    dy = torch.randn(4096, 64, generator=g).to(dtype)
    for name in "layernorm", "torch", "cpu":
        gradients = []
        for x in inputs, inputs.double():
            x = x.clone().requires_grad_()
            norm = NORMS["layernorm" if name == "layernorm" else "rmsnorm"](64, eps=EPS, bias=True)
            use_rmsnorm(norm, rmsnorm.CPU if name == "cpu" else rmsnorm.TORCH)
            norm = norm.double() if x.dtype == torch.float64 else norm
            norm(x).backward(dy.to(x.dtype))
            gradients.append([x.grad, norm.weight.grad])
        for a, b in zip(*gradients):
            assert (a - b).norm() / b.norm() < error, name


def test_without_a_gpu_the_choice_is_a_processors():
    cpu = torch.device("cpu")
    assert rmsnorm.choose("torch", cpu) == (rmsnorm.TORCH, "")
    assert rmsnorm.choose("auto", cpu) == (rmsnorm.CPU, "")
    assert rmsnorm.choose("auto", cpu, compile=True) == (rmsnorm.TORCH, "")
    ops, reason = rmsnorm.choose("cuda", cpu)
    assert ops is rmsnorm.TORCH
    assert "device=cpu" in reason
    if not torch.cuda.is_available():
        assert rmsnorm_build.whats_missing(cpp_extension) == "there is no CUDA GPU"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({}, ""),
        ({"capability": (7, 5)}, "8.0"),
        ({"has_toolkit": False}, "nvcc"),
        ({"has_nvcc": False}, "nvcc"),
        ({"has_ninja": False}, "ninja"),
        ({"cxx": "no-such-compiler"}, "no-such-compiler"),
    ],
)
def test_what_a_build_lacks_is_named(changes, word, monkeypatch, tmp_path):
    machine = {
        "capability": (9, 0),
        "has_toolkit": True,
        "has_nvcc": True,
        "has_ninja": True,
        "cxx": "sh",
        **changes,
    }
    if machine["has_nvcc"]:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir()
        nvcc.touch(0o755)
    home = str(tmp_path) if machine["has_toolkit"] else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: machine["capability"])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: machine["has_ninja"])
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: machine["cxx"])
    missing = rmsnorm_build.whats_missing(cpp_extension)
    assert word in missing
    assert bool(word) == bool(missing)


def test_the_kernel_is_tried_on_the_gpu_that_is_to_run_it(monkeypatch):
    current = []

    @contextmanager
    def as_current(device):
        current.append(device)
        yield
        current.pop()

    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", as_current)
    monkeypatch.setattr(rmsnorm_build, "load", lambda: "" if current == [gpu] else "another GPU")
    assert rmsnorm.choose("cuda", gpu) == (rmsnorm.CUDA, "rmsnorm=cuda")
    assert current == []


def test_the_toolkit_is_not_where_only_a_script_for_nvcc_is(tmp_path, monkeypatch):
    """As /usr/local, for which torch takes a /usr/local/bin/nvcc: there it would find no libraries."""
    for name in "CUDA_HOME", "CUDA_PATH":
        monkeypatch.delenv(name, raising=False)
    real, whole, script = (tmp_path / name for name in ("cuda", "whole", "script"))
    for folder in real, whole:
        (folder / "include").mkdir(parents=True)
        (folder / "include/cuda_runtime.h").touch()
    monkeypatch.setattr(rmsnorm_build, "TOOLKIT", str(tmp_path / "nowhere"))
    assert rmsnorm_build.toolkit(str(script)) == str(script)
    assert rmsnorm_build.toolkit(None) is None
    monkeypatch.setattr(rmsnorm_build, "TOOLKIT", str(real))
    assert rmsnorm_build.toolkit(str(script)) == rmsnorm_build.toolkit(None) == str(real)
    assert rmsnorm_build.toolkit(str(whole)) == str(whole)
    monkeypatch.setenv("CUDA_HOME", str(script))
    assert rmsnorm_build.toolkit(str(script)) == str(script)


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "Error building\n/usr/bin/ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1",
            "-lcudart",
        ),
        ("[1/2] nvcc -c\nkernel.cu(3): error: identifier undefined\n1 error detected", "identifier"),
        ("Error building extension\nninja: subcommand failed", "building"),
    ],
)
def test_why_a_build_failed_is_said(text, line):
    assert line in rmsnorm_build.telling_line(text)


def test_a_stale_lock_is_named_and_a_live_one_waited_for(tmp_path):
    lock = tmp_path / "lock"
    assert rmsnorm_build.locked(str(lock)) == ""
    lock.touch()
    long_ago = time.time() - rmsnorm_build.BUILD_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    assert str(lock) in rmsnorm_build.locked(str(lock))
    os.utime(lock)
    code = f"import rmsnorm_build; print(repr(rmsnorm_build.locked({str(lock)!r})))"
    waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.5)
    lock.unlink()
    assert waiting.communicate(timeout=60)[0] == "''\n"


def test_importing_builds_nothing():
    code = """
import sys
import torch
import model
assert not hasattr(torch.ops.tinylm, "rms_norm")
assert "torch.utils.cpp_extension" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -----------------------------------------------------------------------------------------------------
# The kernels themselves


def run_on_host(library, **env):
    """Runs rmsnorm_on_host.py with a library of build_for_host(); returns the ended process."""
    command = [sys.executable, f"{HERE}/rmsnorm_on_host.py", library]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.slow
@needs_cxx
def test_host(tmp_path):
    """Every case under the sanitizers, threads in both orders: tests/rmsnorm_on_host.py."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    library = build_for_host(tmp_path / "checked.so", "-O1", "-g", *sanitizers, "-DRMSNORM_KERNELS_ONLY")
    runtimes = [
        subprocess.check_output([CXX, f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libubsan")
    ]
    done = run_on_host(
        library, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0", PYTHONPATH=""
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.fullmatch(r"\d{3,} cases, \d{4,} launches\n", done.stdout)


MISTAKES = {
    "the sums are read before they are written": (
        "  __syncthreads();\n  v = lane",
        "  v = lane",
    ),
    "the sums are written before they are read": (
        "  __syncthreads();  // everyone has read the last row's\n",
        "",
    ),
    "not all threads reach the barrier": (
        "for (; number - threadIdx.y < rows; number += step) {",
        "for (; number < rows; number += step) {",
    ),
    "the row that was fetched ahead is not taken": (
        "    row = next;\n",
        "",
    ),
    "a gain is forgotten": (
        "out.set(j, values.get(j) * r * w.get(j));",
        "out.set(j, values.get(j) * r);",
    ),
}


@pytest.mark.slow
@needs_cxx
@pytest.mark.parametrize("mistake", MISTAKES)
def test_host_finds_mistakes(tmp_path, mistake):
    right, wrong = MISTAKES[mistake]
    code = Path(rmsnorm_build.SOURCE).read_text(encoding="utf-8")
    assert right in code
    source = tmp_path / "wrong.cu"
    source.write_text(code.replace(right, wrong), encoding="utf-8")
    library = build_for_host(tmp_path / "wrong.so", "-O1", "-DRMSNORM_KERNELS_ONLY", source=str(source))
    done = run_on_host(library)
    assert done.returncode != 0
    assert re.search("dim, rows, .* = |divergent barrier", done.stderr), done.stdout + done.stderr


def run_nvcc(path, *flags):
    """Compiles the .cu to path; returns what the compiler wrote to stderr."""
    command = [NVCC, *flags, rmsnorm_build.SOURCE, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90"])
def test_nvcc(tmp_path, arch):
    """Nothing spilt, nothing in local memory, loads and stores of 16 bytes; by cpp_extension's flags."""
    kernels = ["-O3", "-DRMSNORM_KERNELS_ONLY"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    usage = run_nvcc(
        tmp_path / "kernel.o",
        "-c",
        "-std=c++20",
        *kernels,
        *cpp_extension.COMMON_NVCC_FLAGS,
        *target,
        "-Xptxas",
        "-v",
    )
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", usage
    )
    assert len(frames) == 27, usage
    assert set(frames) == {("0", "0", "0")}, usage

    ptx = tmp_path / "kernel.ptx"
    run_nvcc(ptx, "-ptx", "-std=c++17", *kernels, f"-arch=compute_{arch}")
    wide = [
        kernel
        for kernel in re.split(r"\.entry ", ptx.read_text())[1:]
        if re.match(r"\w*(forward|backward)_kernel\w*Li[48]E", kernel)
    ]
    assert len(wide) == 12
    for kernel in wide:
        assert "ld.global.nc.v4.u32" in kernel
        assert "st.global.v4" in kernel


@pytest.mark.slow
@needs_nvcc
def test_nvcc_with_the_bindings(tmp_path):
    """For sm_90a, and as PTX for what comes later.

    The stable ABI wants no CUDA headers of torch, so this compiles beside a CPU build of torch.
    """
    targets = ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
    flags = [flag for target in targets for flag in ("-gencode", target)]
    run_nvcc(tmp_path / "bindings.o", "-c", "-O1", "-std=c++17", *flags, f"-I{TORCH}/include")


@needs_gpu
def test_device_takes_the_callers_stream(device):
    x = draw((300, 768), torch.bfloat16, device, 1)
    weight = draw(768, torch.float32, device, 2)
    expected = rmsnorm.CUDA.norm(x, weight, EPS)
    default_stream_done = torch.cuda.Event()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second of the default stream
    default_stream_done.record()
    with torch.cuda.stream(side):
        y = rmsnorm.CUDA.norm(x, weight, EPS).cpu()
    assert not default_stream_done.query()
    assert torch.equal(y, expected.cpu())


@needs_gpu
def test_device_compiled(device):
    """By inductor, with blocks computed anew in the backward pass."""
    results = []
    for ops in rmsnorm.TORCH, rmsnorm.CUDA:
        model = tiny().to(device)
        use_rmsnorm(model, ops)
        model.gradient_checkpointing = True
        ids = torch.arange(16, device=device)[None]
        loss = torch.compile(model)(ids, ids)[1]
        loss.backward()
        results.append(torch.stack([loss.detach(), model.wte.weight.grad.norm()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)
