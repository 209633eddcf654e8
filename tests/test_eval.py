"""The three lenses: intervals by closed forms, losses two ways, probes that only the context answers, rules by hand, a real judge server."""

import base64
import contextlib
import html.parser
import http.server
import json
import math
import re
import socket
import threading
import time
import traceback
from collections import Counter
from urllib.parse import quote

import numpy as np
import pytest
import torch
from test_model import build, tokens
from test_train import SMALL

import checkpoint
import eval as evaluation
import prepare
import score
import toy_stories
import train
from config import Refusal, configure
from device import resolve
from lenses import judge, page, probes, reading
from lenses.stats import bits, bootstrap, mean_interval, resampled, wilson
from lenses.verdict import compare, grade, verdict
from model import ModelConfig, Transformer
from score import completion_nats, context_lengths, document_nats, document_windows
from tokenizer import Tokenizer

CPU = resolve("cpu", "float32", "false")
TOLD = [text for text, _ in toy_stories.stories(400, seed=77)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with data/toy, another dataset with another tokenizer, and two checkpoints: out/a knows a little, out/b of the other data nothing."""
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.chdir(folder):
        prepare.prepare(
            configure(prepare.Config, ["--num_stories=600", "--num_proc=1", "--vocab_size=500"])
        )
        train.main(
            configure(
                train.Config,
                [*SMALL, "--max_iters=20", "--eval_interval=20", "--block_size=192", "--out_dir=out/a"],
            )
        )
        with open("b.txt", "w", encoding="utf-8") as f:
            f.write("<|endoftext|>".join(text for text, _ in toy_stories.stories(400, seed=3)))
        prepare.prepare(
            configure(
                prepare.Config, ["--dataset=b.txt", "--name=b", "--vocab_size=300", "--num_proc=1"]
            )
        )
        train.main(
            configure(
                train.Config,
                [*SMALL, "--dataset=b", "--max_iters=1", "--block_size=64", "--out_dir=out/b"],
            )
        )
    return folder


def evaluate(lab, *argv):
    with contextlib.chdir(lab):
        evaluation.main(
            configure(
                evaluation.Config,
                [
                    "--device=cpu",
                    "--dtype=float32",
                    "--num_samples=1",
                    "--max_new_tokens=40",
                    "--num_cases=30",
                    "--resamples=1000",
                    *argv,
                ],
            )
        )


# Intervals


def test_wilson_by_hand():
    """Newcombe 1998, table I, method 3; and the closed form at 0."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
        assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert wilson(0, 10)[1] == pytest.approx(1.959964**2 / (10 + 1.959964**2))


def test_the_bootstrap_of_a_mean_is_the_normal_interval_for_many_units():
    x = np.random.default_rng(0).normal(3, 2, 3000)
    low, high = mean_interval(x, resamples=4000)
    half = 1.96 * x.std() / len(x) ** 0.5
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


def test_the_bootstrap_covers_a_known_mean_95_times_in_a_hundred():
    """Of a ratio too: units of unequal size, sum of nats over sum of tokens, whose true value is 2."""
    rng, inside, trials = np.random.default_rng(1), 0, 300
    for trial in range(trials):
        size = rng.integers(5, 50, 80)
        columns = np.column_stack([rng.gamma(2.0 * size), size])
        low, high = bootstrap(columns, lambda s: s[:, 0] / s[:, 1], 1000, trial)
        inside += low <= 2 <= high
    assert (
        0.90 < inside / trials < 0.985
    )  # 0.95 and 3.5 standard errors; a percentile bootstrap is a little narrow


def test_equal_seeds_resample_equal_units_so_that_differences_are_paired():
    a = np.random.default_rng(2).normal(size=(50, 1))
    assert np.allclose(
        resampled(np.hstack([a, a + 1]), 1000, 5)[:, 1], resampled(a + 1, 1000, 5)[:, 0], rtol=1e-12
    )
    low, high = bootstrap(np.hstack([a, a + 1]), lambda s: (s[:, 1] - s[:, 0]) / 50, 1000)
    assert low == pytest.approx(1) and high == pytest.approx(1)


# Likelihood


def stream(documents, closed, tokenizer):
    """Returns the ids of documents as prepare.py has them, with end-of-text between documents.

    There is one after the last document too if closed.
    """
    ids = []
    for document in tokenizer.encode_batch(documents):
        ids += [*tokenizer.head, *document, tokenizer.eot]
    if not closed:
        del ids[-1:]
    return np.array(ids)


def test_document_nats_are_those_of_each_token_after_its_window():
    """Documents shorter than the context of 24, as long, and longer: then the last half of a window goes on."""
    model = build()
    tokenizer = Tokenizer.train(["ab"], 257)
    documents = [(tokens(1, n, seed=n)[0] % 60 + 1).tolist() for n in (1, 22, 23, 24, 25, 36, 80)]
    nats = document_nats(model, documents, tokenizer, CPU, batch_size=3)
    for ids, losses in zip(documents, nats):
        text = [tokenizer.eot, *ids, tokenizer.eot]
        for target, loss in enumerate(losses):
            start = 12 * max(0, math.ceil((target + 1 - 24) / 12))
            with torch.no_grad():
                logits = model(torch.tensor([text[start : target + 1]]))[0][0, -1]
            assert loss == pytest.approx(-logits.log_softmax(-1)[text[target + 1]].item(), rel=1e-5)


def test_every_target_is_in_one_window_and_has_half_a_context_before_it():
    for T in 1, 2, 3, 24:
        for n in range(1, 100):
            windows = document_windows(n, T)
            counted = [target for _, first, end in windows for target in range(first, end)]
            assert counted == list(range(n))
            context = context_lengths(n, T)
            assert len(context) == n and context.max() == min(n, T)
            assert (context[T:] >= T / 2).all()


def test_by_position_has_every_target_once():
    model = build()
    tokenizer = Tokenizer.train(["ab"], 257)
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (5, 24, 70)]
    nats = np.concatenate(document_nats(model, documents, tokenizer, CPU))
    context = np.concatenate([context_lengths(len(ids) + 1, 24) for ids in documents])
    bins = evaluation.by_position(nats, context)
    assert sum(n for *_, n in bins) == len(nats)
    assert sum(mean * n for *_, mean, n in bins) == pytest.approx(nats.sum(), rel=1e-12)
    assert [first for first, *_ in bins] + [25] == [1] + [last + 1 for _, last, *_ in bins]
    assert bins[0][2] == pytest.approx(nats[[0, 6, 31]].mean(), rel=1e-12)  # the documents' first tokens


