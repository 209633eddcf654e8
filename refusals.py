"""What a command is told where a name has no checkpoint that it can use: what is there instead, and which command
reads or makes one.
"""

import os
import sys

from config import Refusal, hf_name
from folders import ADAPTERS, CHECKPOINTS, holds_run, is_free
from interop.gguf_file import is_gguf

# -----------------------------------------------------------------------------------------------------
# A name without a checkpoint or an adapter


def refuse_hf(name, wants_adapter):
    """Raises Refusal where hf:FOLDER_OR_NAME cannot be read. An adapter never can. A model can, unless the folder has
    a run of ours, or PEFT's adapter alone.
    """
    folder = hf_name(name)
    is_model = holds_model(folder)
    is_peft = holds_peft(folder)
    if holds_run(folder) and not is_model and not is_peft:
        raise Refusal(
            f"{folder} is ours, not what transformers or PEFT wrote: it is read as {folder}, without hf:"
        )
    if not wants_adapter and (is_model or not is_peft):
        return
    refuse_onnx(folder)
    if is_model and not is_peft:
        raise whole_model(folder)
    if os.path.isdir(folder) and not is_peft:
        raise Refusal(
            f"there is no adapter of PEFT in {folder}, which would have an adapter_config.json"
        )
    raise peft_adapter(folder)


def refuse_missing_checkpoint(out_dir):
    """Raises Refusal for an out_dir without the checkpoint that is wanted of it."""
    refuse_onnx(out_dir)
    if holds_peft(out_dir):
        raise peft_adapter(out_dir)
    if holds_model(out_dir):
        raise Refusal(
            f"{out_dir} holds no checkpoint of ours; what transformers wrote there is read as hf:{out_dir}, "
            "to sample, evaluate or start from"
        )
    if holds_run(out_dir, CHECKPOINTS):
        raise Refusal(
            f"the run in {out_dir} was killed before its first ckpt.pt: --init_from={out_dir} --out_dir=OTHER "
            "starts from its best one"
        )
    if holds_run(out_dir, ADAPTERS):
        raise Refusal(
            f"{out_dir} holds an adapter: sample.py --adapter={out_dir} and eval.py read it, "
            f"finetune_lora.py --merge --out_dir={out_dir} makes a checkpoint of it and its base"
        )
    hint = ""
    if not os.path.exists(out_dir):
        hint = f" (a folder or a name of the Hugging Face hub is hf:{out_dir})"
    command = f"python train.py --out_dir={free_folder(out_dir)}"
    raise Refusal(f"there is no checkpoint in {out_dir}; {command} makes one{hint}")


def refuse_missing_adapter(out_dir):
    """Raises Refusal for an out_dir without the adapter that is wanted of it."""
    refuse_onnx(out_dir)
    if holds_peft(out_dir):
        raise peft_adapter(out_dir)
    if holds_model(out_dir):
        raise whole_model(out_dir)
    if holds_run(out_dir, ADAPTERS):
        command = f"{tuning_script()} --out_dir={out_dir} --overwrite"
        raise Refusal(
            f"the run in {out_dir} was killed before its first adapter.pt: sample.py --adapter={out_dir} reads "
            f"its best one, {command} begins anew"
        )
    if holds_run(out_dir, CHECKPOINTS):
        raise Refusal(
            f"{out_dir} holds a whole checkpoint, not an adapter: sample.py --out_dir={out_dir} reads it"
        )
    command = f"python {tuning_script()} --init_from=BASE --out_dir={free_folder(out_dir)}"
    raise Refusal(f"there is no adapter in {out_dir}; {command} makes one")


def holds_model(folder):
    """Returns whether transformers wrote a folder, or it is a GGUF file."""
    is_gguf_file = is_gguf(folder) and os.path.isfile(folder)
    return is_gguf_file or os.path.isfile(os.path.join(folder, "config.json"))


def holds_peft(folder):
    """Returns whether PEFT wrote an adapter to a folder."""
    return os.path.isfile(os.path.join(folder, "adapter_config.json"))


def free_folder(out_dir):
    """Returns out_dir where a run can begin there, else a word for another one."""
    return out_dir if is_free(out_dir) else "OTHER"


def tuning_script():
    """Returns the name of the running script where it makes adapters, else of the one that is mostly used for it."""
    script = os.path.basename(sys.argv[0])
    return script if script.startswith("finetune_") else "finetune_lora.py"


def refuse_onnx(folder):
    """Raises Refusal where a folder holds an ONNX model."""
    if os.path.isfile(os.path.join(folder, "model.onnx")):
        raise Refusal(f"{folder} holds an ONNX model, which sample.py --onnx={folder} reads")


def whole_model(folder):
    """Returns the Refusal of a folder that transformers wrote, where an adapter is wanted."""
    return Refusal(
        f"{folder} holds a whole model, not an adapter: sample.py --out_dir=hf:{folder} reads it"
    )


def peft_adapter(folder):
    """Returns the Refusal of a folder that PEFT wrote."""
    command = f"python hf.py --out_dir=BASE --adapter=hf:{folder} --to=FOLDER"
    return Refusal(f"hf:{folder} is not read as it is: {command} makes an adapter of ours of it")


# -----------------------------------------------------------------------------------------------------
# A checkpoint of a kind that a command has no use for


def refuse_reward_model(start):
    """Raises Refusal for a Checkpoint whose adapters judge text and write none."""
    if start.task == "reward model":
        raise Refusal(
            f"{start.adapter_path} is a reward model, which judges text and writes none: "
            "finetune_ppo.py --reward=FOLDER learns from it"
        )


def refuse_quantized(start):
    """Raises Refusal for a quantized Checkpoint where floats are needed."""
    path = start.path
    if start.adapter:
        raise Refusal(
            f"{path} is quantized, and {start.adapter_path} belongs over floats: finetune_lora.py --merge makes a "
            "checkpoint of it and its base, which quantize.py reads"
        )
    made_of = start.loaded["config"].get("quantized_from", "")
    raise Refusal(
        f"{path} is quantized, which sample.py, eval.py and export_onnx.py read: for anything else take "
        f"what it was made of, {made_of}"
    )
