"""Folders and files that a script writes: whole or not at all, and never over what a user had."""

import errno
import os
import platform
import re
import shutil
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from config import Refusal, is_hf

CHECKPOINTS = ("ckpt.pt", "ckpt_best.pt")
ADAPTERS = ("adapter.pt", "adapter_best.pt")
RUN = CHECKPOINTS + ADAPTERS
BESIDE = r".*\.gguf|bench_.*\.png"  # files of hf.py and bench.py
LOCK = ".lock"
PID = ".pid"  # of the process that has the lock; a file of its own, as some systems let nobody read a locked one
STARTED = time.time_ns()  # when this process did


class InUse(Refusal):
    """A folder that another process trains in."""


# -----------------------------------------------------------------------------------------------------
# What stands in a folder


def holds_run(folder, names=RUN):
    """Returns whether train.py or finetune_lora.py saved a run in folder, under one of these names."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def others_in(folder):
    """Returns the names in folder that do not belong to its own run: subfolders with other runs, finished or
    going on, as demo in out, and the lock's files.
    """
    if not os.path.isdir(folder):
        return []
    paths = {name: os.path.join(folder, name) for name in os.listdir(folder)}
    runs = [name for name, path in paths.items() if holds_run(path) or os.path.exists(f"{path}/{LOCK}")]
    return [*runs, LOCK, PID]


def is_free(folder):
    """Returns whether a run can begin in folder as it is. There may be subfolders (other runs, and what was made of
    them), files that other scripts write beside these, and the log of a run without a checkpoint.
    """
    if not os.path.isdir(folder):
        return not os.path.exists(folder)
    files = {path.name for path in Path(folder).iterdir() if not path.is_dir()}
    return all(re.fullmatch(BESIDE, name) for name in files - {LOCK, PID, "log.jsonl"})


def in_the_way(folder, overwrite, ways):
    """Returns whether folder holds anything that move_aside is to move.

    Raises Refusal where it does but overwrite was not given, with `ways`, the ways out; and where the current
    folder would be moved.
    """
    if not os.path.exists(folder) or os.path.isdir(folder) and not os.listdir(folder):
        return False
    if not overwrite:
        raise Refusal(f"{folder} is there already: {ways}")
    refuse_around(folder, ["."])
    return True


def refuse_around(folder, paths):
    """Raises Refusal where a folder holds one of the paths; "." is the current folder."""
    for path in paths:
        if os.path.exists(path) and Path(path).resolve().is_relative_to(Path(folder).resolve()):
            name = "the current folder" if path == "." else path
            raise Refusal(f"{folder} cannot be written: {name} is in it")


def behind_link(path):
    """Returns the Path that a symbolic link leads to; another path as it is."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def move_aside(folder, keep=()):
    """Renames a folder to NAME.old-TIME, or moves all in it but the names in keep there, and says so.

    Raises Refusal where the system does not allow it, or another process trains there.
    """
    folder = behind_link(folder) if keep else Path(folder)  # what is in a folder stays on its disk
    old = folder.with_name(f"{folder.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
    try:
        if keep:
            old.mkdir()
            for path in sorted(folder.iterdir()):
                if path.name not in keep:
                    path.rename(old / path.name)
        else:
            for lock in list(folder.rglob(LOCK)):
                if held := acquire(lock.parent):
                    held.release()
            folder.rename(old)
    except OSError as e:
        raise Refusal(f"cannot move {folder} aside: {e.strerror}", status=1)
    print(f"what was {folder} is now {old}")


# -----------------------------------------------------------------------------------------------------
# One run in a folder at a time


def acquire(folder, waits=None):
    """Takes the lock of a folder, which ends with this process. Returns the FileLock, or None where nothing
    can be written there or the disk knows no locks.

    waits: where another process has the lock, print this line, unless it is "", and wait. None: raise InUse,
    which names that process.
    """
    path = os.path.join(folder, LOCK)
    try:
        open(path, "a").close()
    except OSError:  # whoever writes another file here will say why that fails
        return None
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waits is None:
                raise InUse(
                    f"{read_pid(folder)} is training in {folder}: wait until it has ended, or name another folder"
                )
            if waits:
                print(waits)
            lock.acquire()
    except FileNotFoundError:  # the process that had the lock has failed, and removed the folder
        return None
    except (OSError, NotImplementedError) as e:
        print(f"{folder} is on a disk without locks ({e}): nothing keeps a second run out of it")
        return None
    return lock


def read_pid(folder):
    try:
        return f"process {int(Path(folder, PID).read_text())}"
    except (OSError, ValueError):
        return "another process"


@contextmanager
def without_empty(folder):
    """Removes a folder and its parents at the end of the block, as far as they did not exist before it and
    are empty then.
    """
    missing = [path for path in (Path(folder), *Path(folder).parents) if not os.path.exists(path)]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def alone(folder, make=True, waits=None):
    """Keeps other runs out of a folder until the block or its process ends, and removes files that dead runs
    left half written there.

    A missing folder is made, unless make is False, and removed again if it stays empty. waits: as acquire()
    takes it. Raises Refusal.
    """
    folder = Path(folder)
    with without_empty(folder):
        if make:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder, waits)
        try:
            if lock:
                with suppress(OSError):
                    (folder / PID).write_text(str(os.getpid()))
                remove_temporaries(folder)
            yield
        finally:
            if lock:
                for name in (PID, LOCK):
                    with suppress(OSError):  # Windows does not remove an open file, which does no harm
                        (folder / name).unlink()
                lock.release()


