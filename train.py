"""Trains a model and writes it, its log and a loss plot to out_dir.

    python train.py                                                 the toy stories, one to three minutes on two cores
    python train.py configs/tiny.toml --dataset=ts --out_dir=out/ts what prepare.py wrote to data/ts
    python train.py --out_dir=out/ts --init_from=resume             goes on with a stopped run, to the bit
    torchrun --nproc_per_node=2 train.py                            the same run, its rows shared by two processes

Ctrl-C, SIGTERM and SIGHUP end a run after the step at hand, with a checkpoint. train_step() is one
update, fit() is the loop, and Pretraining is the task that it trains on; finetune_lora.py has another.
"""

import contextlib
import importlib.util
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile

from config import Refusal, check_choice, check_range, new_lines, run

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import checkpoint_file
import folders
import rmsnorm
from checkpoint_file import RunState
from data import count_targets, micro_batches, prompt_ids, to, tokens_a_step, training_rows
from device import StopAfterStep, Work, name_of, one_order, one_shape, resolve
from generate import generate
from gradients import GradientSum
from graphs import TrainingStep, captures_steps, graph_message
from log import Log, Meter, evaluation_line, plot
from memory import check_training_memory
from model import ModelConfig, Transformer, model_config
from optim import (
    get_lr,
    load_optimizers,
    make_optimizers,
    make_scaler,
    muon_dtype,
    plan_rates,
    saved_schedule,
    set_rate,
    step_unless,
)
from rmsnorm import choose_rmsnorm
from runs import (
    alone_in_out_dir,
    check_start,
    check_tokenizer,
    go_on_after_restart,
    is_in_the_way,
    launch,
    open_data,
    open_start,
)
from score import bits_per_nat, evaluate, expert_figures, expert_line, floor_line, next_token_loss
from sharding import shard, whole
from sizes import flops_per_token, size_text, step_flops


@dataclass
class TrainConfig:
    # fmt: off
    out_dir: str = "out"                    # where ckpt.pt, ckpt_best.pt, log.jsonl and loss.png go
    dataset: str = "toy"                    # the NAME of data/NAME, made by prepare.py; toy is made here
    init_from: str = "scratch"              # scratch | resume (from out_dir) | a checkpoint | hf:FOLDER_OR_NAME
    overwrite: bool = False                 # move an out_dir that is in the way aside
    eval_only: bool = False                 # only print the loss on the whole validation split
    eval_interval: int = 100                # steps between evaluations, samples and checkpoints
    save_minutes: float = 10.0              # minutes between checkpoints where evaluations are further apart
    eval_tokens: int = 65536                # validation tokens in an evaluation, always the same ones; 0 = all
    log_interval: int = 10                  # steps between lines of log.jsonl
    batch_size: int = 16                    # rows of block_size tokens in a micro-batch
    gradient_accumulation_steps: int = 1    # micro-batches in a step, of all processes together
    max_iters: int = 700                    # steps
    optimizer: str = "muon"                 # muon (hidden matrices; AdamW for the rest) | adamw
    learning_rate: float = 2.5e-3           # the highest; Muon's updates are scaled to AdamW's size
    embd_lr_scale: float = 8.0              # muon: times the rate for embeddings, head, gains and biases
    min_lr: float = 0.0                     # the learning rate at the end
    warmup_iters: int = 20                  # steps of linear warm-up
    lr_decay_iters: int = 0                 # the step where min_lr is reached: 0 = max_iters
    schedule: str = "linear"                # after warm-up: cosine | linear (constant, then down in a straight line)
    decay_frac: float = 0.7                 # linear: the share of the steps that go down
    weight_decay: float = 0.1               # on matrices; never on gains and biases
    beta1: float = 0.9                      # AdamW's
    beta2: float = 0.95                     # AdamW's
    momentum: float = 0.95                  # Muon's
    grad_clip: float = 1.0                  # largest gradient norm; 0 = any
    balance: float = 0.01                   # moe: weight of the loss that spreads tokens over experts
    loss: str = "plain"                     # plain | chunked (never all logits at once: less memory, a little slower)
    gradient_checkpointing: bool = False    # recompute blocks in the backward pass: less memory, more time
    device: str = "auto"                    # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"                     # of products: auto | float32 | tf32 | bfloat16 | float16; kept on resume
    compile: str = "auto"                   # torch.compile: auto | true | false
    rmsnorm: str = "auto"                   # RMSNorm by: auto | torch | cpu | cuda (our kernel)
    seed: int = 1337                        # of weights, batches and dropout
    start: str = ""                         # what the sample at each evaluation starts with, \n is a new line
    wandb_log: bool = False                 # log to Weights & Biases too
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        self.start = new_lines(self.start)
        if not self.out_dir:
            raise ValueError("out_dir is empty: name a folder")
        check_range(self, "at least 1", "batch_size", "gradient_accumulation_steps", "max_iters")
        check_range(self, "at least 1", "eval_interval", "log_interval")
        check_range(self, "at least 0", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay")
        check_range(self, "at least 0", "eval_tokens", "grad_clip", "balance", "seed")
        check_range(self, "at least 0 and below 1", "beta1", "beta2", "momentum")
        check_range(self, "above 0", "learning_rate", "embd_lr_scale", "save_minutes")
        check_range(self, "above 0 and at most 1", "decay_frac")
        check_choice(self, "optimizer", ("muon", "adamw"))
        check_choice(self, "schedule", ("cosine", "linear"))
        check_choice(self, "loss", ("plain", "chunked"))
        check_choice(self, "rmsnorm", rmsnorm.SETTINGS)
        rate = self.learning_rate * max(1, self.embd_lr_scale)
        if rate * max(1, self.weight_decay) > 1e36:  # float32 ends at 3e38
            raise ValueError(
                "learning_rate, that times embd_lr_scale, and that times weight_decay, can be 1e36 at most"
            )
        if self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr must be at most learning_rate={self.learning_rate}, not {self.min_lr}"
            )
        if self.wandb_log and not importlib.util.find_spec("wandb"):
            raise ValueError("wandb_log needs wandb: pip install wandb; --no-wandb_log does without")

    @property
    def only_prints(self):
        """Whether a run writes nothing: see config.run."""
        return self.eval_only