def test_the_text_is_what_prepare_wrote_and_the_figures_are_of_its_bytes_alone(lab, capsys):
    with contextlib.chdir(lab):
        meta, data, tokenizer = prepare.load("data/toy")
        documents, closed = evaluation.split_documents(data["val"], tokenizer)
        assert np.array_equal(stream(documents, closed, tokenizer), data["val"])
        model, _ = checkpoint.restore(checkpoint.load("out/a/ckpt_best.pt"), "a")
    nats = []
    ends = []
    for text in documents:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]])
        with torch.no_grad():
            losses = model(ids[:, :-1], ids[:, 1:], reduction="none")[1][0].double()
        nats += losses[:-1].tolist()
        ends.append(losses[-1].item())
    loss = np.mean(nats)
    evaluate(lab, "--out_dir=out/a")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"][0]["likelihood"]
    made = meta["splits"]["val"]
    assert results["loss"] == pytest.approx(loss, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(sum(nats) / made["bytes"] / math.log(2), rel=1e-5)
    assert results["end"] == pytest.approx(np.mean(ends), rel=1e-5)
    assert results["bytes"] == made["bytes"] and results["units"] == made["documents"]
    assert results["tokens"] == made["tokens"] - made["documents"]
    assert results["loss_low"] < loss < results["loss_high"]
    low = results["bits_low"] / results["bits_per_byte"]
    assert low == pytest.approx(results["loss_low"] / loss, rel=0.02)
    assert results["above_floor"] > 0 and results["stories"] == min(500, made["documents"])


@pytest.mark.parametrize("few", [False, True])
def test_another_tokenizer_has_the_same_units_and_bytes(few):
    documents = [text + " ünïts" for text in TOLD[:50]]
    sums = []
    for tokenizer in (
        Tokenizer.train(documents, 300),
        Tokenizer.train(documents, 600),
        Tokenizer.char(documents),
    ):
        unit, lengths = evaluation.units(tokenizer.encode_batch(documents), tokenizer, few)
        sums.append(np.bincount(unit, lengths))
    if few:
        assert (
            len({len(s) for s in sums}) == 1
            and sums[0].sum() == sums[1].sum() == sums[2].sum()
            and abs(sums[0][:-1] - evaluation.SLICE).max() < 20
        )
    else:
        assert all(np.array_equal(s, [len(d.encode()) for d in documents]) for s in sums)


def test_a_token_across_the_end_of_a_slice_makes_no_slice_more():
    """1,004 bytes that end in a word: one token of it begins before byte 1,000, seven characters of it lie on both sides."""
    document, counts = "a " * 498 + " zebras", []
    for tokenizer in (
        Tokenizer.train([document, "zebras zebras zebras zebras"], 300),
        Tokenizer.char([document]),
    ):
        counts.append(evaluation.units([tokenizer.encode(document)], tokenizer, True)[0][-1])
    assert counts == [1, 1]


def test_bits_a_byte_of_sums():
    """100 nats over 60 tokens of 50 bytes: 2 nats a byte."""
    assert bits(np.array([[100, 60, 50.0]]))[0] == pytest.approx(2 / math.log(2))


# Probes

TOY = probes.toy_probes(TOLD, 60, 0)
STORY = probes.story_probes(TOLD, 150, 0)


def test_no_question_is_asked_twice():
    for some in TOY, STORY, probes.story_probes(TOLD, 1000, 1):
        for probe in some:
            assert len({(case.context, *case.candidates) for case in probe.cases}) == len(probe.cases)
            assert not any(
                re.search(r"The (\w+?)(e?s)? near the \1", case.context) for case in probe.cases
            )


@pytest.mark.parametrize("probe", TOY + STORY, ids=lambda p: p.name)
def test_no_scorer_that_ignores_the_context_is_above_chance(probe):
    """The best of them picks the same answer whenever it is offered the same ones."""
    right = Counter((frozenset(case.candidates), case.candidates[0]) for case in probe.cases)
    best = Counter()
    for (offered, _), n in right.items():
        best[offered] = max(best[offered], n)
    assert sum(best.values()) / len(probe.cases) == pytest.approx(probe.chance)
    assert all(
        len(set(case.candidates)) == len(case.candidates) and case.context == case.context.rstrip()
        for case in probe.cases
    )
    assert len(probe.cases) >= 40


def grammar(pairs):
    return [
        0.0 if toy_stories.possible(context + completion) else math.inf for context, completion in pairs
    ]


def test_what_goes_on_after_the_end_of_a_story_is_not_possible():
    assert (
        toy_stories.possible(TOLD[0])
        and toy_stories.possible(TOLD[0][:40])
        and not toy_stories.possible(TOLD[0] + " x")
    )


@pytest.mark.parametrize("probe", TOY, ids=lambda p: p.name)
def test_who_knows_the_grammar_is_always_right(probe):
    result = probes.ask(probe, grammar)
    assert result["accuracy"] == 1 and result["n"] == len(probe.cases) and not result["wrong"]
    assert probes.ask(probe, lambda pairs: [0.0] * len(pairs))["accuracy"] == 0  # a tie is no answer


def test_probes_are_the_same_each_time():
    assert probes.toy_probes(TOLD, 60, 0) == TOY and probes.toy_probes(TOLD, 60, 1) != TOY


class Memory(torch.nn.Module):
    """A model that knows a few documents by heart: after up to sixty tokens it has seen there, the next one for sure."""

    def __init__(self, documents, tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.next = (
            ModelConfig(vocab_size=tokenizer.vocab_size, block_size=256),
            tokenizer,
            {},
        )
        for ids in tokenizer.encode_batch(documents):
            ids = [tokenizer.eot, *ids]
            self.next |= {tuple(ids[max(0, i - 60) : i]): ids[i] for i in range(1, len(ids))}

    def hidden(self, idx):
        known = [
            [self.next.get(tuple(row[max(0, i - 59) : i + 1]), 0) for i in range(len(row))]
            for row in idx.tolist()
        ]
        return torch.nn.functional.one_hot(torch.tensor(known), self.tokenizer.vocab_size).float()

    def head(self, x):
        return 20 * x


def test_a_model_that_has_learned_documents_by_heart_fills_their_gaps_and_random_weights_guess():
    tokenizer = Tokenizer.train(TOLD, 500)
    cloze = probes.cloze(TOLD, 100, 0)

    def asked(model):
        return lambda pairs: completion_nats(model, tokenizer, pairs, CPU)

    assert probes.ask(cloze, asked(Memory(TOLD, tokenizer)))["accuracy"] == 1
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2)
    ).eval()
    for probe in [*TOY, *STORY[1:]]:
        result = probes.ask(probe, asked(model))
        assert result["low"] <= result["chance"] <= result["high"], result


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_completions_are_scored_as_one_by_one(kind):
    tokenizer = Tokenizer.train(TOLD, 300) if kind == "bpe" else Tokenizer.char(TOLD)
    model = build(vocab_size=tokenizer.vocab_size)  # a context of 24 tokens: most of these are cut
    pairs = [(text[:40], " so happy.") for text in TOLD[:5]] + [
        (TOLD[0], " x"),
        ("", " He"),
        ("a", " b"),
    ]
    computed = completion_nats(model, tokenizer, pairs, CPU)
    for (context, completion), nats in zip(pairs, computed):
        start = [] if kind == "char" and context else [tokenizer.eot]
        ids, new = (
            [*start, *tokenizer.encode(context), *tokenizer.encode(completion)][-25:],
            len(tokenizer.encode(completion)),
        )
        with torch.no_grad():
            logp = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        assert nats == pytest.approx(
            -sum(logp[i - 1, ids[i]].item() for i in range(len(ids) - new, len(ids))), rel=1e-4
        )