def remove_temporaries(folder):
    """Removes the files of write_atomic that the killed process of a run left in folder. Files of the user
    have other names.
    """
    names = "|".join(map(re.escape, (*RUN, "log.jsonl", "loss.png")))
    # the second form is that of runs from before temporary() named these files
    name = re.compile(rf"\.({names})\.tmp-\w+-\d+-\d+|({names})\.\d+\.tmp")
    for path in folder.iterdir():
        if name.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


# -----------------------------------------------------------------------------------------------------
# Files and folders, whole or not at all


def sync(f):
    """Waits until what was written to an open file is on disk."""
    f.flush()
    os.fsync(f.fileno())


def write_atomic(path, write):
    """Calls write(file) with a file beside path, then puts that in path's place. It is on disk when this returns.
    Raises Refusal.

    A process that is killed leaves a .NAME.tmp-MACHINE-PID-TIME, which the next write to path removes.
    """
    folder = os.path.dirname(path) or "."
    tmp = temporary(Path(path), time.time_ns())
    try:
        os.makedirs(folder, exist_ok=True)
        sweep(Path(path))
        with open(tmp, "wb") as f:
            write(f)
            sync(f)
        os.replace(tmp, path)
        if os.name == "posix":  # the new name is an entry of the folder, which must be on disk too
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except (OSError, RuntimeError) as e:
        # torch.save raises a RuntimeError where the disk is full
        first_line = str(e).partition("\n")[0]
        reason = getattr(e, "strerror", None) or f"is the disk full? ({first_line})"
        raise Refusal(f"cannot write {path}: {reason}; what was there before is as it was", status=1)
    finally:
        with suppress(OSError):
            os.remove(tmp)


@contextmanager
def new_folder(to, overwrite, ways, reads=(), is_worth=None):
    """Gives an empty folder to fill, which becomes `to` on success and is removed on failure.

    With overwrite, what stood at `to` is moved aside. Raises Refusal, also where `to` holds the current
    folder or a path in `reads`. A run that is killed leaves a .NAME.tmp-MACHINE-PID-TIME beside `to`,
    which nothing reads and the next run for the same `to` removes.

    is_worth: a function of a folder. With it, the next run is given the folder of a killed run to fill, as that
    was left; and the folder of a run that failed stays for the next run where is_worth(folder) is true.
    """
    to = behind_link(to)
    moving = in_the_way(to, overwrite, ways)
    refuse_around(to, [".", *reads])
    tmp = temporary(to, time.time_ns())
    try:
        if is_worth:
            take_over(to, tmp)
        sweep(to)
        tmp.mkdir(parents=True, exist_ok=True)
        yield tmp
        if moving:
            move_aside(to)
        elif to.exists():
            to.rmdir()
        tmp.rename(to)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise Refusal(f"another process has written {to} meanwhile: {ways}", status=1)
        raise Refusal(f"cannot write {to}: {e}", status=1)
    finally:
        if is_worth and is_worth(tmp):
            print(f"what is done stays in {tmp}: the same command goes on with it")
        else:
            shutil.rmtree(tmp, ignore_errors=True)


