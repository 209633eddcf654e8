"""The report of eval.py as one HTML page: its style and drawings are in it, nothing is loaded.

What is not written here is escaped by e().
"""

import html
import json
import math
import os
import re

from config import Refusal
from folders import write_atomic
from lenses import reading
from lenses.report import EQUAL, FACTS, facts, flags, names_of, sections, short

MARK = "<!-- a report of eval.py -->"  # so that one may be replaced, and nothing else

e = html.escape

COLOURS = 6  # --c0 to --c5; more lines are dashed
STYLE = """
:root {
  color-scheme: light dark;
  --bg: light-dark(#fdfdfc, #15171a); --card: light-dark(#f4f5f7, #1e2125);
  --ink: light-dark(#1d2025, #e6e8eb); --soft: light-dark(#5d6570, #a0a8b3);
  --line: light-dark(#dfe2e6, #33383f); --good: light-dark(#1a7f4b, #58c98e);
  --fair: light-dark(#96690a, #e0b252); --poor: light-dark(#b3382c, #ef8378);
  --c0: light-dark(#0b66b0, #62b0f0); --c1: light-dark(#c2540a, #f0975a);
  --c2: light-dark(#0a8463, #4cc9a4); --c3: light-dark(#a8478a, #dd8ac4);
  --c4: light-dark(#8a6d00, #d9bc4a); --c5: light-dark(#4a6fa5, #93b3e0);
}
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 0; padding-top: 1rem; border-top: 1px solid var(--line) }
p { margin: .4rem 0; max-width: 46rem }
.soft, small, summary, footer, figcaption { color: var(--soft); overflow-wrap: anywhere }
small { font-weight: 400 }
.verdict {
  background: var(--card); border-left: 4px solid; border-radius: 6px;
  padding: .5rem 1.1rem; margin: 1.25rem 0;
}
.wide { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td {
  padding: .42rem 1.6rem .42rem 0; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: baseline; white-space: nowrap;
}
th { color: var(--soft) }
.l { text-align: left; white-space: normal; min-width: 9rem; max-width: 22rem }
tr:has(:nth-child(5)) small { display: block }
.top { font-weight: 650 }
.bar {
  display: block; height: 1.1rem; min-width: 7rem;
  background:
    radial-gradient(circle at var(--accuracy), var(--c) 5px, transparent 6px),
    linear-gradient(var(--ink) 0 0) var(--chance) / 2px no-repeat,
    linear-gradient(90deg, var(--line) var(--low), var(--c) 0 var(--high), var(--line) 0)
    center / 100% 3px no-repeat;
}
figure { margin: 0; max-width: 34rem }
svg { display: block; width: 100%; overflow: visible; font: 12px system-ui, sans-serif }
svg text { fill: var(--soft) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem }
.samples {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: .9rem; align-items: start; margin: .9rem 0;
}
.sample { background: var(--card); border-radius: 6px; padding: .8rem 1rem; min-width: 0 }
.story { white-space: pre-wrap; overflow-wrap: anywhere; font-family: Georgia, serif }
.head { font-size: .85rem; color: var(--soft) }
u { text-decoration: underline wavy var(--poor) }
.flag { color: var(--poor); border: 1px solid; border-radius: 9px; padding: 0 .5rem; margin-right: .3rem }
.clean, .right { color: var(--good) }
.wrong { color: var(--poor); text-decoration: line-through }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .8rem }
"""


def several(whole):
    return len(whole["checkpoints"]) > 1


# ---- tables and probes


def cell(text):
    """Returns a figure as HTML, with what stands in brackets behind it made smaller."""
    return re.sub(r" (\(.*\)|± .*)$", r" <small>\1</small>", e(text))


