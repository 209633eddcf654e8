"""Faster RMSNorms in place of model.py's: on a GPU by the CUDA kernel of rmsnorm_kernel.cu, on a processor with
the backward pass of LayerNorm.

    python train.py --rmsnorm=cuda                      auto | torch | cpu | cuda; a checkpoint does not keep which
    python bench.py rmsnorm                             both, and torch's own, against the speed of a copy
    python -m pytest tests/test_rmsnorm.py              against float64: on a GPU, else on the processor

TORCH, CPU and CUDA are Ops, with norm(x, weight, eps) -> y and add_norm(x, a, weight, eps) -> (x + a, its norm).
x may have any shape, its last dimension is normed; the weight is (dim,), float32 or of x's dtype; the result has
x's dtype.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

import rmsnorm_build
from model import PostNorm, PreNorm, RMSNorm, rms_norm

SETTINGS = ("auto", "torch", "cpu", "cuda")

# compute capabilities, as (9, 0), of the GPUs where `bench.py rmsnorm train` found the kernel to be faster, end to
# end. Not measured on any yet.
FASTER_ON = ()


class Ops(NamedTuple):
    norm: Callable
    add_norm: Callable


def separate(norm):
    """Returns the Ops of a norm that makes the sum first, in a step of its own, as a block without the kernel does."""

    def add_norm(x, a, weight, eps):
        x = x + a
        return x, norm(x, weight, eps)

    return Ops(norm, add_norm)


TORCH = separate(rms_norm)


# -----------------------------------------------------------------------------------------------------
# On a processor


class NormByLayerNorm(torch.autograd.Function):
    """rms_norm whose gradient is that of LayerNorm with a mean of zero, plus what that subtracts for the mean: one
    pass over memory in place of a dozen steps of torch. In float32 at least, as LayerNorm adds up the gradient
    of a gain in its own dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.to(weight.dtype)
        inv_rms = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return (y * inv_rms * weight).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inv_rms = ctx.saved_tensors
        dim = x.size(-1)
        grad = grad.to(weight.dtype)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad,
            x.to(weight.dtype),
            [dim],
            torch.zeros_like(inv_rms),
            inv_rms,
            weight,
            None,
            [True, True, False],
        )
        dx += (grad @ weight)[..., None] * inv_rms / dim
        return dx.type_as(x), dweight, None


def cpu_norm(x, weight, eps):
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if is_trained and weight.dtype in (torch.float32, torch.float64):
        return NormByLayerNorm.apply(x, weight, eps)
    return rms_norm(x, weight, eps)


CPU = separate(cpu_norm)


class CpuRMSNorm(RMSNorm):
    def forward(self, x):
        return cpu_norm(x, self.weight, self.eps)


# -----------------------------------------------------------------------------------------------------
# The kernel

