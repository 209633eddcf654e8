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
from lenses.report import EQUAL, FACTS, between, facts, flags, sections, short

MARK = "<!-- a report of eval.py -->"  # so that one may be replaced, and nothing else

e = html.escape

STYLE = """
:root {
  color-scheme: light dark; --bg: #fdfdfc; --ink: #1d2025; --soft: #5d6570;
  --line: #dfe2e6; --card: #f4f5f7; --good: #1a7f4b; --fair: #96690a; --poor: #b3382c;
  --c0: #0b66b0; --c1: #c2540a; --c2: #0a8463; --c3: #a8478a; --c4: #8a6d00;
  --c5: #4a6fa5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #15171a; --ink: #e6e8eb; --soft: #a0a8b3; --line: #33383f; --card: #1e2125;
    --good: #58c98e; --fair: #e0b252; --poor: #ef8378; --c0: #62b0f0; --c1: #f0975a;
    --c2: #4cc9a4; --c3: #dd8ac4; --c4: #d9bc4a; --c5: #93b3e0;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 {
  font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: 1rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem }
p { margin: .4rem 0 .9rem; max-width: 46rem }
.soft { color: var(--soft); overflow-wrap: anywhere }
.verdict {
  background: var(--card); border-left: 4px solid var(--level); border-radius: 6px;
  padding: .9rem 1.1rem; margin: 1.25rem 0;
}
.verdict p { margin: 0 0 .6rem; font-size: 1.05rem; max-width: none }
.verdict p:last-child { margin: 0 }
.lenses {
  display: grid; grid-template-columns: max-content max-content 1fr; gap: .3rem .9rem;
  margin: 0;
}
.lenses .why { color: var(--soft) }
.lenses.two { grid-template-columns: max-content 1fr }
.good { --level: var(--good) }
.fair { --level: var(--fair) }
.poor { --level: var(--poor) }
.mixed { --level: var(--soft) }
.level { color: var(--level); font-weight: 650 }
.wide { overflow-x: auto; margin: .75rem 0 1rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td {
  padding: .42rem 0 .42rem 1.6rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: baseline; white-space: nowrap;
}
th { font-weight: 600; color: var(--soft) }
td:first-child, th:first-child { padding-left: 0 }
.l { text-align: left; white-space: normal; min-width: 9rem; max-width: 22rem }
.many small { display: block }
tr.top td { font-weight: 650 }
small { color: var(--soft); font-size: .92em; font-weight: 400 }
.probe {
  display: grid; grid-template-columns: minmax(0, 18rem) minmax(0, 1fr); gap: .3rem 2rem;
  padding: .6rem 0; border-bottom: 1px solid var(--line); font-size: .92rem;
}
.answer { display: flex; align-items: center; gap: 0 .9rem; font-variant-numeric: tabular-nums }
.answer > small { flex: 0 0 7rem; overflow-wrap: anywhere }
.answer > span:last-child { flex: none }
.bar {
  position: relative; flex: 0 1 14rem; min-width: 7rem; height: 1.5rem;
  background: linear-gradient(var(--line), var(--line)) center / 100% 2px no-repeat;
}
.bar i { position: absolute; top: 50%; transform: translate(-50%, -50%); background: var(--c) }
.bar .dot { width: .7rem; height: .7rem; border-radius: 50% }
.bar .range { height: 4px; transform: translateY(-50%); opacity: .45; border-radius: 2px }
.bar .chance { width: 2px; height: 1.1rem; background: var(--soft) }
figure { margin: 1rem 0; max-width: 34rem }
figcaption { color: var(--soft); font-size: .9rem }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: var(--soft) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem }
.key b {
  display: inline-block; width: .8rem; height: .8rem; border-radius: 50%;
  background: var(--c); margin-right: .4rem; vertical-align: -1px;
}
.samples {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: .9rem; align-items: start;
}
.sample { background: var(--card); border-radius: 6px; padding: .8rem 1rem; min-width: 0 }
.sample .story {
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 1rem/1.5 Georgia, "DejaVu Serif", serif; margin: 0; max-width: none;
}
.sample .head { font-size: .85rem; color: var(--soft); margin: 0 0 .45rem }
.sample u { text-decoration: underline wavy var(--poor); text-underline-offset: 3px }
.flag {
  color: var(--poor); border: 1px solid; border-radius: 9px; padding: 0 .5rem;
  font-size: .8rem; white-space: nowrap; margin-right: .3rem; display: inline-block;
}
.clean { color: var(--good) }
details { margin: .9rem 0 }
summary { cursor: pointer; color: var(--soft) }
li { margin: .5rem 0 }
ul { padding-left: 1.2rem }
.right { color: var(--good) }
.wrong { color: var(--poor); text-decoration: line-through }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem;
  background: var(--card); padding: .8rem; border-radius: 6px;
}
footer { margin-top: 3rem; font-size: .85rem; color: var(--soft) }
@media (max-width: 560px) {
  main { padding: 1.25rem .9rem 3rem }
  .lenses { grid-template-columns: max-content 1fr }
  .lenses .why { grid-column: 1 / -1; margin: -.3rem 0 .4rem }
  table, .probe { font-size: .88rem }
  td small { display: block }
  .probe { grid-template-columns: minmax(0, 1fr) }
  .answer { flex-wrap: wrap }
  .bar { flex: 1 1 7rem }
  .answer > small { flex: 1 0 100%; margin-top: .3rem }
  th, td { padding-left: .7rem }
  .l { min-width: 7rem }
  .lenses.two .order { grid-column: auto }
  h2 { margin-top: 2.2rem }
}
"""


