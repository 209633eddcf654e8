"""Trains a model and writes it, its log and a loss plot to out_dir.

    python train.py                                                        the toy stories, two to three minutes on two cores
    python train.py configs/tiny.toml --dataset=ts --out_dir=out/ts        what prepare.py wrote to data/ts
    python train.py --out_dir=out/ts --init_from=resume                    goes on with a stopped run, to the bit
    torchrun --nproc_per_node=2 train.py                                   the same run, its rows shared by two processes

Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint. Read from the bottom: main() prepares, fit() is the loop, train_step() is one update.
Fine-tuning calls fit with its own batches.
"""
import functools
import importlib.util
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import folders
import prepare
import rmsnorm
import toy_stories
from config import Refusal, convert, is_hf, run
from device import StopAfterStep, check_memory, name_of, peak_flops, resolve
from log import Log, plot
from model import HAS_CHUNKED_LOSS, ModelConfig, Transformer, choose_rmsnorm, flops_per_token, num_params, num_weights
from optim import get_lr, make_optimizers, muon_dtype
from sample import finish, generate, prompt_ids


@dataclass
class TrainConfig:
    out_dir: str = "out"                    # where ckpt.pt, ckpt_best.pt, log.jsonl and loss.png go
    dataset: str = "toy"                    # data/NAME as prepare.py made it; toy makes itself
    init_from: str = "scratch"              # scratch | resume (from out_dir) | a checkpoint to start from | hf:FOLDER_OR_NAME, one of transformers'
    overwrite: bool = False                 # move an out_dir that is in the way aside
    eval_only: bool = False                 # print the loss on the whole validation split and stop
    eval_interval: int = 100                # steps between evaluations, samples and checkpoints
    eval_tokens: int = 65536                # validation tokens looked at meanwhile, always the same ones; 0 = all
    log_interval: int = 10                  # steps a line of log.jsonl
    batch_size: int = 16                    # rows of block_size tokens in a micro-batch
    gradient_accumulation_steps: int = 1    # micro-batches in a step, of all processes together
    max_iters: int = 500                    # steps
    optimizer: str = "muon"                 # muon (hidden matrices; AdamW for the rest) | adamw
    learning_rate: float = 2.5e-3           # the highest one; Muon's updates are scaled to AdamW's size
    embd_lr_scale: float = 8.0              # muon: embeddings, head, gains and biases learn so many times as fast
    min_lr: float = 0.0                     # the last one
    warmup_iters: int = 20                  # steps of linear warm-up
    lr_decay_iters: int = 0                 # the step where min_lr is reached: 0 = max_iters
    schedule: str = "linear"                # after warm-up: cosine | linear (constant, then down in a straight line)
    decay_frac: float = 0.7                 # linear: the share of the steps that go down
    weight_decay: float = 0.1               # on matrices; never on gains and biases
    beta1: float = 0.9                      # AdamW's
    beta2: float = 0.95                     # AdamW's
    momentum: float = 0.95                  # Muon's
    grad_clip: float = 1.0                  # largest gradient norm; 0 = any
    loss: str = "plain"                     # plain | chunked (torch's linear_cross_entropy: less memory, never all logits)
    gradient_checkpointing: bool = False    # recompute blocks in the backward pass: less memory, more time
    device: str = "auto"                    # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"                     # of matrix products: auto | float32 | tf32 | bfloat16 | float16 (with loss scaling); a resumed run keeps it
    compile: str = "auto"                   # torch.compile: auto | true | false
    rmsnorm: str = "auto"                   # RMSNorm by: auto | torch | cuda (our kernel); a checkpoint does not remember
    seed: int = 1337                        # of weights, batches and dropout
    start: str = ""                         # what the sample at each evaluation starts from
    wandb_log: bool = False                 # log to Weights & Biases too

    def __post_init__(self):
        super().__post_init__()
        if not self.out_dir:
            raise ValueError("out_dir is empty: name a folder")
        for key in "eval_interval", "log_interval", "batch_size", "gradient_accumulation_steps", "max_iters":
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.seed >= 2 ** 63:
            raise ValueError("seed must be below 2^63")
        for key in "eval_tokens", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "grad_clip", "seed":
            if getattr(self, key) < 0:
                raise ValueError(f"{key} cannot be negative")
        for key in "beta1", "beta2", "momentum":
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")
        if self.embd_lr_scale <= 0:
            raise ValueError(f"embd_lr_scale must be above 0, not {self.embd_lr_scale}")
        if self.learning_rate <= 0 or self.min_lr > self.learning_rate:
            raise ValueError("learning_rate must be above 0 and at least min_lr")
        if not 0 < self.decay_frac <= 1:
            raise ValueError(f"decay_frac must be above 0 and at most 1, not {self.decay_frac}")
        for key, choices in ("optimizer", ("muon", "adamw")), ("schedule", ("cosine", "linear")), ("loss", ("plain", "chunked")), ("rmsnorm", rmsnorm.SETTINGS):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} must be one of {' | '.join(choices)}, not {getattr(self, key)!r}")
        if self.wandb_log and not importlib.util.find_spec("wandb"):
            raise ValueError("wandb_log needs wandb: pip install wandb; --no-wandb_log does without")
        if self.loss == "chunked" and not HAS_CHUNKED_LOSS:
            raise ValueError(f"loss=chunked needs a torch with linear_cross_entropy (2.13); this is {torch.__version__}")


