"""The page in browser/, in a real Chromium: the tokenizer's ids, the model's text, and everything that a reader can do."""

import contextlib
import email.utils
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import chromium
from test_model import build
from test_sample import complete
from test_tokenizer import ASSIGNED, CHAR_DOCS, PIECES, SPACES, bpe, gpt2_folder  # noqa: F401  (the last two are fixtures)

import checkpoint
import export_onnx
import onnx_model
import prepare
import sample
import serve
import train
from config import Refusal, configure
from data import prompt_ids, render
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time, there was a"


@contextlib.contextmanager
def serving(model):
    server = serve.serve(str(model), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def story_teller(tmp_path_factory):
    """(folder of the ONNX model, the same in torch, its tokenizer): small, with room for 200 tokens, and trained as far as words."""
    folder = tmp_path_factory.mktemp("model")
    with contextlib.chdir(folder):
        prepare.prepare(configure(prepare.Config, ["--num_stories=3000", "--num_proc=1"]))
        train.main(
            configure(
                train.Config,
                [
                    "--n_layer=2",
                    "--n_embd=64",
                    "--n_head=2",
                    "--n_kv_head=1",
                    "--block_size=256",
                    "--batch_size=8",
                    "--max_iters=150",
                    "--eval_interval=150",
                    "--device=cpu",
                    "--dtype=float32",
                    "--compile=false",
                    "--out_dir=out",
                ],
            )
        )
        export_onnx.main(configure(export_onnx.Config, ["--out_dir=out", "--seconds=0"]))
        path = checkpoint.find("out")
        model, tokenizer = checkpoint.restore(checkpoint.load(path), path)
    return folder / "out/onnx", model, tokenizer


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    if not chromium.PATH:
        pytest.skip("there is no Chromium")
    if not (ROOT / "browser" / serve.FILES[-1]).is_file():
        if not shutil.which("npm"):
            pytest.skip("onnxruntime-web is not installed, and there is no npm")
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=ROOT / "browser",
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"npm could not install onnxruntime-web: {done.stderr[-300:]}")
    browser = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


class Page:
    """What a reader sees and does."""

    def __init__(self, browser, server):
        self.browser, self.run, self.wait, self.home = (
            browser,
            browser.run,
            browser.wait,
            f"http://127.0.0.1:{server.server_port}/",
        )

    def open(self):
        self.browser.open(self.home)
        self.wait(
            "Boolean(document.querySelector('.error')) || !document.querySelector('#write').disabled"
        )
        return self

    def frames(self):
        self.run(
            "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 20))))"
        )

    def settle(self):
        """The text, when the model rests and all is drawn."""
        self.frames()
        self.wait("document.querySelector('#write').textContent !== 'Stop'")
        self.frames()
        return self.text()

    def click(self, id):
        self.frames()  # the editor may grow, and the button go down
        self.browser.mouse(f"document.querySelector('#{id}')", click=True)

    def set(self, **settings):
        for key, value in settings.items():
            self.run(
                f"(i => {{ i.value = {value}; i.dispatchEvent(new Event('input', {{bubbles: true}})) }})(document.querySelector('#{key}'))"
            )

    def type(self, text):
        """Types into the editor, in the place of what is there."""
        self.run("document.querySelector('#edit').select()")
        self.browser.type(text)

    def write(self, text, **settings):
        self.set(**settings)
        self.type(text)
        self.click("write")
        return self.settle()

    def tokens(self):
        return self.run(
            "[...document.querySelectorAll('#story span:not(.end)')].map(s => s.textContent)"
        )

    def text(self):
        return "".join(self.tokens())

    def button(self, id="write"):
        return self.run(f"(b => b.hidden ? null : b.textContent)(document.querySelector('#{id}'))")

    def said(self):
        return self.run("document.querySelector('#said').textContent")


@pytest.fixture
def page(installed, story_teller):
    with serving(story_teller[0]) as server:
        installed.errors.clear()
        installed.urls.clear()
        installed.size(1200, 900)
        page = Page(installed, server)
        yield page.open()
        assert not installed.errors
        assert {"ort-wasm-simd-threaded.wasm", "model.onnx"} <= {
            url.rpartition("/")[2] for url in installed.urls
        }  # the worker is listened to
        assert all(url.startswith((page.home, "data:,")) for url in installed.urls), (
            "the page asked another host"
        )


def generated(story_teller, prompt, **settings):
    """(sample.py's text after a prompt, how it ended)"""
    _, model, tokenizer = story_teller
    rows, ends = complete(
        sample.generate(
            model,
            [prompt_ids(tokenizer, prompt)],
            **{"max_new_tokens": 10**6, "temperature": 0, "stop": tokenizer.eot} | settings,
        )
    )
    return tokenizer.decode(rows[0]), ends[0]


# -----------------------------------------------------------------------------------------------------
# The tokenizer and the draw

TOKENIZER = "(await import('/tokenizer.js')).Tokenizer"


def fuzz(n, seed, chars=None):
    rng = random.Random(seed)
    kinds = (
        [[chars]]
        if chars
        else [
            ["etaoin 'sdmtlvr<|>"],
            [SPACES],
            ["\ufeff\x85 \u2028\xa0a1.'"],
            ["0123½Ⅷ٣.,!?-_👩🏽‍🚀😀é\u0301ß語ก\ud83d\ude00\ud800"],
            [ASSIGNED],
            [SPACES, ASSIGNED],
            PIECES,
        ]
    )
    return [
        "".join(
            rng.choice(rng.choice(kind)) if kind is not PIECES else rng.choice(kind)
            for _ in range(rng.randrange(40))
        )
        for kind in itertools.islice(itertools.cycle(kinds), n)
    ]


