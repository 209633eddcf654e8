"""nanoGPT from a checkout of it (https://github.com/karpathy/nanoGPT): its model and a step of its train.py."""

import contextlib
import functools
import importlib.util
import io
import os

import torch
import torch.nn.functional as F

from config import Refusal
from device import one_shape


@functools.cache
def load(folder):
    """Returns the module model.py of a checkout of nanoGPT; its code is run. Raises Refusal where it is none."""
    path = os.path.join(folder, "model.py")
    if not os.path.isfile(path):
        raise Refusal(f"against={folder}: there is no {path}; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as e:
        raise Refusal(f"against={folder}: {path} cannot be imported: {e}")
    for name in "GPT", "GPTConfig":
        if not hasattr(module, name):
            raise Refusal(f"against={folder}: {path} has no {name}; name a checkout of nanoGPT")
    return module


def make_update(module, cfg, compute, learning_rate):
    """Returns (update, model, optimizer), where update(batches) is one step of nanoGPT's train.py with its own
    defaults, at the shape of cfg, on micro-batches (inputs, targets), both (B, T).
    """
    config = module.GPTConfig(
        block_size=cfg.block_size,
        vocab_size=cfg.vocab_size,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_embd=cfg.n_embd,
        dropout=cfg.dropout,
        bias=False,
    )
    device = compute.device.type
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
        model = module.GPT(config).to(compute.device)
        optimizer = model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), device)
    trained = torch.compile(model) if compute.compile else model
    scaler = torch.amp.GradScaler(device, enabled=compute.dtype == torch.float16)

    def update(batches):
        for X, Y in batches:
            with compute.autocast():
                _, loss = trained(X, Y)
                loss = loss / len(batches)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, as its train.py does at each step

    return one_shape()(update), model, optimizer  # so that torch chooses among all its attentions


def make_step(module, cfg, compute, learning_rate):
    """Returns (step, model, optimizers), where step() is make_update's on random rows of the size of cfg's."""
    update, model, optimizer = make_update(module, cfg, compute, learning_rate)
    rows = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=compute.device)
    batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return functools.partial(update, [batch] * cfg.gradient_accumulation_steps), model, [optimizer]


class Scored(torch.nn.Module):
    """A model of nanoGPT's that may be called as score.py calls ours. A target of -100 does not count in its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, reduction):
        logits, _ = self.model(idx, idx)  # without targets it gives the last token's alone
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        return logits, loss


def flops_per_token(model):
    """Returns the floating-point operations of training on one token, as estimate_mfu of nanoGPT has them."""
    c = model.config
    return 6 * model.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
