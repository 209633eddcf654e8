"""What a run starts from and writes to: a checkpoint, data, and an out_dir that nobody else uses.

train.py and the scripts that fine-tune share it. Each function raises Refusal, a line that says what to do.
"""

import contextlib
import dataclasses
import os
from pathlib import Path

import checkpoint_file
import dataset
import folders
import prepare
from checkpoint import open_checkpoint
from checkpoint_file import settings_of
from config import Refusal, convert, is_hf
from data import prompt_ids
from device import torchrun_ranks
from interop.any_tokenizer import load_tokenizer
from model import MODEL_KEYS, ModelConfig

DATA_KEYS = {"dataset", "seed"}
# each run has its own: they are never taken from a checkpoint
OWN_KEYS = {"out_dir", "init_from", "overwrite", "eval_only"}
# 0 is what the other settings make of them: where there is a checkpoint, its settings
COMPUTED = {"n_kv_head", "head_dim", "n_inner"}


# -----------------------------------------------------------------------------------------------------
# out_dir


def launch():
    """Returns a name for this launch of torchrun, which the processes that it restarts after a failure have too:
    the --rdzv_id, or without one the launcher's; "" without torchrun.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{folders.machine()} {os.getppid()}" if run_id == "none" else run_id


def go_on_after_restart(cfg):
    """Makes a run that torchrun has restarted (--max_restarts) go on from its own last checkpoint; a run that has
    none begins anew.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or cfg.eval_only:
        return

    def is_own(name, keys):
        path = os.path.join(cfg.out_dir, name)
        return (
            os.path.exists(path) and checkpoint_file.load(path, keys)["config"].get("launch") == launch()
        )

    kinds = {"ckpt": checkpoint_file.KEYS, "adapter": checkpoint_file.ADAPTER_KEYS}
    if any(is_own(f"{name}.pt", keys) for name, keys in kinds.items()):
        cfg.init_from = "resume"
    elif any(is_own(f"{name}_best.pt", keys) for name, keys in kinds.items()):
        cfg.overwrite = True  # the best one is written before the last


def is_in_the_way(cfg, last=("ckpt.pt",)):
    """Returns whether out_dir holds anything (beside what folders.is_free allows) that --overwrite is to move aside.
    Raises Refusal if it does and --overwrite was not given, or if out_dir is a file.

    last: the names of the checkpoints that the script can go on from.
    """
    if cfg.eval_only:
        return False
    if os.path.exists(cfg.out_dir) and not os.path.isdir(cfg.out_dir):
        raise Refusal(f"{cfg.out_dir} is a file, and out_dir a folder to write")
    if cfg.init_from == "resume" or folders.is_free(cfg.out_dir):
        return False
    ways = "--overwrite moves it aside, --out_dir=OTHER writes elsewhere"
    if folders.holds_run(cfg.out_dir, last):
        ways = f"--init_from=resume goes on with it, {ways}"
    elif folders.holds_run(cfg.out_dir, ["ckpt_best.pt"]):
        ways = f"--init_from={cfg.out_dir} --out_dir=OTHER starts from its best checkpoint, {ways}"
    return folders.in_the_way(cfg.out_dir, cfg.overwrite, ways)


def alone_in_out_dir(cfg):
    """Returns a context in which no other run writes to out_dir. The first process holds it for all."""
    if cfg.eval_only or torchrun_ranks()[0] > 0:
        return contextlib.nullcontext()
    return folders.alone(cfg.out_dir, make=cfg.init_from != "resume")


# -----------------------------------------------------------------------------------------------------
# A checkpoint and data


def open_start(cfg):
    """Returns the checkpoint that a run starts or goes on from, or None, and cfg with the settings it decides."""
    if cfg.init_from == "scratch":
        if cfg.eval_only:
            raise Refusal(
                "eval_only is of a model that is there: --init_from=resume for out_dir's, or --init_from=FOLDER"
            )
        return None, cfg
    if cfg.init_from != "resume":
        start = open_checkpoint(cfg.init_from)
        return start, inherit(cfg, start.state, start.path, resume=False)
    start = open_checkpoint(cfg.out_dir, "ckpt.pt")
    if not cfg.eval_only:
        check_resumable(start, cfg)
        return start, inherit(cfg, start.state, start.path, resume=True)
    default = cfg.dataset
    # nothing is written, so other data do no harm
    cfg = inherit(cfg, start.state, start.path, resume=True, fixed=())
    if "dataset" not in cfg.given:  # one that was fine-tuned has its base's
        cfg.dataset = start.dataset or default
    return start, cfg


