"""Teaches a trained model to answer: supervised fine-tuning of LoRA adapters (lora.py), or with --rank=0
of all its weights.

    python finetune_lora.py --init_from=out/demo                                 the morals of the toy stories
    python finetune_lora.py --init_from=out/ts --dataset=rows.jsonl --out_dir=out/ts-lora
    python finetune_lora.py --out_dir=out/ts-lora --merge                        adapter and base as one checkpoint
    python sample.py --adapter=out/ts-lora --start="Why is the sky blue?"

A row is an object with prompt and response; with instruction, output and perhaps input (Alpaca); with
messages, each with a role (system, user, assistant) and content; with conversations (ShareGPT); or with
prompt and completion, texts or lists of messages (TRL): see messages.py. Text is learned as it stands. The
loop is train.py's fit, so that --init_from=resume, signals, torchrun and the log work as they do there.
Another kind of tuning (tuning.py) has its own rows and loss.
"""

import math
from dataclasses import dataclass
from functools import partial

from config import Refusal, check_range, new_lines, run

# isort: split
import numpy as np

import folders
import lora
import toy_stories
from chat import has_own_template, start_of_answer
from data import (
    AS_IT_STANDS,
    MODELS_OWN,
    STRIPPED,
    by_text_rule,
    count_targets,
    evenly,
    micro_batches,
    to,
)
from examples import Source, find_encoded
from generate import generate
from lenses import probes
from log import PANELS, plot
from messages import conversations
from rows import packed_batch, split_rows, training_packs
from runs import alone_in_out_dir
from score import completion_nats, floor_line, mean_nats, next_token_loss
from sizes import size_text
from train import TrainConfig, fit
from tuning import FIXED, merge, open_tuning


@dataclass
class Config(TrainConfig, lora.LoRAConfig):
    # fmt: off
    init_from: str = "out"                  # a checkpoint to start from, hf:FOLDER_OR_NAME | resume (from out_dir)
    out_dir: str = "out/lora"               # where adapter.pt, log.jsonl and loss.png go; with --rank=0 ckpt.pt
    dataset: str = "moral"                  # moral (made here) | a .json .jsonl .csv .parquet file | hf:NAME
    val_dataset: str = ""                   # held-out rows, where they are a file of their own, or a dataset of the hub
    val_fraction: float = 0.1               # of the rows; held out where val_dataset is empty
    template: str = ""                      # text with {prompt} in it, \n a new line; empty: the base's or the rows'
    merge: bool = False                     # write adapter and base as out_dir/ckpt.pt, and stop
    start: str = ""                         # the prompt of the sample, \n a new line; empty: the first held-out one
    eval_interval: int = 50                 # steps between evaluations, samples and checkpoints
    eval_tokens: int = 16384                # of held-out rows looked at meanwhile, always the same ones; 0 = all
    max_length: int = 0                     # tokens a row, and the most of an example; 0 = the base's context
    batch_size: int = 8                     # rows in a micro-batch, each with as many examples as fit
    max_iters: int = 200                    # steps
    optimizer: str = "adamw"                # adamw | muon (with --rank=0 only)
    learning_rate: float = 5e-4             # the highest one; --rank=0 wants a lower one
    weight_decay: float = 0.0               # on matrices; on adapters it pulls towards the base
    # fmt: on

    built_in = "moral"  # the dataset that is made here
    built_in_template = ""  # of its rows; "": that of their kind

    @property
    def rows(self):
        """How many rows a micro-batch has."""
        return self.batch_size

    def __post_init__(self):
        super().__post_init__()
        self.template = new_lines(self.template)
        if self.dataset == self.built_in:
            self.template = self.template or self.built_in_template
        if self.template not in ("", MODELS_OWN) and "{prompt}" not in self.template:
            raise ValueError(
                f"template must have {{prompt}} in it, where the prompt goes, not {self.template!r}"
            )
        check_range(self, "at least 0", "max_length")
        check_range(self, "above 0 and below 1", "val_fraction")
        if self.dataset == self.built_in and self.val_dataset:
            raise ValueError(f"{self.built_in} has held-out rows of its own: leave val_dataset out")
        if self.optimizer == "muon" and self.rank:
            raise ValueError(
                "muon makes each matrix's update orthogonal, which means something for W and nothing for the halves "
                "B and A of its change: use --optimizer=adamw, or --rank=0"
            )


# -----------------------------------------------------------------------------------------------------
# The built-in task: 200 stories with the moral as the answer, and 200 others held out


