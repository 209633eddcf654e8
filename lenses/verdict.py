"""What three lenses say together. Where they agree, trust them; where not, the verdict says what to look at.

    from lenses.verdict import grade, verdict
    print(verdict(grade(result, unseen)))

result has a checkpoint's figures and unseen those of real text, both as eval.py makes them.
"""

from itertools import combinations

import numpy as np

from lenses import probes, reading
from lenses.stats import bits, bootstrap, mean_interval

# The thresholds (fair from, good from) of each lens, chosen on this project's models.

# Of the nats that the frequencies of tokens leave open. A table of token pairs explains 0.37 of
# TinyStories, tiny.toml 0.61.
EXPLAINED = 0.35, 0.50

# Toy stories: minus the nats above their entropy, as a share of it. make demo ends at -0.08.
ABOVE_FLOOR = -0.30, -0.10

# Of the room above chance, mean of the probes. 0.25 is seven standard errors above guessing; from 0.6
# most is known.
SKILL = 0.25, 0.60

# Of the mark that real text has. One text in four without an end costs 0.04 of six rules' mark.
READING = 0.90, 0.96

# Of the words, more than unseen real text shares with the training text: then the reading lens says
# nothing.
COPIED = 0.15

FEW_TEXTS = 10  # real ones; with fewer there is nothing to read samples beside

LEVELS = "poor", "fair", "good"

# What to look at where one lens is below (-1) or above (1) the others.
LOOK = {
    ("likelihood", -1): "it writes and answers better than it predicts: "
    "see whether this text is like the one it was trained on",
    ("likelihood", 1): "it predicts better than it writes and answers: "
    "look at the samples and the wrong answers, which a low loss does not show",
    ("probes", -1): "the text looks right, but it does not keep track of who and what: "
    "look at the wrong answers",
    ("probes", 1): "it knows the answers, but neither predicts nor writes so well: "
    "look at the loss by position and the samples",
    ("reading", -1): "it predicts and answers better than it writes: "
    "look at the samples, their rules and the sampling temperature",
    ("reading", 1): "it reads well and means little: look at the wrong answers, and at what is copied",
}
ADVICE = {
    "good": "trust it.",
    "fair": "trust them: it has learned a good part, not all.",
    "poor": "trust them: it needs more training, data or weights.",
}


# ---- one checkpoint


def level(value, thresholds):
    """Returns "poor", "fair" or "good"."""
    return LEVELS[sum(value >= threshold for threshold in thresholds)]


def grade_likelihood(figures):
    """Returns the level of the likelihood lens and the figure behind it."""
    if "above_floor" in figures:
        share = figures["above_floor"] / figures["floor"]
        return level(-share, ABOVE_FLOOR), f"{share:.1%} above the stories' entropy"
    explained = figures["explained"]
    reason = f"explains {explained:.0%} of what token frequencies leave open"
    return level(explained, EXPLAINED), reason


def grade_reading(column, unseen):
    """Returns the level of the reading lens and the figure behind it."""
    if copies(column, unseen):
        reason = (
            f"{column['copied']:.0%} of its words are copied from the training text, "
            f"{unseen['copied']:.0%} of real text's"
        )
        return "poor", reason
    share = column["score"] / unseen["score"] if unseen["score"] else 0.0
    return level(share, READING), f"{share:.0%} of the mark of real text"


def grade(result, unseen):
    """Returns {lens: (level, the figure behind it)} for a checkpoint, beside unseen real text.

    A lens that has too little text to look at is left out.
    """
    grades = {"likelihood": grade_likelihood(result["likelihood"])}
    if result["probes"]["probes"]:
        skill = result["probes"]["skill"]
        grades["probes"] = level(skill, SKILL), f"takes {skill:.0%} of the room above chance"
    if unseen["n"] >= FEW_TEXTS:
        grades["reading"] = grade_reading(result["reading"], unseen)
    return grades


def copies(column, unseen):
    """Returns whether far more of a column's text is copied than of unseen real text."""
    return column.get("copied", 0) > unseen.get("copied", 0) + COPIED