@dataclass
class Config(TrainConfig, ModelConfig):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Batches: row r of step s is a pure function of (seed, s, r), so a resumed run needs no saved position

@functools.lru_cache(maxsize=2)
def epoch_starts(n_tokens, T, seed, epoch):
    """Where the rows of an epoch start: the stream cut into blocks of T from a random offset, in random order."""
    rng = np.random.default_rng((seed, epoch))
    n = max(1, (n_tokens - T) // T)
    return rng.integers(min(T, n_tokens - n * T)) + T * rng.permutation(n)


def training_rows(data, T, seed, first, n):
    """Rows first .. first+n of the endless stream of rows: {"idx", "targets"} (n, T) int64, targets one token ahead."""
    per_epoch = len(epoch_starts(len(data), T, seed, 0))
    return blocks(data, [epoch_starts(len(data), T, seed, r // per_epoch)[r % per_epoch] for r in range(first, first + n)], T)


def blocks(data, starts, T):
    """A batch of data[start:start + T] for each start; beyond the end of data there is no target."""
    return padded([data[start:start + T + 1] for start in starts], T)


def padded(pieces, T):
    """Pieces of up to T + 1 ids as a batch whose targets are one token ahead, -100 where there is none."""
    rows = np.full((len(pieces), T + 1), -100, dtype=np.int64)
    for row, piece in zip(rows, pieces):
        row[:len(piece)] = piece
    rows = torch.from_numpy(rows)
    return {"idx": rows[:, :-1].clamp(min=0), "targets": rows[:, 1:]}


def to(batch, device):
    if device.type != "cuda":
        return {key: x.to(device) for key, x in batch.items()}
    return {key: x.pin_memory().to(device, non_blocking=True) for key, x in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def next_token_loss(model, batch):
    """Cross-entropy in nats, summed over the batch's targets."""
    return model(**batch, reduction="sum")[1]


def count_targets(batch):
    return int((batch["targets"] != -100).sum())


@contextmanager
def evaluating(model):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(model, data, T, batch_size, compute, tokens=0):
    """Nats a token on a split (1-D array of ids) in blocks of T, each target once; with `tokens` only on about so
    many, evenly spaced and always the same. Processes share the batches; the figure does not depend on how many they are."""
    starts = evenly(np.arange(0, len(data) - 1, T), math.ceil(tokens / T))
    return mean_nats(model, starts, lambda some: blocks(data, some, T), batch_size, compute)


def evenly(rows, n):
    """n of the rows, evenly spaced; all of them for 0, or where they are no more."""
    return rows[np.linspace(0, len(rows) - 1, min(n or len(rows), len(rows))).astype(int)]


def mean_nats(model, rows, batch_of, batch_size, compute):
    """Nats a target over rows (1-D array), of which batch_of(some) makes a batch. Processes share the batches."""
    batches = np.array_split(rows, math.ceil(len(rows) / batch_size))
    sums = torch.zeros(len(batches), 2, dtype=torch.float64)  # nats and targets of each batch
    with evaluating(model):
        for i in range(compute.rank, len(batches), compute.world):
            batch = to(batch_of(batches[i]), compute.device)
            with compute.autocast():
                sums[i] = torch.tensor([float(next_token_loss(model, batch)), count_targets(batch)])
    nats, targets = compute.sum(sums).sum(0).tolist()
    return nats / targets


def token_nats(model, data, T, compute, batch_size=32):
    """-log p of each token of data (1-D array of ids) but the first, in the blocks of T that evaluate takes: float32 (len(data) - 1,).
    Target i has i % T + 1 tokens of context."""
    nats = np.empty(len(data) - 1, np.float32)
    with evaluating(model):
        for i in tqdm(range(0, len(nats), T * batch_size), "likelihood", unit="batch", disable=None, leave=False):
            batch = to(blocks(data, range(i, min(i + T * batch_size, len(nats)), T), T), compute.device)
            with compute.autocast():
                some = model(**batch, reduction="none")[1].flatten().cpu().numpy()
            nats[i:i + len(some)] = some[:len(nats) - i]
    return nats


def document_nats(model, documents, bos, eot, compute, batch_size=32):
    """-log p of each document (a list of ids, shorter than block_size) and its end, in nats, from its own start after bos: float64 (n,)."""
    longest, nats = max(map(len, documents)) + 1, []
    with evaluating(model):
        for i in range(0, len(documents), batch_size):
            batch = to(padded([[bos, *ids, eot] for ids in documents[i:i + batch_size]], longest), compute.device)
            with compute.autocast():
                nats.append(model(**batch, reduction="none")[1].cpu().double().sum(1))
    return torch.cat(nats).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def train_step(model, optimizers, batches, compute, seed=(0, 0), grad_clip=0.0, scaler=None,
               loss_fn=next_token_loss, count=count_targets):
    """One update from micro-batches (dicts of the model's keyword arguments): (loss, gradient norm) as floats.

    loss_fn(model, batch) is a sum; it is divided once by the count over all micro-batches of all processes, so that k of them
    weigh their targets as one large batch would. Dropout is drawn from (*seed, micro-batch). A loss that is not finite changes nothing.
    """
    total, loss = compute.sum(torch.tensor(sum(map(count, batches)))).item(), 0.0
    for micro, batch in enumerate(batches, compute.rank * len(batches)):
        torch.manual_seed(int(np.random.SeedSequence((*seed, micro)).generate_state(1)[0]))
        with compute.autocast():
            part = loss_fn(model, batch) / total
        loss += part.detach()
        (scaler.scale(part) if scaler else part).backward()
    params = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    if compute.world > 1:
        loss = sum_gradients(params, loss, compute)
    if scaler:
        for o in optimizers:
            scaler.unscale_(o)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    loss, norm = torch.stack((loss, norm)).tolist()  # waits for the device
    if usable(loss, norm, scaler):
        for o in optimizers:
            scaler.step(o) if scaler else o.step()
        if scaler:
            scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)
    return loss, norm


def sum_gradients(params, loss, compute):
    """Adds up the gradients, and the loss, of all processes in one message. Returns the loss."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = compute.sum(torch.cat([g.flatten() for g in (*grads, loss.to(grads[0].dtype))]))
    for g, summed in zip(grads, flat[:-1].split([g.numel() for g in grads])):
        g.copy_(summed.view_as(g))
    return flat[-1]


def usable(loss, norm, scaler):
    """Whether a step may be taken. With a loss scaler a gradient that is not finite is its business: it skips the step."""
    return math.isfinite(loss) and (scaler is not None or math.isfinite(norm))


def fit(model, cfg, compute, get_batches, validate, save, preview=None, resumed=None, flops=0,
        loss_fn=next_token_loss, count=count_targets):
    """Trains to cfg.max_iters; returns the last validate().

    get_batches(step) is a list of micro-batches, validate() a dict of figures with "val_loss",
    save(name, step=, val_loss=, best_val_loss=, losses=, optimizers=, scaler=) writes a checkpoint, preview() is text to show.
    resumed: a loaded checkpoint to go on from. flops: per token, for MFU. Raises Refusal (status 1) when the loss is not finite.
    """
    optimizers = make_optimizers(checkpoint.unwrap(model), cfg, compute)
    scaler = torch.amp.GradScaler(compute.device.type) if compute.dtype == torch.float16 else None
    step, best, figures, losses = 0, math.inf, {}, []  # losses: since the last line of the log
    if resumed:
        step, best, figures = resumed["step"], resumed["best_val_loss"], {"val_loss": resumed["val_loss"]}
        if len(optimizers) != len(resumed["optimizers"]):
            raise Refusal(f"the checkpoint was trained with another optimizer than {cfg.optimizer}")
        try:
            losses = [float(loss) for loss in resumed["losses"]]
            for o, state in zip(optimizers, resumed["optimizers"]):
                chosen = [{key: g[key] for key in ("weight_decay", "betas", "momentum", "lr_scale") if key in g} for g in o.param_groups]
                o.load_state_dict(state)
                for group, settings in zip(o.param_groups, chosen):
                    group.update(settings)  # the config's: they may be given anew
                if any(x.dim() and x.shape != p.shape for p, state in o.state.items() for x in state.values()):
                    raise ValueError("a moment is not of its parameter's shape")
            if scaler and resumed["scaler"]:
                scaler.load_state_dict(resumed["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Refusal(f"the checkpoint's optimizer state is damaged: {e!r}")
    log, peak, clock, tokens, speed = Log(cfg, step, compute), peak_flops(compute), time.perf_counter(), 0, {}
    first, saved = step, step if resumed else -1

    def keep(name, **state):
        if compute.first:
            save(name, step=step, val_loss=figures["val_loss"], best_val_loss=best, losses=losses, **state)

    model.train()
    with StopAfterStep(compute) as stop, tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05,
                                              disable=None if compute.first else True) as bar:
        while True:
            if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and not (resumed and step == first):
                paused = time.perf_counter()
                figures = validate()
                if not math.isfinite(figures["val_loss"]):
                    raise Refusal(f"the validation loss is {figures['val_loss']} at step {step}; {advice(cfg)}", status=1)
                better, best = figures["val_loss"] < best, min(best, figures["val_loss"])
                log.write({"step": step, **figures})
                if step > first:  # ckpt.pt last: whoever goes on from it finds the log and the best one as it says
                    if better:
                        keep("ckpt_best.pt")
                    keep("ckpt.pt", optimizers=optimizers, scaler=scaler)
                    saved = step
                if compute.first:
                    bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()) +
                              "".join(f", {k} {v:,}" for k, v in speed.items()) +
                              (f"\n{preview()}\n" if preview else ""), file=sys.stderr)
                clock += time.perf_counter() - paused
            if stop.agreed():
                if step > saved:
                    keep("ckpt.pt", optimizers=optimizers, scaler=scaler)
                compute.wait()  # torchrun ends all processes soon after the first has ended
                raise Refusal(f"stopped at step {step} by {stop.name}; python {os.path.basename(sys.argv[0])} --out_dir={cfg.out_dir} "
                              "--init_from=resume goes on", status=stop.status)
            if step >= cfg.max_iters:
                break
            lr = get_lr(step, cfg)
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = lr * group["lr_scale"]
            batches = get_batches(step)
            loss, norm = train_step(model, optimizers, batches, compute, (cfg.seed, step), cfg.grad_clip, scaler, loss_fn, count)
            if not usable(loss, norm, scaler):
                raise Refusal(f"the loss is {loss} and its gradient norm {norm} at step {step}; {advice(cfg)}", status=1)
            step, tokens = step + 1, tokens + sum(b["idx"].numel() for b in batches) * compute.world
            losses.append(loss)
            bar.update()
            if step % cfg.log_interval == 0 or step == cfg.max_iters:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                speed = {"tokens_per_s": round(tokens / seconds)}
                if peak and flops:
                    speed["mfu"] = round(flops * tokens / seconds / peak / compute.world, 4)
                log.write({"step": step, "loss": sum(losses) / len(losses), "lr": lr, "grad_norm": norm, **speed})
                bar.set_postfix({"loss": f"{sum(losses) / len(losses):.3f}", **speed})
                tokens, losses = 0, []
    log.close()
    return figures


def advice(cfg):
    saved = any(os.path.exists(os.path.join(cfg.out_dir, name)) for name in ("ckpt.pt", "adapter.pt"))
    kept = f"the last checkpoint in {cfg.out_dir} is as it was" if saved else f"{cfg.out_dir} has no checkpoint yet"
    return f"try a lower --learning_rate or a longer --warmup_iters; {kept}"


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

MODEL_KEYS = {f.name for f in fields(ModelConfig)}
DATA_KEYS = {"dataset", "seed"}


def inherit(cfg, ckpt, path, resume, fixed=DATA_KEYS):
    """cfg with what the checkpoint decides: the architecture, and when resuming everything that was not given anew, which the
    keys in `fixed` may not be."""
    types, model_config = {f.name: f.type for f in fields(cfg)}, {}
    if "model_config" in ckpt:  # an adapter has none; a setting that came later has its default
        model_config = {f.name: f.default for f in fields(ModelConfig)} | ckpt["model_config"]
    for key, saved in (ckpt["config"] | model_config if resume else model_config).items():
        if key not in types:
            continue
        saved = convert(saved, types[key], f"{path}: {key}", parse=False)
        if key in cfg.given and not resume and (key == "dropout" or key == "block_size" and getattr(cfg, key) < saved):
            continue  # see crop
        if key in cfg.given and getattr(cfg, key) != saved and (key in MODEL_KEYS or resume and key in fixed):
            raise Refusal(f"{path} has {key}={saved!r}, which cannot become {getattr(cfg, key)!r}; leave it out")
        if key not in cfg.given and key not in ("out_dir", "init_from", "overwrite", "eval_only"):
            setattr(cfg, key, saved)
    try:
        cfg.__post_init__()
    except (ValueError, TypeError) as e:
        raise Refusal(f"the settings of {path}: {e}")
    return cfg


def crop(ckpt, cfg):
    """Gives a checkpoint that a run starts from its shorter context and its dropout: no other weights than a position table's change."""
    ckpt["model_config"] |= {"block_size": cfg.block_size, "dropout": cfg.dropout}
    if cfg.pos == "learned":
        ckpt["model"]["add_pos.weight"] = ckpt["model"]["add_pos.weight"][:cfg.block_size]


def in_the_way(cfg):
    """Whether out_dir holds something that --overwrite is to move aside: other runs in it, and the log of one that made no checkpoint,
    are none. Raises Refusal where it was not given."""
    if cfg.init_from == "resume" or cfg.eval_only:
        return False
    if os.path.exists(cfg.out_dir) and not os.path.isdir(cfg.out_dir):
        raise Refusal(f"{cfg.out_dir} is a file, and out_dir a folder to write")
    run = folders.holds_run(cfg.out_dir)
    return folders.in_the_way(cfg.out_dir, cfg.overwrite, "--init_from=resume goes on with it, " * run + "--overwrite moves it aside, --out_dir=OTHER "
                              "writes elsewhere", folders.runs_in(cfg.out_dir) + ["log.jsonl"] * (not run))


def rows_each(cfg, compute):
    """Rows of a step that each process takes. Raises Refusal where they cannot be shared."""
    rows = cfg.gradient_accumulation_steps * cfg.batch_size
    if rows % compute.world:
        raise Refusal(f"{compute.world} processes cannot share the {rows} rows of a step evenly: choose another batch_size")
    return rows // compute.world


def micro_batches(step, cfg, compute):
    """(first row, number of rows) of each micro-batch of a step that is this process's."""
    share = rows_each(cfg, compute)
    start = (step * compute.world + compute.rank) * share
    return [(start + row, min(cfg.batch_size, share - row)) for row in range(0, share, cfg.batch_size)]


def main(cfg):
    resume, ckpt = cfg.init_from == "resume", None
    if cfg.eval_only and cfg.init_from == "scratch":
        raise Refusal("eval_only is of a model that is there: --init_from=resume for out_dir's, or --init_from=FOLDER")
    if cfg.init_from != "scratch":
        path = checkpoint.find(cfg.out_dir if resume else cfg.init_from, "ckpt.pt" if resume else "ckpt_best.pt")
        ckpt = checkpoint.load(path)
        if resume and not cfg.eval_only and ("rows_sha256" in ckpt["config"] or not ckpt["optimizers"]):
            why = "was fine-tuned" if "rows_sha256" in ckpt["config"] else "has no optimizer's state, as a best, a merged or another's checkpoint"
            raise Refusal(f"{path} {why}: train.py cannot go on with it; --init_from={cfg.out_dir} --out_dir=OTHER starts from it")
        cfg = inherit(cfg, ckpt, path, resume)
    moving = in_the_way(cfg)
    compute = resolve(cfg.device, cfg.dtype, cfg.compile, join=True, train_width=cfg.n_embd)
    cfg.dtype = compute.dtype_name  # a resumed run keeps it, on another processor too
    rows = compute.world * rows_each(cfg, compute)

    if not cfg.dataset or cfg.dataset.startswith("data/"):
        raise Refusal(f"dataset is the NAME of data/NAME, as in --dataset={cfg.dataset[5:] or 'toy'}, not {cfg.dataset!r}")
    folder = os.path.join("data", cfg.dataset)
    if cfg.dataset == "toy" and compute.first and not os.path.exists(folder):
        print(f"writing the toy stories to {folder}")
        try:
            prepare.prepare(prepare.Config())
        except Refusal:
            if not os.path.exists(folder):  # else another run was faster
                raise
    compute.wait()  # nothing is written to out_dir before everyone has looked at it, nothing read before it is there
    meta, data, tokenizer = prepare.load(folder)
    if len(data["train"]) <= cfg.block_size:
        raise Refusal(f"{folder}/train.bin has {len(data['train'])} tokens, not enough for block_size={cfg.block_size}")
    if "vocab_size" in cfg.given and cfg.vocab_size != tokenizer.vocab_size:
        raise Refusal(f"vocab_size is the tokenizer's, {tokenizer.vocab_size}; leave it out (prepare.py --vocab_size chooses it)")
    cfg.vocab_size = tokenizer.vocab_size
    check_memory(compute.device, training_bytes(cfg, cfg, num_weights(cfg)), "try a smaller model or batch_size")
    torch.manual_seed(cfg.seed)
    if ckpt:
        if ckpt["tokenizer_sha256"] != tokenizer.sha256:
            raise Refusal(f"{path} was trained with another tokenizer than {folder}'s; prepare the data with its own" +
                          f": prepare.py --tokenizer={path}" * is_hf(path))
        if not resume:
            crop(ckpt, cfg)
        model, _ = checkpoint.restore(ckpt, path, compute.device)
    else:
        model = Transformer(ModelConfig(**{key: getattr(cfg, key) for key in MODEL_KEYS})).to(compute.device)
    model.gradient_checkpointing, model.chunked_loss = cfg.gradient_checkpointing, cfg.loss == "chunked"
    said = choose_rmsnorm(model, cfg.rmsnorm, compute)
    if compute.first:
        print(compute.said + f", Muon in {name_of(muon_dtype(compute))}" * (cfg.optimizer == "muon") + said)
        print(f"{num_params(model):,} parameters, {len(data['train']):,} training tokens, {rows * cfg.block_size:,} tokens a step")
        if resume and not cfg.eval_only and ckpt["step"] >= cfg.max_iters:
            print(f"{path} is at step {ckpt['step']} already; a larger --max_iters goes on")
    trained = torch.compile(model) if compute.compile else model

    split = meta["splits"]["val"]
    bits_a_byte = split["tokens"] / split["bytes"] / math.log(2)

    def validate(tokens=cfg.eval_tokens):
        loss = evaluate(trained, data["val"], cfg.block_size, cfg.batch_size, compute, tokens)
        return {"val_loss": loss, "val_bits_per_byte": loss * bits_a_byte}

    def get_batches(step):
        return [to(training_rows(data["train"], cfg.block_size, cfg.seed, first, n), compute.device)
                for first, n in micro_batches(step, cfg, compute)]

    def save(name, **state):
        checkpoint.save(os.path.join(cfg.out_dir, name), model, tokenizer, asdict(cfg), **state)

    def preview():
        prompt = prompt_ids(tokenizer, cfg.start)
        [told], _ = finish(generate(model, [prompt], min(cfg.block_size, 200), stop=tokenizer.eot, seed=cfg.seed))
        return cfg.start + tokenizer.decode_more(told)

    if moving and compute.first:
        folders.move_aside(cfg.out_dir, folders.runs_in(cfg.out_dir))
    if not cfg.eval_only:
        fit(trained, cfg, compute, get_batches, validate, save, preview, ckpt if resume else None,
            flops_per_token(model, cfg.block_size))
    final = validate(tokens=0)
    if compute.first:
        print(f"whole validation split: {final['val_loss']:.4f} nats a token, {final['val_bits_per_byte']:.4f} bits a byte")
        if meta["source"] == "toy":
            print(floor_line(trained, tokenizer, data["val"], compute))
        if not cfg.eval_only:
            print(plot(cfg.out_dir))
            print(f"next: python sample.py --out_dir={cfg.out_dir}")
    compute.leave()


def training_bytes(cfg, c, learned):
    """Less than training a model of config c takes: its weights, gradients and a moment of those that are learned; a micro-batch's
    logits and their gradient; a step's tokens."""
    tokens = cfg.batch_size * c.block_size
    return (4 * num_weights(c) + 8 * learned + (8 * tokens * c.vocab_size if cfg.loss == "plain" else 0)
            + 16 * tokens * cfg.gradient_accumulation_steps)


def documents_of(ids, tokenizer):
    """The documents of a split that end in it, as slices, without the head of each."""
    ends = np.flatnonzero(ids == tokenizer.eot)
    return (ids[start + (ids[start] == tokenizer.bos):end] for start, end in zip([0, *ends + 1], ends))


def above_floor(model, tokenizer, ids, compute, n=500):
    """(exact -log p of the first n toy stories in ids, how far the model's is above it), both float64 (n,) in nats a story. Raises
    ValueError where there is none, or one is longer than the context."""
    documents = [document.tolist() for document in islice(documents_of(ids, tokenizer), n)]
    if not documents:
        raise ValueError("no story is whole")
    if (longest := max(map(len, documents))) >= model.config.block_size:
        raise ValueError(f"they have up to {longest} tokens, and block_size is {model.config.block_size}")
    floor = -np.array([toy_stories.log_prob(tokenizer.decode(d)) for d in documents])
    return floor, document_nats(model, documents, tokenizer.bos, tokenizer.eot, compute) - floor


def floor_line(model, tokenizer, val, compute, n=500):
    """How far the model is above the exact entropy of the toy stories: the same stories scored by both, in nats a story."""
    try:
        found = above_floor(model, tokenizer, val, compute, n)
        whole = np.isfinite(found[0])  # of few stories the validation split is the end, which may begin within one
        if not whole.any():
            raise ValueError("no story is whole")
    except ValueError as e:
        return f"the stories are not scored: {e}"
    floor, gap = (x[whole] for x in found)
    return (f"{len(gap)} unseen stories: {(floor + gap).mean():.2f} nats a story, {100 * gap.mean() / floor.mean():.1f}% above "
            f"their exact entropy of {floor.mean():.2f} (standard error of the difference {gap.std() / len(gap) ** 0.5:.2f})")


if __name__ == "__main__":
    run(main, Config)
