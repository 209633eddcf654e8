"""A model whose weights, gradients and optimizer's state are shared out among processes, by torch's FSDP2
(Zhao et al. 2023, after ZeRO, Rajbhandari et al. 2020).

    torchrun --nproc_per_node=8 train.py --shard=full

Each process has some rows of each weight, in a DTensor. A block's weights are gathered while the block computes;
its gradients are added up while the block before computes, and each process keeps those of its rows. Tensors that
are not sharded pass through all functions here as they are.
"""

import torch

from config import Refusal


def shard(model, compute):
    """Shares out a Transformer's weights among all processes: each block by itself, and embedding, position
    table, last norm and head, tied or not, together. Moves the model to compute.device. Before, each process
    must have the same weights. Raises Refusal for float16, which needs a loss scaler.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds of a start, for those who shard
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if compute.dtype == torch.float16:
        raise Refusal(
            "--shard=full takes bfloat16, tf32 or float32: float16's loss scaler knows no shards"
        )
    mesh = init_device_mesh(compute.device.type, (compute.world_size,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute.dtype == torch.bfloat16:
        # autocast would round the weights at each product: they are sent rounded, and gradients added up in float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in groups(model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # gradients are summed, not averaged, as train_step divides each loss by the targets of all
        # processes. The settings do not reach the modules within; and gloo can do nothing but sum
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "next_logits")  # another way in than model()


def groups(model):
    """Returns the modules of a Transformer whose weights are gathered together: each block, and last the model
    itself, for the weights that are in no block.
    """
    return (*model.blocks, model)


def is_sharded(x):
    return hasattr(x, "to_local")  # a DTensor, whose class takes seconds to import


def local(x):
    """Returns the part of a tensor that this process has; changed in place, it changes x."""
    return x.to_local() if is_sharded(x) else x


def whole(x):
    """Returns a whole tensor. Every process must call it."""
    return x.full_tensor() if is_sharded(x) else x


def placed_like(x, p):
    """Returns x, which has the shape of p, on p's device; where p is sharded, the part that this process has."""
    x = x.to(p.device)
    if not is_sharded(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)  # all have x whole


def gathered(value, keep):
    """Returns nested dicts and lists with each sharded tensor in them whole and on the CPU; they are gathered
    one after the other. Every process must call it; without keep None stands in their place.
    """
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item, keep) for item in value]
    if not is_sharded(value):
        return value
    x = whole(value.detach())
    return x.cpu() if keep else None


def apply_to_whole(function, shards, params):
    """Applies a function of matrices (n, rows, columns), which keeps their shape, to sharded ones. Each process
    gets some of the matrices whole and applies it to those: one message there and one back.

    shards: the rows of each of params that this process has; params are of one shape (rows, columns).
    Returns the rows of the results, as many shards.
    """
    group = params[0].device_mesh.get_group()
    world_size, rank = group.size(), group.rank()
    n_rows, columns = params[0].shape
    most = -(-n_rows // world_size)
    rows = [max(0, min(most, n_rows - r * most)) for r in range(world_size)]  # of each process
    counts = [len(shards[r::world_size]) for r in range(world_size)]  # matrices of each
    outgoing = [count * rows[rank] * columns for count in counts]
    incoming = [counts[rank] * n * columns for n in rows]
    # matrix i goes to process i % world_size
    message = torch.cat([x.flatten() for r in range(world_size) for x in shards[r::world_size]])
    pieces = exchange(message, incoming, outgoing, group)
    matrices = torch.cat([x.view(counts[rank], n, columns) for x, n in zip(pieces, rows)], 1)
    if counts[rank]:
        matrices = function(matrices)
    message = torch.cat([x.flatten() for x in matrices.split(rows, 1)])
    pieces = exchange(message, outgoing, incoming, group)
    result = [None] * len(shards)
    for r, piece in enumerate(pieces):
        result[r::world_size] = piece.view(counts[r], rows[rank], columns)
    return result


def exchange(message, incoming, outgoing, group):
    """Sends each process its part of a message; returns the parts that came from each. incoming, outgoing: how many
    numbers come from each process, and go to each.
    """
    received = message.new_empty(sum(incoming))
    torch.distributed.all_to_all_single(received, message, incoming, outgoing, group=group)
    return received.split(incoming)
