"""Speculation writes the text of the plain loop, whatever the draft guesses: to the id, or by chi-square."""

import copy
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from scripts import call, printed, written
from test_model import V, build, prompts_of
from test_windows import windowed

import bench
import benches.decode as bench_decode
import benches.step as bench_step
import checkpoint
import checkpoint_file
import drafts
import quantize
import quantized
import sample
from config import Refusal, configure
from device import resolve
from drafts import MOST_IN_RING, DraftModel, Lookup
from generate import Row, generate, next_token
from model import ModelConfig, Transformer
from speculate import LEAST_ROUNDS, TRIAL, Draws, Speculation
from tokenizer import Tokenizer

slow = pytest.mark.slow


def disturbed(model, size=0.05, **changes):
    """Returns a draft that often agrees with a model: its weights, a little off."""
    c = ModelConfig(**(vars(model.config) | changes))
    draft = Transformer(c).to(model.wte.weight.dtype).eval()
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in draft.parameters():
            p += size * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return draft


def untried(draft, n_guesses=4):
    """Returns a Speculation that guesses from the first token on, without a trial."""
    return Speculation(draft, n_guesses, clock=None)


def ended(steps):
    """Returns what is known of each row at its end; checks that the new ids of all steps are its ids."""
    news = None
    for rows in steps:
        news = news or [[] for _ in rows]
        for row, ids in zip(rows, news):
            if row.new is not None:
                ids.append(row.new)
    assert news == [row.ids for row in rows]
    return [(row.ids, row.end, row.stop) for row in rows]


class Memory(Lookup):
    """A draft that knows the texts, and guesses each place right or wrong as it is told."""

    def __init__(self, texts, is_right):
        self.right_texts = texts
        self.is_right = is_right

    def look_up(self, number, row, n):
        ids = self.right_texts[number][len(row.ids) :][:n]
        start = len(row.ids)
        return [id if self.is_right(number, start + i) else (id + 1) % V for i, id in enumerate(ids)]


# Greedy


@pytest.mark.parametrize(
    "pos, n_guesses",
    [
        ("rope", 4),
        pytest.param("rope", 1, marks=slow),
        pytest.param("rope", 7, marks=slow),
        pytest.param("learned", 4, marks=slow),
        pytest.param("alibi", 4, marks=slow),
    ],
)
def test_greedy_text_is_the_plain_loops(pos, n_guesses):
    """Of rows that accept different numbers, to the end of the context and past it."""
    model = build(pos=pos, n_kv_head=2).double()
    prompts = prompts_of(1, 7, 4, 12, 24)
    for rules in {}, {"repetition_penalty": 1.3}, {"past_end": "recompute"}:
        settings = dict(max_new_tokens=40, temperature=0) | rules
        expected = ended(generate(model, prompts, **settings))
        stop = [expected[1][0][3], expected[3][0][5]]
        stopped = ended(generate(model, prompts, stop=stop, **settings))
        assert "stop" in {end for _, end, _ in stopped}
        for draft in DraftModel(disturbed(model)), DraftModel(model), Lookup():
            speculation = untried(draft, n_guesses)
            assert ended(speculation.generate(model, prompts, **settings)) == expected
            assert ended(speculation.generate(model, prompts, stop=stop, **settings)) == stopped
            assert speculation.n_guessed
            if isinstance(draft, DraftModel):
                share = speculation.n_right / speculation.n_guessed
                assert share == 1 if draft.model is model else 0.1 < share < 0.95


