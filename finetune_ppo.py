"""Teaches a trained model what a reward function likes, from its own samples: GRPO (Shao et al. 2024,
arXiv:2402.03300), which is PPO (Schulman et al. 2017, arXiv:1707.06347) without a model of values: the
advantage of a sample is its reward less the mean of its group's, of samples of one prompt.

    python finetune_ppo.py --init_from=out/demo                          stories with the hero's name in the end
    python finetune_ppo.py --init_from=out/ts --dataset=rows.jsonl --reward="match:happy" --out_dir=out/ts-grpo

Prompts are those of the rows that finetune_lora.py takes, whose answers are not looked at. A step samples
--group answers to each of --batch_size prompts, and --updates - 1 more steps learn from the same ones.
Only adapters learn: the base with its adapters switched off is the reference that --kl holds them to.

What to look at: reward rises on held-out prompts, and kl, nats a token away from the reference, with it.
A reward is only a stand-in: read the samples. Where kl grows and the reward does not, or the samples are
all alike, raise --kl or lower --learning_rate.
"""

import math
import re
from dataclasses import dataclass

from config import Refusal, run

# isort: split
import numpy as np
import torch

import finetune_lora
import lora
import toy_stories
from chat import start_of_answer
from data import evenly, micro_batches, to
from rows import NO_RESPONSE, training_packs
from sample import generate
from score import evaluating

SAMPLES = 200  # of held-out prompts, one each, that an evaluation looks at


@dataclass
class Config(finetune_lora.Config):
    # fmt: off
    out_dir: str = "out/grpo"               # where adapter.pt, log.jsonl and loss.png go
    dataset: str = "toy"                    # toy (beginnings of stories) | a .json .jsonl .csv .parquet file | hf:NAME
    reward: str = "toy"                     # toy (judged by the grammar) | length:CHARACTERS | match:REGULAR_EXPRESSION
    batch_size: int = 8                     # prompts in a micro-batch
    group: int = 8                          # samples of a prompt
    max_new_tokens: int = 128               # of a sample; one that does not end by then is not learned from
    updates: int = 1                        # steps on the same samples
    clip: float = 0.2                       # how far a step may go: ratios of probabilities from 1 - clip to 1 + clip
    kl: float = 0.05                        # what a nat a token away from the reference costs
    scale: bool = False                     # divide advantages by their group's standard deviation
    max_iters: int = 60                     # steps
    eval_interval: int = 20                 # steps between evaluations, samples and checkpoints
    # fmt: on

    built_in = "toy"

    def __post_init__(self):
        super().__post_init__()
        if self.dataset == self.built_in and not self.template:
            self.template = "{prompt}"  # a story and how it goes on
        if not self.rank:
            raise ValueError("the reference is the base without its adapters: rank must be at least 1")
        if self.group < 2:
            raise ValueError(
                "one sample a group has nothing to be compared with: group must be at least 2"
            )
        if self.updates < 1 or self.max_new_tokens < 1:
            raise ValueError("updates and max_new_tokens must be at least 1")
        if not 0 < self.clip < 1 or self.kl < 0:
            raise ValueError("clip must be between 0 and 1, and kl at least 0")
        self.judge = find_reward(self.reward)


# -----------------------------------------------------------------------------------------------------
# Rewards: functions of (prompt, answer), both texts


def find_reward(name):
    """Returns the reward function of a name. Raises ValueError."""
    kind, _, argument = name.partition(":")
    if name == "toy":
        return lambda prompt, answer: float(toy_stories.is_preferred(prompt + answer))
    if kind == "length" and argument.isdigit() and int(argument):
        length = int(argument)
        return lambda prompt, answer: -abs(len(answer) - length) / length
    if kind == "match" and argument:
        try:
            pattern = re.compile(argument)
        except re.error as e:
            raise ValueError(f"reward: {argument!r} is no regular expression: {e}")
        return lambda prompt, answer: float(pattern.search(answer) is not None)
    raise ValueError(f"reward must be toy, length:CHARACTERS or match:REGULAR_EXPRESSION, not {name!r}")


