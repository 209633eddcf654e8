"""Advantages: by how much each sampled token was better than expected, from the rewards of whole answers.

They are (rows, 1) by a group, GRPO's, or (rows, T) by values, PPO's: finetune_ppo.py. Samples that were cut off have
none, and count in no mean; otherwise it could be an advantage never to end.
"""

import math

import torch


def is_learned(batch):
    """Returns which tokens have an advantage, (rows, T), bool: those of answers that were not cut off."""
    return (batch["targets"] != -100) & batch["is_whole"][:, None]


def group_advantages(rewards, is_whole, group, scale=False):
    """Returns rewards (rows,) minus the mean of their group, as (rows, 1); with scale divided by the group's standard
    deviation. group: how many rows a group has, one after the other.
    """
    device = rewards.device
    # in float64, as in float32 equal rewards may differ from their mean; on the CPU, as mps has no float64
    rewards = rewards.cpu().double().view(-1, group)
    is_whole = is_whole.cpu().view(-1, group)
    count = is_whole.sum(1, keepdim=True)
    mean = (rewards * is_whole).sum(1, keepdim=True) / count.clamp(min=1)
    result = (rewards - mean) * is_whole
    if scale:
        variance = result.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        result = result / (variance.sqrt() + 1e-4)
    return result.view(-1, 1).float().to(device)


def value_advantages(rewards, values, is_answer, decay):
    """Returns the generalized advantage estimates of the tokens of answers, (rows, T). An answer's reward, of rewards
    (rows,), comes with its last token.

    values (rows, T): what is expected before each token; is_answer (rows, T), bool; decay: lambda. Nothing is
    discounted.
    """
    result = torch.zeros_like(values)
    later = torch.zeros_like(rewards)  # the advantage of the next token
    after = rewards  # the value of the next token; after the last one the reward
    for t in reversed(range(values.size(1))):
        is_token = is_answer[:, t]
        later = torch.where(is_token, after - values[:, t] + decay * later, later)
        after = torch.where(is_token, values[:, t], after)
        result[:, t] = later * is_token
    return result


def whiten(batches, compute):
    """Gives the advantages of a step's answers a mean of 0 and a deviation of 1, over all processes."""
    n = len(batches)
    sums = torch.zeros(n * compute.world_size, 3, dtype=torch.float64)
    for i, batch in enumerate(batches, compute.rank * n):
        values = batch["advantage"][is_learned(batch)].cpu().double()
        sums[i] = torch.stack([values.sum(), values.square().sum(), torch.ones_like(values).sum()])
    total, square, count = compute.sum(sums).sum(0).tolist()
    mean = total / max(1, count)
    deviation = math.sqrt(max(0.0, square / max(1, count) - mean**2))
    for batch in batches:
        batch["advantage"] = (batch["advantage"] - mean) / (deviation + 1e-8)
