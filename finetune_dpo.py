"""Teaches a trained model what is preferred, from pairs of answers: direct preference optimization, DPO
(Rafailov et al. 2023, arXiv:2305.18290), of LoRA adapters or with --rank=0 of all weights.

    python finetune_dpo.py --init_from=out/demo                   to end with the hero's name and the lesson
    python finetune_dpo.py --init_from=out/ts-sft --dataset=pairs.jsonl --out_dir=out/ts-dpo
    python sample.py --adapter=out/ts-dpo --start="Why is the sky blue?"

A row is an object with prompt, chosen and rejected, texts or lists of messages; with instruction, chosen,
rejected and perhaps input; or with chosen and rejected alone, two conversations whose common start is the
prompt. Everything else is as in finetune_lora.py; but the base's dropout ends, and experts' balance is
not learned.

What to look at: val_loss begins at log 2 = 0.6931, where the model does not yet differ from its reference,
and accuracy, the share of held-out pairs whose chosen answer has gained more than its rejected one, rises.
If logp_chosen falls too (it may: the loss sees only differences), probability goes to answers that nobody
chose. A lower --learning_rate or a higher --beta helps, and fine-tuning on the chosen answers first.
"""

from dataclasses import dataclass

from config import check_range, run

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

import finetune_lora
import lora
import toy_stories
from chat import start_of_answer
from data import to
from generate import generate
from log import LOSSES
from messages import preferences
from rows import packed_batch, split_rows
from score import evaluating, means
from tuning import FIXED

SAMPLES = 200  # of the built-in task, judged by the grammar


@dataclass
class PairConfig(finetune_lora.Config):
    # fmt: off
    dataset: str = "toy"                    # toy (made here) | a .json .jsonl .csv .parquet file | hf:NAME
    eval_tokens: int = 0                    # of held-out rows looked at meanwhile, always the same ones; 0 = all
    max_iters: int = 100                    # steps
    # fmt: on

    built_in = "toy"
    built_in_template = "{prompt}"  # a story and how it goes on


@dataclass
class Config(PairConfig):
    # fmt: off
    out_dir: str = "out/dpo"                # where adapter.pt, log.jsonl and loss.png go; with --rank=0 ckpt.pt
    beta: float = 0.1                       # how strongly the model is held to its reference, the base
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "above 0", "beta")


# -----------------------------------------------------------------------------------------------------
# The loss. A batch is a packed one with "reference" (rows, documents): log p that the reference gives each
# document's answer, chosen and rejected ones in turns; nan where a row has no more documents


def answer_logps(model, batch):
    """Returns log p of each document's answer with its end, in nats, in the shape of the batch's reference."""
    idx, targets, doc = batch["idx"], batch["targets"], batch["doc"]
    nats = model(idx, targets, doc=doc, reduction="none")[1].float()  # 0 where nothing is learned
    logps = torch.zeros_like(batch["reference"])
    return logps.scatter_add(1, doc.clamp(min=0), -nats)


def gains(model, batch):
    """Returns four tensors (pairs,): by how many nats the chosen answers, and the rejected ones, are likelier
    than for the reference; then log p of the chosen ones, and of the rejected ones.
    """
    logps = answer_logps(model, batch)
    gained = logps - batch["reference"]
    is_pair = ~batch["reference"][:, ::2].isnan()
    chosen, rejected = gained[:, ::2][is_pair], gained[:, 1::2][is_pair]
    return chosen, rejected, logps[:, ::2][is_pair], logps[:, 1::2][is_pair]


def sums_of_pairs(margin, chosen, rejected):
    """Returns what score.means takes: the sums over pairs of the margin's loss, of whether the margin is above 0, of
    the margin, of `chosen` and of `rejected`; and last the number of pairs. The arguments are (pairs,) each.
    """
    columns = [-F.logsigmoid(margin), margin > 0, margin, chosen, rejected, torch.ones_like(margin)]
    return torch.stack([column.float().sum() for column in columns])


def count_pairs(batch):
    """Returns the number of pairs of a batch, a tensor on its device."""
    return (~batch["reference"].isnan()).sum() // 2


# -----------------------------------------------------------------------------------------------------
# The task


class Pairing(finetune_lora.FineTuning):
    """A task of pairs of answers. examples has chosen and rejected ones in turns; a pair shares a row, in which each is
    a document. A class made of this one has `names`, those of its figures, and figures(batch), which returns their
    sums over a batch and the number of pairs.
    """

    conversations_per_row = 2

    def validate(self, tokens=None):
        """Returns {name: mean over held-out pairs} of the figures."""
        numbers = self.val_numbers(tokens)
        size = self.cfg.batch_size
        n = len(self.names)
        values = means(self.trained, numbers, self.val_batch, size, self.compute, self.figures, n)
        return dict(zip(self.names, values))