def html_table(header, rows, left=1, top=None, drawings=None):
    """Returns a table. The first `left` columns are text; a row whose title starts with top is bold.

    drawings: {(i, j): HTML below the text of column j in row i}, where row 0 is the header.
    """
    drawings = drawings or {}
    lines = ""
    for i, row in enumerate([header, *rows]):
        tag = "td" if i else "th"
        lines += "<tr class=top>" if top and row[0].startswith(top) else "<tr>"
        for j, text in enumerate(row):
            aligned = " class=l" if j < left else ""
            lines += f"<{tag}{aligned}>{cell(text)}{drawings.get((i, j), '')}</{tag}>"
        lines += "</tr>"
    return f"<div class=wide><table>{lines}</table></div>"


def bar(probe, i):
    """Returns accuracy, interval and chance on a line from 0 to 100%, in the colour of checkpoint i."""
    places = [f"--{key}:{probe[key]:.1%}" for key in ("accuracy", "low", "high", "chance")]
    return f'<i class=bar style="--c:var(--c{i % COLOURS});{";".join(places)}"></i>'


def probe_table(header, rows, whole):
    """Returns the table of the probes, with a bar below each accuracy."""
    if not rows:
        return "<p>nothing to ask</p>"
    results = whole["checkpoints"]
    first = len(header) - len(results)  # the column of the first checkpoint
    drawings = {}
    for i, result in enumerate(results):
        for n, probe in enumerate(result["probes"]["probes"], 1):
            drawings[n, first + i] = bar(probe, i)
    return html_table(header, rows, left=2, drawings=drawings)


def wrong_answers(whole):
    """Returns a few of the wrong answers, folded up; "" where there is none."""
    items = ""
    for result in whole["checkpoints"]:
        name = f"{e(result['out_dir'])}, " if several(whole) else ""
        for probe in result["probes"]["probes"]:
            for answer in probe["wrong"]:
                items += (
                    f"<li><small>{name}{e(probe['name'])}</small><br>… {e(answer['context'])}"
                    f"<span class=right>{e(answer['right'])}</span> "
                    f"<span class=wrong>{e(answer['chosen'].strip())}</span></li>"
                )
    if not items:
        return ""
    return f"<details><summary>Some wrong answers</summary><ul>{items}</ul></details>"


# ---- the plot


def ticks(low, high):
    """Returns about five round numbers from low to high."""
    width = high - low
    unit = 10 ** math.floor(math.log10(max(width, 1e-9) / 5))
    step = unit * next(k for k in (1, 2, 5, 10) if width / (unit * k) <= 5)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def position_plot(whole):
    """Returns the loss over the tokens of context as SVG: a line a checkpoint, positions logarithmic."""
    lines = []
    for result in whole["checkpoints"]:
        bins = result["likelihood"]["by_position"]
        lines.append([((first * last) ** 0.5, nats) for first, last, nats, _ in bins])
    log_end = math.log(max(2, *(x for line in lines for x, _ in line)))
    marks = [4**k for k in range(12) if 4**k <= math.exp(log_end)]
    low = min(0.0, *(nats for line in lines for _, nats in line))
    return line_plot(
        lines,
        names_of(whole),
        lambda x: math.log(x) / log_end,
        marks,
        low,
        "Loss by position: nats a token, over the tokens of context before it",
        "tokens of context (logarithmic)",
    )


