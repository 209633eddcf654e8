"""The three lenses: intervals, losses two ways, probes that need the context, marks and a real judge."""

import base64
import contextlib
import dataclasses
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
from random import Random
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from scripts import call
from test_model import build, tokens
from test_train import SMALL

import checkpoint
import checkpoint_file
import dataset
import eval as evaluation
import prepare
import score
import toy_stories
import train
from config import Refusal
from device import resolve
from interop.foreign_tokenizer import ForeignTokenizer
from lenses import judge, lengths, likelihood, page, probes, reading
from lenses.stats import bits, bootstrap, mean_interval, resampled, wilson
from lenses.verdict import compare, grade, verdict
from model import ModelConfig, Transformer
from score import completion_nats, context_lengths, document_nats, document_windows, position_nats
from tokenizer import Tokenizer

CPU = resolve("cpu", "float32", "false")
STORIES = toy_stories.texts(400, seed=77)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with out/a, which knows a little of data/toy, and out/b, of data/b: two tokenizers."""
    folder = tmp_path_factory.mktemp("lab")
    call(prepare, "--num_stories=600", "--num_proc=1", "--vocab_size=500", folder=folder)
    brief = ["--max_iters=20", "--eval_interval=20"]
    call(train, *SMALL, *brief, "--block_size=192", "--out_dir=out/a", folder=folder)
    write_stories(folder / "b.txt", toy_stories.texts(400, seed=3))
    argv = ["--dataset=b.txt", "--name=b", "--vocab_size=300", "--num_proc=1"]
    call(prepare, *argv, folder=folder)
    argv = ["--dataset=b", "--max_iters=1", "--block_size=64", "--out_dir=out/b"]
    call(train, *SMALL, *argv, folder=folder)
    return folder


def write_stories(path, stories):
    path.write_text("<|endoftext|>".join(stories), encoding="utf-8")


def evaluate(lab, *argv):
    few = ["--num_samples=1", "--max_new_tokens=40", "--num_cases=30", "--resamples=1000"]
    call(evaluation, "--device=cpu", "--dtype=float32", *few, *argv, folder=lab)


def figures(out):
    """Returns the figures in the last line that eval.py prints."""
    return json.loads(out.splitlines()[-1])


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
    z = 1.959964
    assert wilson(0, 10)[1] == pytest.approx(z**2 / (10 + z**2))


def test_the_bootstrap_of_a_mean_is_the_normal_interval_for_many_units():
    x = np.random.default_rng(0).normal(3, 2, 3000)
    low, high = mean_interval(x, resamples=4000)
    half = 1.96 * x.std() / len(x) ** 0.5
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


def test_the_bootstrap_covers_a_known_mean_95_times_in_a_hundred():
    """Of a ratio too: units of unequal size, sum of nats over sum of tokens, whose true value is 2."""
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        sizes = rng.integers(5, 50, 80)
        columns = np.column_stack([rng.gamma(2.0 * sizes), sizes])
        low, high = bootstrap(columns, lambda sums: sums[:, 0] / sums[:, 1], 1000, trial)
        if low <= 2 <= high:
            inside += 1
    # 0.95 and 3.5 standard errors; a percentile bootstrap is a little narrow
    assert 0.90 < inside / 300 < 0.985


def test_equal_seeds_resample_equal_units_so_that_differences_are_paired():
    a = np.random.default_rng(2).normal(size=(50, 1))
    both = np.hstack([a, a + 1])
    alone = resampled(a + 1, 1000, 5)
    assert np.allclose(resampled(both, 1000, 5)[:, 1], alone[:, 0], rtol=1e-12)
    interval = bootstrap(both, lambda sums: (sums[:, 1] - sums[:, 0]) / 50, 1000)
    assert interval == pytest.approx((1, 1))


# Lengths


def test_position_nats_are_those_of_each_token_after_its_window_and_scores_up_to_the_context():
    model = build()
    rows = np.stack([tokens(1, 81, seed=seed)[0].numpy() for seed in range(3)])
    nats = position_nats(model, rows, CPU, batch_size=2)
    for row, row_nats in zip(rows, nats):
        assert row_nats[:24].mean() == pytest.approx(score.evaluate(model, row[:25], 24, 1, CPU))
        for target in range(80):
            start = 12 * max(0, math.ceil((target + 1 - 24) / 12))
            with torch.no_grad():
                logits = model(torch.from_numpy(row[None, start : target + 1]))[0][0, -1]
            expected = -logits.log_softmax(-1)[row[target + 1]].item()
            assert row_nats[target] == pytest.approx(expected, rel=1e-5)


def test_a_rope_is_read_under_each_scaling_and_all_else_as_it_is():
    each = ["", "linear:8", "ntk:8", "yarn:8,128"]
    assert lengths.scalings_for(ModelConfig(), 1024, "") == each
    assert lengths.scalings_for(ModelConfig(), 1024, "linear:3") == ["", "linear:3"]
    trained = ModelConfig(rope_scaling="linear:2")
    assert lengths.scalings_for(trained, 1024, "") == [""]
    assert lengths.scalings_for(trained, 1024, "none") == ["", "none"]
    assert lengths.scalings_for(ModelConfig(pos="alibi"), 1024, "linear:3") == [""]


def test_windows_of_positions_cover_each_once():
    for context, length in (128, 1024), (192, 1536), (24, 100), (1, 8), (3, 7):
        edges = lengths.window_edges(context, length)
        assert edges[0] == 0 and edges[-1] == length
        assert (np.diff(edges) >= 1).all()
        assert (np.diff(edges) <= math.ceil(context / 4)).all()


@pytest.fixture(scope="module")
def long_lab(lab):
    """The lab with long.txt, one document, and untrained models of a context of 48."""
    text = " ".join(STORIES[:110])
    (lab / "long.txt").write_text(text, encoding="utf-8")
    _, _, tokenizer = dataset.load(lab / "data/toy")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 48}
    for pos in "rope", "alibi", "sinusoidal", "none", "learned":
        torch.manual_seed(1)
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, pos=pos, **sizes))
        for p in model.parameters():
            p.data *= 4
        path = str(lab / f"{pos}.pt")
        checkpoint_file.save(
            path, model, tokenizer, {"dataset": "toy"}, checkpoint_file.RunState(1, 2.0, 2.0)
        )
    return lab, tokenizer, tokenizer.encode(text)


def text_bits(model, rows, sizes, first, end):
    """Returns bits a byte of positions first .. end, by score.evaluate on the rows up to there."""
    nats = 0
    for n, sign in (end, 1), (first, -1):
        for row in rows if n else []:
            nats += sign * n * score.evaluate(model, row[: n + 1], n, 1, CPU)
    return nats / sizes[:, first:end].sum() / math.log(2)


@pytest.mark.slow
def test_lengths_figures_are_scores_own_and_each_stretched_models(long_lab, capsys):
    lab, tokenizer, ids = long_lab
    n = (len(ids) + 1 - 1) // 384
    rows = np.array([ids[i * 384 : (i + 1) * 384 + 1] for i in range(n)])
    sizes = np.array([len(token) for token in tokenizer.tokens])[rows[:, 1:]]
    names = "rope.pt,alibi.pt,sinusoidal.pt,none.pt"
    evaluate(lab, "--lengths", f"--out_dir={names}", "--text=long.txt", "--report_dir=far")
    out = capsys.readouterr().out
    results = figures(out)
    assert {way["n"] for way in results["ways"]} == {n}
    assert n > 20
    assert results["edges"] == list(range(0, 385, 12))
    ways = {way["name"]: way for way in results["ways"]}
    scalings = ["", "linear:8", "ntk:8", "yarn:8,48"]
    stretched = [f"rope.pt, {scaling}" for scaling in scalings[1:]]
    assert list(ways) == ["rope.pt", *stretched, "alibi.pt", "sinusoidal.pt", "none.pt"]

    for name, way in ways.items():
        own, tokenizer = checkpoint.open_checkpoint(str(lab / way["out_dir"])).restore()
        settings = {"block_size": 384, "rope_scaling": way["rope_scaling"]}
        model = Transformer(dataclasses.replace(own.config, **settings))
        model.load_state_dict(own.state_dict())
        shares = sizes.reshape(n, 32, 12).sum((0, 2))
        at_context = np.average(way["bits"][:4], weights=shares[:4])
        assert at_context == pytest.approx(text_bits(model, rows, sizes, 0, 48), rel=1e-5)
        assert way["bits"][20] == pytest.approx(text_bits(model, rows, sizes, 240, 252), rel=1e-3)
        assert way["all"] == pytest.approx(np.average(way["bits"], weights=shares), rel=1e-5)
        if name == way["out_dir"]:  # the model as it is
            assert at_context == pytest.approx(text_bits(own, rows, sizes, 0, 48), rel=1e-5)
            nats = position_nats(own, rows, CPU)
            assert way["restarted"] == pytest.approx(nats.sum() / sizes.sum() / math.log(2), rel=1e-5)
        assert f"{way['bits'][31]:.3f}" in out

    report = read_page(lab / "far/lengths.html")
    assert report.tags["svg"] == 1
    assert report.tags["tr"] == 1 + 32 + 2
    assert report.attributes.count(("stroke-dasharray", "7 4")) == 1


def test_lengths_leave_the_ends_of_documents_out_and_take_a_scaling(long_lab, capsys):
    lab, tokenizer, _ = long_lab
    argv = ["--lengths", "--out_dir=rope.pt", "--block_size=96", "--rope_scaling=yarn:2,48"]
    evaluate(lab, *argv, "--report_dir=ends")
    results = figures(capsys.readouterr().out)
    assert [way["name"] for way in results["ways"]] == ["rope.pt", "rope.pt, yarn:2,48"]
    _, data, _ = dataset.load(lab / "data/toy")
    ids = data["val"].astype(int)
    n = (len(ids) - 1) // 96
    rows = np.array([ids[i * 96 : (i + 1) * 96 + 1] for i in range(n)])
    is_text = rows[:, 1:] != tokenizer.eot
    assert 0.9 < is_text.mean() < 1
    sizes = np.array([len(token) for token in tokenizer.tokens])[rows[:, 1:]] * is_text
    ckpt = checkpoint.open_checkpoint(str(lab / "rope.pt"))
    ckpt.stretch("yarn:2,48", 96)
    nats = position_nats(ckpt.restore()[0], rows, CPU) * is_text
    assert results["ways"][1]["all"] == pytest.approx(nats.sum() / sizes.sum() / math.log(2), rel=1e-5)
    own, _ = checkpoint.open_checkpoint(str(lab / "rope.pt")).restore()
    nats = position_nats(own, rows, CPU) * is_text
    restarted = results["ways"][0]["restarted"]
    assert restarted == pytest.approx(nats.sum() / sizes.sum() / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lengths", "--out_dir=learned.pt"], "learned positions, a table of 48"),
        (["--lengths", "--out_dir=rope.pt,out/b"], "one context, and .* has 48, .* has 64"),
        (["--lengths", "--out_dir=rope.pt", "--block_size=48"], "past the context of 48"),
        (["--lengths", "--out_dir=rope.pt", "--rope_scaling=yarn:8"], "yarn:FACTOR,CONTEXT"),
        (["--lengths", "--out_dir=rope.pt", "--block_size=5000000"], "tokens, and 5,000,000 positions"),
        (["--out_dir=learned.pt", "--block_size=96"], "learned positions, a table of 48"),
        (["--out_dir=alibi.pt", "--rope_scaling=ntk:2"], "pos is alibi"),
    ],
)
def test_lengths_that_cannot_be_are_one_line(long_lab, argv, message):
    with pytest.raises(Refusal, match=message) as refusal:
        evaluate(long_lab[0], *argv, "--report_dir=refused")
    assert refusal.value.status == 2


def test_the_lenses_see_a_stretched_model(long_lab, capsys):
    lab, _, _ = long_lab
    evaluate(lab, "--out_dir=rope.pt", "--block_size=96", "--rope_scaling=linear:2", "--report_dir=s")
    results = figures(capsys.readouterr().out)["checkpoints"][0]
    assert results["block_size"] == 96
    ckpt = checkpoint.open_checkpoint(str(lab / "rope.pt"))
    ckpt.stretch("linear:2", 96)
    model, tokenizer = ckpt.restore()
    _, data, _ = dataset.load(lab / "data/toy")
    documents, _ = likelihood.split_documents(data["val"], tokenizer)
    nats = document_nats(model, tokenizer.encode_batch(documents), tokenizer, CPU)
    loss = np.concatenate([losses[:-1] for losses in nats]).mean()
    assert results["likelihood"]["loss"] == pytest.approx(loss, rel=1e-5)


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
    for document, losses in zip(documents, nats):
        text = [tokenizer.eot, *document, tokenizer.eot]
        for target, loss in enumerate(losses):
            start = 12 * max(0, math.ceil((target + 1 - 24) / 12))
            with torch.no_grad():
                logits = model(torch.tensor([text[start : target + 1]]))[0][0, -1]
            logp = logits.log_softmax(-1)
            assert loss == pytest.approx(-logp[text[target + 1]].item(), rel=1e-5)


def test_every_target_is_in_one_window_and_has_half_a_context_before_it():
    for T in 1, 2, 3, 24:
        for n in range(1, 100):
            windows = document_windows(n, T)
            counted = [target for _, first, end in windows for target in range(first, end)]
            assert counted == list(range(n))
            context = context_lengths(n, T)
            assert len(context) == n
            assert context.max() == min(n, T)
            assert (context[T:] >= T / 2).all()


def test_by_position_has_every_target_once():
    model = build()
    tokenizer = Tokenizer.train(["ab"], 257)
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (5, 24, 70)]
    nats = np.concatenate(document_nats(model, documents, tokenizer, CPU))
    context = np.concatenate([context_lengths(len(document) + 1, 24) for document in documents])
    bins = likelihood.by_position(nats, context)
    firsts, lasts, means, counts = (list(column) for column in zip(*bins))
    assert firsts == [1] + [last + 1 for last in lasts[:-1]]  # each position once
    assert lasts[-1] == 24
    assert sum(counts) == len(nats)
    assert np.dot(means, counts) == pytest.approx(nats.sum(), rel=1e-12)
    # the documents' first tokens
    assert means[0] == pytest.approx(nats[[0, 6, 31]].mean(), rel=1e-12)


def test_the_text_is_what_prepare_wrote_and_the_figures_are_of_its_bytes_alone(lab, capsys):
    meta, data, tokenizer = dataset.load(lab / "data/toy")
    documents, closed = likelihood.split_documents(data["val"], tokenizer)
    assert np.array_equal(stream(documents, closed, tokenizer), data["val"])
    model, _ = checkpoint_file.restore(checkpoint_file.load(str(lab / "out/a/ckpt_best.pt")), "a")
    nats = []
    ends = []
    gaps = []  # above the stories' entropy
    counts = Counter()
    for text in documents:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]])
        with torch.no_grad():
            losses = model(ids[:, :-1], ids[:, 1:], reduction="none")[1][0].double()
        nats += losses[:-1].tolist()
        ends.append(losses[-1].item())
        gaps.append(losses.sum().item() + toy_stories.log_prob(text))
        counts.update(tokenizer.encode(text))
    loss = np.mean(nats)
    evaluate(lab, "--out_dir=out/a")
    results = figures(capsys.readouterr().out)["checkpoints"][0]["likelihood"]
    split = meta["splits"]["val"]
    bits_per_byte = sum(nats) / split["bytes"] / math.log(2)
    assert results["loss"] == pytest.approx(loss, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    assert results["end"] == pytest.approx(np.mean(ends), rel=1e-5)
    assert results["bytes"] == split["bytes"]
    assert results["units"] == split["documents"]
    assert results["tokens"] == split["tokens"] - split["documents"]
    assert results["loss_low"] < loss < results["loss_high"]
    low_share = results["bits_low"] / results["bits_per_byte"]
    assert low_share == pytest.approx(results["loss_low"] / loss, rel=0.02)
    assert results["stories"] == len(gaps) == split["documents"]
    assert results["above_floor"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert results["above_floor_error"] == pytest.approx(np.std(gaps) / len(gaps) ** 0.5, rel=1e-4)
    unigram = -sum(n * math.log(n / counts.total()) for n in counts.values()) / counts.total()
    assert results["unigram"] == pytest.approx(unigram)
    assert results["explained"] == pytest.approx(1 - loss / unigram, abs=1e-5)


@pytest.mark.parametrize("few", [False, True])
def test_another_tokenizer_has_the_same_units_and_bytes(few):
    documents = [text + " ünïts" for text in STORIES[:50]]
    sizes = []
    for tokenizer in (
        Tokenizer.train(documents, 300),
        Tokenizer.train(documents, 600),
        Tokenizer.char(documents),
    ):
        unit, lengths = likelihood.units(tokenizer.encode_batch(documents), tokenizer, few)
        sizes.append(np.bincount(unit, lengths))
    if few:  # slices of the text stand for documents, and end with a token
        first, *_ = sizes
        assert abs(first[:-1] - likelihood.SLICE).max() < 20
        assert {len(s) for s in sizes} == {len(first)}
        assert {s.sum() for s in sizes} == {first.sum()}
    else:
        for s in sizes:
            assert s.tolist() == [len(document.encode()) for document in documents]


def test_a_token_across_the_end_of_a_slice_makes_no_slice_more():
    """Of 1,004 bytes the last word begins before byte 1,000; it is one token, or seven characters."""
    document = "a " * 498 + " zebras"
    for tokenizer in (
        Tokenizer.train([document, "zebras zebras zebras zebras"], 300),
        Tokenizer.char([document]),
    ):
        unit, _ = likelihood.units([tokenizer.encode(document)], tokenizer, True)
        assert unit[-1] == 1


def test_a_slice_has_its_last_byte():
    tokenizer = Tokenizer.char(["ab"])
    unit, _ = likelihood.units([tokenizer.encode("ab" * likelihood.SLICE)], tokenizer, True)
    assert np.bincount(unit).tolist() == [likelihood.SLICE] * 2


def test_the_loss_on_the_training_text_is_that_of_documents_evenly_spaced(monkeypatch):
    model = build()
    tokenizer = Tokenizer.train(["ab"], 257)
    documents = [(1 + tokens(1, 2 + n, seed=n)[0] % 60).tolist() for n in range(30)]
    ids = np.concatenate([[*document, tokenizer.eot] for document in documents])
    subject = SimpleNamespace(model=model, tokenizer=tokenizer, training=(ids, tokenizer))
    for room, every in (10**6, 1), (len(ids) // 3, 3):
        monkeypatch.setattr(likelihood, "TRAINING_TOKENS", room)
        nats = document_nats(model, documents[::every], tokenizer, CPU)
        expected = np.concatenate([document[:-1] for document in nats]).mean()
        assert likelihood.training_loss(subject, CPU) == pytest.approx(expected, rel=1e-5)


def test_bits_a_byte_of_sums():
    """100 nats over 60 tokens of 50 bytes: 2 nats a byte."""
    assert bits(np.array([[100, 60, 50.0]]))[0] == pytest.approx(2 / math.log(2))


# Probes

TOY = probes.toy_probes(STORIES, 60, 0)
STORY = probes.story_probes(STORIES, 150, 0)


def test_no_question_is_asked_twice():
    for probe in TOY + STORY + probes.story_probes(STORIES, 1000, 1):
        questions = {(case.context, *case.candidates) for case in probe.cases}
        assert len(questions) == len(probe.cases)
        for case in probe.cases:
            assert not re.search(r"The (\w+?)(e?s)? near the \1", case.context)


@pytest.mark.parametrize("probe", TOY + STORY, ids=lambda p: p.name)
def test_no_scorer_that_ignores_the_context_is_above_chance(probe):
    """The best of them picks one answer, the most often right, of the same candidates."""
    right = Counter((frozenset(case.candidates), case.candidates[0]) for case in probe.cases)
    best = Counter()
    for (candidates, _), n in right.items():
        best[candidates] = max(best[candidates], n)
    assert sum(best.values()) / len(probe.cases) == pytest.approx(probe.chance)
    assert len(probe.cases) >= 40
    for case in probe.cases:
        assert len(set(case.candidates)) == len(case.candidates)
        assert case.context == case.context.rstrip()


def grammar(pairs):
    """Returns the nats of a scorer that only knows what the grammar can write."""
    texts = [context + completion for context, completion in pairs]
    return [0.0 if toy_stories.possible(text) else math.inf for text in texts]


def test_the_start_of_a_story_is_possible_and_more_than_a_story_is_not():
    assert toy_stories.possible(STORIES[0])
    assert toy_stories.possible(STORIES[0][:40])
    assert not toy_stories.possible(STORIES[0] + " x")


@pytest.mark.parametrize("probe", TOY, ids=lambda p: p.name)
def test_a_scorer_that_knows_the_grammar_is_always_right(probe):
    result = probes.ask(probe, grammar)
    assert result["accuracy"] == 1
    assert result["n"] == len(probe.cases)
    assert not result["wrong"]
    tied = probes.ask(probe, lambda pairs: [0.0] * len(pairs))
    assert tied["accuracy"] == 0  # a tie is no answer


def test_probes_are_drawn_by_their_seed():
    assert probes.toy_probes(STORIES, 60, 0) == TOY
    assert probes.toy_probes(STORIES, 60, 1) != TOY


class Memory(torch.nn.Module):
    """A model that knows documents by heart: after up to 60 tokens of one, it is sure of the next."""

    def __init__(self, documents, tokenizer):
        super().__init__()
        self.config = ModelConfig(vocab_size=tokenizer.vocab_size, block_size=256)
        self.next_id = {}
        for ids in tokenizer.encode_batch(documents):
            ids = [tokenizer.eot, *ids]
            for i in range(1, len(ids)):
                self.next_id[tuple(ids[max(0, i - 60) : i])] = ids[i]

    def hidden(self, idx):
        predicted = torch.zeros_like(idx)
        for row, ids in enumerate(idx.tolist()):
            for i in range(len(ids)):
                predicted[row, i] = self.next_id.get(tuple(ids[max(0, i - 59) : i + 1]), 0)
        return torch.nn.functional.one_hot(predicted, self.config.vocab_size).float()

    def logits(self, x):
        return 20 * x


def test_a_model_that_has_learned_documents_by_heart_fills_their_gaps_and_random_weights_guess():
    tokenizer = Tokenizer.train(STORIES, 500)
    cloze = probes.cloze(STORIES, 100, 0)

    def answers(model, probe):
        return probes.ask(probe, lambda pairs: completion_nats(model, tokenizer, pairs, CPU))

    assert answers(Memory(STORIES, tokenizer), cloze)["accuracy"] == 1
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2)
    model = Transformer(config).eval()
    for probe in [*TOY, *STORY[1:]]:
        result = answers(model, probe)
        assert result["low"] <= result["chance"] <= result["high"], result


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_completions_are_scored_as_one_by_one(kind):
    tokenizer = Tokenizer.train(STORIES, 300) if kind == "bpe" else Tokenizer.char(STORIES)
    model = build(vocab_size=tokenizer.vocab_size)  # a context of 24 tokens: most of these are cut
    pairs = [(text[:40], " so happy.") for text in STORIES[:5]]
    pairs += [(STORIES[0], " x"), ("", " He"), ("a", " b")]
    computed = completion_nats(model, tokenizer, pairs, CPU)
    for (context, completion), nats in zip(pairs, computed):
        start = [] if kind == "char" and context else [tokenizer.eot]
        new = tokenizer.encode(completion)
        ids = [*start, *tokenizer.encode(context), *new][-25:]
        with torch.no_grad():
            logp = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        logp_of_new = [logp[i - 1, ids[i]].item() for i in range(len(ids) - len(new), len(ids))]
        assert nats == pytest.approx(-sum(logp_of_new), rel=1e-4)


def test_the_interval_of_a_skill_draws_the_cases_of_each_probe_apart():
    """Of two probes whose mean would be 0 in each draw where the same cases were drawn of both."""
    skill = np.random.default_rng(0).normal(size=400)
    low, high = probes.skill_interval([skill, -skill], 4000, 0)
    half = 1.96 * skill.std() / math.sqrt(2 * 400)
    assert (low, high) == (pytest.approx(-half, rel=0.1), pytest.approx(half, rel=0.1))


def test_each_word_of_a_set_is_right_equally_often_though_stories_have_one_less_often():
    cases = probes.word_cases(STORIES[:40], [("was", "were")], 60, Random(0))
    counts = Counter(case.candidates[0] for case in cases)
    assert 0 < counts[" was"] == counts[" were"] < 30


def test_no_wrong_answer_of_a_cloze_is_allowed_after_its_context():
    def allowed(context, completion):
        return (len(context) + 2 * len(completion)) % 7 == 0

    cases = probes.cloze(STORIES, 60, 0, allowed).cases
    assert len(cases) >= 25
    assert not any(allowed(case.context, wrong) for case in cases for wrong in case.candidates[1:])


def test_a_case_that_a_character_model_cannot_spell_is_left_out():
    tokenizer = Tokenizer.char(["".join(STORIES)])  # no "-", no digits; but all toy words
    askable = probes.askable(TOY + STORY, [tokenizer])
    assert [len(probe.cases) for probe in askable[: len(TOY)]] == [len(probe.cases) for probe in TOY]
    assert probes.askable(TOY + STORY, [Tokenizer.char(["ab c"])]) == []


# Reading

GOOD = 'Tom had a dog. "Where is it?" asked Sam.\nIt ran away!'


def test_marks_by_hand():
    perfect = {"ends": 1, "whole": 1, "quotes": 1, "fresh": 1, "loops": 1, "known": 1}
    assert reading.marks(GOOD, True) == perfect
    assert reading.marks(GOOD, False) == perfect | {"ends": 0}
    # three sentences: 'asked Sam.' belongs to the question
    assert reading.marks(GOOD[:-1], True) == perfect | {"ends": 0, "whole": 2 / 3}
    assert reading.marks("Tom ran. he fell. He cried.", True) == perfect | {"whole": 2 / 3}
    assert reading.marks('Tom said, "No. Sam left.', True) == perfect | {"quotes": 0}
    assert reading.marks("“Yes,” he said. “No.", True) == perfect | {"quotes": 0}
    assert reading.marks("He said:\n“Yes.”", True) == perfect
    # 7 four-word phrases, of which abcd and bcde come again
    assert reading.marks("A b c d e. A b c d e.", True) == perfect | {"fresh": 1 - 2 / 7}
    # a loop is a phrase three times in a row; "no." is not "no"
    assert reading.marks("He ran and ran and ran and fell.", True)["loops"] == 0
    assert reading.marks("He ran and ran and fell.", True)["loops"] == 1
    assert reading.marks("No no no.", True)["loops"] == 1
    assert reading.marks("No no no no.", True)["loops"] == 0
    assert reading.marks("Tom glorped the dog.", True, {"glorped"}) == perfect | {"known": 3 / 4}
    assert "known" not in reading.marks(GOOD, True, None)
    assert "ends" not in reading.marks(GOOD, None)
    assert reading.marks(GOOD, None) | {"ends": 1} == perfect
    assert set(reading.marks(" \n", True).values()) == {0.0}
    assert reading.marks(STORIES[0], True, toy=True)["grammar"] == 1
    assert reading.marks(STORIES[0][:-1], True, toy=True)["grammar"] == 0


def test_distinct_pairs_by_hand():
    assert reading.distinct(["a b a b", "a c"]) == 3 / 5  # ab ba ab ba ac
    assert reading.distinct([]) == 0


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("size", [64, 1 << 18])
def test_the_copied_share_and_made_up_words_are_found(size, has_bos, monkeypatch):
    tokenizer = Tokenizer.train(STORIES, 400)
    if not has_bos:  # as of GPT-2, SmolLM2 and Qwen
        files = {"tokenizer.json": tokenizer.tokenizer_json()}
        tokenizer = ForeignTokenizer(files, tokenizer.eot, None)
    ids = stream(STORIES[:100], True, tokenizer).astype(np.uint16)
    pieces = reading.pieces
    monkeypatch.setattr(reading, "pieces", lambda ids, tokenizer: pieces(ids, tokenizer, size))
    fresh = " ".join(f"word{i}" for i in range(40))
    half = " ".join(STORIES[3].split()[5:25]) + " " + fresh[:200]
    share = pytest.approx(20 / len(half.split()))
    short = " ".join(STORIES[3].split()[:11])
    across = " ".join(STORIES[5].split()[-6:] + STORIES[6].split()[:6])  # an end and the next beginning
    texts = [STORIES[0], STORIES[99], fresh, half, short, across, ""]
    copied, made_up = reading.against_training(texts, ids, tokenizer)
    assert copied.tolist() == [1, 1, 0, share, 0, 0, 0]
    assert "word" in made_up
    assert made_up.isdisjoint(reading.WORD.findall(STORIES[0].lower()))


# The judge

RAW = b"\x00\xff not json"


class Whole(bytes):
    """An answer from its status line on, not the body alone."""


class Judge(http.server.BaseHTTPRequestHandler):
    """Gives server.answers in turn, the last for ever: a text, a body of bytes, a Whole, a status, or
    seconds to hang. The reason that it gives is the key, in colour.
    """

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, float):
            time.sleep(answer)
        elif isinstance(answer, int):
            self.reply(answer, b"no")
        elif isinstance(answer, Whole):
            self.wfile.write(answer)
        elif isinstance(answer, bytes):
            self.reply(200, answer)
        else:
            self.reply(200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

    def reply(self, status, body):
        self.send_response(status, f"{self.headers['Authorization']} \x1b[31m")
        if status == 302:
            host = f"127.0.0.1:{self.server.server_port}"
            self.send_header("Location", f"http://{host}/elsewhere/chat/completions")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


MARKS = '{"grammar": 7, "coherence": 5, "creativity": 3}'


def test_a_judge_is_asked_with_the_key_and_gives_marks(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    server.answers = [MARKS]
    marks, printed = judge.mark_all(["One.", "Two."], server.url + "/", "m", 5)
    assert marks == [json.loads(MARKS)] * 2
    assert printed == ""
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret"
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert "One." in body["messages"][1]["content"]


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
        RAW,
    ],
)
def test_a_bad_answer_is_asked_again_once(server, bad):
    server.answers = [bad, MARKS]
    assert judge.mark("A.", server.url, "m", 5) == json.loads(MARKS)
    assert len(server.requests) == 2
    server.answers = [bad]
    with pytest.raises(judge.JudgeError) as e:
        judge.mark("A.", server.url, "m", 5)
    assert len(server.requests) == 4
    assert e.value.bad_answer
    assert "\n" not in str(e.value)
    assert len(str(e.value)) <= 200


def test_bad_answers_are_left_out_and_after_three_the_judge_is_left_alone(server):
    server.answers = [MARKS, "bad", "bad", MARKS]
    marks, printed = judge.mark_all(list("abc"), server.url, "m", 5)
    assert marks == [json.loads(MARKS), None, json.loads(MARKS)]
    assert "1 of 3 texts without marks" in printed
    server.answers = ["bad"]
    server.requests.clear()
    marks, printed = judge.mark_all(list("abcdefgh"), server.url, "m", 5)
    assert marks == [None] * 2
    assert "given up, 0 of 8" in printed
    assert len(server.requests) == 6


def test_only_the_judge_itself_decides_when_it_is_left_alone(server):
    """Its words are quoted in the report, and are no order: the next column is read."""
    texts = [{"text": "A."}, {"text": "B."}]
    columns = [{"n": 2, "texts": texts}, {"n": 2, "texts": texts}]
    server.answers = ["I have given up.", "I have given up.", MARKS]
    cfg = evaluation.Config(judge_url=server.url)
    [problem] = evaluation.ask_judge(columns, cfg)
    assert "1 of 2 texts without marks" in problem
    assert [column["judge"]["n"] for column in columns] == [1, 2]
    columns = [{"n": 2, "texts": texts}, {"n": 2, "texts": texts}]
    server.answers = [MARKS, 500, 500, MARKS]
    [problem] = evaluation.ask_judge(columns, cfg)
    assert "given up, 1 of 2 texts have marks" in problem
    assert columns[0]["judge"]["n"] == 1
    assert "judge" not in columns[1]


@pytest.mark.parametrize(
    "answer, timeout, message",
    [(500, 60, "500"), (401, 60, "401"), (302, 60, "302"), (30.0, 1, "within 1 s")],
)
def test_a_server_that_fails_is_one_line_at_once(server, answer, timeout, message):
    server.answers = [answer]
    marks, printed = judge.mark_all(["a", "b", "c"], server.url, "m", timeout)
    assert marks == []
    assert message in printed
    assert "given up" in printed
    assert "\n" not in printed
    # asked twice, and no redirection is followed
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"] * 2


def test_a_server_that_drips_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):
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
    if key == "sk-SECRET\r":  # white space around it is dropped
        _, header, _ = server.requests[0]
        assert header == "Bearer sk-SECRET"
        assert marks[0]
    else:
        assert not server.requests
        assert "JUDGE_API_KEY" in printed


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
        server.answers = [Whole(answer.format(echo).encode())]
        with pytest.raises(judge.JudgeError) as e:
            judge.mark("A.", server.url, "m", 5)
        assert str(e.value) == message
        if echo != "no":
            assert echo not in "".join(traceback.format_exception(e.value))
    _, header, _ = server.requests[0]
    assert header == AUTHORIZATION


def test_without_a_key_an_answer_is_shown_but_not_its_control_characters(server):
    server.answers = ["Well,\x1b[2J\r\n\x07 I \u202elike it \x9b1m"]
    with pytest.raises(judge.JudgeError) as e:
        judge.mark("A.", server.url, "m", 5)
    message = str(e.value)
    assert "Well," in message
    assert "like it" in message
    assert message.isprintable()
    server.answers = ['{"grammar\x1b[2J": 7}']
    _, printed = judge.mark_all(["A."], server.url, "m", 5)
    assert "not the" in printed
    assert printed.isprintable()


def test_a_password_in_the_address_is_not_shown(server):
    marks, printed = judge.mark_all(["A."], server.url.replace("//", "//me:hunter2@"), "m", 5)
    assert marks == []
    assert "JUDGE_API_KEY" in printed
    assert "hunter2" not in printed
    assert not server.requests


def test_without_a_server_there_are_no_marks():
    marks, printed = judge.mark_all(["a"], "http://127.0.0.1:9/v1", "m", 1)
    assert marks == []
    assert "cannot be asked" in printed


# The verdict


def verdict_of(*levels):
    """Returns the verdict on the levels of likelihood, probes and reading."""
    lenses = "likelihood", "probes", "reading"
    return verdict({lens: (level, "") for lens, level in zip(lenses, levels)})


def test_the_verdict_names_the_lens_that_differs():
    agree, printed = verdict_of("good", "good", "good")
    assert agree
    assert "trust it" in printed
    agree, printed = verdict_of("poor", "poor", "poor")
    assert agree
    assert "more training" in printed
    for levels, lens in (
        (("good", "fair", "good"), "probes"),
        (("good", "good", "poor"), "reading"),
        (("poor", "fair", "fair"), "likelihood"),
        (("good", "poor", "poor"), "likelihood"),
        (("good", "fair", "poor"), "reading"),
        (("poor", "fair", "good"), "likelihood"),
    ):
        agree, printed = verdict_of(*levels)
        assert not agree
        assert f"Look at {lens} first" in printed, printed
        assert re.search(r"\w\.$", printed), printed


def test_levels_of_each_lens_and_of_a_copier():
    result = {
        "likelihood": {"explained": 0.6},
        "probes": {"skill": 0.3, "probes": [1]},
        "reading": {"score": 0.9, "copied": 0.3},
    }

    def levels(score, copied):
        unseen = {"score": score, "copied": copied, "n": 48}
        return {lens: level for lens, (level, _) in grade(result, unseen).items()}

    assert levels(0.91, copied=0.2) == {"likelihood": "good", "probes": "fair", "reading": "good"}
    assert levels(0.91, copied=0.1)["reading"] == "poor"
    result["likelihood"] = {"explained": 0.9, "floor": 25.0, "above_floor": 10.0}
    result["probes"] = {"probes": []}
    assert levels(0.95, copied=0.3) == {"likelihood": "poor", "reading": "fair"}


def test_rankings_agree_or_contradict():
    def results(name, nats, right, score):
        rng = np.random.default_rng(1)
        answers = (rng.random(100) < right).tolist()
        figures = {
            "out_dir": name,
            "likelihood": {"bits_per_byte": nats},
            "probes": {
                "skill": 2 * np.mean(answers) - 1,
                "probes": [{"right": answers, "chance": 0.5}],
            },
            "reading": {"score": score, "copied": 0, "texts": [{"marks": {"a": score}}] * 20},
        }
        columns = np.column_stack([nats + rng.normal(0, 0.01, 50), np.ones((50, 2))])
        return figures, columns

    def ranking(*models):
        all_figures, all_columns = zip(*models)
        return compare(list(all_figures), list(all_columns), {}, 1000, 0)

    a = results("a", 1.0, 0.9, 0.9)
    b = results("b", 2.0, 0.5, 0.5)
    c = results("c", 1.0, 0.9, 0.2)
    agree, printed, lines = ranking(a, b)
    assert agree
    assert "trust" in printed
    assert lines == ["likelihood: a > b", "probes: a > b", "reading: a > b"]
    agree, printed, lines = ranking(b, c)
    assert not agree
    assert "reading prefers b" in printed
    assert lines == ["likelihood: c > b", "probes: c > b", "reading: b > c"]
    b[0]["reading"]["copied"] = 0.9
    agree, _, _ = ranking(b, c)
    assert agree  # a copier's reading is no argument
    _, _, lines = ranking(a, a)
    assert lines == ["likelihood: a = a", "probes: a = a", "reading: a = a"]


# Whole evaluations


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page whose tags must match."""

    def __init__(self, text):
        super().__init__()
        self.tags = Counter()
        self.attributes = []
        self.open = []
        self.text = ""
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
    """Returns the Page of a report, which must be one file without scripts and links."""
    text = path.read_text(encoding="utf-8")
    shown = Page(text)
    assert not shown.open
    assert not shown.tags["script"]
    names = {name for name, _ in shown.attributes}
    assert names.isdisjoint(["src", "href", "srcset", "onclick", "onload"])
    for link in "http:", "https:", "@import", "url(":
        assert link not in text
    return shown


