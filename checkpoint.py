"""Checkpoints by name: which file a command line means, and what is known of it before the model is made.

    out/NAME/ckpt.pt        the last step, what --init_from=resume goes on from
    out/NAME/ckpt_best.pt   the best validation loss, what sample.py reads
    out/NAME/adapter.pt, adapter_best.pt   LoRA adapters in their place, useless without the base that they name
    hf:FOLDER_OR_NAME       what transformers wrote, read as a checkpoint (interop/hf_folder.py)
    hf:FILE.gguf            what llama.cpp runs, read as one (interop/gguf_file.py)

    checkpoint = open_checkpoint("out/ts"); model, tokenizer = checkpoint.restore()

checkpoint_file.py writes and reads the files.
"""

import dataclasses
import os
from dataclasses import dataclass, field

import checkpoint_file
import lora
from checkpoint_file import ADAPTER_KEYS, QUANTIZED, damaged, load, settings_of
from config import Refusal, is_hf
from data import text_rule
from folders import ADAPTERS, CHECKPOINTS, holds_run
from refusals import (
    refuse_hf,
    refuse_missing_adapter,
    refuse_missing_checkpoint,
    refuse_quantized,
    refuse_reward_model,
)


@dataclass
class Checkpoint:
    """A checkpoint that was found, and the adapters over it, where there are any. Its file is read when
    it is first needed.
    """

    path: str
    loaded: dict = None  # what load returned
    adapter_path: str = ""
    adapter: dict = None  # what load returned of the adapters' file
    takes_integers: bool = False  # whether the model may be a quantized one
    changes: dict = field(default_factory=dict)  # to its model_config; see stretch

    @property
    def state(self):
        """The loaded checkpoint. Raises Refusal where it cannot be read, or is a quantized one that is
        not to be.
        """
        if self.loaded is None:
            self.loaded = load(self.path)
        if self.loaded.get("format") == QUANTIZED and (self.adapter or not self.takes_integers):
            refuse_quantized(self)
        return self.loaded

    @property
    def last(self):
        """What load returned of what was trained last: of the adapters, or without any of the checkpoint."""
        return self.adapter or self.state

    @property
    def last_path(self):
        return self.adapter_path or self.path

    @property
    def config(self):
        """The settings of what was trained last."""
        return self.last["config"]

    @property
    def dataset(self):
        """The name of the data that the model learned to write from: a fine-tuned one's is its base's;
        "" where none is known.
        """
        config = self.state["config"]
        return str(config.get("base_dataset", config.get("dataset", "")))

    @property
    def task(self):
        """What was trained last: "pre-training", or a kind of tuning. Runs from before it was kept are
        known by their rows.
        """
        older = "fine-tuning" if "rows_sha256" in self.config else "pre-training"
        return self.config.get("task", older)

    @property
    def template(self):
        """The text with {prompt} in it that the checkpoint was fine-tuned with, or ""."""
        return str(self.state["config"].get("template", ""))

    @property
    def text_rule(self):
        """How the text of rows and prompts was taken when this was trained; see data.text_rule."""
        return text_rule(self.config)

    def crop(self, cfg):
        """Takes over the shorter context and the dropout of a run that starts from this checkpoint. Of the
        weights only a table of positions changes.
        """
        self.state["model_config"] |= {"block_size": cfg.block_size, "dropout": cfg.dropout}
        if cfg.pos == "learned":
            weights = self.state["model"]
            weights["add_pos.weight"] = weights["add_pos.weight"][: cfg.block_size]

    def stretch(self, rope_scaling="", block_size=0):
        """Sets another rope_scaling or context for the model that restore returns; "" and 0 are its own.

        The state stays as it is, as adapters know their base by its fingerprint. Raises Refusal where the
        positions do not allow it: only rope has a scaling, and a learned table has no more places.
        """
        given = {"rope_scaling": rope_scaling, "block_size": block_size}
        self.changes = {key: value for key, value in given.items() if value}
        if not self.changes:
            return
        c = settings_of(self.state, self.path)
        if c.pos == "learned" and (rope_scaling or block_size != c.block_size):
            problem = f"{self.path} has learned positions, a table of {c.block_size}"
            raise Refusal(f"{problem}: neither block_size nor rope_scaling makes it another one")
        try:
            dataclasses.replace(c, **self.changes)
        except ValueError as e:
            raise Refusal(f"{self.path}: {e}")

    @property
    def stretched(self):
        """The loaded checkpoint as stretch changes it."""
        return self.state | {"model_config": self.state["model_config"] | self.changes}

    @property
    def fingerprint(self):
        """The fingerprint of the model that restore returns, without adapters. Raises Refusal where model.py has
        no such model.
        """
        settings_of(self.stretched, self.path)
        return checkpoint_file.fingerprint(self.stretched)

    def restore(self, device="cpu"):
        """Returns (model, tokenizer), with the adapters, where there are any, in the model. Raises Refusal."""
        model, tokenizer = checkpoint_file.restore(self.stretched, self.path, device)
        if self.adapter:
            self.restore_adapters(model)
        return model, tokenizer

    def restore_adapters(self, model):
        """Puts the adapters over the model of the checkpoint they belong to. Raises Refusal over any other."""
        adapter = self.adapter
        if adapter["base_sha256"] != checkpoint_file.fingerprint(self.state):
            raise Refusal(
                f"{self.adapter_path} was trained over another base than {self.path}: over {adapter['base']} "
                f"as it was then (sha256 {adapter['base_sha256'][:12]})"
            )
        try:
            lora.inject(model, lora_config(adapter))
            lora.load_state_dict(model, adapter["adapters"])
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, ArithmeticError) as e:
            raise damaged(self.adapter_path, repr(e))


