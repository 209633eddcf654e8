"""Intervals: Wilson's for a share, the percentile bootstrap for everything else."""
import math

import numpy as np

Z = 1.959964  # of 95%


def wilson(right, n):
    """The 95% interval (low, high) of a share, right of n (Wilson 1927): it holds for small n, and at 0 and 1."""
    p, z2 = right / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def resampled(columns, resamples=2000, seed=0):
    """Sums over units drawn with replacement: (n, m) -> float64 (resamples, m). The same n and seed draw the same units."""
    columns, rng = np.asarray(columns, np.float64), np.random.default_rng(seed)
    n, sums = len(columns), []
    for start in range(0, resamples, step := max(1, (1 << 22) // n)):  # at most 4 million draws in memory
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        sums.append(counts @ columns)
    return np.concatenate(sums)


def bootstrap(columns, statistic, resamples=2000, seed=0):
    """The 95% interval (low, high) of statistic(sums of the columns), a function (R, m) -> (R,), over resampled units (Efron 1979)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(resampled(columns, resamples, seed))
    return tuple(np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5]).tolist())  # of a few units all drawn may be empty ones


def mean_interval(values, resamples=2000, seed=0):
    """The 95% interval of the mean of independent values."""
    return bootstrap(np.column_stack([values, np.ones(len(values))]), lambda s: s[:, 0] / s[:, 1], resamples, seed)


def bits(sums):
    """Bits a byte from sums (R, 4) of nats, targets, tokens and bytes; the bytes are those of all tokens, the first included."""
    return sums[:, 0] / sums[:, 1] * sums[:, 2] / sums[:, 3] / math.log(2)
