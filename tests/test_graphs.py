"""Static steps against the plain ones, on the processor, where a replay is a call; and captured, on a GPU."""

import gc
import itertools
import math
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scripts import printed, written
from test_model import V, build, prompts_of
from test_train import lab, run_train  # lab is a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import experts
import graphs
import quantize
import quantized
import sample
import train
from cache import StaticCache
from data import to
from device import Compute, resolve
from generate import generate, next_token, prefill
from graphs import (
    CHUNK,
    FEWEST,
    Decoder,
    Graph,
    TrainingStep,
    captures_steps,
    decoding_message,
    graph_message,
    joint_projections,
)
from optim import make_optimizers

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GREEDY = dict(temperature=0)
SAMPLED = dict(temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.2, logps=True)
MODELS = {
    "llama": {},
    "gqa": dict(n_kv_head=2, qk_norm=False),
    "gpt2": dict(norm="layernorm", pos="learned", mlp="gelu", bias=True, qk_norm=False),
    "post": dict(norm_position="post", pos="sinusoidal", n_kv_head=1),
    "alibi": dict(pos="alibi"),
    "experts": dict(mlp="moe"),
    "windows": dict(window=5, window_pattern="SL"),
    "endless": dict(window=5),
}
WAITS = {
    "aten._local_scalar_dense.default",  # item(), int() and bool()
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten.lift_fresh.default",  # numbers of the host: torch.tensor(list)
}


def texts(model, prompts, n, **settings):
    """Returns what generate() makes of prompts: ids, end, stop and log p of each row."""
    *_, rows = generate(model, prompts, n, **settings)
    return [(row.ids, row.end, row.stop) for row in rows], [row.logps for row in rows]


def assert_equal_texts(model, prompts, n, rtol=1e-9, **settings):
    expected, logps = texts(model, prompts, n, graph=False, **settings)
    static, static_logps = texts(model, prompts, n, graph=True, **settings)
    assert static == expected
    for row, static_row in zip(logps, static_logps):
        assert static_row == pytest.approx(row, rel=rtol)
    return expected


def started(model, prompts, n, capacity=None):
    """Returns a Decoder of n greedy steps after the prompts, and its StaticCache."""
    logits, cache = prefill(model, prompts, capacity or n)
    cache = StaticCache(cache, model.config)
    uniform = torch.zeros(len(prompts), 1, device=model.device)

    def draw(logits, uniform):
        return next_token(logits, 0.0), None

    return Decoder(model, cache, logits.argmax(-1), draw, lambda: uniform, n), cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_steps(name, settings):
    model = build(**MODELS[name]).double()
    for lengths in (5,), (1, 7, 4, 12), (6, 6):
        assert_equal_texts(model, prompts_of(*lengths), 12, **settings)


@pytest.mark.parametrize("n", [1, CHUNK, CHUNK + 1, 60])
def test_chunks_of_any_number_of_steps(n):
    model = build().double()
    rows = assert_equal_texts(model, prompts_of(3, 9), n, **SAMPLED)
    assert [len(ids) for ids, _, _ in rows] == [min(n, 22), min(n, 16)]


def test_in_float32_greedy_text_is_the_same_too():
    for name in MODELS:
        assert_equal_texts(build(**MODELS[name]), prompts_of(3, 9), 12, rtol=1e-4, **GREEDY)


def test_rows_that_stop_leave_the_others_as_they_are():
    model = build().double()
    prompts = prompts_of(3, 9, 5, 2, 7, 12)
    rows = assert_equal_texts(model, prompts, 20, stop=list(range(0, V, 12)), **SAMPLED)
    assert {end for _, end, _ in rows} >= {"stop"}
    assert len({len(ids) for ids, _, _ in rows}) > 2


def test_a_decoder_is_gone_when_its_text_is():
    """Not when the garbage collector comes, which frees a GPU's memory late."""
    gc.disable()
    try:
        with torch.inference_mode():
            decoder, cache = started(build(), prompts_of(3, 9), 5)
            list(decoder)
        watched = weakref.ref(decoder), weakref.ref(cache)
        del decoder, cache
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("past_end", ["stop", "recompute", "slide"])
@pytest.mark.parametrize("lengths", [(22, 3), (23, 5, 24)])
def test_the_end_of_the_context(past_end, lengths):
    """block_size is 24; rows end or are read anew one after the other."""
    model = build(**MODELS["endless" if past_end == "slide" else "gpt2"]).double()
    for stop in (), (3, 17, 40):
        assert_equal_texts(model, prompts_of(*lengths), 45, past_end=past_end, stop=stop, **SAMPLED)


