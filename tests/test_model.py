"""The model against itself: every combination of toggles is causal, keeps documents apart, and decodes with a cache exactly."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model import (
    BLOCKS,
    MLPS,
    NORMS,
    POSITIONS,
    ALiBi,
    KVCache,
    ModelConfig,
    RoPE,
    Transformer,
    activation_bytes,
    attention_mask,
    flops_per_token,
    kv_cache_bytes,
    mask_bytes,
    num_params,
    rope_frequencies,
    rotate,
)

V, T = 61, 16
GRID = list(itertools.product(NORMS, BLOCKS, POSITIONS, MLPS, (4, 2, 1), (True, False), (True, False)))


def redraw(model, scale=1.0):
    """Draws every parameter anew, gains and biases too, so that nothing is hidden by a 1, a 0 or a tiny weight."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        gain = "norm" in name and name.endswith("weight")
        p.data = (
            1 + 0.2 * noise
            if gain
            else 0.2 * noise
            if p.dim() <= 1
            else noise * scale * p.size(-1) ** -0.5
        )
    return model


def build(
    norm="rmsnorm",
    norm_position="pre",
    pos="rope",
    mlp="swiglu",
    n_kv_head=4,
    tie=True,
    qk_norm=True,
    **more,
):
    c = dict(
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
    return redraw(Transformer(ModelConfig(**{**c, **more}))).eval()


def tokens(B=2, T=T, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def cached(model, idx, chunks, cache=None, doc=None, max_len=24):
    """Logits of idx read in chunks of these sizes."""
    cache = cache or KVCache(model, idx.size(0), max_len)
    docs = doc.split(chunks, dim=1) if doc is not None else [None] * len(chunks)
    return torch.cat(
        [model(i, cache=cache, doc=d)[0] for i, d in zip(idx.split(chunks, dim=1), docs)], dim=1
    )


def chunked(size):
    return [size] * (T // size) + ([T % size] if T % size else [])


@pytest.mark.parametrize("norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm", GRID)
def test_grid(norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm):
    model = build(
        norm, norm_position, pos, mlp, n_kv_head, tie, qk_norm
    ).double()  # an identity holds to any processor's rounding
    idx = tokens()
    logits, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    logits = logits.detach()
    with torch.no_grad():

        def same(a, b):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

        # causal: another token at 9 changes logits from 9 on, and none before
        other = idx.clone()
        other[:, 9] = (other[:, 9] + 1) % V
        changed = (model(other)[0] - logits).abs().amax(dim=(0, 2))
        assert changed[:9].max() <= 1e-12 and changed[9:].min() > 1e-4

        # documents: a packed row gives each one what it gets alone, and padding (-1) changes nothing
        doc = torch.tensor([[-1] * 3 + [0] * 6 + [1] * 7, [5] * 7 + [2] * 8 + [-1]])
        packed = model(idx, doc=doc)[0]
        same(packed[0, 3:9], model(idx[:1, 3:9])[0][0])
        same(packed[0, 9:], model(idx[:1, 9:])[0][0])
        same(packed[1, :7], model(idx[1:, :7])[0][0])
        same(packed[1, 7:15], model(idx[1:, 7:15])[0][0])
        assert packed.isfinite().all()

        # cached == uncached: in chunks, after a rewind, twice in a row, with padding
        for size in 1, 2, 7, T:
            same(cached(model, idx, chunked(size)), logits)
        cache = KVCache(model, 2, 24)
        cached(model, torch.cat((idx[:, :5], other[:, 5:12]), 1), [12], cache)
        cache.rewind(7)
        same(cached(model, idx[:, 5:9], [1, 3], cache), logits[:, 5:9])
        same(cached(model, idx[:, 9:], [T - 9], cache), logits[:, 9:])
        left = torch.tensor([[0] * T, [-1] * 4 + [0] * (T - 4)])
        for chunks in [10, 1, 1, 4], [2, 7, 7], [T]:
            padded = cached(model, idx, chunks, doc=left)
            same(padded[0], logits[0])
            same(padded[1, 4:], model(idx[1:, 4:])[0][0])
        cache = KVCache(model, 2, 24)  # padding named once, then rows go on by themselves
        first = cached(model, idx[:, :6], [6], cache, left[:, :6])
        rest = cached(model, idx[:, 6:], [1] * (T - 6), cache)
        same(torch.cat((first, rest), 1)[1, 4:], model(idx[1:, 4:])[0][0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pos", POSITIONS)
def test_in_bfloat16_what_may_not_be_seen_changes_no_bit(pos, autocast):
    """In weights of bfloat16, as sample.py has them on a GPU, and under autocast, as train.py does."""
    model, idx, doc = build(pos=pos), tokens(), torch.tensor([[-1] * 3 + [0] * 6 + [1] * 7] * 2)
    if not autocast:
        model = model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):

        def logits(idx, doc=None):
            return model(idx, doc=doc)[0]

        future = torch.cat((idx[:, :9], (idx[:, 9:] + 1) % V), 1)
        assert torch.equal(logits(future)[:, :9], logits(idx)[:, :9]) and not torch.equal(
            logits(future)[:, 9:], logits(idx)[:, 9:]
        )
        first, second = idx.clone(), idx.clone()
        first[:, :9], second[:, 9:] = (idx[:, :9] + 1) % V, (idx[:, 9:] + 1) % V
        assert torch.equal(logits(first, doc)[:, 9:], logits(idx, doc)[:, 9:])
        assert torch.equal(logits(second, doc)[:, :9], logits(idx, doc)[:, :9])
        assert not torch.equal(logits(first, doc)[:, 3:9], logits(idx, doc)[:, 3:9])


def test_the_grid_is_whole():
    assert len(GRID) == 480


def test_a_cached_document_can_be_followed_by_another():
    model, idx = build().double(), tokens(1)
    cache = KVCache(model, 1, 24)
    with torch.no_grad():
        cached(model, idx[:, :5], [5], cache)
        second = cached(model, idx[:, 5:], [3, 1, 7], cache, doc=torch.full((1, T - 5), 1))
        torch.testing.assert_close(second, model(idx[:, 5:])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pos", POSITIONS)
def test_rows_are_rewound_apart(pos, documents):
    """Each row forgets as many tokens as it is told to, goes on with others, and computes what it would have alone."""
    model, first, second, T = (
        build(pos=pos, n_kv_head=2).double(),
        tokens(3, 10),
        tokens(3, 6, seed=2),
        10,
    )
    counts = [0, 3, 7]
    doc = torch.tensor([[0] * 4 + [1] * 6] * 3) if documents else None
    with torch.no_grad():
        cache = KVCache(model, 3, 24)
        model(first, cache=cache, doc=doc)
        cache.rewind(counts)
        assert cache.lengths.tolist() == [10, 7, 3] and cache.length == 10 and not cache.is_level
        rest = torch.cat([model(part, cache=cache)[0] for part in second.split((1, 4, 1), 1)], 1)
        for row, count in enumerate(counts):
            whole = torch.cat((first[row, : T - count], second[row]))[None]
            row_doc = None
            if documents:
                row_doc = torch.cat((doc[row, : T - count], doc[row, T - count - 1].repeat(6)))[None]
            torch.testing.assert_close(
                rest[row], model(whole, doc=row_doc)[0][0, T - count :], rtol=0, atol=1e-12
            )
        cache.rewind([6, 3, 0])  # level again
        assert cache.is_level or cache.lengths.tolist() == [10, 10, 9]
    with pytest.raises(ValueError, match="cannot rewind 25 tokens"):
        cache.rewind([25, 0, 0])


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_document_past_block_size_is_refused_and_several_within_are_not(pos):
    model = build(pos=pos)
    with pytest.raises(ValueError, match="25 tokens do not fit in block_size=24"):
        model(tokens(1, 25), doc=torch.zeros(1, 25, dtype=torch.long))
    model(tokens(1, 30), doc=torch.tensor([[0] * 15 + [1] * 15]))
    cache = KVCache(model, 1, 30)
    model(tokens(1, 20), cache=cache, doc=torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit in block_size=24"):
        model(tokens(1, 5), cache=cache)


def test_logits_stay_at_block_size_and_are_refused_past_it():
    model = build()
    with torch.no_grad():
        full, _ = model(tokens(1, 24))
        torch.testing.assert_close(cached(model, tokens(1, 24), [23, 1]), full, rtol=0, atol=1e-5)
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
    if model.config.n_kv_head == 4 and model.score_bias is None:
        assert foreseen == kept


def test_a_mask_is_foreseen():
    places = torch.arange(24)
    for pos, heads in ("alibi", 4), ("rope", 1):
        model = build(pos=pos)
        doc = torch.zeros(3, 24, dtype=torch.long)
        mask, _ = attention_mask(places, 24, doc, model.score_bias)
        assert mask.shape == (3, heads, 24, 24)
        assert mask_bytes(model.config, 3) == mask.numel() * mask.element_size() + 8 * 24 * 24
    assert mask_bytes(build(pos="rope").config) == 0
    assert mask_bytes(build(pos="alibi").config) == (4 * 4 + 8) * 24 * 24
    with pytest.raises(ValueError, match="cannot be made"):
        mask_bytes(ModelConfig(vocab_size=V, pos="alibi", n_head=2**20, n_embd=2**20, block_size=10**7))


def test_the_cache_is_shaped_by_its_kv_heads_and_its_bytes_are_as_predicted():
    model = build(n_kv_head=2)
    cache = KVCache(model, 3, 20)
    assert cache.k[0].shape == (3, 2, 20, 8)
    assert sum(x.numel() * x.element_size() for x in cache.k + cache.v) == kv_cache_bytes(
        model.config, 3, 20, 4
    )
    llama7b = ModelConfig(
        n_layer=32, n_head=32, n_embd=4096
    )  # fp16, 2,048 tokens: the published 1 GB, 256 MB, 32 MB
    for heads, mib in (32, 1024), (8, 256), (1, 32):
        llama7b.n_kv_head = heads
        assert kv_cache_bytes(llama7b, 1, 2048) == mib * 2**20


def test_the_cache_is_written_in_place():
    """Its memory never moves, no decode step allocates as much as one layer's keys, and a late step costs what an early one does."""
    model = build(n_embd=64, n_inner=64, block_size=2048)
    cache = KVCache(model, 1, 2048)
    place = [x.data_ptr() for x in cache.k + cache.v]
    early = late = 0
    with torch.no_grad():
        for start, stop in (0, 10), (11, 2000):
            model.hidden(tokens(1, stop - start), cache)
            with torch.profiler.profile(profile_memory=True) as prof:
                model(tokens(1, 1), cache=cache)
            sizes = [
                e.cpu_memory_usage
                for e in prof.events()
                if e.name == "[memory]" and e.cpu_memory_usage > 0
            ]
            assert max(sizes) < cache.k[0].numel() * 4
            early, late = (sum(sizes), 0) if start == 0 else (early, sum(sizes))
    assert late <= 1.2 * early
    assert place == [x.data_ptr() for x in cache.k + cache.v]


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
    assert (
        flops_per_token(untied, T) == flops_per_token(model, T) == 6 * num_params(model) + 12 * L * C * T
    )


def test_n_inner_and_kv_heads_are_chosen():
    assert ModelConfig(n_embd=192).n_inner == 512 and ModelConfig(n_embd=128).n_inner == 352
    assert ModelConfig(n_embd=192, mlp="gelu").n_inner == 768
    assert ModelConfig(n_head=4).n_kv_head == 4
    assert (
        ModelConfig(n_embd=192, n_head=6).head_dim == 32
        and ModelConfig(n_embd=30, n_head=4, head_dim=8).head_dim == 8
    )


@pytest.mark.parametrize(
    "bad, words",
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
        ({"rope_scaling": "yarn:4"}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"n_embd": 9, "n_head": 1, "pos": "sinusoidal"}, "even"),
        ({"n_inner": -4}, "n_inner"),
    ],
)
def test_impossible_shapes_are_refused_in_words(bad, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        ModelConfig(**bad)


def test_initialisation_by_role():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=1000, n_layer=8, n_embd=256, tie_embeddings=False))
    expected = {"o_proj": 0.02 / 4, "down_proj": 0.02 / 4, "norm": None}
    for name, p in model.named_parameters():
        std = next((s for key, s in expected.items() if key in name), 0.02)
        if std is None:
            assert (p == 1).all()
        else:
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.1 * std, name


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_loss_is_cross_entropy_over_what_is_not_masked(chunked_loss):
    if chunked_loss and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    model, idx, targets = build(), tokens(), tokens(seed=2)
    targets[:, :5] = -100
    p = model.double()(idx)[0].log_softmax(-1)
    nats = -p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    grad = torch.autograd.grad(nats.sum(), model.wte.weight)[0].float()
    model.float()
    model.chunked_loss = chunked_loss
    loss = model(idx, targets, reduction="sum")[1]
    torch.testing.assert_close(loss.double(), nats.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, model.wte.weight)[0], grad, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(model(idx, targets)[1].double(), nats.sum() / 22, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        model(idx, targets, reduction="none")[1].double(), nats, rtol=1e-4, atol=1e-5
    )


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    idx, grads, calls = tokens(), [], []
    monkeypatch.setattr(
        "model.checkpoint", lambda *args, **keys: calls.append(1) or checkpoint(*args, **keys)
    )
    for on in False, True:
        model = build(dropout=0.1).train()
        model.gradient_checkpointing = on
        torch.manual_seed(3)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
        assert len(calls) == on * model.config.n_layer
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_dropout_is_in_training_only():
    model, idx = build(dropout=0.5), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# Positions


def test_rope_is_complex_multiplication_in_float32_after_bfloat16_and_past_256():
    c = ModelConfig(n_head=2, n_embd=64, block_size=2048)
    rope = RoPE(c).to(torch.bfloat16)
    pos = torch.arange(250, 2048)
    x = torch.randn(1, 2, len(pos), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    freq = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    z = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(
        torch.ones(()).double(), pos[:, None] * freq
    )
    y = rotate(x.float(), *rope(pos))
    torch.testing.assert_close(
        y.double(), torch.cat((z.real, z.imag), -1), rtol=0, atol=5e-4
    )  # the angle itself is float32
    torch.testing.assert_close(y.norm(dim=-1), x.float().norm(dim=-1))


def test_rope_scores_depend_on_the_offset_only():
    rope = RoPE(ModelConfig(n_head=1, n_embd=32, block_size=1024))
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        return (rotate(q, *rope(torch.tensor([i]))) * rotate(k, *rope(torch.tensor([j])))).sum()

    for shift in 1, 500, 900:
        torch.testing.assert_close(score(20 + shift, 3 + shift), score(20, 3), rtol=1e-3, atol=1e-3)
    assert abs(score(20, 3) - score(20, 4)) > 1e-3


def test_tables_move_and_stay_float32_and_are_not_saved():
    for pos in "rope", "sinusoidal":
        model = build(pos=pos).to(torch.bfloat16)
        table = (model.rotary or model.add_pos).cos
        assert table.dtype == torch.float32
        assert torch.equal(table, (build(pos=pos).rotary or build(pos=pos).add_pos).cos)
        assert not any("cos" in key for key in model.state_dict())
        assert model(tokens())[0].dtype == torch.bfloat16


def test_rope_scaling_linear_is_position_interpolation():
    plain = rope_frequencies(ModelConfig(n_head=1, n_embd=32))
    torch.testing.assert_close(
        rope_frequencies(ModelConfig(n_head=1, n_embd=32, rope_scaling="linear:4")), plain / 4
    )


def test_alibi_slopes_are_the_papers():
    assert ALiBi(ModelConfig(n_head=8, n_embd=64)).slopes == [2**-i for i in range(1, 9)]
    twelve = ALiBi(
        ModelConfig(n_head=12, n_embd=96)
    ).slopes  # the 8 of 8 heads, then every other one of 16 heads
    assert twelve == [2**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)]


def test_autocast_runs_every_position_scheme():
    for pos in POSITIONS:
        model = build(pos=pos)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            low = model(tokens(), tokens())[1]
            step = cached(model, tokens(), [10, 1, 5])
        assert math.isclose(low, model(tokens(), tokens())[1].item(), rel_tol=0.05)
        assert (step.float() - model(tokens())[0]).abs().max() < 0.5
