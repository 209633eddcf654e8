"""Builds the CUDA kernel of rmsnorm_kernel.cu for the GPU that is here, where it is first used, and loads it.

missing = rmsnorm_build.load()       # "" or why not; then torch.ops.tinylm has the operators
"""

import functools
import hashlib
import os
import shutil
import subprocess
import time

import torch

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rmsnorm_kernel.cu")
TOOLKIT = "/usr/local/cuda"
BUILD_SECONDS = 300  # no build takes so long: who locked the folder longer ago is dead


@functools.cache
def load():
    """Builds the kernel for the GPU that is here, loads and tries it, which takes half a minute the first time
    on a machine. Returns "", or in one line why that failed.
    """
    from torch.utils import cpp_extension  # 0.2 s

    cpp_extension.CUDA_HOME = toolkit(cpp_extension.CUDA_HOME)
    if missing := whats_missing(cpp_extension):
        return missing
    with open(SOURCE, "rb") as f:
        build = (
            hashlib.sha256(f.read()).hexdigest()[:12],
            torch.__version__,
            "sm_{}{}".format(*torch.cuda.get_device_capability()),
        )
    folder = os.path.join(
        os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(),
        "-".join(("tinylm_rmsnorm", *build)),
    )
    if dead := locked(os.path.join(folder, "lock")):
        return dead
    try:
        os.makedirs(folder, exist_ok=True)
        cpp_extension.load(
            "tinylm_rmsnorm",
            [SOURCE],
            extra_cuda_cflags=["-O3"],
            build_directory=folder,
            is_python_module=False,
        )
        register()
        ones = torch.ones(1, 8, device="cuda")
        y, _ = torch.ops.tinylm.rms_norm.default(ones, ones[0], 1e-5)
        y.sum().item()
    except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError) as e:
        return f"the build failed: {telling_line(str(e) or repr(e))[:300]}"
    return ""


def toolkit(home):
    """Returns the folder of the CUDA toolkit: home, which torch takes for it, unless that only holds a script or a
    link to an nvcc elsewhere.
    """

    def is_whole(folder):
        return folder and os.path.exists(os.path.join(folder, "include", "cuda_runtime.h"))

    is_given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return home if is_given or is_whole(home) or not is_whole(TOOLKIT) else TOOLKIT


def whats_missing(cpp_extension):
    """Returns what is missing here for a build, in one line, or ""."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0 (Ampere)"
    if not cpp_extension.CUDA_HOME or not shutil.which(
        os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    ):
        return "there is no nvcc: install the CUDA toolkit, and set CUDA_HOME if it is somewhere unusual"
    if not cpp_extension.is_ninja_available():
        return "there is no ninja: pip install ninja"
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        return f"there is no C++ compiler {cpp_extension.get_cxx_compiler()}"
    return ""


def locked(lock):
    """Waits while another process builds. Returns "", or a line where that process must be dead."""
    while os.path.exists(lock):
        try:
            age = time.time() - os.path.getmtime(lock)
        except OSError:  # removed this moment
            return ""
        if age > BUILD_SECONDS:
            return f"a build that was killed left {lock}: remove it"
        time.sleep(0.2)
    return ""


def register():
    """Tells torch.compile which shapes and dtypes the operators of the loaded library return."""

    def numbers_of_rows(x):
        return x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)

    @torch.library.register_fake("tinylm::rms_norm")
    def _(x, weight, eps):
        return torch.empty_like(x), numbers_of_rows(x)

    @torch.library.register_fake("tinylm::add_rms_norm")
    def _(x, a, weight, eps):
        return torch.empty_like(x), torch.empty_like(x), numbers_of_rows(x)

    @torch.library.register_fake("tinylm::rms_norm_backward")
    def _(dy, ds, x, weight, inv_rms, weight_grad):
        return torch.empty_like(x), weight.new_empty(weight.shape if weight_grad else (0,))


def telling_line(text):
    """Returns the line of a build's output that says why it failed."""
    lines = [line.strip() for line in text.splitlines()]
    for word in "error:", "cannot find":  # a linker's, before which collect2 speaks of an error
        for line in lines:
            if word in line and not line.startswith("collect2"):
                return line
    return next((line for line in lines if "error" in line), lines[0])
