"""What three lenses say together: trust them where they agree, else which one to look at.

    from lenses.verdict import grade, verdict; print(verdict(grade(result, unseen)))   # a checkpoint's figures and real text's, as eval.py has them
"""
from itertools import combinations

import numpy as np

from lenses import probes
from lenses.stats import bits, bootstrap, mean_interval

# The levels (fair from, good from) of each lens, chosen on this project's models
EXPLAINED = 0.35, 0.50    # of the nats that the frequencies of tokens leave open; a table of token pairs explains 0.37 of TinyStories, tiny.toml 0.61
ABOVE_FLOOR = 0.30, 0.10  # toy stories: nats above their entropy, as a share of it; make demo ends at 0.08
SKILL = 0.25, 0.60        # of the room above chance, mean of the probes: 0.25 is seven standard errors above guessing; from 0.6 most is known
READING = 0.90, 0.96      # of the mark that real text has: one text in four without an end costs 0.04 of six rules'
COPIED = 0.15             # of the words more than unseen real text shares with the training text: then the reading lens says nothing

FEW_TEXTS = 10            # real ones: with fewer there is nothing to read samples beside

LEVELS = "poor", "fair", "good"
LOOK = {("likelihood", -1): "it writes and answers better than it predicts: is this text like the one it was trained on?",
        ("likelihood", 1): "it predicts better than it writes and answers: look at the samples and the wrong answers, which a low loss does not show",
        ("probes", -1): "the text looks right, but it does not keep track of who and what: look at the wrong answers",
        ("probes", 1): "it knows the answers, but neither predicts nor writes so well: look at the loss by position and the samples",
        ("reading", -1): "it predicts and answers better than it writes: look at the samples, their rules and the sampling temperature",
        ("reading", 1): "it reads well and means little: look at the wrong answers, and at what is copied"}


def level(value, thresholds):
    fair, good = thresholds
    up = 1 if good >= fair else -1
    return LEVELS[int(up * value >= up * fair) + int(up * value >= up * good)]


def grade(result, unseen):
    """{lens: (level, the figure it comes from)}"""
    l, r = result["likelihood"], result["reading"]
    if "above_floor" in l:
        share = l["above_floor"] / l["floor"]
        found = {"likelihood": (level(share, ABOVE_FLOOR), f"{share:.1%} above the stories' entropy")}
    else:
        found = {"likelihood": (level(l["explained"], EXPLAINED), f"explains {l['explained']:.0%} of what token frequencies leave open")}
    if result["probes"]["probes"]:
        skill = result["probes"]["skill"]
        found["probes"] = level(skill, SKILL), f"takes {skill:.0%} of the room above chance"
    if unseen["n"] < FEW_TEXTS:
        return found
    share = r["score"] / unseen["score"] if unseen["score"] else 0.0
    found["reading"] = level(share, READING), f"{share:.0%} of the mark of real text"
    if copies(r, unseen):
        found["reading"] = "poor", f"{r['copied']:.0%} of its words are copied from the training text, {unseen['copied']:.0%} of real text's"
    return found


def copies(column, unseen):
    return column.get("copied", 0) > unseen.get("copied", 0) + COPIED


def verdict(grades):
    """(whether the lenses agree, one sentence or two)."""
    heights = {lens: LEVELS.index(found) for lens, (found, _) in grades.items()}
    if len(set(heights.values())) == 1:
        found = next(iter(grades.values()))[0]
        if len(grades) == 1:
            return False, f"Only likelihood could be graded, {found}: there is too little text for the other lenses."
        means = {"good": "trust it.", "fair": "trust them: it has learned a good part, not all.",
                 "poor": "trust them: it needs more training, data or weights."}
        return True, f"The {'three' if len(grades) == 3 else 'two'} lenses agree on {found}: {means[found]}"
    middle = sorted(heights.values())[len(heights) // 2]
    odd = max(heights, key=lambda lens: (abs(heights[lens] - middle), -heights[lens]))  # of equals the lowest
    said = ", ".join(f"{lens} {found}" for lens, (found, _) in grades.items())
    return False, f"The lenses disagree ({said}). Look at {odd} first: {LOOK[odd, 1 if heights[odd] > middle else -1]}."


def compare(results, columns, unseen, resamples, seed):
    """(whether the lenses rank alike, a sentence, the ranking by each lens). A pair counts where the 95% interval of its difference leaves
    out 0, in reading only where neither copies. columns: of likelihood, to resample."""
    names, signs = [r["out_dir"] for r in results], {"likelihood": {}, "probes": {}, "reading": {}}
    for a, b in combinations(range(len(results)), 2):
        both = np.hstack([columns[a], columns[b]])  # the same units of text, so that they are resampled together
        gaps = {"likelihood": bootstrap(both, lambda s: bits(s[:, 4:]) - bits(s[:, :4]), resamples, seed)}
        if results[a]["probes"]["probes"]:
            skills = [probes.skills(results[i]["probes"]["probes"]) for i in (a, b)]
            gaps["probes"] = probes.skill_interval([x - y for x, y in zip(*skills)], resamples, seed)
        scores = [[np.mean(list(t["marks"].values())) for t in results[i]["reading"]["texts"]] for i in (a, b)]
        gaps["reading"] = mean_interval(np.subtract(*scores), resamples, seed)
        for lens, (low, high) in gaps.items():
            signs[lens][a, b] = (low > 0) - (high < 0)
        if any(copies(results[i]["reading"], unseen) for i in (a, b)):
            signs["reading"][a, b] = 0
    key = {"likelihood": lambda i: results[i]["likelihood"]["bits_per_byte"], "probes": lambda i: -results[i]["probes"]["skill"],
           "reading": lambda i: -results[i]["reading"]["score"]}
    said = []
    for lens, pairs in signs.items():
        if pairs:
            order = sorted(range(len(results)), key=key[lens])
            links = [">" if pairs[min(p), max(p)] else "=" for p in zip(order, order[1:])]
            said.append(f"{lens}: " + "".join(f"{names[i]} {link} " for i, link in zip(order, [*links, ""])).strip())
    against = [(a, b) for a, b in signs["likelihood"] if {1, -1} <= {pairs.get((a, b)) for pairs in signs.values()}]
    if not against:
        if not any(any(pairs.values()) for pairs in signs.values()):
            return True, "No lens finds a difference that is more than chance.", said
        return True, "No two lenses contradict each other: trust the ranking.", said
    a, b = against[0]
    split = {lens: names[a] if pairs.get((a, b)) == 1 else names[b] for lens, pairs in signs.items() if pairs.get((a, b))}
    prefer = ", ".join(f"{lens} prefers {who}" for lens, who in split.items())
    return False, f"The lenses contradict each other ({prefer}): look at the samples side by side.", said
