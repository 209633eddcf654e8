"""Quantized models: integers by their definitions, files that only readers read, text as without."""

import contextlib
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import call, printed, written
from test_model import V, build, tokens

import bench
import benches.decode as bench_decode
import benches.quantize as bench_quantize
import checkpoint
import checkpoint_file
import dataset
import export_onnx
import finetune_lora
import hf
import prepare
import quantize
import quantized
import rounding
import sample
import train
from config import Refusal, configure
from data import prompt_ids
from device import resolve
from generate import generate
from model import Transformer
from quantized import Codes, Quantization, QuantizedLinear, linears
from score import document_nats, evaluate
from sizes import num_params
from tokenizer import Tokenizer

CPU = torch.device("cpu")
BITS = [(8, 0), (4, 32)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n, n_in, seed=1):
    """Returns inputs (n, n_in) of which some are large and all depend on each other."""
    x = draw(n, n_in, seed=seed) @ draw(n_in, n_in, seed=seed + 1)
    return x * (1 + 9 * (torch.arange(n_in) % 7 == 0))


# -----------------------------------------------------------------------------------------------------
# Integers by their definitions, float64


def to_number(code, scale, zero):
    return (code - zero) * scale


def range_of(w, bits):
    """Returns the scale and the zero of a list of numbers, as Python floats, and the integers there are."""
    if bits == 8:
        return round_to_bfloat16(max(abs(x) for x in w) / 127), 0, range(-127, 128)
    lowest, highest = min(0, *w), max(0, *w)
    scale = round_to_bfloat16((highest - lowest) / 15)
    return scale, round(-lowest / scale), range(16)


def round_to_bfloat16(x):
    return torch.tensor(x).bfloat16().item()


def nearest(x, scale, zero, choices):
    return min(choices, key=lambda code: abs(to_number(code, scale, zero) - x))


@pytest.mark.parametrize("bits, group_size", BITS)
def test_rtn_takes_the_nearest_of_all_integers(bits, group_size):
    W = draw(3, 64)
    codes = rounding.rtn(W, bits, group_size)
    for row, number_row, code_row in zip(W.tolist(), codes.dense().tolist(), codes.codes.tolist()):
        for first in range(0, 64, group_size or 64):
            w = row[first : first + (group_size or 64)]
            scale, zero, choices = range_of(w, bits)
            for i, x in enumerate(w, first):
                code = nearest(x, scale, zero, choices)
                assert code_row[i] == code
                assert number_row[i] == to_number(code, scale, zero)


