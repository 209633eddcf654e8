"""Folders that a script writes: whole or not at all, and never over what a user had."""
import os
import shutil
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from config import Refusal, is_hf

RUN = "ckpt.pt", "ckpt_best.pt", "adapter.pt", "adapter_best.pt"


def holds_run(folder):
    return any(os.path.isfile(os.path.join(folder, name)) for name in RUN)


def runs_in(folder):
    """The names of subfolders that hold runs of their own, as demo in out."""
    return [name for name in os.listdir(folder) if holds_run(os.path.join(folder, name))] if os.path.isdir(folder) else []


def in_the_way(folder, overwrite, ways, but=()):
    """Whether `folder` holds something, but these names, that move_aside is to move. Raises Refusal, which says the ways out, where
    overwrite was not given."""
    if not os.path.exists(folder) or os.path.isdir(folder) and not set(os.listdir(folder)) - set(but):
        return False
    if not overwrite:
        raise Refusal(f"{folder} is there already: {ways}")
    return True


def move_aside(folder, but=()):
    """Renames a folder, or all in it but these names, to NAME.old-TIME and says so. Raises Refusal."""
    folder = Path(folder)
    old = folder.with_name(f"{folder.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
    try:
        if not but:
            folder.rename(old)
        else:
            old.mkdir()
            for path in sorted(folder.iterdir()):
                if path.name not in but:
                    path.rename(old / path.name)
    except OSError as e:
        raise Refusal(f"cannot move {folder} aside: {e.strerror}", status=1)
    print(f"what was {folder} is now {old}")


@contextmanager
def new_folder(to, overwrite, ways, reads=()):
    """Gives a folder to fill, which is `to` when that is done and gone when it was not. What was there is moved aside, with overwrite,
    but not what is read, nor the current folder.

    Raises Refusal. A run that is killed leaves a .NAME.tmp-* beside `to`, which nothing reads.
    """
    to = Path(os.path.realpath(to) if os.path.islink(to) else to)
    moving = in_the_way(to, overwrite, ways)
    if inside := [path for path in (".", *reads) if os.path.exists(path) and Path(path).resolve().is_relative_to(to.resolve())]:
        raise Refusal(f"{to} cannot be written: {'the current folder' if inside[0] == '.' else inside[0]} is in it")
    tmp = to.with_name(f".{to.name}.tmp-{os.getpid()}-{time.time_ns()}")
    try:
        tmp.mkdir(parents=True)
        yield tmp
        if moving:
            move_aside(to)
        elif to.exists():
            to.rmdir()
        tmp.rename(to)
    except OSError as e:
        raise Refusal(f"cannot write {to}: {e}", status=1)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def advice(folder, name):
    """What to do where there is no ONNX model `name` in `folder`."""
    folder, int8 = folder or ".", " --quantize=int8" * (name == "model_int8.onnx")
    if all(os.path.isfile(os.path.join(folder, "onnx", file)) for file in (name, "config.json")):
        return f"{folder}/onnx has one"
    if is_hf(folder):
        return f"python export_onnx.py --out_dir={folder} --to=FOLDER{int8} writes one"
    if holds_run(folder):
        return f"python export_onnx.py --out_dir={folder}{int8} writes {folder}/onnx"
    return f"python export_onnx.py --out_dir=OUT --to={'FOLDER' if os.path.exists(folder) else folder}{int8} writes one"
