"""Teaches a trained model what a reward function likes, from its own samples: PPO (Schulman et al. 2017,
arXiv:1707.06347) and GRPO (Shao et al. 2024, arXiv:2402.03300), which differ in their advantages (advantages.py).

    python finetune_ppo.py --init_from=out/demo                          stories with the hero's name in the end
    python finetune_ppo.py --init_from=out/ts --dataset=rows.jsonl --reward="match:happy" --out_dir=out/ts-grpo

--baseline=group, GRPO: a sample's reward minus the mean reward of its group, the samples of one prompt.
--baseline=value, PPO: generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438) over the values
that a linear layer learns to read from the states; all advantages of a step are whitened.

Prompts come from rows as finetune_lora.py and finetune_dpo.py take them; their answers are not looked at. A step
samples --group answers to each of --batch_size prompts, and --updates - 1 more steps learn from the same answers.
Only adapters learn: the base with its adapters switched off is the reference that --kl holds them to.

What to look at: reward on held-out prompts, which rises, and kl, in nats a token away from the reference, which
rises with it. A reward is only a stand-in: read the samples. Where kl grows and the reward does not, or the
samples are all alike, raise --kl or lower --learning_rate.
"""

import hashlib
import math
import numbers
import os
from dataclasses import dataclass

from config import Refusal, check_choice, check_range, run

# isort: split
import numpy as np
import torch

import finetune_lora
import lora
import toy_stories
from advantages import group_advantages, is_learned, value_advantages, whiten
from data import evenly, micro_batches, to
from messages import conversations, default_template
from reward_model import add_head, read_head, reward_sha256, saved_head
from rollouts import answer_batch, draw, encode_prompt, find_reward, prompt_row
from rows import LeftOut, side_line, side_names, split_rows, training_packs
from score import document_nats, evaluating
from train import Unusable
from tuning import FIXED

SAMPLES = 200  # of held-out prompts, one each, that an evaluation looks at
STORIES = 100  # toy stories on which an evaluation looks how well they are still told


@dataclass
class Config(finetune_lora.Config):
    # fmt: off
    out_dir: str = "out/grpo"               # where adapter.pt, log.jsonl and loss.png go
    dataset: str = "toy"                    # toy (beginnings of stories) | a .json .jsonl .csv .parquet file | hf:NAME
    reward: str = "toy"                     # toy (by the grammar) | length:CHARACTERS | match:REGEX | FOLDER
    batch_size: int = 12                    # prompts in a micro-batch
    baseline: str = "group"                 # what rewards are compared with: group (GRPO) | value (PPO)
    group: int = 8                          # samples of a prompt
    max_new_tokens: int = 128               # of a sample; one that does not end by then has no advantage
    updates: int = 1                        # steps on the same samples
    clip: float = 0.2                       # how far a step may go: ratios of probabilities from 1 - clip to 1 + clip
    kl: float = 0.04                        # what a nat a token away from the reference costs
    scale: bool = True                      # group: divide advantages by their group's standard deviation
    gae: float = 1.0                        # value: how far an advantage looks past the next value; 1 = to the reward
    learning_rate: float = 7e-4             # the highest one
    max_iters: int = 120                    # steps
    eval_interval: int = 40                 # steps between evaluations, samples and checkpoints
    rank: int = 32                          # of the adapters
    # fmt: on

    built_in = "toy"
    built_in_template = "{prompt}"  # a story and how it goes on

    @property
    def rows(self):
        return self.batch_size * self.group

    def __post_init__(self):
        super().__post_init__()
        if not self.rank:
            raise ValueError("the reference is the base without its adapters: rank must be at least 1")
        check_choice(self, "baseline", ("group", "value"))
        check_range(self, "at least 1", "group", "updates", "max_new_tokens")
        check_range(self, "at least 0 and at most 1", "gae")
        check_range(self, "above 0 and below 1", "clip")
        check_range(self, "at least 0", "kl")
        if self.group < 2 and self.baseline == "group":
            raise ValueError(
                "one sample a group has nothing to be compared with: group must be at least 2"
            )
        reward, out_dir = map(os.path.realpath, (self.reward, self.out_dir))
        if reward == out_dir and os.path.isdir(reward):
            raise ValueError(f"the reward model is in {self.out_dir}: give another --out_dir")
        find_reward(self.reward)


# -----------------------------------------------------------------------------------------------------
# The loss