def test_any_right_and_wrong_guesses_leave_the_text_as_it_is():
    """Rows of which one's guesses are all right, one's all wrong, and two others' now and then."""
    model = build(n_kv_head=2).double()
    prompts = prompts_of(3, 3, 3, 3)
    expected = ended(generate(model, prompts, 20, temperature=0))
    texts = [ids for ids, _, _ in expected]
    for pattern in itertools.product((True, False), repeat=3):
        rules = [
            lambda i: True,
            lambda i: False,
            lambda i: pattern[i % 3],
            lambda i: pattern[-1 - i % 3],
        ]
        speculation = untried(Memory(texts, lambda row, i: rules[row](i)), 3)
        assert ended(speculation.generate(model, prompts, 20, temperature=0)) == expected
    # and a stop among right guesses is the end
    for place in range(1, 6):
        stop = [texts[0][place]]
        expected = ended(generate(model, prompts, 20, temperature=0, stop=stop))
        speculation = untried(Memory(texts, lambda row, i: True), 5)
        assert ended(speculation.generate(model, prompts, 20, temperature=0, stop=stop)) == expected


def test_tokens_a_call_are_those_of_calls_with_guesses():
    model = build().double()
    prompts = prompts_of(3)
    [(ids, _, _)] = ended(generate(model, prompts, 20, temperature=0))
    sizes = []
    model.blocks[0].register_forward_hook(lambda _, arguments, y: sizes.append(arguments[0].size(1)))
    speculation = untried(Memory([ids], lambda row, i: i % 5 > 0), 3)
    ended(speculation.generate(model, prompts, 20, temperature=0))
    n_alone = 1 + sizes[1:].count(1)  # tokens, the first one among them
    n_calls = len(sizes) - n_alone
    assert n_calls > 3 and 0 < speculation.share_right < 1
    assert speculation.tokens_a_call == pytest.approx((20 - n_alone) / n_calls)


def test_a_row_that_ends_soon_makes_all_guess_less_until_then():
    """And is padding afterwards, for which the caches have room."""
    model = build().double()
    prompts = prompts_of(23, 2, 22)
    expected = ended(generate(model, prompts, 30, temperature=0))
    assert [len(ids) for ids, _, _ in expected] == [2, 23, 3]
    for draft in DraftModel(disturbed(model)), DraftModel(model):
        speculation = untried(draft, 20)
        assert ended(speculation.generate(model, prompts, 30, temperature=0)) == expected
        assert speculation.n_right


@pytest.mark.parametrize(
    "pos, pattern",
    [("rope", "S"), pytest.param("rope", "SL", marks=slow), pytest.param("alibi", "S", marks=slow)],
)
def test_windows_forget_guesses(pos, pattern):
    model = windowed(pos, pattern)
    prompts = prompts_of(3, 20, 9)
    for past_end in ("stop", "recompute", "slide") if pattern == "S" else ("stop", "recompute"):
        settings = dict(max_new_tokens=60, temperature=0, past_end=past_end)
        expected = ended(generate(model, prompts, **settings))
        stop = [expected[0][0][7]]
        stopped = ended(generate(model, prompts, stop=stop, **settings))
        for draft in DraftModel(disturbed(model)), Lookup():
            speculation = Speculation(draft, MOST_IN_RING)  # plain rounds in between
            assert ended(speculation.generate(model, prompts, **settings)) == expected
            assert ended(speculation.generate(model, prompts, stop=stop, **settings)) == stopped


@pytest.mark.parametrize("context", [5, *(pytest.param(n, marks=slow) for n in (1, 2, 12, 23))])
def test_a_drafts_context_may_be_shorter(context):
    model = build().double()
    prompts = prompts_of(1, 7, 20)
    speculation = untried(DraftModel(disturbed(model, block_size=context)))
    for past_end in "stop", "recompute":
        settings = dict(max_new_tokens=50, temperature=0, past_end=past_end)
        expected = ended(generate(model, prompts, **settings))
        assert ended(speculation.generate(model, prompts, **settings)) == expected
    assert speculation.n_right


def test_a_lookup_goes_on_as_the_text_did():
    """As one searches from the text's end."""
    generator = torch.Generator().manual_seed(1)
    lookup = Lookup()
    for _ in range(10):
        text = torch.randint(3, (40,), generator=generator).tolist()
        lookup.begin([text[:5]], 40, 6)
        row = Row(text[:5])
        for n in range(5, 40):
            row.ids = text[5:n]
            [guesses] = lookup.guess([row], 6, None)
            seen = text[:n]
            expected = []
            for length in (2, 3):
                for place in range(length, n):
                    if seen[place - length : place] == seen[n - length :]:
                        expected = seen[place:]
            while expected and len(expected) < 6:
                expected = expected * 2
            assert guesses == expected[:6]


