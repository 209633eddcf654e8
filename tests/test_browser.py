"""The page in browser/, in a real Chromium, and in its main parts in a real Firefox.

Python's ids, the model's text, and nothing is lost.
"""

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
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import chromium
import firefox
from scripts import call
from test_export_onnx import write_old
from test_model import build
from test_sample import complete
from test_tokenizer import (
    ASSIGNED,
    CHAR_DOCS,
    PIECES,
    SPACES,
    bpe,  # a fixture, as is the next
    gpt2_folder,
)

import chat
import checkpoint
import checkpoint_file
import export_onnx
import onnx_graph
import onnx_integers
import onnx_model
import prepare
import sample
import serve
import train
from config import Refusal, configure
from data import AS_IT_STANDS, MODELS_OWN, STRIPPED, by_text_rule, prompt_ids, render
from generate import next_token
from model import Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time, there was a"


class StoryTeller(NamedTuple):
    folder: Path  # with the exported model
    model: Transformer
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def story_teller(tmp_path_factory):
    """A small model with a context of 256 tokens, trained as far as words."""
    folder = tmp_path_factory.mktemp("model")
    settings = [
        "--n_layer=2",
        "--n_embd=64",
        "--n_head=4",
        "--n_kv_head=2",
        "--block_size=256",
        "--batch_size=8",
        "--max_iters=150",
        "--eval_interval=150",
        "--device=cpu",
        "--dtype=float32",
        "--compile=false",
        "--out_dir=out",
    ]
    with contextlib.chdir(folder):
        prepare.prepare(configure(prepare.Config, ["--num_stories=3000", "--num_proc=1"]))
        call(train, *settings)
        call(export_onnx, "--out_dir=out", "--seconds=0")
        path = checkpoint.find("out")
        model, tokenizer = checkpoint_file.restore(checkpoint_file.load(path), path)
    return StoryTeller(folder / "out/onnx", model, tokenizer)


@pytest.fixture
def folder_copy(story_teller, tmp_path):
    """A copy of the story teller's folder that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(story_teller.folder, folder)
    return folder


def generated(teller, prompt, **settings):
    """Returns sample.py's text after a prompt, and why it ended."""
    _, model, tokenizer = teller
    greedy = {"max_new_tokens": 10**6, "temperature": 0, "stop": tokenizer.ends}
    rows, ends = complete(sample.generate(model, [prompt_ids(tokenizer, prompt)], **(greedy | settings)))
    return tokenizer.decode(rows[0]), ends[0]


def long_prompt(tokenizer, n):
    """Returns the first n tokens of a sentence that is told again and again, as a text."""
    text = "One day, Tom and the bear went to the old mill. " * 40
    return tokenizer.decode(tokenizer.encode(text)[:n])


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -----------------------------------------------------------------------------------------------------
# The page

STORY = "document.querySelector('#story')"
SPANS = "document.querySelectorAll('#story span')"


def select(id):
    """The JavaScript expression of an element."""
    return f"document.querySelector('#{id}')"


def span(i):
    """The JavaScript expression of a token's element."""
    return f"{SPANS}[{i}]"


class Page:
    """What a reader sees and does."""

    def __init__(self, browser, server):
        self.browser = browser
        self.server = server
        self.home = f"http://127.0.0.1:{server.server_port}/"

    def run(self, script):
        return self.browser.run(script)

    def wait(self, script):
        self.browser.wait(script)

    def call(self, function, *args):
        """Returns what a JavaScript function gives for arguments that JSON can hold."""
        return self.run(f"({function})(...{json.dumps(args)})")

    def open(self):
        """Loads the page and waits for the model, or for the error."""
        self.browser.open(self.home)
        self.wait(f"Boolean(document.querySelector('.error')) || !{select('write')}.disabled")
        return self

    def resize(self, width, height, mobile):
        self.browser.size(width, height, mobile)
        self.run("new Promise(resolve => setTimeout(resolve, 200))")

    def wait_for_frames(self):
        self.run("""new Promise(resolve =>
            requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(resolve, 20)))
        )""")

    def settle(self):
        """Waits until the model rests and all is drawn; returns the text."""
        self.wait_for_frames()
        self.wait(f"{select('write')}.textContent !== 'Stop'")
        self.wait_for_frames()
        return self.text()

    # what a reader does

    def click(self, id):
        self.wait_for_frames()  # the editor may grow, and the button go down
        self.browser.mouse(select(id), click=True)

    def set(self, **settings):
        for id, value in settings.items():
            self.call(
                """(id, value) => {
                    const input = document.getElementById(id);
                    input.value = value;
                    input.dispatchEvent(new Event("input", { bubbles: true }));
                }""",
                id,
                value,
            )

    def type(self, text):
        """Types into the editor, in the place of the text in it."""
        self.run(f"{select('edit')}.select()")
        self.browser.type(text)

    def write(self, text, **settings):
        """Types a text and has the model go on; returns the whole text."""
        self.set(**settings)
        self.type(text)
        self.click("write")
        return self.settle()

    def new_story(self):
        self.click("clear")
        self.wait(f"!{select('edit')}.hidden")

    def edit(self):
        self.click("change")
        self.wait(f"!{select('edit')}.hidden")

    def rewrite(self, text):
        self.edit()
        self.type(text)

    def focus(self, i):
        """Gives the focus to a token, whose alternatives the next arrow key shows."""
        self.run(f"{span(i)}.focus()")

    # what a reader sees

    def tokens(self):
        return self.run(
            "[...document.querySelectorAll('#story span:not(.end)')].map(span => span.textContent)"
        )

    def text(self):
        return "".join(self.tokens())

    def given_tokens(self):
        """Returns the texts of the tokens that are the reader's."""
        return self.run("[...document.querySelectorAll('#story .given')].map(span => span.textContent)")

    def editor(self):
        """Returns the text in the editor, None where it is closed."""
        return self.call("""() => {
            const edit = document.querySelector("#edit");
            return edit.hidden ? null : edit.value;
        }""")

    def button(self, id="write"):
        """Returns the words on a button, None where it is hidden."""
        return self.call(
            """id => {
                const button = document.getElementById(id);
                return button.hidden ? null : button.textContent;
            }""",
            id,
        )

    def value(self, id):
        return self.run(f"{select(id)}.value")

    def message(self):
        return self.run(f"{select('said')}.textContent")

    def error(self):
        """Returns the text of the one error that is in the place of the page."""
        [error] = self.run("[...document.querySelectorAll('.error')].map(e => e.innerText)")
        return error

    def alternatives(self):
        """Returns [text, probability] of each token that might have come, [] where no list is shown."""
        return self.call(r"""() => {
            const list = document.querySelector("#others");
            if (list.hidden) return [];
            const buttons = [...document.querySelectorAll("#others > button")];
            return buttons.map(button => button.innerText.split(/\s*\n/));
        }""")

    def focused_token(self):
        """Returns the place of the focused token among the story's."""
        return self.run(
            "[...document.activeElement.parentNode.children].indexOf(document.activeElement)"
        )

    # what a test does

    def on_change(self, reaction):
        """Calls a JavaScript function with the observer whenever the story is drawn anew."""
        self.run(f"""new MutationObserver((_, observer) => ({reaction})(observer)).observe(
            {STORY}, {{ childList: true }}
        )""")

    def stop_at(self, n):
        """Presses the button as soon as the story has n tokens."""
        self.on_change(f"""observer => {{
            if ({SPANS}.length < {n}) return;
            observer.disconnect();
            {select("write")}.click();
        }}""")


