"""Prompts, sampling by hand, by chi-square, and cached against the plain loop."""

import math

import pytest
import torch
from test_model import V, build, prompts_of, tokens

import cache
import finetune_lora
import train
from config import configure
from data import AS_IT_STANDS, STRIPPED, text_rule
from generate import Row, generate, likeliest, next_token, penalized
from model import ModelConfig, Transformer
from sample import read_start, write
from tokenizer import Tokenizer


@pytest.mark.parametrize(
    "content, prompts",
    [
        ("A dog", ["A dog"]),
        ("  A dog \n\n", ["  A dog \n"]),  # one final newline and no more
        ("A dog\r\n", ["A dog"]),
        ("\tdef f():\n\t\t", ["\tdef f():\n\t\t"]),
        (" A<|endoftext|> B\n<|endoftext|>\n C \n", [" A", " B", " C "]),
        ("A <|endoftext|>\nB", ["A ", "\nB"]),
        ("A\n\n<|endoftext|>\n\nB\n", ["A\n", "\nB"]),
        ("\\n", ["\\n"]),  # a file has new lines of its own
        ("A<|endoftext|>", ["A", ""]),
        ("", [""]),
    ],
)
def test_a_files_prompts_are_taken_as_they_stand(content, prompts, tmp_path):
    (tmp_path / "n.txt").write_bytes(content.encode())
    assert read_start(f"FILE:{tmp_path}/n.txt") == prompts


def test_a_prompt_is_taken_as_it_stands_but_for_its_new_lines():
    """By one rule in all scripts, and the same where a config is read again."""
    typed = " def f():\\n  \\t\\\\n "
    meant = " def f():\n  \\t\\\n "
    assert read_start(typed) == [meant]
    for Config in train.Config, finetune_lora.Config:
        cfg = configure(Config, [f"--start={typed}"])
        assert cfg.start == meant
        cfg.__post_init__()
        assert cfg.start == meant
    cfg = configure(finetune_lora.Config, [f"--template={{prompt}}{typed}"])
    assert cfg.template == f"{{prompt}}{meant}"


def test_the_text_rule_of_configs_with_and_without_one():
    assert text_rule({}) == text_rule({"template": ""}) == AS_IT_STANDS
    assert text_rule({"template": "{prompt}"}) == STRIPPED
    assert text_rule({"template": "{prompt}", "text_rule": AS_IT_STANDS}) == AS_IT_STANDS


def test_what_is_printed_of_a_row_is_its_text_also_where_a_character_is_unfinished(capsys):
    tokenizer = Tokenizer.train(["é"], 257)
    ids = [*tokenizer.encode("a"), tokenizer.encode("é")[0]]
    row, other = Row([]), Row([], ids)

    def steps():
        for row.new in ids:
            row.ids.append(row.new)
            yield [row, other]

    write(steps(), [">", ">"], [[0], [0]], tokenizer, 9, "")
    assert tokenizer.decode(ids) == "a\ufffd"
    assert capsys.readouterr().out.count("\n>a\ufffd\n") == 2


def complete(steps):
    """Runs generate() to its end; returns the ids of each row, and why each ended."""
    *_, rows = steps
    return [row.ids for row in rows], [row.end for row in rows]


def greedy(model, prompt, n):
    """Returns n ids after a prompt, by the plain loop: no cache, one row."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            logits = model(torch.tensor([ids]))[0]
            ids.append(logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def uniform(n, seed):
    """Returns numbers from [0, 1), (n, 1) float64."""
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support(p, **rules):
    """Returns the ids that are ever drawn from a distribution, of 4,000 draws."""
    logits = torch.tensor(p).log().expand(4000, -1)
    return set(next_token(logits, uniform=uniform(4000, seed=0), **rules).tolist())


def chi_square(draws, p):
    """Pearson's statistic of ids drawn against their probabilities."""
    counts = draws.bincount(minlength=len(p)).double()
    expected = len(draws) * p
    return ((counts - expected) ** 2 / expected).sum().item()


def test_top_k_top_p_and_temperature_by_hand():
    three = [0.5, 0.45, 0.05]
    assert support(three) == {0, 1, 2}
    assert support(three, top_p=0.9) == {0, 1}  # the token that crosses 0.9 stays
    assert support(three, top_p=0.5) == {0}
    assert support([0.05, 0.5, 0.45], top_p=0.51) == {1, 2}
    four = [0.1, 0.2, 0.3, 0.4]
    assert support(four, top_k=2) == {2, 3}
    assert support(four, top_k=1) == {3}
    assert support(four, top_k=99) == {0, 1, 2, 3}
    assert support(four, top_k=3, top_p=0.4) == {3}  # 4/9 of the three that top_k leaves makes up 0.4
    assert support(four, temperature=0) == {3}
    assert support(four, temperature=1e-4) == {3}