def optimal_brain_surgeon(W, H, bits, group_size, order, chosen_first):
    """GPTQ as it is defined: column after column is rounded, and each time the columns that are left
    change by what makes up for it best, by the inverse of their part of H.
    """
    W = W.clone()
    n_out, n_in = W.shape
    width = group_size or n_in
    result = torch.zeros_like(W)
    ranges = {}
    if chosen_first:
        for r, first in itertools.product(range(n_out), range(0, n_in, width)):
            ranges[r, first // width] = range_of(W[r, first : first + width].tolist(), bits)
    left = list(order)
    while left:
        column = left[0]
        if not chosen_first and column % width == 0:
            for r in range(n_out):
                ranges[r, column // width] = range_of(W[r, column : column + width].tolist(), bits)
        inverse = torch.linalg.inv(H[left][:, left])
        for r in range(n_out):
            scale, zero, choices = ranges[r, column // width]
            x = W[r, column].item()
            result[r, column] = to_number(nearest(x, scale, zero, choices), scale, zero)
            W[r, left] -= (x - result[r, column]) / inverse[0, 0] * inverse[0]
        left = left[1:]
    return result


@pytest.mark.parametrize("bits, group_size", BITS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_surgery_a_column_at_a_time(bits, group_size, act_order):
    """160 columns: more than are changed at once."""
    n_in = 160
    W = draw(2, n_in)
    X = correlated(400, n_in)
    H = X.T @ X
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(n_in, dtype=H.dtype)
    order = list(range(n_in))
    if act_order:
        order.sort(key=lambda i: -H[i, i].item())
    chosen_first = act_order or bits == 8
    expected = optimal_brain_surgeon(W, damped, bits, group_size, order, chosen_first)
    codes = rounding.gptq(W, H, bits, group_size, 0.01, act_order)
    assert torch.equal(codes.dense(), expected)
    error = (X @ (codes.dense() - W).T).norm()
    assert error < 0.8 * (X @ (rounding.rtn(W, bits, group_size).dense() - W).T).norm()
    assert rounding.error_of(W, codes, H) == pytest.approx(((error / (X @ W.T).norm()) ** 2).item())


def test_gptq_rounds_what_no_input_ever_reaches():
    """Inputs that were always 0 leave H without an inverse; their weights are not thrown away."""
    X = correlated(100, 32)
    X[:, 5] = 0
    W = draw(4, 32)
    codes = rounding.gptq(W, X.T @ X, 4, 32)
    assert ((codes.dense() - W)[:, 5].abs() <= 0.51 * codes.scales[:, 0]).all()
    no_inputs = rounding.gptq(W, torch.zeros(32, 32, dtype=torch.float64), 4, 32)
    assert torch.equal(no_inputs.codes, rounding.rtn(W, 4, 32).codes)


@pytest.mark.parametrize("bits, group_size", BITS)
def test_awq_takes_the_power_whose_outputs_are_nearest(bits, group_size):
    X = correlated(300, 64)
    matrices = [draw(5, 64, seed=3), draw(7, 64, seed=4)]
    errors = {}
    for step in range(20):
        s = X.abs().mean(0) ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors[step] = 0
        for W in matrices:
            Q = rounding.rtn(W * s, bits, group_size).dense()
            errors[step] += ((X / s) @ Q.T - X @ W.T).square().sum().item()
    best = min(errors, key=errors.get)
    assert 0 < best < 19
    s = X.abs().mean(0) ** (best / 20)
    expected = s / (s.max() * s.min()).sqrt()
    pairs = [(W, X.T @ X) for W in matrices]
    computed = rounding.awq_scale(pairs, X.abs().mean(0), bits, group_size)
    torch.testing.assert_close(computed, expected)


def make(mlp="swiglu", **settings):
    """Returns a model of two layers and the width 64, float64, whose matrices 4 bits can have."""
    shape = dict(n_embd=64, n_inner=96, mlp=mlp) | settings
    return build(**shape).double().eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1, "norm": "layernorm", "bias": True, "qk_norm": False},
        {"mlp": "gelu", "pos": "learned"},
        {"norm_position": "post", "bias": True},
        {"mlp": "moe", "n_expert": 3},
        {"mlp": "moe", "n_expert": 3, "norm_position": "post"},
    ],
)
def test_scaling_inputs_changes_nothing_but_what_is_rounded(settings, monkeypatch):
    """AWQ without rounding computes what the model did, whatever the scales are."""
    model = make(**settings)
    before = model(tokens())[0]
    ones = torch.ones(1, 1, dtype=torch.float64)
    monkeypatch.setattr(quantize, "rtn", lambda W, *_: Codes(W.clone(), ones, None))
    used = []

    def any_scale(pairs, sizes, bits, group_size, spread=None):
        used.append(sizes)
        return 0.5 + torch.rand(len(sizes), dtype=torch.float64)

    monkeypatch.setattr(quantize, "awq_scale", any_scale)
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", "--method=awq"])
    norms = [name for name, _ in model.named_parameters() if "norm1" in name]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    codes, _ = quantize.quantize_model(model, cfg, tokens())
    for name in "wte", "head":
        getattr(model, name).weight.data.copy_(weights[f"{name}.weight"])
    torch.testing.assert_close(model(tokens())[0], before)
    is_pre = settings.get("norm_position") != "post"
    n_folds = 2 * is_pre + 1 + {"gelu": 0, "moe": 3}.get(settings.get("mlp"), 1)
    assert len(used) == 2 * n_folds
    assert is_pre == (not torch.equal(model.state_dict()[norms[0]], weights[norms[0]]))


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, {"mlp": "moe", "n_expert": 3}])
def test_awqs_scales_are_powers_of_the_mean_absolute_inputs(settings, monkeypatch):
    """By hooks on a model that stays as it is; of two batches of unequal rows."""
    model = make(**settings).float()
    ones = torch.ones(1, 1)
    monkeypatch.setattr(quantize, "rtn", lambda W, *_: Codes(W.clone().flatten(0, -2), ones, None))
    sizes = []

    def no_scale(pairs, of_inputs, *rest):
        sizes.append(of_inputs)
        return torch.ones_like(of_inputs)

    monkeypatch.setattr(quantize, "awq_scale", no_scale)
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", "--method=awq"])
    idx = tokens(B=quantize.BATCH + 3)
    quantize.quantize_model(model, cfg, idx)
    given = {}
    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda _, x, name=name: given.update({name: x}))
    model.hidden(idx)
    expected = []
    for prefix in "blocks.0.", "blocks.1.":
        means = {name: x[0].abs().flatten(0, -2).mean(0) for name, x in given.items()}
        means = {name.removeprefix(prefix): x for name, x in means.items()}
        of_heads = means["attn.o_proj"].view(-1, 4 // model.config.n_kv_head, 16)
        expected += [means["attn.q_proj"], means["mlp.gate_proj"], of_heads.mean(1).flatten()]
        rows, *ends = given[f"{prefix}mlp.down_proj"]
        parts = rows.tensor_split(ends[0][:-1].long()) if ends else [rows.flatten(0, -2)]
        expected += [part.abs().mean(0) for part in parts]
    assert len(sizes) == len(expected)
    for computed, mean in zip(sizes, expected):
        torch.testing.assert_close(computed.float(), mean)


@pytest.mark.parametrize("mlp", ["swiglu", "moe"])
def test_each_matrix_is_measured_after_the_integers_before_it(mlp):
    """By hooks on the model that quantize_model leaves behind: gptq's error on what each really gets."""
    model = make(mlp).float()
    original = {name: linear.weight.clone() for name, linear in linears(model).items()}
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", "--method=gptq"])
    _, errors = quantize.quantize_model(model, cfg, tokens(B=4))
    given = {}
    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda _, x, name=name: given.update({name: x}))
    model.hidden(tokens(B=4))
    assert given.keys() == errors.keys() == original.keys()
    for name, linear in linears(model).items():
        x, *ends = given[name]
        X = x.flatten(0, -2).double()
        W, Q = original[name].double(), linear.weight.double()
        if ends:  # the expert of each row
            experts = torch.searchsorted(ends[0], torch.arange(len(X)), right=True)
            W, Q = W[experts], Q[experts]
            changed, whole = ((D @ X[..., None]).norm() for D in (W - Q, W))
        else:
            changed, whole = ((X @ D.T).norm() for D in (W - Q, W))
        assert errors[name][0] == pytest.approx((changed / whole).item() ** 2, rel=1e-4)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_is_rounded_by_its_own_tokens(method):
    """Six tokens go to one of eight experts each. The numbers of those that get none are rounded to the nearest."""
    model = make("moe", n_expert_per_token=1).float()
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", f"--method={method}"])
    original = copy.deepcopy(model.blocks[0].mlp)
    idx = tokens(B=1, T=6)
    codes, _ = quantize.quantize_model(model, cfg, idx)
    given = {}
    for name in "gate_proj", "down_proj":
        linear = model.blocks[0].mlp.get_submodule(name)
        linear.register_forward_pre_hook(lambda _, x, name=name: given.update({name: x}))
    model.hidden(idx)
    n_rows = given["gate_proj"][1].diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert 0 in n_rows and n_rows.sum() == 6
    name = "gate_proj" if method == "gptq" else "down_proj"  # whose scale each expert has alone
    W = original.get_submodule(name).weight
    parts = codes[f"blocks.0.mlp.{name}"].codes.view(W.shape)
    rows, ends = given[name]
    for expert in range(8):
        x = rows[ends[expert] - n_rows[expert] : ends[expert]]
        nearest = rounding.rtn(W[expert], 4, 32).codes
        if n_rows[expert] == 0:
            assert torch.equal(parts[expert], nearest)
        elif method == "gptq":
            assert torch.equal(parts[expert], rounding.gptq(W[expert], x.T @ x, 4, 32).codes)


