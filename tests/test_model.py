"""The model against itself: each combination of toggles is causal, packed and cached exactly."""

import copy
import itertools
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import products
from cache import KVCache
from experts import MoE, Routing, balance_loss, has_grouped_mm, recorded_routings
from masks import attention_mask
from model import (
    BLOCKS,
    MLPS,
    NORMS,
    POSITIONS,
    ALiBi,
    ModelConfig,
    RoPE,
    Transformer,
    attention,
    rotate,
)
from products import FEW_ROWS, HAS_MKL, Linear, few_rows_product, joint_linear, many_rows_product
from rope_scaling import rope_frequencies, rope_scale
from sizes import (
    Undrawn,
    activation_bytes,
    flops_per_token,
    kv_cache_bytes,
    mask_bytes,
    num_active_params,
    num_params,
    size_text,
)

V, T = 61, 16
GRID = list(itertools.product(NORMS, BLOCKS, POSITIONS, MLPS, (4, 2, 1), (True, False), (True, False)))


def redraw(model, scale=1.0):
    """Draws all parameters, gains and biases too, so that no 1, 0 or tiny weight hides a mistake."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.2 * noise
        elif p.dim() <= 1:
            p.data = 0.2 * noise
        else:
            p.data = noise * scale * p.size(-1) ** -0.5
    return model


def build(
    norm="rmsnorm",
    norm_position="pre",
    pos="rope",
    mlp="swiglu",
    n_kv_head=4,
    tie=True,
    qk_norm=True,
    **settings,
):
    """Returns a model of two layers, width 32 and a context of 24, with its weights redrawn."""
    shape = dict(
        vocab_size=V,
        n_layer=2,
        n_head=4,
        n_embd=32,
        n_inner=48,
        block_size=24,
        norm=norm,
        norm_position=norm_position,
        pos=pos,
        mlp=mlp,
        n_kv_head=n_kv_head,
        tie_embeddings=tie,
        qk_norm=qk_norm,
        bias=norm == "layernorm",
    )
    return redraw(Transformer(ModelConfig(**(shape | settings)))).eval()


def tokens(B=2, T=T, seed=1):
    """Returns ids (B, T) drawn at random."""
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def prompts_of(*lengths):
    """Returns prompts of these lengths, lists of ids."""
    return [tokens(1, n, seed=n)[0].tolist() for n in lengths]


def exactly(a, b):
    """An identity in float64, to any processor's rounding. torch.testing takes ten times as long."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= 1e-12


def cached(model, idx, chunks, cache=None, doc=None):
    """Returns the logits (B, T, V) of idx, read with a cache in chunks of these sizes, or one size."""
    cache = cache or KVCache(model, idx.size(0), 24)
    parts = idx.split(chunks, dim=1)
    docs = doc.split(chunks, dim=1) if doc is not None else [None] * len(parts)
    logits = [model(part, cache=cache, doc=part_doc)[0] for part, part_doc in zip(parts, docs)]
    return torch.cat(logits, dim=1)


def case(*combination):
    """A combination for pytest, a quarter of which is not slow: tie and qk_norm on with two heads for keys and
    values, and off with others.
    """
    *_, n_kv_head, tie, qk_norm = combination
    is_quick = tie == qk_norm == (n_kv_head == 2)
    return pytest.param(*combination, marks=[] if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(
    "norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm",
    [case(*combination) for combination in GRID],
)
def test_each_combination_is_causal_packed_and_cached_exactly(
    norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm
):
    model = build(norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm).double()
    idx = tokens()
    logits, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    logits = logits.detach()
    with torch.no_grad():
        # causal: another token at 9 changes logits from 9 on, and none before
        other = idx.clone()
        other[:, 9] = (other[:, 9] + 1) % V
        changed = (model(other)[0] - logits).abs().amax(dim=(0, 2))
        assert changed[:9].max() <= 1e-12
        assert changed[9:].min() > 1e-4

        # documents: a packed row gives each one what it gets alone, and padding (-1) changes nothing
        doc = torch.tensor([[-1] * 3 + [0] * 6 + [1] * 7, [5] * 7 + [2] * 8 + [-1]])
        packed = model(idx, doc=doc)[0]
        assert packed.isfinite().all()
        for row, start, end in (0, 3, 9), (0, 9, T), (1, 0, 7), (1, 7, 15):
            alone = model(idx[row : row + 1, start:end])[0][0]
            exactly(packed[row, start:end], alone)

        # cached == uncached: in chunks, then after a rewind, then with padding on the left
        for size in 1, 2, 7, T:
            exactly(cached(model, idx, size), logits)

        cache = KVCache(model, 2, 24)
        cached(model, torch.cat((idx[:, :5], other[:, 5:12]), 1), 12, cache)
        cache.rewind(7)
        exactly(cached(model, idx[:, 5:9], [1, 3], cache), logits[:, 5:9])
        exactly(cached(model, idx[:, 9:], T - 9, cache), logits[:, 9:])

        left = torch.tensor([[0] * T, [-1] * 4 + [0] * (T - 4)])
        unpadded = model(idx[1:, 4:])[0][0]
        for chunks in [10, 1, 1, 4], [2, 7, 7], [T]:
            padded = cached(model, idx, chunks, doc=left)
            exactly(padded[0], logits[0])
            exactly(padded[1, 4:], unpadded)

        # padding is named once, then rows go on by themselves
        cache = KVCache(model, 2, 24)
        first = cached(model, idx[:, :6], 6, cache, left[:, :6])
        rest = cached(model, idx[:, 6:], 1, cache)
        exactly(torch.cat((first, rest), 1)[1, 4:], unpadded)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])  # then attention is written out