def several(whole):
    return len(whole["checkpoints"]) > 1


def colour(i):
    """Returns the style that gives an element the colour of checkpoint i."""
    return f'style="--c:var(--c{i % 6})"'


# ---- tables and probes


def cell(text):
    """Returns a figure as HTML, with what stands in brackets behind it made smaller."""
    return re.sub(r" (\(.*\)|± .*)$", r" <small>\1</small>", e(text))


def table_row(cells, tag, left):
    """Returns the cells of a row; the first `left` of them are aligned to the left."""
    parts = []
    for i, text in enumerate(cells):
        aligned = " class=l" if i < left else ""
        parts.append(f"<{tag}{aligned}>{cell(text)}</{tag}>")
    return "".join(parts)


def html_table(header, rows, left=1, top=None):
    """Returns a table. The first `left` columns are text; a row whose title starts with top is bold."""
    body = ""
    for row in rows:
        bold = " class=top" if top and row[0].startswith(top) else ""
        body += f"<tr{bold}>{table_row(row, 'td', left)}</tr>"
    many = " class=many" if len(header) > 4 else ""
    head = f"<thead><tr>{table_row(header, 'th', left)}</tr></thead>"
    return f"<div class=wide><table{many}>{head}<tbody>{body}</tbody></table></div>"


def bar(probe, i):
    """Returns accuracy, interval and chance on a line from 0 to 100%, in the colour of checkpoint i."""
    label = f"{probe['accuracy']:.0%}, chance {probe['chance']:.0%}"
    width = probe["high"] - probe["low"]
    return (
        f'<span class=bar {colour(i)} role=img aria-label="{label}">'
        f'<i class=range style="left:{probe["low"]:.1%};width:{width:.1%}"></i>'
        f'<i class=chance style="left:{probe["chance"]:.1%}"></i>'
        f'<i class=dot style="left:{probe["accuracy"]:.1%}"></i></span>'
    )


def probe_answer(result, value, low, high, whole, drawing=""):
    """Returns how one checkpoint answered a probe, with its name if there are several checkpoints."""
    name = f"<small>{e(result['out_dir'])}</small>" if several(whole) else ""
    figure = cell(between(value, low, high, ".1%"))
    return f"<div class=answer>{name}{drawing}<span>{figure}</span></div>"


def probe_block(name, asks, answers):
    title = f"<b>{e(name)}</b><br><small>{e(asks)}</small>"
    return f"<div class=probe><div>{title}</div><div>{''.join(answers)}</div></div>"


def probe_list(whole):
    """Returns the probes, each with the answers of all checkpoints, and the mean of the probes."""
    results = whole["checkpoints"]
    blocks = ""
    for n, first in enumerate(results[0]["probes"]["probes"]):
        answers = []
        for i, result in enumerate(results):
            probe = result["probes"]["probes"][n]
            figures = probe["accuracy"], probe["low"], probe["high"]
            answers.append(probe_answer(result, *figures, whole, bar(probe, i)))
        asks = f"{first['asks']}; {first['n']} questions, chance {first['chance']:.1%}"
        blocks += probe_block(first["name"], asks, answers)
    means = []
    for result in results:
        skill = result["probes"]
        figures = skill["skill"], skill["skill_low"], skill["skill_high"]
        means.append(probe_answer(result, *figures, whole))
    return blocks + probe_block("room above chance taken", "mean of the probes", means)


def wrong_answer(name, probe, answer):
    return (
        f"<li><small>{name}{e(probe['name'])}</small><br>… {e(answer['context'])}"
        f"<span class=right>{e(answer['right'])}</span> "
        f"<span class=wrong>{e(answer['chosen'].strip())}</span></li>"
    )