def test_the_ends_of_the_unit_interval_draw_no_token_that_cannot_be():
    """float32 sums to less than 1 in some rows. nan, of a model that is broken, draws some id."""
    logits = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0))
    logits[:, [0, -1]] = -torch.inf
    for end, id in (0.0, 1), (1 - 2**-53, 7):
        drawn = next_token(logits, uniform=torch.full((1000, 1), end, dtype=torch.float64))
        assert (drawn == id).all()
    assert 0 <= next_token(torch.full((1, 9), torch.nan), uniform=uniform(1, seed=0)) < 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_token_is_torchs(dtype):
    """NumPy's too where several are equal, where one is nan, and for one row alone."""
    logits = torch.randn(4, 3, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[1] = logits[1].round()
    logits[2] = -torch.inf
    logits[3, :, [100, 200]] = torch.nan
    for part in logits, logits[:, -1], logits[0, 0], logits[..., ::7], logits[:0]:
        for x in part, part.clone().requires_grad_():
            ids = likeliest(x)
            assert ids.dtype == torch.int64
            assert torch.equal(ids, x.argmax(-1))


def test_draws_have_the_right_frequencies():
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = p.log().expand(20_000, -1)
    for temperature, expected in (1.0, p), (2.0, p.sqrt() / p.sqrt().sum()):
        draws = next_token(logits, temperature=temperature, uniform=uniform(20_000, seed=1))
        assert chi_square(draws, expected) < 18.5  # 4 degrees of freedom, p = 0.001


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalized(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_repetition_penalty_sees_prompt_and_output():
    model = build()
    ids, _ = complete(generate(model, [[1, 2, 3]], 12, temperature=0, repetition_penalty=1e9))
    assert len({1, 2, 3, *ids[0]}) == 15


def test_log_probabilities_are_the_models_own_whatever_the_draw_is_by():
    model = build().double()
    prompt = [1, 2, 3]
    rules = dict(temperature=0.5, top_k=20, top_p=0.9, repetition_penalty=1.5)
    *_, [row] = generate(model, [prompt], 12, logps=True, **rules)
    logits, _ = model(torch.tensor([prompt + row.ids]))
    expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])
    assert row.logps == pytest.approx(expected[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_greedy_is_the_plain_loop_for_prompts_of_different_lengths(pos):
    model = build(pos=pos, n_kv_head=2)
    prompts = prompts_of(1, 7, 4, 12)
    rows, ends = complete(generate(model, prompts, 12, temperature=0))
    assert rows == [greedy(model, prompt, 12) for prompt in prompts]
    assert ends == ["length"] * 4


@pytest.mark.parametrize("pattern", ["L", "S", "SL"])
@pytest.mark.parametrize("pos", ["learned", "rope", "alibi"])
def test_prompts_of_like_lengths_are_read_together_and_all_go_on_as_if_alone(pos, pattern, monkeypatch):
    monkeypatch.setattr(cache, "PADDING", 8)
    model = build(pos=pos, n_kv_head=2, window=3, window_pattern=pattern, block_size=64).double()
    prompts = prompts_of(21, 1, 5, 50, 2, 22, 48, 3)
    shapes = []
    hook = model.wte.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    rows, _ = complete(generate(model, prompts, 12, temperature=0))
    hook.remove()
    assert shapes == [(4, 5), (2, 22), (2, 50)] + [(8, 1)] * 11
    assert rows == [greedy(model, prompt, 12) for prompt in prompts]


def test_each_row_has_its_own_stop_and_the_others_go_on_as_if_alone():
    model = build()
    prompts = prompts_of(3, 9, 5, 2)
    alone = [greedy(model, prompt, 14) for prompt in prompts]
    stop = alone[1][2]
    rows, ends = complete(generate(model, prompts, 14, temperature=0, stop=[stop]))
    assert set(ends) == {"stop", "length"}
    for row, end, expected in zip(rows, ends, alone):
        if stop in expected:
            assert row == expected[: expected.index(stop)]
            assert end == "stop"
        else:
            assert row == expected
            assert end == "length"


@pytest.mark.parametrize("past_end", ["stop", "recompute"])
def test_what_is_drawn_does_not_depend_on_when_other_rows_end(past_end):
    model = build(window=5, window_pattern="SL").double()
    prompts = prompts_of(3, 9, 5, 2, 7, 12)
    settings = dict(temperature=1.0, top_k=0, repetition_penalty=1.2, past_end=past_end)
    *_, endless = generate(model, prompts, 40, **settings)
    stops = list(range(0, V, 12))
    *_, rows = generate(model, prompts, 40, stop=stops, **settings)
    assert len({len(row.ids) for row in rows}) > 3
    for row, expected in zip(rows, endless):
        assert row.ids == expected.ids[: len(row.ids)]
        if row.stop is not None:
            assert row.stop == expected.ids[len(row.ids)]


def test_rows_that_share_a_prompt_read_it_once_and_draw_as_they_would_beside_others():
    model = build(window=5, window_pattern="SL").double()
    first, second, *others = prompts_of(9, 3, 4, 7, 5)
    shapes = []
    hook = model.wte.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    settings = dict(temperature=1.0, top_k=0, repetition_penalty=1.2)
    ids, _ = complete(generate(model, [first, second, first, first], 12, **settings))
    hook.remove()
    assert shapes == [(2, 9)] + [(4, 1)] * 11
    assert ids[0] != ids[2] != ids[3] != ids[0]
    for row, prompt in enumerate([first, second, first, first]):
        beside = others.copy()
        beside.insert(row, prompt)
        expected, _ = complete(generate(model, beside, 12, **settings))
        assert ids[row] == expected[row]


def test_rows_end_at_the_end_of_the_context():
    model = build()  # block_size 24
    for n in 23, 24:  # a full window still has a next token
        prompt = tokens(1, n)[0].tolist()
        rows, ends = complete(generate(model, [prompt], 10, temperature=0))
        assert rows == [greedy(model, prompt, 25 - n)]
        assert ends == ["block_size"]
    with pytest.raises(ValueError, match="the prompt has 25 tokens and the context 24"):
        next(generate(model, prompts_of(25), 10))
    with pytest.raises(ValueError, match="prompt 2 has 25 tokens and the context 24"):
        next(generate(model, prompts_of(6, 25), 10))
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, [[]], 10))
    # in a batch each row has its own end
    long, short = prompts_of(20, 6)
    rows, ends = complete(generate(model, [long, short], 30, temperature=0))
    assert rows == [greedy(model, long, 5), greedy(model, short, 19)]
    assert ends == ["block_size"] * 2