def inherit(cfg, ckpt, path, resume, fixed=DATA_KEYS):
    """Returns cfg with what a loaded checkpoint decides: the architecture, and when resuming every key that
    was not given anew. Raises Refusal where a key is given anew that cannot change: one of the architecture,
    or when resuming one in `fixed`.
    """
    saved = {}
    if "model_config" in ckpt:  # an adapter has none; a setting that came later has its default
        saved = {f.name: f.default for f in dataclasses.fields(ModelConfig)} | ckpt["model_config"]
    if resume:
        saved = ckpt["config"] | saved
        fixed = {*MODEL_KEYS, *fixed}
    else:
        fixed = {*MODEL_KEYS} - {"dropout"}  # see Checkpoint.crop
    own = OWN_KEYS | {"dtype"} if cfg.eval_only else OWN_KEYS  # an evaluation chooses its own dtype
    types = {f.name: f.type for f in dataclasses.fields(cfg)}
    for key, value in saved.items():
        if key not in types:
            continue
        value = convert(value, types[key], f"{path}: {key}", parse=False)
        if key not in cfg.given:
            if key not in own:
                setattr(cfg, key, value)
            continue
        if key in COMPUTED and not cfg.values[key]:
            computed = settings_of({"model_config": ckpt["model_config"] | {key: 0}}, path)
            setattr(cfg, key, getattr(computed, key))
        given = getattr(cfg, key)
        is_cropped = key == "block_size" and not resume and given < value
        if key in fixed and given != value and not is_cropped:
            advice = "leave it out"
            if key in ("block_size", "rope_scaling") and not resume and saved["pos"] == "rope":
                command = f"hf.py --out_dir={path} --{key}={given} --to=FOLDER"
                advice = f"{command} stretches it, for --init_from=hf:FOLDER"
            raise Refusal(f"{path} has {key}={value!r}, which cannot become {given!r}; {advice}")
    try:
        cfg.__post_init__()
    except (ValueError, TypeError) as e:
        raise Refusal(f"the settings of {path}: {e}")
    return cfg


def check_resumable(start, cfg):
    """Raises Refusal where train.py cannot go on with a checkpoint."""
    reason = ""
    if start.task != "pre-training":
        reason = "was fine-tuned"
    elif not start.state["optimizers"]:
        reason = "has no optimizer's state, as a best, a merged or another's checkpoint"
    if reason:
        raise Refusal(
            f"{start.path} {reason}: train.py cannot go on with it; "
            f"--init_from={cfg.out_dir} --out_dir=OTHER starts from it"
        )


def open_data(cfg, compute):
    """Returns (folder, meta, {"train", "val"}, tokenizer) of the config's dataset. The first process writes the
    toy stories if they are not there yet.
    """
    if not cfg.dataset or cfg.dataset.startswith("data/"):
        name = cfg.dataset.removeprefix("data/") or "toy"
        raise Refusal(f"dataset is the NAME of data/NAME, as in --dataset={name}, not {cfg.dataset!r}")
    folder = os.path.join("data", cfg.dataset)
    if cfg.dataset == "toy" and compute.is_main and not os.path.exists(folder):
        print(f"writing the toy stories to {folder}")
        try:
            prepare.prepare(prepare.Config())
        except Refusal:
            if not os.path.exists(folder):  # else another run was faster
                raise
    compute.barrier()  # nothing is written to out_dir before everyone has looked at it, nothing read before it is there
    meta, data, tokenizer = dataset.load(folder)
    check_data(cfg, folder, data, tokenizer)
    return folder, meta, data, tokenizer


def check_data(cfg, folder, data, tokenizer):
    """Raises Refusal where a config cannot be trained on what open_data returned of a folder."""
    if len(data["train"]) <= cfg.block_size:
        raise Refusal(
            f"{folder}: the training split has {len(data['train'])} tokens, "
            f"not enough for block_size={cfg.block_size}"
        )
    if "vocab_size" in cfg.given and cfg.vocab_size != tokenizer.vocab_size:
        raise Refusal(
            f"vocab_size is the tokenizer's, {tokenizer.vocab_size}; leave it out (prepare.py --vocab_size chooses it)"
        )


def check_start(tokenizer, cfg):
    """Raises Refusal where the sample at each evaluation has no room in the context, or cannot be encoded."""
    try:
        n = len(prompt_ids(tokenizer, cfg.start))
    except ValueError as e:
        raise Refusal(f"start: {e}")
    if n > cfg.block_size:
        raise Refusal(
            f"start has {n} tokens and the context {cfg.block_size}: shorten it, or leave it out with --start="
        )


def find_tokenizer(start):
    """Returns the file of a checkpoint's tokenizer beside the data that it learned from, "" where that has another."""
    path = Path("data", start.dataset, "tokenizer.json")
    with contextlib.suppress(OSError, ValueError):
        tokenizer = load_tokenizer(path.read_text(encoding="utf-8"))
        if tokenizer.sha256 == start.state["tokenizer_sha256"]:
            return path.as_posix()
    return ""


def check_tokenizer(start, tokenizer, folder, cfg):
    """Raises Refusal where a start was trained with another tokenizer than that of the data in folder."""
    if start.state["tokenizer_sha256"] == tokenizer.sha256:
        return
    way = "prepare the data with its own"
    if is_hf(start.path):
        way += f": prepare.py --tokenizer={start.path}"
    elif "dataset" not in cfg.given and start.dataset not in ("", cfg.dataset):
        way = f"--dataset={start.dataset} is what it learned from"
    elif path := find_tokenizer(start):
        way += f": prepare.py --tokenizer={path}"
    raise Refusal(f"{start.path} was trained with another tokenizer than {folder}'s; {way}")