def wrong_answers(whole):
    """Returns a few of the wrong answers, folded up; "" where there is none."""
    items = ""
    for result in whole["checkpoints"]:
        name = f"{e(result['out_dir'])}, " if several(whole) else ""
        for probe in result["probes"]["probes"]:
            for answer in probe["wrong"]:
                items += wrong_answer(name, probe, answer)
    if not items:
        return ""
    return f"<details><summary>Some wrong answers</summary><ul>{items}</ul></details>"


# ---- the plot


def ticks(low, high):
    """Returns about five round numbers from low to high, and their decimal places."""
    width = high - low
    unit = 10 ** math.floor(math.log10(max(width, 1e-9) / 5))
    step = unit * next(k for k in (1, 2, 5, 10) if width / (unit * k) <= 5)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [step * i for i in range(first, last + 1)], places


def position_plot(whole):
    """Returns the loss over the tokens of context as SVG: a line a checkpoint, positions logarithmic."""
    width, height = 420, 250
    left, right, top, bottom = 36, 410, 10, 208  # of the axes
    lines = []
    for result in whole["checkpoints"]:
        bins = result["likelihood"]["by_position"]
        lines.append([((first * last) ** 0.5, nats) for first, last, nats, _ in bins])
    xs = [x for line in lines for x, _ in line]
    ys = [y for line in lines for _, y in line]
    log_end = math.log(max(*xs, 2))
    low = min(0.0, *ys)
    high = max(*ys, low + 1e-6) * 1.03

    def place_x(x):
        return f"{left + (right - left) * math.log(x) / log_end:.1f}"

    def place_y(y):
        return f"{top + (bottom - top) * (high - y) / (high - low):.1f}"

    drawing = ""
    values, places = ticks(low, high)
    for value in values:
        y = place_y(value)
        drawing += f'<path d="M{place_x(1)},{y}H{right}" stroke="var(--line)"/>'
        drawing += f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{value:.{places}f}</text>'
    for n in (4**k for k in range(12)):
        if n <= math.exp(log_end):
            drawing += f'<text x="{place_x(n)}" y="{bottom + 20}" text-anchor="middle">{n:,}</text>'
    for i, line in enumerate(lines):
        path = "L".join(f"{place_x(x)},{place_y(y)}" for x, y in line)
        stroke = f'stroke="var(--c{i % 6})" stroke-width="2.5" stroke-linejoin="round"'
        drawing += f'<path d="M{path}" fill="none" {stroke}/>'
    label = "tokens of context (logarithmic)"
    drawing += f'<text x="{(width + left) / 2}" y="{height - 6}" text-anchor="middle">{label}</text>'
    caption = "Loss by position: nats a token, over the tokens of context before it"
    return (
        f"<figure><figcaption>{caption}</figcaption>{key(whole)}"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by position in the context">'
        f"{drawing}</svg></figure>"
    )


def key(whole):
    """Returns the names of the checkpoints in their colours; "" for a single one."""
    if not several(whole):
        return ""
    entries = ""
    for i, result in enumerate(whole["checkpoints"]):
        entries += f"<span><b {colour(i)}></b>{e(result['out_dir'])}</span>"
    return f"<div class=key>{entries}</div>"


# ---- the verdict


def verdict_of(result, whole):
    """Returns the box with the verdict on one checkpoint and the level of each lens."""
    name = f"<p><b>{e(result['out_dir'])}</b></p>" if several(whole) else ""
    lines = ""
    for lens, (level, reason) in result["levels"].items():
        lines += f"<b>{e(lens)}</b><span class='level {level}'>{level}</span>"
        lines += f"<span class=why>{e(reason)}</span>"
    overall, _ = result["levels"]["likelihood"]
    kind = overall if result["agree"] else "mixed"
    text = f"<p>{e(result['verdict'])}</p>"
    return f"<div class='verdict {kind}'>{name}{text}<div class=lenses>{lines}</div></div>"


def verdict_box(whole):
    """Returns the verdict on each checkpoint, and before them on their ranking if there are several."""
    boxes = "".join(verdict_of(result, whole) for result in whole["checkpoints"])
    if not several(whole):
        return boxes
    lines = ""
    for line in whole["ranking"]:
        lens, order = line.split(": ", 1)
        lines += f"<b>{e(lens)}</b><span class=order>{e(order)}</span>"
    return (
        f"<div class='verdict mixed'><p>{e(whole['verdict'])}</p><div class='lenses two'>{lines}</div>"
        f"<p class=soft><small>{EQUAL}</small></p></div>{boxes}"
    )


# ---- samples


def underline(text, made_up):
    """Returns a text as HTML, with its made-up words underlined."""
    parts = ""
    for part in re.split(f"({reading.WORD.pattern})", text):
        if part.lower() in made_up:
            parts += f"<u title='not in the training text'>{e(part)}</u>"
        else:
            parts += e(part)
    return parts


