"""The model and the training step that bench.py times."""

from dataclasses import replace

import torch

import checkpoint
import rmsnorm
import train
from config import Refusal
from data import padded, to
from graphs import WARM_UP, captures_steps
from model import Transformer, model_config
from optim import make_optimizers, make_scaler
from rmsnorm import use_rmsnorm

SLOW = 1e-7  # a learning rate


def build_model(cfg):
    """Returns the model of init_from, else one of the config's shape with random weights, on the CPU."""
    if cfg.init_from != "scratch":
        start = checkpoint.open_checkpoint(cfg.init_from)
        start.crop(cfg)
        model, _ = start.restore()
        return model
    torch.manual_seed(cfg.seed)
    return Transformer(model_config(cfg))


def redrawn(cfg):
    """Returns cfg without init_from, whose weights fit no other shape."""
    return replace(cfg, init_from="scratch")


def build_trained(cfg, compute, ops=None):
    """Returns (model, what to train: the model, perhaps compiled), as train.py makes them. ops: an rmsnorm.Ops; None:
    the one that train.py chooses.
    """
    model = build_model(cfg)
    trained = train.place(model, cfg, compute)
    if ops is None:
        ops, _ = rmsnorm.choose(cfg.rmsnorm, compute.device, compute.compile)
    use_rmsnorm(model, ops)
    return model, trained


def make_slow_optimizers(model, cfg, compute):
    """Returns train.py's optimizers with a learning rate that leaves the weights where they are.

    Else random weights might diverge or become denormal, and steps would take another time.
    """
    return make_optimizers(model, replace(cfg, learning_rate=SLOW, min_lr=0.0), compute)


def untimed_steps(cfg, compute):
    """Returns how many steps after the first one are not replays of a graph yet: race() does not time them."""
    return WARM_UP if captures_steps(cfg, compute) else 0


def make_training_step(cfg, compute, ops=None):
    """Returns (step, model, optimizers), where step() is one real training step of train.py, of a model that
    build_trained makes.

    step raises Refusal where the loss or the gradient is not finite: then no step was taken. On a GPU it looks after
    the first step and then every log_interval steps, as train.py does, since looking means to wait for the GPU.
    """
    model, trained = build_trained(cfg, compute, ops)
    optimizers = make_slow_optimizers(model, cfg, compute)
    scaler = make_scaler(compute)
    rows = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1))
    batch = to(padded(rows, cfg.block_size), compute.device)
    batches = [batch] * cfg.gradient_accumulation_steps
    update = train.make_step(trained, optimizers, cfg, compute, scaler=scaler)

    unread = []
    n_unread = 1  # results that are read together

    def step():
        nonlocal n_unread
        unread.append(update(batches=batches, seed=(0, 0)))
        if len(unread) < n_unread:
            return
        for loss, norm in train.read_figures(unread):
            if not train.is_usable(loss, norm, scaler):
                figures = f"the loss is {loss} and its gradient norm {norm}"
                raise Refusal(f"{figures}: the step that was timed was none", status=1)
        unread.clear()
        if compute.device.type == "cuda":
            n_unread = cfg.log_interval

    return step, model, optimizers