def test_awqs_errors_are_of_each_matrix_before_it_was_scaled():
    model = make().float()
    block = model.blocks[0]
    gain = block.norm1.weight.clone()
    names = "attn.q_proj", "attn.k_proj"
    original = {name: block.get_submodule(name).weight.clone() for name in names}
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", "--method=awq"])
    _, errors = quantize.quantize_model(model, cfg, tokens(B=4))
    given = []
    block.attn.q_proj.register_forward_pre_hook(lambda _, x: given.append(x[0].double().flatten(0, 1)))
    model.hidden(tokens(B=4))
    X = given[0] * (gain / block.norm1.weight).double()  # what it was before
    assert not torch.allclose(X, given[0])
    for name, W in original.items():
        Q = block.get_submodule(name).weight.double()
        Y = X @ W.double().T
        nearest = X @ rounding.rtn(W, 4, 32).dense().double().T
        expected = [((y - Y).norm() / Y.norm()).item() ** 2 for y in (given[0] @ Q.T, nearest)]
        assert errors[f"blocks.0.{name}"] == pytest.approx(expected, rel=1e-4)


def test_calibration_reads_each_token_once():
    cfg = configure(quantize.Config, ["--to=n", "--method=awq", "--tokens=1000000"])
    rows = quantize.read_rows(cfg, {"train": np.arange(1005)}, "", None, 100)
    assert torch.equal(rows, torch.arange(1000).view(10, 100))
    cfg.tokens = 300  # evenly spaced
    fewer = quantize.read_rows(cfg, {"train": np.arange(1005)}, "", None, 100)
    assert torch.equal(fewer, rows[[0, 4, 9]])