@dataclass
class Config(TrainConfig, ModelConfig):
    shard: str = "none"  # several processes: none (each has all weights) | full (each its part: FSDP)

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "shard", ("none", "full"))


# -----------------------------------------------------------------------------------------------------
# One step


def train_step(
    model,
    optimizers,
    batches,
    compute,
    seed=(0, 0),
    grad_clip=0.0,
    scaler=None,
    loss_fn=next_token_loss,
    count=count_targets,
):
    """Makes one update from micro-batches, dicts of the model's keyword arguments; returns (loss,
    gradient norm).

    loss_fn(model, batch) is a sum over targets. It is divided once, by the count of targets in all
    micro-batches of all processes, so that k micro-batches weigh their targets as one large batch would.
    Dropout is drawn from the seed (*seed, micro-batch); with seed=None it is not seeded. A step whose loss or
    norm is not finite changes nothing. Both results are tensors on the device: nothing here waits for it.
    """
    total = sum(count(batch) for batch in batches)
    total = compute.sum(torch.as_tensor(total, device=compute.device), in_step=True)
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    loss = torch.zeros((), device=compute.device)
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        if compute.shards:  # one message a step, not one a micro-batch
            model.set_requires_gradient_sync(is_last)
        if seed is not None:
            seed_dropout(seed, compute.rank * len(batches) + i)
        with compute.autocast():
            micro_loss = loss_fn(model, batch) / total
        loss += micro_loss.detach()
        if scaler:
            micro_loss = scaler.scale(micro_loss)
        if is_last and compute.world_size > 1 and not compute.shards:
            with GradientSum(model, params, compute, loss) as gradients:
                micro_loss.backward()
            loss = gradients.finish()
        else:
            micro_loss.backward()

    for p in params:
        if p.grad is None:  # an expert without tokens: the same update whether another process has some
            p.grad = torch.zeros_like(p)
    if compute.shards:  # which has added up the gradients
        loss = compute.sum(loss, in_step=True)
    if scaler:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf))

    step_unless(optimizers, ~(loss.isfinite() & norm.isfinite()))
    if scaler:  # it saw the gradients in unscale_, and halves its scale after one that is not finite
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loss, norm