@pytest.mark.parametrize("pos", POSITIONS)
def test_in_bfloat16_hidden_tokens_change_no_bit(pos, is_trained, autocast):
    """In weights of bfloat16, as sample.py has them on a GPU, and under autocast, as train.py does."""
    model = build(pos=pos)
    if not autocast:
        model = model.bfloat16()
    idx = tokens()
    doc = torch.tensor([[-1] * 3 + [0] * 6 + [1] * 7] * 2)
    other = (idx + 1) % V
    other_start = torch.cat((other[:, :9], idx[:, 9:]), 1)
    other_end = torch.cat((idx[:, :9], other[:, 9:]), 1)
    with torch.set_grad_enabled(is_trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(idx)[0]
        changed = model(other_end)[0]
        assert torch.equal(changed[:, :9], logits[:, :9])
        assert not torch.equal(changed[:, 9:], logits[:, 9:])

        packed = model(idx, doc=doc)[0]
        changed = model(other_start, doc=doc)[0]
        assert torch.equal(changed[:, 9:], packed[:, 9:])
        assert not torch.equal(changed[:, 3:9], packed[:, 3:9])
        assert torch.equal(model(other_end, doc=doc)[0][:, :9], packed[:, :9])


def test_in_a_compiled_step_of_a_gpu_products_of_one_input_are_one(monkeypatch):
    """On a processor, uncompiled and without gradients, where weights would be copied for nothing, they stay."""

    plain = F.linear
    seen = []

    def linear(x, weight, bias=None):
        seen.append(len(weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)

    def widths(device, is_compiling, with_gradients=True):
        seen.clear()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
        with FakeTensorMode(), torch.device(device), Undrawn():
            linears = [Linear(8, n, bias=False).requires_grad_(False) for n in (8, 4, 4)]
            with torch.set_grad_enabled(with_gradients):
                pieces = joint_linear(torch.empty(2, 3, 8), linears, on_processor=False)
        assert [tuple(x.shape) for x in pieces] == [(2, 3, 8), (2, 3, 4), (2, 3, 4)]
        return list(seen)

    assert widths("cuda", True) == [16]
    assert widths("cuda", False) == widths("cpu", True) == widths("cuda", True, False) == [8, 4, 4]


def test_on_a_gpu_grouped_heads_under_a_mask_are_copied_for_several_tokens(monkeypatch):
    """Or SDPA would write the scores out: its kernel that takes a mask takes no groups. One token needs no groups."""
    calls = []

    def sdpa(q, k, v, enable_gqa=False, **_):
        calls.append((q.size(1), k.size(1), enable_gqa))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode():
        for T in 2, 1:
            q, k = (torch.empty(2, n, T, 64, device="cuda") for n in (6, 2))
            mask = torch.zeros(2, 1, T, T, device="cuda")
            attention(q, k, k, mask)
            attention(q, k, k)
    assert calls == [(6, 6, False), (6, 2, True), (2, 2, False), (2, 2, False)]


@pytest.mark.parametrize("shape", [(1, 9), (2, 1, 1, 9), (6, 1, 9), (2, 6, 1, 9), None])
def test_a_tokens_grouped_heads_are_those_of_copied_keys(shape):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, T, 8, dtype=torch.float64, generator=g) for n, T in ((6, 1), (2, 9), (2, 9))
    )
    mask = None if shape is None else torch.randn(shape, dtype=torch.float64, generator=g)
    copies = [x.repeat_interleave(3, 1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *copies, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask), expected)


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "boolean", "bias"])
def test_attention_written_out_for_a_processor_is_sdpas(kind, n_kv_head, monkeypatch):
    """Output and gradients in bfloat16 against SDPA's in float64."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 20, 8), (2, n_kv_head, 20, 8), (2, n_kv_head, 20, 8)]
    inputs = [torch.randn(shape, generator=g).bfloat16() for shape in shapes]
    dy = torch.randn(shapes[0], generator=g).bfloat16()
    mask = torch.rand(2, 1, 20, 20, generator=g) < 0.5
    mask |= torch.eye(20, dtype=torch.bool)
    if kind == "bias":
        bias = torch.randn(2, 4, 20, 20, generator=g).bfloat16().float()
        mask = bias.masked_fill(~mask, -math.inf)
    sdpa = F.scaled_dot_product_attention
    dtypes = []

    def counted_sdpa(q, k, v, attn_mask=None, **settings):
        dtypes.append(q.dtype)
        is_float = attn_mask is not None and attn_mask.dtype != torch.bool
        return sdpa(q, k, v, attn_mask=attn_mask.to(q.dtype) if is_float else attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted_sdpa)
    results = []
    for dtype in torch.bfloat16, torch.float64:
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        y = attention(q, k, v, None if kind == "causal" else mask, kind == "causal")
        assert y.dtype == dtype
        y.backward(dy.to(dtype))
        results.append([y, q.grad, k.grad, v.grad])
    assert dtypes == [torch.float64]
    for a, b in zip(*results):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.skipif(not HAS_MKL, reason="needs MKL")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_out", [512, 601])
@pytest.mark.parametrize(
    "shape", [(0,), (1, 1), (1,), (2, 1), (2, 4), (9,), (FEW_ROWS, 1), (FEW_ROWS + 1,)]
)
def test_the_few_rows_of_a_step_get_the_same_products(monkeypatch, shape, n_out, bias, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear = Linear(160, n_out, bias)
    reference = nn.Linear(160, n_out, bias).double()
    reference.load_state_dict(linear.state_dict())
    calls = []
    monkeypatch.setattr(
        "products.few_rows_product", lambda *inputs: calls.append(inputs) or few_rows_product(*inputs)
    )
    x = torch.randn(*shape, 3, 160)[..., -1, :]  # as a last token's states: not contiguous
    exact_x = x.double()
    results = []
    for module, rows in ((linear, x), (reference, exact_x)):
        y = module(rows.requires_grad_())
        y.square().sum().backward()
        results.append([y, rows.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    assert bool(calls) == (0 < x.numel() <= FEW_ROWS * 160)


@pytest.fixture
def many_rows(monkeypatch):
    """Has all rows from 32 on multiplied as many are; yields the shapes of weights that were."""
    monkeypatch.setattr(products, "has_many_rows", lambda x: x.numel() >= 32 * x.size(-1))
    shapes = []

    def note(x, weight, bias):
        shapes.append(tuple(weight.shape))
        return many_rows_product(x, weight, bias)

    monkeypatch.setattr(products, "many_rows_product", note)
    return shapes


@pytest.mark.skipif(not HAS_MKL, reason="needs MKL")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1100,), (3, 400), (2, 5, 120)])
def test_the_many_rows_of_a_training_step_get_the_same_products(many_rows, shape, bias):
    linear = Linear(160, 601, bias)
    reference = nn.Linear(160, 601, bias).double()
    reference.load_state_dict(linear.state_dict())
    x = torch.randn(*shape, 2, 160)[..., -1, :]  # not contiguous
    dy = torch.randn(*shape, 601)
    results = []
    for module, rows in ((linear, x), (reference, x.double())):
        y = module(rows.requires_grad_())
        y.backward(dy.to(y.dtype))
        results.append([y, rows.grad, *(parameter.grad for parameter in module.parameters())])
    assert many_rows == [(601, 160)]
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape and ours.is_contiguous() == exact.is_contiguous()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_training_step_multiplies_with_q_k_and_v_at_once(many_rows, bias):
    model = build(n_embd=320, n_kv_head=2, bias=bias)
    exact = copy.deepcopy(model).double()
    for subject in model, exact:
        subject(tokens(4), targets=tokens(4))[1].backward()
    assert many_rows.count((640, 320)) == model.config.n_layer or not HAS_MKL
    assert (320, 320) in many_rows or not HAS_MKL  # o_proj's
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_linears_that_are_wrapped_or_only_watched_are_called_one_by_one(
    many_rows, is_trained, is_wrapped
):
    """lora.py puts others in their place, and quantize.py reads by hooks what they are given."""
    model = build()
    attention = model.blocks[0].attn
    if is_wrapped:
        attention.k_proj = nn.Sequential(attention.k_proj)
    calls = []
    attention.q_proj.register_forward_hook(lambda *inputs: calls.append(inputs))
    with torch.set_grad_enabled(is_trained):
        model(tokens(4))
    assert len(calls) == (is_wrapped or not is_trained)


def test_the_grid_is_whole():
    assert len(GRID) == 720


def test_a_cached_document_can_be_followed_by_another():
    model = build().double()
    idx = tokens(1)
    cache = KVCache(model, 1, 24)
    with torch.no_grad():
        cached(model, idx[:, :5], 5, cache)
        second = cached(model, idx[:, 5:], [3, 1, 7], cache, doc=torch.full((1, T - 5), 1))
        exactly(second, model(idx[:, 5:])[0])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pos", POSITIONS)
def test_rows_are_rewound_apart(pos, documents):
    """Each row forgets its own number of tokens, goes on, and computes what it would alone."""
    model = build(pos=pos, n_kv_head=2).double()
    first, second = tokens(3, 10), tokens(3, 6, seed=2)
    doc = torch.tensor([[0] * 4 + [1] * 6] * 3) if documents else None
    with torch.no_grad():
        cache = KVCache(model, 3, 24)
        model(first, cache=cache, doc=doc)
        cache.rewind([0, 3, 7])
        lengths = cache.lengths.tolist()
        assert lengths == [10, 7, 3]
        assert cache.length == 10
        assert not cache.is_level
        rest = cached(model, second, [1, 4, 1], cache)
        for row, length in enumerate(lengths):
            whole = torch.cat((first[row, :length], second[row]))[None]
            row_doc = None
            if documents:
                row_doc = torch.cat((doc[row, :length], doc[row, length - 1].repeat(6)))[None]
            exactly(rest[row], model(whole, doc=row_doc)[0][0, length:])
        cache.rewind([6, 3, 0])
        assert cache.lengths.tolist() == [10, 10, 9]
    with pytest.raises(ValueError, match="cannot rewind 25 tokens"):
        cache.rewind([25, 0, 0])


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_rows_are_rewound_to_before_documents_were_named(pos):
    """One to the middle of what had no name, one to nothing: positions go on from there."""
    model = build(pos=pos).double()
    idx = tokens(2, 9)
    cache = KVCache(model, 2, 24)
    with torch.no_grad():
        cached(model, idx[:, :6], 6, cache)
        cached(model, idx[:, 6:], 3, cache, doc=torch.zeros(2, 3, dtype=torch.long))
        cache.rewind([5, 9])
        logits = cached(model, torch.stack((idx[0, 4:8], idx[1, :4])), 2, cache)
        exactly(logits[0], model(idx)[0][0, 4:8])
        exactly(logits[1], model(idx)[0][1, :4])


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_document_past_block_size_is_refused_and_several_or_padding_are_not(pos):
    model = build(pos=pos)
    with pytest.raises(ValueError, match="25 tokens do not fit in block_size=24"):
        model(tokens(1, 25), doc=torch.zeros(1, 25, dtype=torch.long))
    model(tokens(1, 30), doc=torch.tensor([[0] * 15 + [1] * 15]))
    # as in a row of pairs, which is as long as the longest pair of them
    padded = model(tokens(1, 48), doc=torch.tensor([[0] * 9 + [1] * 5 + [-1] * 34]))[0]
    torch.testing.assert_close(padded[:, 9:14], model(tokens(1, 48)[:, 9:14])[0])
    cache = KVCache(model, 1, 30)
    model(tokens(1, 20), cache=cache, doc=torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit in block_size=24"):
        model(tokens(1, 5), cache=cache)


def test_logits_stay_at_block_size_and_are_refused_past_it():
    model = build()
    idx = tokens(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(cached(model, idx, [23, 1]), model(idx)[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="block_size=24"):
        model(tokens(1, 25))
    cache = KVCache(model, 1, 8)
    with pytest.raises(ValueError, match="holds 8 tokens"):
        model(tokens(1, 9), cache=cache)
    with pytest.raises(ValueError, match="rewind"):
        cache.rewind(1)


def kept_on_a_cpu(model, rows):
    """Bytes of the memory that autograd keeps of rows of T tokens, weights and all."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(tokens(rows))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("row", GRID[::7])