@pytest.mark.slow
def test_ids_and_text_are_pythons(page, bpe, gpt2_folder):  # noqa: F811
    for tokenizer, texts in (
        (bpe, fuzz(1000, 0)),
        (
            Tokenizer.gpt2(gpt2_folder),
            [*fuzz(999, 1), "".join(random.Random(4).choices("thehandaséß", k=3000))],
        ),
        (Tokenizer.char(CHAR_DOCS), fuzz(1000, 2, "".join(CHAR_DOCS))),
    ):
        rng = random.Random(3)
        sequences = [
            [rng.randrange(tokenizer.vocab_size) for _ in range(30)] + tokenizer.encode(".")
            for _ in range(300)
        ] + [tokenizer.encode(text) for text in texts]
        computed, streamed = page.run(f"""(async () => {{
            const t = new {TOKENIZER}(JSON.parse({json.dumps(tokenizer.to_str())}));
            return [{json.dumps(texts)}.map(text => t.encode(text)), {json.dumps(sequences)}.map(ids => {{ const s = t.stream(); return ids.map(s); }})];
        }})()""")
        assert computed == [tokenizer.encode(text) for text in texts]
        for ids, pieces in zip(sequences, streamed):
            stream = tokenizer.stream()
            assert "".join(pieces) == tokenizer.decode(ids)
            if "\ufffd" not in tokenizer.decode(
                ids
            ):  # what is no UTF-8 may be given up earlier or later
                assert pieces == [stream(i) for i in ids]


@pytest.mark.slow
def test_bad_tokenizers_are_refused_in_words(page, bpe):  # noqa: F811
    def changed(change):
        data = json.loads(bpe.to_str())
        change(data)
        return data

    bad = [
        changed(c)
        for c in (
            lambda d: d["model"].update(type="Unigram"),
            lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
            lambda d: d["pre_tokenizer"].update(type="Whitespace"),
            lambda d: d.update(normalizer={"type": "NFC"}),
            lambda d: d["added_tokens"].clear(),
            lambda d: d["model"]["vocab"].update(the=10**6),
            lambda d: d["model"]["vocab"].pop("a"),
            lambda d: d["model"]["merges"].reverse(),
            lambda d: d["model"]["merges"].pop(),
            lambda d: d["model"]["vocab"].update({"☃": d["model"]["vocab"].pop("!")}),
        )
    ]
    said = page.run(
        f"(async () => {{ const T = {TOKENIZER}; return {json.dumps([{}, None, [], 1, *bad])}.map(d => {{ try {{ new T(d); return ''; }} catch (e) {{ return e.message; }} }}); }})()"
    )
    assert all(said) and not any("undefined" in s or "\n" in s for s in said), said


@pytest.mark.slow
def test_the_draw_is_next_tokens(page):
    """The tokens that may come and how often: against 40,000 draws in Python."""
    logits = torch.tensor([2.0, 1.5, 1.4, 1.0, 0.5, 0.4, 0.0, -1.0, -1.1, -3.0])
    for temperature, top_k, top_p in itertools.product(
        (0, 0.5, 1.0, 2.0), (0, 1, 2, 3, 5, 6, 10, 50), (0.05, 0.35, 0.6, 0.9, 1.0)
    ):
        drawn = sample.next_token(
            logits.expand(40_000, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0)
        )
        want = torch.bincount(drawn, minlength=10) / 40_000
        computed = page.run(f"""(async () => {{
            const {{ keep }} = await import("/sample.js"), p = Array(10).fill(0);
            const {{ ids, weights }} = keep(Float32Array.from({logits.tolist()}), {{ temperature: {temperature}, top_k: {top_k}, top_p: {top_p} }});
            ids.forEach((id, i) => p[id] = weights[i] / weights.reduce((a, b) => a + b));
            return p;
        }})()""")
        settings = (temperature, top_k, top_p)
        if temperature:
            assert {i for i, p in enumerate(computed) if p} >= {i for i, p in enumerate(want) if p}, (
                settings
            )
            torch.testing.assert_close(
                torch.tensor(computed, dtype=torch.float32),
                want,
                rtol=0,
                atol=0.015,
                msg=lambda m: f"{settings}: {m}",
            )
            assert all(p == 0 for p, w in zip(computed, want) if w == 0 and p > 0.001), settings
        else:
            assert computed == [1.0] + [0.0] * 9
    big = page.run("""(async () => {  // what is sorted in parts is what is sorted whole
        const { keep, uniform } = await import("/sample.js"), logits = Float32Array.from({ length: 5000 }, (_, i) => 6 * uniform(7, i));
        const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b), p = order.map(i => Math.exp(logits[i])), sum = p.reduce((a, b) => a + b);
        return [0.1, 0.5, 0.9, 0.99].map(top_p => {
            let n = 0, mass = 0;
            while (mass < top_p * sum) mass += p[n++];
            return JSON.stringify(keep(logits, { temperature: 1, top_k: 0, top_p }).ids) === JSON.stringify(order.slice(0, n));
        });
    })()""")
    assert all(big)
    assert page.run("""(async () => {
        const { largest } = await import("/sample.js"), logits = Float32Array.from({ length: 5000 }, (_, i) => i * 7919 % 1000);
        const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
        return [1, 999, 1000, 1001, 2003, 4999, 5000].every(k => JSON.stringify(largest(logits, k)) === JSON.stringify(order.filter(i => logits[i] >= logits[order[k - 1]])));
    })()""")
    u = torch.tensor(
        page.run(
            "(async () => { const { uniform } = await import('/sample.js'); return [1, 2, 2 ** 40].flatMap(s => Array.from({length: 10000}, (_, n) => uniform(s, n))); })()"
        )
    )
    assert len(u.unique()) > 29_900 and u.min() >= 0 and u.max() < 1
    assert torch.histc(u, 10, 0, 1).sub(3000).abs().max() < 300
    assert (
        abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.02
        and abs(torch.corrcoef(torch.stack([u[:10_000], u[10_000:20_000]]))[0, 1]) < 0.05
    )