def moral_lines(model, tokenizer, held_out, template, compute):
    """Returns two lines: how many of the held-out morals a model knows, by two accuracies, and how well it still
    tells stories.
    """

    def story_ids(tokenizer, story):
        _, ids = start_of_answer(tokenizer, story, template)
        return ids

    morals = toy_stories.ANSWERS
    most = 1 + max(len(tokenizer.encode_more(moral)) for moral in morals)
    prompts = []
    cases = []
    for conversation in held_out:
        [(story, right, _)] = conversation.turns
        prompt = story_ids(tokenizer, story)
        if len(prompt) + most - 1 <= model.config.block_size:
            prompts.append(prompt)
            cases.append(probes.Case(story, [right, *(moral for moral in morals if moral != right)]))
    if not prompts:
        return f"block_size={model.config.block_size} is too short for a story and its moral"
    ranked = probes.ask(
        probes.Probe("moral", "", cases),
        lambda pairs: completion_nats(model, tokenizer, pairs, compute, story_ids),
    )
    *_, answers = generate(model, prompts, most, temperature=0, stop=tokenizer.ends)
    right = [case.candidates[0] for case in cases]
    is_exact = np.array([tokenizer.decode_more(row.ids) == moral for row, moral in zip(answers, right)])
    # whether the story itself does not give its moral away
    is_unsaid = np.array(
        [moral.removeprefix("So ")[:-1] not in case.context for moral, case in zip(right, cases)]
    )
    return (
        f"moral of {len(prompts)} held-out stories: answered word for word {is_exact.mean():.1%} "
        f"({is_exact[is_unsaid].sum()} of the {is_unsaid.sum()} that leave it unsaid), "
        f"the likeliest of the {len(morals)} {ranked['accuracy']:.1%} (chance {ranked['chance']:.1%})\n"
        + story_line(model, tokenizer, compute)
    )


def story_line(model, tokenizer, compute):
    """Returns a line: how well a model still tells toy stories."""
    stories = [
        id for text in toy_stories.texts(500, seed=1) for id in (*tokenizer.encode(text), tokenizer.eot)
    ]
    return floor_line(model, tokenizer, np.array(stories), compute)


# -----------------------------------------------------------------------------------------------------
# The task


class FineTuning:
    """Learning the responses of rows: what train.fit needs of a task. A class for another kind of tuning has
    another loss, and may have rows of two conversations.
    """

    kind = "fine-tuning"
    panels = PANELS  # of loss.png
    loss = staticmethod(next_token_loss)
    count = staticmethod(count_targets)
    flops_per_token = 0  # padding and prompts make MFU mean little
    conversations_per_row = 1
    fixed = FIXED  # keys that a run keeps when it goes on

    def __init__(self, tuning):
        self.tuning = tuning
        self.cfg = cfg = tuning.cfg
        self.compute = tuning.compute
        # a run that goes on, and a model that is only evaluated, keep the rule that they learned by
        is_new = not tuning.resumed and not cfg.eval_only
        self.text_rule = AS_IT_STANDS if is_new else tuning.base.text_rule
        cfg.template = cfg.template or tuning.base.template
        if not cfg.template and cfg.dataset != cfg.built_in and has_own_template(tuning.tokenizer):
            cfg.template = MODELS_OWN
        self.rows_template = cfg.template  # "": that of the rows' kind, which read() puts into cfg
        if tuning.resumed:  # encoded rows are found by the template that they were encoded with
            self.rows_template = str(tuning.resumed["config"].get("rows_template", cfg.template))
        self.read()
        if tuning.resumed and tuning.resumed["config"]["rows_sha256"] != self.rows_sha256:
            path = tuning.base.last_path
            raise Refusal(
                f"{cfg.dataset} holds other rows than when {path} was begun: give another --out_dir"
            )
        self.preview_text, self.preview_ids = self.preview_start()
        self.trained = None  # what Tuning.prepare returns, once it is called

    def read(self):
        """Finds the examples and packs of both sides, and the template where none was named."""
        cfg, tuning = self.cfg, self.tuning
        source = Source(
            cfg,
            tuning.tokenizer,
            template=self.rows_template,
            text_rule=self.text_rule,
            T=tuning.T,
            conversations_per_row=self.conversations_per_row,
        )
        encoded = find_encoded(source, self.compute.is_main)
        self.examples, self.packs, self.message = encoded.learn
        self.val_examples, self.val_packs, self.val_message = encoded.val
        cfg.template = encoded.template
        self.length = encoded.length
        self.rows_sha256 = encoded.rows_sha256

    @property
    def preview_tokens(self):
        """The most tokens that a sample may have."""
        return min(self.tuning.T, 200)

    def preview_start(self):
        """Returns (text, ids) of what a sample goes on from: the first held-out prompt, or --start. Raises Refusal."""
        if not self.cfg.start:
            return self.first_prompt()
        start = by_text_rule(self.cfg.start, self.text_rule)
        try:
            return start_of_answer(self.tuning.tokenizer, start, self.cfg.template)
        except ValueError as e:
            raise Refusal(e)

    def first_prompt(self):
        """Returns (text, ids) of what stands before the first held-out answer."""
        idx, targets = self.val_examples[0]
        ids = idx[: (targets != -100).argmax() + 1].tolist()
        return self.text_of(ids), ids

    def text_of(self, ids):
        """Returns the text of a prompt's ids, without the token that begins a text."""
        tokenizer = self.tuning.tokenizer
        starts = tokenizer.bos, tokenizer.eot
        return tokenizer.decode(ids[1:] if ids[0] in starts else ids)

    def describe(self):
        """Returns lines about the rows of both sides."""
        packs = f"in {len(self.packs):,} rows of {self.length} tokens"
        return f"{self.message}; {packs}\n{self.val_message}"

    def begin(self):
        """Is called once the model is prepared."""

    def batches(self, step):
        """Returns this process's micro-batches of a step, on its device."""
        batches = []
        for first, n in micro_batches(step, self.cfg, self.compute):
            packs = training_packs(self.packs, self.cfg.seed, first, n)
            batches.append(to(self.make_batch(packs), self.compute.device))
        return batches

    def make_batch(self, packs):
        """Returns the batch of a list of packs of the examples to learn from."""
        return packed_batch(packs, self.examples, self.length)

    def validate(self, tokens=None):
        """Returns the loss on held-out responses, on rows of about so many tokens; None: eval_tokens, 0: all rows."""
        numbers = self.val_numbers(tokens)
        loss = mean_nats(self.trained, numbers, self.val_batch, self.cfg.batch_size, self.compute)
        return {"val_loss": loss}

    def val_numbers(self, tokens):
        """Returns the numbers of the held-out packs to look at, evenly spaced. tokens: as in validate."""
        tokens = self.cfg.eval_tokens if tokens is None else tokens
        return evenly(np.arange(len(self.val_packs)), math.ceil(tokens / self.length))

    def val_batch(self, numbers):
        packs = [self.val_packs[number] for number in numbers]
        return packed_batch(packs, self.val_examples, self.length)

    def save(self, name, state):
        """Writes the adapters or the checkpoint."""
        self.tuning.save(name, state, self.notes())

    def notes(self):
        """Returns what a resumed run must know beside its config, a dict."""
        return {
            "rows_sha256": self.rows_sha256,
            "rows_template": self.rows_template,
            "text_rule": self.text_rule,
        }

    def preview(self):
        """Returns the answer to the first held-out prompt."""
        tuning = self.tuning
        *_, [row] = generate(
            tuning.model,
            [self.preview_ids],
            self.preview_tokens,
            temperature=0,
            stop=tuning.tokenizer.ends,
            past_end="recompute",
        )
        return self.preview_text + tuning.tokenizer.decode_more(row.ids)

    def report(self, moment):
        """Prints the figures on all held-out rows, and how well the built-in task is done, where that is learned."""
        figures = self.validate(0)
        if self.compute.is_main:
            print(f"{moment}: {self.line(figures)}")
        self.report_built_in(moment)

    def report_built_in(self, moment):
        """Prints how well the built-in task is done, where that is what is learned."""
        if not self.compute.is_main or self.cfg.dataset != self.cfg.built_in:
            return
        if lines := self.built_in_lines():
            print(f"{moment}: {lines}")

    def line(self, figures):
        """Returns the figures of validate() in words."""
        return f"{figures['val_loss']:.4f} nats a token of held-out responses"

    def built_in_lines(self):
        """Returns lines about how well the built-in task's held-out rows are known, or None."""
        tuning = self.tuning
        _, held_out = split_rows(self.cfg, partial(conversations, text_rule=self.text_rule))
        return moral_lines(tuning.model, tuning.tokenizer, held_out, self.cfg.template, self.compute)

    def next_command(self):
        """Returns the command to run next, once the model has learned."""
        cfg = self.cfg
        return f'sample.py --{"adapter" if cfg.rank else "out_dir"}={cfg.out_dir} --start="..."'