LONGEST = 1 << 26  # of the last dimension, which the kernel counts in 32 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(weight, x, a=None):
    """Raises RuntimeError, as torch's own operators do, where the kernel does not take x, the weight or a; a may be
    None, and is not broadcast.

    Not in the operator itself: with torch 2.11 on a GPU an exception from there ended the process.
    """
    if x.dtype not in DTYPES:
        problem = f"x must be float32, float16 or bfloat16, not {x.dtype}"
    elif a is not None and a.dtype not in DTYPES:
        problem = f"a must be float32, float16 or bfloat16, not {a.dtype}"
    elif a is not None and (a.shape != x.shape or a.device != x.device):
        problem = (
            "a must be of x's shape and on its device; "
            f"they are {tuple(a.shape)} on {a.device} and {tuple(x.shape)} on {x.device}"
        )
    elif not weight.is_floating_point():
        problem = f"the weight must be of floating point, not {weight.dtype}"
    elif x.dim() < 1 or weight.shape != x.shape[-1:]:
        problem = (
            "the weight must be 1-D and as long as x's last dimension; "
            f"they are {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    elif not 1 <= x.size(-1) <= LONGEST:
        problem = f"the last dimension must be between 1 and {LONGEST}, not {x.size(-1)}"
    elif weight.device != x.device:
        problem = f"x is on {x.device} and the weight on {weight.device}"
    else:
        return
    raise RuntimeError(f"rms_norm: {problem}")


def gain(weight, dtype):
    """Returns the weight in a dtype that the kernel takes: that of x, the one given, or float32."""
    return (weight if weight.dtype == dtype else weight.float()).contiguous()


def kernel_gradients(ctx, dy, ds):
    """Returns the gradients of what was normed and of the weight, the latter None where the weight is frozen. ds: the
    gradient that the sum, which was normed, has from elsewhere, or None.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError("the RMSNorm kernel has no second derivative: --rmsnorm=torch has")
    x, weight, inv_rms = ctx.saved_tensors
    is_trained = ctx.needs_input_grad[-2]
    ds = None if ds is None else ds.contiguous()
    dx, dweight = torch.ops.tinylm.rms_norm_backward.default(
        dy.contiguous(), ds, x, weight, inv_rms, is_trained
    )
    return dx, dweight if is_trained else None


class NormByKernel(torch.autograd.Function):
    """A Function, as torch.library.register_autograd adds more than twice as much to a call
    (findings/register_autograd_cost.sh).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inv_rms = torch.ops.tinylm.rms_norm.default(x, weight, eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *kernel_gradients(ctx, dy, None), None


class AddNormByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, weight, eps):
        total, y, inv_rms = torch.ops.tinylm.add_rms_norm.default(x, a, weight, eps)
        ctx.save_for_backward(total, weight, inv_rms)
        ctx.set_materialize_grads(False)  # an output that nothing used has None for its gradient
        ctx.dtypes = x.dtype, a.dtype
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        dx, dweight = dtotal, None
        if dy is not None:
            dx, dweight = kernel_gradients(ctx, dy, dtotal)
        return *(None if dx is None else dx.to(dtype) for dtype in ctx.dtypes), dweight, None


def cuda_norm(x, weight, eps):
    check(weight, x)
    return NormByKernel.apply(x.contiguous(), gain(weight, x.dtype), eps)


def cuda_add_norm(x, a, weight, eps):
    check(weight, x, a)
    dtype = torch.promote_types(x.dtype, a.dtype)  # the sum's, as x + a has it
    return AddNormByKernel.apply(x.to(dtype).contiguous(), a.contiguous(), gain(weight, dtype), eps)


CUDA = Ops(cuda_norm, cuda_add_norm)


class CudaRMSNorm(RMSNorm):
    def forward(self, x):
        return cuda_norm(x, self.weight, self.eps)


class CudaPreNorm(PreNorm):
    """PreNorm whose first sum and second norm are one pass over memory."""

    def forward(self, x, context):
        x, y = cuda_add_norm(
            x, self.drop(self.attn(self.norm1(x), context)), self.norm2.weight, self.norm2.eps
        )
        return x + self.drop(self.mlp(y))


class CudaPostNorm(PostNorm):
    """PostNorm whose sums and norms are one pass over memory each."""

    def forward(self, x, context):
        _, x = cuda_add_norm(x, self.drop(self.attn(x, context)), self.norm1.weight, self.norm1.eps)
        _, x = cuda_add_norm(x, self.drop(self.mlp(x)), self.norm2.weight, self.norm2.eps)
        return x


BY_OPS = {
    TORCH: {},
    CPU: {RMSNorm: CpuRMSNorm},
    CUDA: {RMSNorm: CudaRMSNorm, PreNorm: CudaPreNorm, PostNorm: CudaPostNorm},
}


def use_rmsnorm(model, ops):
    """Switches a model's RMSNorms, and with CUDA the blocks around them, to TORCH, CPU or CUDA. The weights are
    the same. Returns whether it did: where model.py's RMSNorm computes something else, it stays TORCH.
    """
    plain = {fast: norm for classes in BY_OPS.values() for norm, fast in classes.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    norms = [module for module in model.modules() if type(module) is RMSNorm]
    if ops is not TORCH and norms and not agrees(norms[0], ops):
        return False
    # a block is fused where its norms are RMSNorms, and not of a class made from that
    blocks = [module for module in model.modules() if type(getattr(module, "norm2", None)) is RMSNorm]
    if blocks and not agrees_around(blocks[0], BY_OPS[ops].get(type(blocks[0]), type(blocks[0]))):
        blocks = []
    for module in (*blocks, *norms):
        module.__class__ = BY_OPS[ops].get(type(module), type(module))
    return True


def agrees(norm, ops):
    """Returns whether ops compute what an RMSNorm does, which may have been changed in model.py, and its gradients.
    Tried with gains other than 1, and with small states too, for which eps counts.
    """
    gains = {
        name: torch.linspace(0.5, 1.5, p.numel(), device=p.device).view(p.shape).requires_grad_()
        for name, p in norm.named_parameters()  # in shards a process has only a part of each
    }
    try:
        weight = gains["weight"]
        dim = max(2, weight.numel())  # so that one gain for a whole state is found out
        x = torch.linspace(0, 9, 2 * dim, device=weight.device).sin().view(1, 2, dim)
        x = (x * x.new_tensor([[1.0], [0.001]])).requires_grad_()
        with torch.enable_grad():
            results = []
            for y in torch.func.functional_call(norm, gains, x), ops.norm(x, weight, norm.eps):
                results.append([y, *torch.autograd.grad(y, (x, *gains.values()), y.cos())])
        # relative to their size: without eps the gradients of small states are large
        return all((b - a).norm() <= 1e-3 * a.norm() for a, b in zip(*results))
    except Exception:  # whatever was changed: it may have no gain any more, or no eps
        return False


@torch.no_grad()
def agrees_around(block, fused):
    """Returns whether a fused class sums and norms as a block does, whose forward may have been changed in model.py.
    Tried with simple functions in place of its branches.
    """
    if fused is type(block):
        return True
    weight = block.norm2.weight
    norms = {}  # new ones, as in shards a process has only a part of the block's gains
    for name, most in ("norm1", 1.5), ("norm2", 2.5):
        norms[name] = RMSNorm(weight.numel(), block.norm2.eps).to(weight.device)
        norms[name].weight.copy_(torch.linspace(0.5, most, weight.numel()))
    block = copy.copy(block)
    block._modules = norms | {"drop": torch.nn.Identity()}
    block.attn = lambda x, context: x.sin()
    block.mlp = torch.cos
    x = torch.linspace(0, 9, 2 * weight.numel(), device=weight.device).sin().view(1, 2, -1)
    try:
        expected = block(x, None)
        block.__class__ = fused
        return torch.allclose(block(x, None), expected, rtol=1e-3, atol=1e-5)
    except Exception:  # a block of one's own may ask anything of its branches
        return False


def choose(setting, device, compile=False):
    """Returns (TORCH, CPU or CUDA, why) for a setting auto | torch | cpu | cuda on a device; why is ""
    where there is nothing to say. compile: the model is compiled, and the compiler fuses norms itself.
    """
    if setting == "cpu" or setting == "auto" and device.type == "cpu" and not compile:
        return CPU, ""
    if setting == "torch" or setting == "auto" and device.type != "cuda":
        return TORCH, ""
    if setting == "auto" and torch.cuda.get_device_capability(device) not in FASTER_ON:
        return TORCH, "rmsnorm=torch (the kernel was not measured to be faster on this GPU)"
    missing = f"device={device.type}"
    if device.type == "cuda":
        with torch.cuda.device(device):  # else the first GPU would be asked
            missing = rmsnorm_build.load()
    if missing:
        return TORCH, f"rmsnorm=torch (no kernel: {missing})"
    return CUDA, "rmsnorm=cuda"


def choose_rmsnorm(model, setting, compute):
    """Switches a model's RMSNorms by a setting auto | torch | cpu | cuda; returns what to print about it. One
    process builds the kernel, and the others find it built.
    """
    if compute.is_main:
        choose(setting, compute.device, compute.compile)
    compute.barrier()
    ops, why = choose(setting, compute.device, compute.compile)
    if not use_rmsnorm(model, ops):
        why = "rmsnorm=torch (model.py's RMSNorm computes something else than rmsnorm.py's)"
    return f", {why}" if why else ""