# -----------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.slow
def test_greedy_text_is_sample_pys(page, story_teller):
    lengths = []
    for prompt in PROMPT, "", "The", "  \n Ünïcode 日本 \ufeff", "Long ago":
        want, end = generated(story_teller, prompt)
        assert page.write(prompt, temperature=0) == prompt + want
        assert (page.button() is None) == (end == "stop") and (
            page.button() == "Go on from the last half"
        ) == (end == "block_size")
        lengths.append(len(page.tokens()))
        page.click("clear")
        page.wait("!document.querySelector('#edit').hidden")
    assert max(lengths) >= 200


@pytest.mark.slow
def test_a_full_context_goes_on_from_its_last_half(page, story_teller):
    tokenizer = story_teller[2]
    prompt = tokenizer.decode(
        tokenizer.encode("One day, Tom and the bear went to the old mill. " * 40)[:251]
    )
    assert len(tokenizer.encode(prompt)) == 251
    text = page.write(prompt, temperature=0)
    assert (
        page.said() == "The context of 256 tokens is full."
        and page.button() == "Go on from the last half"
    )
    assert text == prompt + generated(story_teller, prompt)[0]
    page.click("write")
    longer = page.settle()
    made = len(page.tokens()) - 252
    assert longer.startswith(text) and made > 20
    assert (
        longer == prompt + generated(story_teller, prompt, max_new_tokens=made, past_end="recompute")[0]
    )
    page.click("clear")
    page.wait("!document.querySelector('#edit').hidden")
    page.write("day " * 700, temperature=0)
    assert "the model sees 256 at a time" in page.said() and page.button() == "Go on from the last half"
    page.click("write")
    assert len(page.settle()) > 4 * 700


def stop_at(page, n):
    """Presses the button when n tokens stand there."""
    page.run(f"""new MutationObserver((_, o) => {{
        if (document.querySelectorAll('#story span').length < {n}) return;
        o.disconnect();
        document.querySelector('#write').click();
    }}).observe(document.querySelector('#story'), {{ childList: true }})""")


@pytest.mark.slow
def test_stop_reload_and_continue_tell_the_uninterrupted_story(page):
    settings = {"temperature": 1, "top_k": 50, "top_p": 0.95, "seed": 7}
    whole = page.write(PROMPT, **settings)
    assert len(page.tokens()) > 60
    page.click("clear")
    page.wait("!document.querySelector('#edit').hidden")
    stop_at(page, 20)
    first = page.write(PROMPT)
    assert (
        page.button() == "Continue"
        and page.said() == "Stopped."
        and whole.startswith(first)
        and first != whole
    )
    given = page.run("document.querySelectorAll('#story .given').length")
    page.open()
    assert (
        page.settle() == first and page.run("document.querySelectorAll('#story .given').length") == given
    )
    assert page.run("document.querySelector('#seed').value") == "7"
    stop_at(page, 40)
    page.click("write")
    assert whole.startswith(page.settle())
    page.browser.key("Enter")  # the button has the focus
    assert page.settle() == whole
    page.click("again")
    other = page.settle()
    assert (
        other.startswith(PROMPT)
        and other != whole
        and page.run("document.querySelector('#seed').value") == "8"
    )


@pytest.mark.slow
def test_editing_rewinds_the_cache_to_what_is_alike(page, story_teller):
    """What is written after an edit is what is written after the same text by a page that never saw another."""
    tokenizer = story_teller[2]
    page.run(
        """window.asked = []; Worker.prototype.postMessage = (post => function (m, ...more) { if (m.ids) asked.push([m.keep, m.ids]); return post.call(this, m, ...more); })(Worker.prototype.postMessage)"""
    )
    text = page.write(PROMPT, temperature=0)
    words = text.split(" ")
    for edited in (
        " ".join(words[:12] + ["happy"] + words[13:30]),
        " ".join(words[:20]),
        " ".join(words[:20]) + " and then",
        "A" + text[1:80],
    ):
        page.click("change")
        page.wait("!document.querySelector('#edit').hidden")
        before = [tokenizer.eot, *tokenizer.encode(page.run("document.querySelector('#edit').value"))]
        page.type(edited)
        page.run("asked.length = 0")
        page.browser.key("Enter")
        result = page.settle()
        assert result == edited + generated(story_teller, edited)[0]
        after = [tokenizer.eot, *tokenizer.encode(edited)]
        alike = next(
            (i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after))
        )
        keep, ids = page.run("asked[0]")
        assert keep == alike - 1 and ids == after[keep : keep + 64]


@pytest.mark.slow
def test_nothing_is_drawn_twice_in_a_frame(page):
    page.run(
        """window.times = []; new MutationObserver(() => times.push(document.timeline.currentTime)).observe(document.querySelector('#story'), { childList: true })"""
    )
    page.write(PROMPT, temperature=1, seed=3)
    times = page.run("times")
    assert times and len(set(times)) == len(times)


@pytest.mark.slow
def test_text_is_never_markup(page):
    evil = "<img src=x onerror=alert(1)><b>bold</b>&amp;<script>alert(2)</script>"
    stop_at(page, 60)
    assert page.write(evil, temperature=1).startswith(evil)
    assert page.run("document.querySelectorAll('#story img, #story b, #story script').length") == 0


