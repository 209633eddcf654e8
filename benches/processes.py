"""What bench.py processes runs: two processes on this machine's CPUs that train one model together."""

import os
import socket
import time
from dataclasses import replace
from statistics import median

import torch

import gradients
import train
from benches.step import make_training_step
from device import resolve
from measure import state_bytes

N = 2  # processes
DELAYS = (0.0, 0.05)  # seconds by which each message of gradients takes longer
ROUNDS = 5


class SlowNetwork:
    """Sends messages, each of which takes `delay` seconds longer, one after the other, while the processor is free."""

    def __init__(self, send):
        self.send = send
        self.delay = 0.0
        self.free = 0.0  # when the last message is through

    def __call__(self, *args, **options):
        self.free = max(self.free, time.monotonic()) + self.delay
        return Message(self.send(*args, **options), self.free)


class Message:
    def __init__(self, work, end):
        self.work = work
        self.end = end

    def wait(self):
        time.sleep(max(0.0, self.end - time.monotonic()))
        self.work.wait()


class SentAfter(gradients.GradientSum):
    """Sends nothing before the backward pass has ended."""

    def note(self, p):
        pass


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def timed(step, compute):
    """Returns the seconds of a step that all processes begin together."""
    compute.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def join(rank, env, dtype):
    """Makes this process one of N, with its share of the threads. Returns its Compute."""
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(N))
    torch.set_num_threads(max(1, torch.get_num_threads() // N))
    return resolve("cpu", dtype, "false", join=True)


def run_processes(work, cfg):
    """Runs work(rank, env, cfg, queue) in N processes; returns what the first one has put into the queue."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    torch.multiprocessing.spawn(work, (env, cfg, queue), nprocs=N)  # raises what one of them raises
    return queue.get()


def work(rank, env, cfg, queue):
    """One process; the first one puts the rows into the queue."""
    compute = join(rank, env, cfg.dtype)
    steps, held = {}, {}
    for shard in "none", "full":
        steps[shard], *trained = make_training_step(cfg, replace(compute, shards=shard == "full"))
        steps[shard]()  # makes the moments
        held[shard] = state_bytes(*trained)

    network = torch.distributed.all_gather = SlowNetwork(torch.distributed.all_gather)
    sums = {"after": SentAfter, "during": gradients.GradientSum}
    times = {("none", way, delay): [] for delay in DELAYS for way in sums}
    times["full", "by FSDP2", 0.0] = []
    for _ in range(ROUNDS):
        for (shard, way, delay), seconds in times.items():
            network.delay = delay
            train.GradientSum = sums.get(way)
            seconds.append(timed(steps[shard], compute))
    rows = [
        {
            "shard": shard,
            "gradients": way,
            "messages": f"{1e3 * delay:.0f} ms more" if delay else "as they are",
            "step_ms": 1e3 * median(seconds),
            "held_mb": held[shard] / 1e6,
        }
        for (shard, way, delay), seconds in times.items()
    ]
    if rank == 0:
        queue.put(rows)
    compute.close()


def bench_processes(cfg, compute):
    """Two processes on this machine's CPUs, each with half of its threads and batch_size rows: gradients sent
    after or during the backward pass, with a delay in each message; held_mb are a process's weights and
    moments.
    """
    return run_processes(work, cfg)