class Preferring(Pairing):
    """Learning which of two answers is preferred: what train.fit needs of a task."""

    kind = "preference tuning"
    panels = (
        ("loss, nats a pair", LOSSES),
        ("share of pairs", ("accuracy",)),
        ("log p of an answer, nats", ("logp_chosen", "logp_rejected")),
    )
    fixed = FIXED | {"beta"}
    count = staticmethod(count_pairs)
    # accuracy: the share whose chosen answer gained more; margin: by how much, times beta; log p in nats
    names = ("val_loss", "accuracy", "margin", "logp_chosen", "logp_rejected")

    def begin(self):
        """Computes the log p that the reference, the base, gives each answer. A run of all weights keeps them, as
        the base is gone when it goes on.
        """
        lora.without_dropout(self.tuning.model)
        if self.tuning.resumed and not self.cfg.rank:
            reference = np.array(self.tuning.resumed["config"]["reference"])
            self.reference, self.val_reference = np.split(reference, [len(self.examples)])
            return
        with lora.switched_off(self.tuning.model):
            if not self.cfg.eval_only:
                self.reference = self.logps(self.packs, self.examples)
            self.val_reference = self.logps(self.val_packs, self.val_examples)

    def logps(self, packs, examples):
        """Returns log p of each example's answer, float64 (examples,). Processes share the work."""
        logps = torch.zeros(len(examples), dtype=torch.float64)
        unknown = np.zeros(len(examples))
        size = self.cfg.batch_size
        with evaluating(self.tuning.model):
            for i in range(self.compute.rank * size, len(packs), self.compute.world_size * size):
                batch = to(
                    pair_batch(packs[i : i + size], examples, unknown, self.length), self.compute.device
                )
                with self.compute.autocast():
                    of_rows = answer_logps(self.tuning.model, batch).cpu().double()
                for numbers, row in zip(packs[i : i + size], of_rows):
                    logps[numbers] = row[: len(numbers)]
        return self.compute.sum(logps).numpy()

    def make_batch(self, packs):
        return pair_batch(packs, self.examples, self.reference, self.length)

    def val_batch(self, numbers):
        packs = [self.val_packs[number] for number in numbers]
        return pair_batch(packs, self.val_examples, self.val_reference, self.length)

    def loss(self, model, batch):
        """Returns -log sigmoid(beta (the chosen answer's gain - the rejected one's)), summed over pairs."""
        chosen, rejected, _, _ = gains(model, batch)
        return -F.logsigmoid(self.cfg.beta * (chosen - rejected)).sum()

    def figures(self, batch):
        chosen, rejected, logp_chosen, logp_rejected = gains(self.trained, batch)
        return sums_of_pairs(self.cfg.beta * (chosen - rejected), logp_chosen, logp_rejected)

    def notes(self):
        reference = [] if self.cfg.rank else [*self.reference.tolist(), *self.val_reference.tolist()]
        return super().notes() | {"reference": reference}

    def line(self, figures):
        return (
            f"{figures['val_loss']:.4f} nats a held-out pair, the chosen answer ahead in {figures['accuracy']:.1%}, "
            f"log p {figures['logp_chosen']:.1f} of chosen, {figures['logp_rejected']:.1f} of rejected answers"
        )

    def built_in_lines(self):
        """Returns two lines: how many samples end as preferred, by the grammar, and how well stories are told."""
        tuning = self.tuning
        _, held_out = split_rows(self.cfg, preferences)
        openings = [chosen.turns[-1].prompt for chosen, _ in held_out[:SAMPLES]]
        prompts = [
            start_of_answer(tuning.tokenizer, opening, self.cfg.template)[1] for opening in openings
        ]
        room = tuning.model.config.block_size - max(map(len, prompts))
        *_, samples = generate(
            tuning.model, prompts, room, 1.0, top_k=0, stop=tuning.tokenizer.ends, seed=self.cfg.seed
        )
        texts = [
            opening + tuning.tokenizer.decode_more(row.ids) for opening, row in zip(openings, samples)
        ]
        share = np.mean([toy_stories.is_preferred(text) for text in texts])
        return (
            f"of {len(texts)} samples {share:.1%} end with their hero's name and the lesson that fits\n"
            + finetune_lora.story_line(tuning.model, tuning.tokenizer, self.compute)
        )


def pair_batch(packs, examples, reference, length):
    """Returns the batch of packs of examples. reference (examples,): the log p that the reference gives each answer;
    length: tokens in a row.
    """
    batch = packed_batch(packs, examples, length)
    batch["reference"] = torch.full((len(packs), max(map(len, packs))), torch.nan)
    for row, numbers in zip(batch["reference"], packs):
        row[: len(numbers)] = torch.from_numpy(reference[numbers])
    return batch


def main(cfg):
    finetune_lora.main(cfg, Preferring)


if __name__ == "__main__":
    run(main, Config)
