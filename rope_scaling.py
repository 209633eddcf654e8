"""RoPE's frequencies, and how --rope_scaling stretches them over texts longer than those a model was trained on."""

import math

import torch

# A rope_scaling is "KIND:NUMBER,NUMBER ...". The names of its numbers are those of transformers
ROPE_SCALINGS = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",  # the context of pre-training, tokens
        "beta_fast",  # from here on these may be left out
        "beta_slow",
        "attention_factor",
    ),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
YARN_LEAST = 2  # numbers
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
ROPE_FORMS = (
    "none, linear:FACTOR, ntk:FACTOR, yarn:FACTOR,CONTEXT[,BETA_FAST,BETA_SLOW,ATTENTION_FACTOR] "
    "or llama3:FACTOR,LOW,HIGH,CONTEXT"
)


def read_rope_scaling(text):
    """Returns (kind, {name: number}) of a rope_scaling. Raises ValueError where it is none."""
    kind, _, arguments = text.partition(":")
    names = ROPE_SCALINGS.get(kind, ())
    least = YARN_LEAST if kind == "yarn" else len(names)
    try:
        numbers = [float(n) for n in arguments.split(",")] if arguments else []
    except ValueError:
        numbers = []
    if kind not in ROPE_SCALINGS or not least <= len(numbers) <= len(names):
        raise ValueError(f"rope_scaling must be {ROPE_FORMS}, not {text!r:.60}")
    if not all(0 < n <= 1e9 for n in numbers):
        raise ValueError(f"numbers of rope_scaling must be above 0 and at most 1e9: {text!r:.60}")
    settings = dict(zip(names, numbers))
    if settings.get("factor", 1) < 1:
        raise ValueError(f"rope_scaling stretches: its factor must be at least 1, not {text!r:.60}")
    if not settings.get("original_max_position_embeddings", 1.0).is_integer():
        raise ValueError(f"the context of rope_scaling is a whole number of tokens, not {text!r:.60}")
    low = settings.get("low_freq_factor", 0)
    betas = YARN_DEFAULTS | settings
    if low >= settings.get("high_freq_factor", math.inf) or betas["beta_slow"] > betas["beta_fast"]:
        order = "llama3's LOW must be below HIGH and YaRN's BETA_SLOW not above BETA_FAST"
        raise ValueError(f"rope_scaling={text:.60}: {order}")
    return kind, settings


def rope_base(c):
    """Returns the base of RoPE's wavelengths: rope_theta or, with ntk, the one that stretches the longest
    wavelength by the factor and leaves the shortest as it is. Raises ValueError where there is none.
    """
    kind, numbers = read_rope_scaling(c.rope_scaling)
    if kind != "ntk":
        return c.rope_theta
    if c.head_dim < 4:
        raise ValueError(f"rope_scaling=ntk needs a head_dim of 4 or more, not {c.head_dim}")
    base = c.rope_theta * numbers["factor"] ** (c.head_dim / (c.head_dim - 2))
    if base == math.inf:
        raise ValueError(f"rope_scaling={c.rope_scaling} is too much over rope_theta={c.rope_theta}")
    return base


def rope_scale(c):
    """Returns what YaRN multiplies cos and sin by, and scores by its square: 0.1 ln(factor) + 1, or the
    ATTENTION_FACTOR that is given; 1 for all other kinds.
    """
    kind, numbers = read_rope_scaling(c.rope_scaling)
    if kind != "yarn":
        return 1.0
    return numbers.get("attention_factor", yarn_scale(numbers["factor"]))


def yarn_scale(factor):
    """Returns what YaRN multiplies cos and sin by where no ATTENTION_FACTOR is given."""
    return 0.1 * math.log(factor) + 1


def rope_frequencies(c):
    """Returns the angle that a position adds to each pair, float32 (D/2,), after rope_scaling.

    linear divides all angles (position interpolation, Chen et al. 2023), ntk changes the base (bloc97 2023);
    llama3 (Llama 3.1's) and yarn (Peng et al. 2023) divide only those of long wavelengths. Which these are
    depends, with llama3, on how often they turn over the context of pre-training, with yarn on the place of
    their pair. Raises ValueError for what is no rope_scaling.
    """
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    freq = rope_base(c) ** -exponents
    kind, numbers = read_rope_scaling(c.rope_scaling)
    if kind in ("none", "ntk"):
        return freq
    factor = numbers["factor"]
    if kind == "linear":
        return freq / factor
    if kind == "yarn":
        keep = yarn_keep(c, numbers)
    else:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        turns = numbers["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    # 1: short wavelengths, left alone; 0: long ones, stretched
    return keep * freq + (1 - keep) * freq / factor


def yarn_keep(c, numbers):
    """Returns which share of each pair's frequency YaRN leaves as it is, float32 (D/2,): 1 up to the pair that
    turns beta_fast times over the context of pre-training, 0 from the pair on that turns beta_slow times,
    and a line between them.

    The ends are rounded to whole pairs and limited as in transformers, the last one to D - 1, although there
    are D/2 pairs.
    """
    if c.rope_theta <= 1:
        raise ValueError(f"rope_scaling=yarn needs a rope_theta above 1, not {c.rope_theta}")
    numbers = YARN_DEFAULTS | numbers
    ends = []
    for turns in numbers["beta_fast"], numbers["beta_slow"]:
        wavelength = numbers["original_max_position_embeddings"] / (turns * 2 * math.pi)
        ends.append(c.head_dim * math.log(wavelength) / (2 * math.log(c.rope_theta)))
    first = max(math.floor(ends[0]), 0)
    last = min(math.ceil(ends[1]), c.head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(c.head_dim // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)