def test_activations_are_foreseen_and_never_more_than_they_are(row):
    """Of each token what one row more of T adds, to the byte where no scores are kept and no key is repeated."""
    model = build(*row, n_layer=3).train()
    kept = (kept_on_a_cpu(model, 3) - kept_on_a_cpu(model, 2)) / T
    foreseen = activation_bytes(model.config)
    assert 0.6 * kept < foreseen <= kept
    if model.score_bias is None:
        assert foreseen == kept


def test_attention_is_what_tiles_with_a_running_softmax_give():
    """FlashAttention (Dao et al. 2022, algorithm 1): keys come in tiles, and no row of scores is ever whole."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 50, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 50, 8, generator=g, dtype=torch.float64)  # one head for two of q's
    expected = attention(q, k, v, is_causal=True)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    for tile in 1, 7, 50:
        largest = torch.full((2, 4, 50, 1), -math.inf, dtype=torch.float64)  # of a query's scores so far
        total = torch.zeros(2, 4, 50, 1, dtype=torch.float64)  # of exp(score - largest)
        weighted = torch.zeros_like(q)
        for start in range(0, 50, tile):
            keys, values = k[:, :, start : start + tile], v[:, :, start : start + tile]
            places = torch.arange(start, start + keys.size(2))
            is_later = places > torch.arange(50)[:, None]
            scores = (q @ keys.mT / math.sqrt(8)).masked_fill(is_later, -math.inf)
            new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
            weights = (scores - new_largest).exp()
            shrink = (largest - new_largest).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            weighted = weighted * shrink + weights @ values
            largest = new_largest
        exactly(weighted / total, expected)


def test_a_mask_is_foreseen():
    places = torch.arange(24)
    for pos, heads in ("alibi", 4), ("rope", 1):
        model = build(pos=pos)
        doc = torch.zeros(3, 24, dtype=torch.long)
        mask, _ = attention_mask(places, places, doc, doc, model.score_bias)
        assert mask.shape == (3, heads, 24, 24)
        assert mask_bytes(model.config, 3) == mask.numel() * mask.element_size() + 8 * 24 * 24
    assert mask_bytes(build(pos="rope").config) == 0
    assert mask_bytes(build(pos="alibi").config) == (4 * 4 + 8) * 24 * 24
    many = ModelConfig(vocab_size=V, pos="alibi", n_head=2**14, n_embd=2**14, block_size=10**7)
    assert mask_bytes(many) == (4 * 2**14 + 8) * 10**14


def test_the_cache_is_shaped_by_its_kv_heads_and_its_bytes_are_as_predicted():
    model = build(n_kv_head=2)
    cache = KVCache(model, 3, 20)
    assert cache.k[0].shape == (3, 2, 20, 8)
    size = sum(x.numel() * x.element_size() for x in cache.k + cache.v)
    assert size == kv_cache_bytes(model.config, 3, 20, 4)
    # float16, 2,048 tokens: the published 1 GB, 256 MB, 32 MB
    llama7b = ModelConfig(n_layer=32, n_head=32, n_embd=4096)
    for heads, mib in (32, 1024), (8, 256), (1, 32):
        llama7b.n_kv_head = heads
        assert kv_cache_bytes(llama7b, 1, 2048, 2) == mib * 2**20


def test_the_cache_is_written_in_place():
    """Its memory stays, no step allocates a layer's keys, and late steps cost what early ones do."""
    model = build(n_embd=64, n_inner=64, block_size=2048)
    cache = KVCache(model, 1, 2048)
    addresses = [x.data_ptr() for x in cache.k + cache.v]

    def allocated_by_a_step():
        with torch.profiler.profile(profile_memory=True) as profile:
            model(tokens(1, 1), cache=cache)
        sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
        sizes = [size for size in sizes if size > 0]
        assert max(sizes) < cache.k[0].numel() * 4
        return sum(sizes)

    with torch.no_grad():
        model.hidden(tokens(1, 10), cache)
        early = allocated_by_a_step()
        model.hidden(tokens(1, 1989), cache)
        late = allocated_by_a_step()
    assert late <= 1.2 * early
    assert addresses == [x.data_ptr() for x in cache.k + cache.v]


