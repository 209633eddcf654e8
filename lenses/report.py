"""The report of eval.py as tables, as text and as a line of JSON; page.py makes a page of it.

All are made from one dict of figures, here `whole`: {"checkpoints": [...], "reference": {...}, ...}.
"""

from lenses import judge, reading
from measure import align

REFERENCES = {"unseen": "real, unseen", "training": "real, training"}
EQUAL = "= where the difference is within chance, or copied text is in the way"
FACTS = ["checkpoint", "trained on", "parameters", "active", "step", "vocabulary", "context"]
FACT_KEYS = ["parameters", "active_parameters", "step", "vocab_size", "block_size"]
NOT_IN_JSON = "texts", "right", "wrong", "made_up"
FRESH = 0.9  # the mark from which a text counts as one that does not repeat itself
MUCH_COPIED = 0.5  # of the words, more than real text shares with the training text


# ---- cells of tables: strings, empty where there is no figure


def between(value, low, high, form):
    """Returns a figure with its interval, such as "0.50 (0.40 – 0.60)"."""
    return f"{value:{form}} ({low:{form}} – {high:{form}})"


def figures(dicts, key, form):
    """Returns a cell for each dict: its figure `key`."""
    return [f"{d[key]:{form}}" if key in d else "" for d in dicts]


def intervals(dicts, key, form, prefix=""):
    """Returns a cell for each dict: its figure `key` with the interval prefix_low, prefix_high."""
    prefix = prefix or key
    return [between(d[key], d[f"{prefix}_low"], d[f"{prefix}_high"], form) for d in dicts]


def above_floor(likelihood):
    """Returns a cell: how far a model is above the exact entropy of toy stories."""
    if "floor" not in likelihood:
        return ""
    gap = likelihood["above_floor"]
    floor = likelihood["floor"]
    return f"{gap:.2f} ± {likelihood['above_floor_error']:.2f}, {gap / floor:.1%} of {floor:.2f}"


def judge_marks(column, key):
    """Returns a cell: a mark of the judge, and of how many texts."""
    if "judge" not in column:
        return ""
    return f"{column['judge'][key]:.1f} (of {column['judge']['n']})"


def add_row(rows, title, cells):
    """Adds a row to a table, unless all its cells are empty."""
    if any(cells):
        rows.append([title, *(cell or "–" for cell in cells)])


# ---- the tables: (title, introduction, header, rows)


def names_of(whole):
    return [result["out_dir"] for result in whole["checkpoints"]]


def likelihood_section(whole):
    lens = [result["likelihood"] for result in whole["checkpoints"]]
    first = lens[0]
    about = (
        f"On {whole['text']}: {first['bytes']:,} bytes, {first['units']:,} {first['unit']}; "
        "in brackets 95% of the bootstrap over them. "
        "Each document is read from its own start, and what its end costs stands apart. "
        "Bits a byte is the figure that does not depend on the tokenizer."
    )
    highest = max(likelihood["perplexity"] for likelihood in lens)
    form = ",.2f" if highest < 1e9 else ".3g"
    rows = []
    add_row(rows, "loss, nats a token", intervals(lens, "loss", ".4f"))
    add_row(rows, "perplexity", intervals(lens, "perplexity", form))
    add_row(rows, "bits a byte", intervals(lens, "bits_per_byte", ".4f", "bits"))
    add_row(rows, "explained of what token frequencies leave open", figures(lens, "explained", ".1%"))
    add_row(rows, "end of a document, nats", figures(lens, "end", ".4f"))
    add_row(rows, "loss on training text", figures(lens, "training_loss", ".4f"))
    add_row(rows, "tokens", figures(lens, "tokens", ","))
    add_row(rows, "nats a story above the exact entropy", list(map(above_floor, lens)))
    return "1 Likelihood", about, ["", *names_of(whole)], rows


def probes_section(whole):
    lens = [result["probes"] for result in whole["checkpoints"]]
    about = (
        "Which completion is the likeliest? "
        "Every set of answers is asked with each of them right equally often, "
        "so that who ignores the context is at chance. "
        "In brackets Wilson's 95% interval."
    )
    rows = []
    for results in zip(*(probes["probes"] for probes in lens)):  # a probe's, one for each checkpoint
        first = results[0]
        cells = [between(probe["accuracy"], probe["low"], probe["high"], ".1%") for probe in results]
        rows.append([first["name"], first["asks"], str(first["n"]), f"{first['chance']:.1%}", *cells])
    if rows:
        cells = intervals(lens, "skill", ".1%")
        rows.append(["room above chance taken", "mean of the probes", "", "0.0%", *cells])
    return "2 Probes", about, ["probe", "asks", "n", "chance", *names_of(whole)], rows