def verdict(grades):
    """Returns whether the lenses agree, and one or two sentences about it."""
    heights = {lens: LEVELS.index(name) for lens, (name, _) in grades.items()}
    if len(set(heights.values())) == 1:
        name, _ = grades["likelihood"]
        if len(grades) == 1:
            reason = "there is too little text for the other lenses."
            return False, f"Only likelihood could be graded, {name}: {reason}"
        number = "three" if len(grades) == 3 else "two"
        return True, f"The {number} lenses agree on {name}: {ADVICE[name]}"
    middle = sorted(heights.values())[len(heights) // 2]

    def oddity(lens):  # of equally distant lenses the lowest is the odd one
        return abs(heights[lens] - middle), -heights[lens]

    odd = max(heights, key=oddity)
    side = 1 if heights[odd] > middle else -1
    levels = ", ".join(f"{lens} {name}" for lens, (name, _) in grades.items())
    return False, f"The lenses disagree ({levels}). Look at {odd} first: {LOOK[odd, side]}."


# ---- several checkpoints


def bits_gap(sums):
    """Returns bits a byte of the second checkpoint minus those of the first. sums: (resamples, 8)."""
    return bits(sums[:, 3:]) - bits(sums[:, :3])


def gap_intervals(a, b, columns_a, columns_b, resamples, seed):
    """Returns {lens: 95% interval of how much better checkpoint a is than b}."""
    both = np.hstack([columns_a, columns_b])  # the same units of text, so resampled together
    gaps = {"likelihood": bootstrap(both, bits_gap, resamples, seed)}
    if a["probes"]["probes"]:
        skills_a = probes.skills(a["probes"]["probes"])
        skills_b = probes.skills(b["probes"]["probes"])
        differences = [x - y for x, y in zip(skills_a, skills_b)]
        gaps["probes"] = probes.skill_interval(differences, resamples, seed)
    scores = np.subtract(*(reading.mean_marks(result["reading"]["texts"]) for result in (a, b)))
    gaps["reading"] = mean_interval(scores, resamples, seed)
    return gaps


def preferences(results, columns, unseen, resamples, seed):
    """Returns {lens: {(i, j): 1, 0 or -1}}, which of two checkpoints a lens prefers, if any.

    A lens prefers one where the 95% interval of the difference leaves out 0; the reading lens does so
    only where neither copies.
    """
    signs = {"likelihood": {}, "probes": {}, "reading": {}}
    for i, j in combinations(range(len(results)), 2):
        a, b = results[i], results[j]
        gaps = gap_intervals(a, b, columns[i], columns[j], resamples, seed)
        for lens, (low, high) in gaps.items():
            signs[lens][i, j] = int(low > 0) - int(high < 0)
        if copies(a["reading"], unseen) or copies(b["reading"], unseen):
            signs["reading"][i, j] = 0
    return signs


# By what a lens sorts checkpoints, the best first
BADNESS = {
    "likelihood": lambda result: result["likelihood"]["bits_per_byte"],
    "probes": lambda result: -result["probes"]["skill"],
    "reading": lambda result: -result["reading"]["score"],
}


def ranking(lens, pairs, results):
    """Returns a line such as "probes: out/a > out/b = out/c"."""
    order = sorted(range(len(results)), key=lambda i: BADNESS[lens](results[i]))
    line = f"{lens}: {results[order[0]]['out_dir']}"
    for before, i in zip(order, order[1:]):
        pair = min(before, i), max(before, i)
        link = ">" if pairs[pair] else "="
        line += f" {link} {results[i]['out_dir']}"
    return line


def compare(results, columns, unseen, resamples, seed):
    """Returns whether the lenses rank checkpoints alike, a sentence, and the ranking by each lens.

    columns: each checkpoint's likelihood, (units, 3) of nats, tokens and bytes, to resample.
    """
    signs = preferences(results, columns, unseen, resamples, seed)
    rankings = [ranking(lens, pairs, results) for lens, pairs in signs.items() if pairs]
    opposed = []  # the pairs about which two lenses say the opposite
    for pair in signs["likelihood"]:
        if {1, -1} <= {pairs.get(pair) for pairs in signs.values()}:
            opposed.append(pair)
    if not opposed:
        if not any(any(pairs.values()) for pairs in signs.values()):
            return True, "No lens finds a difference that is more than chance.", rankings
        return True, "No two lenses contradict each other: trust the ranking.", rankings
    i, j = opposed[0]
    opinions = []
    for lens, pairs in signs.items():
        sign = pairs.get((i, j))
        if sign:
            preferred = results[i if sign == 1 else j]["out_dir"]
            opinions.append(f"{lens} prefers {preferred}")
    reasons = ", ".join(opinions)
    sentence = f"The lenses contradict each other ({reasons}): look at the samples side by side."
    return False, sentence, rankings