def test_the_row_that_was_to_be_read_anew_may_end_before():
    """At each of its tokens, the last of those that are planned too."""
    model = build().double()
    prompts = prompts_of(19, 3)
    [(ids, _, _), _] = assert_equal_texts(model, prompts, 8, past_end="recompute", **GREEDY)
    for id in ids:
        assert_equal_texts(model, prompts, 8, past_end="recompute", stop=(id,), **GREEDY)


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_gives_the_logits_of_a_cache(name):
    model = build(**MODELS[name]).double()
    with torch.no_grad():
        for lengths in (4, 4), (3, 8):
            prompts = prompts_of(*lengths)
            _, cache = prefill(model, prompts, 16)
            _, other = prefill(model, prompts, 16)
            static = StaticCache(other, model.config)
            for i in range(14):
                idx = torch.tensor([[i], [2 * i]])
                expected = model.next_logits(idx, cache)
                torch.testing.assert_close(model.next_logits(idx, static), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "experts"])
def test_q_k_and_v_as_one_product_give_the_same_logits(name):
    """As a GPU has them; a processor has no use for it."""
    model = build(**MODELS[name]).double()
    with torch.no_grad():
        caches = [StaticCache(prefill(model, prompts_of(3, 8), 16)[1], model.config) for _ in range(2)]
        caches[1].joint = joint_projections(model)
        assert sorted(caches[1].joint) == list(range(model.config.n_layer))
        for i in range(3):
            expected, logits = (model.next_logits(torch.tensor([[i], [2 * i]]), x) for x in caches)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_rows_at_different_places_are_refused():
    model = build()
    _, cache = prefill(model, prompts_of(4, 4), 8)
    cache.rewind([0, 2])
    with pytest.raises(ValueError, match="different lengths"):
        StaticCache(cache, model.config)


