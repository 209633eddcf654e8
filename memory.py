"""Whether a device has the memory for something, and what training takes of it: asked before anything is written."""

import math
import os
from pathlib import Path

import torch

from config import Refusal
from data import rows_each
from rmsnorm import choose, use_rmsnorm
from sizes import activation_bytes, mask_bytes, model_sizes

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def machine_memory():
    """Returns the bytes that this process can have: of the machine, of its container or job, or by ulimit
    -v; inf where that cannot be told, as on Windows.
    """
    limits = [math.inf]
    try:
        import resource

        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            limits.append(limit)
    except (ImportError, AttributeError, ValueError, OSError):
        pass
    return min(limits + group_limits())


def group_limits():
    """Returns the bytes that each group of processes may have which this one is in (Linux's cgroups): of a
    container, or of a scheduler's job.
    """
    limits = []
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = GROUPS, "memory.max"
        elif controllers == "memory":
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = group.strip("/").split("/")
        for n in range(len(parts) + 1):
            try:
                limits.append(int(root.joinpath(*parts[:n], name).read_text()))
            except (OSError, ValueError):  # "max", or a group that a container does not see
                pass
    return limits


def check_memory(device, needs, advice):
    """Raises Refusal when `needs` bytes are more than the device has in all."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = machine_memory()
    if needs > memory:
        raise Refusal(
            f"this needs more than {needs / 2**30:,.0f} GiB and {device} has {memory / 2**30:,.0f}: {advice}"
        )


def training_parts(cfg, c, compute, learned=None, adapt=None, documents=False):
    """Returns {part: bytes} of what a process holds while it trains a model of config c, at the least: weights,
    tables, moments and gradients; a step's tokens; a mask; and kept, by a micro-batch for its backward pass,
    with its logits and their gradient. Of weights in shards those of this process.

    learned: how many weights learn, None for all; adapt: what makes the others freeze (see
    sizes.activation_bytes); documents: whether rows have documents in them. Of --eval_only, which may
    have fewer rows than a micro-batch, only the weights and tables count. Raises ValueError where the
    numbers are too large to count.
    """
    sizes = model_sizes(c)
    shards = compute.parts
    weights = {"weights": 4 * sizes.parameters // shards, "tables": 4 * sizes.buffers}
    if cfg.eval_only:
        return weights
    learned = sizes.parameters if learned is None else learned
    moments = 8 * learned - (4 * sizes.hidden if cfg.optimizer == "muon" else 0)
    rows = rows_each(cfg, compute)
    batch_size = min(cfg.batch_size, rows)
    tokens = batch_size * c.block_size
    kept = 8 * tokens * c.vocab_size if cfg.loss == "plain" else 0

    def change(model):
        use_rmsnorm(model, choose(cfg.rmsnorm, compute.device)[0])
        if adapt:
            adapt(model)

    # a compiler keeps what it chooses; a GPU says by itself that it is full, where a CPU's process is killed
    if compute.device.type == "cpu" and not (compute.compile or cfg.gradient_checkpointing):
        kept += tokens * activation_bytes(c, change) * compute.dtype.itemsize // 4
    return weights | {
        "moments": moments // shards,
        # between micro-batches, without a message, they are whole
        "gradients": 4 * learned // (1 if rows > batch_size else shards),
        "tokens": 16 * rows * c.block_size,
        "mask": mask_bytes(c, batch_size if documents else 0),
        "kept": kept,
    }


def training_bytes(cfg, c, compute, **options):
    """Returns less than training takes from its second step on, in bytes: of training_parts, whose options these
    are, those that are always there, and the largest other one.
    """
    parts = training_parts(cfg, c, compute, **options)
    passing = [parts.pop(name, 0) for name in ("gradients", "mask", "kept")]
    return sum(parts.values()) + max(passing)


def check_training_memory(cfg, compute):
    """Raises Refusal where the device cannot hold what training all weights of the config's model takes."""
    advice = "try a smaller model or batch_size"
    try:
        # weights alone first: what they keep of a token is measured on two layers of them
        check_memory(compute.device, model_sizes(cfg).bytes // compute.parts, advice)
        needs = training_bytes(cfg, cfg, compute)
    except ValueError as e:
        raise Refusal(e)
    check_memory(compute.device, needs, advice)
