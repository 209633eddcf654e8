"""Where and how a script computes: device, dtype and compile, where "auto" is resolved once and its reason is told;
and the other processes that torchrun started.
"""

import contextlib
import ctypes
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch

from config import BOOLS, Refusal

# tf32 is float32, but an Ampere or newer GPU rounds its products to 10 bits of mantissa; float32 is not rounded so
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
BFLOAT16_WIDTH = 128  # auto trains in bfloat16 on a CPU from this n_embd on
# Seconds that processes wait in a step for one that may hang. torchrun kills that one 30 s later, within the minute
HANGS_AFTER = 20

# Of a training run on a processor, in bfloat16: torch.compile takes 15 to 30 s and makes steps 1.08 to 1.25 times as
# fast (LOG.md). Uncompiled a thread of an EPYC makes 0.4 to 1.2e11 FLOP/s
CPU_COMPILE_SECONDS = 240
CPU_FLOPS = 1e11
CPP_COMPILER = "a C++ compiler (g++, or what CXX names) and Python's headers"  # that it needs
# Of one on a GPU, by rule of thumb
COMPILE_SECONDS = 90  # that torch.compile takes of it: most of 111 s of train.py's defaults on an H200
LAUNCH_SECONDS = 0.02  # that a step takes however small it is: about what small.toml's took there
SHARE_OF_PEAK = 0.25  # that an uncompiled step reaches
UNKNOWN_PEAK = 5e13  # FLOP/s where PEAK_FLOPS does not know them: a guess


@dataclass
class Compute:
    device: torch.device
    dtype_name: str  # a key of DTYPES: what a checkpoint keeps
    compile: bool
    message: str  # one line: what was chosen, and why
    rank: int = 0  # of this process
    world_size: int = 1  # processes that torchrun started
    shards: bool = False  # whether they share out the weights too; see sharding.py
    group: "Group" = None  # where there are several processes

    @property
    def dtype(self):
        """The torch.dtype of matrix products, Muon's too; weights and the optimizer's state stay float32."""
        return DTYPES[self.dtype_name]

    def sum(self, x, in_step=False):
        """Returns the tensor x summed over all processes, in place: over gloo on a CPU, over nccl on a
        GPU. in_step: all processes come here soon after each other, and one that does not is taken to hang.

        Raises Refusal when a process has ended, or hangs (over gloo; over nccl the others wait until torchrun
        ends them).
        """
        if self.world_size > 1:
            patient = None if in_step or not x.is_cpu else self.group.patient
            with self.refusing_loss():
                torch.distributed.all_reduce(x, group=patient)
        return x

    def barrier(self):
        """Waits until every process is here, even where the first one writes or samples for long."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def refusing_loss(self):
        """Returns the context in which a message that does not come is a Refusal, which names the process."""
        try:
            yield
        except RuntimeError as e:
            if self.world_size == 1 or "gloo" not in str(e):
                raise
            reason = str(e).splitlines()[0]
            missing = self.group.missing() if "Timed out" in reason else []
            if missing:
                names = " and ".join(map(str, missing))
                raise Refusal(
                    f"process {names} of {self.world_size} hangs: the others have waited "
                    f"{self.group.seconds:.0f} s for it in one step",
                    status=1,
                )
            raise Refusal(
                f"process {self.rank} lost another one, whose own message says why ({reason})", status=1
            )

    def close(self):
        """Leaves the group of processes."""
        if self.world_size > 1:
            torch.distributed.destroy_process_group()

    @property
    def is_main(self):
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def takes_part(self):
        """Whether this process is needed where only the first one writes: each has some of the weights in shards."""
        return self.is_main or self.shards

    @property
    def parts(self):
        """How many parts the weights are in, of which this process holds one."""
        return self.world_size if self.shards else 1

    def autocast(self):
        """Returns the context in which matrix products have the run's dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve(
    device="auto", dtype="auto", compile="auto", join=False, train_width=0, shard=False, work=None
):
    """Returns the Compute for three settings as they stand on the command line.

    join: with the other processes that torchrun started, which with shard share out the weights.
    train_width: n_embd of the model to train, 0 where none is trained, for auto_dtype. work: the Work to do, None where
    that is not known, for choose_compile.
    Raises Refusal for what this machine cannot do.
    """
    rank, world_size, local_rank = torchrun_ranks() if join else (0, 1, 0)
    device, device_reason = choose_device(device, local_rank if world_size > 1 else None)
    dtype, dtype_reason = choose_dtype(device, dtype, train_width)
    compile, compile_reason = choose_compile(device, compile, DTYPES[dtype], work, world_size)
    reasons = [device_reason, dtype_reason, compile_reason]
    if device.type == "cpu":
        keep_freed_memory()
        if (
            compile
        ):  # else what is cached on disk for wider vectors is taken: findings/inductor_cache_isa.sh
            torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        torch.backends.cuda.enable_cudnn_sdp(False)  # except within one_shape()
    group = join_processes(device, rank, world_size) if world_size > 1 else None
    if group:
        reasons.append(f"{world_size} processes{', weights in shards' if shard else ''}")
    shard = shard and world_size > 1  # one process is all there is
    return Compute(device, dtype, compile, ", ".join(reasons), rank, world_size, shard, group)