def test_a_matrix_where_gptq_is_no_better_is_named():
    cfg = configure(quantize.Config, ["--to=n", "--bits=4", "--method=gptq"])
    none = {"c": (0.0, 0.0), "d": (math.inf, math.inf)}  # as rounded already, and of zeros
    lines = quantize.summary(cfg, {"a": (0.5, 1.0), "b": (1.25, 1.0)} | none)
    assert lines[0].startswith("gptq: 2 matrices with 0.79 of the error")
    assert lines[1:] == ["b: 1.250 of that error, gptq is no better there"]
    [line] = quantize.summary(cfg, none)
    assert line == "gptq: no matrix in which rounding to the nearest makes an error"


# -----------------------------------------------------------------------------------------------------
# Modules


def make_linear(bits, n_out=48, n_in=64, bias=True):
    """Returns a Linear and the one of its integers."""
    linear = torch.nn.Linear(n_in, n_out, bias=bias)
    linear.weight.data = draw(n_out, n_in).float() / 8
    size = 32 if bits == 4 else 0
    other = QuantizedLinear(n_in, n_out, Quantization(bits, size), bias)
    other.set_codes(rounding.rtn(linear.weight.detach(), bits, size))
    if bias:
        other.bias.data = linear.bias.data
    return linear, other


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_integers_are_those_that_were_put_in(bits):
    linear, packed = make_linear(bits)
    codes = rounding.rtn(linear.weight.detach(), bits, 32 if bits == 4 else 0)
    assert torch.equal(packed.float().weight, codes.dense())
    assert (packed.weight - linear.weight).abs().max() <= 0.51 * codes.scales.max()
    names = set(packed.state_dict())
    assert names == {f"codes{bits}", f"scales{bits}", "bias"} | ({"zeros4"} if bits == 4 else set())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, quantized.FEW, quantized.FEW + 1])
def test_kernels_compute_the_product_with_the_matrix_written_out(bits, rows):
    _, linear = make_linear(bits)
    x = draw(1, rows, 64).float()
    exact = F.linear(x, linear.float().weight, linear.bias)
    assert torch.equal(linear(x), exact)
    assert linear.kernel is None
    linear = linear.bfloat16()
    y = linear(x.bfloat16())
    if rows <= quantized.FEW:
        assert linear.kernel is (quantized.INT8 if bits == 8 else quantized.INT4_CPU)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 6e-3 * exact.norm()


def test_no_kernel_is_called_outside_its_limits(monkeypatch):
    """Inner sizes off the vectors, outer ones off the blocks, other dtypes: the matrix is written out."""
    fits = quantized.kernel_of
    assert fits(make_linear(8)[1], torch.bfloat16) is quantized.INT8
    assert fits(make_linear(8, n_out=5)[1], torch.bfloat16) is quantized.INT8
    assert fits(make_linear(4)[1], torch.bfloat16) is quantized.INT4_CPU
    for outside in make_linear(8, n_in=40), make_linear(4, n_out=40), make_linear(4, n_out=24):
        assert fits(outside[1], torch.bfloat16) is None
        x = draw(2, outside[1].in_features).bfloat16()
        exact = F.linear(x.float(), outside[1].float().weight, outside[1].bias)
        assert (outside[1].bfloat16()(x) - exact).norm() < 6e-3 * exact.norm()
    for dtype in torch.float32, torch.float16, torch.float64:
        assert fits(make_linear(8)[1], dtype) is None
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert fits(make_linear(8)[1], torch.bfloat16) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_a_kernel_that_computes_something_else_is_not_taken(bits):
    """Zeros or scales of other groups, rows of other outputs, a product off by a twentieth, a failure."""
    linear = make_linear(bits)[1].bfloat16()
    kernel = quantized.INT8 if bits == 8 else quantized.INT4_CPU
    assert quantized.agrees(kernel, linear)

    def fail(x, *tensors):
        raise RuntimeError

    def others(name):
        other = copy.deepcopy(linear)
        tensor = getattr(other, name)
        tensor.copy_(tensor.roll(1, 0))
        return kernel._replace(prepare=lambda _: kernel.prepare(other))

    names = ["codes8", "scales8"] if bits == 8 else ["codes4", "scales4", "zeros4"]
    changed = [others(name) for name in names]
    for multiply in fail, lambda *args: 1.05 * kernel.multiply(*args):
        changed.append(kernel._replace(multiply=multiply))
    for other in changed:
        assert not quantized.agrees(other, linear)