def test_num_params_by_hand():
    C, I, L = 32, 48, 2
    model = build(bias=False)
    block = 4 * C * C + 3 * C * I + 2 * C + 2 * 8
    assert num_params(model) == V * C + L * block + C
    gpt = build("layernorm", "post", "learned", "gelu", qk_norm=False)
    block = 4 * C * C + 4 * C + 2 * C * I + C + I + 4 * C
    assert num_params(gpt) == V * C + 24 * C + L * block
    assert num_params(gpt) - num_params(gpt.add_pos) == V * C + L * block
    untied = build(bias=False, tie=False)
    assert num_params(untied) == num_params(model) + V * C
    flops = 6 * num_params(model) + 12 * L * C * T
    assert flops_per_token(untied, T) == flops_per_token(model, T) == flops


def test_num_active_params_by_hand():
    """Of 8 experts a token uses 2, and the router."""
    C, I, L = 32, 48, 2
    model = build(mlp="moe")
    swiglu = build(bias=False)
    expert = 3 * C * I
    assert num_params(model) == num_params(swiglu) + L * (7 * expert + 8 * C)
    assert num_active_params(model) == num_params(swiglu) + L * (expert + 8 * C)
    assert num_active_params(swiglu) == num_params(swiglu)
    assert flops_per_token(model, T) == 6 * num_active_params(model) + 12 * L * C * T
    assert f"{num_params(model):,} parameters" in size_text(model)
    assert f"{num_active_params(model):,} are active" in size_text(model)
    assert size_text(swiglu) == f"{num_params(swiglu):,} parameters"