def find(out_dir, prefer="ckpt_best.pt"):
    """Returns the file that out_dir means: itself where it is a file, else the preferred one in it, else that
    without _best: ckpt.pt or adapter.pt. hf:NAME stays as it is. Raises Refusal.
    """
    if os.path.isfile(out_dir):
        return out_dir
    wants_adapter = prefer in ADAPTERS
    if is_hf(out_dir):
        refuse_hf(out_dir, wants_adapter)
        return out_dir
    for name in (prefer, prefer.replace("_best", "")):
        path = os.path.join(out_dir, name)
        if os.path.isfile(path):
            return path
    if wants_adapter:
        refuse_missing_adapter(out_dir)
    if holds_run(out_dir, ADAPTERS):  # a reward model is not advised to write
        path = find(out_dir, "adapter_best.pt")
        refuse_reward_model(Checkpoint("", adapter_path=path, adapter=load(path, ADAPTER_KEYS)))
    refuse_missing_checkpoint(out_dir)


def open_checkpoint(
    out_dir,
    prefer="ckpt_best.pt",
    adapter="",
    prefer_adapter="adapter_best.pt",
    takes_integers=False,
):
    """Returns the Checkpoint that out_dir means: a folder, a file or hf:FOLDER_OR_NAME.

    adapter: the folder or file of adapters over it; then an empty out_dir means the base that they name.
    Raises Refusal; so does the Checkpoint for a quantized model, without takes_integers.
    """
    if not adapter:
        return Checkpoint(find(out_dir, prefer), takes_integers=takes_integers)
    adapter_path = find(adapter, prefer_adapter)
    adapters = load(adapter_path, ADAPTER_KEYS)
    path = find(out_dir, prefer) if out_dir else find_base(adapters, adapter_path)
    return Checkpoint(path, None, adapter_path, adapters)


def open_any(name):
    """Returns the Checkpoint of a folder: its model, which may be of integers, or where it has only adapters, these
    over their base. A file and hf:FOLDER_OR_NAME are as for open_checkpoint. Raises Refusal.
    """
    if holds_run(name, ADAPTERS) and not holds_run(name, CHECKPOINTS):
        start = open_checkpoint("", adapter=name)
        refuse_reward_model(start)
        return start
    return open_checkpoint(name, takes_integers=True)


def open_given(cfg, adapter, takes_integers=False):
    """Returns the Checkpoint of a command line's out_dir with the adapters over it, "" for none. Where no
    out_dir was given, adapters are over the base that they name.
    """
    out_dir = "" if adapter and "out_dir" not in cfg.given else cfg.out_dir
    start = open_checkpoint(out_dir, adapter=adapter, takes_integers=takes_integers)
    refuse_reward_model(start)
    return start


def find_base(adapter, path):
    """Returns the file that adapters were trained over. Raises Refusal where there is none any more."""
    base = adapter["base"]
    if not os.path.isfile(base) and not is_hf(base):
        raise Refusal(
            f"{path} belongs over {base}, which is not there: name it with --out_dir (sample.py) or --init_from "
            "(--merge); to go on with its training, put it back"
        )
    return base


def lora_config(adapter):
    """Returns the LoRAConfig of loaded adapters."""
    keys = [f.name for f in dataclasses.fields(lora.LoRAConfig)]
    return lora.LoRAConfig(**{key: adapter["config"][key] for key in keys})