def test_what_was_made_for_a_dtype_does_not_outlive_it():
    _, linear = make_linear(4, bias=False)
    x = draw(2, 64).float()
    first = linear.float()(x)
    assert linear.matrix is not None
    linear = linear.bfloat16()
    assert linear.matrix is None
    linear(x.bfloat16())
    assert linear.tensors
    assert torch.equal(linear.float()(x), first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    assert torch.equal(linear(x), first)
    # nor are many rows multiplied with it in another
    many = draw(quantized.FEW + 1, 64).bfloat16()
    dense = linear.weight.bfloat16()
    assert torch.equal(linear(many), F.linear(many, dense))
    assert torch.equal(linear(x), first)
    # nor does it outlive the integers that it was made of
    codes = linear.codes()
    linear.set_codes(codes._replace(scales=2 * codes.scales))
    assert torch.equal(linear(x), 2 * first)


# -----------------------------------------------------------------------------------------------------
# Models and files


def quantize_made(method="rtn", bits=4, **settings):
    """Returns a float model that was quantized, and the same one of integers, both in float32."""
    model = make(**settings).float()
    argv = ["--to=n", f"--bits={bits}", f"--method={method}"]
    cfg = configure(quantize.Config, argv)
    codes, _ = quantize.quantize_model(model, cfg, tokens() if method != "rtn" else None)
    quantization = Quantization(cfg.bits, cfg.group_size, method)
    return model, quantized.quantized(model, quantization, codes).float()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "method, settings",
    [
        ("rtn", {}),
        ("gptq", {"tie": False, "bias": True, "norm": "layernorm"}),
        ("awq", {"mlp": "gelu", "pos": "learned", "n_kv_head": 2}),
        ("awq", {"norm_position": "post", "pos": "alibi"}),
        ("gptq", {"mlp": "moe", "n_expert": 4}),
        ("awq", {"mlp": "moe", "n_expert": 4, "norm": "layernorm", "qk_norm": False}),
    ],
)
def test_a_model_of_integers_computes_what_its_numbers_do(bits, method, settings):
    model, integers = quantize_made(method, bits, **settings)
    assert torch.equal(integers(tokens())[0], model(tokens())[0])
    assert torch.equal(quantized.dequantized(integers)(tokens())[0], model(tokens())[0])
    assert num_params(integers) == num_params(quantized.dequantized(integers)) == num_params(model)
    tied = integers.wte.table is integers.head
    assert tied == settings.get("tie", True)
    loss = integers(tokens(), targets=tokens())[1]
    integers.chunked_loss = True
    torch.testing.assert_close(integers(tokens(), targets=tokens())[1], loss)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mlp", ["swiglu", "moe"])