def seed_dropout(seed, micro):
    """Seeds what a micro-batch draws, by its number and the step's seed, a tuple of numbers."""
    torch.manual_seed(int(np.random.SeedSequence((*seed, micro)).generate_state(1)[0]))


def make_step(model, optimizers, cfg, compute, task=None, scaler=None):
    """Returns a function step(batches=, seed=), which is train_step for a task (None: pre-training). It is one
    CUDA graph where the task's batches all have one shape and a graph is possible.
    """
    settings = dict(compute=compute, grad_clip=cfg.grad_clip, scaler=scaler)
    if task is not None:
        settings |= dict(loss_fn=task.loss, count=task.count)
    step = partial(train_step, model, optimizers, **settings)
    is_static = task is None or getattr(task, "is_static", False)
    if is_static and compute.device.type == "cuda":
        step = one_shape()(step)
    if compute.compile and compute.device.type == "cpu":
        step = one_order()(step)
    if is_static and captures_steps(cfg, compute):
        return TrainingStep(step, optimizers, seed_dropout, compute.device)
    return step


def is_usable(loss, norm, scaler):
    """Returns whether a run can go on after a step. A norm that is not finite is dealt with by a loss scaler."""
    return math.isfinite(loss) and (scaler is not None or math.isfinite(norm))


# -----------------------------------------------------------------------------------------------------
# The loop


class Diverged(Refusal):
    """A run whose loss is no longer finite."""

    def __init__(self, message):
        super().__init__(message, status=1)


class Unusable(Refusal):
    """What a task that learns from its own samples cannot go on from, raised in all processes at once."""


def fit(task, model, cfg, compute, resumed=None):
    """Trains a model on a task to cfg.max_iters.

    task: has batches(step), loss(model, batch), count(batch), validate(), save(name, state), preview()
    and flops_per_token, as Pretraining below has them. model may be wrapped by torch.compile. resumed: a
    loaded checkpoint to go on from. Raises Diverged when a loss is not finite; what was saved before stays.
    batches and validate may raise Unusable: all steps are saved then.
    """
    loop = Loop(task, model, cfg, compute, resumed)
    model.train()
    with StopAfterStep(compute) as stop, loop.bar, compute.refusing_loss():
        while True:
            if loop.is_evaluation_due:
                loop.validate()
            is_stopped, is_late = stop.agree(loop.is_save_due)
            if is_late:
                loop.save_meanwhile()
            if is_stopped:
                loop.stop(stop)
            if loop.state.step >= cfg.max_iters:
                break
            loop.step()
    loop.log.close()


