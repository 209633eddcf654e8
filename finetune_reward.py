"""Teaches a trained model to say how good an answer is, from pairs of answers: a reward model (Bradley and
Terry 1952; Ouyang et al. 2022, arXiv:2203.02155).

    python finetune_reward.py --init_from=out/demo                        which of two endings is the better one
    python finetune_reward.py --init_from=out/ts --dataset=pairs.jsonl --out_dir=out/reward
    python finetune_ppo.py --init_from=out/ts --dataset=rows.jsonl --reward=out/reward --out_dir=out/ts-grpo

Rows are those of finetune_dpo.py. A linear layer reads a number, the reward, from the state after an answer's
last token. The layer and adapters learn: the loss is -log sigmoid(the chosen answer's reward - the rejected one's).
Only differences mean something, and only between answers to one prompt.

What to look at: accuracy, the share of held-out pairs whose chosen answer gets more.
"""

from dataclasses import dataclass

from config import Refusal, run

# isort: split
import torch
import torch.nn as nn
import torch.nn.functional as F

import finetune_dpo
import finetune_lora
from chat import conversation_ids
from checkpoint import open_checkpoint
from data import to
from examples import hash_file
from log import LOSSES
from rows import packed_batch
from score import evaluating

KIND = "reward model"  # by which checkpoint.py knows such adapters


@dataclass
class Config(finetune_dpo.PairConfig):
    out_dir: str = "out/reward"  # where adapter.pt, log.jsonl and loss.png go

    def __post_init__(self):
        super().__post_init__()
        if not self.rank:
            raise ValueError("a reward model is adapters and a layer: rank must be at least 1")


# -----------------------------------------------------------------------------------------------------
# A number for an answer


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
    """Returns the reward function in a folder that this script wrote: judge(prompt, answer), as finetune_ppo.py calls
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


# -----------------------------------------------------------------------------------------------------
# The task


class Rewarding(finetune_dpo.Pairing):
    """Learning which of two answers gets more: what train.fit needs of a task."""

    kind = KIND
    panels = (("loss, nats a pair", LOSSES), ("share of pairs", ("accuracy",)))
    names = ("val_loss", "accuracy", "margin", "reward_chosen", "reward_rejected")

    def read(self):
        if "start" in self.cfg.given:
            raise Refusal("a reward model writes no sample that could have a start: leave it out")
        super().read()

    def begin(self):
        """Adds the layer that reads rewards."""
        saved = self.tuning.resumed["config"]["reward_head"] if self.tuning.resumed else {}
        add_head(self.tuning.model, "reward_head", saved)

    def loss(self, model, batch):
        """Returns -log sigmoid(the chosen answer's reward - the rejected one's), summed over pairs."""
        values = rewards(self.tuning.model, batch)
        return -F.logsigmoid(values[::2] - values[1::2]).sum()

    @staticmethod
    def count(batch):
        """Returns the number of pairs of a batch, a tensor on its device."""
        return is_last(batch).sum() // 2

    def figures(self, batch):
        values = rewards(self.tuning.model, batch)
        chosen, rejected = values[::2], values[1::2]
        return finetune_dpo.sums_of_pairs(chosen - rejected, chosen, rejected)

    def notes(self):
        return super().notes() | {"reward_head": saved_head(self.tuning.model.reward_head)}

    def preview(self):
        """Returns the rewards of the first held-out pair's answers."""
        pair = to(packed_batch([[0, 1]], self.val_examples, self.length), self.compute.device)
        with evaluating(self.tuning.model), self.compute.autocast():
            chosen, rejected = rewards(self.tuning.model, pair).tolist()
        texts = []
        for n in (0, 1):
            _, targets = self.val_examples[n]
            *ids, _ = targets[targets != -100].tolist()  # without the end
            texts.append(self.tuning.tokenizer.decode_more(ids))
        return f"{chosen:+.3f} for {texts[0]!r:.300}\n{rejected:+.3f} for {texts[1]!r:.300}"

    def line(self, figures):
        return (
            f"{figures['val_loss']:.4f} nats a held-out pair, the chosen answer ahead in {figures['accuracy']:.1%}, "
            f"by {figures['margin']:.3f} in the mean"
        )

    def built_in_lines(self):
        return None

    def next_command(self):
        cfg = self.cfg
        prompts = "" if cfg.dataset == cfg.built_in else f"--dataset={cfg.dataset} "
        return f"finetune_ppo.py --init_from={self.tuning.base.path} {prompts}--reward={cfg.out_dir}"


def main(cfg):
    finetune_lora.main(cfg, Rewarding)


if __name__ == "__main__":
    run(main, Config)