@contextlib.contextmanager
def one_shape():
    """Returns the context in which attention on a GPU may be cuDNN's, for work whose shapes stay the same. Where torch
    prefers cuDNN's, as on an H200, it is the fastest one in training; but it plans for each new shape, which takes
    tenths of a second. A text grows by a token a step, and rows to tune on or to score differ in length.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@contextlib.contextmanager
def one_order():
    """Returns the context in which compiled steps on a processor add up in the same order each time. Without it an
    embedding's gradient is added up by atomic additions, and no run would be resumed to the bit.
    """
    was_set = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_set)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


def torchrun_ranks():
    """Returns (rank, world size, rank on this machine) as torchrun has set them, else those of a single process."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return tuple(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return 0, 1, 0


def join_processes(device, rank, world_size):
    """Connects this process with the others; returns their Group. Raises Refusal where there is no way."""
    if device.type not in ("cuda", "cpu"):
        raise Refusal(
            f"several processes need --device=cuda, where each takes its own GPU, or --device=cpu, not {device.type}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", rank, world_size))
        # a launcher that restarts processes may keep the store, which then has the addresses of dead ones
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        group = Group(store, rank, world_size)
        # a first message now: nccl connects by it, and a process that left with a Refusal while another
        # still connects would take that one down
        for place in dict.fromkeys((torch.device("cpu"), device)):  # in one order everywhere
            torch.distributed.all_reduce(torch.zeros(1, device=place))
        torch.distributed.all_reduce(torch.zeros(1), group=group.patient)
        return group
    except (RuntimeError, ValueError) as e:
        raise Refusal(
            f"{world_size} processes could not find each other: {str(e).splitlines()[0]}", status=1
        )


class Group:
    """The processes of a run: the group for messages that may take long, and which processes do not come."""

    def __init__(self, store, rank, world_size):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.seconds = 0.0
        self.patient = torch.distributed.new_group(backend="gloo")  # waits half an hour

    def hurry(self, seconds):
        """Makes messages over gloo fail after so many seconds, but not those of the patient group."""
        self.seconds = max(HANGS_AFTER, seconds)
        gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timedelta(seconds=self.seconds))

    def missing(self):
        """Returns the ranks that do not tell within three seconds that they, too, have waited in vain."""
        self.store.set(f"waited {self.rank}", "")
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        for _ in range(30):
            ranks = [rank for rank in ranks if not self.store.check([f"waited {rank}"])]
            time.sleep(0.1)
        return ranks


