"""What bench.py scale runs: memory, messages and time of train.py --shard=full, foreseen without a run, and
measured where that is possible.
"""

from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benches.processes import ROUNDS, N, join, run_processes, timed
from benches.step import make_training_step
from data import micro_batches, rows_each, tokens_a_step
from device import Compute
from measure import peak_memory, state_bytes, to_megabytes
from memory import training_parts
from optim import muon_dtype
from sharding import groups
from sizes import flops_per_token, meta_model, num_params

PROBE = 1 << 20  # numbers in the message that a link's speed is measured by
# Assumed of a large machine, not measured: 40% of an H100's 989 TFLOP/s in bfloat16, and half of a link of 400 Gb/s
FLOPS_PER_S = 0.4 * 989e12
LINK_BYTES_PER_S = 25e9
LINK_SECONDS = 50e-6  # that a message takes, however short


# -----------------------------------------------------------------------------------------------------
# Foreseen


def group_numbers(module, n):
    """Returns the numbers of a module's parameters, whose rows are filled up to a multiple of n processes."""
    return sum(-(-len(p) // n) * n * (p.numel() // len(p)) for p in module.parameters())


def messages(model, cfg, compute):
    """Returns {what: (number, bytes)} of the messages that a process gets from the others in a step: "weights",
    which each micro-batch gathers for a block's forward and again for its backward pass; "gradients", added up
    once in float32; and "matrices", which Muon makes orthogonal, there and back. Single numbers are left out.

    model: a whole Transformer, perhaps on the meta device; compute: the Compute of one of the processes.
    """
    n = compute.world_size
    *blocks, whole = (group_numbers(group, n) for group in groups(model))
    n_micro = len(micro_batches(0, cfg, compute))
    # what no block has stays gathered between the two passes
    gathered = n_micro * (sum(blocks) + whole)
    sent = {
        "weights": (n_micro * (2 * len(blocks) + 1), gathered * compute.dtype.itemsize),
        "gradients": (len(blocks) + 1, whole * 4),
    }
    if cfg.optimizer == "muon":
        # not those of experts: each process has some of them whole
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        size = sum(p.numel() for p in matrices) * muon_dtype(compute).itemsize
        sent["matrices"] = (2 * len({p.shape for p in matrices}), 2 * size / n)
    return {what: (number, size * (n - 1) / n) for what, (number, size) in sent.items()}


def foresee(cfg, compute, flops_per_s, link):
    """Returns the table's columns for a run in shards: megabytes by part; messages; and milliseconds of a step,
    of its computing alone and of its messages alone.
    """
    model = meta_model(cfg)
    parts = training_parts(cfg, cfg, compute)
    block = num_params(model.blocks[0])
    outer = num_params(model) - cfg.n_layer * block
    # weights that are whole at one time: the outer ones, those of the block that computes and of the next one
    parts["gathered"] = (outer + 2 * block) * compute.dtype.itemsize
    number, size = map(sum, zip(*messages(model, cfg, compute).values()))
    flops = flops_per_token(model, cfg.block_size) * cfg.block_size * rows_each(cfg, compute)
    return {
        "state_mb": (parts["weights"] + parts["moments"]) / 1e6,
        "gradients_mb": parts["gradients"] / 1e6,
        "gathered_mb": parts["gathered"] / 1e6,
        "kept_mb": parts["kept"] / 1e6,
        "peak_mb": sum(parts.values()) / 1e6,
        "messages": number,
        "messages_mb": size / 1e6,
        "compute_ms": 1e3 * flops / flops_per_s,
        "messages_ms": 1e3 * (number * link.seconds + size / link.bytes_per_s),
    }


class Link(NamedTuple):
    """How fast a process gets messages."""

    seconds: float  # of each, however short
    bytes_per_s: float


# -----------------------------------------------------------------------------------------------------
# Measured


class Counter(TorchDispatchMode):
    """Notes the bytes of each message of more than single numbers, while it is the mode."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # until it comes as plain tensors
        # arguments (to, from, ...): the larger tensor is what all processes have together; a sum has a list here
        if function.namespace == "c10d" and isinstance(args[0], torch.Tensor):
            self.sizes.append(max(x.nbytes for x in args[:2]))
        return function(*args, **kwargs or {})


def measure_link(compute):
    """Returns the Link of this process with the others."""
    seconds = []
    for size in 1, PROBE:
        message = torch.zeros(size)
        parts = [torch.zeros(size) for _ in range(compute.world_size)]
        send = partial(torch.distributed.all_gather, parts, message)
        send()
        seconds.append(median(timed(send, compute) for _ in range(ROUNDS)))
    least, most = seconds
    return Link(least, 4 * PROBE * (compute.world_size - 1) / most)


def measure(cfg, compute):
    """Returns measured columns, as foresee() returns them, without parts of the memory that cannot be told apart."""
    made = []

    def begin():
        made.extend(make_training_step(cfg, compute))
        step = made[0]
        step()
        step()

    peak = peak_memory(compute.device, begin)
    step, model, optimizers = made
    with Counter() as counter:
        step()
    others = (compute.world_size - 1) / compute.world_size
    return {
        "state_mb": state_bytes(model, optimizers) / 1e6,
        "peak_mb": to_megabytes(peak),
        "messages": len(counter.sizes),
        "messages_mb": others * sum(counter.sizes) / 1e6,
        "step_ms": 1e3 * median(timed(step, compute) for _ in range(ROUNDS)),
    }


def with_heads(cfg, n_head):
    """Returns cfg with another number of heads, each as wide as before, and so with another width."""
    n_embd = n_head * cfg.n_embd // cfg.n_head
    return replace(cfg, init_from="scratch", n_head=n_head, n_kv_head=0, n_embd=n_embd, n_inner=0)


def work(rank, env, cfg, queue):
    """One process; the first one puts the rows into the queue."""
    compute = join(rank, env, cfg.dtype)
    link = measure_link(compute)
    sharded = replace(compute, shards=True)
    alone = replace(compute, world_size=1, rank=0)
    measure(cfg, sharded)  # not reported, as it also takes the memory that torch itself needs
    step, model, _ = make_training_step(cfg, alone)
    step()
    seconds = median(timed(step, compute) for _ in range(ROUNDS))
    flops = tokens_a_step(cfg) * flops_per_token(model, cfg.block_size)
    foreseen, measured = [], []
    for n_head in max(1, 2 * cfg.n_head // 3), cfg.n_head, 3 * cfg.n_head // 2:
        shape = with_heads(cfg, n_head)
        # in the step that is measured each process has as many micro-batches
        every = replace(shape, gradient_accumulation_steps=N * cfg.gradient_accumulation_steps)
        name = f"{shape.n_layer} x {shape.n_embd}"
        foreseen.append({"foreseen": name} | foresee(every, sharded, flops / seconds, link))
        measured.append({"measured": name} | measure(shape, sharded))
    if rank == 0:
        queue.put(foreseen + measured)
    compute.close()


def bench_scale(cfg, compute):
    """A process of train.py --shard=full, foreseen by the functions that train.py and sharding.py use: memory by
    part; messages, and what they bring from others; the milliseconds of either alone. The shape, a smaller and a
    larger one are run beside it by two processes of this machine's CPUs: compute_ms is by the speed of the shape
    without messages, messages_ms by that of two messages.
    """
    if not cfg.processes:
        return run_processes(work, cfg)
    compute = Compute(torch.device("cpu"), "bfloat16", False, "", 0, cfg.processes, True)
    row = foresee(cfg, compute, FLOPS_PER_S, Link(LINK_SECONDS, LINK_BYTES_PER_S))
    return [{"parameters": num_params(meta_model(cfg)), "processes": cfg.processes} | row]