class Loop:
    """What fit keeps from step to step, and what it does at each."""

    def __init__(self, task, model, cfg, compute, resumed):
        self.task = task
        self.cfg = cfg
        self.compute = compute
        self.optimizers = make_optimizers(checkpoint_file.unwrap(model), cfg, compute)
        self.scaler = make_scaler(compute)
        self.update = make_step(model, self.optimizers, cfg, compute, task, self.scaler)
        self.state = RunState(optimizers=self.optimizers, scaler=self.scaler)
        schedule = None
        if resumed:
            self.state.step = resumed["step"]
            self.state.best_val_loss = resumed["best_val_loss"]
            self.state.val_loss = resumed["val_loss"]
            self.state.losses = list(resumed["losses"])
            load_optimizers(self.optimizers, self.scaler, resumed, cfg)
            schedule = saved_schedule(resumed, cfg)
            resumed.pop("optimizers")  # of weights in shards a process keeps its part alone
        for line in plan_rates(self.state.step, schedule, cfg):
            if compute.is_main:
                print(line)
        self.first_step = self.state.step
        self.saved_step = self.state.step if resumed else -1
        self.saved_at = time.monotonic()
        self.log = Log(cfg, self.saved_step, compute)
        self.meter = Meter(task, compute)
        self.bar = tqdm(
            total=cfg.max_iters,
            initial=self.state.step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=None if compute.is_main else True,
        )
        self.unread = []  # (loss, norm) tensors of the steps since the last line of the log

    @property
    def is_evaluation_due(self):
        """Whether to evaluate before the next step; a resumed run did so before it stopped."""
        step = self.state.step
        if step == self.first_step == self.saved_step:
            return False
        return step % self.cfg.eval_interval == 0 or step == self.cfg.max_iters

    @property
    def is_save_due(self):
        return time.monotonic() - self.saved_at >= 60 * self.cfg.save_minutes

    def step(self):
        """Makes one update, and logs it where a line is due."""
        cfg, state = self.cfg, self.state
        lr = get_lr(state.step, cfg)
        set_rate(self.optimizers, lr)
        began = time.monotonic()
        try:
            batches = self.task.batches(state.step)
        except Unusable as e:
            self.end(e)
        self.unread.append(self.update(batches=batches, seed=(cfg.seed, state.step)))
        if self.compute.group and state.step == self.first_step:  # the longest: it compiles and connects
            self.compute.group.hurry(2 * (time.monotonic() - began))
        state.step += 1
        self.meter.add(batches)
        self.bar.update()
        if state.step % cfg.log_interval == 0 or state.step == cfg.max_iters:
            norm = self.read_steps()
            speed = self.meter.measure()
            loss = sum(state.losses) / len(state.losses)
            self.log.write({"step": state.step, "loss": loss, "lr": lr, "grad_norm": norm, **speed})
            self.bar.set_postfix({"loss": f"{loss:.3f}", **speed})
            state.losses = []

    def read_steps(self):
        """Reads what the device computed since the last call into state.losses; returns the last gradient norm."""
        results = read_figures(self.unread)
        for step, (loss, norm) in enumerate(results, self.state.step - len(results)):
            if not is_usable(loss, norm, self.scaler):
                raise Diverged(
                    f"the loss is {loss} and its gradient norm {norm} at step {step}; {advice(self.cfg)}"
                )
            self.state.losses.append(loss)
        self.unread.clear()
        return results[-1][1] if results else None

    def validate(self):
        """Validates, logs and saves, and prints a sample."""
        self.read_steps()
        with self.meter.paused():
            try:
                figures = self.task.validate()
            except Unusable as e:
                self.end(e)
            self.record(figures)
            preview = self.task.preview() if self.compute.takes_part else ""
            if self.compute.is_main:
                line = evaluation_line(self.state.step, figures, self.meter.speed)
                self.bar.write(line, file=sys.stderr)
                self.bar.write(f"{preview}\n", file=sys.stderr)
            self.compute.barrier()  # the others wait for what the first one writes

    def record(self, figures):
        """Logs the figures of an evaluation and saves the last checkpoint, and the best one where this is it."""
        state = self.state
        if not math.isfinite(figures["val_loss"]):
            message = f"the validation loss is {figures['val_loss']} at step {state.step}"
            raise Diverged(f"{message}; {advice(self.cfg)}")
        is_best = figures["val_loss"] < state.best_val_loss
        state.val_loss = figures["val_loss"]
        state.best_val_loss = min(state.best_val_loss, state.val_loss)
        self.log.write({"step": state.step, **figures})
        if state.step > self.first_step:
            # ckpt.pt last: whoever goes on from it finds the log and the best one as it says
            if is_best and self.compute.takes_part:
                self.task.save("ckpt_best.pt", replace(state, optimizers=[], scaler=None))
            self.save()

    def save(self):
        """Writes the last checkpoint, from the first process."""
        if self.compute.takes_part:
            self.task.save("ckpt.pt", self.state)
        self.saved_step = self.state.step
        self.saved_at = time.monotonic()

    def save_meanwhile(self):
        """Writes a checkpoint between two evaluations."""
        if self.state.step > self.saved_step:
            self.read_steps()
            with self.meter.paused():
                self.save()
                self.compute.barrier()

    def stop(self, stop):
        """Ends the run after a signal: saves it, and raises a Refusal that says how it goes on."""
        self.read_steps()
        if self.state.step > self.saved_step:
            self.save()
        self.compute.barrier()  # torchrun ends all processes soon after the first has ended
        script = os.path.basename(sys.argv[0])
        command = f"python {script} --out_dir={self.cfg.out_dir} --init_from=resume"
        raise Refusal(
            f"stopped at step {self.state.step} by {stop.name}; {command} goes on", status=stop.status
        )

    def end(self, e):
        """Saves what was learned before it raises e, an Unusable."""
        if self.state.step <= max(self.saved_step, self.first_step):
            raise e
        self.read_steps()
        self.save()
        self.compute.barrier()
        kept = f"{self.cfg.out_dir} has all steps up to {self.state.step}: --init_from=resume goes on"
        raise Refusal(f"{e}; {kept}", e.status)


