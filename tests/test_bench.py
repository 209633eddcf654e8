"""bench.py: it measures in turn, and its figures add up. No figure here depends on a real clock."""

import contextlib
import io
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, shell
from test_model import build
from test_sample import greedy
from test_train import copied

import bench
import benches.cache as bench_cache
import benches.decode as bench_decode
import benches.learning as bench_learning
import benches.ops as bench_ops
import benches.scale as bench_scale
import benches.step as bench_step
import benches.train as bench_train
import checkpoint_file
import graphs
import measure
import race
import toy_stories
import train
from config import Refusal, configure
from data import epoch_starts
from device import Compute, resolve
from interop import nanogpt
from model import ModelConfig, Transformer
from optim import get_lr, make_optimizers
from score import evaluate
from sizes import model_sizes, num_params
from tokenizer import EOT, Tokenizer

CPU = torch.device("cpu")
PLAIN_CPU = ["--device=cpu", "--dtype=float32"]
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=2",
    "--vocab_size=300",
    "--seconds=0",
    *PLAIN_CPU,
]


def config(*argv):
    return configure(bench.Config, [*TINY, *argv], bench.BENCHES | bench.LONG)


def test_each_bench_may_compile_many_models(monkeypatch):
    """By torch's limit of eight a function the ninth would be timed uncompiled: of all benches, not of each."""
    limits, resets = [], []

    def compiles(cfg, compute):
        """Compiles models."""
        limits.append(torch._dynamo.config.recompile_limit)
        return []

    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    for name in "kvcache", "windows":
        monkeypatch.setitem(bench.BENCHES, name, compiles)
    bench.main(config("kvcache", "windows", "--compile=true"))
    assert limits == [64, 64] and len(resets) == 2
    assert torch._dynamo.config.recompile_limit < 64
    bench.main(config("kvcache"))
    assert len(resets) == 2


