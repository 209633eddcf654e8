"""Whether a device has the memory for something, and how much training takes: asked before anything is written."""

import math
import os
from pathlib import Path

import torch

from config import Refusal
from data import rows_each
from model import rows_at_once
from rmsnorm import choose, use_rmsnorm
from sizes import activation_bytes, mask_bytes, model_sizes

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def machine_memory():
    """Returns the bytes that this process can have: the least of the machine's memory, the limit of its container
    or job, and ulimit -v; inf where none can be told, as on Windows.
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
    """Returns the bytes that each group of processes (Linux's cgroups) may have that this process is in: a
    container's, or a scheduler's job's.
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
    """Returns {part: bytes}, the least that a process holds while it trains a model of config c. Raises ValueError
    where the numbers are too large to count.

        "weights", "moments", "gradients"   where they are in shards, this process's
        "tables"
        "tokens"                            of a step
        "mask", "kept"                      of a micro-batch; kept are logits, too, and what the backward pass needs

    With --eval_only there are weights and tables alone.

    learned: how many weights learn, None for all; adapt: what freezes the others (see sizes.activation_bytes);
    documents: whether rows have documents in them.
    """
    sizes = model_sizes(c)
    shards = compute.parts
    weights = {"weights": 4 * sizes.parameters // shards, "tables": 4 * sizes.buffers}
    if cfg.eval_only:  # which may have fewer rows than a micro-batch
        return weights
    learned = sizes.parameters if learned is None else learned
    moments = 8 * learned - (4 * sizes.hidden if cfg.optimizer == "muon" else 0)
    rows = rows_each(cfg, compute)
    batch_size = min(cfg.batch_size, rows)
    tokens = batch_size * c.block_size
    predicted = tokens if cfg.loss == "plain" else min(tokens, rows_at_once(c.vocab_size))
    kept = 8 * predicted * c.vocab_size

    def change(model):
        use_rmsnorm(model, choose(cfg.rmsnorm, compute.device)[0])
        if adapt:
            adapt(model)

    # not where a user wants a compiler, which chooses what is kept, nor on a GPU, which says when it is full: a CPU's
    # process is killed
    wants_compiler = compute.compile and cfg.compile != "auto"
    if compute.device.type == "cpu" and not (wants_compiler or cfg.gradient_checkpointing):
        kept += tokens * activation_bytes(c, change) * compute.dtype.itemsize // 4
    return weights | {
        "moments": moments // shards,
        # no message is sent between micro-batches, so that they stay whole
        "gradients": 4 * learned // (1 if rows > batch_size else shards),
        "tokens": 16 * rows * c.block_size,
        "mask": mask_bytes(c, batch_size if documents else 0),
        "kept": kept,
    }


def training_bytes(cfg, c, compute, **options):
    """Returns a lower bound of the bytes that training takes from its second step on: those of training_parts,
    whose options these are, that are always there, and the largest of those that come and go.
    """
    parts = training_parts(cfg, c, compute, **options)
    passing = [parts.pop(name, 0) for name in ("gradients", "mask", "kept")]
    return sum(parts.values()) + max(passing)


def check_training_memory(cfg, compute):
    """Raises Refusal where the device cannot hold what training all weights of the config's model takes."""
    advice = "try a smaller model or batch_size"
    try:
        # the weights alone first, as training_bytes makes two layers of them to measure on
        check_memory(compute.device, model_sizes(cfg).bytes // compute.parts, advice)
        needs = training_bytes(cfg, cfg, compute)
    except ValueError as e:
        raise Refusal(e)
    check_memory(compute.device, needs, advice)
