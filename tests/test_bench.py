"""bench.py: that it measures what it says, in turn, and that what it says adds up. No figure here depends on a clock."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import build
from test_sample import greedy

import bench
import measure
import toy_stories
from config import Refusal, configure
from device import resolve

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=2",
    "--vocab_size=300",
    "--seconds=0",
    "--device=cpu",
    "--dtype=float32",
]


def config(*argv):
    return configure(bench.Config, [*TINY, *argv], bench.BENCHES)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def go(seconds):
        now[0] += seconds

    return go


def test_a_race_takes_turns_and_tells_the_first_call_apart(clock):
    calls = []

    def rival(name, durations):
        durations = iter(durations)

        def f():
            calls.append(name)
            clock(next(durations))

        return f

    times = measure.race({"a": rival("a", [50, 9, 1, 2, 4]), "b": rival("b", [60, 9, 3, 3, 3])}, 0, CPU)
    assert calls == ["a", "b"] * 2 + ["a", "b", "b", "a", "a", "b"]
    assert times == {
        "a": {"first": 50, "median": 2, "min": 1, "max": 4},
        "b": {"first": 60, "median": 3, "min": 3, "max": 3},
    }


@pytest.mark.parametrize("seconds, rounds", [(0, 3), (9.5, 10), (10**6, 100)])
def test_a_race_runs_until_its_time_is_over(clock, seconds, rounds):
    calls = []

    def f():
        calls.append(1)
        clock(1)

    measure.race({"f": f}, seconds, CPU)
    assert len(calls) == 2 + rounds


def test_a_race_does_not_time_the_setup(clock):
    made = []

    def setup():
        clock(100)
        made.append(len(made))
        return made[-1]

    def f(number):
        assert number == made[-1]
        clock(1 + number)

    assert measure.race({"f": (setup, f)}, 0, CPU) == {
        "f": {"first": 1, "median": 4, "min": 3, "max": 5}
    }


def numbers(value, key=""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield from numbers(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from numbers(v, key)
    else:
        yield key, value


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(folder, printed lines, figures) of one run of all benches."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "some.txt").write_text(
        "<|endoftext|>".join(text for text, _ in toy_stories.stories(50)), encoding="utf-8"
    )
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(
            "builtins.print", lambda *args, **kwargs: lines.extend(" ".join(map(str, args)).split("\n"))
        )
        patch.setattr(bench, "LARGE", 1 << 16)
        bench.main(config("--plot", "--json", "--text=some.txt"))
    return folder, lines, json.loads(lines[-1])


def test_every_bench_runs_and_its_figures_are_finite_and_positive(everything):
    folder, lines, printed = everything
    assert list(printed["figures"]) == list(bench.BENCHES) and all(printed["figures"].values())
    for key, value in numbers(printed["figures"]):
        if key == "error":
            assert 0 <= value < 1e-5
        elif key in ("same", "same_ids"):
            assert value in (True, None)
        elif type(value) in (int, float):
            assert math.isfinite(value) and value > 0, key
    assert (
        printed["dtype"] == "float32"
        and printed["torch"] == torch.__version__
        and printed["config"]["n_embd"] == 16
    )
    assert sorted(p.name for p in folder.rglob("*.png")) == [
        "bench_attention.png",
        "bench_decode.png",
        "bench_rmsnorm.png",
    ]
    assert "greedy ids with and without a cache: equal" in lines


def test_figures_agree_with_each_other(everything):
    figures = everything[2]["figures"]
    for row in figures["train"]:
        assert (
            row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(2 * 16)
            and row["ms_min"] <= row["ms"] <= row["ms_max"]
        )
    assert [row["settings"] for row in figures["train"]] == ["llama", "gpt2"]
    # GPT-2: V + T + per block (4 C^2 + 4 C) + (2 x 4 C^2 + 5 C) + two norms of 2 C, and the last one
    C = 16
    assert figures["train"][1]["parameters"] == (300 + 16) * C + 2 * (12 * C * C + 13 * C) + 2 * C
    decode = {(row["what"], row["batch"]): row for row in figures["decode"] if "batch" in row}
    assert decode["prefill", 8]["tokens_per_s"] * decode["prefill", 8]["ms"] / 1e3 == pytest.approx(
        8 * 8
    )
    assert decode["decode", 8]["tokens_per_s"] * decode["decode", 8]["ms"] / 1e3 == pytest.approx(8 * 7)
    weights = (
        300 * C + 2 * (4 * C * C + 3 * C * 64 + 2 * C + 2 * 8) + C
    )  # tied, SwiGLU of 64, two norms and a qk_norm of 8 a block
    assert decode["decode", 1]["weights_gb_per_s"] * decode["decode", 1]["ms"] * 1e6 == pytest.approx(
        7 * 4 * weights
    )
    norm = {(row["what"], row["way"]): row["bytes"] for row in figures["rmsnorm"] if row["rows"] == 32}
    assert norm["norm", "forward"] == 2 * 32 * 16 * 4 + 32 * 4 + 16 * 4
    assert norm["norm", "backward"] == 3 * 32 * 16 * 4 + 32 * 4 + 2 * 16 * 4
    assert norm["add", "forward"] == 4 * 32 * 16 * 4 + 32 * 4 + 16 * 4


def test_the_cache_table_from_a_shell():
    done = subprocess.run(
        [sys.executable, "bench.py", "kvcache", "--json", *TINY, "--n_embd=48", "--n_head=6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == ""
    rows = json.loads(done.stdout.splitlines()[-1])["figures"]["kvcache"]
    # keys and values, 32 layers, 2,048 tokens, heads of 128 numbers, 2 bytes each
    assert {row["attention"]: (row["bytes"], row["mib"]) for row in rows[:3]} == {
        "MHA": (2 * 32 * 2048 * 32 * 128 * 2, 1024),
        "GQA": (2 * 32 * 2048 * 8 * 128 * 2, 256),
        "MQA": (2 * 32 * 2048 * 128 * 2, 32),
    }
    # two layers, two rows, 16 tokens, heads of 8 numbers, 4 bytes each
    assert [(row["n_kv_head"], row["attention"], row["stored_bytes"]) for row in rows[3:]] == [
        (n, name, 2 * 2 * 2 * 16 * n * 8 * 4)
        for n, name in ((6, "MHA"), (3, "GQA"), (2, "GQA"), (1, "MQA"))
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pos": "alibi", "n_kv_head": 1},
        {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "tie": False},
    ],
)
def test_with_and_without_a_cache_the_ids_are_the_plain_loops(settings):
    model = build(**settings)
    want = greedy(model, [3, 1], 15)
    assert len(set(want)) > 3
    uncached = bench.generate_uncached(model, [[3, 1]], 15)
    cached = bench.generate_cached(model, [[3, 1], [3, 1]], 15)
    assert uncached[0] == cached[1] == want


def test_the_shape_is_tiny_tomls_unless_it_is_given():
    cfg = configure(bench.Config, ["--device=cpu", "--n_layer=3"])
    assert (
        cfg.n_layer,
        cfg.n_head,
        cfg.n_embd,
        cfg.n_kv_head,
        cfg.n_inner,
        cfg.block_size,
        cfg.batch_size,
    ) == (3, 6, 192, 6, 512, 256, 12)
    assert configure(bench.Config, ["--device=cuda"]).n_embd == 384
    cfg = configure(bench.Config, [str(ROOT / "configs/medium.toml"), "--device=cpu"])
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.batch_size) == (
        12,
        12,
        768,
        1024,
        32,
    )


def test_llamas_and_gpt2s_settings_are_their_files_under_what_was_given():
    result = bench.architectures(config("--n_kv_head=1", "--bias"))
    assert {
        name: (c.norm, c.pos, c.mlp, c.n_inner, c.n_kv_head, c.qk_norm, c.bias)
        for name, c in result.items()
    } == {
        "llama": ("rmsnorm", "rope", "swiglu", 64, 1, False, True),
        "gpt2": ("layernorm", "learned", "gelu", 64, 1, False, True),
    }
    assert {c.n_inner for c in bench.architectures(config("--n_inner=24")).values()} == {24}
    ((name, cfg),) = bench.architectures(config("--pos=alibi")).items()
    assert name == "as given" and cfg.pos == "alibi" and cfg.qk_norm


def test_the_step_is_a_real_one_and_one_that_is_none_is_refused():
    step, model, optimizers = bench.make_training_step(config(), resolve("cpu", "float32", "false"))
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert (
        all(not torch.equal(p, q) for p, q in zip(model.parameters(), before)) and len(optimizers) == 2
    )
    model.wte.weight.data[:] = math.nan
    with pytest.raises(Refusal, match="the loss is nan") as e:
        step()
    assert e.value.status == 1


def test_error_is_the_largest_of_outputs_and_gradients():
    x, w, dy = (
        torch.randn(8, 4, requires_grad=True),
        torch.randn(4, requires_grad=True),
        torch.ones(8, 4),
    )
    result = bench.relative_errors(
        {
            "right": lambda x, w: x * w,
            "a hundredth too much": lambda x, w: 1.01 * x * w,
            "the gradient of w": lambda x, w: x * w + 0.5 * (w - w.detach()),
        },
        lambda x, w: x * w,
        (x, w),
        (dy,),
    )
    assert (
        result["right"] < 1e-6
        and result["a hundredth too much"] == pytest.approx(0.01, rel=1e-3)
        and result["the gradient of w"] > 0.1
    )


def test_peak_memory_sees_what_was_taken_and_given_back():
    def work():
        torch.ones(1 << 24).add_(1)  # 64 MiB

    result = measure.peak_memory(CPU, work)
    if result is None:
        pytest.skip("this system does not tell")
    assert 63 < result / 2**20 < 80  # a page of it may have been there before


def test_explicit_attention_is_attention():
    q, k, v = torch.randn(3, 1, 2, 9, 4).double()
    torch.testing.assert_close(
        bench.explicit_attention(q, k, v),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_without_hugging_face_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench, "LARGE", 1 << 16)
    for name in "transformers", "tokenizers":
        monkeypatch.setitem(sys.modules, name, None)
    bench.main(config("decode", "--pos=alibi"))
    bench.main(config("decode"))
    out = capsys.readouterr().out
    assert "no counterpart" in out and "pip install transformers" in out and out.count("prefill") >= 4