def main(cfg, Task=FineTuning):
    if cfg.merge:
        with folders.alone(cfg.out_dir, make=False):
            merge(cfg)
    else:
        with alone_in_out_dir(cfg):
            tune(cfg, Task)


def tune(cfg, Task):
    tuning = open_tuning(cfg, Task.kind, Task.fixed)
    cfg = tuning.cfg
    compute = tuning.compute
    task = Task(tuning)
    task.trained = tuning.prepare(task.length)
    task.begin()
    if compute.is_main:
        print_setup(task)
    if not tuning.resumed and not cfg.eval_only:
        task.report_built_in("before")  # the loss before is that of step 0
    compute.barrier()  # nothing is written to out_dir before everyone has looked at it
    if tuning.moves_aside and compute.is_main:
        folders.move_aside(cfg.out_dir, folders.others_in(cfg.out_dir))
    if not cfg.eval_only:
        fit(task, task.trained, cfg, compute, tuning.resumed)
    task.report("now" if cfg.eval_only else "after")
    if compute.is_main and not cfg.eval_only:
        print(plot(cfg.out_dir, task.panels))
        print(f"next: python {task.next_command()}")
    compute.close()


def print_setup(task):
    """Prints what is learned, and how much of the model learns it."""
    model, template = task.tuning.model, task.cfg.template
    learned, total = lora.trainable(model)
    print(task.describe())
    stripped = ", text without the space around it" if task.text_rule == STRIPPED else ""
    template = "the model's own" if template == MODELS_OWN else repr(template)
    print(f"template: {template}{stripped}")
    print(f"{learned:,} of {total:,} parameters are trained, {learned / total:.2%}")
    if model.config.mlp == "moe":
        print(f"with adapters, {size_text(model)}")


if __name__ == "__main__":
    run(main, Config)
