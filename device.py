"""Where and how a script computes: device, dtype and compile, "auto" resolved once and said with its reason."""
import contextlib
import ctypes
import shutil
import sys
from dataclasses import dataclass

import torch

from config import Refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Compute:
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and the optimizer stay float32
    compile: bool
    said: str           # one line: what was chosen, and why

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve(device="auto", dtype="auto", compile="auto"):
    """Compute for three settings as they stand on the command line. Raises Refusal for what this machine cannot do."""
    reasons = []
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        reasons.append(f"device={name} (the best one here)")
    else:
        name = device
        reasons.append(f"device={name}")
    try:
        dev = torch.device(name)
        torch.empty(1, device=dev)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise Refusal(f"device={name} cannot be used here ({str(e).splitlines()[0]}); --device=cpu always can")
    if dev.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    if dev.type == "cpu":
        keep_freed_memory()

    if dtype == "auto":
        kind, why = ("bfloat16", "this device is fast in it") if fast_bfloat16(dev) else ("float32", "no fast bfloat16 here")
        reasons.append(f"dtype={kind} ({why})")
    elif dtype in DTYPES:
        kind = dtype
        reasons.append(f"dtype={kind}")
    else:
        raise Refusal(f"dtype must be auto or one of {' | '.join(DTYPES)}, not {dtype!r}")
    if kind == "float16" and dev.type != "cuda":
        raise Refusal(f"float16 needs a CUDA GPU, for its loss scaling; on {dev.type} use --dtype=bfloat16 or float32")

    if compile == "auto":
        compiled = dev.type == "cuda" and shutil.which("cc") is not None and torch.cuda.get_device_capability(dev) >= (7, 0)
        why = "pays on a GPU" if compiled else "on a CPU its start-up is not earned back" if dev.type == "cpu" else "not here"
        reasons.append(f"compile={compiled} ({why})")
    elif compile.lower() in ("true", "1", "false", "0"):
        compiled = compile.lower() in ("true", "1")
        reasons.append(f"compile={compiled}")
    else:
        raise Refusal(f"compile must be auto, true or false, not {compile!r}")
    if compiled and dev.type == "cpu" and sys.platform == "win32":
        raise Refusal("compile=true on a Windows CPU needs a C++ compiler that torch finds; leave it out")
    return Compute(dev, DTYPES[kind], compiled, ", ".join(reasons))


def keep_freed_memory():
    """Makes glibc reuse large blocks. By default it gives each back to the kernel, which then has to clear its pages again:
    a sixth of a training step at tiny.toml's shape."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)            # M_MMAP_MAX: no block is a mapping of its own
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep what is free at the end of the heap


def fast_bfloat16(device):
    """Whether bfloat16 products are faster than float32 ones there. A CPU without the instructions emulates them, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