def reading_section(whole):
    reference = whole["reference"]
    columns = [result["reading"] for result in whole["checkpoints"]]
    columns += reference.values()
    first = columns[0]
    numbers = " and ".join(str(column["n"]) for column in reference.values())
    about = (
        f"{first['n']} texts, and {numbers} real ones, marked by the same rules: "
        "100% is the best mark, and real text says what can be expected. "
        f"Copied: words that stand {reading.COPY} or more in a row in the training text."
    )
    mean = f"mark: mean of the {len(first['marks'])} rules below"
    pairs = f"different pairs of words in {reading.DISTINCT_WORDS:,} words"
    marks = [column["marks"] for column in columns]
    rows = []
    add_row(rows, mean, intervals(columns, "score", ".1%"))
    for key, (title, _) in reading.MARKS.items():
        add_row(rows, title, figures(marks, key, ".1%"))
    add_row(rows, pairs, figures(columns, "distinct", ".1%"))
    add_row(rows, "words copied from the training text", figures(columns, "copied", ".1%"))
    for key in judge.RUBRIC:
        cells = [judge_marks(column, key) for column in columns]
        add_row(rows, f"judge: {key}, 1 to 10", cells)
    header = ["", *names_of(whole), *(REFERENCES[key] for key in reference)]
    return "3 Reading", about, header, rows


def sections(whole):
    """Returns the table of each lens: (title, introduction, header, rows), cells as strings."""
    return likelihood_section(whole), probes_section(whole), reading_section(whole)


def facts(whole):
    """Returns the rows of the table of checkpoints, whose header is FACTS."""
    rows = []
    for result in whole["checkpoints"]:
        numbers = [f"{result[key]:,}" for key in FACT_KEYS]
        rows.append([result["out_dir"], result["dataset"], *numbers])
    return rows


def flags(text, whole):
    """Returns the rules that a text breaks, and whether far more of it is copied than of real text."""
    flagged = []
    for key, mark in text["marks"].items():
        enough = FRESH if key == "fresh" else 1
        if mark < enough:
            _, fault = reading.MARKS[key]
            flagged.append(fault)
    usual = whole["reference"]["unseen"].get("copied", 0)
    copied = text["copied"] or 0
    if copied >= usual + MUCH_COPIED:
        flagged.append(f"{copied:.0%} copied")
    return flagged


# ---- text


def samples_text(result, whole):
    """Returns three of a checkpoint's texts with their faults."""
    column = result["reading"]
    step = max(1, column["n"] // 3)
    parts = [f"Samples of {result['out_dir']} (all are in report.html)"]
    for text in column["texts"][::step][:3]:
        faults = ", ".join(flags(text, whole)) or "no fault found"
        parts.append(f"[{faults}]\n{text['text']}")
    return "\n\n".join(parts)


def text(whole):
    """Returns the report as text."""
    results = whole["checkpoints"]
    parts = [align([FACTS, *facts(whole)], str.ljust)]
    for title, about, header, rows in sections(whole):
        body = align([header, *rows], str.ljust) if rows else "nothing to ask"
        parts.append(f"{title}\n{about}\n\n{body}")
    parts += [samples_text(result, whole) for result in results]
    parts += [f"Note: {note}" for note in whole["notes"]]
    for result in results:
        lines = [f"Verdict on {result['out_dir']}: {result['verdict']}"]
        for lens, (level, reason) in result["levels"].items():
            lines.append(f"  {lens}: {level} ({reason})")
        parts.append("\n".join(lines))
    if len(results) > 1:
        lines = [f"Verdict: {whole['verdict']}", *whole["ranking"], EQUAL]
        parts.append("\n  ".join(lines))
    return "\n\n".join(parts)


# ---- JSON


def short(value):
    """Returns the figures without the texts, in plain types, rounded to six digits."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items() if key not in NOT_IN_JSON}
    if isinstance(value, (list, tuple)):
        return [short(item) for item in value]
    if isinstance(value, (str, bool)):
        return value
    number = float(value)
    if isinstance(value, int) or (number.is_integer() and abs(number) > 1e6):
        return int(value)
    return float(f"{number:.6g}")