# Sampled


RULES = dict(temperature=0.9, top_k=4, top_p=0.9, repetition_penalty=1.2)


@pytest.mark.slow
def test_sampled_text_depends_on_seed_and_row_alone():
    """Neither on the draft, nor on the number of guesses, nor on the other rows."""
    model = build().double()
    prompts = prompts_of(2, 9, 5)
    for rules in dict(temperature=1.0, top_k=0), RULES:
        settings = rules | dict(past_end="recompute")
        wrong = untried(Memory([[0] * 40] * 3, lambda row, i: True))
        expected = ended(wrong.generate(model, prompts, 30, **settings))
        assert ended(wrong.generate(model, prompts, 30, seed=2, **settings)) != expected
        for draft in DraftModel(disturbed(model)), DraftModel(model), Lookup():
            for n_guesses in 1, 3:
                speculation = untried(draft, n_guesses)
                assert ended(speculation.generate(model, prompts, 30, **settings)) == expected
                assert speculation.n_right or draft.name == Lookup.name
        trial = Speculation(DraftModel(disturbed(model)), 4)
        assert ended(trial.generate(model, prompts[:2], 30, **settings)) == expected[:2]


def test_a_draft_that_agrees_draws_the_same_token():
    """By at least (1 - TV) / (1 + TV) of all draws, where independent ones would agree less often."""
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    q = torch.tensor([[0.4, 0.3, 0.1, 0.2]])
    draws = Draws(build(), [[0]] * 20_000, 1, 1.0, 1.0, 0, 1.0)
    draws.shape = (20_000, 4)
    draws.begin([Row([0]) for _ in range(20_000)])
    none = torch.empty(20_000, 0, dtype=torch.long)
    ids = [draws.draw(x.log().expand(20_000, 1, 4), none) for x in (p, q)]
    # 1 / sum_j max(p_j / p_i, q_j / q_i) of each i
    ratios = torch.maximum(p / p.T, q / q.T).sum(1)
    expected = (1 / ratios).sum().item()
    assert expected > (1 - 0.2) / (1 + 0.2)
    share = (ids[0] == ids[1]).float().mean().item()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


def filtered(logits, seen, temperature, top_k, top_p, repetition_penalty):
    """Returns the distribution that sample.py's rules leave of logits, one token at a time."""
    for id in seen:
        factor = 1 / repetition_penalty if logits[id] > 0 else repetition_penalty
        logits[id] *= factor
    order = sorted(range(len(logits)), key=lambda id: -logits[id])
    if top_k:
        order = order[:top_k]
    weights = {id: math.exp(logits[id] / temperature) for id in order}
    total = sum(weights.values())
    nucleus = {}
    mass = 0.0
    for id in order:
        if mass < top_p:
            nucleus[id] = weights[id]
        mass += weights[id] / total
    total = sum(nucleus.values())
    return {id: weight / total for id, weight in nucleus.items()}


def distribution(model, prompt, n, **rules):
    """Returns {n ids: probability} of all that may follow a prompt, by the plain model."""
    texts = {(): 1.0}
    for _ in range(n):
        longer = {}
        for ids, p in texts.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]]))[0][0, -1].tolist()
            for id, share in filtered(logits, {*prompt, *ids}, **rules).items():
                longer[*ids, id] = p * share
        texts = longer
    return texts