def story(text, made_up):
    """Returns a sample as HTML: its prompt bold, made-up words underlined."""
    prompt = text["prompt"]
    if not prompt or not text["text"].startswith(prompt):
        return underline(text["text"], made_up)
    rest = text["text"][len(prompt) :]
    return f"<b>{underline(prompt, made_up)}</b>{underline(rest, made_up)}"


def card(column, i, name, whole):
    """Returns text i of a column with its faults, and the name of its checkpoint unless that is ""."""
    text = column["texts"][i]
    faults = "".join(f"<span class=flag>{e(fault)}</span>" for fault in flags(text, whole))
    if not faults:
        faults = "<span class=clean>no fault found</span>"
    writer = f"{e(name)} · " if name else ""
    body = story(text, set(column.get("made_up", ())))
    return f"<div class=sample><p class=head>{writer}{faults}</p><p class=story>{body}</p></div>"


def card_group(cards):
    return f"<div class=samples>{''.join(cards)}</div>"


def sample_cards(places, whole):
    """Returns the samples at some places, those of several checkpoints side by side below the prompt."""
    results = whole["checkpoints"]
    first = results[0]["reading"]
    if not several(whole):
        return card_group(card(first, i, "", whole) for i in places)
    groups = ""
    for i in places:
        prompt = first["texts"][i]["prompt"]
        title = f"Prompt: {e(prompt)}" if prompt else "No prompt"
        cards = [card(result["reading"], i, result["out_dir"], whole) for result in results]
        groups += f"<h3>{title}</h3>{card_group(cards)}"
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


def subtitle(whole):
    """Returns what was evaluated on what; with several checkpoints their facts are in a table."""
    line = f"Evaluated on {e(whole['text'])}"
    if several(whole):
        return line
    result = whole["checkpoints"][0]
    return (
        f"{line}; {result['parameters']:,} parameters, step {result['step']:,}, "
        f"vocabulary {result['vocab_size']:,}, context {result['block_size']:,}, "
        f"trained on {e(result['dataset'])}"
    )


def page(whole):
    """Returns the report as HTML. whole: the figures as eval.py has them."""
    likelihood, probes, texts = sections(whole)
    title_1, about_1, header_1, rows_1 = likelihood
    title_2, about_2, _, rows_2 = probes
    title_3, about_3, header_3, rows_3 = texts
    names = e(", ".join(result["out_dir"] for result in whole["checkpoints"]))
    notes = "".join(f"<p class=soft>{e(note)}</p>" for note in whole["notes"])
    checkpoints = html_table(FACTS, facts(whole), left=2) if several(whole) else ""
    likelihood_table = html_table(header_1, rows_1, top="bits")
    questions = probe_list(whole) if rows_2 else "<p>nothing to ask</p>"
    reading_table = html_table(header_3, rows_3, top="mark")
    figures = e(json.dumps(short(whole), indent=1))
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{names}: evaluation</title><style>{STYLE}</style></head><body><main>
<h1>{names}</h1><p class=soft>{subtitle(whole)}</p>
{verdict_box(whole)}{notes}{checkpoints}
<h2>{title_1}</h2><p class=soft>{e(about_1)}</p>{likelihood_table}{position_plot(whole)}
<h2>{title_2}</h2>
<p class=soft>{e(about_2)} The bars go from 0 to 100%, the upright line is chance.</p>
{questions}{wrong_answers(whole)}
<h2>{title_3}</h2><p class=soft>{e(about_3)}</p>{reading_table}{made_up_words(whole)}
{samples(whole)}
<footer><p>Seed {whole["seed"]}; {e(whole["computed"])}.</p>
<details><summary>All figures as JSON</summary><pre>{figures}</pre></details></footer>
</main></body></html>
"""


def is_report(path):
    """Returns whether eval.py wrote the file at path."""
    with open(path, encoding="utf-8", errors="replace") as f:
        return MARK in f.read(200)


def check(path):
    """Makes a report's folder. Raises Refusal where path cannot be written or holds another file."""
    try:
        if is_report(path):
            return
    except FileNotFoundError:
        make_folder(path)
        return
    except (OSError, ValueError) as problem:
        raise Refusal(f"cannot write {path}: {getattr(problem, 'strerror', problem)}")
    message = f"{path} is there already and was not written by eval.py"
    raise Refusal(f"{message}; --report_dir=OTHER writes elsewhere")


def make_folder(path):
    """Makes the folder that path is in. Raises Refusal where that fails or it cannot be written to."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as problem:
        raise Refusal(f"cannot write {path}: {problem.strerror}")
    if not os.access(folder, os.W_OK):
        raise Refusal(f"cannot write {path}: permission denied")


def write(path, whole):
    """Writes the report to path, which is replaced at once or not at all."""
    write_atomic(path, lambda f: f.write(page(whole).encode("utf-8", "replace")))