def test_n_inner_and_kv_heads_are_chosen():
    assert ModelConfig(n_embd=192).n_inner == 512
    assert ModelConfig(n_embd=128).n_inner == 352
    assert ModelConfig(n_embd=192, mlp="gelu").n_inner == 768
    assert ModelConfig(n_head=4).n_kv_head == 4
    assert ModelConfig(n_embd=192, n_head=6).head_dim == 32
    assert ModelConfig(n_embd=30, n_head=4, head_dim=8).head_dim == 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_embd": 30}, "multiple of n_head"),
        ({"n_kv_head": 3}, "multiple of n_kv_head"),
        ({"norm": "batchnorm"}, "layernorm | rmsnorm"),
        ({"pos": "absolute"}, "learned"),
        ({"mlp": "relu"}, "gelu"),
        ({"norm_position": "mid"}, "pre | post"),
        ({"n_layer": 0}, "n_layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_embd": 12}, "even"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": -2}, "head_dim"),
        ({"block_size": -1}, "block_size"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_scaling": "yarn"}, "yarn:FACTOR,CONTEXT"),
        ({"rope_scaling": "yarn:4"}, "yarn:FACTOR,CONTEXT"),
        ({"rope_scaling": "yarn:4,16,32,1,1,1"}, "yarn:FACTOR,CONTEXT"),
        ({"rope_scaling": "yarn:4,sixteen"}, "yarn:FACTOR,CONTEXT"),
        ({"rope_scaling": "yarn:4,,32"}, "yarn:FACTOR,CONTEXT"),
        ({"rope_scaling": "yarn:4,16.5"}, "whole number of tokens"),
        ({"rope_scaling": "yarn:4,16,1,2"}, "BETA_SLOW not above BETA_FAST"),
        ({"rope_scaling": "yarn:4,16,2,0"}, "above 0"),
        ({"rope_scaling": "yarn:4,16", "rope_theta": 1.0}, "rope_theta above 1"),
        ({"rope_scaling": "llama3:8,4,4,16"}, "LOW must be below HIGH"),
        ({"rope_scaling": "linear"}, "linear:FACTOR"),
        ({"rope_scaling": "linear:2,3"}, "linear:FACTOR"),
        ({"rope_scaling": "linear:0.5"}, "at least 1"),
        ({"rope_scaling": "linear:inf"}, "above 0 and at most"),
        ({"rope_scaling": "ntk:nan"}, "above 0 and at most"),
        ({"rope_scaling": "ntk:0.5"}, "at least 1"),
        ({"rope_scaling": "ntk:2", "head_dim": 2}, "head_dim of 4"),
        ({"rope_scaling": "ntk:1e9", "head_dim": 4, "rope_theta": 1e300}, "too much"),
        ({"rope_scaling": "dynamic:2"}, "none, linear:FACTOR"),
        ({"rope_scaling": "none:2"}, "none, linear:FACTOR"),
        ({"rope_scaling": "linear:2", "pos": "learned"}, "pos is learned"),
        ({"rope_scaling": "yarn:4,16", "pos": "alibi"}, "pos is alibi"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"n_embd": 9, "n_head": 1, "pos": "sinusoidal"}, "even"),
        ({"n_inner": -4}, "n_inner"),
        ({"n_expert": 0}, "n_expert"),
        ({"n_expert_per_token": 0}, "n_expert_per_token"),
        ({"n_expert": 4, "n_expert_per_token": 5}, "n_expert_per_token=5 of n_expert=4"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**settings)