class Waits(TorchDispatchMode):
    """Notes the ops that wait for a GPU, or send it numbers of the host: what no capture allows."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in WAITS:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def waits_of(function):
    with Waits() as waits:
        function()
    return waits.names


def test_what_waits_is_noted():
    assert waits_of(lambda: torch.ones(2).sum().item()) == ["aten._local_scalar_dense.default"]
    assert waits_of(lambda: torch.tensor([1.0, 2.0])) == ["aten.lift_fresh.default"]


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_nothing_where_it_is_captured(name):
    """In inference mode, as generate() has it."""
    model = build(**MODELS[name]).double()  # float32 is NumPy's on a processor: generate.likeliest
    for lengths in (4, 4), (3, 8):
        decoder, _ = started(model, prompts_of(*lengths), 12)
        decoder.step()
        assert not waits_of(decoder.step)


@torch.inference_mode()
def test_drawing_waits_for_nothing():
    logits = torch.randn(3, V, dtype=torch.float64)  # float32 is NumPy's on a processor
    uniform = torch.rand(3, 1, dtype=torch.float64)
    for temperature, top_k, top_p in itertools.product((0.0, 0.8), (0, 5), (1.0, 0.9)):
        assert not waits_of(lambda: next_token(logits, temperature, top_k, top_p, uniform))


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_reads_and_writes_stays_where_it_is(name):
    """Tensors by their addresses, and nothing else changes from step to step."""

    def state():
        held = []
        for thing in (decoder, cache):
            for key, value in sorted(vars(thing).items()):
                values = (
                    value
                    if isinstance(value, list)
                    else value.values()
                    if isinstance(value, dict)
                    else [value]
                )
                for x in values:
                    held.append((key, x.data_ptr() if isinstance(x, torch.Tensor) else x))
        return held

    decoder, cache = started(build(**MODELS[name]), prompts_of(3, 8), 12)
    before = state()
    for _ in range(12):
        decoder.step()
        assert state() == before


@torch.inference_mode()
def test_steps_past_the_end_harm_nothing():
    """Rows that have ended go on: learned positions have no more places, and the cache no more slots."""
    model = build(pos="learned")
    decoder, cache = started(model, prompts_of(20, 3), 60, capacity=30)
    for _ in range(60):
        decoder.step()
    assert cache.pos.tolist() == [[23], [23]]
    assert cache.place.tolist() == [cache.last_place]
    with torch.no_grad():
        assert model.next_logits(decoder.ids[:, None], cache).isfinite().all()


def test_a_graph_on_a_processor_is_a_call():
    calls = []
    graph = Graph(lambda: calls.append(1), torch.device("cpu"))
    for _ in range(6):
        graph()
    assert len(calls) == 6


class Ops(TorchDispatchMode):
    """The ops of a function, noted while it runs. A replay runs them again on the very tensors, as a GPU does: what
    was a number or a choice of Python stays what it was.
    """

    def __init__(self, function):
        super().__init__()
        self.ops = []
        with self:
            function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, results))
        return results

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, noted in self.ops:
            for held, x in zip(tree_leaves(noted), tree_leaves(func(*args, **kwargs))):
                if isinstance(x, torch.Tensor):
                    held.copy_(x)


class NotedGraph(Graph):
    """A Graph on the processor whose capture is a call that is noted."""

    n_replays = 0

    def __call__(self):
        self.n_calls += 1
        if self.graph is not None:
            NotedGraph.n_replays += 1
            self.graph.replay()
        elif self.n_calls <= graphs.WARM_UP:
            self.function()
        else:
            self.graph = Ops(self.function)


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(graphs, "Graph", NotedGraph)
    monkeypatch.setattr(NotedGraph, "n_replays", 0)


def test_a_replay_repeats_ops_and_no_python(noted):
    number, total = 1.0, torch.zeros(())
    graph = graphs.Graph(lambda: total.add_(number), torch.device("cpu"))
    for number in 1.0, 1.0, 1.0, 2.0, 5.0, 7.0:
        graph()
    assert total == 3 + 3 * 2


@pytest.mark.parametrize("name", MODELS)
def test_replays_write_the_text_of_plain_steps(name, noted):
    model = build(**MODELS[name]).double()
    for lengths in (5,), (1, 7, 4, 12):
        assert_equal_texts(model, prompts_of(*lengths), 20, stop=(3, 17), **SAMPLED)
    assert NotedGraph.n_replays > 12


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("settings", [{}, dict(dropout=0.3), dict(n_micro=3)], ids=str)
def test_replays_train_as_plain_steps_do(optimizer, settings, noted, monkeypatch):
    """With what a GPU is given: rates in tensors, and steps that are left out without asking."""

    def step_unless(optimizers, is_skipped):
        for optimizer in optimizers:
            optimizer.step(is_skipped.float())

    class Step(TrainingStep):
        def __init__(self, *args):
            super().__init__(*args)
            self.rates = [torch.zeros(()) for _ in self.groups]

    monkeypatch.setattr(train, "step_unless", step_unless)
    settings = settings | dict(optimizer=optimizer, n_steps=9)
    expected, weights, _, _ = trained(False, **settings)
    monkeypatch.setitem(globals(), "TrainingStep", Step)
    results, static_weights, _, _ = trained(True, **settings)
    assert NotedGraph.n_replays == 5
    # Muon rounds a rate in a tensor otherwise than a number
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(static_weights, weights, rtol=1e-4, atol=1e-6)


def test_graphs_of_a_device_share_a_stream_however_it_is_named(monkeypatch):
    """train.py names a GPU "cuda", and its tensors "cuda:0"."""
    current = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    graphs.side_stream.cache_clear()
    first, second = (Graph(None, torch.device(name)) for name in ("cuda", "cuda:0"))
    assert first.stream is second.stream
    graphs.side_stream.cache_clear()


def test_a_pool_in_which_a_capture_failed_is_left(monkeypatch, capsys):
    """Torch 2.11's allocator of pinned memory goes on to record to it, and would refuse each later capture."""

    class Captured:
        def pool(self):
            return 0, 1

    class Failing:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("the capture was invalidated")

    cuda = {
        "CUDAGraph": Captured,
        "current_stream": lambda device: SimpleNamespace(device_index=0),
        "graph": Failing,
        "graph_pool_handle": lambda: (0, 2),
        "set_stream": lambda stream: None,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    monkeypatch.setattr(graphs, "captured", weakref.WeakSet())
    alive = Captured()
    graphs.captured.add(alive)
    assert graphs.memory_pool() == (0, 1)
    graph = Graph(lambda: None, torch.device("cpu"))
    graph.stream = None
    graph.capture()
    assert graph.is_plain
    assert "invalidated" in capsys.readouterr().err
    assert graphs.memory_pool() == (0, 2)


def tokens_of(step, n_micro, T=12):
    """Returns the micro-batches of a step: each target is the token itself, which is soon learned."""
    g = torch.Generator().manual_seed(step)
    rows = torch.randint(V, (n_micro, 3, T), generator=g)
    return [{"idx": idx, "targets": idx} for idx in rows]


def trained(
    is_static, n_steps=6, n_micro=1, device="cpu", T=lambda step: 12, compile="false", **settings
):
    """Returns (losses and norms, weights, the optimizers' state, the step) of a training by train_step itself or by
    TrainingStep; the rate changes with each step, and the fourth one is not finite.
    """
    compute = resolve(device, "float32", compile)
    cfg = replace(CFG, dropout=settings.get("dropout", 0.0), gradient_accumulation_steps=n_micro)
    cfg.optimizer = settings.pop("optimizer", "muon")
    model = build(**settings).to(compute.device).train()
    optimizers = make_optimizers(model, cfg, compute)
    step = partial(train.train_step, model, optimizers, compute=compute, grad_clip=0.5)
    if is_static:
        step = TrainingStep(step, optimizers, train.seed_dropout, compute.device)
    weight = model.wte.weight.data
    results = []
    for number in range(n_steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (number + 1)
        if number == 3:
            finite = weight[0, 0].clone()
            weight[0, 0] = math.inf
        elif number == 4:
            weight[0, 0] = finite
        batches = [to(batch, compute.device) for batch in tokens_of(number, n_micro, T(number))]
        results += step(batches=batches, seed=(7, number))
        assert all(type(group["lr"]) is float for o in optimizers for group in o.param_groups)
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    results = torch.stack(results).cpu() if results else None
    return results, [p.detach() for p in model.parameters()], states, step


CFG = train.Config(vocab_size=V)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(dropout=0.3),
        dict(n_micro=3),
        dict(pos="learned", tie=False),
        dict(pos="alibi"),
        dict(mlp="moe"),
    ],
    ids=str,
)
def test_static_training_steps_are_the_plain_ones_to_the_bit(optimizer, settings):
    expected, weights, states, _ = trained(False, optimizer=optimizer, **settings)
    results, static_weights, static_states, _ = trained(True, optimizer=optimizer, **settings)
    assert expected.isfinite().sum() == 10  # but for the loss and the norm of one step
    assert torch.equal(results.nan_to_num(), expected.nan_to_num())
    assert all(map(torch.equal, static_weights, weights))
    assert len(states) == len(static_states) > 0
    assert all(map(torch.equal, static_states, states))