def test_text_is_the_same_with_a_cache_and_without(bits, mlp):
    _, integers = quantize_made("gptq", bits, mlp=mlp)
    prompts = [[1, 2, 3], [4]]
    *_, rows = generate(integers, prompts, 15, temperature=0)
    uncached = [bench_decode.generate_uncached(integers, [prompt], 15)[0] for prompt in prompts]
    assert [row.ids for row in rows] == uncached
    half = integers.bfloat16()
    cache = half.new_cache(1, 16)
    steps = [half.next_logits(tokens(B=1)[:, i : i + 1], cache) for i in range(16)]
    logits = half(tokens(B=1))[0][0]
    assert (torch.cat(steps) - logits).norm() < 0.03 * logits.norm()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a text in data/t, a checkpoint in out, one of each kind of integers made of it, and in
    bare one that was trained on nothing known.
    """
    folder = tmp_path_factory.mktemp("quantize")
    stories = ["the cat sat on the mat and the dog sat on the cat. " * 3] * 40
    (folder / "text.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    state = checkpoint_file.RunState(7, 2.5, 2.25)
    with contextlib.chdir(folder):
        call(prepare, "--dataset=text.txt", "--name=t", "--vocab_size=270", "--num_proc=1")
        _, _, tokenizer = dataset.load("data/t")
        model = build(vocab_size=tokenizer.vocab_size, n_embd=64, n_inner=96)
        checkpoint_file.save(
            "out/ckpt.pt", model, tokenizer, {"dataset": "t", "start": "the cat"}, state
        )
        checkpoint_file.save("bare/ckpt.pt", model, tokenizer, {}, state)
        for bits, method in itertools.product((8, 4), quantized.METHODS):
            argv = [f"--to=out/{method}{bits}", f"--bits={bits}", f"--method={method}"]
            call(quantize, *argv, *([] if method == "rtn" else ["--tokens=200"]))
    return folder


@pytest.mark.parametrize("method", quantized.METHODS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_written_model_is_read_by_sample_and_eval(method, bits, lab, monkeypatch, capsys):
    monkeypatch.chdir(lab)
    name = f"out/{method}{bits}"
    start = checkpoint.open_checkpoint(name, takes_integers=True)
    model, tokenizer = start.restore()
    assert model.quantization == Quantization(bits, 32 if bits == 4 else 0, method)
    assert model.head is model.wte.table
    assert (start.state["step"], start.state["val_loss"]) == (7, 2.5)
    *_, [row] = generate(
        model, [prompt_ids(tokenizer, "the cat")], 12, temperature=0, stop=tokenizer.ends
    )
    argv = [f"--out_dir={name}", "--temperature=0", "--max_new_tokens=12", "--device=cpu"]
    text = written(printed(capsys, sample, *argv, "--dtype=float32"))
    stream = tokenizer.stream()
    assert text == "\nthe cat" + "".join(stream(id) for id in row.ids) + "\n"
    printed(capsys, sample, *argv, "--dtype=bfloat16")
    compute = resolve("cpu", "float32", "false")
    documents = tokenizer.encode_batch(["the cat sat on the mat."])
    losses = [
        document_nats(m, documents, tokenizer, compute, 1)[0].mean()
        for m in (model, checkpoint.open_checkpoint("out").restore()[0])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01 if bits == 8 else 0.2)


def test_a_tied_table_is_stored_once_and_8_bits_are_a_quarter(lab):
    content = torch.load(lab / "out/rtn8/ckpt.pt", weights_only=True)["model"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in content.values()}
    model, _ = checkpoint.open_checkpoint(str(lab / "out")).restore()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rows = 270 + 2 * (4 * 64 + 2 * 96 + 64)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert sum(storages.values()) == matrices + 2 * rows + 4 * norms


@pytest.mark.parametrize("name", ["rtn8", "gptq4"])
def test_only_those_read_integers_that_know_them(name, lab, monkeypatch):
    """Not by the names of floats, nor as another version's: its format is another one."""
    monkeypatch.chdir(lab)
    content = torch.load(f"out/{name}/ckpt.pt", weights_only=True)
    assert content["format"] == 2
    plain, _ = checkpoint.open_checkpoint("out").restore()
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        plain.load_state_dict(content["model"])
    integers = [key for key, x in content["model"].items() if not x.is_floating_point()]
    assert integers
    assert not [key for key in integers if key.endswith(("weight", "bias"))]


@pytest.mark.parametrize(
    "script, argv",
    [
        (train, ["--init_from=out/rtn8", "--out_dir=n"]),
        (train, ["--init_from=resume", "--out_dir=out/rtn8"]),
        (finetune_lora, ["--init_from=out/rtn8", "--out_dir=n"]),
        (hf, ["--out_dir=out/rtn8", "--to=n"]),
        (quantize, ["--out_dir=out/rtn8", "--to=n"]),
        (bench, ["--init_from=out/rtn8"]),
    ],
)
def test_who_needs_floats_is_told_where_they_are(script, argv, lab, monkeypatch):
    monkeypatch.chdir(lab)
    with pytest.raises(Refusal, match="out/rtn8/ckpt.pt is quantized.*out/ckpt.pt$") as refusal:
        call(script, *argv)
    assert refusal.value.status == 2
    assert not (lab / "n").exists()