def read_figures(steps):
    """Returns [(loss, gradient norm)] as numbers; steps has them as tensors on a device, which is waited for once."""
    return torch.stack([torch.stack(step) for step in steps]).tolist() if steps else []


def advice(cfg):
    """Returns what to do after a loss that is not finite."""
    saved = f"{cfg.out_dir} has no checkpoint yet"
    if folders.holds_run(cfg.out_dir, ["ckpt.pt", "adapter.pt"]):
        saved = f"the last checkpoint in {cfg.out_dir} is as it was"
    return f"try a lower --learning_rate or a longer --warmup_iters; {saved}"


# -----------------------------------------------------------------------------------------------------
# The task


class Pretraining:
    """Predicting every next token of data/NAME: all that fit() asks of a task.

    model: the plain Transformer; evaluated: the same, perhaps compiled.
    """

    loss = staticmethod(next_token_loss)
    count = staticmethod(count_targets)
    is_static = True  # all its batches have one shape

    def __init__(self, cfg, model, evaluated, tokenizer, meta, data, compute):
        self.cfg = cfg
        self.model = model
        self.evaluated = evaluated
        self.tokenizer = tokenizer
        self.meta = meta
        self.data = data
        self.compute = compute
        self.flops_per_token = flops_per_token(model, cfg.block_size)
        self.bits_per_byte = bits_per_nat(meta["splits"]["val"])  # of a loss of one nat a token

    def batches(self, step):
        """Returns this process's micro-batches of a step, on its device."""
        rows = micro_batches(step, self.cfg, self.compute)
        T = self.cfg.block_size
        return [
            to(training_rows(self.data["train"], T, self.cfg.seed, first, n), self.compute.device)
            for first, n in rows
        ]

    def validate(self, tokens=None):
        """Returns the figures of the validation split on about that many tokens, by default eval_tokens; 0 is
        all. Those of experts are lists, with a number a layer.
        """
        cfg = self.cfg
        tokens = cfg.eval_tokens if tokens is None else tokens
        loss = evaluate(
            self.evaluated, self.data["val"], cfg.block_size, cfg.batch_size, self.compute, tokens
        )
        experts = expert_figures(
            self.model, self.data["val"], cfg.block_size, cfg.batch_size, self.compute
        )
        return {"val_loss": loss, "val_bits_per_byte": loss * self.bits_per_byte, **experts}

    def save(self, name, state):
        """Writes a checkpoint of this name to out_dir."""
        path = os.path.join(self.cfg.out_dir, name)
        config = asdict(self.cfg) | {"task": "pre-training", "launch": launch()}
        checkpoint_file.save(path, self.model, self.tokenizer, config, state)

    def preview(self):
        """Returns a sample to look at."""
        cfg = self.cfg
        prompt = prompt_ids(self.tokenizer, cfg.start)
        max_new_tokens = min(cfg.block_size, 200)
        ends = self.tokenizer.ends
        options, precision = {"stop": ends}, contextlib.nullcontext()
        if self.compute.shards:
            # all processes must take equally many steps, whatever each of them draws, so nothing stops a text;
            # a graph cannot hold their messages; weights are sent rounded, as in training
            options, precision = {"graph": False}, self.compute.autocast()
        with precision:
            *_, [row] = generate(self.model, [prompt], max_new_tokens, seed=cfg.seed, **options)
        ids = list(takewhile(lambda id: id not in ends, row.ids))
        return cfg.start + self.tokenizer.decode_more(ids)


# -----------------------------------------------------------------------------------------------------
# From the command line


def main(cfg):
    with alone_in_out_dir(cfg):
        report(pretrain(cfg))