def advantages(rewards, is_whole, group, scale=False):
    """Returns rewards (n,) less the mean of each group of so many, divided with scale by its deviation. Samples
    that were cut off, not is_whole (n,), count in no mean and have no advantage: else never to end would be one.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group)
    is_whole = is_whole.view(-1, group)
    count = is_whole.sum(1, keepdim=True)
    mean = (rewards * is_whole).sum(1, keepdim=True) / count.clamp(min=1)
    result = (rewards - mean) * is_whole
    if scale:
        variance = result.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        result = result / (variance.sqrt() + 1e-4)
    return result.flatten()


# -----------------------------------------------------------------------------------------------------
# The loss


def token_logps(model, batch):
    """Returns log p of each target, (rows, T) float32, 0 where there is none."""
    return -model(batch["idx"], batch["targets"], reduction="none")[1].float()


def k3(logps, reference):
    """Returns what logps - reference tell of the divergence, never negative (Schulman 2020, "Approximating KL
    divergence"). TRL by default multiplies it by the ratio: the same value on fresh samples, another gradient.
    """
    return (reference - logps).exp() - (reference - logps) - 1


def policy_loss(logps, batch, clip, kl):
    """Returns the loss of GRPO, summed over samples, each the mean over its tokens.

    logps: (rows, T) of the model; batch: old, of the model that sampled, and reference, of the same shape;
    advantage (rows,); targets, -100 where nothing was sampled; is_whole (rows,), not where a sample was cut off.
    """
    ratio = (logps - batch["old"]).exp()
    advantage = batch["advantage"][:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    losses = kl * k3(logps, batch["reference"]) - gain
    is_learned = (batch["targets"] != -100) & batch["is_whole"][:, None]
    return ((losses * is_learned).sum(1) / is_learned.sum(1).clamp(min=1)).sum()


# -----------------------------------------------------------------------------------------------------
# The task


class Reinforcing(finetune_lora.FineTuning):
    """Learning from rewarded samples: what train.fit needs of a task."""

    kind = "reinforcement"
    panels = (("reward of held-out prompts", ("reward",)), ("nats a token from the reference", ("kl",)))
    accepted = ("", NO_RESPONSE)
    round = -1  # which one self.samples are of
    samples = ()  # the micro-batches of a round

    def convert(self, places_and_rows):
        """Returns the Conversations of rows, which need no answers."""
        filled = []
        for place, row in places_and_rows:
            if isinstance(row, dict) and isinstance(row.get("prompt"), str):
                row = {"prompt": row["prompt"], "response": ""}
            filled.append((place, row))
        return super().convert(filled)

    def read(self, learned):
        """Makes prompts, pairs of a text and its ids, of what to learn from and of held_out."""
        self.prompts, self.message = self.read_prompts(learned, "to learn from")
        val_prompts, self.val_message = self.read_prompts(self.held_out, "held out")
        chosen = evenly(np.arange(len(val_prompts)), SAMPLES)
        self.val_prompts = [val_prompts[number] for number in chosen]
        return [np.array(ids) for _, ids in self.prompts]

    def read_prompts(self, conversations, name):
        """Returns the first prompts of Conversations that leave room for an answer, and a line about them."""
        prompts = []
        for conversation in conversations:
            if conversation.problem not in self.accepted:
                continue
            prompt = conversation.turns[0].prompt
            try:
                _, ids = start_of_answer(self.tuning.tokenizer, prompt, self.cfg.template)
            except ValueError as e:
                raise Refusal(f"{conversation.place}: {e}")
            if len(ids) < self.tuning.T:
                prompts.append((prompt, ids))
        left_out = len(conversations) - len(prompts)
        line = f"{self.cfg.dataset}, {name}: {len(prompts):,} prompts"
        if not prompts:
            raise Refusal(f"{line}, shorter than {self.tuning.T} tokens")
        return prompts, line + (
            f"; left out: {left_out:,} that are too long or no prompt" if left_out else ""
        )

    def describe(self):
        return f"{self.message}\n{self.val_message}"

    def begin(self):
        """Takes up the samples of a run that stopped between two steps on the same ones."""
        lora.without_dropout(self.tuning.model)
        if self.cfg.updates > 1 and self.compute.world_size > 1:
            raise Refusal("several processes take one step on their samples: updates must be 1")
        if self.tuning.resumed and (saved := self.tuning.resumed["config"]["samples"]):
            self.round = saved["round"]
            self.samples = [
                {
                    name: torch.tensor(values, device=self.compute.device)
                    for name, values in batch.items()
                }
                for batch in saved["batches"]
            ]

    def notes(self):
        batches = [{name: x.tolist() for name, x in batch.items()} for batch in self.samples]
        is_needed = self.cfg.updates > 1
        return super().notes() | {
            "samples": {"round": self.round, "batches": batches} if is_needed else {}
        }

    def batches(self, step):
        """Returns this process's micro-batches of a step: new samples, or those of the step before."""
        if self.round != step // self.cfg.updates:
            self.round = step // self.cfg.updates
            self.samples = []
            for first, n in micro_batches(self.round, self.cfg, self.compute):
                prompts = training_packs(self.prompts, self.cfg.seed, first, n)
                prompts = [prompt for prompt in prompts for _ in range(self.cfg.group)]
                batch, rewards, _ = self.sample(prompts, (self.cfg.seed, first))
                rewards = torch.tensor(rewards, device=self.compute.device)
                batch["advantage"] = advantages(
                    rewards, batch["is_whole"], self.cfg.group, self.cfg.scale
                )
                self.samples.append(batch)
        return self.samples

    def sample(self, prompts, seed):
        """Samples an answer to each of prompts.

        Returns a batch {"idx", "targets", "old", "reference"} of (rows, T), with is_whole (rows,), of the answers
        that have an end; the rewards, a list; and the largest difference of log p between the sampler, token by
        token, and the model that learns.
        """
        cfg, model, tokenizer = self.cfg, self.tuning.model, self.tuning.tokenizer
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        ids = [list(prompt_ids) for _, prompt_ids in prompts]
        with self.compute.autocast():
            *_, answers = generate(
                model, ids, cfg.max_new_tokens, 1.0, top_k=0, stop=tokenizer.ends, seed=seed, logps=True
            )
        texts = [
            start + answer.ids + [answer.stop] * answer.is_whole for start, answer in zip(ids, answers)
        ]
        shape = len(texts), max(map(len, texts)) - 1
        batch = {"idx": torch.zeros(shape, dtype=torch.long), "targets": torch.full(shape, -100)}
        batch["is_whole"] = torch.tensor([answer.is_whole for answer in answers])
        sampled = torch.zeros(shape)
        for row, (start, text, answer) in enumerate(zip(ids, texts, answers)):
            batch["idx"][row, : len(text) - 1] = torch.tensor(text[:-1])
            learned = slice(len(start) - 1, len(text) - 1)
            batch["targets"][row, learned] = torch.tensor(text[len(start) :])
            sampled[row, learned] = torch.tensor(answer.logps)
        batch = to(batch, self.compute.device)
        with evaluating(model), self.compute.autocast():
            batch["old"] = token_logps(model, batch)
            with lora.switched_off(model):
                batch["reference"] = token_logps(model, batch)
        drift = (batch["old"].cpu() - sampled).abs().max().item()
        rewards = [
            self.reward(prompt, tokenizer.decode_more(answer.ids))
            for (prompt, _), answer in zip(prompts, answers)
        ]
        return batch, rewards, drift

    def reward(self, prompt, answer):
        value = self.cfg.judge(prompt, answer)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refusal(f"reward={self.cfg.reward} gives {value!r:.40} for {answer!r:.80}", status=1)
        return float(value)

    def loss(self, model, batch):
        return policy_loss(token_logps(model, batch), batch, self.cfg.clip, self.cfg.kl)

    @staticmethod
    def count(batch):
        """Returns the number of samples of a batch, a tensor on its device."""
        return torch.tensor(len(batch["idx"]), device=batch["idx"].device)

    def validate(self, tokens=None):
        """Returns figures of one sample a held-out prompt: the mean reward, and less than it val_loss; kl, in
        nats a token; the share that was cut off; and drift, see sample().
        """
        size = self.cfg.batch_size * self.cfg.group
        rewards, cut, drifts = [], 0, []
        kl = torch.zeros(2, dtype=torch.float64)  # the sum over tokens, and their number
        for i in range(0, len(self.val_prompts), size):
            batch, some, drift = self.sample(self.val_prompts[i : i + size], (self.cfg.seed, i))
            is_sampled = batch["targets"] != -100
            divergence = (k3(batch["old"], batch["reference"]) * is_sampled).sum()
            kl += torch.tensor([divergence.item(), is_sampled.sum().item()])
            cut += (~batch["is_whole"]).sum().item()
            rewards += some
            drifts.append(drift)
        reward = float(np.mean(rewards))
        return {
            "val_loss": -reward,
            "reward": reward,
            "kl": (kl[0] / kl[1].clamp(min=1)).item(),
            "cut_off": cut / len(rewards),
            "drift": max(drifts),
        }

    def line(self, figures):
        return (
            f"reward {figures['reward']:.4f} on {len(self.val_prompts)} held-out prompts, {figures['kl']:.4f} nats a "
            f"token from the reference, {figures['cut_off']:.1%} of the samples cut off; the sampler's log p "
            f"differs by up to {figures['drift']:.1e}"
        )

    def built_in_lines(self):
        """Returns how well stories are told."""
        return finetune_lora.story_line(self.tuning.model, self.tuning.tokenizer, self.compute)


def main(cfg):
    finetune_lora.main(cfg, Reinforcing)


if __name__ == "__main__":
    run(main, Config)
