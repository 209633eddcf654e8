"""What bench.py learning runs: nanoGPT's model and ours, trained on toy stories of which none is seen twice."""

from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise

import numpy as np
import torch
from tqdm import tqdm

import toy_stories
import train
from benches.step import build_trained
from data import micro_batches, to, tokens_a_step, training_rows
from interop import nanogpt
from optim import get_lr, make_optimizers, set_rate
from race import time_rival
from score import evaluate
from shards import id_type
from tokenizer import Tokenizer

NANOGPT = "nanoGPT"
START = 5  # first steps, in which models are compiled and graphs captured: they are timed by themselves
VALIDATION = 2000  # stories that are held out
TOLD = 10**4  # stories that are told at a time


def fresh_stories(n_tokens, vocab_size, seed):
    """Returns (at least n_tokens training ids, validation ids, tokenizer) of toy stories, each told once."""
    texts = (text for text, _ in toy_stories.stories(10**12, seed))
    held_out = list(islice(texts, VALIDATION))
    told = list(islice(texts, TOLD))
    tokenizer = Tokenizer.train(told, vocab_size)

    def encode(texts):
        ids = chain.from_iterable((*ids, tokenizer.eot) for ids in tokenizer.encode_batch(texts))
        return np.fromiter(ids, id_type(tokenizer.vocab_size))

    parts = []
    with tqdm(total=n_tokens, unit="token", dynamic_ncols=True, disable=None, desc="stories") as bar:
        while sum(map(len, parts)) < n_tokens:
            parts.append(encode(told))
            bar.update(len(parts[-1]))
            told = list(islice(texts, TOLD))
    return np.concatenate(parts), encode(held_out), tokenizer


def learn(update, optimizers, validate, cfg, device):
    """Calls update(step) for cfg.max_iters steps, at cfg's rates. Returns the seconds of the first START steps, and
    [(steps so far, seconds of those after START, validation loss)] at every eval_interval and at the end.
    """

    def make_steps(first, end):
        for step in range(first, end):
            set_rate(optimizers, get_lr(step, cfg))
            update(step)

    start = time_rival(partial(make_steps, 0, START), device)
    ends = [n for n in range(cfg.eval_interval, cfg.max_iters, cfg.eval_interval) if n > START]
    seconds, points = 0.0, []
    for first, end in pairwise([START, *ends, cfg.max_iters]):
        seconds += time_rival(partial(make_steps, first, end), device)
        points.append((end, seconds, validate()))
    return start, points


def nanogpt_rates(cfg):
    """Returns cfg with nanoGPT's rates, whose schedule ends with the run: those of its
    config/train_shakespeare_char.py, but from GPT-2's width on with the highest rate of its train.py.
    """
    highest = 1e-3 if cfg.n_embd < 768 else 6e-4
    settings = dict(schedule="cosine", learning_rate=highest, min_lr=highest / 10, lr_decay_iters=0)
    return replace(cfg, max_iters=cfg.steps, eval_interval=cfg.steps, warmup_iters=100, **settings)


class Lesson:
    """The same toy stories for nanoGPT's model and for ours, none seen twice. cfg has the tokenizer's vocab_size."""

    def __init__(self, cfg, compute):
        n_tokens = cfg.steps * tokens_a_step(cfg)
        # two rows more, as an epoch starts somewhere in the first row
        self.ids, self.held_out, tokenizer = fresh_stories(
            n_tokens + 2 * cfg.block_size, cfg.vocab_size, cfg.seed
        )
        self.cfg = replace(cfg, vocab_size=tokenizer.vocab_size)
        self.compute = compute

    def batches(self, step):
        """Returns the micro-batches of a step, on the device."""
        cfg = self.cfg
        spans = micro_batches(step, cfg, self.compute)
        rows = [training_rows(self.ids, cfg.block_size, cfg.seed, first, n) for first, n in spans]
        return [to(batch, self.compute.device) for batch in rows]

    def loss_of(self, model):
        """Returns a model's loss on the held-out stories, nats a token."""
        cfg = self.cfg
        return evaluate(
            model, self.held_out, cfg.block_size, cfg.batch_size, self.compute, cfg.eval_tokens
        )

    def teach_nanogpt(self, module):
        """Trains nanoGPT's model for cfg.steps. Returns what learn returns."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        update, model, optimizer = nanogpt.make_update(module, cfg, self.compute, cfg.learning_rate)

        def update_on(step):
            update([(batch["idx"], batch["targets"].contiguous()) for batch in self.batches(step)])

        validate = partial(self.loss_of, nanogpt.Scored(model))
        return learn(update_on, [optimizer], validate, nanogpt_rates(cfg), self.compute.device)

    def teach_ours(self):
        """Trains our model for cfg.share of cfg.steps. Returns what learn returns."""
        n_steps = max(START + 1, round(self.cfg.share * self.cfg.steps))
        cfg = replace(self.cfg, max_iters=n_steps, lr_decay_iters=0)
        model, trained = build_trained(cfg, self.compute)
        optimizers = make_optimizers(model, cfg, self.compute)
        update = train.make_step(trained, optimizers, cfg, self.compute)

        def update_on(step):
            update(batches=self.batches(step), seed=(cfg.seed, step))

        return learn(update_on, optimizers, partial(self.loss_of, model), cfg, self.compute.device)


def bench_learning(cfg, compute):
    """Trains nanoGPT's model for --steps, then ours for --share of them, on the same toy stories, none seen twice.

    Both have the same rows and tokens, and a schedule of their own length. start_s is the time of the first five
    steps, in which models are compiled, s that of the others, both without evaluations. reached_s is when the
    validation loss was first as low as nanoGPT's last, of_time that as a share of nanoGPT's time.
    """
    module = nanogpt.load(cfg.nanogpt)
    lesson = Lesson(cfg, compute)
    runs = [
        (NANOGPT, "adamw", *lesson.teach_nanogpt(module)),
        ("ours", cfg.optimizer, *lesson.teach_ours()),
    ]
    *_, [(_, limit, goal)] = runs[0]
    rows = []
    for name, optimizer, start, points in runs:
        steps, seconds, loss = points[-1]
        reached = (point for point in points if point[2] <= goal)
        reached_step, reached_s, _ = next(reached, (None, None, None))
        rows.append(
            {
                "by": name,
                "optimizer": optimizer,
                "steps": steps,
                "start_s": start,
                "s": seconds,
                "tokens_per_s": (steps - START) * tokens_a_step(cfg) / seconds,
                "val_loss": loss,
                "reached_step": reached_step,
                "reached_s": reached_s,
                "of_time": reached_s / limit if reached_s else None,
            }
        )
    return rows