def test_what_a_character_model_cannot_spell_is_not_asked():
    tokenizer = Tokenizer.char(
        ["".join(c for text in TOLD for c in text)]
    )  # no "-", no digits; but toy words
    remaining = probes.askable(TOY + STORY, [tokenizer])
    assert [len(p.cases) for p in remaining[: len(TOY)]] == [len(p.cases) for p in TOY]
    assert probes.askable(TOY + STORY, [Tokenizer.char(["ab c"])]) == []


# Reading

GOOD = 'Tom had a dog. "Where is it?" asked Sam.\nIt ran away!'


def test_rules_by_hand():
    perfect = {"ends": 1, "whole": 1, "quotes": 1, "fresh": 1, "loops": 1, "known": 1}
    assert reading.marks(GOOD, True) == perfect
    assert reading.marks(GOOD, False) == perfect | {"ends": 0}
    assert reading.marks(GOOD[:-1], True) == perfect | {
        "ends": 0,
        "whole": 2 / 3,
    }  # three sentences: 'asked Sam.' belongs to the question
    assert reading.marks("Tom ran. he fell. He cried.", True) == perfect | {"whole": 2 / 3}
    assert reading.marks('Tom said, "No. Sam left.', True) == perfect | {"quotes": 0}
    assert reading.marks("“Yes,” he said. “No.", True) == perfect | {"quotes": 0}
    assert reading.marks("He said:\n“Yes.”", True) == perfect
    assert reading.marks("A b c d e. A b c d e.", True) == perfect | {
        "fresh": 1 - 2 / 7
    }  # 7 four-word phrases, of which abcd and bcde. come again
    assert (
        reading.marks("He ran and ran and ran and fell.", True)["loops"] == 0
    )  # "ran and", three times
    assert reading.marks("He ran and ran and fell.", True)["loops"] == 1
    assert (
        reading.marks("No no no.", True)["loops"] == 1
        and reading.marks("No no no no.", True)["loops"] == 0
    )  # "no." is not "no"
    assert reading.marks("Tom glorped the dog.", True, {"glorped"}) == perfect | {"known": 3 / 4}
    assert "known" not in reading.marks(GOOD, True, None) and reading.marks(GOOD, None) == {
        key: 1 for key in perfect if key != "ends"
    }
    assert set(reading.marks(" \n", True).values()) == {0.0}
    assert (
        reading.marks(TOLD[0], True, toy=True)["grammar"] == 1
        and reading.marks(TOLD[0][:-1], True, toy=True)["grammar"] == 0
    )


