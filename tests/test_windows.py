"""Windows: each query sees so many tokens, and a cache keeps no more, however long the text is."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_model import V, build, cached, exactly, tokens

import model as modules
from cache import REWIND, KVCache
from generate import generate
from masks import Sight, make_sight
from model import POSITIONS, ModelConfig, Transformer
from sizes import kv_cache_bytes, mask_bytes

WINDOW = 5
LONG = 10 * 24  # ten times the block_size of build()


def windowed(pos="rope", pattern="S", window=WINDOW, **changes):
    return build(pos=pos, window=window, window_pattern=pattern, n_kv_head=2, **changes).double()


def long_peer(model):
    """Returns the same weights in a model whose block_size is ten times as long."""
    c = replace(model.config, block_size=LONG)
    peer = Transformer(c).double().eval()
    peer.load_state_dict(model.state_dict())
    return peer


def sight_by_definition(places, keys, doc=None, key_doc=None, bias=None, dtype=None, window=0):
    """What masks.make_sight returns, one pair of tokens at a time and never in blocks."""
    B = 1 if doc is None else doc.size(0)
    mask = torch.full((B, 1, len(places), len(keys)), -math.inf, dtype=dtype)
    for b in range(B):
        for t, place in enumerate(places.tolist()):
            for s, key in enumerate(keys.tolist()):
                same_doc = doc is None or doc[b, t] == key_doc[b, s]
                if key <= place and same_doc and (not window or place - key < window):
                    mask[b, 0, t, s] = 0
    if bias is not None:
        mask = mask + bias(keys[None] - places[:, None]).to(dtype)
    return Sight(mask)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pattern", ["S", "SL"])
@pytest.mark.parametrize("pos", POSITIONS)
def test_masks_and_blocks_are_what_the_definition_says(pos, pattern, documents, monkeypatch):
    for window in 1, 3, 5, 11, 30:
        model = windowed(pos, pattern, window)
        for T in 1, 5, 11, 23, 24:
            idx = tokens(2, T)
            doc = None
            if documents:
                doc = (torch.arange(T) // 7).repeat(2, 1)
                doc[1] = doc[1].sub(1).clamp(min=-1)  # padding first
            logits, loss = model(idx, idx, doc=doc)
            grad = torch.autograd.grad(loss, model.blocks[0].attn.k_proj.weight)[0]
            with monkeypatch.context() as patch:
                patch.setattr(modules, "make_sight", sight_by_definition)
                expected, loss = model(idx, idx, doc=doc)
            exactly(logits, expected)
            exactly(grad, torch.autograd.grad(loss, model.blocks[0].attn.k_proj.weight)[0])


@pytest.mark.parametrize("T", [9, 24])
def test_a_query_sees_as_many_tokens_as_the_window_is_wide(T):
    model = windowed(n_layer=1)
    idx = tokens(1, T)
    last = model(idx)[0][0, -1]
    for distance in range(T):
        other = idx.clone()
        other[0, -1 - distance] = (other[0, -1 - distance] + 1) % V
        change = (model(other)[0][0, -1] - last).abs().max()
        assert (change > 1e-6) == (distance < WINDOW)


@pytest.mark.parametrize("pattern, sees", [("S", 9), ("SL", 24), ("LS", 24)])
def test_windows_add_up_over_layers(pattern, sees):
    model = windowed(pattern=pattern)  # two layers
    assert [block.attn.window for block in model.blocks] == [
        5 * (letter == "S") for letter in (pattern * 2)[:2]
    ]
    idx = tokens(1, 24)
    gradient = torch.autograd.grad(model.hidden(idx)[0, -1].sum(), model.wte.weight)[0]
    assert gradient.isfinite().all()
    embedded = {}
    model.wte.register_forward_hook(lambda module, args, x: embedded.update(x=x.requires_grad_()) or x)
    model.wte.weight.requires_grad_(False)
    hidden = model.hidden(idx)
    gradient = torch.autograd.grad(hidden[0, -1].square().sum(), embedded["x"])[0]
    assert (gradient[0].abs().sum(-1) > 0).sum() == sees


ENDLESS = [pos for pos in POSITIONS if pos != "learned"]


@pytest.mark.parametrize("settings", [{"pos": "sinusoidal"}, {"rope_scaling": "yarn:4,6"}])
def test_computed_tables_have_the_rows_of_tables_with_an_end(settings):
    endless, ended = windowed(**settings), windowed(window=0, **settings)
    part = "rotary" if "rope_scaling" in settings else "add_pos"
    places = torch.arange(24).view(2, 12)
    for name in "cos", "sin":
        tables = [getattr(getattr(model, part), name) for model in (endless, ended)]
        assert not isinstance(tables[0], torch.Tensor)
        assert torch.equal(tables[0][places], tables[1][places])


def test_computed_tables_are_where_the_model_is():
    """In float32 whatever its dtype is; else a GPU would wait for a copy at each step, and no step be captured."""
    rotary = windowed().rotary
    for device in "meta", "cpu":
        rotary.to(device, torch.bfloat16)
        for table in rotary.cos, rotary.sin:
            assert (table.frequencies.device.type, table.frequencies.dtype) == (device, torch.float32)
    assert torch.equal(rotary.cos.frequencies, windowed().rotary.frequencies)


@pytest.mark.parametrize("pos", ENDLESS)
def test_a_text_of_ten_contexts_is_read_with_a_cache_as_without(pos):
    model = windowed(pos)
    idx = tokens(2, LONG)
    with torch.no_grad():
        expected = long_peer(model)(idx)[0]
        for chunks in 1, 4, REWIND + 1, REWIND + 2, 50, LONG, [30, 1, 1, 9, 10, 1, 24, 13, 14, 1, 136]:
            cache = KVCache(model, 2, LONG)
            exactly(cached(model, idx, chunks, cache), expected)
            assert cache.k[0].size(2) == WINDOW + REWIND


@pytest.mark.parametrize("pos", ENDLESS)
def test_padded_rows_and_documents_go_on_for_ten_contexts(pos):
    model = windowed(pos)
    peer = long_peer(model)
    idx = tokens(3, LONG)
    doc = torch.zeros(3, LONG, dtype=torch.long)
    doc[1, :17] = -1
    doc[2] = torch.arange(LONG) // 60
    with torch.no_grad():
        expected = peer(idx, doc=doc)[0]
        exactly(expected[1, 17:], peer(idx[1:2, 17:])[0][0])
        for chunks in 1, 20, [40, 1, 9, 10, 1, 24, 155]:
            exactly(cached(model, idx, chunks, KVCache(model, 3, LONG), doc)[:, 17:], expected[:, 17:])
        # padding is named once, then rows go on by themselves
        cache = KVCache(model, 2, LONG)
        first = cached(model, idx[:2, :20], 20, cache, doc[:2, :20])
        rest = cached(model, idx[:2, 20:], 5, cache)
        exactly(torch.cat((first, rest), 1)[:, 17:], expected[:2, 17:])


@pytest.mark.parametrize("pattern", ["S", "SL"])
@pytest.mark.parametrize("pos", POSITIONS)
def test_a_rewind_is_exact_as_far_as_a_ring_reaches(pos, pattern):
    model = windowed(pos, pattern)
    idx, other = tokens(2, 24), tokens(2, 24, seed=2)
    with torch.no_grad():
        expected = model(idx)[0]
        for start in range(1, 16):
            for written in (1, 3, REWIND):
                cache = KVCache(model, 2, 24)
                cached(model, idx[:, :start], start, cache)
                cached(model, other[:, start : start + written], 1, cache)
                cache.rewind(written)
                exactly(
                    cached(model, idx[:, start : start + 2], 1, cache), expected[:, start : start + 2]
                )
                if written > 2:  # again: from where the text ended first
                    cache.rewind(2)
                rest = cached(model, idx[:, cache.length :], 2, cache)
                exactly(rest, expected[:, -rest.size(1) :])
        # rows apart, and in them a long chunk
        texts = torch.stack((idx[0, :22], torch.cat((idx[1, :12], other[1, 12:16], idx[1, 16:22]))))
        for size in 1, 4, 10:
            cache = KVCache(model, 2, 24)
            cached(model, torch.cat((idx[:, :12], other[:, 12:18]), 1), 6, cache)
            cache.rewind([6, 4])
            rows = torch.stack((texts[0, 12:20], texts[1, 14:22]))
            logits = cached(model, rows, size, cache)
            whole = model(texts)[0]
            exactly(logits[0], whole[0, 12:20])
            exactly(logits[1], whole[1, 14:22])


@pytest.mark.parametrize("window", [0, WINDOW])
def test_rows_that_are_kept_have_the_room_that_a_longer_one_had_not(window):
    model = windowed(window=window)
    idx = tokens(3, 24)
    with torch.no_grad():
        expected = model(idx)[0]
        for rows in [1, 2], [2], [1, 1]:
            cache = KVCache(model, 3, 24)
            cached(model, idx[:, :20], 20, cache)
            cache.rewind([0, 8, 7])
            cache.keep(rows)
            starts = cache.lengths.tolist()
            assert cache.length == max(starts)
            assert cache.is_level == (len(set(starts)) == 1)
            rest = torch.stack([idx[row, n : n + 11] for row, n in zip(rows, starts)])
            for row, n, logits in zip(rows, starts, cached(model, rest, 11, cache)):
                exactly(logits, expected[row, n : n + 11])


@pytest.mark.parametrize("pattern", ["S", "SL"])
def test_a_rewind_past_what_a_ring_keeps_is_refused(pattern):
    model = windowed(pattern=pattern, block_size=LONG)
    cache = KVCache(model, 1, LONG)
    with torch.no_grad():
        model.hidden(tokens(1, WINDOW + REWIND), cache)
        cache.rewind(WINDOW + REWIND - 1)  # nothing was written over
        model.hidden(tokens(1, 40), cache)
        cache.rewind(3)
        cache.rewind(5)
        message = "cannot rewind 1 tokens to 32 of once 41: a window keeps 8 tokens more than it sees"
        with pytest.raises(ValueError, match=message):
            cache.rewind(1)
        model.hidden(tokens(1, 20), cache)
        cache.rewind(REWIND)
        with pytest.raises(ValueError, match="cannot rewind"):
            cache.rewind(1)


def test_memory_is_flat_and_as_predicted():
    model = windowed()
    size = 2 * 2 * 3 * 2 * (WINDOW + REWIND) * 8 * 8
    for length in 100, 10**9:
        cache = KVCache(model, 3, length)
        assert sum(x.nbytes for x in cache.k + cache.v) == size
        assert kv_cache_bytes(model.config, 3, length, 8) == size
    mixed = windowed(pattern="SL")
    cache = KVCache(mixed, 3, 20)
    assert [k.size(2) for k in cache.k] == [13, 20]
    assert sum(x.nbytes for x in cache.k + cache.v) == kv_cache_bytes(mixed.config, 3, 20, 8)


@pytest.mark.parametrize("pos, heads", [("rope", 1), ("alibi", 4)])
@pytest.mark.parametrize("batch_size", [0, 2])
def test_the_bytes_of_a_mask_are_as_predicted(pos, heads, batch_size):
    for window, T in itertools.product([0, 3, 5, 24], [5, 8, 11, 24]):
        model = windowed(pos=pos, window=window, block_size=T)
        places = torch.arange(T)
        doc = torch.zeros(batch_size, T) if batch_size else None
        mask = make_sight(places, places, doc, doc, model.score_bias, window=window).mask
        expected = 0
        if mask is not None:
            pairs = mask.numel() // heads // max(1, batch_size)
            expected = mask.nbytes + 8 * pairs
        assert mask_bytes(model.config, batch_size) == expected


def test_the_mask_of_a_long_text_is_one_of_blocks():
    c = ModelConfig(vocab_size=V, block_size=4096, window=128)
    assert mask_bytes(c) == 4096 * 256 * (1 + 8)
    assert mask_bytes(replace(c, window_pattern="SSL")) == 0
    assert mask_bytes(replace(c, window_pattern="SSL"), 2) == 4096**2 * (2 + 8)
    assert mask_bytes(replace(c, window=4096)) == 0


def test_a_text_with_no_end_needs_windows_and_positions_that_have_none():
    for pos in POSITIONS:
        assert bool(windowed(pos).config.what_ends_a_text) == (pos == "learned")
        assert windowed(pos, "SL").config.what_ends_a_text
        assert build(pos=pos).config.what_ends_a_text
    with pytest.raises(ValueError, match="25 tokens do not fit in block_size=24"):
        windowed("learned")(tokens(1, 25))


@pytest.mark.parametrize("pos", ENDLESS)
def test_a_model_writes_on_past_its_context(pos):
    model = windowed(pos)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (30, 3, 24)]
    *_, rows = generate(model, prompts, 150, temperature=0, past_end="slide")
    assert [row.end for row in rows] == ["length"] * 3
    peer = long_peer(model)
    for prompt, row in zip(prompts, rows):
        with torch.no_grad():
            logits = peer(torch.tensor([prompt + row.ids]))[0][0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row.ids


@pytest.mark.parametrize(
    "pos, pattern, message",
    [
        ("learned", "S", "pos=learned has no positions past block_size"),
        ("rope", "SL", "window_pattern=SL has layers that see the whole text"),
        ("none", "L", "window_pattern=L has layers that see the whole text"),
    ],
)
def test_what_ends_a_text_is_named(pos, pattern, message):
    with pytest.raises(ValueError, match=message):
        next(generate(windowed(pos, pattern), [[1]], 5, past_end="slide"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": -1}, "window must be at least 0"),
        ({"window_pattern": ""}, "window_pattern has an S"),
        ({"window_pattern": "SX"}, "window_pattern has an S"),
        ({"window_pattern": "SSSSL"}, "window_pattern=SSSSL has 5 letters and n_layer is 4"),
    ],
)
def test_impossible_windows_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(vocab_size=V, **settings)