def temporary(to, stamp):
    """Returns the path of this process's temporary folder or file for `to`."""
    return to.with_name(f".{to.name}.tmp-{machine()}-{os.getpid()}-{stamp}")


def left_by_dead(to):
    """Returns [(stamp, path)] of the temporary folders and files for `to` that processes of this machine left
    which are no longer alive, the oldest first.
    """
    # names from before machine() have no machine in them
    name = re.compile(rf"\.{re.escape(to.name)}\.tmp-(?:{machine()}-)?(\d{{1,9}})-(\d+)")
    left = []
    with suppress(FileNotFoundError):  # there is no parent yet
        for path in to.parent.iterdir():
            if not (match := name.fullmatch(path.name)):
                continue
            pid, stamp = map(int, match.groups())
            # a container that is started again gives this process the number of the killed one
            if not is_alive(pid) or pid == os.getpid() and stamp < STARTED:
                left.append((stamp, path))
    return sorted(left)


def take_over(to, tmp):
    """Renames to tmp the newest folder that a dead process left for `to`, if there is one."""
    for _, path in reversed(left_by_dead(to)):
        with suppress(OSError):  # another process was faster
            path.rename(tmp)
            return


def sweep(to):
    """Removes what dead processes left for `to`.

    Each is renamed first, so that nobody takes over what is being removed. It keeps its stamp, so that it is
    still older than what this process took over, should this process be killed here.
    """
    for stamp, path in left_by_dead(to):
        own = temporary(to, stamp)
        with suppress(OSError):  # another process was faster
            path.rename(own)
            if own.is_dir():
                shutil.rmtree(own, ignore_errors=True)
            else:
                own.unlink()


def machine():
    """Returns a short name of this machine: on a shared disk, a pid of another one says nothing here."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def is_alive(pid):
    """Returns whether a process of this machine has the number pid; True where that cannot be told."""
    if os.name == "nt":  # os.kill(pid, 0) ends a process there
        import _winapi

        try:
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, pid)
        except OSError as e:
            return e.winerror != 87  # ERROR_INVALID_PARAMETER: no such process
        try:
            return _winapi.WaitForSingleObject(handle, 0) == _winapi.WAIT_TIMEOUT
        finally:
            _winapi.CloseHandle(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    with suppress(OSError):  # where there is no /proc
        # a killed process keeps its number until its parent asks for its status, in a container maybe never
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return True


# -----------------------------------------------------------------------------------------------------
# ONNX models


def split_onnx(path):
    """Returns (folder, name) of the ONNX model that a path names: a folder, or one .onnx file in it."""
    if path.endswith(".onnx") and not os.path.isdir(path):
        return os.path.split(path)
    return path, "model.onnx"


def onnx_advice(folder, name):
    """Returns what to do where there is no ONNX model `name` in folder."""
    folder = folder or "."
    onnx = os.path.join(folder, "onnx")
    if all(os.path.isfile(os.path.join(onnx, file)) for file in (name, "config.json")):
        return f"{folder}/onnx has one"
    integers = name.removeprefix("model_").removesuffix(".onnx")
    flag = f" --quantize={integers}" if integers in ("int8", "int4", "plain_int8") else ""
    if is_hf(folder):
        return f"python export_onnx.py --out_dir={folder} --to=FOLDER{flag} writes one"
    if holds_run(folder):
        return f"python export_onnx.py --out_dir={folder}{flag} writes {folder}/onnx"
    to = "FOLDER" if os.path.exists(folder) else folder
    return f"python export_onnx.py --out_dir=OUT --to={to}{flag} writes one"
