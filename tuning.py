"""A tuning: what every way to tune a model has in common. A base or a run that goes on is opened, gets adapters
(lora.py) or is tuned as it is, and is saved; later adapters and base become one checkpoint.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

import checkpoint
import checkpoint_file
import folders
import lora
from checkpoint import Checkpoint, open_checkpoint
from checkpoint_file import RunState
from config import Refusal, hf_name
from data import rows_each
from device import Compute, Work, resolve
from graphs import graph_message
from memory import check_memory, training_bytes
from refusals import refuse_reward_model
from rmsnorm import choose_rmsnorm
from runs import DATA_KEYS, go_on_after_restart, inherit, is_in_the_way, launch
from sizes import num_params
from train import TrainConfig, place

# what a resumed run cannot change
FIXED = DATA_KEYS | {"val_dataset", "val_fraction", "template", "rank", "alpha", "target", "max_length"}


@dataclass
class Tuning:
    """A base that is open to be tuned, by adapters or with --rank=0 as it is."""

    cfg: TrainConfig
    kind: str  # of tuning, kept in the run's config
    base: Checkpoint  # where a run goes on, with its adapters
    resumed: dict  # what was loaded of the run that goes on, or None
    compute: Compute
    model: torch.nn.Module
    tokenizer: object
    T: int  # tokens in a row
    base_sha256: str
    moves_aside: bool  # out_dir holds what --overwrite is to move

    def prepare(self, length):
        """Puts adapters into the model, moves it to the device and returns what to train: the model, perhaps compiled.
        length: tokens in a row.

        Raises Refusal where the model takes no such adapters, or memory is too small for the training.
        """
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        if self.base.adapter:
            self.base.restore_adapters(self.model)
        elif cfg.rank:
            try:
                lora.inject(self.model, cfg)
            except ValueError as e:
                raise Refusal(e)
        self.base.state.pop("model")  # else the weights would be in memory twice until the end
        learned, _ = lora.trainable(self.model)
        c = replace(self.model.config, block_size=length)
        adapt = partial(lora.inject, c=cfg) if cfg.rank else None
        counted = replace(cfg, batch_size=cfg.rows)
        needs = training_bytes(counted, c, self.compute, learned=learned, adapt=adapt, documents=True)
        check_memory(self.compute.device, needs, "try a smaller batch_size")
        trained = place(self.model, cfg, self.compute)
        rmsnorm_message = choose_rmsnorm(self.model, cfg.rmsnorm, self.compute)
        if self.compute.is_main:
            steps_message = graph_message(cfg, self.compute, is_static=False)
            print(f"{self.base.path}: {self.compute.message}{rmsnorm_message}{steps_message}")
            merged = os.path.join(cfg.out_dir, "ckpt.pt")
            if self.base.adapter and os.path.exists(merged):
                print(f"{merged} is from an earlier --merge, and stays as it is")
        return trained

    def save(self, name, state, notes):
        """Writes the adapters, or with --rank=0 the whole checkpoint, to out_dir; notes are kept with the config."""
        config = (
            asdict(self.cfg)
            | {"task": self.kind, "launch": launch(), "base_dataset": self.base.dataset}
            | notes
        )
        path = os.path.join(self.cfg.out_dir, name)
        if self.cfg.rank:
            path = os.path.join(self.cfg.out_dir, name.replace("ckpt", "adapter"))
            checkpoint_file.save_adapters(
                path, self.model, self.base.path, self.base_sha256, config, state
            )
        else:
            checkpoint_file.save(path, self.model, self.tokenizer, config, state)


def open_tuning(cfg, kind, fixed=FIXED):
    """Returns the Tuning that a config means, of a base or of a run that goes on, with what these decide put
    into the config.

    kind: of tuning; a run keeps it, and a resumed one must be of it. fixed: the keys that a resumed run cannot
    change. Raises Refusal.
    """
    resumed = None
    go_on_after_restart(cfg)
    if cfg.init_from == "resume":
        base = open_run(cfg, kind)
        resumed = base.last
        cfg = inherit(cfg, resumed, base.last_path, True, fixed)
    else:
        base = open_checkpoint(cfg.init_from)
    moves_aside = is_in_the_way(cfg, ("ckpt.pt", "adapter.pt"))
    base_path = os.path.realpath(hf_name(base.path)) + os.sep
    if moves_aside and base_path.startswith(os.path.realpath(cfg.out_dir) + os.sep):
        raise Refusal(
            f"the base {base.path} is in {cfg.out_dir}, which cannot be moved aside then: give another --out_dir"
        )
    model, tokenizer = checkpoint_file.restore(base.state, base.path)
    width = 0 if cfg.eval_only else model.config.n_embd
    steps = 0 if cfg.eval_only else cfg.max_iters - (resumed["step"] if resumed else 0)
    flops = 6 * num_params(model) * cfg.gradient_accumulation_steps * cfg.rows * model.config.block_size
    work = Work(flops, steps)
    compute = resolve(cfg.device, cfg.dtype, cfg.compile, join=True, train_width=width, work=work)
    cfg.dtype = compute.dtype_name  # a resumed run keeps it, on another processor too
    rows_each(cfg, compute)
    T = min(cfg.max_length or math.inf, model.config.block_size)
    base_sha256 = checkpoint_file.fingerprint(base.state)
    return Tuning(cfg, kind, base, resumed, compute, model, tokenizer, T, base_sha256, moves_aside)


def open_run(cfg, kind):
    """Returns the Checkpoint of the run in out_dir, adapters over their base or a whole model. Raises Refusal
    where it is not a run of this kind that can go on.
    """
    names = ("adapter.pt", "ckpt.pt")  # ckpt.pt alone is --rank=0's; beside adapter.pt it is --merge's
    names = [name for name in names if os.path.exists(os.path.join(cfg.out_dir, name))]
    if names == ["ckpt.pt"]:
        start = open_checkpoint(cfg.out_dir, "ckpt.pt")
    else:
        start = open_checkpoint("", adapter=cfg.out_dir, prefer_adapter="adapter.pt")
    if start.task != kind or not start.last["optimizers"]:
        if start.task != kind:
            refuse_reward_model(start)  # what is advised below does not work for one
        way = f"--init_from={cfg.out_dir} --out_dir=OTHER starts from it"
        if "ckpt.pt" not in names:
            way = f"finetune_lora.py --merge --out_dir={cfg.out_dir} makes a base of it"
        raise Refusal(f"{start.last_path} is no {kind} run that could go on; {way}")
    return start


def merge(cfg):
    """Merges the adapters in out_dir with their base into out_dir/ckpt.pt, a checkpoint like any other, and prints by
    how much logits changed.
    """
    merged_path = os.path.join(cfg.out_dir, "ckpt.pt")
    adapter_path = checkpoint.find(cfg.out_dir, "adapter_best.pt")
    if os.path.exists(merged_path) and not cfg.overwrite:
        raise Refusal(f"{merged_path} is there already: --overwrite moves it aside")
    base = cfg.init_from if "init_from" in cfg.given else ""
    start = open_checkpoint(base, adapter=adapter_path)
    refuse_reward_model(start)
    model, tokenizer = start.restore()
    model.eval()
    shape = (4, min(256, model.config.block_size))
    idx = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unmerged = model(idx)[0]
        lora.merge(model)
        difference = (model(idx)[0] - unmerged).abs().max()
    if os.path.exists(merged_path):
        folders.move_aside(merged_path)
    adapter = start.adapter
    state = RunState(adapter["step"], adapter["val_loss"], adapter["best_val_loss"])
    checkpoint_file.save(merged_path, model, tokenizer, adapter["config"], state)
    print(
        f"{merged_path}: {start.path} with {start.adapter_path} merged; largest logit {unmerged.abs().max():.3g}, "
        f"largest difference to unmerged {difference:.1e}"
    )