@contextlib.contextmanager
def serving(model):
    server = serve.serve(str(model), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def opened(browser, model):
    """The page with a model, in a window of its usual size."""
    with serving(model) as server:
        browser.size(1200, 900)
        yield Page(browser, server).open()


BROWSERS = {"Chromium": chromium, "Firefox": firefox}
in_both = pytest.mark.parametrize("browser", BROWSERS, indirect=True)


@pytest.fixture(scope="module")
def browser(request, tmp_path_factory):
    """A Chromium, and for tests that are marked so a Firefox too."""
    name = getattr(request, "param", "Chromium")
    if not BROWSERS[name].PATH:
        pytest.skip(f"there is no {name}")
    if not (ROOT / "browser" / serve.FILES[-1]).is_file():
        install_onnxruntime_web()
    browser = BROWSERS[name].Browser(tmp_path_factory.mktemp(name))
    yield browser
    browser.close()


def install_onnxruntime_web():
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


@pytest.fixture
def page(browser, story_teller):
    """The story teller's page; no test of it may leave an error, or ask another host."""
    browser.errors.clear()
    browser.urls.clear()
    with opened(browser, story_teller.folder) as page:
        yield page
        assert not browser.errors
        files = {url.rpartition("/")[2] for url in browser.urls}
        # the worker's requests are among them
        assert {"ort-wasm-simd-threaded.wasm", "model.onnx"} <= files
        for url in browser.urls:
            assert url.startswith((page.home, "data:,")), "the page asked another host"


# -----------------------------------------------------------------------------------------------------
# The tokenizer and the draw

# kinds of text: each a list of groups of characters, or of pieces, that are equally likely
KINDS = [
    ["etaoin 'sdmtlvr<|>"],
    [SPACES],
    ["\ufeff\x85 \u2028\xa0a1.'"],
    ["0123½Ⅷ٣.,!?-_👩🏽‍🚀😀é\u0301ß語ก\ud83d\ude00\ud800"],
    [ASSIGNED],
    [SPACES, ASSIGNED],
    [PIECES],
]


def fuzz_texts(n, seed, kinds=KINDS):
    rng = random.Random(seed)
    texts = []
    for kind in itertools.islice(itertools.cycle(kinds), n):
        length = rng.randrange(40)
        texts.append("".join(rng.choice(rng.choice(kind)) for _ in range(length)))
    return texts


def check_tokenizer(page, tokenizer, texts):
    """The page has Python's ids of the texts, and Python's text of them and of any others."""
    rng = random.Random(3)
    sequences = [tokenizer.encode(text) for text in texts]
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        sequences.append(ids + tokenizer.encode("."))
    encoded, streamed = page.call(
        """async (data, texts, sequences) => {
            const { Tokenizer } = await import("/tokenizer.js");
            const tokenizer = new Tokenizer(JSON.parse(data));
            const streamed = sequences.map(ids => {
                const stream = tokenizer.stream();
                return ids.map(id => stream(id));
            });
            return [texts.map(text => tokenizer.encode(text)), streamed];
        }""",
        tokenizer.to_str(),
        texts,
        sequences,
    )
    assert encoded == [tokenizer.encode(text) for text in texts]
    for ids, pieces in zip(sequences, streamed):
        text = tokenizer.decode(ids)
        assert "".join(pieces) == text
        if "\ufffd" not in text:  # what is no UTF-8 may be given up earlier or later
            stream = tokenizer.stream()
            assert pieces == [stream(i) for i in ids]


@pytest.mark.slow
@in_both
def test_ids_and_text_are_pythons(page, bpe, gpt2_folder):
    check_tokenizer(page, bpe, fuzz_texts(1000, seed=0))
    long_word = "".join(random.Random(4).choices("thehandaséß", k=3000))
    check_tokenizer(page, Tokenizer.gpt2(gpt2_folder), [*fuzz_texts(999, seed=1), long_word])
    characters = "".join(CHAR_DOCS)
    check_tokenizer(page, Tokenizer.char(CHAR_DOCS), fuzz_texts(1000, seed=2, kinds=[[characters]]))


def rename_token(vocab, token, name):
    vocab[name] = vocab.pop(token)


@pytest.mark.slow
def test_bad_tokenizers_are_refused_in_one_line(page, bpe):
    documents = [{}, None, [], 1]
    for damage in (
        lambda document: document["model"].update(type="Unigram"),
        lambda document: document["pre_tokenizer"].update(add_prefix_space=True),
        lambda document: document["pre_tokenizer"].update(type="Whitespace"),
        lambda document: document.update(normalizer={"type": "NFC"}),
        lambda document: document["added_tokens"].clear(),
        lambda document: document["model"]["vocab"].update(the=10**6),
        lambda document: document["model"]["vocab"].pop("a"),
        lambda document: document["model"]["merges"].reverse(),
        lambda document: document["model"]["merges"].pop(),
        lambda document: rename_token(document["model"]["vocab"], "!", "☃"),
    ):
        document = json.loads(bpe.to_str())
        damage(document)
        documents.append(document)
    messages = page.call(
        """async documents => {
            const { Tokenizer } = await import("/tokenizer.js");
            return documents.map(document => {
                try {
                    new Tokenizer(document);
                    return "";
                } catch (error) {
                    return error.message;
                }
            });
        }""",
        documents,
    )
    for message in messages:
        assert message
        assert "undefined" not in message
        assert "\n" not in message


@pytest.mark.slow
def test_the_draw_is_next_tokens(page):
    """The tokens that may come and how often: against 40,000 draws in Python."""
    logits = torch.tensor([2.0, 1.5, 1.4, 1.0, 0.5, 0.4, 0.0, -1.0, -1.1, -3.0])
    n = 40_000
    for temperature, top_k, top_p in itertools.product(
        (0, 0.5, 1.0, 2.0), (0, 1, 2, 3, 5, 6, 10, 50), (0.05, 0.35, 0.6, 0.9, 1.0)
    ):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        probabilities = page.call(
            """async (logits, settings) => {
                const { keep } = await import("/sample.js");
                const { ids, weights } = keep(Float32Array.from(logits), settings);
                const sum = weights.reduce((a, b) => a + b);
                const probabilities = logits.map(() => 0);
                ids.forEach((id, i) => probabilities[id] = weights[i] / sum);
                return probabilities;
            }""",
            logits.tolist(),
            settings,
        )
        if temperature == 0:
            assert probabilities == [1.0] + [0.0] * 9
            continue
        uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = next_token(logits.expand(n, -1), temperature, top_k, top_p, uniform)
        frequencies = torch.bincount(drawn, minlength=10) / n
        for p, frequency in zip(probabilities, frequencies.tolist()):
            assert p > 0 or frequency == 0, settings
            assert p <= 0.001 or frequency > 0, settings
            assert abs(p - frequency) <= 0.015, settings


@pytest.mark.slow
def test_top_p_of_a_large_vocabulary_is_that_of_the_sorted_whole(page):
    """sample.js sorts it in parts."""
    assert page.call("""async () => {
        const { keep, uniform } = await import("/sample.js");
        const logits = Float32Array.from({ length: 5000 }, (_, i) => 6 * uniform(7, i));
        const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
        const weights = order.map(i => Math.exp(logits[i]));
        const sum = weights.reduce((a, b) => a + b);
        return [0.1, 0.5, 0.9, 0.99].every(top_p => {
            let n = 0;
            let mass = 0;
            while (mass < top_p * sum) mass += weights[n++];
            const { ids } = keep(logits, { temperature: 1, top_k: 0, top_p });
            return JSON.stringify(ids) === JSON.stringify(order.slice(0, n));
        });
    }""")


@pytest.mark.slow
def test_the_largest_logits_are_those_of_the_sorted_whole(page):
    assert page.call("""async () => {
        const { largest } = await import("/sample.js");
        const logits = Float32Array.from({ length: 5000 }, (_, i) => i * 7919 % 1000);
        const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
        return [1, 999, 1000, 1001, 2003, 4999, 5000].every(k => {
            const least = logits[order[k - 1]];
            const ids = order.filter(i => logits[i] >= least);
            return JSON.stringify(largest(logits, k)) === JSON.stringify(ids);
        });
    }""")


@pytest.mark.slow
def test_random_numbers_are_uniform_and_independent(page):
    numbers = torch.tensor(
        page.call("""async () => {
            const { uniform } = await import("/sample.js");
            const draw = seed => Array.from({ length: 10000 }, (_, n) => uniform(seed, n));
            return [1, 2, 2 ** 40, 2 ** 53 - 2, 2 ** 53 - 1].flatMap(draw);
        }""")
    )
    assert len(numbers.unique()) > 49_900
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.histc(numbers, 10, 0, 1).sub(5000).abs().max() < 400
    assert abs(correlation(numbers[:-1], numbers[1:])) < 0.02
    assert abs(correlation(numbers[:10_000], numbers[10_000:20_000])) < 0.05  # of two seeds


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


# -----------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.slow
@in_both
def test_greedy_text_is_sample_pys(page, story_teller):
    lengths = []
    for prompt in PROMPT, "", "The", "  \n Ünïcode 日本 \ufeff", "Long ago":
        text, end = generated(story_teller, prompt)
        assert page.write(prompt, temperature=0) == prompt + text
        button = page.button()
        assert (button is None) == (end == "stop")
        assert (button == "Go on from the last half") == (end == "block_size")
        lengths.append(len(page.tokens()))
        page.new_story()
    assert max(lengths) >= 200


@pytest.mark.slow
def test_a_full_context_goes_on_from_its_last_half(page, story_teller):
    prompt = long_prompt(story_teller.tokenizer, 251)
    assert len(story_teller.tokenizer.encode(prompt)) == 251
    text = page.write(prompt, temperature=0)
    assert page.message() == "The context of 256 tokens is full."
    assert page.button() == "Go on from the last half"
    assert text == prompt + generated(story_teller, prompt)[0]
    page.click("write")
    longer = page.settle()
    n = len(page.tokens()) - 252  # without the prompt and what stands before it
    assert longer.startswith(text)
    assert n > 20
    reference, _ = generated(story_teller, prompt, max_new_tokens=n, past_end="recompute")
    assert longer == prompt + reference


@pytest.mark.slow
def test_a_text_that_is_longer_than_the_context_goes_on_from_its_last_half(page):
    page.write("day " * 700, temperature=0)
    assert "the model sees 256 at a time" in page.message()
    assert page.button() == "Go on from the last half"
    page.click("write")
    assert len(page.settle()) > 4 * 700


def long_story(page, **settings):
    """Returns a story of more than 60 tokens and its seed, the first that has one."""
    for seed in itertools.count(1):
        text = page.write(PROMPT, temperature=1, seed=seed, **settings)
        is_long = len(page.tokens()) > 60
        page.new_story()
        if is_long:
            return text, seed


@pytest.mark.slow
@in_both
def test_stop_reload_and_continue_tell_the_uninterrupted_story(page):
    uninterrupted, seed = long_story(page, top_k=50, top_p=0.95)
    page.stop_at(20)
    text = page.write(PROMPT)
    assert page.button() == "Continue"
    assert page.message() == "Stopped."
    assert uninterrupted.startswith(text)
    assert uninterrupted != text

    given = page.given_tokens()
    page.open()
    assert page.settle() == text
    assert page.given_tokens() == given
    assert page.value("seed") == str(seed)

    page.stop_at(40)
    page.click("write")
    assert uninterrupted.startswith(page.settle())
    page.browser.key("Enter")  # the button has the focus
    assert page.settle() == uninterrupted

    page.click("again")
    other = page.settle()
    assert other.startswith(PROMPT)
    assert other != uninterrupted
    assert page.value("seed") == str(seed + 1)


@pytest.mark.slow
def test_editing_rewinds_the_cache_to_where_the_texts_differ(page, story_teller):
    """After an edit comes what comes after the same text in a page that never saw another."""
    tokenizer = story_teller.tokenizer
    page.call("""() => {
        window.requests = [];
        const post = Worker.prototype.postMessage;
        Worker.prototype.postMessage = function (message, ...rest) {
            if (message.ids) requests.push([message.keep, message.ids]);
            return post.call(this, message, ...rest);
        };
    }""")
    text = page.write(PROMPT, temperature=0)
    words = text.split(" ")
    for edited in (
        " ".join([*words[:12], "happy", *words[13:30]]),
        " ".join(words[:20]),
        " ".join(words[:20]) + " and then",
        "A" + text[1:80],
    ):
        page.edit()
        before = [tokenizer.eot, *tokenizer.encode(page.editor())]
        after = [tokenizer.eot, *tokenizer.encode(edited)]
        page.type(edited)
        page.run("requests.length = 0")
        page.browser.key("Enter")
        assert page.settle() == edited + generated(story_teller, edited)[0]
        keep, ids = page.run("requests[0]")
        common = len(os.path.commonprefix([before, after]))
        assert keep == common - 1  # the last one is read again, for what comes after it
        assert ids == after[keep : keep + 64]


@pytest.mark.slow
def test_nothing_is_drawn_twice_in_a_frame(page):
    # frames are counted: Chromium may give two of them one document.timeline.currentTime
    page.call("""() => {
        window.frames_begun = 0;
        window.drawings = [];
        const begin = () => { frames_begun++; requestAnimationFrame(begin); };
        begin();
    }""")
    page.on_change("() => drawings.push(frames_begun)")
    page.write(PROMPT, temperature=1, seed=3)
    drawings = page.run("drawings")
    assert len(drawings) > 1
    assert len(set(drawings)) == len(drawings)


@pytest.mark.slow
def test_text_is_never_markup(page):
    markup = "<img src=x onerror=alert(1)><b>bold</b>&amp;<script>alert(2)</script>"
    page.stop_at(60)
    assert page.write(markup, temperature=1).startswith(markup)
    assert page.run("document.querySelectorAll('#story img, #story b, #story script').length") == 0


@pytest.mark.slow
def test_a_wrong_setting_is_named_and_then_corrected(page):
    page.set(seed="", temperature=1)
    page.type(PROMPT)
    page.click("write")
    page.settle()
    assert page.message().startswith("Seed: ")
    assert page.text() == PROMPT
    page.set(seed=5)
    page.click("write")
    assert len(page.settle()) > len(PROMPT)


# -----------------------------------------------------------------------------------------------------
# What else a token might have been


def shown(tokenizer, i):
    """A token as the list of alternatives shows it."""
    if i == tokenizer.eot:
        return "∎ the end"
    return tokenizer.decode([i]).replace(" ", "·").replace("\n", "↵")


def show_alternatives(page, i, way):
    if way == "mouse":
        page.browser.mouse(span(i))
    elif way == "key":
        page.focus(i - 1)
        page.browser.key("ArrowRight")
    elif way == "finger":
        page.resize(390, 844, mobile=True)
        page.browser.tap(span(i))
    page.wait(f"!{select('others')}.hidden")


def take_alternative(page, k, way):
    button = f"document.querySelectorAll('#others > button')[{k}]"
    if way == "mouse":
        page.browser.mouse(button, click=True)
    elif way == "key":
        for _ in range(k + 1):
            page.browser.key("ArrowDown")
        page.browser.key("Enter")
    elif way == "finger":
        page.browser.tap(button)


@pytest.mark.slow
@in_both
def test_alternatives_are_the_models_and_are_taken_by_mouse_by_key_and_by_finger(page, story_teller):
    _, model, tokenizer = story_teller
    i = 9
    page.write(PROMPT, temperature=0.7, seed=2)
    for way in "mouse", "key", "finger":
        tokens = page.tokens()
        show_alternatives(page, i, way)
        with torch.no_grad():
            ids = [tokenizer.eot, *tokenizer.encode("".join(tokens[1:i]))]
            logits = model(torch.tensor([ids]))[0][0, -1]
        order = logits.argsort(descending=True).tolist()
        probabilities = logits.softmax(-1)[order].tolist()

        alternatives = page.alternatives()
        assert [text for text, _ in alternatives] == [shown(tokenizer, j) for j in order[:8]]
        for (_, percentage), p in zip(alternatives, probabilities):
            assert abs(float(percentage.strip("%< ")) / 100 - p) < 0.0006
        p = probabilities[order.index(tokenizer.encode(tokens[i])[0])]
        heat = float(page.run(f"{span(i)}.style.getPropertyValue('--heat-of')"))
        assert heat == pytest.approx(min(1, -math.log(p) / math.log(100)), abs=0.01)

        taken = next(
            k
            for k in range(1, 8)
            if order[k] != tokenizer.eot and tokenizer.decode([order[k]]) != tokens[i]
        )
        take_alternative(page, taken, way)
        page.settle()
        after = page.tokens()
        assert after[:i] == tokens[:i]
        assert after[i] == tokenizer.decode([order[taken]])
        assert len(after) > i + 5
        assert "given" in page.run(f"{span(i)}.className").split()
        assert page.alternatives() == []


def write_to_an_end(page, prompt=PROMPT):
    """Returns a story that the model ended, of the first seed that has one."""
    for seed in itertools.count(1):
        text = page.write(prompt, temperature=0.5, seed=seed)
        if "ended its story" in page.message():
            return text
        page.new_story()


@pytest.mark.slow
def test_a_stop_that_comes_after_the_end_leaves_the_story(page):
    text = write_to_an_end(page)
    page.run(f"{select('write')}.click()")  # as on a page that has not drawn the end yet
    assert page.settle() == text


@pytest.mark.slow
def test_an_end_that_the_reader_took_gives_way_to_another(page):
    text = write_to_an_end(page)
    show_alternatives(page, page.run(f"{SPANS}.length - 1"), "mouse")
    names = [name for name, _ in page.alternatives()]
    take_alternative(page, names.index("∎ the end"), "mouse")
    assert page.settle() == text
    assert page.run(f"{select('story')}.querySelector('.end').matches('.given')")
    page.click("again")
    other = page.settle()
    assert other.startswith(PROMPT) and other != text
    assert "".join(page.given_tokens()) == PROMPT


@pytest.mark.slow
@in_both
def test_keys_alone(page):
    """Enter writes, Escape closes, stops and leaves the editor, the arrows move."""
    page.type(PROMPT)
    page.stop_at(30)
    page.browser.key("Enter")
    page.settle()

    page.focus(3)
    page.browser.key("ArrowRight")
    assert page.focused_token() == 4
    assert page.alternatives()
    page.browser.key("ArrowDown")
    assert page.run("document.activeElement.parentNode.id") == "others"
    page.browser.key("Escape")
    assert not page.alternatives()
    assert page.focused_token() == 4
    page.browser.key("End")
    assert page.run(f"document.activeElement === [...{SPANS}].findLast(span => span.textContent)")
    page.browser.key("Escape")  # the list may lie over the button

    page.edit()
    before = page.editor()
    page.browser.key("Enter", modifiers=8)  # shift
    assert page.editor() == before + "\n"
    page.browser.key("Escape")
    assert page.settle() == before + "\n"
    assert page.editor() is None


@pytest.mark.slow
@in_both
def test_the_focus_goes_on_from_what_is_hidden(page):
    """From the button that wrote the end to the one that is left, and from a closed list to its token."""
    text = write_to_an_end(page)
    assert page.button() is None
    page.browser.key("Enter")
    other = page.settle()
    assert other.startswith(PROMPT)
    assert other != text

    page.resize(390, 844, mobile=True)
    page.focus(3)
    page.browser.key("ArrowRight")
    page.run("document.querySelector('#others p button').focus()")
    page.browser.key("Enter")
    assert not page.alternatives()
    assert page.focused_token() == 4


# -----------------------------------------------------------------------------------------------------
# Nothing is lost


@pytest.mark.slow
def test_a_story_put_away_comes_back(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    page.new_story()
    assert page.editor() == ""
    assert page.button("clear") == "Bring the last one back"
    page.click("clear")
    assert page.settle() == text


@pytest.mark.slow
def test_a_reload_amid_writing_loses_nothing(page):
    uninterrupted, _ = long_story(page)
    page.run("window.old = true")
    page.on_change(f"() => {{ if ({SPANS}.length >= 25) location.reload(); }}")
    page.type(PROMPT)
    page.click("write")
    page.wait(f"!window.old && {select('write')}?.disabled === false")
    text = page.settle()
    assert text.startswith(PROMPT)
    assert len(page.tokens()) >= 24
    assert page.button() == "Continue"
    page.click("write")
    assert page.settle() == uninterrupted  # one story, wherever it was stopped


@pytest.mark.slow
@in_both
def test_every_way_out_of_a_story_leads_back(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    page.rewrite("A rewrite")
    page.new_story()
    page.type("Something new")
    page.wait_for_frames()
    assert page.button("clear") is None  # nothing takes the place of a new text
    page.open()
    assert page.editor() == "Something new"

    page.type("")
    page.run("document.execCommand('delete')")
    page.wait_for_frames()
    page.open()
    assert page.button("clear") == "Bring the last one back"
    page.click("clear")
    page.wait_for_frames()
    assert page.editor() == "A rewrite"
    page.type(text)
    page.click("change")
    assert page.settle() == text


@pytest.mark.slow
def test_a_wrong_setting_changes_no_story(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    page.set(top_k="")
    page.click("again")
    assert page.settle() == text
    assert page.message().startswith("Top-k: ")
    page.focus(9)
    for key in "ArrowRight", "ArrowDown", "Enter":
        page.browser.key(key)
    assert page.settle() == text
    assert page.message().startswith("Top-k: ")


@pytest.mark.slow
def test_the_story_waits_for_its_model_and_for_its_tab(browser, story_teller, folder_copy, tmp_path):
    edit_config(folder_copy, tokenizer_sha256="0" * 64)
    with opened(browser, story_teller.folder) as page:
        text = page.write(PROMPT, temperature=1, seed=4)
        page.server.folder = str(tmp_path / "nowhere")
        page.open()
        page.set(top_k=50)  # beside the error
        page.server.folder = str(folder_copy)
        page.open()
        assert page.editor() == ""
        assert page.write("The end", top_k=50).startswith("The end")
        page.server.folder = str(story_teller.folder)
        page.open()
        assert page.settle() == text
        assert page.value("top_k") == "50"

        page.run("localStorage.clear()")  # as another tab that wrote there would
        page.open()
        assert page.settle() == text
        page.run("sessionStorage.clear()")  # a new tab
        page.run("window.onpagehide = () => sessionStorage.clear()")
        page.open()
        assert page.settle() == text


@pytest.mark.slow
def test_probabilities_stay_when_the_context_moves_on(page, story_teller):
    heats = f"[...{SPANS}].map(span => Number(span.style.getPropertyValue('--heat-of') || -1))"
    page.write(long_prompt(story_teller.tokenizer, 251), temperature=0)
    before = page.run(heats)
    page.click("write")
    page.settle()
    after = page.run(heats)
    assert after[: len(before)] == before
    assert len(after) > len(before) + 10
    page.open()
    page.settle()
    assert page.run(heats) == pytest.approx(after, abs=0.002)

    # a token that the model no longer sees may still be replaced
    page.focus(100)
    for key in "ArrowRight", "ArrowDown", "ArrowDown", "Enter":
        page.browser.key(key)
    page.settle()
    assert len(page.tokens()) > 110
    assert "context" not in page.message()


@pytest.mark.slow
def test_a_changed_word_leaves_the_rest_the_models(page):
    text = page.write(PROMPT, temperature=1, seed=4)
    assert "".join(page.given_tokens()) == PROMPT
    edited = text.replace("upon", "before", 1)
    page.rewrite(edited)
    page.click("change")
    assert page.settle() == edited
    assert "".join(page.given_tokens()) == PROMPT.replace("upon", "before")
    assert page.button("again") == "Another way"


# -----------------------------------------------------------------------------------------------------
# Other models


@pytest.mark.slow
@pytest.mark.parametrize("rule", [AS_IT_STANDS, STRIPPED])
def test_a_fine_tuned_model_gets_its_template(browser, story_teller, folder_copy, rule):
    template = "Q: {prompt}\nA:"
    edit_config(folder_copy, template=template, start="FILE:x", text_rule=rule)
    with opened(browser, folder_copy) as page:
        assert page.editor() == "FILE:x"  # a text, as any
        for prompt in "Why?", "\x85\x1f Why \ufeff", "  ":
            rendered = render(template, by_text_rule(prompt, rule))
            text, _ = generated(story_teller, rendered)
            assert page.write(prompt, temperature=0) == rendered + text
            page.new_story()
        page.write("Why?")
        for edited, text in (
            ("Q: Where?\nA:", "Q: Where?\nA:"),
            ("Now another question", "Q: Now another question\nA:"),
        ):
            page.rewrite(edited)
            page.click("change")
            assert page.settle() == text


@pytest.mark.slow
def test_an_instruct_model_writes_its_text_or_is_refused_by_name(browser, tmp_path):
    """It is untuned and has GPT-2's splitting and two end tokens, which the exported folder carries."""
    pytest.importorskip("transformers")
    from test_chat import SYSTEM, conversations, instruct
    from test_hf import smollm, tinylm

    with contextlib.chdir(tmp_path):
        instruct(tmp_path / "folder", tinylm, SYSTEM, eos_token_id=[0, 200])
        export = ["--out_dir=hf:folder", "--to=onnx", "--seconds=0"]
        call(export_onnx, *export)
        model, tokenizer = checkpoint.open_checkpoint("hf:folder").restore()
    folder = tmp_path / "onnx"
    _, exported_tokenizer, _ = onnx_model.load(str(folder))
    assert exported_tokenizer.ends == tokenizer.ends == (0, 200)
    for messages in conversations(9):
        ids = chat.conversation_ids(tokenizer, messages)
        assert chat.conversation_ids(exported_tokenizer, messages) == ids
    teller = StoryTeller(folder, model, tokenizer)
    with opened(browser, folder) as page:
        for prompt in "the cat", "12 dogs":
            text, _ = generated(teller, prompt)
            assert page.write(prompt, temperature=0) == prompt + text
            page.new_story()

    # as after fine-tuning in its own template, and with another model's tokenizer
    edit_config(folder, template=MODELS_OWN)
    with opened(browser, folder) as page:
        assert "its own chat template, which this page does not know" in page.error()
    edit_config(folder, template="")
    backend, _ = smollm()
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    with opened(browser, folder) as page:
        assert "it splits text in another way than GPT-2's" in page.error()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mlp": "moe"}, {"window": 6, "window_pattern": "SL"}])
def test_a_character_model_one_with_experts_and_one_with_windows(browser, tmp_path, settings):
    tokenizer = Tokenizer.char(CHAR_DOCS)
    torch.manual_seed(0)
    model = build(vocab_size=tokenizer.vocab_size, block_size=64, **settings)
    run_state = checkpoint_file.RunState(1, 2.0, 2.0)
    with contextlib.chdir(tmp_path):
        checkpoint_file.save("out/ckpt.pt", model, tokenizer, {"dataset": ""}, run_state)
        call(export_onnx, "--seconds=0")
    teller = StoryTeller(tmp_path / "out/onnx", model.eval(), tokenizer)
    prompt = CHAR_DOCS[0][:5]
    with opened(browser, teller.folder) as page:
        assert page.write(prompt, temperature=0) == prompt + generated(teller, prompt)[0]
        page.rewrite(prompt + "\U0001f600")
        page.browser.key("Enter")
        page.wait_for_frames()
        assert "does not know the character" in page.message()
        assert page.editor() == prompt + "\U0001f600"


@pytest.mark.slow
def test_a_story_is_judged_anew_by_another_model(browser, folder_copy):
    """One of the same tokenizer finds the last one's story, and nothing of what that thought of it."""

    def judgement(page):
        page.focus(12)
        page.browser.key("ArrowDown")
        return page.alternatives()

    with opened(browser, folder_copy) as page:
        text = page.write(PROMPT, temperature=0)
        given = page.given_tokens()
        first = judgement(page)
        page.open()
        assert page.settle() == text
        assert judgement(page) == first
        proto = onnx.load(folder_copy / "model.onnx")
        *_, gain = [weight for weight in proto.graph.initializer if weight.name.endswith("norm.weight")]
        gain.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(gain) / 2, gain.name))
        onnx.save(proto, folder_copy / "model.onnx")
        edit_config(folder_copy, fingerprint="another")
        page.open()
        assert page.settle() == text
        assert page.given_tokens() == given
        second = judgement(page)
        assert len(second) == len(first)
        assert [p for _, p in second] != [p for _, p in first]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain_int8", "int8"])
def test_an_int8_model(browser, story_teller, folder_copy, kind):
    path = folder_copy / f"model_{kind}.onnx"
    proto = onnx.load(folder_copy / "model.onnx")
    if kind == "int8":  # with onnxruntime's own attention
        fingerprint = proto.metadata_props[0]
        proto = onnx_graph.export(story_teller.model, fused=True)
        proto.metadata_props.append(fingerprint)
    onnx_integers.quantize(proto, plain=kind == "plain_int8")
    onnx.save(proto, path)
    teller = story_teller._replace(model=onnx_model.load(str(path))[0])
    with opened(browser, path) as page:
        text = page.write(PROMPT, temperature=0)
        prompts = [PROMPT]
        if kind == "int8":  # what a text begins with stays in the cache, on which plain integers depend
            prompts += [text[:120], PROMPT + " happy"]
        for prompt in prompts:
            page.rewrite(prompt)
            page.browser.key("Enter")
            reference = prompt + generated(teller, prompt)[0]
            n = len(prompt) + 60
            assert page.settle()[:n] == reference[:n]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_file_of_an_older_format(browser, story_teller, folder_copy, fused):
    """And shown as the same model's of today."""
    path = folder_copy / "model.onnx"
    if fused:
        proto = onnx_graph.export(story_teller.model, fused=True)
        proto.metadata_props.append(onnx.load(path).metadata_props[0])
        onnx.save(proto, path)
    heats = f"[...{SPANS}].map(span => Number(span.style.getPropertyValue('--heat-of') || -1))"
    pages = []
    for is_old in False, True:
        if is_old:
            write_old(folder_copy, path)
        with opened(browser, path) as page:
            pages.append((page.write(PROMPT, temperature=0), page.run(heats)))
    (text, heat), (old_text, old_heat) = pages
    assert old_text == text
    assert old_heat == pytest.approx(heat, abs=0.002)


# -----------------------------------------------------------------------------------------------------
# Screens


@pytest.mark.slow
@in_both
def test_a_phone_shows_it_all(page):
    page.write(PROMPT, temperature=1, seed=4)
    page.resize(390, 844, mobile=True)
    assert page.run("document.documentElement.scrollWidth === document.documentElement.clientWidth")
    assert page.call("""() => {
        const buttons = [...document.querySelectorAll(".buttons button")];
        return buttons.filter(button => !button.hidden).every(button => {
            const { bottom, height, right } = button.getBoundingClientRect();
            return bottom <= innerHeight && height >= 44 && right <= 390;
        });
    }""")


@pytest.mark.slow
@pytest.mark.parametrize("width, height, mobile", [(1200, 700, False), (360, 640, True)])
def test_the_caret_stays_in_view(page, width, height, mobile):
    page.resize(width, height, mobile)
    page.type("A line of the story here.\n" * 40)
    page.wait_for_frames()
    places = []
    for key in "xxxx\n\n\ny":
        page.browser.type(key)
        page.wait_for_frames()
        bottom = f"{select('edit')}.getBoundingClientRect().bottom"
        places.append(page.run(f"[scrollY, {bottom} - innerHeight]"))
    scrolled = [y for y, _ in places]
    assert scrolled[1] > 300, places
    assert scrolled[1] == scrolled[2] == scrolled[3], places
    assert all(below < 60 for _, below in places[1:]), places


@pytest.mark.slow
@in_both
def test_a_phone_held_sideways(page):
    page.write(PROMPT, temperature=1, seed=4)
    page.resize(640, 360, mobile=True)
    page.browser.tap(span(9))
    page.wait(f"!{select('others')}.hidden")
    assert page.call("""() => {
        const { top, bottom } = document.querySelector("#others").getBoundingClientRect();
        return top >= 0.25 * innerHeight && bottom <= innerHeight;
    }""")
    page.browser.tap("document.querySelector('#others p button')")
    page.wait(f"{select('others')}.hidden")
    page.edit()
    before = page.editor()
    page.browser.key("Enter")
    assert page.editor() == before + "\n"  # the button writes


@pytest.mark.slow
@in_both
def test_a_screen_reader_is_told_what_things_are(page):
    write_to_an_end(page, f"The  end.\n{PROMPT}")
    focusable = page.run(
        """[...document.querySelectorAll('#story [tabindex="0"]')].map(span => span.textContent)"""
    )
    assert focusable == page.tokens()[1:2]
    tokens = page.call("""() => {
        const spans = [...document.querySelectorAll("#story span")].filter(span => span.textContent);
        return spans.map(span => [span.role, span.ariaHasPopup, span.textContent, span.ariaLabel]);
    }""")
    names = set()
    for role, popup, text, name in tokens:
        assert role == "button"
        assert popup == "true"
        if name is None:
            assert text.strip()
        else:
            names.add((text, name))
    assert names == {("\n", "new line"), (" ", "space"), ("∎", "∎ the end")}
    assert page.run(f"{select('others')}.getAttribute('role')") == "group"
    assert len(page.run(f"{select('others')}.ariaLabel")) > 9


def read_colour(digits):
    """Returns red, green and blue in [0, 1] of CSS's 3 or 6 hexadecimal digits."""
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(colour):
    r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def mix(a, b, share):
    return [share * x + (1 - share) * y for x, y in zip(a, b)]


def test_every_colour_of_text_stands_out_from_its_background():
    """WCAG's contrast of 4.5, in the light and in the dark."""
    schemes = re.findall(r":root \{(.*?)\}", (ROOT / "browser/style.css").read_text())
    assert len(schemes) == 2
    for scheme in schemes:
        colours = {name: read_colour(digits) for name, digits in re.findall(r"--(\w+): #(\w+)", scheme)}
        for text, background in (
            ("ink", "heat"),
            ("mine", "heat"),
            ("soft", "paper"),
            ("soft", "bg"),
            ("on", "mine"),
            ("bad", "bg"),
            ("bad", "paper"),
            ("mine", "paper"),
        ):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
        focused = mix(colours["mine"], colours["paper"], 0.22)
        assert contrast(colours["mine"], focused) >= 4.5
        assert contrast(colours["ink"], mix(colours["mine"], focused, 0.2)) >= 4.5


# -----------------------------------------------------------------------------------------------------
# Damage


def shorten(path, size):
    path.write_bytes(path.read_bytes()[:size])


def replace_tokenizer(folder):
    Tokenizer.train(["another text"], 260).save(folder / "tokenizer.json")


def shrink_vocabulary(folder):
    tokenizer = Tokenizer.train(["another text"], 260)
    tokenizer.save(folder / "tokenizer.json")
    eot = tokenizer.eot
    edit_config(folder, vocab_size=tokenizer.vocab_size, eot=eot, bos=eot, ends=[eot])


# the message, and the damage to a folder that it is about
DAMAGES = {
    "config.json is not there": lambda folder: (folder / "config.json").unlink(),
    "config.json is damaged": lambda folder: (folder / "config.json").write_text("{"),
    "format 9": lambda folder: edit_config(folder, format=9),
    "its n_layer is 0": lambda folder: edit_config(folder, n_layer=0),
    "its block_size is null": lambda folder: edit_config(folder, block_size=None),
    "are not of one model": lambda folder: edit_config(folder, n_layer=3),
    "tokenizer.json and model/config.json": replace_tokenizer,
    "does not work as": lambda folder: edit_config(folder, head_dim=32),
    "its vocabulary is another": shrink_vocabulary,
    "tokenizer.json is not there": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer.json is damaged": lambda folder: (folder / "tokenizer.json").write_bytes(b"\0\xff"),
    "tokenizer.json cannot be used": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "model.onnx is not there": lambda folder: (folder / "model.onnx").unlink(),
    "model.onnx cannot be read": lambda folder: shorten(folder / "model.onnx", 5000),
    "no ONNX file": lambda folder: (folder / "model.onnx").write_bytes(b"PK" * 9999),
    "onnxruntime-web lacks an operator": lambda folder: onnx.save(
        experts_in_integers(), folder / "model.onnx"
    ),
    "model/model.onnx cannot be read": lambda folder: shorten(folder / "model.onnx", 0),
}


def experts_in_integers():
    """Returns a graph whose experts are onnxruntime's QMoE, which onnxruntime-web 1.30 does not know as 1.32 has it."""
    model = build(mlp="moe", n_inner=64, n_layer=1, n_embd=64, n_head=4)
    proto = onnx_graph.export(model, fused=True)
    onnx_integers.quantize(proto)
    assert any(node.op_type == "QMoE" for node in proto.graph.node)
    return proto


@pytest.mark.slow
@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_named_in_one_sentence(browser, folder_copy, message):
    DAMAGES[message](folder_copy)
    with opened(browser, folder_copy) as page:
        error = page.error()
        assert message in error
        assert "\n" not in error
        assert len(error) < 300
        assert page.run("document.querySelectorAll('#paper > *').length") == 1


@pytest.mark.slow
def test_a_model_of_nan_is_named(browser, folder_copy):
    proto = onnx.load(folder_copy / "model.onnx")
    largest = max(proto.graph.initializer, key=lambda weight: len(weight.raw_data))
    largest.raw_data = b"\xff" * len(largest.raw_data)
    onnx.save(proto, folder_copy / "model.onnx")
    with opened(browser, folder_copy) as page:
        page.write(PROMPT, temperature=1)
        assert "not a number" in page.message()
        assert page.text() == PROMPT
        assert page.button() == "Continue"


@pytest.mark.slow
def test_a_server_that_stops_amid_the_model_is_named(browser, story_teller, monkeypatch):
    def copy_a_part(self, source, out):
        out.write(source.read(5000))
        if self.path.endswith(".onnx"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            shutil.copyfileobj(source, out)

    monkeypatch.setattr(serve.Handler, "copyfile", copy_a_part)
    with opened(browser, story_teller.folder) as page:
        assert page.error() == "model/model.onnx did not come whole: reload the page."


@pytest.mark.slow
def test_a_server_that_is_gone_is_named(browser, story_teller, monkeypatch):
    # in HTTP/1.1 the server would go on with the connections that it has
    monkeypatch.setattr(serve.Handler, "protocol_version", "HTTP/1.0")
    with opened(browser, story_teller.folder) as page:
        page.run("import('/get.js').then(module => window.get = module.get) && 1")
    message = page.run("get('config.json').then(() => '', error => error.message)")
    assert message.startswith("The page lost its server")


@pytest.mark.slow
def test_a_damaged_onnxruntime_web_is_named(browser, story_teller, monkeypatch, tmp_path):
    damaged = tmp_path / "browser"
    shutil.copytree(serve.HERE, damaged)
    (damaged / serve.FILES[-1]).write_bytes(b"\0" * 1000)
    monkeypatch.setattr(serve, "HERE", str(damaged))
    with opened(browser, story_teller.folder) as page:
        assert "onnxruntime-web does not start" in page.error()


@pytest.mark.slow
@in_both
def test_a_missing_onnxruntime_web_is_named(browser, story_teller, monkeypatch):
    monkeypatch.setattr(serve, "FILES", serve.FILES[:-3])
    with opened(browser, story_teller.folder) as page:
        assert "onnxruntime-web is not there" in page.error()


# -----------------------------------------------------------------------------------------------------
# Speed


@contextlib.contextmanager
def worker_clock(browser):
    """Pages that are opened from here on collect in `times` when their worker made each token."""
    script = browser.send(
        "Page.addScriptToEvaluateOnNewDocument",
        source="""
            window.times = [];
            window.Worker = class extends Worker {
                constructor(...args) {
                    super(...args);
                    this.addEventListener("message", ({ data }) => data.next && times.push(data.at));
                }
            };
        """,
    )
    yield
    browser.send("Page.removeScriptToEvaluateOnNewDocument", **script)


def native_speed(model, tokenizer, prompt, n=31):
    """Returns the tokens per second of onnxruntime after a prompt."""
    past = model.new_past(1, model.config.block_size)
    model.run(torch.tensor([tokenizer.encode(prompt)]), past)
    token = torch.tensor([[300]])
    start = time.perf_counter()
    for _ in range(n):
        logits = torch.from_numpy(model.run(token, past)[:, -1])
        next_token(logits, 1.0, 200, uniform=torch.rand(1, 1))
    return n / (time.perf_counter() - start)


@pytest.mark.slow
def test_tokens_per_second(browser, story_teller, capsys):
    """The page tells the speed by the worker's clock, and draws no oftener than tokens come.

    The figures are printed beside onnxruntime's own, not judged: what else the machine does is unknown.
    They are the demo model's where there is one, else the small one's of these tests.
    """
    folder = ROOT / "out/demo/onnx"
    if not (folder / "model.onnx").is_file():
        folder = story_teller.folder
    model, tokenizer, _ = onnx_model.load(str(folder))
    length = min(200, model.config.block_size - 32)
    prompt = long_prompt(tokenizer, length)
    speeds = []
    with worker_clock(browser), opened(browser, folder) as page:
        page.run("window.drawings = 0")
        page.on_change("() => drawings++")
        for seed in range(9):
            page.run("times.length = drawings = 0")
            page.write(prompt, temperature=1, seed=seed)
            times, drawings = page.run("[times, drawings]")
            if len(times) > 20:
                speeds.append(1000 * (len(times) - 1) / (times[-1] - times[0]))
                shown = page.run(f"{select('speed')}.textContent")
                assert shown.startswith(f"{math.floor(speeds[-1] + 0.5):,} tokens/s")
                assert drawings <= len(times) + 1
            page.new_story()
    here = statistics.median(speeds)
    native = statistics.median(native_speed(model, tokenizer, prompt) for _ in speeds)
    with capsys.disabled():
        print(
            f"\n{folder.parent.name} in the browser: {here:,.0f} tokens/s after {length}; "
            f"native onnxruntime on {torch.get_num_threads()} thread: {native:,.0f}, "
            f"{native / here:.1f} times that"
        )


# -----------------------------------------------------------------------------------------------------
# serve.py, without a browser


@pytest.fixture
def model_folder(tmp_path):
    """A folder whose files hold their names."""
    for name in "model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "secret.txt":
        (tmp_path / name).write_text(name)
    return tmp_path


def get(server, path, method="GET", host="127.0.0.1", **headers):
    """Returns the status, the body and the headers of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def test_the_server_gives_the_page_and_the_model(model_folder):
    with serving(model_folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        for path, content_type in (
            ("/", "text/html"),
            ("/app.js", "text/javascript"),
            ("/style.css", "text/css"),
            ("/model/model.onnx", "octet-stream"),
            ("/model/config.json", "json"),
            ("/app.js?x=1", "text/javascript"),
        ):
            status, body, headers = get(server, path)
            assert status == 200
            assert body
            assert content_type in headers["Content-Type"]
            assert "default-src 'self'" in headers["Content-Security-Policy"]
            assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    with serving(model_folder / "model_int8.onnx") as server:
        assert get(server, "/model/model.onnx")[1] == b"model_int8.onnx"


def test_the_server_gives_nothing_else(model_folder):
    with serving(model_folder) as server:
        for path in (
            "/package.json",
            "/node_modules/",
            "/model",
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
        ):
            status, body, _ = get(server, path)
            assert status in (301, 400, 404), path
            assert b"secret" not in body, path
            assert b"import" not in body, path
        assert get(server, "/", "POST")[0] == 501


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_the_server_answers_to_its_own_name_alone(model_folder, method, host, status):
    """A page of a stranger may let its name mean 127.0.0.1 (DNS rebinding); its Host tells."""
    with serving(model_folder) as server:
        assert get(server, "/model/model.onnx", method, host)[0] == status


def test_an_older_model_is_not_taken_for_the_one_before(model_folder):
    for path in model_folder.iterdir():
        os.utime(path, (0, 0))
    now = email.utils.formatdate(time.time(), usegmt=True)
    with serving(model_folder) as server:
        status, body, headers = get(server, "/model/model.onnx", **{"If-Modified-Since": now})
    assert status == 200
    assert body == b"model.onnx"
    assert headers["Cache-Control"] == "no-store"


def test_a_page_that_goes_leaves_no_traceback(model_folder, capfd):
    with open(model_folder / "model.onnx", "wb") as f:
        f.truncate(1 << 26)  # more than the sockets hold
    with serving(model_folder) as server:
        server.daemon_threads = False  # closing it waits for them
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(b"GET /model/model.onnx HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(100)
    assert capfd.readouterr().err == ""


@pytest.fixture
def without_npm(monkeypatch):
    """serve.main() does not ask whether onnxruntime-web is installed."""
    monkeypatch.setattr(serve, "FILES", ["index.html"])


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_that_was_asked_for_is_refused(model_folder, taken_port, without_npm):
    cfg = configure(serve.Config, [f"--model={model_folder}", f"--port={taken_port}"])
    with pytest.raises(Refusal, match=f"port {taken_port}.*--port=0"):
        serve.main(cfg)


def test_a_free_port_takes_the_place_of_a_taken_one(
    model_folder, taken_port, without_npm, monkeypatch, capsys
):
    monkeypatch.setattr(serve.ThreadingHTTPServer, "serve_forever", lambda self: self.server_close())
    cfg = configure(serve.Config, [f"--model={model_folder}"])
    cfg.port = taken_port
    serve.main(cfg)
    output = capsys.readouterr().out
    assert "http://127.0.0.1:" in output
    assert f":{taken_port} " not in output


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model=nowhere"], "export_onnx.py --out_dir=OUT --to=nowhere writes"),
        (["--model=x.onnx"], "--to=FOLDER writes"),
        (["--model=a/model_int8.onnx"], "--to=a --quantize=int8 writes"),
        (["--port=70000"], "port must be"),
        (["--prot=1"], "did you mean port?"),
    ],
)
def test_a_users_mistake_is_refused_with_advice(argv, message, without_npm):
    with pytest.raises(Refusal, match=message):
        call(serve, *argv)