def test_several_checkpoints_with_different_tokenizers_are_compared(lab, capsys):
    evaluate(lab, "--out_dir=out/a,out/b", "--max_new_tokens=200")
    out = capsys.readouterr().out
    assert "3 Reading" in out
    assert "real, unseen" in out
    results = figures(out)
    a, b = results["checkpoints"]
    assert a["out_dir"] == "out/a"
    assert b["vocab_size"] == 300
    assert a["likelihood"]["bytes"] == b["likelihood"]["bytes"]
    assert a["likelihood"]["tokens"] < b["likelihood"]["tokens"]
    assert a["likelihood"]["bits_per_byte"] < b["likelihood"]["bits_per_byte"]
    assert "likelihood: out/a > out/b" in results["ranking"]
    notes = "\n".join(results["notes"])
    assert "tokenizers differ" in notes
    assert "trained on data/b" in notes
    names = [probe["name"] for probe in a["probes"]["probes"]]
    assert names == ["cloze", "names", "pronouns", "number", "moral"]
    assert {p["n"] for p in a["probes"]["probes"]} == {p["n"] for p in b["probes"]["probes"]}
    assert results["reference"]["training"]["copied"] == 1
    assert results["reference"]["unseen"]["marks"]["grammar"] == 1
    report = read_page(lab / "out/compare/report.html")
    assert report.tags["svg"] == 1
    assert report.tags["path"] >= 2
    assert report.text.count("out/b · ") == 8
    # its own report may be replaced, and all is seeded
    evaluate(lab, "--out_dir=out/a,out/b", "--max_new_tokens=200")
    assert figures(capsys.readouterr().out) == results