@pytest.mark.parametrize("n", [64, 200])
def test_only_replays_are_timed_on_a_gpu(n, monkeypatch):
    """Of the tokens of bench.py decode and quantize, and neither what is before the capture nor the capture."""
    calls = []

    class Counted(graphs.Graph):
        def __call__(self):
            calls.append(self)
            super().__call__()

    monkeypatch.setattr(graphs, "Graph", Counted)
    n_read, n_timed = bench_decode.timed_steps(torch.device("cuda"), n)
    steps = bench_decode.begun_steps(build(block_size=256), [[0]], n, n_read, graph=True)
    n_before = len(calls)
    assert n_before > graphs.WARM_UP
    list(steps)
    assert len(calls) - n_before == n_timed
    assert bench_decode.timed_steps(CPU, n) == (1, n - 1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; calling it lets some seconds pass."""
    now = 0.0

    def advance(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(race.time, "perf_counter", lambda: now)
    return advance


def test_a_race_takes_turns_and_tells_the_first_call_apart(clock):
    calls = []

    def rival(name, *durations):
        remaining = iter(durations)

        def call():
            calls.append(name)
            clock(next(remaining))

        return call

    a, b = rival("a", 50, 9, 1, 2, 4), rival("b", 60, 9, 3, 3, 3)
    times = race.race({"a": a, "b": b}, 0, CPU)
    assert calls == ["a", "b"] * 2 + ["a", "b", "b", "a", "a", "b"]
    assert times == {
        "a": {"first": 50, "median": 2, "min": 1, "max": 4},
        "b": {"first": 60, "median": 3, "min": 3, "max": 3},
    }
    calls.clear()
    a, b = rival("a", 50, 70, 80, 9, 1, 2, 4), rival("b", 60, 70, 80, 9, 3, 3, 3)
    assert race.race({"a": a, "b": b}, 0, CPU, untimed=2) == times  # what is captured meanwhile
    assert calls == ["a", "b"] * 4 + ["a", "b", "b", "a", "a", "b"]


def test_a_pause_is_before_each_turn_and_not_timed(clock, monkeypatch):
    """So that threads that another rival left spinning sleep."""

    def sleep(seconds):
        turns.append("pause")
        clock(seconds)

    def call(name):
        turns.append(name)
        clock(1)

    turns = []
    monkeypatch.setattr(race.time, "sleep", sleep)
    times = race.race({"a": lambda: call("a"), "b": lambda: call("b")}, 0, CPU, pause=100)
    assert turns[-12:] == [x for name in "abbaab" for x in ("pause", name)]
    assert times["a"] == times["b"] == dict.fromkeys(("first", "median", "min", "max"), 1)


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    "device, seconds, rounds",
    [(CPU, 0, 3), (CPU, 9.5, 9), (CPU, 10**6, 100), (GPU, 0, 0), (GPU, 9.5, 9), (GPU, 10**6, 100)],
)
def test_a_race_runs_until_its_time_is_over(clock, device, seconds, rounds, monkeypatch):
    monkeypatch.setattr(race, "synchronize", lambda _: None)
    calls = []

    def f():
        calls.append(1)
        clock(1)

    times = race.race({"f": f}, seconds, device)
    assert len(calls) == 2 + rounds
    assert times["f"] == dict.fromkeys(("first", "median", "min", "max"), 1)


def test_a_gpu_is_timed_over_several_calls():
    seconds = (1e-6, 1.1e-5, 0.9e-3, 2e-3, 4.9e-3, 9e-3, 21e-3, 1)
    numbers = [race.count_calls(print, x, GPU) for x in seconds]
    assert numbers == [1000, 454, 5, 4, 4, 2, 1, 1]
    assert race.count_calls(print, 1e-6, CPU) == 1 == race.count_calls((print, print), 1e-6, GPU)


def test_the_time_of_several_calls_is_told_of_one(clock):
    assert race.time_rival(lambda: clock(2), CPU, calls=3) == 2


def test_a_race_does_not_time_the_setup(clock):
    numbers_made = []

    def setup():
        clock(100)
        numbers_made.append(len(numbers_made))
        return numbers_made[-1]

    def f(number):
        assert number == numbers_made[-1]
        clock(1 + number)

    times = race.race({"f": (setup, f)}, 0, CPU)
    assert times == {"f": {"first": 1, "median": 4, "min": 3, "max": 5}}


def numbers(value, key=""):
    """Yields the values in nested figures, each with its key."""
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
    """The folder, the printed lines and the results of one run of all benches."""
    folder = tmp_path_factory.mktemp("bench")
    stories = toy_stories.texts(50)
    (folder / ".stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    output = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(measure, "LARGE", 1 << 16)
        bench.main(config("--plot", "--json", "--text=.stories.txt"))
    lines = output.getvalue().splitlines()
    return folder, lines, json.loads(lines[-1])


def test_every_bench_runs_and_its_figures_are_finite_and_positive(everything):
    folder, lines, results = everything
    assert list(results["figures"]) == list(bench.BENCHES)
    assert all(results["figures"].values())
    for key, value in numbers(results["figures"]):
        if key == "error":
            assert 0 <= value < 1e-5
        elif key in ("same", "same_ids"):
            assert value in (True, None)
        elif type(value) in (int, float):
            assert math.isfinite(value), key
            assert value > 0, key
    assert results["dtype"] == "float32"
    assert results["torch"] == torch.__version__
    assert results["config"]["n_embd"] == 16
    plots = sorted(path.name for path in folder.rglob("*.png"))
    assert plots == ["bench_attention.png", "bench_decode.png", "bench_rmsnorm.png"]
    assert "greedy ids with and without a cache: equal" in lines


def test_figures_agree_with_each_other(everything):
    _, _, results = everything
    figures = results["figures"]
    for row in figures["train"]:
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(2 * 16)
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert [row["settings"] for row in figures["train"]] == ["llama", "gpt2"]
    # GPT-2: V + T + per block (4 C^2 + 4 C) + (2 x 4 C^2 + 5 C) + two norms of 2 C, and the last one
    C = 16
    assert figures["train"][1]["parameters"] == (300 + 16) * C + 2 * (12 * C * C + 13 * C) + 2 * C
    decode = {(row["what"], row["batch"]): row for row in figures["decode"] if "batch" in row}
    for part, tokens_a_row in ("prefill", 8), ("decode", 7):
        row = decode[part, 8]
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(8 * tokens_a_row)
    # tied, SwiGLU of 64, two norms and a qk_norm of 8 a block
    weights = 300 * C + 2 * (4 * C * C + 3 * C * 64 + 2 * C + 2 * 8) + C
    row = decode["decode", 1]
    assert row["weights_gb_per_s"] * row["ms"] * 1e6 == pytest.approx(7 * 4 * weights)
    held = {row["shard"]: row["held_mb"] for row in figures["processes"]}
    assert held["full"] == pytest.approx(held["none"] / 2, rel=0.01)
    half = len(figures["scale"]) // 2
    for foreseen, measured in zip(figures["scale"][:half], figures["scale"][half:], strict=True):
        assert foreseen["foreseen"] == measured["measured"]
        assert foreseen["messages"] == measured["messages"]
        assert foreseen["messages_mb"] == pytest.approx(measured["messages_mb"])
        assert foreseen["state_mb"] == pytest.approx(measured["state_mb"], rel=0.01)
    norm = {(row["what"], row["way"]): row["bytes"] for row in figures["rmsnorm"] if row["rows"] == 32}
    assert norm["norm", "forward"] == 2 * 32 * 16 * 4 + 32 * 4 + 16 * 4
    assert norm["norm", "backward"] == 3 * 32 * 16 * 4 + 32 * 4 + 2 * 16 * 4
    assert norm["add", "forward"] == 4 * 32 * 16 * 4 + 32 * 4 + 16 * 4


def test_experts_are_compared_with_a_dense_model_of_their_active_size(everything):
    _, _, results = everything
    rows = {(row["what"], row["optimizer"]): row for row in results["figures"]["experts"]}
    dense = rows["dense", "adamw"]
    experts = rows["experts", "adamw"]
    C, I = 16, 64
    router = 8 * C
    assert dense["parameters"] == dense["active"]
    assert experts["active"] - dense["active"] == 2 * router
    assert experts["parameters"] - experts["active"] == 2 * 6 * 3 * C * I // 2
    assert dense["against"] == rows["dense", "muon"]["against"] == 1
    assert experts["against"] == pytest.approx(experts["ms"] / dense["ms"])


def test_a_decoding_step_reads_the_experts_that_its_rows_go_to():
    model = bench_step.build_model(config("--mlp=moe", "--n_inner=8", "--n_expert=8"))
    expert = 4 * 3 * 16 * 8
    all_read = bench_decode.count_bytes_a_step(model, 4)
    assert all_read == 4 * sum(p.numel() for p in model.parameters())
    assert all_read - bench_decode.count_bytes_a_step(model, 1) == 2 * 6 * expert
    assert all_read - bench_decode.count_bytes_a_step(model, 2) == 2 * 4 * expert


def test_a_decoding_step_reads_no_row_of_a_table_but_its_own():
    model = bench_step.build_model(config("--pos=learned", "--tie_embeddings=false"))
    read = [p for name, p in model.named_parameters() if name not in ("wte.weight", "add_pos.weight")]
    assert bench_decode.count_bytes_a_step(model, 1) == 4 * sum(p.numel() for p in read)
    tied = bench_step.build_model(config())
    assert bench_decode.count_bytes_a_step(tied, 1) == 4 * num_params(tied)


@pytest.fixture
def seconds(monkeypatch):
    """Races are not run: the first rival takes a second, the next one two."""

    def by_place(rivals, *_):
        columns = "first", "median", "min", "max"
        return {name: dict.fromkeys(columns, float(i)) for i, name in enumerate(rivals, 1)}

    for module in bench_cache, bench_decode, bench_ops, bench_train:
        monkeypatch.setattr(module, "race", by_place)


def test_training_is_told_by_its_operations(seconds, monkeypatch):
    """6 a weight and token, 12 a score's number; of 2 n^3 a product's and of a data sheet's."""
    monkeypatch.setattr(bench_train, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench_train, "peak_memory", lambda device, step: step() or 1000)
    cfg = config("--optimizer=adamw", "--gradient_accumulation_steps=3")
    rows = list(bench_train.train_rows(cfg, resolve("cpu", "float32", "false"), ["float32"]))
    C = 16
    scores = 12 * 2 * C * 16
    llama = 300 * C + 2 * (4 * C * C + 3 * C * 64 + 2 * C) + C
    gpt2 = 300 * C + 2 * (12 * C * C + 13 * C) + 2 * C  # and places, which are no product
    for row, weights, time in zip(rows, (llama, gpt2), (1, 2), strict=True):
        flops = (6 * weights + scores) * 3 * 32 / time
        assert row["tokens_per_s"] == 3 * 32 / time
        assert row["mfu"] == pytest.approx(flops / 1e9)
        assert row["of_matmul"] == pytest.approx(flops / (2 * 1024**3 / 3))
    # weights, two moments, and of each tensor how many steps it has had
    assert rows[1]["peak_mb"] == pytest.approx(
        (1000 + 12 * (gpt2 + 16 * C) + 4 * (2 + 2 * 16 + 2)) / 1e6
    )
    for row in bench_train.bench_experts(cfg, resolve("cpu", "float32", "false")):
        assert row["mflop_a_token"] == pytest.approx((6 * row["active"] + scores) / 1e6)
        assert row["weights_mb"] == pytest.approx(4 * row["parameters"] / 1e6)
    reading, training = bench_train.bench_data(cfg, resolve("cpu", "float32", "false"))
    assert (reading["tokens_per_s"], training["tokens_per_s"]) == (32, 3 * 32 / 2)
    assert reading["against_training"] == 2 / 3


def test_reading_is_told_by_its_bytes(seconds, monkeypatch):
    model = bench_step.build_model(config()).eval()
    large = torch.zeros(1000)
    prefill, decode, whole = bench_decode.decode_rows(model, None, large, 2, 0)  # and the sum of large
    assert [row["tokens_per_s"] for row in (prefill, decode, whole)] == [2 * 8, 2 * 7 / 2, 2 * 8 / 3]
    assert decode["weights_gb_per_s"] == pytest.approx(4 * num_params(model) * 7 / 2 / 1e9)
    assert decode["memory_gb_per_s"] == pytest.approx(4000 / 4 / 1e9)
    assert decode["of_memory"] == pytest.approx(4 * num_params(model) * 7 / 2 / 1000)
    rows = bench_decode.cached_and_uncached_rows(config(), resolve("cpu", "float32", "false"), model)
    assert [row["against_half"] for row in rows] == [None, 2, 3 / 2, 4 / 3, None, 6 / 5, 7 / 6, 8 / 7]
    monkeypatch.setattr(bench_ops, "large_tensor", lambda device: torch.zeros(1000))
    assert bench_ops.measure_copy(CPU) == 8000
    compute = resolve("cpu", "float32", "false")
    for row in bench_ops.norm_rows(config(), compute, 4, 8, torch.float32, 8000, 0):
        assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(row["bytes"])
        assert row["of_copy"] * 8000 == pytest.approx(row["gb_per_s"] * 1e9)


def test_a_process_in_shards_is_foreseen_by_its_parts():
    cfg = config("--gradient_accumulation_steps=6")
    compute = replace(resolve("cpu", "float32", "false"), world_size=2, shards=True)
    row = bench_scale.foresee(cfg, compute, 1e9, bench_scale.Link(0.5, 1e6))
    C = 16
    block = 4 * C * C + 3 * C * 64 + 2 * C + 2 * 8
    weights = 300 * C + 2 * block + C
    assert row["gathered_mb"] == pytest.approx(4 * weights / 1e6)  # of two blocks both
    assert row["state_mb"] == pytest.approx((4 * weights + 8 * weights - 8 * (block - 48)) / 2 / 1e6)
    # rows that each of two processes takes: three micro-batches of two
    flops = (6 * weights + 12 * 2 * C * 16) * 16 * 6
    assert row["compute_ms"] == pytest.approx(flops / 1e6)
    assert row["gradients_mb"] == pytest.approx(4 * weights / 1e6)  # whole between micro-batches
    rest = 16 * 6 * 16 + 4 * model_sizes(cfg).buffers  # ids and targets; cos and sin
    parts = sum(row[f"{name}_mb"] for name in ("state", "gradients", "gathered", "kept"))
    assert row["peak_mb"] == pytest.approx(parts + rest / 1e6)
    assert row["messages_ms"] == pytest.approx(500 * row["messages"] + 1e3 * row["messages_mb"])


def test_the_cache_table_from_a_shell():
    result = shell("bench", "kvcache", "--json", *TINY, "--n_embd=48", "--n_head=6")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = json.loads(result.stdout.splitlines()[-1])["figures"]["kvcache"]
    # keys and values, 32 layers, 2,048 tokens, heads of 128 numbers, 2 bytes each
    assert {row["attention"]: (row["bytes"], row["mib"]) for row in rows[:3]} == {
        "MHA": (2 * 32 * 2048 * 32 * 128 * 2, 1024),
        "GQA": (2 * 32 * 2048 * 8 * 128 * 2, 256),
        "MQA": (2 * 32 * 2048 * 128 * 2, 32),
    }
    # of the 512 tokens in a window, and 8 more for a rewind
    assert (rows[3]["window"], rows[3]["bytes"]) == (512, 2 * 32 * 520 * 8 * 128 * 2)
    # two layers, two rows, 16 tokens, heads of 8 numbers, 4 bytes each; then a window of 2
    heads = [(row["n_kv_head"], row["attention"]) for row in rows[4:]]
    assert heads == [(6, "MHA"), (3, "GQA"), (2, "GQA"), (1, "MQA"), (6, "MHA")]
    for row in rows[4:]:
        places = 16 if row["window"] is None else 2 + 8
        assert row["stored_bytes"] == 2 * 2 * 2 * places * row["n_kv_head"] * 8 * 4


def test_the_table_of_windows_has_what_was_asked_for():
    rows = list(bench_cache.bench_windows(config("--window=4"), resolve("cpu", "float32", "false")))
    steps = [(row["what"], row["attention"], row["window"], row["tokens"]) for row in rows]
    assert steps == [
        ("training step", "full", None, 32),
        ("training step", "windows", 4, 32),
        ("one token", "full", None, 1),
        ("one token", "full", None, 15),
        ("one token", "windows", 4, 1),
        ("one token", "windows", 4, 15),
    ]
    ms = [row["ms"] for row in rows]
    against_full = [1, ms[1] / ms[0], 1, 1, ms[4] / ms[2], ms[5] / ms[3]]
    assert [row["against_full"] for row in rows] == pytest.approx(against_full)
    against_early = [1, ms[3] / ms[2], 1, ms[5] / ms[4]]
    assert [row["against_early"] for row in rows[2:]] == pytest.approx(against_early)


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
    expected = greedy(model, [3, 1], 15)
    assert len(set(expected)) > 3
    [uncached] = bench_decode.generate_uncached(model, [[3, 1]], 15)
    _, cached = bench_decode.generate_cached(model, [[3, 1], [3, 1]], 15)
    assert uncached == cached == expected


def test_the_shape_is_tiny_tomls_unless_it_is_given():
    def shape(*argv):
        cfg = configure(bench.Config, argv)
        width = (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.n_kv_head, cfg.n_inner)
        return *width, cfg.block_size, cfg.batch_size

    assert shape("--device=cpu", "--n_layer=3") == (3, 6, 192, 6, 512, 256, 12)
    assert configure(bench.Config, ["--device=cuda"]).n_embd == 384
    medium = str(ROOT / "configs/medium.toml")
    assert shape(medium, "--device=cpu") == (12, 12, 768, 12, 2048, 1024, 32)


def test_llamas_and_gpt2s_settings_are_their_files_under_the_given_ones():
    settings = bench_train.architectures(config("--n_kv_head=1", "--bias"))
    assert {
        name: (c.norm, c.pos, c.mlp, c.n_inner, c.n_kv_head, c.qk_norm, c.bias)
        for name, c in settings.items()
    } == {
        "llama": ("rmsnorm", "rope", "swiglu", 64, 1, False, True),
        "gpt2": ("layernorm", "learned", "gelu", 64, 1, False, True),
    }
    assert {c.n_inner for c in bench_train.architectures(config("--n_inner=24")).values()} == {24}
    [(name, cfg)] = bench_train.architectures(config("--pos=alibi")).items()
    assert name == "as given"
    assert cfg.pos == "alibi"
    assert cfg.qk_norm


def test_the_step_is_a_real_one_and_a_loss_of_nan_is_refused():
    step, model, optimizers = bench_step.make_training_step(config(), resolve("cpu", "float32", "false"))
    assert len(optimizers) == 2
    before = copied(model)
    step()
    assert not any(torch.equal(a, b) for a, b in zip(copied(model), before))
    model.wte.weight.data[:] = math.nan
    with pytest.raises(Refusal, match="the loss is nan") as e:
        step()
    assert e.value.status == 1


def test_on_a_gpu_steps_are_read_as_seldom_as_train_py_does(monkeypatch):
    figures = iter([1.0] * 3 + [math.nan] + [1.0] * 9)

    def update(**_):
        return torch.tensor(next(figures)), torch.ones(())

    monkeypatch.setattr(train, "make_step", lambda *_, **__: update)
    monkeypatch.setattr(bench_step, "to", lambda batch, device: batch)
    monkeypatch.setattr(bench_step, "build_trained", lambda *_: (torch.nn.Linear(1, 1),) * 2)
    gpu = Compute(GPU, "bfloat16", False, "")
    step, _, _ = bench_step.make_training_step(config("--log_interval=5", "--optimizer=adamw"), gpu)
    for _ in range(5):
        step()
    with pytest.raises(Refusal, match="the loss is nan"):
        step()


def test_error_is_the_largest_of_outputs_and_gradients():
    x = torch.randn(8, 4, requires_grad=True)
    w = torch.randn(4, requires_grad=True)
    dy = torch.ones(8, 4)
    errors = bench_ops.relative_errors(
        {
            "right": lambda x, w: x * w,
            "a hundredth too much": lambda x, w: 1.01 * x * w,
            "the gradient of w": lambda x, w: x * w + 0.5 * (w - w.detach()),
        },
        lambda x, w: x * w,
        (x, w),
        (dy,),
    )
    assert errors["right"] < 1e-6
    assert errors["a hundredth too much"] == pytest.approx(0.01, rel=1e-3)
    assert errors["the gradient of w"] > 0.1


def test_peak_memory_sees_memory_that_is_freed_again():
    def work():
        torch.ones(1 << 24).add_(1)  # 64 MiB

    peak = measure.peak_memory(CPU, work)
    if peak is None:
        pytest.skip("this system has no peak of a process's memory")
    assert 63 < peak / 2**20 < 80  # a page of it may have been there before


def test_a_peak_that_the_kernel_does_not_see_is_none(monkeypatch):
    """And not 0 bytes, which nothing takes."""
    if measure.peak_memory(CPU, lambda: torch.ones(1 << 24)) is None:
        pytest.skip("this system has no peak of a process's memory")
    monkeypatch.setattr(measure, "peak_resident_bytes", lambda: 1 << 30)
    assert measure.peak_memory(CPU, lambda: None) is None


def test_explicit_attention_is_attention():
    q, k, v = torch.randn(3, 1, 2, 9, 4).double()
    torch.testing.assert_close(
        bench_ops.explicit_attention(q, k, v),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_a_run_in_shards_is_foreseen_and_may_be_any_of_train_pys():
    [line] = [line for line in bench.__doc__.splitlines() if " scale " in line]
    _, command, _ = line.split("    ")
    argv = command.split()[2:]
    [row] = bench_scale.bench_scale(configure(bench.Config, argv, bench.BENCHES), None)
    assert row["processes"] == 64
    assert bench_scale.bench_scale(
        configure(bench.Config, [*argv, "--eval_only"], bench.BENCHES), None
    ) == [row]


def test_what_decode_alone_reads_is_refused_without_it(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: True)
    for argv in ["--draft=ngram"], ["--against=llama.cpp"]:
        cfg = config("train", "--init_from=out/ts", *argv)
        with pytest.raises(Refusal, match="are decode's: python bench.py decode"):
            bench.main(cfg)


@pytest.mark.parametrize("size", [0, 48])
def test_a_group_size_that_4_bits_have_not_is_refused_at_once(size):
    with pytest.raises(Refusal, match=f"group_size of 4 bits must be .* 128, not {size}"):
        config("quantize", f"--group_size={size}")


@pytest.mark.parametrize("block_size", [16, 24])
def test_a_folder_of_hugging_faces_is_decoded_beside_transformers(block_size, tmp_path, monkeypatch):
    """Its weights, in a context that is shorter than its own, give the ids that its own class gives."""
    pytest.importorskip("transformers")
    from test_hf import smollm, write_folder

    monkeypatch.setattr(measure, "LARGE", 1 << 16)
    peer = write_folder(tmp_path, "llama", smollm)
    argv = ["decode", f"--init_from=hf:{tmp_path}", f"--block_size={block_size}"]
    cfg = bench.take_shape(configure(bench.Config, [*argv, "--seconds=0", *PLAIN_CPU], bench.BENCHES))
    assert (cfg.n_layer, cfg.n_head, cfg.block_size) == (2, 4, block_size)
    model = bench_step.build_model(cfg)
    ids = torch.tensor([[5, 6, 7]])
    assert bench_decode.generate_cached(model, ids.tolist(), 12) == bench_decode.generate_hf(
        peer, ids, 12
    )
    rows = bench_decode.bench_decode(cfg, resolve("cpu", "float32", "false"))
    same = [row["same_ids"] for row in rows if row["what"] in ("transformers generate", "cached")]
    assert same == [True] * 6
    drawn = [(row["what"], row["a_prompt"]) for row in rows if "samples_per_s" in row]
    assert drawn == [(name, n) for n in (1, 8) for name in ("samples", "transformers samples")]
    with pytest.raises(Refusal, match="has n_layer=2, which cannot become 3"):
        bench.main(configure(bench.Config, [*argv, "--n_layer=3"], bench.BENCHES))


def test_a_checkpoint_is_trained_as_it_is_and_its_shape_alone_is_varied(tmp_path, monkeypatch):
    tokenizer = Tokenizer.char(["abcdefg"])
    c = ModelConfig(
        n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=tokenizer.vocab_size, pos="alibi"
    )
    model = Transformer(c)
    checkpoint_file.save(
        f"{tmp_path}/ckpt.pt", model, tokenizer, {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    argv = [f"--init_from={tmp_path}", "--batch_size=2", "--seconds=0", *PLAIN_CPU]
    cfg = bench.take_shape(configure(bench.Config, argv))
    compute = resolve("cpu", "float32", "false")
    [row] = bench_train.train_rows(cfg, compute, ["float32"])
    assert (row["settings"], row["parameters"]) == ("as given", num_params(model))
    dense, experts, *_ = bench_train.bench_experts(cfg, compute)
    assert dense["parameters"] == num_params(model) < experts["parameters"]
    caches = [row for row in bench_cache.bench_kvcache(cfg, compute) if row["shape"] != "7B"]
    assert [(row["n_kv_head"], row["window"]) for row in caches] == [
        (4, None),
        (2, None),
        (1, None),
        (4, 4),
    ]
    windows = []

    def step_of(model, position):
        windows.append(model.config.window)
        return lambda: None

    monkeypatch.setattr(bench_cache, "next_token_step", step_of)
    list(bench_cache.bench_windows(cfg, compute))
    assert windows == [0, 0, 4, 4]


def test_without_hugging_face_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(measure, "LARGE", 1 << 16)
    for name in "transformers", "tokenizers":
        monkeypatch.setitem(sys.modules, name, None)
    bench.main(config("decode", "--pos=alibi"))
    bench.main(config("decode"))
    out = capsys.readouterr().out
    assert "no counterpart" in out
    assert "pip install transformers" in out
    assert out.count("prefill") >= 4


# As much of nanoGPT's model.py as is called
CHECKOUT = """
from types import SimpleNamespace as GPTConfig
import torch
import torch.nn.functional as F

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
        self.config = config

    def get_num_params(self):
        return self.weight.numel()

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(CHECKOUT)
    monkeypatch.setattr(bench_learning, "VALIDATION", 20)
    monkeypatch.setattr(bench_learning, "TOLD", 50)
    return str(tmp_path)


def test_stories_to_learn_from_are_told_once(checkout):
    ids, held_out, tokenizer = bench_learning.fresh_stories(30000, 400, seed=3)
    n = (ids == tokenizer.eot).sum()
    assert len(ids) >= 30000 and n % 50 == 0 and n > 100
    texts = toy_stories.texts(20 + n, 3)
    assert tokenizer.decode(held_out.tolist()) == "".join(f"{text}{EOT}" for text in texts[:20])
    assert tokenizer.decode(ids.tolist()) == "".join(f"{text}{EOT}" for text in texts[20:])


def test_time_to_a_loss_is_that_of_steps_after_the_start(clock):
    cfg = replace(config(), max_iters=25, eval_interval=10, learning_rate=0.1, warmup_iters=0)
    groups = [{}, {"lr_scale": 8}]
    optimizers = [SimpleNamespace(param_groups=[group]) for group in groups]
    losses = iter([3.0, 2.0, 1.0])

    def validate():
        clock(1000)
        return next(losses)

    def update(step):
        clock(60 if step == 0 else 2)

    start, points = bench_learning.learn(update, optimizers, validate, cfg, CPU)
    assert start == 60 + 4 * 2
    assert points == [(10, 5 * 2, 3.0), (20, 15 * 2, 2.0), (25, 20 * 2, 1.0)]
    assert groups[1]["lr"] == 8 * groups[0]["lr"] > 0


def test_nanogpt_learns_by_its_own_rates_and_ours_by_train_pys(checkout):
    """Both beside loops written out; the tokens are counted: rows are never read twice."""
    argv = "--steps=120 --share=0.2 --eval_interval=8 --eval_tokens=0 --gradient_accumulation_steps=2"
    cfg = config("learning", f"--against={checkout}", "--warmup_iters=4", *argv.split())
    compute = resolve("cpu", "float32", "false")
    theirs, ours = bench_learning.bench_learning(cfg, compute)

    ids, held_out, tokenizer = bench_learning.fresh_stories(120 * 64 + 32, 300, cfg.seed)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size)
    starts = epoch_starts(len(ids), 16, cfg.seed, 0)
    assert len(starts) >= 120 * 4
    rows = torch.stack([torch.from_numpy(ids[start : start + 17].astype(int)) for start in starts])
    held_out = torch.from_numpy(held_out.astype(int))

    torch.manual_seed(cfg.seed)
    module = nanogpt.load(checkout)
    model = module.GPT(module.GPTConfig(vocab_size=cfg.vocab_size, n_layer=2, n_embd=16, block_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(120):
        rate = 1e-3 * (step + 1) / 101
        if step >= 100:
            rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / 20)) * 9e-4
        optimizer.param_groups[0]["lr"] = rate
        some = rows[4 * step : 4 * step + 4]
        optimizer.zero_grad()
        model(some[:, :-1].contiguous(), some[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        loss = model(held_out[:-1], held_out[1:])[1].item()  # it sees one token at a time
    assert theirs["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert (theirs["steps"], theirs["reached_step"], theirs["of_time"]) == (120, 120, 1)

    cfg = replace(cfg, max_iters=24)
    model, _ = bench_step.build_trained(cfg, compute)
    optimizers = make_optimizers(model, cfg, compute)
    losses = []
    for step in range(24):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = get_lr(step, cfg) * group["lr_scale"]
        parts = rows[4 * step : 4 * step + 4].split(2)
        batches = [{"idx": part[:, :-1], "targets": part[:, 1:]} for part in parts]
        train.train_step(model, optimizers, batches, compute, grad_clip=1.0)
        if step % 8 == 7:
            losses.append(evaluate(model, held_out.numpy(), 16, 2, compute))
    assert ours["val_loss"] == losses[-1]
    reached = [8 * (i + 1) for i, loss in enumerate(losses) if loss <= theirs["val_loss"]]
    assert ours["reached_step"] == reached[0] < ours["steps"] == 24
    assert ours["of_time"] == ours["reached_s"] / theirs["s"]


def test_nanogpt_is_a_rival_from_a_checkout(checkout, capsys):
    bench.main(config("train", f"--against={checkout}"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:2] for line in lines[-5:]]
    pairs = [["llama", "adamw"], ["llama", "muon"], ["gpt2", "adamw"], ["gpt2", "muon"]]
    assert rows == [["nanoGPT", "adamw"], *pairs]
    for argv in [], [f"--against={checkout}", "--init_from=out/ts"]:
        with pytest.raises(Refusal, match="from scratch, against nanoGPT: --against=FOLDER"):
            bench.main(config("learning", *argv))
    with pytest.raises(
        Refusal, match="against=lama.cpp is a checkout of nanoGPT, for train and learning"
    ):
        bench.main(config("decode", "--against=lama.cpp"))