def token_logps(model, batch):
    """Returns log p of each target, (rows, T) float32, 0 where there is none."""
    return -model(batch["idx"], batch["targets"], reduction="none")[1].float()


def k3(logps, reference):
    """Returns an estimate of the divergence, from logps - reference, that is never negative (Schulman 2020,
    "Approximating KL divergence"). TRL by default multiplies it by the ratio, which is the same value on fresh
    samples but another gradient.
    """
    return (reference - logps).exp() - (reference - logps) - 1


def mean_over_answers(losses, mask):
    """Returns the mean of losses (rows, T) over each answer's tokens, mask (rows, T), summed over answers."""
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def policy_loss(logps, batch, clip, kl):
    """Returns the clipped loss plus kl times the divergence. On a sample that was cut off only the divergence acts:
    it is what brings a model back that no longer ends its texts.

    logps (rows, T): of the model that learns. batch: old (rows, T), of the model that sampled, and reference
    (rows, T); advantage (rows, 1 or T); targets (rows, T), -100 where nothing was sampled; is_whole (rows,), False
    where a sample was cut off.
    """
    ratio = (logps - batch["old"]).exp()
    advantage = batch["advantage"]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    gain = mean_over_answers(gain, is_learned(batch))
    return kl * mean_over_answers(k3(logps, batch["reference"]), batch["targets"] != -100) - gain


def value_loss(values, batch, clip):
    """Returns half the squared error of values (rows, T) to batch["goal"]; or, where that is more, of the values moved
    to within clip of batch["value"], those at sampling time. All are (rows, T).
    """
    near = batch["value"] + (values - batch["value"]).clamp(-clip, clip)
    errors = torch.maximum((values - batch["goal"]).square(), (near - batch["goal"]).square())
    return mean_over_answers(errors / 2, is_learned(batch))


# -----------------------------------------------------------------------------------------------------
# The task