def test_the_first_batches_stay_as_they_are():
    _, _, _, step = trained(True, n_steps=0)
    first = tokens_of(0, 2)
    for number in range(3):
        step(batches=tokens_of(number, 2) if number else first, seed=(7, number))
    for batch, expected in zip(first, tokens_of(0, 2)):
        assert torch.equal(batch["idx"], expected["idx"])


def test_batches_of_another_shape_go_through_a_plain_step():
    lengths = {"T": lambda step: 12 - step % 2}
    expected, weights, _, _ = trained(False, **lengths)
    results, static_weights, _, _ = trained(True, **lengths)
    assert torch.equal(results.nan_to_num(), expected.nan_to_num())
    assert all(map(torch.equal, static_weights, weights))


@pytest.mark.parametrize("settings", [{}, dict(pos="alibi"), dict(mlp="moe")], ids=str)
def test_a_training_step_asks_only_what_a_processor_is_asked(settings, monkeypatch):
    """Whether each optimizer's step is left out, in step_unless. Called as for a GPU they ask nothing."""
    monkeypatch.setattr(
        experts, "has_grouped_mm", lambda *_: False
    )  # it asks where an expert's rows end
    _, _, _, step = trained(True, n_steps=1, **settings)
    assert waits_of(step.work) == ["aten._local_scalar_dense.default"] * len(step.optimizers)
    _, weights, _, step = trained(True, n_steps=1, **settings)
    before = [weight.clone() for weight in weights]
    for is_skipped in torch.ones(()), torch.zeros(()):
        assert all(map(torch.equal, weights, before))
        for optimizer in step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.01)
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            assert not waits_of(partial(optimizer.step, is_skipped))
    assert not any(map(torch.equal, weights, before))


def test_what_is_not_captured_is_said():
    gpu = Compute(torch.device("cuda"), "bfloat16", True, "")
    for cfg in CFG, replace(CFG, dropout=0.1), replace(CFG, gradient_accumulation_steps=2):
        assert graph_message(cfg, gpu) == ", a CUDA graph a step"
    cases = {
        "several processes": (CFG, replace(gpu, world_size=2)),
        "float16's loss scaler": (CFG, replace(gpu, dtype_name="float16")),
        "gradient_checkpointing": (replace(CFG, gradient_checkpointing=True), gpu),
        "dropout, drawn anew for each micro-batch": (
            replace(CFG, dropout=0.1, gradient_accumulation_steps=2),
            gpu,
        ),
    }
    for reason, (cfg, compute) in cases.items():
        assert graph_message(cfg, compute) == f", no CUDA graph ({reason})"
        assert not captures_steps(cfg, compute)
    assert graph_message(CFG, gpu, is_static=False) == ", no CUDA graph (rows of different lengths)"
    cpu = resolve("cpu", "float32", "false")
    assert graph_message(CFG, cpu) == graph_message(CFG, cpu, is_static=False) == ""
    step = train.make_step(build(), [], CFG, cpu)
    assert step.func is train.train_step