def line_plot(lines, names, share, marks, low, caption, label):
    """Returns lines [(x, y), ...] with their names as SVG, in HTML.

    share(x) is where x is on its axis, from 0 to 1; marks are the numbers at it, label stands below.
    The other axis begins at low.
    """
    width, height = 420, 250
    left, right, top, bottom = 36, 410, 10, 208  # of the axes
    high = max(low + 1e-6, *(y for line in lines for _, y in line)) * 1.03

    def place_x(x):
        return f"{left + (right - left) * share(x):.1f}"

    def place_y(y):
        return f"{top + (bottom - top) * (high - y) / (high - low):.1f}"

    drawing = ""
    for value in ticks(low, high):
        y = place_y(value)
        drawing += f'<path d="M{left}.0,{y}H{right}" stroke="var(--line)"/>'
        drawing += f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{value:g}</text>'
    for x in marks:
        drawing += f'<text x="{place_x(x)}" y="{bottom + 20}" text-anchor="middle">{x:,}</text>'
    for i, line in enumerate(lines):
        path = "L".join(f"{place_x(x)},{place_y(y)}" for x, y in line)
        dashes = 'stroke-dasharray="7 4" ' if i >= COLOURS else ""
        stroke = f'stroke="var(--c{i % COLOURS})" stroke-width="2.5" {dashes}stroke-linejoin="round"'
        drawing += f'<path d="M{path}" fill="none" {stroke}/>'
    drawing += f'<text x="{(width + left) / 2}" y="{height - 6}" text-anchor="middle">{label}</text>'
    return (
        f"<figure><figcaption>{caption}</figcaption>{key(names)}"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{caption}">'
        f"{drawing}</svg></figure>"
    )


def key(names):
    """Returns names in the colours of their lines, the dashed ones hollow; "" for a single one."""
    if len(names) < 2:
        return ""
    entries = ""
    for i, name in enumerate(names):
        dot = "○" if i >= COLOURS else "●"
        entries += f'<span style="color:var(--c{i % COLOURS})">{dot} {e(name)}</span>'
    return f"<div class=key>{entries}</div>"


# ---- the verdict


def box(level, lines):
    """Returns paragraphs of HTML in a box, whose edge has the colour of the level."""
    paragraphs = "".join(f"<p>{line}</p>" for line in lines)
    return f'<div class=verdict style="border-color:var(--{level})">{paragraphs}</div>'


def verdict_box(whole):
    """Returns the verdict on each checkpoint, and before them on their ranking if there are several."""
    boxes = ""
    if several(whole):
        small = f"<small>{EQUAL}</small>"
        boxes = box("soft", [e(whole["verdict"]), *map(e, whole["ranking"]), small])
    for result in whole["checkpoints"]:
        name = f"<b>{e(result['out_dir'])}</b> " if several(whole) else ""
        lines = [f"{name}{e(result['verdict'])}"]
        for lens, (level, reason) in result["levels"].items():
            mark = f'<b style="color:var(--{level})">{level}</b>'
            lines.append(f"{e(lens)} {mark} <small>{e(reason)}</small>")
        overall, _ = result["levels"]["likelihood"]
        boxes += box(overall if result["agree"] else "soft", lines)
    return boxes


# ---- samples


def underline(text, made_up):
    """Returns a text as HTML, with its made-up words underlined."""
    parts = re.split(f"({reading.WORD.pattern})", text)
    for i, part in enumerate(parts):
        parts[i] = e(part)
        if part.lower() in made_up:
            parts[i] = f"<u title='not in the training text'>{e(part)}</u>"
    return "".join(parts)


def card(column, i, name, whole):
    """Returns text i of a column with its faults, its prompt bold, and the name of its checkpoint unless that is ""."""
    text = column["texts"][i]
    faults = "".join(f"<span class=flag>{e(fault)}</span>" for fault in flags(text, whole))
    if not faults:
        faults = "<span class=clean>no fault found</span>"
    writer = f"{e(name)} · " if name else ""
    prompt = text["prompt"]
    made_up = set(column.get("made_up", ()))
    rest = underline(text["text"].removeprefix(prompt), made_up)
    body = f"<b>{underline(prompt, made_up)}</b>{rest}"
    return f"<div class=sample><p class=head>{writer}{faults}</p><p class=story>{body}</p></div>"


def card_group(cards):
    return f"<div class=samples>{''.join(cards)}</div>"


def sample_cards(places, whole):
    """Returns the samples at some places, those of several checkpoints side by side."""
    results = whole["checkpoints"]
    if not several(whole):
        return card_group(card(results[0]["reading"], i, "", whole) for i in places)
    groups = ""
    for i in places:
        groups += card_group(card(result["reading"], i, result["out_dir"], whole) for result in results)
    return groups