def test_distinct_pairs_by_hand():
    assert reading.distinct(["a b a b", "a c"]) == 3 / 5  # ab ba ab ba ac
    assert reading.distinct([]) == 0


@pytest.mark.parametrize("size", [64, 1 << 18])
def test_what_is_copied_and_what_is_made_up(size, monkeypatch):
    tokenizer = Tokenizer.train(TOLD, 400)
    ids = stream(TOLD[:100], True, tokenizer).astype(np.uint16)
    whole = reading.pieces
    monkeypatch.setattr(reading, "pieces", lambda ids, tokenizer: whole(ids, tokenizer, size))
    fresh = " ".join(f"word{i}" for i in range(40))
    half = " ".join(TOLD[3].split()[5:25]) + " " + fresh[:200]
    short = " ".join(TOLD[3].split()[:11])
    across = " ".join(
        TOLD[5].split()[-6:] + TOLD[6].split()[:6]
    )  # the end of one document and the beginning of the next
    copied, made_up = reading.against_training(
        [TOLD[0], TOLD[99], fresh, half, short, across, ""], ids, tokenizer
    )
    assert copied.tolist() == [1, 1, 0, pytest.approx(20 / len(half.split())), 0, 0, 0]
    assert "word" in made_up and not made_up & set(reading.WORD.findall(TOLD[0].lower()))


