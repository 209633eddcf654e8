"""Prompts, sampling by hand, by chi-square, and cached against the plain loop."""

import math

import pytest
import torch
from test_model import build, tokens

import finetune_lora
import train
from config import configure
from data import AS_IT_STANDS, STRIPPED, text_rule
from model import ModelConfig, Transformer
from sample import generate, next_token, penalized, read_start


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
    assert (
        configure(finetune_lora.Config, [f"--template={{prompt}}{typed}"]).template
        == f"{{prompt}}{meant}"
    )


def test_the_text_rule_of_configs_with_and_without_one():
    assert text_rule({}) == text_rule({"template": ""}) == AS_IT_STANDS
    assert text_rule({"template": "{prompt}"}) == STRIPPED
    assert text_rule({"template": "{prompt}", "text_rule": AS_IT_STANDS}) == AS_IT_STANDS


def complete(steps):
    """Runs generate() to its end: ([the ids of each row], [why each ended])."""
    *_, rows = steps
    return [row.ids for row in rows], [row.end for row in rows]


def greedy(model, prompt, n):
    """The plain loop: no cache, one row."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids[len(prompt) :]


def kept(p, n=4000, **rules):
    """Which tokens of a distribution ever come up."""
    logits = torch.tensor(p).log().expand(n, -1)
    return set(next_token(logits, generator=torch.Generator().manual_seed(0), **rules).tolist())


def test_rules_by_hand():
    assert kept([0.5, 0.45, 0.05]) == {0, 1, 2}
    assert kept([0.5, 0.45, 0.05], top_p=0.9) == {0, 1}  # the token that crosses 0.9 stays
    assert kept([0.5, 0.45, 0.05], top_p=0.5) == {0}
    assert kept([0.05, 0.5, 0.45], top_p=0.51) == {1, 2}
    assert kept([0.1, 0.2, 0.3, 0.4], top_k=2) == {2, 3}
    assert kept([0.1, 0.2, 0.3, 0.4], top_k=1) == {3}
    assert kept([0.1, 0.2, 0.3, 0.4], top_k=99) == {0, 1, 2, 3}
    assert kept([0.1, 0.2, 0.3, 0.4], top_k=3, top_p=0.4) == {
        3
    }  # top_p of what top_k left: 4/9 makes up 0.4
    assert kept([0.1, 0.2, 0.3, 0.4], temperature=0) == {3}
    assert kept([0.1, 0.2, 0.3, 0.4], temperature=1e-4) == {3}


def test_draws_have_the_right_frequencies():
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    n = 20000
    for temperature, want in (1.0, p), (2.0, p.sqrt() / p.sqrt().sum()):
        draws = next_token(
            p.log().expand(n, -1), temperature=temperature, generator=torch.Generator().manual_seed(1)
        )
        counts = draws.bincount(minlength=5).double()
        chi2 = ((counts - n * want) ** 2 / (n * want)).sum().item()
        assert chi2 < 18.5, chi2  # 4 degrees of freedom, p = 0.001


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0, -1.0]]), torch.tensor([[True, True, False, False]])
    assert penalized(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_repetition_penalty_sees_prompt_and_output():
    model = build()
    ids, _ = complete(generate(model, [[1, 2, 3]], 12, temperature=0, repetition_penalty=1e9))
    assert len({1, 2, 3, *ids[0]}) == 15


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_greedy_is_the_plain_loop_for_prompts_of_different_lengths(pos):
    model = build(pos=pos, n_kv_head=2)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 7, 4, 12)]
    rows, ended = complete(generate(model, prompts, 12, temperature=0))
    assert rows == [greedy(model, p, 12) for p in prompts] and ended == ["length"] * 4


def test_each_row_has_its_own_stop_and_the_others_go_on_as_if_alone():
    model = build()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 5, 2)]
    alone = [greedy(model, p, 14) for p in prompts]
    stop = alone[1][2]
    rows, ended = complete(generate(model, prompts, 14, temperature=0, stop=[stop]))
    for row, end, want in zip(rows, ended, alone):
        assert row == (want[: want.index(stop)] if stop in want else want)
        assert end == ("stop" if stop in want else "length")
    assert "stop" in ended and "length" in ended


def test_the_end_of_the_context():
    model = build()  # block_size 24
    for n in 23, 24:  # a full window still says what comes next
        prompt = tokens(1, n)[0].tolist()
        rows, ended = complete(generate(model, [prompt], 10, temperature=0))
        assert rows == [greedy(model, prompt, 25 - n)] and ended == ["block_size"]
    with pytest.raises(ValueError, match="25 tokens and the context 24"):
        next(generate(model, [tokens(1, 25)[0].tolist()], 10))
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, [[]], 10))
    # in a batch each row has its own end
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (20, 6)]
    rows, ended = complete(generate(model, prompts, 30, temperature=0))
    assert ended == ["block_size"] * 2 and rows == [
        greedy(model, prompts[0], 5),
        greedy(model, prompts[1], 19),
    ]


@pytest.mark.parametrize("n", [3, 23, 24, 25, 60])
def test_recompute_goes_on_from_the_last_half_of_the_window(n):
    model, prompt = build(), tokens(1, n)[0].tolist()
    rows, ended = complete(generate(model, [prompt, [5, 6]], 50, temperature=0, past_end="recompute"))
    window, want = prompt if n <= 24 else prompt[-12:], []
    for _ in range(50):
        want += greedy(model, window, 1)
        window = window + want[-1:]
        window = window[-12:] if len(window) > 24 else window
    assert rows[0] == want and ended == ["length"] * 2
    assert rows[1] == complete(generate(model, [[5, 6]], 50, temperature=0, past_end="recompute"))[0][0]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model = build()
    a, b, c = (complete(generate(model, [[1], [1]], 16, temperature=1.0, seed=s))[0] for s in (1, 1, 2))
    assert a == b != c
    assert a[0] != a[1]  # the first token is drawn a row


def test_generating_leaves_training_alone():
    model = Transformer(ModelConfig(vocab_size=11, n_embd=32, dropout=0.5)).train()
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    complete(generate(model, [[1]], 5))
    assert model.training and torch.equal(torch.rand(1), want)


def test_sampled_first_tokens_follow_the_model():
    model = build()
    p = model(torch.tensor([[7]]))[0][0, -1].softmax(-1).detach()
    n = 4000
    ids = [row.new for row in next(generate(model, [[7]] * n, 1, temperature=1.0, top_k=0))]
    counts = torch.tensor(ids).bincount(minlength=61).double()
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert chi2 < 60 + 4 * math.sqrt(2 * 60), chi2