def test_adapters_belong_over_floats(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab)
    adapter = {"adapters": {}, "base": "out/gptq4/ckpt.pt", "base_sha256": ""}
    checkpoint_file.write_checkpoint(
        str(tmp_path / "adapter.pt"),
        adapter | {"adapters": {"a": torch.ones(1)}},
        {"rank": 1},
        checkpoint_file.RunState(),
    )
    for argv in [], ["--out_dir=out/gptq4"]:
        with pytest.raises(Refusal, match="out/gptq4/ckpt.pt is quantized.*--merge"):
            call(sample, f"--adapter={tmp_path}", *argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--group_size=32"], "8 bits have a scale a row: leave out group_size, or --bits=4"),
        (["--bits=4", "--group_size=64"], "has 96 inputs, no multiple of group_size=64: --group_size=32 fits"),
        (["--bits=4", "--group_size=48"], "group_size of 4 bits must be 32 | 64 | 128, not 48"),
        (["--bits=3"], "bits must be one of 8 | 4, not 3"),
        (["--method=best"], "method must be one of rtn | gptq | awq, not 'best'"),
        (["--method=gptq", "--out_dir=bare"], "gptq looks at text, and the model's own is not here"),
        (["--method=awq", "--text=missing.txt"], "there is no file missing.txt"),
        (["--method=awq", "--text=short.txt"], "the text has 3 tokens, too few for awq"),
        (["--text=text.txt"], "rtn looks at no text: leave out text"),
        (["--act_order"], "act_order is gptq's order of columns"),
        (["--damping=0"], "damping must be above 0"),
        (["--tokens=0"], "tokens must be at least 1"),
        (["--to="], "--to=FOLDER says where to write"),
        (["--to=n.gguf"], "quantize.py writes a folder: hf.py --to=FILE.gguf"),
        (["--to=out"], "--overwrite moves it aside"),
        (["--to=out", "--overwrite"], "is in it"),
        (["--out_dir=missing"], "there is no checkpoint in missing"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(argv, message, lab, monkeypatch):
    monkeypatch.chdir(lab)
    (lab / "short.txt").write_text("the cat")
    with pytest.raises(Refusal) as refusal:
        call(quantize, "--to=n", *argv)
    assert message in str(refusal.value)
    assert refusal.value.status == 2
    assert not (lab / "n").exists()


def test_experts_become_integers_too(lab, monkeypatch, capsys):
    """With a text by sample.py as by the numbers that they stand for."""
    monkeypatch.chdir(lab)
    _, tokenizer = checkpoint.open_checkpoint("out").restore()
    model = build(vocab_size=tokenizer.vocab_size, n_embd=64, n_inner=96, mlp="moe")
    checkpoint_file.save("moe/ckpt.pt", model, tokenizer, {"dataset": "t"}, checkpoint_file.RunState())
    argv = ["--out_dir=moe", "--to=moe/4", "--bits=4", "--method=gptq", "--tokens=100"]
    assert "14 matrices with" in printed(capsys, quantize, *argv)
    integers, _ = checkpoint.open_checkpoint("moe/4", takes_integers=True).restore()
    assert num_params(integers) == num_params(model)
    argv = ["--out_dir=moe/4", "--start=the cat", "--temperature=0", "--max_new_tokens=12"]
    output = printed(capsys, sample, *argv, "--device=cpu")
    assert "dtype=float32" in output  # no kernel takes experts in bfloat16
    text = written(output)
    prompts = [prompt_ids(tokenizer, "the cat")]
    numbers = quantized.dequantized(integers)
    *_, [row] = generate(numbers, prompts, 12, temperature=0, stop=tokenizer.ends)
    stream = tokenizer.stream()
    assert text == "\nthe cat" + "".join(stream(id) for id in row.ids) + "\n"
    n_bytes = [(lab / name / "ckpt.pt").stat().st_size for name in ("moe", "moe/4")]
    assert n_bytes[1] < 0.2 * n_bytes[0]


def test_sizes_without_a_group_are_named(lab, tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(["ab"], 257)
    state = checkpoint_file.RunState(1, 2.0, 2.0)
    monkeypatch.chdir(tmp_path)
    checkpoint_file.save("odd/ckpt.pt", build(vocab_size=257, n_inner=40), tokenizer, {}, state)
    with pytest.raises(Refusal, match="has 40 inputs, no multiple of group_size=32: no group fits"):
        call(quantize, "--out_dir=odd", "--bits=4", "--to=n")
    call(quantize, "--out_dir=odd", "--to=n")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("quantization"), "quantization is missing"),
        (lambda c: c["quantization"].update(bits=5), "bits must be one of 8"),
        (
            lambda c: c["quantization"].update(group_size=64),
            "no multiple of group_size=64|size mismatch for blocks",
        ),
        (lambda c: c["quantization"].update(more=1), "unexpected keyword"),
        (lambda c: c["model"].pop("head.codes8"), r"Missing key\(s\) .*head.codes8"),
        (lambda c: c["model"].update({"head.codes8": torch.zeros(270, 64)}), "torch.int8 was expected"),
        (lambda c: c["model"].update({"norm.weight": torch.full((64,), math.nan)}), "holds nan"),
        (lambda c: c.update(format=1), "uint8|int8"),
    ],
)
def test_a_damaged_file_is_one_line(change, message, lab, tmp_path):
    content = torch.load(lab / "out/gptq4/ckpt.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(Refusal, match=message) as refusal:
        checkpoint.open_checkpoint(str(tmp_path), takes_integers=True).restore()
    assert refusal.value.status == 1


def test_text_from_a_file_takes_the_place_of_the_models_own(lab, tmp_path, monkeypatch):
    """The same text gives the same integers, whichever way it comes in."""
    monkeypatch.chdir(lab)
    _, data, tokenizer = dataset.load("data/t")
    text = tokenizer.decode(data["train"].tolist())
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    for name in "bare", "out":
        argv = [f"--out_dir={name}", f"--to={tmp_path}/{name}", "--bits=4", "--method=gptq"]
        call(quantize, *argv, "--tokens=120", *([f"--text={tmp_path}/t.txt"] if name == "bare" else []))
    a, b = (
        torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("bare", "out")
    )
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_the_bench_measures_what_is_written(lab, monkeypatch):
    monkeypatch.chdir(lab)
    argv = ["quantize", "--init_from=out", "--seconds=0", "--device=cpu", "--eval_tokens=0"]
    cfg = bench.take_shape(configure(bench.Config, argv, bench.BENCHES))
    compute = resolve("cpu", "auto", "false")
    rows = {row["weights"]: row for row in bench_quantize.bench_quantize(cfg, compute)}
    ours = ["float32", "int8 rtn", "int4 rtn", "int4 gptq", "int4 awq", "int4 gptq act_order"]
    assert [name for name in rows if not name.startswith("torchao")] == ours
    meta, data, tokenizer = dataset.load("data/t")
    split = meta["splits"]["val"]
    for name, folder in {"float32": "out", "int8 rtn": "out/rtn8", "int4 rtn": "out/rtn4"}.items():
        model, _ = checkpoint.open_checkpoint(folder, takes_integers=True).restore()
        nats = evaluate(model, data["val"], 24, 4, resolve("cpu", "float32", "false"))
        bits = nats * split["tokens"] / split["bytes"] / math.log(2)
        assert rows[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    exact, nearest, gptq = (rows[name]["bits_per_byte"] for name in ("float32", "int4 rtn", "int4 gptq"))
    assert rows["int4 gptq"]["of_gap"] == pytest.approx((nearest - gptq) / (nearest - exact))
    assert rows["int8 rtn"]["more"] == pytest.approx(rows["int8 rtn"]["bits_per_byte"] / exact - 1)
    assert rows["float32"]["mb"] > rows["int8 rtn"]["mb"] > rows["int4 rtn"]["mb"]


@pytest.mark.slow
def test_integers_are_exported_as_the_numbers_they_stand_for(lab, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    import onnx_model

    monkeypatch.chdir(lab)
    assert "written out as float32" in printed(
        capsys, export_onnx, "--out_dir=out/gptq4", "--to=onnx", "--seconds=0"
    )
    exported, _, _ = onnx_model.load("onnx")
    model, _ = checkpoint.open_checkpoint("out/gptq4", takes_integers=True).restore()
    ids = [[1, 2, 3]]
    *_, [row] = generate(exported, ids, 12, temperature=0)
    assert [row.ids] == bench_decode.generate_uncached(model, ids, 12)