def test_what_is_not_captured_of_a_text_is_said():
    gpu = torch.device("cuda")
    for settings in {}, dict(is_compiled=True):
        assert decoding_message(gpu, FEWEST + 1, **settings) == ", a CUDA graph a token"
    assert decoding_message(gpu, FEWEST, is_compiled=True) == ", a CUDA graph a token"
    assert decoding_message(gpu, FEWEST) == f", no CUDA graph (at most {FEWEST} tokens)"
    assert decoding_message(gpu, 500, has_draft=True) == ", no CUDA graph (a draft guesses)"
    assert decoding_message(torch.device("cpu"), 500) == ""


@needs_gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(dropout=0.3), dict(n_micro=3), dict(compile="true"), dict(pos="alibi"), dict(mlp="moe")],
    ids=str,
)
def test_on_a_gpu_training_steps_are_captured_and_learn_the_same(optimizer, settings):
    settings = settings | dict(device="cuda", n_steps=12, optimizer=optimizer)
    expected, weights, _, _ = trained(False, **settings | dict(compile="false"))
    results, static_weights, _, step = trained(True, **settings)  # compile: Muon alone
    assert step.graph.graph is not None
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    for static_weight, weight in zip(static_weights, weights):
        torch.testing.assert_close(static_weight, weight, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_steps_are_captured_and_write_the_plain_text(name):
    model = build(**MODELS[name] | dict(block_size=96)).cuda()
    with torch.inference_mode():
        decoder, _ = started(model, prompts_of(3, 8), 12)
        list(decoder)
        assert decoder.graph.graph is not None
        assert decoder.number.item() == 12
    for settings in GREEDY, SAMPLED:
        assert_equal_texts(model, prompts_of(3, 9, 1), 60, rtol=1e-3, stop=[5], **settings)


@needs_gpu
def test_a_capture_that_fails_leaves_plain_calls(capsys):
    total = torch.zeros((), device="cuda")
    alive = Graph(lambda: total.mul_(1), total.device)  # whose pool the next one shares
    for _ in range(5):
        alive()

    def add():
        total.add_(1)
        total.item()  # which no capture allows

    graph = Graph(add, total.device)
    for _ in range(6):
        graph()
    assert graph.is_plain
    assert total.item() == 6
    assert "one by one" in capsys.readouterr().err
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))  # the generator draws again
    another = Graph(lambda: total.add_(1), total.device)
    for _ in range(6):
        another()
    assert not alive.is_plain and not another.is_plain and total.item() == 12


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_of_integers_are_compiled_as_a_whole(bits, monkeypatch):
    """Though a matrix looks for a kernel at its first product of a few rows: in the first step."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch.compiler.reset()
    model = build(n_embd=64, n_inner=64)
    settings = quantize.Config(to="nowhere", bits=bits, group_size=32 if bits == 4 else 0, method="rtn")
    codes, _ = quantize.quantize_model(model, settings, None)
    quantization = quantized.Quantization(bits, settings.group_size)
    plain, model = (quantized.quantized(model, quantization, codes).bfloat16() for _ in range(2))
    prompts = prompts_of(9, 12)  # too many rows for a kernel
    assert texts(model, prompts, 8, compile=True, **GREEDY) == texts(
        plain, prompts, 8, graph=True, **GREEDY
    )
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_steps_write_the_same_text(lab, capsys):
    """In float32, as inductor computes it; takes a C++ compiler. Texts of one shape are compiled for once."""
    model = build(pos="learned")
    for settings in GREEDY, SAMPLED:
        expected, _ = texts(model, prompts_of(3, 9), 20, graph=False, **settings)
        assert texts(model, prompts_of(3, 9), 20, compile=True, **settings)[0] == expected
    frames = torch._dynamo.utils.counters["frames"]
    n_compiled = frames["ok"]
    texts(model, prompts_of(3, 9), 20, compile=True, **settings)
    assert frames["ok"] == n_compiled > 0

    run_train(lab, "--max_iters=1", "--overwrite", "--out_dir=text")
    argv = ["--out_dir=text", "--max_new_tokens=40", "--device=cpu"]
    plain, compiled = (
        printed(capsys, sample, *argv, f"--compile={value}", folder=lab) for value in ("auto", "true")
    )
    assert written(compiled) == written(plain)
    assert "compiled in" in compiled
    assert "compile=True" in compiled
