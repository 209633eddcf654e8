"""A reward model: a number for an answer, read by a linear layer from the state after its last token.
finetune_reward.py trains one; finetune_ppo.py learns from it, and reads values of states by the same layer.
"""

import torch
import torch.nn as nn

from chat import conversation_ids
from checkpoint import open_checkpoint
from config import Refusal
from examples import hash_file

KIND = "reward model"  # by which checkpoint.py knows such adapters


def add_head(model, name, saved):
    """Gives a model a linear layer, under this name, that reads a number from its states. saved: what saved_head
    returned for a run that goes on; {} or None: a new layer, which reads 0.
    """
    head = nn.Linear(model.config.n_embd, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if saved:
        head.load_state_dict({key: torch.tensor(numbers) for key, numbers in saved.items()})
    setattr(model, name, head.to(model.device))


def read_head(head, states):
    """Returns the number that a layer of add_head reads from each of states (..., C): (...,) float32, without autocast,
    which would leave it 8 bits.
    """
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())[..., 0]


def saved_head(head):
    """Returns a layer of add_head as {name of a tensor: lists}."""
    return {key: tensor.tolist() for key, tensor in head.state_dict().items()}


def is_last(batch):
    """Returns which tokens are the last of their document's answer, (rows, T), bool: the ones whose target, the last
    one in the document, ends the answer. A template may have written more after it.
    """
    doc = batch["doc"].clamp(min=0)
    places = torch.arange(1, doc.size(1) + 1, device=doc.device) * (batch["targets"] != -100)
    last = torch.zeros_like(doc).scatter_reduce(1, doc, places, "amax")  # of each document
    return (places == last.gather(1, doc)) & (places > 0)


def rewards(model, batch):
    """Returns the reward of each document of a batch, one row after the other, float32 (documents,)."""
    states = model.hidden(batch["idx"], doc=batch["doc"])[is_last(batch)]
    return read_head(model.reward_head, states)


def load_reward(path, device="cpu"):
    """Returns the reward function in a folder of finetune_reward.py: judge(prompt, answer), as finetune_ppo.py calls
    it, which raises ValueError where both do not fit in its context. Raises Refusal.
    """
    problem = f"{path} is no reward model, which finetune_reward.py makes"
    try:
        start = open_checkpoint("", adapter=path)
    except Refusal as e:
        raise Refusal(f"{problem}: {e}")
    if start.task != KIND:
        raise Refusal(problem)
    model, tokenizer = start.restore(device)
    add_head(model, "reward_head", start.config["reward_head"])
    model.eval()

    @torch.no_grad()
    def judge(prompt, answer):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = conversation_ids(tokenizer, messages, start.config["template"])
        idx = torch.tensor([ids + tokenizer.encode_more(answer)], device=device)
        if idx.size(1) > model.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit in the reward model's block_size={model.config.block_size}"
            )
        zeros = torch.zeros_like(idx)
        return rewards(model, {"idx": idx, "targets": zeros, "doc": zeros}).item()

    return judge


def reward_sha256(path):
    """Returns the sha256 of a reward model's adapters, whose file has that of their base."""
    return hash_file(open_checkpoint("", adapter=path).adapter_path)