def test_steps_that_a_full_context_leaves_no_room_for_are_not_prepared():
    model = build()
    prompts = prompts_of(20, 6)
    settings = dict(temperature=1.0, top_k=0)
    expected = complete(generate(model, prompts, 30, graph=False, **settings))
    assert complete(generate(model, prompts, 10**13, graph=True, **settings)) == expected
    assert expected[1] == ["block_size"] * 2


@pytest.mark.parametrize("n", [3, 23, 24, 25, 60])
def test_recompute_goes_on_from_the_last_half_of_the_window(n):
    model = build()
    prompt = tokens(1, n)[0].tolist()
    settings = dict(temperature=0, past_end="recompute")
    rows, ends = complete(generate(model, [prompt, [5, 6]], 50, **settings))
    expected = []
    window = prompt if n <= 24 else prompt[-12:]
    for _ in range(50):
        expected += greedy(model, window, 1)
        window = window + expected[-1:]
        if len(window) > 24:
            window = window[-12:]
    assert rows[0] == expected
    assert ends == ["length"] * 2
    [alone], _ = complete(generate(model, [[5, 6]], 50, **settings))
    assert rows[1] == alone


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model = build()

    def rows(seed):
        return complete(generate(model, [[1], [1]], 16, temperature=1.0, seed=seed))[0]

    first, second = rows(seed=1)
    assert first != second  # the first token is drawn a row
    assert rows(seed=1) == [first, second]
    assert rows(seed=2) != [first, second]


def test_generating_leaves_training_alone():
    model = Transformer(ModelConfig(vocab_size=11, n_embd=32, dropout=0.5)).train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    complete(generate(model, [[1]], 5))
    assert model.training
    assert torch.equal(torch.rand(1), expected)


def test_sampled_first_tokens_follow_the_model():
    model = build()
    p = model(torch.tensor([[7]]))[0][0, -1].softmax(-1).detach()
    rows = next(generate(model, [[7]] * 4000, 1, temperature=1.0, top_k=0))
    ids = torch.tensor([row.new for row in rows])
    # 60 degrees of freedom; four standard deviations above its mean
    assert chi_square(ids, p) < 60 + 4 * math.sqrt(2 * 60)