@slow
@pytest.mark.parametrize("kind", ["model", "ngram"])
@pytest.mark.parametrize(
    "rules", [RULES, dict(temperature=1.3, top_k=0, top_p=1.0, repetition_penalty=1.0)]
)
def test_sampled_texts_have_the_plain_distribution(rules, kind):
    """Whole texts of four tokens of a vocabulary of six, 120,000 of them."""
    n = 120_000
    shape = dict(vocab_size=6, n_layer=1, n_head=2, n_embd=16, block_size=12)
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    draft = DraftModel(disturbed(model, 1.0)) if kind == "model" else Lookup()
    prompt = [1, 2, 5, 1, 2]
    expected = distribution(model, prompt, 4, **rules)
    assert sum(expected.values()) == pytest.approx(1)
    speculation = untried(draft, 2)
    *_, rows = speculation.generate(model, [prompt] * n, 4, seed=7, **rules)
    assert 0.1 < speculation.n_right / speculation.n_guessed < 0.95
    counts = dict.fromkeys(expected, 0)
    for row in rows:
        counts[tuple(row.ids)] += 1  # no text but those that are possible
    # rare texts together, as chi-square wants five of each cell
    cells = [(counts[ids], n * p) for ids, p in expected.items() if n * p >= 5]
    rare = [(counts[ids], n * p) for ids, p in expected.items() if n * p < 5]
    if rare:
        cells.append(tuple(map(sum, zip(*rare))))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = len(cells) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


# The trial


class Clock:
    """A clock that calls of models move on: so many seconds a token position for each."""

    def __init__(self, costs):
        self.time = 0.0
        for model, seconds in costs.items():
            model.blocks[0].register_forward_hook(lambda *_, seconds=seconds: self.move(seconds))

    def move(self, seconds):
        self.time += seconds

    def __call__(self):
        return self.time


def test_speculation_that_is_slower_goes_back_to_plain():
    model = build(block_size=130).double()
    prompts = prompts_of(3, 5)
    expected = ended(generate(model, prompts, 120, temperature=0))
    for seconds, gain in (0.1, 5 / 1.4), (1.0, 1.0), (2.0, 5 / 9):
        target, draft = copy.deepcopy(model), copy.deepcopy(model)
        speculation = Speculation(DraftModel(draft, "small"), 4, Clock({target: 1.0, draft: seconds}))
        calls = []
        draft.blocks[0].register_forward_hook(lambda *_: calls.append(None))
        steps = speculation.generate(target, prompts, 120, temperature=0)
        first = [next(steps)[0].new for _ in range(TRIAL + 10)]
        n_trial = len(calls)
        *_, rows = steps
        assert [(row.ids, row.end, row.stop) for row in rows] == expected
        assert first == expected[0][0][: len(first)]
        assert speculation.gain == pytest.approx(gain)
        assert speculation.is_off == (gain <= 1)
        assert (len(calls) == n_trial) == speculation.is_off
        assert speculation.line().startswith("small: 100% of ")
        # by turns 1 and 5
        assert "the speed of plain decoding over the first 66 tokens" in speculation.line()
        assert ("so the rest was plain" in speculation.line()) == speculation.is_off


def test_a_trial_has_rounds_enough_without_the_first_and_counts_rows_that_go_on():
    model = build(block_size=130).double()
    target, draft = copy.deepcopy(model), copy.deepcopy(model)
    prompts = prompts_of(3, 5)
    [_, (ids, _, _)] = ended(generate(model, prompts, 1, temperature=0))
    clock = Clock({target: 1.0, draft: 0.0})
    first = {1: 100.0, 21: 1000.0}  # seconds more that the first call of so many tokens takes
    target.blocks[0].register_forward_hook(
        lambda _, arguments, y: clock.move(first.pop(arguments[0].size(1), 0.0))
    )
    speculation = Speculation(DraftModel(draft), 20, clock)
    *_, rows = speculation.generate(target, prompts, 120, temperature=0, stop=ids)
    assert [len(row.ids) for row in rows] == [120, 0]  # the second is padding from the start
    assert not first
    assert speculation.n_tokens == (LEAST_ROUNDS + 1) * (1 + 21)
    assert speculation.gain == pytest.approx(21)