@pytest.mark.slow
def test_a_wrong_setting_is_said(page):
    page.set(seed="''", temperature=1)
    page.type(PROMPT)
    page.click("write")
    page.settle()
    assert page.said().startswith("Seed: ") and page.text() == PROMPT
    page.set(seed=5)
    page.click("write")
    assert len(page.settle()) > len(PROMPT)


# -----------------------------------------------------------------------------------------------------
# What else a token might have been


def span(i):
    return f"document.querySelectorAll('#story span')[{i}]"


def others(page):
    return page.run(
        "document.querySelector('#others').hidden ? [] : [...document.querySelectorAll('#others > button')].map(b => b.innerText.split(/\\s*\\n/))"
    )


@pytest.mark.slow
def test_others_are_the_models_and_one_is_taken_by_mouse_by_key_and_by_finger(page, story_teller):
    _, model, tokenizer = story_teller
    page.write(PROMPT, temperature=0.7, seed=2)
    for way in "mouse", "key", "finger":
        tokens = [t for t in page.tokens()]
        i = 9
        if way == "mouse":
            page.browser.mouse(span(i))
        elif way == "key":
            page.run(f"{span(8)}.focus()")
            page.browser.key("ArrowRight")
        else:
            page.browser.size(390, 844, mobile=True)
            page.run("new Promise(r => setTimeout(r, 200))")
            page.browser.tap(span(i))
        page.wait("!document.querySelector('#others').hidden")
        with torch.no_grad():
            ids = [tokenizer.eot, *tokenizer.encode("".join(tokens[1:i]))]
            p, order = model(torch.tensor([ids]))[0][0, -1].softmax(-1).sort(descending=True)
        shown = others(page)
        assert [name for name, _ in shown] == [
            tokenizer.decode([j]).replace(" ", "·").replace("\n", "↵")
            if j != tokenizer.eot
            else "∎ the end"
            for j in order[:8].tolist()
        ]
        assert [
            abs(float(share.strip("%< ")) / 100 - q) < 0.0006 for (_, share), q in zip(shown, p.tolist())
        ] == [True] * 8
        heat = float(page.run(f"{span(i)}.style.getPropertyValue('--heat-of')"))
        here = p[order.tolist().index(tokenizer.encode(tokens[i])[0])].item()
        assert heat == pytest.approx(min(1, -math.log(here) / math.log(100)), abs=0.01)
        take = next(
            k
            for k in range(1, 8)
            if order[k] != tokenizer.eot and tokenizer.decode([order[k].item()]) != tokens[i]
        )
        button = f"document.querySelectorAll('#others > button')[{take}]"
        if way == "mouse":
            page.browser.mouse(button, click=True)
        elif way == "key":
            for _ in range(take + 1):
                page.browser.key("ArrowDown")
            page.browser.key("Enter")
        else:
            page.browser.tap(button)
        page.settle()
        now = page.tokens()
        assert (
            now[:i] == tokens[:i]
            and now[i] == tokenizer.decode([order[take].item()])
            and len(now) > i + 5
        )
        assert "given" in page.run(f"{span(i)}.className").split() and others(page) == []
    page.browser.size(1200, 900)


@pytest.mark.slow
def test_keys_alone(page):
    """Enter writes, Escape closes, stops and leaves the editor, the arrows move."""
    page.type(PROMPT)
    stop_at(page, 30)
    page.browser.key("Enter")
    page.settle()
    page.run(f"{span(3)}.focus()")
    page.browser.key("ArrowRight")
    assert page.run(
        "[...document.activeElement.parentNode.children].indexOf(document.activeElement)"
    ) == 4 and others(page)
    page.browser.key("ArrowDown")
    assert page.run("document.activeElement.parentNode.id") == "others"
    page.browser.key("Escape")
    assert (
        not others(page)
        and page.run("[...document.activeElement.parentNode.children].indexOf(document.activeElement)")
        == 4
    )
    page.browser.key("End")
    assert page.run(
        "document.activeElement === [...document.querySelectorAll('#story span')].findLast(s => s.textContent)"
    )
    page.browser.key("Escape")  # the list may lie over the button
    page.click("change")
    page.wait("!document.querySelector('#edit').hidden")
    before = page.run("document.querySelector('#edit').value")
    page.browser.key("Enter", modifiers=8)  # shift
    assert page.run("document.querySelector('#edit').value") == before + "\n"
    page.browser.key("Escape")
    assert page.settle() == before + "\n" and page.run("document.querySelector('#edit').hidden")