@pytest.mark.slow
def test_the_order_of_models_with_different_tokenizers_changes_nothing(lab, capsys):
    """Texts are cut at as many bytes, not at as many tokens of the first."""
    write_stories(lab / "stories.txt", STORIES)
    argv = ["--text=stories.txt", "--max_new_tokens=150", "--num_samples=12", "--report_dir=order"]
    ends = []
    for order in "out/a,out/b", "out/b,out/a":
        evaluate(lab, f"--out_dir={order}", *argv)
        results = figures(capsys.readouterr().out)
        ends.append(results["reference"]["unseen"]["marks"]["ends"])
    assert 0.2 < ends[0] < 0.9
    assert ends[0] == pytest.approx(ends[1], abs=0.1)
    likelihoods = [ckpt["likelihood"] for ckpt in results["checkpoints"]]
    bytes_a_token = [likelihood["bytes"] / likelihood["tokens"] for likelihood in likelihoods]
    assert max(bytes_a_token) > 1.2 * min(bytes_a_token)


def test_text_from_outside_is_escaped_and_a_file_can_be_evaluated(lab, server, capsys):
    markup = "<script>alert(1)</script> & <b onclick=x>Tom & Lily</b>"
    stories = [
        f"Dog{i} {markup} said the dog. He ran to the big red house. She ran to the old {word}."
        for i, word in enumerate(["<i>", "barn", "tree", "hill", "pond"] * 8)
    ]
    write_stories(lab / "markup.txt", stories)
    server.answers = [MARKS]
    argv = ["--report_dir=markup", f"--judge_url={server.url}", "--judge_timeout=5"]
    evaluate(lab, "--out_dir=out/a", "--text=markup.txt", *argv)
    results = figures(capsys.readouterr().out)
    [ckpt] = results["checkpoints"]
    assert results["text"] == "markup.txt"
    assert ckpt["likelihood"]["units"] == 40
    assert "floor" not in ckpt["likelihood"]
    marks = {"grammar": 7, "coherence": 5, "creativity": 3, "n": 8}
    assert ckpt["reading"]["judge"] == marks
    assert results["reference"]["unseen"]["judge"] == marks
    report = read_page(lab / "markup/report.html")
    assert "<script>alert(1)</script>" in report.text
    assert "judge: grammar" in report.text
    text = {
        "prompt": "<script>",
        "text": "<script>x</script>",
        "ended": True,
        "marks": {"ends": 0},
        "copied": None,
    }
    lens = {"texts": [text], "made_up": ["script"]}
    card = page.card(lens, 0, "<script>", {"reference": {"unseen": {}}})
    assert Page(card).tags["script"] == 0