# From the command line


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a model, drafts of it, and models that are none."""
    folder = tmp_path_factory.mktemp("shop")
    ours, another = (
        Tokenizer.train([text], 260) for text in ("to be or not to be", "that is the question")
    )
    shape = dict(vocab_size=ours.vocab_size, n_kv_head=2)
    model = build(block_size=120, **shape)
    models = {
        "model": (model, ours),
        "small": (disturbed(model, block_size=60), ours),
        "long": (build(block_size=121, **shape), ours),
        "other": (build(vocab_size=another.vocab_size), another),
        "windows": (build(window=5, **shape), ours),
    }
    for name, (model, tokenizer) in models.items():
        path = str(folder / name / "ckpt.pt")
        config = {"template": "to {prompt} be"} if name == "small" else {}
        checkpoint_file.save(path, model, tokenizer, config, checkpoint_file.RunState(1, 2.0, 2.0))
    return folder


@pytest.mark.parametrize("draft", ["small", "ngram", "model"])
def test_the_command_line_writes_the_same_text(shop, capsys, draft):
    argv = ["--out_dir=model", "--start=to be", "--temperature=0", "--max_new_tokens=90", "--device=cpu"]
    argv += ["--repetition_penalty=1.05"]
    plain = printed(capsys, sample, *argv, folder=shop)
    output = printed(capsys, sample, *argv, f"--draft={draft}", "--speculate=3", folder=shop)
    assert written(output) == written(plain)
    prefill, guesses = output.splitlines()[-2:]
    assert prefill.startswith("prefill ")
    name = draft if draft == "ngram" else f"{draft}/ckpt.pt"
    assert guesses.startswith(f"{name}: ") and "guesses right" in guesses
    assert "x the speed of plain decoding over the first " in guesses
    many = printed(capsys, sample, *argv, f"--draft={draft}", "--num_samples=3", folder=shop)
    assert [text.strip() for text in many.split("-" * 80)[1:4]] == [written(plain).strip()] * 3


def test_a_draft_may_be_of_integers(shop, capsys):
    model, tokenizer = checkpoint.open_checkpoint(str(shop / "small")).restore()
    codes, _ = quantize.quantize_model(model, quantize.Config(to="n"))
    integers = quantized.quantized(model, quantized.Quantization(8, 0, "rtn"), codes)
    checkpoint_file.save(
        str(shop / "integers/ckpt.pt"), integers, tokenizer, {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    argv = ["--out_dir=model", "--start=to be", "--temperature=0", "--max_new_tokens=50", "--device=cpu"]
    plain = printed(capsys, sample, *argv, folder=shop)
    output = printed(capsys, sample, *argv, "--draft=integers", folder=shop)
    assert written(output) == written(plain)
    assert "integers/ckpt.pt: " in output


def test_a_conversation_is_the_same_and_has_one_trial(shop, capsys, monkeypatch):
    argv = ["--out_dir=small", "--chat", "--temperature=0", "--max_new_tokens=12", "--device=cpu"]
    outputs = []
    for draft in [], ["--draft=small", "--speculate=2"]:
        lines = iter(["not", "or", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        outputs.append(printed(capsys, sample, *argv, *draft, folder=shop))
    plain, speculative = outputs
    assert speculative.startswith(plain)
    assert re.fullmatch(
        r"small/ckpt.pt: 100% of \d+ guesses right, .* too short a text to compare its speed\n",
        speculative.removeprefix(plain),
    )


@slow
def test_the_bench_times_both(shop, monkeypatch):
    monkeypatch.chdir(shop)
    argv = ["decode", "--init_from=model", "--draft=small", "--seconds=0", "--speculate=2"]
    argv += ["--device=cpu", "--dtype=float32", "--compile=false", "--block_size=60"]
    cfg = bench.take_shape(configure(bench.Config, argv, bench.BENCHES))
    compute = resolve("cpu", "float32", "false")
    model = bench_step.build_model(cfg).eval()
    _, tokenizer = checkpoint.open_checkpoint(cfg.init_from).restore()
    speculations = bench_decode.load_speculations(cfg, compute, model, tokenizer)
    rows = list(bench_decode.speculation_rows(cfg, compute, model, tokenizer, speculations))
    assert [(row["what"], row["temperature"]) for row in rows] == [
        *itertools.product(("plain", "speculative"), [0.0]),
        *itertools.product(("plain", "speculative"), [0.8]),
    ]
    for plain, speculative in (rows[:2], rows[2:]):
        assert speculative["against_plain"] == pytest.approx(plain["ms"] / speculative["ms"])
        assert speculative["tokens_per_s"] * speculative["ms"] / 1e3 == pytest.approx(4 * 43)
        assert 0 < speculative["right"] < 1 < speculative["tokens_a_call"] < 3
    assert rows[1]["same_ids"]
    with pytest.raises(Refusal, match="draft needs init_from"):
        configure(bench.Config, ["decode", "--draft=small"], bench.BENCHES)
    monkeypatch.setattr(bench_decode, "decode_rows", None)  # nothing is timed before a draft is refused
    with pytest.raises(Refusal, match="has another tokenizer than the model"):
        bench_decode.bench_decode(replace(cfg, draft=str(shop / "other")), compute)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--draft=other"], "the draft other/ckpt.pt has another tokenizer than the model"),
        (["--draft=long"], "the draft long has a context of 121 tokens and the model 120"),
        (["--draft=nowhere"], "there is no nowhere: a draft is a smaller model's folder, or ngram"),
        (["--draft=windows", "--speculate=7"], "with windows speculate can be 6 at most"),
        (
            ["--out_dir=windows", "--draft=ngram", "--speculate=7"],
            "with windows speculate can be 6 at most",
        ),
        (["--draft=small", "--speculate=0"], "speculate must be at least 1 and at most 64, not 0"),
        (["--draft=small", "--speculate=65"], "speculate must be at least 1 and at most 64, not 65"),
        (["--speculate=4"], "speculate is the number of a draft's guesses"),
        (["--onnx=there", "--draft=small"], "an ONNX file cannot take tokens back"),
    ],
)
def test_drafts_that_cannot_be_are_one_line(shop, argv, message):
    with pytest.raises(Refusal, match=message) as e:
        call(sample, "--out_dir=model", *argv, folder=shop)
    assert "\n" not in str(e.value) and e.value.status == 2


def min_p(logits, temperature=1.0, top_k=0, top_p=1.0, uniform=None):
    """Keeps tokens a twentieth as likely as the likeliest, or more."""
    p = logits.softmax(-1)
    is_kept = p >= 0.05 * p.amax(-1, keepdim=True)
    return next_token(logits.masked_fill(~is_kept, -torch.inf), temperature, top_k, top_p, uniform)


def by_torch(logits, temperature=1.0, top_k=0, top_p=1.0, uniform=None):
    """Draws from the same probabilities in another way."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = drafts.distribution(logits, temperature, top_k, top_p)
    place = p.multinomial(1, generator=torch.Generator().manual_seed(0))
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def second_best(logits, temperature=1.0, top_k=0, top_p=1.0, uniform=None):
    if temperature == 0:
        return logits.topk(2).indices[:, 1]
    return next_token(logits, temperature, top_k, top_p, uniform)


def test_a_rule_in_next_token_alone_has_no_draft(monkeypatch):
    """What guesses are checked by does not ask it."""
    model = build()
    arguments = "ngram", model, None, 4, resolve("cpu", "float32", "false"), "torch"
    drafts.load_draft(*arguments)
    monkeypatch.setattr(drafts, "next_token", by_torch)
    drafts.load_draft(*arguments)
    for rule in min_p, second_best:
        monkeypatch.setattr(drafts, "next_token", rule)
        with pytest.raises(Refusal, match="next_token in generate.py was changed"):
            drafts.load_draft(*arguments)