@pytest.mark.slow
def test_a_story_put_away_comes_back(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    page.click("clear")
    page.wait("!document.querySelector('#edit').hidden")
    assert (
        page.run("document.querySelector('#edit').value") == ""
        and page.button("clear") == "Bring the last one back"
    )
    page.click("clear")
    assert page.settle() == text


@pytest.mark.slow
def test_a_phone_shows_it_all(page):
    page.write(PROMPT, temperature=1, seed=4)
    page.browser.size(390, 844, mobile=True)
    page.run("new Promise(r => setTimeout(r, 200))")
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run(
        "[...document.querySelectorAll('.buttons button')].filter(b => !b.hidden).every(b => (r => r.bottom <= innerHeight && r.height >= 44 && r.right <= 390)(b.getBoundingClientRect()))"
    )
    page.browser.size(1200, 900)


# -----------------------------------------------------------------------------------------------------
# Nothing is lost


def editor(page):
    return page.run(
        "document.querySelector('#edit').hidden ? null : document.querySelector('#edit').value"
    )


def new_story(page):
    page.click("clear")
    page.wait("!document.querySelector('#edit').hidden")


def rewrite(page, text):
    page.click("change")
    page.wait("!document.querySelector('#edit').hidden")
    page.type(text)


@pytest.mark.slow
def test_a_reload_amid_writing_loses_nothing(page):
    page.run("""window.old = true; new MutationObserver(() => {
        if (document.querySelectorAll('#story span').length >= 25) location.reload();
    }).observe(document.querySelector('#story'), { childList: true })""")
    page.set(temperature=1, seed=7)
    page.type(PROMPT)
    page.click("write")
    page.wait("!window.old && document.querySelector('#write')?.disabled === false")
    text = page.settle()
    assert text.startswith(PROMPT) and len(page.tokens()) >= 24 and page.button() == "Continue"
    page.click("write")
    later = page.settle()
    new_story(page)
    assert later == page.write(PROMPT)  # one story, wherever it was stopped


@pytest.mark.slow
def test_every_way_out_of_a_story_leads_back(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    rewrite(page, "A rewrite")
    new_story(page)
    page.type("Something new")
    page.frames()
    assert page.button("clear") is None  # nothing takes the place of what was typed
    page.open()
    assert editor(page) == "Something new"
    page.type("")
    page.run("document.execCommand('delete')")
    page.frames()
    page.open()
    assert page.button("clear") == "Bring the last one back"
    page.click("clear")
    page.frames()
    assert editor(page) == "A rewrite"
    page.type(text)
    page.click("change")
    assert page.settle() == text
    page.set(top_k="''")
    page.click("again")
    assert page.settle() == text and page.said().startswith("Top-k: ")
    page.run(f"{span(9)}.focus()")
    page.browser.key("ArrowRight")
    page.browser.key("ArrowDown")
    page.browser.key("Enter")
    assert page.settle() == text and page.said().startswith("Top-k: ")


@pytest.mark.slow
def test_the_story_waits_for_its_model_and_for_its_tab(installed, story_teller, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(story_teller[0], other)
    edit_config(other, tokenizer_sha256="0" * 64)
    with serving(story_teller[0]) as server:
        page = Page(installed, server).open()
        text = page.write(PROMPT, temperature=1, seed=4)
        server.folder = str(tmp_path / "nowhere")
        page.open()
        page.set(top_k=50)  # beside what is broken
        server.folder = str(other)
        page.open()
        assert editor(page) == "" and page.write("The end", top_k=50).startswith("The end")
        server.folder = str(story_teller[0])
        page.open()
        assert page.settle() == text and page.run("document.querySelector('#top_k').value") == "50"
        page.run("localStorage.clear()")  # as another tab that wrote there would
        page.open()
        assert page.settle() == text
        page.run("sessionStorage.clear()")  # a new tab
        page.run("window.onpagehide = () => sessionStorage.clear()")
        page.open()
        assert page.settle() == text


@pytest.mark.slow
def test_probabilities_stay_what_they_were(page, story_teller):
    heats = "[...document.querySelectorAll('#story span')].map(s => Number(s.style.getPropertyValue('--heat-of') || -1))"
    tokenizer = story_teller[2]
    prompt = tokenizer.decode(
        tokenizer.encode("One day, Tom and the bear went to the old mill. " * 40)[:251]
    )
    page.write(prompt, temperature=0)
    before = page.run(heats)
    page.click("write")
    page.settle()
    after = page.run(heats)
    assert after[: len(before)] == before and len(after) > len(before) + 10
    page.open()
    page.settle()
    assert page.run(heats) == pytest.approx(after, abs=0.002)
    page.run(f"{span(100)}.focus()")  # what the model no longer sees may still be another
    page.browser.key("ArrowRight")
    page.browser.key("ArrowDown")
    page.browser.key("ArrowDown")
    page.browser.key("Enter")
    page.settle()
    assert len(page.tokens()) > 110 and "context" not in page.said()


@pytest.mark.slow
def test_a_changed_word_leaves_the_rest_the_models(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    given = "[...document.querySelectorAll('#story .given')].map(s => s.textContent).join('')"
    assert page.run(given) == PROMPT
    rewrite(page, text.replace("upon", "before", 1))
    page.click("change")
    assert page.settle() == text.replace("upon", "before", 1)
    assert page.run(given) == PROMPT.replace("upon", "before") and page.button("again") == "Another way"


# -----------------------------------------------------------------------------------------------------
# Other models


@pytest.mark.slow
def test_a_fine_tuned_model_gets_its_template(installed, story_teller, tmp_path):
    folder, template = tmp_path / "model", "Q: {prompt}\nA:"
    shutil.copytree(story_teller[0], folder)
    edit_config(folder, template=template, start="FILE:x")
    with serving(folder) as server:
        page = Page(installed, server).open()
        assert editor(page) == "FILE:x"  # a text, as any
        for prompt in "Why?", "\x85\x1f Why \ufeff", "  ":
            rendered = render(template, prompt)
            assert page.write(prompt, temperature=0) == rendered + generated(story_teller, rendered)[0]
            new_story(page)
        page.write("Why?")
        for edited, becomes in (
            ("Q: Where?\nA:", "Q: Where?\nA:"),
            ("Now another question", "Q: Now another question\nA:"),
        ):
            rewrite(page, edited)
            page.click("change")
            assert page.settle() == becomes


@pytest.mark.slow
def test_characters_and_int8(installed, story_teller, tmp_path):
    tokenizer = Tokenizer.char(CHAR_DOCS)
    torch.manual_seed(0)
    model = build(vocab_size=tokenizer.vocab_size, block_size=64)
    with contextlib.chdir(tmp_path):
        checkpoint.save(
            "out/ckpt.pt", model, tokenizer, {"dataset": ""}, checkpoint.RunState(1, 2.0, 2.0)
        )
        export_onnx.main(configure(export_onnx.Config, ["--seconds=0"]))
    with serving(tmp_path / "out/onnx") as server:
        page, prompt = Page(installed, server).open(), CHAR_DOCS[0][:5]
        assert (
            page.write(prompt, temperature=0)
            == prompt + generated((None, model.eval(), tokenizer), prompt)[0]
        )
        rewrite(page, prompt + "\U0001f600")
        page.browser.key("Enter")
        page.frames()
        assert "does not know the character" in page.said() and editor(page) == prompt + "\U0001f600"
    folder = tmp_path / "small"
    shutil.copytree(story_teller[0], folder)
    int8 = onnx.load(folder / "model.onnx")
    export_onnx.quantize(int8)
    onnx.save(int8, folder / "model_int8.onnx")
    model = onnx_model.load(str(folder / "model_int8.onnx"))[0]
    with serving(folder / "model_int8.onnx") as server:
        page = Page(installed, server).open()
        text = page.write(PROMPT, temperature=0)
        assert (
            text[: len(PROMPT) + 60]
            == (PROMPT + generated((None, model, story_teller[2]), PROMPT)[0])[: len(PROMPT) + 60]
        )


# -----------------------------------------------------------------------------------------------------
# Screens


@pytest.mark.slow
@pytest.mark.parametrize("width, height, mobile", [(1200, 700, False), (360, 640, True)])
def test_the_caret_stays_in_view(page, width, height, mobile):
    page.browser.size(width, height, mobile)
    page.run("new Promise(r => setTimeout(r, 200))")
    page.type("A line of the story here.\n" * 40)
    seen = []
    page.frames()
    for key in "xxxx\n\n\ny":
        page.browser.type(key)
        page.frames()
        seen.append(
            page.run(
                "[scrollY, document.querySelector('#edit').getBoundingClientRect().bottom - innerHeight]"
            )
        )
    assert (
        seen[1][0] > 300
        and len({y for y, _ in seen[1:4]}) == 1
        and all(below < 60 for _, below in seen[1:])
    ), seen
    page.browser.size(1200, 900)


@pytest.mark.slow
def test_a_phone_held_sideways(page):
    page.write(PROMPT, temperature=1, seed=4)
    page.browser.size(640, 360, mobile=True)
    page.run("new Promise(r => setTimeout(r, 200))")
    page.browser.tap(span(9))
    page.wait("!document.querySelector('#others').hidden")
    assert page.run(
        "(r => r.top >= 0.25 * innerHeight && r.bottom <= innerHeight)(document.querySelector('#others').getBoundingClientRect())"
    )
    page.browser.tap("document.querySelector('#others p button')")
    page.wait("document.querySelector('#others').hidden")
    page.click("change")
    page.wait("!document.querySelector('#edit').hidden")
    before = editor(page)
    page.browser.key("Enter")
    assert editor(page) == before + "\n"  # the button writes
    page.browser.size(1200, 900)


@pytest.mark.slow
def test_who_listens_hears_what_things_are(page):
    page.write("", temperature=1, seed=4)
    focusable, roles = (
        page.run("""[[...document.querySelectorAll('#story [tabindex="0"]')].map(s => s.textContent),
        [...document.querySelectorAll('#story span')].filter(s => s.textContent).map(s => `${s.getAttribute('role')} ${s.ariaHasPopup}`)]""")
    )
    assert focusable == page.tokens()[1:2] and set(roles) == {"button true"}
    assert page.run(
        "document.querySelector('#others').getAttribute('role') === 'group' && document.querySelector('#others').ariaLabel.length > 9"
    )


def test_every_colour_of_text_stands_out_from_what_is_behind_it():
    """WCAG's contrast of 4.5, in the light and in the dark."""

    def light(colour):
        r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(one, other):
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    def mix(one, other, share):
        return [share * a + (1 - share) * b for a, b in zip(one, other)]

    schemes = re.findall(r":root \{(.*?)\}", (ROOT / "browser/style.css").read_text())
    assert len(schemes) == 2
    for scheme in schemes:
        c = {
            name: [
                int((h if len(h) == 6 else "".join(x + x for x in h))[i : i + 2], 16) / 255
                for i in (0, 2, 4)
            ]
            for name, h in re.findall(r"--(\w+): #(\w+)", scheme)
        }
        chosen = mix(c["mine"], c["paper"], 0.22)
        for text, behind in (
            ("ink", "heat"),
            ("mine", "heat"),
            ("soft", "paper"),
            ("soft", "bg"),
            ("on", "mine"),
            ("bad", "bg"),
            ("bad", "paper"),
            ("mine", "paper"),
        ):
            assert contrast(c[text], c[behind]) >= 4.5, (text, behind)
        assert (
            contrast(c["mine"], chosen) >= 4.5 and contrast(c["ink"], mix(c["mine"], chosen, 0.2)) >= 4.5
        )


# -----------------------------------------------------------------------------------------------------
# What is broken


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_tokenizer(folder):
    Tokenizer.train(["another text"], 260).save(folder / "tokenizer.json")


def nan(folder):
    model = onnx.load(folder / "model.onnx")
    biggest = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    biggest.raw_data = b"\xff" * len(biggest.raw_data)
    onnx.save(model, folder / "model.onnx")


BROKEN = {
    "config.json is not there": lambda f: (f / "config.json").unlink(),
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "format 9": lambda f: edit_config(f, format=9),
    "its n_layer is 0": lambda f: edit_config(f, n_layer=0),
    "its block_size is null": lambda f: edit_config(f, block_size=None),
    "are not of one model": lambda f: edit_config(f, n_layer=3),
    "tokenizer.json and model/config.json": other_tokenizer,
    "does not work as": lambda f: edit_config(f, head_dim=16),
    "tokenizer.json is not there": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json is damaged": lambda f: (f / "tokenizer.json").write_bytes(b"\0\xff"),
    "tokenizer.json cannot be used": lambda f: (f / "tokenizer.json").write_text("[]"),
    "model.onnx is not there": lambda f: (f / "model.onnx").unlink(),
    "model.onnx cannot be read": lambda f: (f / "model.onnx").write_bytes(
        (f / "model.onnx").read_bytes()[:5000]
    ),
    "no ONNX file": lambda f: (f / "model.onnx").write_bytes(b"PK" * 9999),
    "model/model.onnx cannot be read": lambda f: (f / "model.onnx").write_bytes(b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("says", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(installed, story_teller, tmp_path, says):
    folder = tmp_path / "model"
    shutil.copytree(story_teller[0], folder)
    BROKEN[says](folder)
    with serving(folder) as server:
        page = Page(installed, server).open()
        (said,) = page.run("[...document.querySelectorAll('.error')].map(e => e.innerText)")
        assert says in said and "\n" not in said and len(said) < 300, said
        assert page.run("document.querySelectorAll('#paper > *').length") == 1


@pytest.mark.slow
def test_a_model_of_nan_is_said(installed, story_teller, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(story_teller[0], folder)
    nan(folder)
    with serving(folder) as server:
        page = Page(installed, server).open()
        page.write(PROMPT, temperature=1)
        assert "not a number" in page.said() and page.text() == PROMPT and page.button() == "Continue"


@pytest.mark.slow
def test_a_server_that_stops_amid_the_model_is_said(installed, story_teller, monkeypatch):
    def some(self, source, out):
        out.write(source.read(5000))
        if self.path.endswith(".onnx"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            shutil.copyfileobj(source, out)

    monkeypatch.setattr(serve.Handler, "copyfile", some)
    with serving(story_teller[0]) as server:
        (said,) = (
            Page(installed, server)
            .open()
            .run("[...document.querySelectorAll('.error')].map(e => e.innerText)")
        )
        assert said == "model/model.onnx did not come whole: reload the page."


@pytest.mark.slow
def test_a_server_that_is_gone_is_said(installed, story_teller, monkeypatch):
    monkeypatch.setattr(
        serve.Handler, "protocol_version", "HTTP/1.0"
    )  # else it goes on with the connections that it has
    with serving(story_teller[0]) as server:
        page = Page(installed, server).open()
        page.run("import('/get.js').then(m => window.get = m.get) && 1")
    assert page.run("get('config.json').then(() => '', e => e.message)").startswith(
        "The page lost its server"
    )


@pytest.mark.slow
def test_a_damaged_onnxruntime_web_is_said(installed, story_teller, monkeypatch, tmp_path):
    damaged = tmp_path / "browser"
    shutil.copytree(serve.HERE, damaged)
    (damaged / serve.FILES[-1]).write_bytes(b"\0" * 1000)
    monkeypatch.setattr(serve, "HERE", str(damaged))
    with serving(story_teller[0]) as server:
        assert "onnxruntime-web does not start" in Page(installed, server).open().run(
            "document.querySelector('.error').innerText"
        )


@pytest.mark.slow
def test_onnxruntime_web_is_not_installed(installed, story_teller, monkeypatch):
    monkeypatch.setattr(serve, "FILES", serve.FILES[:-3])
    with serving(story_teller[0]) as server:
        page = Page(installed, server).open()
        assert "onnxruntime-web is not there" in page.run("document.querySelector('.error').innerText")


@pytest.mark.slow
def test_tokens_per_second(installed, story_teller, capsys):
    """The page tells the speed by the worker's clock, and draws no oftener than tokens come. The figures are printed beside onnxruntime's own, not
    judged: what else the machine does is unknown. Of the demo model where there is one, else of the small one here."""
    demo = ROOT / "out/demo/onnx"
    folder = demo if (demo / "model.onnx").is_file() else story_teller[0]
    model, tokenizer, _ = onnx_model.load(str(folder))
    past = min(200, model.config.block_size - 32)
    prompt = tokenizer.decode(
        tokenizer.encode("One day, Tom and the bear went to the old mill. " * 40)[:past]
    )
    listen = installed.send(
        "Page.addScriptToEvaluateOnNewDocument",
        source="""window.times = []; window.drawn = 0; window.Worker = class extends Worker {
        constructor(...given) { super(...given); this.addEventListener("message", ({ data }) => data.next && times.push(data.at)); }
    }""",
    )
    exported = []
    with serving(folder) as server:
        page = Page(installed, server).open()
        page.run(
            "new MutationObserver(() => drawn++).observe(document.querySelector('#story'), { childList: true })"
        )
        for seed in range(9):
            page.run("times.length = drawn = 0")
            page.write(prompt, temperature=1, seed=seed)
            times, drawn, shown = page.run(
                "[times, drawn, document.querySelector('#speed').textContent]"
            )
            if len(times) > 20:
                exported.append(1000 * (len(times) - 1) / (times[-1] - times[0]))
                assert (
                    shown.startswith(f"{math.floor(exported[-1] + 0.5):,} tokens/s")
                    and drawn <= len(times) + 1
                )
            new_story(page)
    installed.send("Page.removeScriptToEvaluateOnNewDocument", **listen)
    native, one = [], torch.tensor([[300]])  # on one thread, as the worker
    for _ in exported:
        read, cache = (
            torch.tensor([tokenizer.encode(prompt)]),
            model.new_past(1, model.config.block_size),
        )
        model.run(read, cache)
        start = time.perf_counter()
        for _ in range(31):
            sample.next_token(torch.from_numpy(model.run(one, cache)[:, -1]), 1.0, 200)
        native.append(31 / (time.perf_counter() - start))
    here, exported = sorted(native)[len(native) // 2], sorted(exported)[len(exported) // 2]
    with capsys.disabled():
        print(
            f"\n{folder.parent.name} in the browser: {exported:,.0f} tokens/s after {past}; native onnxruntime on {torch.get_num_threads()} thread: {here:,.0f}, {here / exported:.1f} times that"
        )


# -----------------------------------------------------------------------------------------------------
# serve.py, without a browser


@pytest.fixture
def model_folder(tmp_path):
    for name in "model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "secret.txt":
        (tmp_path / name).write_text(name)
    return tmp_path


def get(server, path, method="GET", host="127.0.0.1", **headers):
    c = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    c.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        c.putheader(name, value)
    c.endheaders()
    r = c.getresponse()
    return r.status, r.read(), r.headers


def test_the_server_gives_what_it_names_and_nothing_else(model_folder):
    with serving(model_folder) as server:
        for path, kind in (
            ("/", "text/html"),
            ("/app.js", "text/javascript"),
            ("/style.css", "text/css"),
            ("/model/model.onnx", "octet-stream"),
            ("/model/config.json", "json"),
            ("/app.js?x=1", "text/javascript"),
        ):
            status, body, headers = get(server, path)
            assert (
                status == 200
                and body
                and kind in headers["Content-Type"]
                and "default-src 'self'" in headers["Content-Security-Policy"]
            )
            assert (
                headers["Cross-Origin-Opener-Policy"] == "same-origin"
                and headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            )
        for path in (
            "/package.json",
            "/node_modules/",
            "/model/",
            "/model/secret.txt",
            "/model/model_int8.onnx",
            "/../serve.py",
            "/model/../secret.txt",
            "/model/..%2fsecret.txt",
            "/%2e%2e/serve.py",
            "//etc/passwd",
            "/model//etc/passwd",
            "/.",
            "/model/model.onnx/",
            "/\\..\\serve.py",
            "/index.html/",
            "/app.js%00",
            "http://other/app.js",
            "/model",
        ):
            status, body, _ = get(server, path)
            assert status in (301, 400, 404) and b"secret" not in body and b"import" not in body, path
        assert get(server, "/", "POST")[0] == 501 and server.server_address[0] == "127.0.0.1"
    with serving(model_folder / "model_int8.onnx") as server:
        assert get(server, "/model/model.onnx")[1] == b"model_int8.onnx"


def test_the_server_answers_to_its_own_name_alone(model_folder):
    """A page of a stranger may let its name mean 127.0.0.1 (DNS rebinding); its Host tells."""
    with serving(model_folder) as server:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("localhost", 200),
            ("evil.example", 403),
            ("evil.example:8000", 403),
            ("127.0.0.1.evil.example", 403),
            ("", 403),
        ):
            for method in "GET", "HEAD":
                assert get(server, "/model/model.onnx", method, host)[0] == status, host


def test_an_older_model_is_not_taken_for_the_one_before(model_folder):
    since = email.utils.formatdate(time.time(), usegmt=True)
    for path in model_folder.iterdir():
        os.utime(path, (0, 0))
    with serving(model_folder) as server:
        status, body, headers = get(server, "/model/model.onnx", **{"If-Modified-Since": since})
    assert (status, body, headers["Cache-Control"]) == (200, b"model.onnx", "no-store")


def test_a_page_that_goes_leaves_no_traceback(model_folder, capfd):
    with open(model_folder / "model.onnx", "wb") as f:
        f.truncate(1 << 26)  # more than the sockets hold
    with serving(model_folder) as server:
        server.daemon_threads = False  # closing it waits for them
        with socket.create_connection(server.server_address) as c:
            c.sendall(b"GET /model/model.onnx HTTP/1.1\r\nHost: localhost\r\n\r\n")
            c.recv(100)
    assert capfd.readouterr().err == ""


def test_a_taken_port(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(serve, "FILES", ["index.html"])  # whether npm ran does not matter here
    monkeypatch.setattr(serve.ThreadingHTTPServer, "serve_forever", lambda self: self.server_close())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Refusal, match=f"port {port}.*--port=0"):
            serve.main(configure(serve.Config, [f"--model={model_folder}", f"--port={port}"]))
        monkeypatch.setattr(serve.Config, "port", port)
        cfg = serve.Config(model=str(model_folder), port=port)
        cfg.given = {}
        serve.main(cfg)
    assert "http://127.0.0.1:" in (out := capsys.readouterr().out) and f":{port} " not in out


@pytest.mark.parametrize(
    "args, says",
    [
        (["--model=nowhere"], "export_onnx.py --out_dir=OUT --to=nowhere writes"),
        (["--model=x.onnx"], "--to=FOLDER writes"),
        (["--model=a/model_int8.onnx"], "--to=a --quantize=int8 writes"),
        (["--port=70000"], "port must be"),
        (["--prot=1"], "did you mean port?"),
    ],
)
def test_what_serve_refuses(args, says, monkeypatch):
    monkeypatch.setattr(serve, "FILES", ["index.html"])
    with pytest.raises(Refusal, match=says):
        serve.main(configure(serve.Config, args))
