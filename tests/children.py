"""Processes for tests that kill them, or that train together: forked from one that has imported torch already."""

import multiprocessing
import os
import signal
import socket
import sys

import matplotlib.figure  # noqa: F401  these two are otherwise imported by every child, for seconds
import torch
import torch._dynamo  # noqa: F401

import checkpoint
import finetune_lora
import prepare
import train
from config import run

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["children"])


def start(folder, script, *argv, fault=None, **env):
    """A script (a module) with its arguments in a process of its own, in folder; what it prints goes to out.PID and err.PID there."""
    process = fork.Process(target=work, args=(str(folder), script, argv, fault, env))
    process.start()
    return process


def work(folder, script, argv, fault, env):
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (
        open(f"{kind}.{os.getpid()}", "w", encoding="utf-8", buffering=1) for kind in ("out", "err")
    )
    sys.argv = [f"{script}.py", *argv]
    if fault:
        inject(*fault)
    main = {"train": train, "prepare": prepare, "finetune_lora": finetune_lora}[script]
    run(main.main, main.Config)


def inject(place, call):
    """Kills this process at the call-th time that it comes to a place in folders.write_atomic."""
    calls = [0]

    def due():
        calls[0] += 1
        return calls[0] == call

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    torch_save, fsync, replace = torch.save, os.fsync, os.replace

    def save_half(state, f):
        if not due():
            return torch_save(state, f)
        torch_save(state, f)
        f.truncate(f.tell() // 2)
        f.flush()
        die()

    def before(function):
        return lambda *args: die() if due() else function(*args)

    def replace_and_die(*args):
        replace(*args)
        if due():
            die()

    target, name, faulty = {
        "write": (checkpoint.torch, "save", save_half),
        "fsync": (os, "fsync", before(fsync)),
        "rename": (os, "replace", before(replace)),
        "renamed": (os, "replace", replace_and_die),
    }[place]
    setattr(target, name, faulty)


def said(folder, process):
    with open(f"{folder}/err.{process.pid}", encoding="utf-8") as f:
        return f.read()


def finish(process, timeout=120):
    """Its exit status once it has ended; negative for a signal."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(process.name)
    return process.exitcode


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(n):
    """The environments of n processes, as torchrun makes them."""
    port = free_port()
    return [
        dict(
            RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        for r in range(n)
    ]