def test_initialisation_by_role():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=1000, n_layer=8, n_embd=256, tie_embeddings=False))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
            continue
        # a layer that adds to the residual stream starts smaller, by the root of the number of its kind
        std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
        assert abs(p.std().item() / std - 1) < 0.05, name
        assert abs(p.mean().item()) < 0.1 * std, name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_chunked_loss_in_bfloat16_is_the_plain_one(reduction, monkeypatch):
    """Neither the loss nor the gradient of the head is added up in bfloat16, and few logits are there at a time."""
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 3 * V)
    model = build(tie=False)
    sizes = []
    model.head.register_forward_hook(lambda module, args, logits: sizes.append(len(logits)))
    idx = torch.randint(V, (16, 24), generator=torch.Generator().manual_seed(0))
    targets = idx.roll(-1, 1).masked_fill(idx < 9, -100)
    losses, gradients = [], []
    for model.chunked_loss, dtype in (
        (False, torch.float32),
        (False, torch.bfloat16),
        (True, torch.bfloat16),
    ):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(idx, targets, reduction=reduction)[1]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.head.weight.grad)
    assert sizes[2:] == [3] * (2 * 16 * 24 // 3)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-6, atol=0)
    errors = [(gradient - gradients[0]).norm() for gradient in gradients]
    assert 0 < errors[2] < 1.1 * errors[1]


@pytest.mark.slow
def test_texts_of_many_lengths_are_compiled_twice():
    """As a whole, once for the first length and once for all others: so train.py scores stories by what it trained."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = build()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for T in 9, 10, 13, 20:
            idx = torch.arange(T)[None]
            torch.testing.assert_close(compiled(idx)[0], model(idx)[0])
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_loss_is_cross_entropy_over_targets_that_are_not_masked(chunked_loss, monkeypatch):
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 3 * V)
    model = build().double()
    idx, targets = tokens(), tokens(seed=2)
    targets[:, :5] = -100
    logp = model(idx)[0].log_softmax(-1)
    nats = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    expected = torch.autograd.grad(nats.sum(), model.wte.weight)[0].float()

    model.float()
    model.chunked_loss = chunked_loss
    loss = model(idx, targets, reduction="sum")[1]
    grad = torch.autograd.grad(loss, model.wte.weight)[0]
    mean = model(idx, targets)[1]
    each = model(idx, targets, reduction="none")[1]
    torch.testing.assert_close(loss.double(), nats.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean.double(), nats.sum() / 22, rtol=1e-5, atol=0)
    torch.testing.assert_close(each.double(), nats, rtol=1e-4, atol=1e-5)


def test_the_loss_of_bfloat16_logits_is_float32():
    model = build().bfloat16()
    idx = tokens()
    logits, loss = model(idx, idx, reduction="none")
    expected = F.cross_entropy(logits.double().mT, idx, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    idx = tokens()
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    def gradients(gradient_checkpointing):
        model = build(dropout=0.1).train()
        model.gradient_checkpointing = gradient_checkpointing
        torch.manual_seed(3)
        model(idx, idx)[1].backward()
        return [p.grad for p in model.parameters()]

    monkeypatch.setattr("model.checkpoint", counted)
    plain = gradients(False)
    assert len(calls) == 0
    recomputed = gradients(True)
    assert len(calls) == 2  # one a layer
    for a, b in zip(plain, recomputed):
        assert torch.equal(a, b)


def test_dropout_is_in_training_only():
    model = build(dropout=0.5)
    idx = tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("norm_position", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_on_embeddings_weights_and_both_branches(norm_position, dtype):
    """What was dropped is 0, a quarter of it, and the rest is a third more. In bfloat16 attention is written out."""
    settings = dict(dropout=0.25, norm_position=norm_position, norm="layernorm", pos="none")
    model = build(**settings).to(dtype).train()
    block = model.blocks[0]
    block.attn.v_proj.weight.data.zero_()
    block.attn.v_proj.bias.data.fill_(1)  # then attention returns the sum of its weights
    seen = {}

    def keep(name):
        return lambda _, arguments, y=None: seen.update({name: arguments[0], name + "'s": y})

    for name in "attn", "mlp", "norm1", "norm2", "attn.o_proj":
        block.get_submodule(name).register_forward_hook(keep(name))
    block.register_forward_hook(keep("block"))
    idx = tokens(8)
    torch.manual_seed(0)
    model(idx)
    x, y = seen["block"], seen["block's"]
    between = seen["norm2"] if norm_position == "pre" else seen["norm1's"]
    sums = (between, y) if norm_position == "pre" else (seen["norm1"], seen["norm2"])
    branches = (seen["attn's"], sums[0] - x), (seen["mlp's"], sums[1] - between)
    for whole, dropped in ((model.wte(idx), x), *branches):
        is_kept = dropped != 0
        assert 0.65 < is_kept.float().mean() < 0.85
        torch.testing.assert_close(dropped[is_kept], (whole / 0.75)[is_kept], rtol=0.05, atol=0.05)
    weights = seen["attn.o_proj"]
    first = weights[:, 0].float()  # of the first token, which sees itself alone
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).to(dtype).item()}
    assert weights[:, 1:].float().std() > 0.05 and abs(weights.float().mean() - 1) < 0.2


def test_in_bfloat16_the_gradients_of_layernorm_are_added_up_in_float32():
    norm = NORMS["layernorm"](8, eps=1e-5, bias=True)
    x = torch.randn(4100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm(x).sum().backward()
    assert torch.equal(norm.bias.grad, torch.full((8,), 4100.0))
    gain = F.layer_norm(x.double(), (8,)).sum(0)
    torch.testing.assert_close(norm.weight.grad.double(), gain, rtol=1e-4, atol=1e-2)


# Positions


def test_rope_is_complex_multiplication_in_float32_after_bfloat16_and_past_256():
    rope = RoPE(ModelConfig(n_head=2, n_embd=64, block_size=2048)).to(torch.bfloat16)
    pos = torch.arange(250, 2048)
    x = torch.randn(1, 2, len(pos), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    freq = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    rotation = torch.polar(torch.ones((), dtype=torch.float64), pos[:, None] * freq)
    z = torch.complex(x[..., :16], x[..., 16:]) * rotation
    y = rotate(x.float(), *rope(pos))
    # the angle is float32 in both, which 5e-4 allows for
    torch.testing.assert_close(y.double(), torch.cat((z.real, z.imag), -1), rtol=0, atol=5e-4)
    torch.testing.assert_close(y.norm(dim=-1), x.float().norm(dim=-1))


def test_rope_scores_depend_on_the_offset_only():
    rope = RoPE(ModelConfig(n_head=1, n_embd=32, block_size=1024))
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        query = rotate(q, *rope(torch.tensor([i])))
        key = rotate(k, *rope(torch.tensor([j])))
        return (query * key).sum()

    for shift in 1, 500, 900:
        torch.testing.assert_close(score(20 + shift, 3 + shift), score(20, 3), rtol=1e-3, atol=1e-3)
    assert abs(score(20, 3) - score(20, 4)) > 1e-3


def test_tables_move_and_stay_float32_and_are_not_saved():
    for pos, part in ("rope", "rotary"), ("sinusoidal", "add_pos"):
        model = build(pos=pos).to(torch.bfloat16)
        table = getattr(model, part).cos
        assert table.dtype == torch.float32
        assert torch.equal(table, getattr(build(pos=pos), part).cos)
        assert not any("cos" in key for key in model.state_dict())
        assert model(tokens())[0].dtype == torch.bfloat16


def test_rope_scaling_linear_is_position_interpolation():
    plain = rope_frequencies(ModelConfig(n_head=1, n_embd=32))
    scaled = rope_frequencies(ModelConfig(n_head=1, n_embd=32, rope_scaling="linear:4"))
    torch.testing.assert_close(scaled, plain / 4)


def test_rope_scaling_ntk_stretches_the_longest_wavelength_alone():
    plain = rope_frequencies(ModelConfig(n_head=1, n_embd=32))
    scaled = rope_frequencies(ModelConfig(n_head=1, n_embd=32, rope_scaling="ntk:4"))
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 4, rtol=1e-5, atol=0)  # of 4e-5
    assert (scaled[1:-1] < plain[1:-1]).all() and (scaled[1:-1] > plain[1:-1] / 4).all()


@pytest.mark.parametrize("D, theta", [(32, 1e4), (64, 5e5), (8, 100.0), (2, 1e4)])
@pytest.mark.parametrize(
    "numbers", [(8, 128, 32, 1), (4, 4096, 32, 1), (2.5, 64, 8, 2), (8, 4, 32, 1), (1, 64, 32, 1)]
)
def test_yarn_in_float64_from_the_formulas(D, theta, numbers):
    """Peng et al. 2023, sections 3.2 and 3.4, by pairs and with the ends of the ramp rounded outwards."""
    factor, context, fast, slow = numbers
    pairs = [D / 2 * math.log(context / (2 * math.pi * n)) / math.log(theta) for n in (fast, slow)]
    first = max(0, math.floor(pairs[0]))
    last = min(D - 1, math.ceil(pairs[1]))
    expected = []
    for pair in range(D // 2):
        plain = theta ** (-2 * pair / D)
        share = (pair - first) / (last - first or 0.001)
        share = min(1, max(0, share))
        expected.append((1 - share) * plain + share * plain / factor)
    text = f"yarn:{factor},{context}"
    config = ModelConfig(n_head=1, n_embd=D, rope_theta=theta, rope_scaling=f"{text},{fast},{slow}")
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(config).double(), expected, rtol=2e-6, atol=0)
    assert rope_scale(config) == pytest.approx(0.1 * math.log(factor) + 1)
    if (fast, slow) == (32, 1):
        shorter = ModelConfig(n_head=1, n_embd=D, rope_theta=theta, rope_scaling=text)
        assert torch.equal(rope_frequencies(shorter), rope_frequencies(config))


@pytest.mark.parametrize(
    "scaling, scale", [("yarn:4,8", 0.1 * math.log(4) + 1), ("yarn:4,8,4,1,1.7", 1.7)]
)
def test_yarn_scales_scores_and_decodes_with_a_cache_exactly_as_without(scaling, scale):
    model = build(rope_scaling=scaling, n_kv_head=2)
    cos, sin = model.rotary(torch.arange(24))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, scale**2))
    model.double()
    idx = tokens(T=24)
    logits = model(idx)[0]
    assert (logits - build(n_kv_head=2).double()(idx)[0]).abs().max() > 0.1
    for chunks in 1, 5, [10, 1, 13]:
        exactly(cached(model, idx, chunks), logits)


def test_alibi_slopes_are_the_papers():
    eight = [2**-i for i in range(1, 9)]
    assert ALiBi(ModelConfig(n_head=8, n_embd=64)).slopes.tolist() == eight
    # for 12 heads: the 8 of 8 heads, then every other one of 16 heads
    twelve = eight + [2 ** -(i + 0.5) for i in range(4)]
    slopes = ALiBi(ModelConfig(n_head=12, n_embd=96)).bfloat16().slopes
    assert torch.equal(slopes, torch.tensor(twelve))  # float32


def test_autocast_is_close_to_float32_for_each_position():
    idx = tokens()
    for pos in POSITIONS:
        model = build(pos=pos)
        with torch.no_grad():
            logits, loss = model(idx, idx)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rough_loss = model(idx, idx)[1]
                rough_logits = cached(model, idx, [10, 1, 5])
                # and so are the states between blocks
                assert model.hidden(idx).dtype == torch.bfloat16
        assert math.isclose(rough_loss, loss, rel_tol=0.05)
        assert (rough_logits.float() - logits).abs().max() < 0.5


def dense_moe(moe, x):
    """What a layer of experts returns for x (B, T, C): each expert on each token, most of them times 0."""
    probabilities = F.linear(x, moe.router.weight).softmax(-1)
    scores, experts = probabilities.topk(moe.top_k)
    if moe.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    weights = torch.zeros_like(probabilities).scatter(-1, experts, scores)
    y = 0.0
    for e in range(moe.router.out_features):
        h = F.silu(x @ moe.gate_proj.weight[e].T) * (x @ moe.up_proj.weight[e].T)
        y = y + weights[..., e, None] * (h @ moe.down_proj.weight[e].T)
    return y


def moe_layer(n_embd=32, n_inner=48, **settings):
    """Returns a layer of experts, its weights redrawn."""
    config = ModelConfig(n_embd=n_embd, n_inner=n_inner, head_dim=8, mlp="moe", **settings)
    return redraw(MoE(config))


def moe_gradients(forward, moe, x):
    """Returns a layer's output for x, and the gradients of x and of all its weights."""
    x = x.clone().requires_grad_()
    y = forward(x)
    weights = torch.linspace(-1, 1, y.size(-1), dtype=y.dtype)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *moe.parameters()])


