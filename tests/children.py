"""Processes for tests that kill them or train together: forked from one that has imported torch."""

import importlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  it would take each child half a second to import
import torch

import finetune_lora  # noqa: F401  as these
import prepare  # noqa: F401
import train  # noqa: F401
from benches.processes import free_port
from config import run

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["children"])


def start(folder, script, *argv, fault=None, **env):
    """Starts a script, by its name, with its arguments in folder; fault is a place and a call for inject().

    Returns the process. It prints into out.PID and err.PID in folder.
    """
    process = fork.Process(target=run_script, args=(str(folder), script, argv, fault, env))
    process.start()
    return process


def run_script(folder, script, argv, fault, env):
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.stdout = open(f"out.{os.getpid()}", "w", encoding="utf-8", buffering=1)
    sys.stderr = open(f"err.{os.getpid()}", "w", encoding="utf-8", buffering=1)
    sys.argv = [f"{script}.py", *argv]
    if fault:
        inject(*fault)
    module = importlib.import_module(script)
    run(module.main, module.Config)


def inject(place, call):
    """Kills this process at the call-th time that it comes to a place in folders.write_atomic; "reward": no place,
    but the call-th reward that it gets is nan.
    """
    calls = itertools.count(1)

    def due():
        return next(calls) == call

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_before(function):
        def faulty(*args):
            if due():
                die()
            return function(*args)

        return faulty

    def dying_after(function):
        def faulty(*args):
            function(*args)
            if due():
                die()

        return faulty

    def half_saving(save):
        def faulty(state, file):
            save(state, file)
            if due():
                file.truncate(file.tell() // 2)
                file.flush()
                die()

        return faulty

    def failing(find_reward):
        def faulty(*args, **options):
            judge = find_reward(*args, **options)
            return lambda prompt, answer: math.nan if due() else judge(prompt, answer)

        return faulty

    if place == "write":
        torch.save = half_saving(torch.save)
    elif place == "fsync":
        os.fsync = dying_before(os.fsync)
    elif place == "rename":
        os.replace = dying_before(os.replace)
    elif place == "renamed":
        os.replace = dying_after(os.replace)
    elif place == "reward":
        finetune_ppo = importlib.import_module("finetune_ppo")
        finetune_ppo.find_reward = failing(finetune_ppo.find_reward)
    else:
        raise ValueError(f"unknown place {place!r}")


def error_output(folder, process):
    """Returns what a process that start() returned has written to stderr."""
    return Path(f"{folder}/err.{process.pid}").read_text(encoding="utf-8")


def finish(process, timeout=120):
    """Waits for a process to end. Returns its exit status, negative for a signal."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(process.name)
    return process.exitcode


def ranks(n):
    """Returns the environments of n processes, as torchrun makes them."""
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(n)
    ]