def samples(whole):
    """Returns the first sample of each prompt; the others and some real text are folded up."""
    prompts = [text["prompt"] for text in whole["checkpoints"][0]["reading"]["texts"]]
    first = [i for i, prompt in enumerate(prompts) if prompt not in prompts[:i]]
    rest = [i for i, prompt in enumerate(prompts) if prompt in prompts[:i]]
    about = "The first of each prompt, which is bold. Words underlined are not in the training text."
    folded = ""
    if rest:
        summary = f"<summary>{len(rest)} more</summary>"
        folded = f"<details>{summary}{sample_cards(rest, whole)}</details>"
    unseen = whole["reference"]["unseen"]
    real = [card(unseen, i, "", whole) for i in range(min(4, unseen["n"]))]
    return (
        f"<h2>Samples</h2><p class=soft>{about}</p>{sample_cards(first, whole)}{folded}"
        f"<details><summary>Real text, for comparison</summary>{card_group(real)}</details>"
    )


def made_up_words(whole):
    """Returns a line for each checkpoint with words that the training text does not have."""
    lines = ""
    for result in whole["checkpoints"]:
        words = result["reading"].get("made_up")
        if words:
            name = e(result["out_dir"])
            shown = e(", ".join(words[:30]))
            lines += f"<p class=soft>Words of {name} that the training text does not have: {shown}</p>"
    return lines


# ---- the page


def page(whole):
    """Returns the report as HTML. whole: the figures of eval.evaluate."""
    likelihood, probes, texts = sections(whole)
    title_1, about_1, header_1, rows_1 = likelihood
    title_2, about_2, header_2, rows_2 = probes
    title_3, about_3, header_3, rows_3 = texts
    names = e(", ".join(names_of(whole)))
    notes = "".join(f"<p class=soft>{e(note)}</p>" for note in whole["notes"])
    body = f"""<h1>{names}</h1><p class=soft>Evaluated on {e(whole["text"])}</p>
{verdict_box(whole)}{notes}{html_table(FACTS, facts(whole), left=2)}
<h2>{title_1}</h2><p class=soft>{e(about_1)}</p>
{html_table(header_1, rows_1, top="bits")}{position_plot(whole)}
<h2>{title_2}</h2>
<p class=soft>{e(about_2)} The bars go from 0 to 100%, the upright line is chance.</p>
{probe_table(header_2, rows_2, whole)}{wrong_answers(whole)}
<h2>{title_3}</h2><p class=soft>{e(about_3)}</p>
{html_table(header_3, rows_3, top="mark")}{made_up_words(whole)}
{samples(whole)}"""
    return frame(f"{names}: evaluation", body, whole)


def frame(title, body, whole):
    """Returns a page with a title and a body, both HTML, and at its end all figures."""
    figures = e(json.dumps(short(whole), indent=1))
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body><main>
{body}
<footer><p>Seed {whole["seed"]}; {e(whole["computed"])}.</p>
<details><summary>All figures as JSON</summary><pre>{figures}</pre></details></footer>
</main></body></html>
"""


def check(path):
    """Makes a report's folder. Raises Refusal where path cannot be written or holds another file."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                is_report = MARK in f.read(200)
            if not is_report:
                message = f"{path} is there already and was not written by eval.py"
                raise Refusal(f"{message}; --report_dir=OTHER writes elsewhere")
    except (OSError, ValueError) as problem:
        raise Refusal(f"cannot write {path}: {getattr(problem, 'strerror', problem)}")
    if not os.access(folder, os.W_OK):
        raise Refusal(f"cannot write {path}: permission denied")


def write(path, text):
    """Writes a page to path, which is replaced at once or not at all."""
    write_atomic(path, lambda f: f.write(text.encode("utf-8", "replace")))
