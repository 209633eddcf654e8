"""nanoGPT from a checkout of it (https://github.com/karpathy/nanoGPT): its model and a step of its train.py."""

import contextlib
import importlib.util
import io
import os

import torch

from config import Refusal


def load(folder):
    """Returns the module model.py of a checkout of nanoGPT, which runs its code. Raises Refusal where it is none."""
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


def make_step(module, cfg, compute, learning_rate):
    """Returns (step, model, optimizers), where step() is one step of nanoGPT's train.py with its own
    defaults, at the shape and the rows of cfg.
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
    rows = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=compute.device)
    X, Y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step():
        for _ in range(cfg.gradient_accumulation_steps):
            with compute.autocast():
                _, loss = trained(X, Y)
                loss = loss / cfg.gradient_accumulation_steps
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, as ours does

    return step, model, [optimizer]


def flops_per_token(model):
    """Returns the floating-point operations of training on one token, as estimate_mfu of nanoGPT has them."""
    c = model.config
    return 6 * model.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