@pytest.mark.parametrize("major, expected", [(8, False), (9, True), (10, True), (12, False)])
def test_products_of_experts_wait_for_no_gpu(major, expected, monkeypatch):
    """Torch has a kernel for Hopper's and Blackwell's data centre cards, and asks any other where experts' rows end."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    device = torch.device("cuda")
    on_gpu = SimpleNamespace(device=device, dtype=x.dtype, size=x.size, element_size=x.element_size)
    assert has_grouped_mm(on_gpu, x) is expected
    assert has_grouped_mm(x, x)


@pytest.mark.parametrize(
    "n_embd, n_inner, R", [(32, 48, 39), (30, 7, 40), (32, 48, 1), (8, 4, 1500), (256, 288, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_are_those_of_a_plain_loop(n_embd, n_inner, R, dtype):
    """At sizes that F.grouped_mm takes or not, with experts that get nothing, to rounding."""
    for settings in {}, {"n_expert": 3, "n_expert_per_token": 3}, {"norm_topk_prob": False}:
        moe = moe_layer(n_embd, n_inner, **settings).to(dtype)
        x = 1 + torch.randn(1, R, n_embd, generator=torch.Generator().manual_seed(2)).to(dtype)
        are_those_of_a_plain_loop(moe, moe, x)


@pytest.mark.slow
def test_compiled_experts_are_those_of_a_plain_loop():
    moe = moe_layer()
    forward = torch.compile(moe, backend="aot_eager", fullgraph=True)
    are_those_of_a_plain_loop(forward, moe, torch.randn(2, 20, 32))


def are_those_of_a_plain_loop(forward, moe, x):
    expected = moe_gradients(partial(dense_moe, moe), moe, x)
    for a, b in zip(moe_gradients(forward, moe, x), expected):
        size = max(1, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=size * 100 * torch.finfo(x.dtype).eps)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    for dtype in torch.float32, torch.float64:
        moe = moe_layer(n_expert_per_token=1).to(dtype)
        x = torch.rand(2, 5, 32, dtype=dtype)
        moe.router.weight.data.neg_()[3] = 1
        moe(x).sum().backward()
        for linear in moe.gate_proj, moe.up_proj, moe.down_proj:
            assert linear.weight.grad[3].any()
            assert not linear.weight.grad[[0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_is_float32_and_the_experts_bfloat16(autocast):
    moe = moe_layer()
    x = torch.randn(1, 300, 32)
    expected = dense_moe(moe, x)
    if not autocast:
        moe = moe.bfloat16()
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recorded_routings(moe) as routings:
        y = moe(x)
    assert y.dtype == torch.bfloat16
    [routing] = routings
    logits = F.linear(x.float(), moe.router.weight.float())
    assert torch.equal(routing.probabilities, logits.softmax(-1))
    if autocast:  # the same experts as in float32
        assert (y - expected).norm() < 0.01 * expected.norm()


def test_balance_is_learned_and_never_reported():
    """The loss is the same to the bit; its gradient has that of balance_loss, times the coefficient."""
    model = build(mlp="moe").double().train()
    idx = tokens(3)
    doc = torch.tensor([[0] * 9 + [1] * 7, [2] * T, [0] * 10 + [-1] * 6])
    targets = idx.roll(-1, 1).masked_fill(doc < 0, -100)
    params = list(model.parameters())
    for reduction in "mean", "sum":
        plain = model(idx, targets, doc=doc, reduction=reduction)[1]
        with recorded_routings(model) as routings:
            model.hidden(idx, doc=doc)
        balance = balance_loss(routings, targets, doc, reduction)
        expected = torch.autograd.grad(plain + 0.3 * balance, params)
        for checkpointing in False, True:
            model.gradient_checkpointing = checkpointing
            model.balance = 0.3
            loss = model(idx, targets, doc=doc, reduction=reduction)[1]
            assert torch.equal(loss, plain)
            # the backward pass adds none
            assert all(block.mlp.routings is None for block in model.blocks)
            for gradient, right in zip(torch.autograd.grad(loss, params), expected):
                exactly(gradient, right)
            model.gradient_checkpointing = False
            model.balance = 0.0
    # a row alone, without its padding, and rows weighed by their targets
    sums = 0.0
    for row, n in zip(range(3), (T, T, 10)):
        with recorded_routings(model) as routings:
            model.hidden(idx[row : row + 1, :n], doc=doc[row : row + 1, :n])
        sums += balance_loss(routings, targets[row : row + 1, :n], reduction="sum")
    exactly(balance, sums)


def test_balance_by_hand():
    """2 of 4 experts: chosen alike and alike likely it is 2, all to the same two with certainty 4."""
    targets = torch.zeros(1, 4, dtype=torch.long)
    even = Routing(torch.full((1, 4, 4), 0.25), torch.tensor([[[0, 1], [2, 3], [1, 2], [3, 0]]]))
    collapsed = Routing(
        torch.tensor([0.5, 0.5, 0, 0]).expand(1, 4, 4), torch.tensor([0, 1]).expand(1, 4, 2)
    )
    assert balance_loss([even], targets) == 2
    assert balance_loss([collapsed], targets) == 4
    assert balance_loss([even, collapsed], targets, reduction="sum") == 12
