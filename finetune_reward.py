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
import torch.nn.functional as F

import finetune_dpo
import finetune_lora
from data import to
from log import LOSSES
from reward_model import KIND, add_head, is_last, rewards, saved_head
from rows import packed_batch
from score import evaluating


@dataclass
class Config(finetune_dpo.PairConfig):
    out_dir: str = "out/reward"  # where adapter.pt, log.jsonl and loss.png go

    def __post_init__(self):
        super().__post_init__()
        if not self.rank:
            raise ValueError("a reward model is adapters and a layer: rank must be at least 1")


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
