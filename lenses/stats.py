"""95% intervals: Wilson's for a share, Student's for a few runs, the percentile bootstrap for everything else."""

import math
import statistics

import numpy as np

Z = 1.959964  # standard errors to each side: 95% of a normal distribution
MOST_DRAWS = 1 << 22  # in memory at once

# Student's t for a 95% interval with 1, 2 ... degrees of freedom. For more than these the last one is taken, which
# makes intervals a little wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def wilson(right, n):
    """Returns the 95% interval (low, high) of the share right / n (Wilson 1927).

    It holds for small n, and for shares of 0 and 1.
    """
    share = right / n
    shrink = 1 + Z * Z / n
    middle = share + Z * Z / (2 * n)
    variance = share * (1 - share) / n + Z * Z / (4 * n * n)
    half = Z * variance**0.5
    low = (middle - half) / shrink
    high = (middle + half) / shrink
    return max(0.0, low), min(1.0, high)


def resampled(columns, resamples=2000, seed=0):
    """Returns the sums of columns (n, m) over n units drawn with replacement, float64 (resamples, m).

    The same n and seed draw the same units.
    """
    columns = np.asarray(columns, np.float64)
    n = len(columns)
    rng = np.random.default_rng(seed)
    chances = np.full(n, 1 / n)
    step = max(1, MOST_DRAWS // n)
    sums = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = rng.multinomial(n, chances, size=size)  # (size, n)
        sums.append(counts @ columns)
    return np.concatenate(sums)


def bootstrap(columns, statistic, resamples=2000, seed=0):
    """Returns the 95% interval (low, high) of a statistic over resampled units (Efron 1979).

    columns are (n units, m). statistic maps their sums (resamples, m) to figures (resamples,).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(resampled(columns, resamples, seed))
    finite = drawn[np.isfinite(drawn)]  # with few units a draw may consist of empty ones
    low, high = np.percentile(finite, [2.5, 97.5]).tolist()
    return low, high


def mean_interval(values, resamples=2000, seed=0):
    """Returns the 95% interval (low, high) of the mean of independent values."""
    columns = np.column_stack([values, np.ones(len(values))])
    return bootstrap(columns, ratio, resamples, seed)


def ratio(sums):
    """Returns the first column of sums (resamples, m) divided by the second."""
    return sums[:, 0] / sums[:, 1]


def bits(sums):
    """Returns bits a byte from sums (resamples, 3) of nats, tokens and bytes."""
    nats, _, n_bytes = sums.T
    return nats / n_bytes / math.log(2)


def bits_per_byte(nats, sizes):
    """Returns bits a byte of the nats and the bytes of tokens."""
    return float(nats.sum() / sizes.sum() / math.log(2))


def paired(results, others):
    """Returns three things: by how much the results of runs exceed those of others with the same seeds, on average;
    half the 95% interval of that (Student's t); and the number of these seeds. With one seed the second is None,
    with none the first too.

    results, others: {seed: a figure}, None where a run has none.
    """
    seeds = [seed for seed in results if results[seed] is not None and others.get(seed) is not None]
    n = len(seeds)
    differences = [results[seed] - others[seed] for seed in seeds]
    if n < 2:
        return *(differences or [None]), None, n
    error = statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), T95[min(n - 1, len(T95)) - 1] * error, n