def pretrain(cfg):
    """Trains as cfg says; with eval_only only gets ready to. Returns the Pretraining."""
    go_on_after_restart(cfg)
    start, cfg = open_start(cfg)
    resume = cfg.init_from == "resume"
    moves_aside = is_in_the_way(cfg)
    width = 0 if cfg.eval_only else cfg.n_embd
    shards = cfg.shard == "full"
    steps = 0 if cfg.eval_only else cfg.max_iters - (start.state["step"] if resume else 0)
    work = Work(step_flops(cfg), steps, is_static=True, dropout=cfg.dropout)
    compute = resolve(
        cfg.device, cfg.dtype, cfg.compile, join=True, train_width=width, shard=shards, work=work
    )
    cfg.dtype = compute.dtype_name  # a resumed run keeps it, on another processor too
    folder, meta, data, tokenizer = open_data(cfg, compute)
    cfg.vocab_size = tokenizer.vocab_size
    check_training_memory(cfg, compute)
    if compute.compile and compute.device.type == "cpu":
        cfg.compile = "true"  # which a resumed run keeps too, as it goes on to the bit

    torch.manual_seed(cfg.seed)
    if start:
        check_tokenizer(start, tokenizer, folder, cfg)
        if not resume:
            start.crop(cfg)
        model, _ = start.restore()
        start.state.pop("model")  # else both would be held until the end
    else:
        model = Transformer(model_config(cfg))
    trained = place(model, cfg, compute)
    rmsnorm_message = choose_rmsnorm(model, cfg.rmsnorm, compute)
    if compute.is_main:
        print_setup(model, data, rmsnorm_message, cfg, compute)
        if resume and steps <= 0 and not cfg.eval_only:
            print(f"{start.path} is at step {start.state['step']} already; a larger --max_iters goes on")

    if not cfg.eval_only:  # which writes no samples
        check_start(tokenizer, cfg)
    # a processor evaluates sooner than each shape of an evaluation is compiled
    evaluated = model if compute.device.type == "cpu" else trained
    task = Pretraining(cfg, model, evaluated, tokenizer, meta, data, compute)
    if moves_aside and compute.is_main:
        folders.move_aside(cfg.out_dir, folders.others_in(cfg.out_dir))
    if not cfg.eval_only:
        fit(task, trained, cfg, compute, start.state if resume else None)
    return task


def print_setup(model, data, rmsnorm_message, cfg, compute):
    """Prints how a run computes, and how much."""
    muon_message = f", Muon in {name_of(muon_dtype(compute))}" if cfg.optimizer == "muon" else ""
    steps_message = "" if cfg.eval_only else graph_message(cfg, compute)
    print(f"{compute.message}{muon_message}{rmsnorm_message}{steps_message}")
    print(
        f"{size_text(model)}, {len(data['train']):,} training tokens, {tokens_a_step(cfg):,} tokens a step"
    )
    if cfg.window >= cfg.block_size:
        print(f"window={cfg.window} hides nothing in block_size={cfg.block_size}")


def place(model, cfg, compute):
    """Sets a Transformer's switches as cfg says and moves it to its device, or shares it out among processes. Returns
    what to train: the model, perhaps compiled.
    """
    model.gradient_checkpointing = cfg.gradient_checkpointing
    model.chunked_loss = cfg.loss == "chunked"
    model.balance = cfg.balance
    if compute.shards:
        if compute.compile:  # between their messages
            for block in model.blocks:
                block.compile()
        shard(model, compute)
        return model
    model.to(compute.device)
    return torch.compile(model) if compute.compile else model


def report(task):
    """Prints what was learned, on the whole validation split, and draws the losses."""
    cfg, compute = task.cfg, task.compute
    figures = task.validate(tokens=0)
    floor = ""
    if task.meta["source"] == "toy" and compute.takes_part:
        floor = floor_line(task.evaluated, task.tokenizer, task.data["val"], compute)
    if compute.is_main:
        print(
            f"whole validation split, in windows of {cfg.block_size} tokens: {figures['val_loss']:.4f} nats a token, "
            f"{figures['val_bits_per_byte']:.4f} bits a byte"
        )
        if "expert_share" in figures:
            print(expert_line(figures, len(task.data["val"]), cfg.balance))
        if floor:
            print(floor)
        if not cfg.eval_only:
            print(plot(cfg.out_dir))
            print(f"next: python sample.py --out_dir={cfg.out_dir}")
    compute.close()


if __name__ == "__main__":
    run(main, Config)
