"""The report of eval.py as one HTML page: its style and drawings are in it, nothing is loaded. What is not written here is escaped by e()."""
import html
import json
import math
import os
import re

import checkpoint
from config import Refusal
from lenses import reading
from lenses.report import EQUAL, FACTS, between, facts, flags, sections, short

MARK = "<!-- a report of eval.py -->"  # so that one may be replaced, and nothing else

e = html.escape

STYLE = """
:root { color-scheme: light dark; --bg: #fdfdfc; --ink: #1d2025; --soft: #5d6570; --line: #dfe2e6; --card: #f4f5f7; --good: #1a7f4b;
    --fair: #96690a; --poor: #b3382c; --c0: #0b66b0; --c1: #c2540a; --c2: #0a8463; --c3: #a8478a; --c4: #8a6d00; --c5: #4a6fa5 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15171a; --ink: #e6e8eb; --soft: #a0a8b3; --line: #33383f; --card: #1e2125; --good: #58c98e; --fair: #e0b252; --poor:
    #ef8378; --c0: #62b0f0; --c1: #f0975a; --c2: #4cc9a4; --c3: #dd8ac4; --c4: #d9bc4a; --c5: #93b3e0 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
    sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem }
p { margin: .4rem 0 .9rem; max-width: 46rem }
.soft { color: var(--soft); overflow-wrap: anywhere }
.verdict { background: var(--card); border-left: 4px solid var(--level); border-radius: 6px; padding: .9rem 1.1rem; margin: 1.25rem 0 }
.verdict p { margin: 0 0 .6rem; font-size: 1.05rem; max-width: none }
.verdict p:last-child { margin: 0 }
.lenses { display: grid; grid-template-columns: max-content max-content 1fr; gap: .3rem .9rem; margin: 0 }
.lenses .why { color: var(--soft) }
.lenses.two { grid-template-columns: max-content 1fr }
.good { --level: var(--good) }
.fair { --level: var(--fair) }
.poor { --level: var(--poor) }
.mixed { --level: var(--soft) }
.level { color: var(--level); font-weight: 650 }
.wide { overflow-x: auto; margin: .75rem 0 1rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .42rem 0 .42rem 1.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; white-space:
    nowrap }
th { font-weight: 600; color: var(--soft) }
td:first-child, th:first-child { padding-left: 0 }
.l { text-align: left; white-space: normal; min-width: 9rem; max-width: 22rem }
.many small { display: block }
tr.top td { font-weight: 650 }
small { color: var(--soft); font-size: .92em; font-weight: 400 }
.probe { display: grid; grid-template-columns: minmax(0, 18rem) minmax(0, 1fr); gap: .3rem 2rem; padding: .6rem 0; border-bottom: 1px
    solid var(--line); font-size: .92rem }
.answer { display: flex; align-items: center; gap: 0 .9rem; font-variant-numeric: tabular-nums }
.answer > small { flex: 0 0 7rem; overflow-wrap: anywhere }
.answer > span:last-child { flex: none }
.bar { position: relative; flex: 0 1 14rem; min-width: 7rem; height: 1.5rem; background: linear-gradient(var(--line), var(--line)) center
    / 100% 2px no-repeat }
.bar i { position: absolute; top: 50%; transform: translate(-50%, -50%); background: var(--c) }
.bar .dot { width: .7rem; height: .7rem; border-radius: 50% }
.bar .range { height: 4px; transform: translateY(-50%); opacity: .45; border-radius: 2px }
.bar .chance { width: 2px; height: 1.1rem; background: var(--soft) }
figure { margin: 1rem 0; max-width: 34rem }
figcaption { color: var(--soft); font-size: .9rem }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: var(--soft) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem }
.key b { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; background: var(--c); margin-right: .4rem;
    vertical-align: -1px }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: .9rem; align-items: start }
.sample { background: var(--card); border-radius: 6px; padding: .8rem 1rem; min-width: 0 }
.sample .story { white-space: pre-wrap; overflow-wrap: anywhere; font: 1rem/1.5 Georgia, "DejaVu Serif", serif; margin: 0; max-width: none
    }
.sample .head { font-size: .85rem; color: var(--soft); margin: 0 0 .45rem }
.sample u { text-decoration: underline wavy var(--poor); text-underline-offset: 3px }
.flag { color: var(--poor); border: 1px solid; border-radius: 9px; padding: 0 .5rem; font-size: .8rem; white-space: nowrap; margin-right:
    .3rem; display: inline-block }
.clean { color: var(--good) }
details { margin: .9rem 0 }
summary { cursor: pointer; color: var(--soft) }
li { margin: .5rem 0 }
ul { padding-left: 1.2rem }
.right { color: var(--good) }
.wrong { color: var(--poor); text-decoration: line-through }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; background: var(--card); padding: .8rem; border-radius: 6px }
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


def cell(text):
    """A figure, with what stands in brackets behind it made smaller."""
    return re.sub(r" (\(.*\)|± .*)$", r" <small>\1</small>", e(text))


def html_table(header, rows, left=1, top=()):
    def line(cells, tag):
        return "".join(f"<{tag}{' class=l' if i < left else ''}>{cell(c)}</{tag}>" for i, c in enumerate(cells))
    body = "".join(f"<tr{' class=top' if row[0].startswith(top) else ''}>{line(row, 'td')}</tr>" for row in rows)
    many = " class=many" if len(header) > 4 else ""
    return f"<div class=wide><table{many}><thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def bar(p, i):
    """Accuracy with its interval and chance on a line from 0 to 100%, in the colour of checkpoint i."""
    return (f'<span class=bar style="--c:var(--c{i % 6})" role=img aria-label="{p["accuracy"]:.0%}, chance {p["chance"]:.0%}">'
            f'<i class=range style="left:{p["low"]:.1%};width:{p["high"] - p["low"]:.1%}"></i>'
            f'<i class=chance style="left:{p["chance"]:.1%}"></i><i class=dot style="left:{p["accuracy"]:.1%}"></i></span>')


def probe_list(whole):
    results = whole["checkpoints"]

    def answer(r, figures, drawn=""):
        who = f"<small>{e(r['out_dir'])}</small>" if len(results) > 1 else ""
        return f"<div class=answer>{who}{drawn}<span>{cell(between(*figures, '.1%'))}</span></div>"

    def block(name, asks, answers):
        return f"<div class=probe><div><b>{e(name)}</b><br><small>{e(asks)}</small></div><div>{''.join(answers)}</div></div>"
    blocks = ""
    for n, asked in enumerate(results[0]["probes"]["probes"]):
        answered = [r["probes"]["probes"][n] for r in results]
        blocks += block(asked["name"], f"{asked['asks']}; {asked['n']} questions, chance {asked['chance']:.1%}",
                        [answer(r, (p["accuracy"], p["low"], p["high"]), bar(p, i)) for i, (r, p) in enumerate(zip(results, answered))])
    means = [(r["probes"]["skill"], r["probes"]["skill_low"], r["probes"]["skill_high"]) for r in results]
    return blocks + block("room above chance taken", "mean of the probes", [answer(r, mean) for r, mean in zip(results, means)])


def ticks(low, high):
    """Round numbers from low to high, about five, and their decimal places."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 5))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def position_plot(whole):
    """Loss over the tokens of context before, as SVG: a line a checkpoint, positions on a logarithmic scale."""
    W, H, left, right, top, bottom = 420, 250, 36, 10, 10, 42
    lines = [[((a * b) ** 0.5, y) for a, b, y, _ in r["likelihood"]["by_position"]] for r in whole["checkpoints"]]
    xs, ys = [x for line in lines for x, _ in line], [y for line in lines for _, y in line]
    high, low = math.log(max(*xs, 2)), min(0.0, *ys)
    most = max(*ys, low + 1e-6) * 1.03

    def X(x):
        return f"{left + (W - left - right) * math.log(x) / high:.1f}"

    def Y(y):
        return f"{top + (H - top - bottom) * (most - y) / (most - low):.1f}"
    marks, digits = ticks(low, most)
    drawn = [f'<path d="M{X(1)},{Y(y)}H{W - right}" stroke="var(--line)"/><text x="{left - 8}" y="{Y(y)}" dy="4" text-anchor="end">{y:.{digits}f}</text>'
             for y in marks]
    drawn += [f'<text x="{X(4 ** k)}" y="{H - bottom + 20}" text-anchor="middle">{4 ** k:,}</text>' for k in range(12) if 4 ** k <= math.exp(high)]
    for i, line in enumerate(lines):
        path = "L".join(f"{X(x)},{Y(y)}" for x, y in line)
        drawn.append(f'<path d="M{path}" fill="none" stroke="var(--c{i % 6})" stroke-width="2.5" stroke-linejoin="round"/>')
    drawn.append(f'<text x="{(W + left) / 2}" y="{H - 6}" text-anchor="middle">tokens of context (logarithmic)</text>')
    return (f"<figure><figcaption>Loss by position: nats a token, over the tokens of context before it</figcaption>{key(whole)}"
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="loss by position in the context">{"".join(drawn)}</svg></figure>')


def key(whole):
    names = [r["out_dir"] for r in whole["checkpoints"]]
    entries = (f'<span><b style="--c:var(--c{i % 6})"></b>{e(name)}</span>' for i, name in enumerate(names))
    return f"<div class=key>{''.join(entries)}</div>" if len(names) > 1 else ""


def verdict_box(whole):
    boxes = ""
    for r in whole["checkpoints"]:
        levels = [found for found, _ in r["levels"].values()]
        name = f"<p><b>{e(r['out_dir'])}</b></p>" if len(whole["checkpoints"]) > 1 else ""
        lines = "".join(f"<b>{e(lens)}</b><span class='level {found}'>{found}</span><span class=why>{e(why)}</span>"
                        for lens, (found, why) in r["levels"].items())
        boxes += f"<div class='verdict {levels[0] if r['agree'] else 'mixed'}'>{name}<p>{e(r['verdict'])}</p><div class=lenses>{lines}</div></div>"
    if len(whole["checkpoints"]) == 1:
        return boxes
    ranked = [line.split(": ", 1) for line in whole["ranking"]]
    lines = "".join(f"<b>{e(lens)}</b><span class=order>{e(order)}</span>" for lens, order in ranked)
    return (f"<div class='verdict mixed'><p>{e(whole['verdict'])}</p><div class='lenses two'>{lines}</div>"
            f"<p class=soft><small>{EQUAL}</small></p></div>{boxes}")


def story(text, made_up):
    """A sample as HTML: its prompt bold, made-up words underlined."""
    def marked(raw):
        parts = re.split(f"({reading.WORD.pattern})", raw)
        return "".join(f"<u title='not in the training text'>{e(p)}</u>" if p.lower() in made_up else e(p) for p in parts)
    prompt = text["prompt"] if text["text"].startswith(text["prompt"]) else ""
    return (f"<b>{marked(prompt)}</b>" if prompt else "") + marked(text["text"][len(prompt):])


def card(column, i, name, whole):
    t = column["texts"][i]
    found = "".join(f"<span class=flag>{e(f)}</span>" for f in flags(t, whole)) or "<span class=clean>no fault found</span>"
    who = f"{e(name)} · " if name else ""
    return f"<div class=sample><p class=head>{who}{found}</p><p class=story>{story(t, set(column.get('made_up', ())))}</p></div>"


def samples(whole):
    results = whole["checkpoints"]
    n, several = results[0]["reading"]["n"], len(results) > 1
    prompts = list(dict.fromkeys(t["prompt"] for t in results[0]["reading"]["texts"]))

    texts = results[0]["reading"]["texts"]
    first = [next(i for i in range(n) if texts[i]["prompt"] == prompt) for prompt in prompts]
    rest = [i for i in range(n) if i not in first]

    def block(places):
        if not several:
            return "<div class=samples>" + "".join(card(results[0]["reading"], i, "", whole) for i in places) + "</div>"
        found = ""
        for i in places:
            cards = "".join(card(r["reading"], i, r["out_dir"], whole) for r in results)
            found += f"<h3>{'Prompt: ' + e(texts[i]['prompt']) if texts[i]['prompt'] else 'No prompt'}</h3><div class=samples>{cards}</div>"
        return found
    unseen = whole["reference"]["unseen"]
    real = "".join(card(unseen, i, "", whole) for i in range(min(4, unseen["n"])))
    return ("<h2>Samples</h2><p class=soft>The first of each prompt, which is bold. Words underlined are not in the training text.</p>" + block(first)
            + (f"<details><summary>{len(rest)} more</summary>{block(rest)}</details>" if rest else "")
            + f"<details><summary>Real text, for comparison</summary><div class=samples>{real}</div></details>")


def wrong_answers(whole):
    items = ""
    for r in whole["checkpoints"]:
        name = f"{e(r['out_dir'])}, " if len(whole["checkpoints"]) > 1 else ""
        for p in r["probes"]["probes"]:
            items += "".join(f"<li><small>{name}{e(p['name'])}</small><br>… {e(w['context'])}<span class=right>{e(w['right'])}</span> "
                             f"<span class=wrong>{e(w['chosen'].strip())}</span></li>" for w in p["wrong"])
    return f"<details><summary>Some wrong answers</summary><ul>{items}</ul></details>" if items else ""


def page(whole):
    names = ", ".join(r["out_dir"] for r in whole["checkpoints"])
    (t1, a1, h1, r1), (t2, a2, _, r2), (t3, a3, h3, r3) = sections(whole)
    notes = "".join(f"<p class=soft>{e(note)}</p>" for note in whole["notes"])
    first, several = whole["checkpoints"][0], len(whole["checkpoints"]) > 1
    once = "" if several else (f"; {first['parameters']:,} parameters, step {first['step']:,}, vocabulary {first['vocab_size']:,}, "
                               f"context {first['block_size']:,}, trained on {e(first['dataset'])}")
    odd = "".join(f"<p class=soft>Words of {e(r['out_dir'])} that the training text does not have: {e(', '.join(r['reading']['made_up'][:30]))}</p>"
                  for r in whole["checkpoints"] if r["reading"].get("made_up"))
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{e(names)}: evaluation</title><style>{STYLE}</style></head><body><main>
<h1>{e(names)}</h1><p class=soft>Evaluated on {e(whole["text"])}{once}</p>
{verdict_box(whole)}{notes}{html_table(FACTS, facts(whole), left=2) if several else ''}
<h2>{t1}</h2><p class=soft>{e(a1)}</p>{html_table(h1, r1, top=("bits",))}{position_plot(whole)}
<h2>{t2}</h2><p class=soft>{e(a2)} The bars go from 0 to 100%, the upright line is chance.</p>
{probe_list(whole) if r2 else "<p>nothing to ask</p>"}{wrong_answers(whole)}
<h2>{t3}</h2><p class=soft>{e(a3)}</p>{html_table(h3, r3, top=("mark",))}{odd}
{samples(whole)}
<footer><p>Seed {whole["seed"]}; {e(whole["computed"])}.</p>
<details><summary>All figures as JSON</summary><pre>{e(json.dumps(short(whole), indent=1))}</pre></details></footer>
</main></body></html>
"""


def check(path):
    """Raises Refusal where a report cannot be written to path without losing something that is no report."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            if MARK not in f.read(200):
                raise Refusal(f"{path} is there already and was not written by eval.py; --report_dir=OTHER writes elsewhere")
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as problem:
            raise Refusal(f"cannot write {path}: {problem.strerror}")
        if not os.access(folder, os.W_OK):
            raise Refusal(f"cannot write {path}: permission denied")
    except (OSError, ValueError) as problem:
        raise Refusal(f"cannot write {path}: {getattr(problem, 'strerror', problem)}")


def write(path, whole):
    checkpoint.write_atomic(path, lambda f: f.write(page(whole).encode("utf-8", "replace")))
