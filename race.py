"""How long functions take. Rivals take turns, so that a machine whose speed drifts is fair to all.

    times = race({"ours": ours, "theirs": theirs}, 10, torch.device("cpu"))
    times["ours"]["median"]                       # seconds a call

A rival is a function, or a pair (setup, function): the function then gets what setup(), which is not timed, returns.
"""

import statistics
import time

import torch

MOST_ROUNDS = 100
PAUSE = 0.1  # seconds: onnxruntime's threads spin for 20 to 50 ms after a call, on a core that the next rival needs


def race(rivals, seconds, device, untimed=0, pause=0.0):
    """Times rivals, {name: rival}, against each other.

    Each is called once ("first"), `untimed` times more, and once to warm up. Then all are called in turn, every
    other round from the last to the first, until `seconds` from the warm-up on are over, for 100 rounds at most. On
    a processor, whose speed drifts, there are at least three rounds; on a GPU the warm-up counts where there was no
    time for a round.

    pause: seconds before each turn, PAUSE where rivals have threads of their own.
    Returns {name: {"first", "median", "min", "max"}} in seconds a call.
    """
    first = {name: time_rival(rival, device) for name, rival in rivals.items()}
    for rival in list(rivals.values()) * untimed:
        time_rival(rival, device)
    end = time.perf_counter() + seconds
    warm = {name: time_rival(rival, device) for name, rival in rivals.items()}
    calls = {name: count_calls(rivals[name], warm[name], device) for name in rivals}
    times = {name: [] for name in rivals}
    least = 3 if device.type == "cpu" else 0
    for i in range(MOST_ROUNDS):
        if i >= least and time.perf_counter() >= end:
            break
        # threads spin on after a call, so that no rival should always come after the same one
        names = reversed(rivals) if i % 2 else rivals
        for name in names:
            time.sleep(pause)
            times[name].append(time_rival(rivals[name], device, calls[name]))
    return {name: summary(first[name], times[name] or [warm[name]]) for name in rivals}


def time_rival(rival, device, calls=1):
    """Returns the mean seconds of a call of the rival, over so many calls."""
    setup, function = rival if isinstance(rival, tuple) else (None, rival)
    arguments = [setup()] if setup else []
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device):
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_calls(rival, seconds, device):
    """Returns how many calls, of `seconds` each, are timed together.

    The launch of a kernel takes longer than a kernel of microseconds, so a GPU is timed over 5 ms of calls; and a
    training step is launched while the one before runs, so it is timed over 20 ms or four calls.
    """
    if isinstance(rival, tuple) or device.type == "cpu":
        return 1
    calls = max(int(5e-3 / seconds), min(4, int(20e-3 / seconds)))
    return max(1, min(1000, calls))


def summary(first, times):
    """Returns what race() says of a rival, of the seconds of its first call and those of its calls in turn."""
    return {
        "first": first,
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
    }


def ms_columns(times):
    """Returns the columns of a table, in milliseconds, for what race() says of a rival."""
    return {
        "ms": 1e3 * times["median"],
        "ms_min": 1e3 * times["min"],
        "ms_max": 1e3 * times["max"],
        "first_ms": 1e3 * times["first"],
    }
