"""The report of eval.py as tables, as text, as a line of JSON; page.py makes them a page. All from one dict of figures."""
from lenses import reading

RULES = {"ends": "no end", "whole": "broken sentence", "quotes": "quotes open", "fresh": "repeats", "loops": "loop", "known": "made-up word",
         "grammar": "not in the grammar"}


# ---- the figures as tables of strings: (title, what it says, header, rows)

def between(value, low, high, form):
    return f"{value:{form}} ({low:{form}} – {high:{form}})"


def figure(key, form, low=None):
    """A cell: d[key], with its interval in d[low + "_low"] and d[low + "_high"] if low is given; empty where d lacks it."""
    def cell(d):
        if key not in d:
            return ""
        return between(d[key], d[f"{low}_low"], d[f"{low}_high"], form) if low else f"{d[key]:{form}}"
    return cell


def above_floor(x):
    if "floor" not in x:
        return ""
    return f"{x['above_floor']:.2f} ± {x['above_floor_error']:.2f}, {x['above_floor'] / x['floor']:.1%} of {x['floor']:.2f}"


def sections(whole):
    results, reference = whole["checkpoints"], whole["reference"]
    names = [r["out_dir"] for r in results]

    def row(title, cell, of):
        cells = [cell(x) for x in of]
        return [[title, *(c or "–" for c in cells)]] if any(cells) else []

    l = results[0]["likelihood"]
    about = (f"On {whole['text']}: {l['bytes']:,} bytes, {l['units']:,} {l['unit']}; in brackets 95% of the bootstrap over them. "
             "Bits a byte is the figure that does not depend on the tokenizer.")
    of = [r["likelihood"] for r in results]
    form = ",.2f" if max(x["perplexity"] for x in of) < 1e9 else ".3g"
    rows = [*row("loss, nats a token", figure("loss", ".4f", "loss"), of), *row("perplexity", figure("perplexity", form, "perplexity"), of),
            *row("bits a byte", figure("bits_per_byte", ".4f", "bits"), of), *row("explained of what token frequencies leave open", figure("explained", ".1%"), of),
            *row("loss on training text", figure("training_loss", ".4f"), of), *row("tokens", figure("tokens", ","), of),
            *row("nats a story above the exact entropy", above_floor, of)]
    found = [("1 Likelihood", about, ["", *names], rows)]

    asked = results[0]["probes"]["probes"]
    about = ("Which completion is the likeliest? Every set of answers is asked with each of them right equally often, so that who ignores the "
             "context is at chance. In brackets Wilson's 95% interval.")
    rows = []
    for i, p in enumerate(asked):
        answered = [r["probes"]["probes"][i] for r in results]
        rows.append([p["name"], p["asks"], f"{p['n']}", f"{p['chance']:.1%}", *(between(x["accuracy"], x["low"], x["high"], ".1%") for x in answered)])
    if asked:
        rows.append(["room above chance taken", "mean of the probes", "", "0.0%", *(figure("skill", ".1%", "skill")(r["probes"]) for r in results)])
    found.append(("2 Probes", about, ["probe", "asks", "n", "chance", *names], rows))

    columns = [r["reading"] for r in results] + list(reference.values())
    header = ["", *names, *({"unseen": "real, unseen", "training": "real, training"}[key] for key in reference)]
    about = (f"{columns[0]['n']} texts, and {' and '.join(str(c['n']) for c in reference.values())} real ones, marked by the same rules: 100% is the best mark, and real text says what can be "
             f"expected. Copied: words that stand {reading.COPY} or more in a row in the training text.")
    rows = row(f"mark: mean of the {len(columns[0]['marks'])} rules below", figure("score", ".1%", "score"), columns)
    for key, title in reading.MARKS.items():
        rows += row(title, figure(key, ".1%"), [c["marks"] for c in columns])
    rows += row(f"different pairs of words in {reading.DISTINCT_WORDS:,} words", figure("distinct", ".1%"), columns)
    rows += row("words copied from the training text", figure("copied", ".1%"), columns)
    for key in ("grammar", "coherence", "creativity"):
        rows += row(f"judge: {key}, 1 to 10", lambda c: f"{c['judge'][key]:.1f} (of {c['judge']['n']})" if "judge" in c else "", columns)
    found.append(("3 Reading", about, header, rows))
    return found


def facts(whole):
    return [[r["out_dir"], r["dataset"], *(f"{r[key]:,}" for key in ("parameters", "step", "vocab_size", "block_size"))] for r in whole["checkpoints"]]


EQUAL = "= where the difference is within chance, or copied text is in the way"
FACTS = ["checkpoint", "trained on", "parameters", "step", "vocabulary", "context"]


# ---- text

def table(header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows])


def text(whole):
    parts = [table(FACTS, facts(whole))]
    for title, about, header, rows in sections(whole):
        parts.append(f"{title}\n{about}\n\n{table(header, rows) if rows else 'nothing to ask'}")
    for r in whole["checkpoints"]:
        shown = [f"[{', '.join(flags(t, whole)) or 'no fault found'}]\n{t['text']}" for t in r["reading"]["texts"][::max(1, r["reading"]["n"] // 3)][:3]]
        parts.append(f"Samples of {r['out_dir']} (all are in report.html)\n\n" + "\n\n".join(shown))
    parts += [f"Note: {note}" for note in whole["notes"]]
    for r in whole["checkpoints"]:
        levels = "\n".join(f"  {lens}: {found} ({why})" for lens, (found, why) in r["levels"].items())
        parts.append(f"Verdict on {r['out_dir']}: {r['verdict']}\n{levels}")
    if len(whole["checkpoints"]) > 1:
        parts.append("\n".join([f"Verdict: {whole['verdict']}", *(f"  {line}" for line in whole["ranking"]), f"  {EQUAL}"]))
    return "\n\n".join(parts)


def flags(text, whole):
    """The rules that a text breaks, in a few words; and whether far more of it is copied than of real text."""
    usual = whole["reference"]["unseen"].get("copied", 0)
    found = [RULES[key] for key, mark in text["marks"].items() if mark < (0.9 if key == "fresh" else 1)]
    return found + ([f"{text['copied']:.0%} copied"] if (text["copied"] or 0) >= usual + 0.5 else [])


# ---- JSON

def short(whole):
    """The figures without the texts, in plain types, rounded."""
    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items() if key not in ("texts", "right", "wrong", "made_up")}
        if isinstance(x, (list, tuple)):
            return [plain(value) for value in x]
        if isinstance(x, (str, bool)):
            return x
        return int(x) if isinstance(x, int) or float(x).is_integer() and abs(x) > 1e6 else float(f"{float(x):.6g}")
    return plain(whole)