def test_without_the_data_a_text_is_enough_and_without_both_it_is_refused(
    lab, tmp_path, server, capsys, monkeypatch
):
    (tmp_path / "out").symlink_to(lab / "out")
    # one document, whose slices stand for documents
    (tmp_path / "t.txt").write_text("\n\n".join(STORIES[:8]), encoding="utf-8")
    with pytest.raises(Refusal, match="--text=FILE"):
        evaluate(tmp_path, "--out_dir=out/a")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    server.answers = [500]  # whose reason is the key
    argv = ["--text=t.txt", "--report_dir=r", f"--judge_url={server.url}"]
    evaluate(tmp_path, "--out_dir=out/a/ckpt_best.pt", *argv)
    out = capsys.readouterr().out
    assert "judge: the server says 500 Internal Server Error; given up" in out
    _, header, _ = server.requests[0]
    assert header == AUTHORIZATION
    report = (tmp_path / "r/report.html").read_text(encoding="utf-8")
    for text in out, report:
        assert KEY not in text
        assert "\x1b" not in text
    results = figures(out)
    [ckpt] = results["checkpoints"]
    assert "slices" in ckpt["likelihood"]["unit"]
    assert "training_loss" not in ckpt["likelihood"]
    assert "copied" not in ckpt["reading"]
    assert "known" not in ckpt["reading"]["marks"]
    assert "training" not in results["reference"]
    assert any("data/toy" in note for note in results["notes"])
    read_page(tmp_path / "r/report.html")


def test_a_page_that_is_no_report_is_left_alone(lab):
    path = lab / "foreign/report.html"
    path.parent.mkdir()
    path.write_text("<p>somebody's page")
    with pytest.raises(Refusal, match="not written by eval.py"):
        evaluate(lab, "--out_dir=out/a", "--report_dir=foreign")
    assert path.read_text() == "<p>somebody's page"


def test_an_interrupted_evaluation_leaves_no_folder_behind(lab, monkeypatch):
    """But those that were there before it, empty or not."""

    def interrupted(*_):
        assert (lab / "mine/new/r").is_dir()
        raise KeyboardInterrupt

    (lab / "mine").mkdir()
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lab, "--out_dir=out/a", "--report_dir=mine/new/r")
    assert list((lab / "mine").iterdir()) == []