# The judge


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers as server.answers say, one after the other and the last for ever: text, a status, seconds to hang, or bytes."""

    def do_POST(self):
        self.server.asked.append(
            (
                self.path,
                self.headers.get("Authorization"),
                json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
            )
        )
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if isinstance(answer, float):
            time.sleep(answer)
            return
        if isinstance(answer, bytes):
            self.wfile.write(answer)
            return
        status, body = (
            (answer, b"no")
            if isinstance(answer, int)
            else (200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())
        )
        if answer == "RAW":
            body = b"\x00\xff not json"
        self.send_response(status, f"{self.headers['Authorization']} \x1b[31m")
        if status == 302:
            self.send_header(
                "Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere/chat/completions"
            )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as it:
        it.asked, it.url = [], f"http://127.0.0.1:{it.server_port}/v1"
        threading.Thread(target=it.serve_forever, args=(0.02,), daemon=True).start()
        yield it
        it.shutdown()


MARKS = '{"grammar": 7, "coherence": 5, "creativity": 3}'


def test_a_good_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    server.answers = [MARKS]
    assert judge.mark_all(["One.", "Two."], server.url + "/", "m", 5) == ([json.loads(MARKS)] * 2, "")
    path, key, body = server.asked[0]
    assert (
        path == "/v1/chat/completions"
        and key == "Bearer secret"
        and body["model"] == "m"
        and body["temperature"] == 0
        and "One." in body["messages"][1]["content"]
    )


@pytest.mark.parametrize(
    "bad",
    [
        "I like it",
        "{}",
        "[7, 5, 3]",
        MARKS.replace("7", "11"),
        MARKS.replace("7", "0"),
        MARKS.replace("7", "7.0"),
        MARKS.replace("7", "true"),
        MARKS.replace("7", '"7"'),
        MARKS[:-1] + ', "x": 1}',
        f"```json\n{MARKS}\n```",
        "[" * 5000,
        "RAW",
    ],
)
def test_a_bad_answer_is_asked_again_once(server, bad):
    server.answers = [bad, MARKS]
    assert judge.mark("A.", server.url, "m", 5) == json.loads(MARKS) and len(server.asked) == 2
    server.answers = [bad]
    with pytest.raises(judge.JudgeError) as e:
        judge.mark("A.", server.url, "m", 5)
    assert (
        len(server.asked) == 4
        and e.value.bad_answer
        and "\n" not in str(e.value)
        and len(str(e.value)) <= 200
    )


def test_bad_answers_are_left_out_and_after_three_the_judge_is_left_alone(server):
    server.answers = [MARKS, "bad", "bad", MARKS]
    marks, printed = judge.mark_all(list("abc"), server.url, "m", 5)
    assert [m is not None for m in marks] == [
        True,
        False,
        True,
    ] and "1 of 3 texts without marks" in printed
    server.answers, server.asked[:] = ["bad"], []
    marks, printed = judge.mark_all(list("abcdefgh"), server.url, "m", 5)
    assert marks == [None] * 8 and len(server.asked) == 6 and "given up, 0 of 8" in printed


@pytest.mark.parametrize(
    "answer, says", [(500, "500"), (401, "401"), (302, "302"), (2.0, "within 0.2 s")]
)
def test_a_server_that_fails_is_one_line_at_once(server, answer, says):
    server.answers = [answer]
    marks, printed = judge.mark_all(["a", "b", "c"], server.url, "m", 0.2)
    assert marks == [None] * 3 and says in printed and "given up" in printed and "\n" not in printed
    assert len(server.asked) == 2 and all(
        path.startswith("/v1") for path, *_ in server.asked
    )  # not redirected either


def test_a_server_that_drips_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            with listening.accept()[0] as client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(100):
                    client.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(TimeoutError):
            judge.post(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", {}, 0.3)


@pytest.mark.parametrize("key", ["sk-SECRET\r", "sk-SEC\nRET", "sk-SECRÉT"])
def test_a_key_is_never_shown(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    server.answers = [MARKS]
    marks, printed = judge.mark_all(["a"], server.url, "m", 5)
    assert "SEC" not in printed
    if key.strip().isascii() and "\n" not in key:
        assert server.asked[0][1] == "Bearer sk-SECRET" and marks[0]
    else:
        assert not server.asked and "JUDGE_API_KEY" in printed


KEY = "sk-Qv7+/aZ3-longer"
AUTHORIZATION = f"Bearer {KEY}"
# whole, cut short, and in other writings
ECHOES = [
    AUTHORIZATION,
    AUTHORIZATION[:12],
    KEY[-9:],
    quote(KEY, safe=""),
    base64.b64encode(AUTHORIZATION.encode()).decode(),
    "".join(f"\\u{ord(c):04x}" for c in KEY),
    KEY.encode().hex(),
    KEY[::-1],
]
ANSWERS = {  # where a server may put them, and what the message says
    "reason": ("HTTP/1.1 401 bad key {}\r\n\r\n", "the server says 401 Unauthorized"),
    "unknown status": ("HTTP/1.1 799 {}\r\n\r\n", "the server says 799"),
    "redirect": (
        "HTTP/1.1 302 {0}\r\nLocation: http://127.0.0.1:9/{0}\r\n\r\n",
        "the server says 302 Found",
    ),
    "status line": ("{} is none\r\n", "cannot be asked (BadStatusLine)"),
    "status": ("HTTP/1.1 {} is none\r\n", "cannot be asked (BadStatusLine)"),
    "chunk": (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        "cannot be asked (IncompleteRead)",
    ),
    "text": ("HTTP/1.1 200 OK\r\n\r\nbad key {}", "an answer that is not the JSON asked for"),
    "JSON": ('HTTP/1.1 200 OK\r\n\r\n{{"error": "{}"}}', "an answer that is not the JSON asked for"),
    "marks": (
        'HTTP/1.1 200 OK\r\n\r\n{{"choices": [{{"message": {{"content": "{{\\"{}\\": 7}}"}}}}]}}',
        "marks that are not the integers from 1 to 10 asked for",
    ),
}


@pytest.mark.parametrize("place", ANSWERS)
def test_a_key_that_comes_back_is_not_shown(server, monkeypatch, place):
    """A message is the same one whatever the server sends, so that nothing of that is in it."""
    answer, message = ANSWERS[place]
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    for echo in [*ECHOES, "no"]:
        server.answers = [answer.format(echo).encode()]
        with pytest.raises(judge.JudgeError) as e:
            judge.mark("A.", server.url, "m", 5)
        assert str(e.value) == message
        assert echo == "no" or echo not in "".join(traceback.format_exception(e.value))
    assert server.asked[0][1] == AUTHORIZATION


def test_without_a_key_an_answer_is_shown_but_not_its_control_characters(server):
    server.answers = ["Well,\x1b[2J\r\n\x07 I \u202elike it \x9b1m"]
    with pytest.raises(judge.JudgeError) as e:
        judge.mark("A.", server.url, "m", 5)
    assert "Well," in str(e.value) and "like it" in str(e.value) and str(e.value).isprintable()
    server.answers = ['{"grammar\x1b[2J": 7}']
    _, message = judge.mark_all(["A."], server.url, "m", 5)
    assert "not the" in message and message.isprintable()


def test_a_password_in_the_address_is_not_shown(server):
    marks, message = judge.mark_all(["A."], server.url.replace("//", "//me:hunter2@"), "m", 5)
    assert marks == [None] and "JUDGE_API_KEY" in message and "hunter2" not in message
    assert not server.asked


def test_no_server_at_all():
    marks, printed = judge.mark_all(["a"], "http://127.0.0.1:9/v1", "m", 1)
    assert marks == [None] and "cannot be asked" in printed


# The verdict


def graded(likelihood, probes_, reading_):
    return {"likelihood": (likelihood, ""), "probes": (probes_, ""), "reading": (reading_, "")}


def test_the_verdict_names_the_lens_that_differs():
    assert (
        verdict(graded("good", "good", "good"))[0]
        and "trust it" in verdict(graded("good", "good", "good"))[1]
    )
    assert (
        verdict(graded("poor", "poor", "poor"))[0]
        and "more training" in verdict(graded("poor", "poor", "poor"))[1]
    )
    for levels, odd in (
        (("good", "fair", "good"), "probes"),
        (("good", "good", "poor"), "reading"),
        (("poor", "fair", "fair"), "likelihood"),
        (("good", "poor", "poor"), "likelihood"),
        (("good", "fair", "poor"), "reading"),
        (("poor", "fair", "good"), "likelihood"),
    ):
        agree, printed = verdict(graded(*levels))
        assert not agree and f"Look at {odd} first" in printed, printed


def test_levels_and_what_is_copied():
    result = {
        "likelihood": {"explained": 0.6},
        "probes": {"skill": 0.3, "probes": [1]},
        "reading": {"score": 0.9, "copied": 0.3},
    }
    assert [
        results for results, _ in grade(result, {"score": 0.91, "copied": 0.2, "n": 48}).values()
    ] == [
        "good",
        "fair",
        "good",
    ]
    assert grade(result, {"score": 0.91, "copied": 0.1, "n": 48})["reading"][0] == "poor"
    result["likelihood"] = {"explained": 0.9, "floor": 25.0, "above_floor": 10.0}
    result["probes"] = {"probes": []}
    assert [
        (lens, results)
        for lens, (results, _) in grade(result, {"score": 0.95, "copied": 0.3, "n": 48}).items()
    ] == [("likelihood", "poor"), ("reading", "fair")]


def test_rankings_agree_or_contradict():
    def made(name, nats, right, score):
        rng = np.random.default_rng(1)
        answers = [{"right": (rng.random(100) < right).tolist(), "chance": 0.5}]
        return (
            {
                "out_dir": name,
                "likelihood": {"bits_per_byte": nats},
                "probes": {"skill": 2 * np.mean(answers[0]["right"]) - 1, "probes": answers},
                "reading": {"score": score, "copied": 0, "texts": [{"marks": {"a": score}}] * 20},
            },
            np.column_stack([nats + rng.normal(0, 0.01, 50), np.ones((50, 2))]),
        )

    (a, x), (b, y), (c, z) = made("a", 1.0, 0.9, 0.9), made("b", 2.0, 0.5, 0.5), made("c", 1.0, 0.9, 0.2)
    agree, printed, lines = compare([a, b], [x, y], {}, 1000, 0)
    assert (
        agree
        and "trust" in printed
        and lines == ["likelihood: a > b", "probes: a > b", "reading: a > b"]
    )
    agree, printed, lines = compare([b, c], [y, z], {}, 1000, 0)
    assert (
        not agree
        and lines == ["likelihood: c > b", "probes: c > b", "reading: b > c"]
        and "reading prefers b" in printed
    )
    b["reading"]["copied"] = 0.9
    assert compare([b, c], [y, z], {}, 1000, 0)[0]  # a copier's reading is no argument
    assert compare([a, a], [x, x], {}, 1000, 0)[2] == [
        "likelihood: a = a",
        "probes: a = a",
        "reading: a = a",
    ]


# Whole evaluations


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = Counter(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "br", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text += data


def read_page(path):
    text = path.read_text(encoding="utf-8")
    shown = Page(text)
    assert (
        not shown.open
        and not shown.tags["script"]
        and not {"src", "href", "srcset", "onclick", "onload"} & {name for name, _ in shown.attributes}
    )
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    return shown


def test_several_checkpoints_with_different_tokenizers(lab, capsys):
    evaluate(lab, "--out_dir=out/a,out/b", "--max_new_tokens=200")
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])
    a, b = results["checkpoints"]
    assert (
        a["out_dir"] == "out/a"
        and b["vocab_size"] == 300
        and a["likelihood"]["bytes"] == b["likelihood"]["bytes"]
        and a["likelihood"]["tokens"] < b["likelihood"]["tokens"]
    )
    assert (
        a["likelihood"]["bits_per_byte"] < b["likelihood"]["bits_per_byte"]
        and "likelihood: out/a > out/b" in results["ranking"]
    )
    assert any("tokenizers differ" in note for note in results["notes"]) and any(
        "trained on data/b" in note for note in results["notes"]
    )
    assert [p["name"] for p in a["probes"]["probes"]] == [
        "cloze",
        "names",
        "pronouns",
        "number",
        "moral",
    ]
    assert {p["n"] for p in a["probes"]["probes"]} == {p["n"] for p in b["probes"]["probes"]}
    assert (
        "3 Reading" in out
        and "real, unseen" in out
        and results["reference"]["training"]["copied"] == 1
        and results["reference"]["unseen"]["marks"]["grammar"] == 1
    )
    shown = read_page(lab / "out/compare/report.html")
    assert shown.tags["svg"] == 1 and shown.tags["path"] >= 2 and shown.text.count("out/b · ") == 8
    evaluate(lab, "--out_dir=out/a,out/b", "--max_new_tokens=200")  # its own report may be replaced
    assert (
        json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    )  # and everything is as before: all is seeded


def test_the_order_of_models_with_different_tokenizers_changes_nothing(lab, capsys):
    """Texts are cut at as many bytes, not at as many tokens of the first."""
    (lab / "told.txt").write_text("<|endoftext|>".join(TOLD), encoding="utf-8")
    unseen, sizes = [], []
    for order in "out/a,out/b", "out/b,out/a":
        evaluate(
            lab,
            f"--out_dir={order}",
            "--text=told.txt",
            "--max_new_tokens=150",
            "--num_samples=12",
            "--report_dir=order",
        )
        results = json.loads(capsys.readouterr().out.splitlines()[-1])
        unseen.append(results["reference"]["unseen"])
        sizes += [c["likelihood"]["bytes"] / c["likelihood"]["tokens"] for c in results["checkpoints"]]
    assert 0.2 < unseen[0]["marks"]["ends"] < 0.9 and max(sizes) > 1.2 * min(sizes)
    assert unseen[0]["marks"]["ends"] == pytest.approx(unseen[1]["marks"]["ends"], abs=0.1)


def test_text_from_outside_is_escaped_and_a_file_can_be_evaluated(lab, server, capsys):
    evil = "<script>alert(1)</script> & <b onclick=x>Tom & Lily</b>"
    (lab / "evil.txt").write_text(
        "<|endoftext|>".join(
            f"Dog{i} {evil} said the dog. He ran to the big red house. She ran to the old {word}."
            for i, word in enumerate(["<i>", "barn", "tree", "hill", "pond"] * 8)
        ),
        encoding="utf-8",
    )
    server.answers = [MARKS]
    evaluate(
        lab,
        "--out_dir=out/a",
        "--text=evil.txt",
        "--report_dir=evil",
        f"--judge_url={server.url}",
        "--judge_timeout=5",
    )
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])
    assert (
        results["text"] == "evil.txt"
        and results["checkpoints"][0]["likelihood"]["units"] == 40
        and "floor" not in results["checkpoints"][0]["likelihood"]
    )
    assert (
        results["checkpoints"][0]["reading"]["judge"]
        == {"grammar": 7, "coherence": 5, "creativity": 3, "n": 8}
        == results["reference"]["unseen"]["judge"]
    )
    shown = read_page(lab / "evil/report.html")
    assert "<script>alert(1)</script>" in shown.text and "judge: grammar" in shown.text
    text = {
        "prompt": "<script>",
        "text": "<script>x</script>",
        "ended": True,
        "marks": {"ends": 0},
        "copied": None,
    }
    assert (
        Page(
            page.card(
                {"texts": [text], "made_up": ["script"]}, 0, "<script>", {"reference": {"unseen": {}}}
            )
        ).tags["script"]
        == 0
    )


def test_without_the_data_a_text_is_enough_and_without_both_it_is_refused(
    lab, tmp_path, server, capsys, monkeypatch
):
    (tmp_path / "out").symlink_to(lab / "out")
    (tmp_path / "t.txt").write_text(
        "\n\n".join(TOLD[:8]), encoding="utf-8"
    )  # one document: its paragraphs stand for documents
    with pytest.raises(Refusal, match="--text=FILE"):
        evaluate(tmp_path, "--out_dir=out/a")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    server.answers = [500]  # whose reason is the key
    evaluate(
        tmp_path,
        "--out_dir=out/a/ckpt_best.pt",
        "--text=t.txt",
        "--report_dir=r",
        f"--judge_url={server.url}",
    )
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])
    one = results["checkpoints"][0]
    assert (
        "slices" in one["likelihood"]["unit"]
        and "training_loss" not in one["likelihood"]
        and "copied" not in one["reading"]
        and "known" not in one["reading"]["marks"]
    )
    assert (
        "training" not in results["reference"]
        and any("data/toy" in note for note in results["notes"])
        and "judge: the server says 500 Internal Server Error; given up" in out
    )
    assert server.asked[0][1] == AUTHORIZATION and KEY not in out and "\x1b" not in out
    page_text = (tmp_path / "r/report.html").read_text(encoding="utf-8")
    assert KEY not in page_text and "\x1b" not in page_text
    read_page(tmp_path / "r/report.html")


def test_a_page_that_is_no_report_is_left_alone(lab):
    (lab / "mine").mkdir()
    (lab / "mine/report.html").write_text("<p>mine")
    with pytest.raises(Refusal, match="not written by eval.py"):
        evaluate(lab, "--out_dir=out/a", "--report_dir=mine")
    assert (lab / "mine/report.html").read_text() == "<p>mine"