class Reinforcing(finetune_lora.FineTuning):
    """Learning from rewarded samples: what train.fit needs of a task."""

    kind = "reinforcement"
    panels = (("reward of held-out prompts", ("reward",)), ("nats a token from the reference", ("kl",)))
    fixed = FIXED | {"baseline", "reward"}
    samples = ()  # the micro-batches of the last round of sampling
    round = -1  # the number of that round

    def convert(self, places_and_rows):
        """Returns the Conversations of (place, row) pairs, which need no answers."""
        return conversations(
            [(place, prompt_row(row)) for place, row in places_and_rows], self.text_rule
        )

    def read(self):
        """Finds the prompts of both sides, (a text or messages, its ids) each, and the template if none was named."""
        cfg = self.cfg
        if "eval_tokens" in cfg.given:
            raise Refusal(f"an evaluation samples {SAMPLES} held-out prompts: leave eval_tokens out")
        if cfg.dataset != cfg.built_in and "reward" not in cfg.given and not self.tuning.resumed:
            raise Refusal(
                f"reward=toy judges toy stories, and not those of {cfg.dataset}: give a --reward"
            )
        learned, held_out = split_rows(cfg, self.convert)
        cfg.template = cfg.template or default_template([*learned, *held_out])
        name, val_name = side_names(cfg)
        self.prompts, self.message = self.read_prompts(learned, name)
        val_prompts, self.val_message = self.read_prompts(held_out, val_name)
        if cfg.dataset == cfg.built_in:
            self.panels = (*self.panels, ("nats a story", ("story",)))
        chosen = evenly(np.arange(len(val_prompts)), SAMPLES)
        self.val_prompts = [val_prompts[number] for number in chosen]
        ids = b"".join(np.array(ids).tobytes() for _, ids in self.prompts)
        self.length = self.tuning.T  # the most tokens that a row may have
        self.rows_sha256 = hashlib.sha256(ids).hexdigest()

    @property
    def preview_tokens(self):
        return self.cfg.max_new_tokens

    def first_prompt(self):
        _, ids = self.val_prompts[0]
        return self.text_of(ids), ids

    def read_prompts(self, conversations, name):
        """Returns the prompts of Conversations that leave room for an answer, and a line about them."""
        tokenizer, T = self.tuning.tokenizer, self.tuning.T
        results = [encode_prompt(item, tokenizer, self.cfg.template, T) for item in conversations]
        left_out = [result for result in results if isinstance(result, LeftOut)]
        line = side_line(name, len(results), left_out, T, "leaves room in")
        return [result for result in results if not isinstance(result, LeftOut)], line

    def describe(self):
        return f"{self.message}\n{self.val_message}"

    def begin(self):
        """Loads the reward, adds the layer that reads values, and takes over the samples of a run that stopped between
        two steps on the same samples.
        """
        notes = self.tuning.resumed["config"] if self.tuning.resumed else {}
        lora.without_dropout(self.tuning.model)
        self.open_reward(notes)
        if self.cfg.baseline == "value":
            add_head(self.tuning.model, "value_head", notes.get("value_head"))
        if self.cfg.updates > 1 and self.compute.world_size > 1:
            raise Refusal("several processes take one step on their samples: updates must be 1")
        # the largest one in training so far, of all processes, see sample(); older runs did not keep it
        self.drift = notes.get("drift", 0.0)
        if samples := notes.get("samples"):
            self.round = samples["round"]
            self.samples = [
                to({name: torch.tensor(values) for name, values in batch.items()}, self.compute.device)
                for batch in samples["batches"]
            ]

    def open_reward(self, notes):
        """Loads the reward. Raises Refusal where it is another one than in the notes of the run that goes on."""
        reward = self.cfg.reward
        self.judge = find_reward(reward, self.compute.device, load=True)
        self.reward_sha256 = reward_sha256(reward) if os.path.isdir(reward) else ""
        if notes.get("reward_sha256", self.reward_sha256) != self.reward_sha256:  # older runs have none
            path = self.tuning.base.last_path
            raise Refusal(f"{reward} is another one than when {path} was begun: give another --out_dir")

    def notes(self):
        notes = super().notes() | {
            "samples": {},
            "drift": self.drift,
            "reward_sha256": self.reward_sha256,
        }
        if self.cfg.updates > 1:
            batches = [{name: x.tolist() for name, x in batch.items()} for batch in self.samples]
            notes["samples"] = {"round": self.round, "batches": batches}
        if self.cfg.baseline == "value":
            notes["value_head"] = saved_head(self.tuning.model.value_head)
        return notes

    def batches(self, step):
        """Returns this process's micro-batches of a step, new samples or those of the step before. Raises Unusable."""
        number = step // self.cfg.updates
        if self.round != number:
            parts = []
            for first, n in micro_batches(number, self.cfg, self.compute):
                prompts = training_packs(self.prompts, self.cfg.seed, first, n)
                parts.append(([prompt for prompt in prompts for _ in range(self.cfg.group)], first))
            samples, self.drift = self.sample_all(parts)
            self.samples = [self.with_advantages(batch, rewards) for batch, rewards, _ in samples]
            if self.cfg.baseline == "value":
                whiten(self.samples, self.compute)
            self.round = number
        return self.samples

    def sample_all(self, parts):
        """Returns what sample() returns for each of parts, (prompts, number) pairs; and the largest drift so far, of
        all processes. Raises Unusable in all of them where one has a Refusal.
        """
        samples, refusal = [], None
        try:
            samples = [self.sample(prompts, (self.cfg.seed, number)) for prompts, number in parts]
        except Refusal as e:  # the others must be told before they wait for a gradient
            refusal = e
        drift = max([self.drift, *(drift for _, _, drift in samples)])
        reports = torch.zeros(self.compute.world_size, 2)
        reports[self.compute.rank] = torch.tensor([drift, refusal is not None])
        drift, is_refused = self.compute.sum(reports).amax(0).tolist()
        if refusal:
            raise Unusable(str(refusal), refusal.status)
        if is_refused:
            raise Unusable("a reward of another process is none, which says so", status=1)
        return samples, drift

    def with_advantages(self, batch, rewards):
        """Returns a batch of sample() with its "advantage" and, for PPO, the "goal" of its values."""
        cfg = self.cfg
        rewards = torch.tensor(rewards, device=self.compute.device)
        if cfg.baseline == "group":
            advantage = group_advantages(rewards, batch["is_whole"], cfg.group, cfg.scale)
            return batch | {"advantage": advantage}
        advantage = value_advantages(rewards, batch["value"], batch["targets"] != -100, cfg.gae)
        return batch | {"advantage": advantage, "goal": batch["value"] + advantage}

    def values(self, batch):
        """Returns what the value layer reads from the state before each token, (rows, T) float32. No gradient flows
        back into the states.
        """
        model = self.tuning.model
        return read_head(model.value_head, model.hidden(batch["idx"]).detach())

    def sample(self, prompts, seed):
        """Samples an answer to each of prompts.

        Returns three things: a batch of "idx", "targets", "old", "reference" and for PPO "value", each (rows, T), and
        "is_whole" (rows,), whether an answer has come to its end; the rewards, a list; and the drift, the largest
        difference of log p between the sampler, token by token, and the model that learns.
        """
        model, tokenizer = self.tuning.model, self.tuning.tokenizer
        answers = draw(model, tokenizer, prompts, self.cfg.max_new_tokens, seed, self.compute)
        batch, sampled = answer_batch(prompts, answers)
        batch = to(batch, self.compute.device)
        with evaluating(model), self.compute.autocast():
            batch["old"] = token_logps(model, batch)
            if self.cfg.baseline == "value":
                batch["value"] = self.values(batch)
            with lora.switched_off(model):
                batch["reference"] = token_logps(model, batch)
        drift = (batch["old"].cpu() - sampled).abs().max().item()
        rewards = [
            self.reward(prompt, tokenizer.decode_more(answer.ids))
            for (prompt, _), answer in zip(prompts, answers)
        ]
        return batch, rewards, drift

    def reward(self, prompt, answer):
        try:
            value = self.judge(prompt, answer)
        except Exception as e:  # in somebody's own reward; what was learned so far is saved nevertheless
            raise Refusal(f"reward={self.cfg.reward} fails with {e!r:.200} for {answer!r:.80}", status=1)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise Refusal(f"reward={self.cfg.reward} gives {value!r:.40} for {answer!r:.80}", status=1)
        return float(value)

    def loss(self, model, batch):
        loss = policy_loss(token_logps(model, batch), batch, self.cfg.clip, self.cfg.kl)
        if self.cfg.baseline == "value":
            loss = loss + value_loss(self.values(batch), batch, self.cfg.clip)
        return loss

    @staticmethod
    def count(batch):
        """Returns the number of samples of a batch, a tensor on its device."""
        return torch.tensor(len(batch["idx"]), device=batch["idx"].device)

    def validate(self, tokens=None):
        """Returns figures of one sample for each held-out prompt: reward, the mean, and val_loss, minus that; kl, in
        nats a token; cut_off, the share of samples that were cut off, whose reward counts as the lowest one, or as
        0 where that is lower; drift, see sample(), the largest of these samples and of all that were learned from;
        and for the built-in task story, nats a toy story.
        """
        size = self.cfg.rows
        starts = range(0, len(self.val_prompts), size)
        samples, drift = self.sample_all([(self.val_prompts[i : i + size], i) for i in starts])
        rewards, whole = [], []
        divergence, n_tokens = 0.0, 0
        for batch, batch_rewards, _ in samples:
            is_sampled = batch["targets"] != -100
            divergence += (k3(batch["old"], batch["reference"]) * is_sampled).sum().item()
            n_tokens += is_sampled.sum().item()
            rewards += batch_rewards
            whole += batch["is_whole"].tolist()
        # else a model that never ends its texts, which costs nothing in training, might be the best one
        reward = float(np.where(whole, rewards, min(0, *rewards)).mean())
        figures = {
            "val_loss": 0.0 - reward,  # not -0.0, which would be printed as such
            "reward": reward,
            "kl": divergence / max(1, n_tokens),
            "cut_off": 1 - float(np.mean(whole)),
            "drift": drift,
        }
        if self.cfg.dataset == self.cfg.built_in:
            model, tokenizer = self.tuning.model, self.tuning.tokenizer
            stories = [tokenizer.encode(text) for text in toy_stories.texts(STORIES, seed=1)]
            nats = document_nats(model, stories, tokenizer, self.compute)
            figures["story"] = float(np.mean([story.sum() for story in nats]))
        return figures

    def line(self, figures):
        return (
            f"reward {figures['reward']:.4f} on {len(self.val_prompts)} held-out prompts, {figures['kl']:.4f} nats a "
            f"token from the reference, {figures['cut_off']:.1%} of the samples cut off; the sampler's log p "
            f"differs by up to {figures['drift']:.1e}"
        )

    def built_in_lines(self):
        """Returns a line about how well stories are told."""
        return finetune_lora.story_line(self.tuning.model, self.tuning.tokenizer, self.compute)


def main(cfg):
    finetune_lora.main(cfg, Reinforcing)


if __name__ == "__main__":
    run(main, Config)