def choose_device(name, local_rank):
    """Returns (torch.device, the reason) for auto | cpu | cuda | cuda:N | mps. local_rank: this process's, where
    several on this machine take a GPU each; else None.
    """
    reason = ""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        reason = " (the best one here)"
    try:
        if name.partition(":")[0] not in ("cuda", "mps", "cpu"):
            raise RuntimeError("only cuda, mps and cpu are known to work")
        device = torch.device(name)
        if local_rank is not None and device.type == "cuda" and device.index is not None:
            raise Refusal(f"several processes take a GPU each: --device=cuda, not {name}")
        if name == "cuda" and local_rank is not None:
            device = torch.device(name, local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Refusal(
            f"device={name} cannot be used here ({str(e).splitlines()[0]}); --device=cpu always can"
        )
    return device, f"device={name}{reason}"


def choose_dtype(device, dtype, train_width):
    """Returns (a key of DTYPES, the reason) for auto or one of them."""
    if dtype == "auto":
        dtype, reason = auto_dtype(device, train_width)
        return dtype, f"dtype={dtype} ({reason})"
    if dtype not in DTYPES:
        raise Refusal(f"dtype must be auto or one of {' | '.join(DTYPES)}, not {dtype!r}")
    if dtype == "float16" and device.type != "cuda":
        raise Refusal(
            f"float16 needs a CUDA GPU, for its loss scaling; on {device.type} use --dtype=bfloat16 or float32"
        )
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "tf32" and not has_tf32:
        raise Refusal(
            "tf32 is how a CUDA GPU of compute capability 8.0 (Ampere) or newer multiplies float32; "
            "here use --dtype=float32"
        )
    if dtype == "bfloat16" and device.type == "cpu" and not fast_bfloat16(device):
        return dtype, "dtype=bfloat16 (slow: this processor has no instructions for it)"
    return dtype, f"dtype={dtype}"


class Work(NamedTuple):
    """Training to do, by which choose_compile knows whether a compiler pays."""

    flops: float  # floating-point operations of a step
    steps: int
    is_static: bool = False  # all steps have one shape
    dropout: float = 0.0


def choose_compile(device, compile, dtype=torch.float32, work=None, world_size=1):
    """Returns (whether to use torch.compile, the reason) for auto | true | false. dtype: the torch.dtype of products;
    work: as resolve has it. Raises Refusal.
    """
    if compile == "auto":
        if device.type == "cpu":
            return choose_cpu_compile(dtype, work, world_size)
        has_compiler = shutil.which("cc") is not None
        if (
            device.type != "cuda"
            or not has_compiler
            or torch.cuda.get_device_capability(device) < (7, 0)
        ):
            return False, "compile=False (not here)"
        peak = peak_flops(device, dtype)
        seconds = math.inf if work is None else training_seconds(work.flops, work.steps, peak)
        if seconds < COMPILE_SECONDS:
            return False, f"compile=False (the steps take about {seconds:,.0f} s, compiling them longer)"
        return True, "compile=True (pays on a GPU)"
    if compile.lower() not in BOOLS:
        raise Refusal(f"compile must be auto, true or false, not {compile!r}")
    compile = BOOLS[compile.lower()]
    if compile and device.type == "cpu" and sys.platform == "win32":
        raise Refusal("compile=true was never tried on a Windows CPU; leave it out")
    if compile and device.type == "cpu" and not has_cpp_compiler():
        raise Refusal(f"compile=true needs {CPP_COMPILER}: install them, or give --compile=false")
    return compile, f"compile={compile}"


def has_cpp_compiler():
    """Returns whether there is what torch.compile needs on a processor, CPP_COMPILER."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and os.path.isfile(header)


def choose_cpu_compile(dtype, work, world_size):
    """Returns what choose_compile does, for auto on a processor. In float32 compiled steps are slower, dropout is too,
    and steps of other shapes are compiled anew; several processes were not measured.
    """
    threads = torch.get_num_threads()
    seconds = 0
    is_faster = work and work.is_static and not work.dropout and dtype == torch.bfloat16
    if is_faster and world_size == 1:
        seconds = work.steps * work.flops / (threads * CPU_FLOPS)
    if seconds < CPU_COMPILE_SECONDS or sys.platform != "linux":
        return False, "compile=False (on a CPU its start-up is not earned back)"
    if not has_cpp_compiler():
        return False, f"compile=False (it would pay, with {CPP_COMPILER})"
    return True, "compile=True (pays on a CPU in bfloat16, after half a minute)"


def training_seconds(flops, steps, peak=None):
    """Returns about how many seconds uncompiled steps, each of so many floating-point operations, take on a GPU: right
    within a factor of two or three. peak: the GPU's FLOP/s, None where they are not known.
    """
    return steps * max(LAUNCH_SECONDS, flops / (SHARE_OF_PEAK * (peak or UNKNOWN_PEAK)))


class StopAfterStep:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is gone) into a wish to stop, of which every
    process learns at the same step. SIGHUP stays ignored where it was ignored, as under nohup.

    When the same signal comes again it acts as usual; but not SIGHUP, which the shell and the kernel both
    send, and not where there are several processes, which get each signal from the terminal and from torchrun.
    """

    def __init__(self, compute):
        self.compute = compute
        self.signal = 0  # the number of the one that came

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            numbers.append(SIGHUP)
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        self.signal = number
        if self.compute.world_size == 1 and number != SIGHUP:
            signal.signal(number, self.handlers[number])

    def agree(self, is_late):
        """Returns (whether any process was told to stop, whether the first process is late), the same in all
        processes. The message goes over the CPU, so that nothing waits for a GPU.
        """
        wishes = torch.tensor([self.signal, is_late and self.compute.is_main])
        number, is_late = self.compute.sum(wishes, in_step=True).tolist()
        return number > 0, is_late > 0

    @property
    def name(self):
        return signal.Signals(self.signal).name if self.signal else "a signal to another process"

    @property
    def status(self):
        """The exit status, as a shell says it."""
        return 128 + (self.signal or signal.SIGTERM)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def keep_freed_memory():
    """Makes glibc reuse large blocks. By default it gives each back to the kernel, which then has to
    clear its pages again: a sixth of a training step at tiny.toml's shape.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is free at the end of the heap


def auto_dtype(device, train_width):
    """Returns (a key of DTYPES, the reason) for dtype=auto. It depends only on device, task and width, so that a
    command computes the same each time. train_width: n_embd of a model to train, 0 to read or write text
    with one. LOG.md has the measurements, under dtype.
    """
    if device.type == "cpu" and not train_width:
        return "float32", "on a CPU text is written in it, faster and alike everywhere"
    if not fast_bfloat16(device):
        return "float32", "no fast bfloat16 here"
    if device.type == "cpu" and train_width < BFLOAT16_WIDTH:
        return "float32", f"a CPU is no faster in bfloat16 below n_embd={BFLOAT16_WIDTH}"
    return "bfloat16", "this device is fast in it"


def fast_bfloat16(device):
    """Returns whether a device has instructions for products in bfloat16. A CPU without them emulates them, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


# Dense half-precision FLOP/s of GPUs by their data sheets. Names must match as a whole: an L40 is not an L4, a
# laptop's RTX 4090 not an RTX 4090, and a MIG slice not an H100
PEAK_FLOPS = {
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"(Tesla|NVIDIA) T4": 65e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
}


def name_of(dtype):
    """Returns the name of a torch.dtype, such as "float32", or of a layout."""
    return str(dtype).removeprefix("torch.")


def peak_flops(device, dtype):
    """Returns the dense half-precision FLOP/s of a GPU by its data sheet; None where they are not known, and for
    float32, whose products have another speed. Then no MFU is printed.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for pattern, flops in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)
