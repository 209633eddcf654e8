"""Which tokens a query sees: one rule for caches, documents, windows and biases.

Letters in shapes: B rows, T new tokens, S all tokens that a query may see (those in a cache and the new ones), H heads.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Sight(NamedTuple):
    """Which tokens each query of a layer sees."""

    mask: Any  # ([B, H,] T, S): boolean, or what is added to scores; None for none
    is_causal: bool = False  # the mask is the plain causal one, which SDPA makes by itself
    block: int = 0  # queries are taken in blocks of so many, with those before as keys; 0: all at once


def as_numbers(mask, dtype):
    """Returns what a boolean mask adds to scores: 0 where a key is seen, -inf elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def attention_mask(places, keys, doc=None, key_doc=None, bias=None, dtype=torch.float32, window=0):
    """The one mask rule. Returns (mask, is_causal) for queries at places ([B,] T) and keys at places ([B,] S),
    negative where there is no key; doc (B, T) and key_doc (B, S) are their documents.

    SDPA's is_causal aligns queries and keys at the first token, so it is right only while the cache is
    empty. A lone query sees everything and needs no mask. All else gets a mask from absolute places:
    boolean, or a bias with -inf. With a window a query sees that many tokens, itself included (Mistral).
    A padding token (doc -1) sees the padding before it: nobody reads what it computes, but it must not
    be nan.
    """
    T, S = places.size(-1), keys.size(-1)
    is_level = places.dim() == keys.dim() == 1
    if isinstance(S, int) and S <= window:  # while a model is traced, S is no int
        window = 0  # it hides nothing
    if doc is None and bias is None and is_level and not window and (T == 1 or S == T):
        # T > 1 is a symbol where a compiler lets T vary, and SDPA takes a bool
        return None, (False if T == 1 else True)
    distance = keys[..., None, :] - places[..., None]  # ([B,] T, S)
    mask = distance <= 0
    if window:
        mask = mask & (distance > -window)
    if not is_level:
        mask = (mask & (keys >= 0)[..., None, :])[:, None]  # (B, 1, T, S)
        distance = distance[:, None]
    if doc is not None:
        mask = mask & (doc[:, :, None] == key_doc[:, None, :])[:, None]  # (B, 1, T, S)
    if bias is not None:
        mask = bias(distance).masked_fill(~mask, -math.inf).to(dtype)  # ([B,] H, T, S)
    return mask, False


def in_blocks(x, width):
    """Cuts tokens (B, T, ...) into blocks (B, n, width, ...), the last filled up with zeros."""
    missing = -x.size(1) % width
    x = F.pad(x, (*[0] * 2 * (x.dim() - 2), 0, missing))
    return x.unflatten(1, (-1, width))


def with_previous(blocks):
    """Puts the block before in front of each of blocks (B, n, width, ...): (B, n, 2 width, ...); zeros
    before the first.
    """
    previous = torch.cat((torch.zeros_like(blocks[:, :1]), blocks[:, :-1]), 1)
    return torch.cat((previous, blocks), 2)


def make_sight(places, keys, doc=None, key_doc=None, bias=None, dtype=torch.float32, window=0):
    """Returns the Sight of a layer with this window; arguments as attention_mask's.

    A text much longer than the window is cut into blocks of as many queries as the window is wide: a block
    sees itself and the block before, and nothing else is computed.
    """
    T = places.size(-1)
    if not window or keys is not places or T <= 2 * window:
        return Sight(*attention_mask(places, keys, doc, key_doc, bias, dtype, window))
    n = math.ceil(T / window)
    places = torch.arange(n * window, device=places.device).view(n, window)
    keys = with_previous(places[None])[0]
    keys[0, :window] = -1
    if doc is not None:
        B = doc.size(0)
        blocks = in_blocks(doc, window)
        key_doc = with_previous(blocks).flatten(0, 1)
        doc = blocks.flatten(0, 1)
        places, keys = places.repeat(B, 1), keys.repeat(B, 1)
    mask, _ = attention_mask(places, keys, doc, key_doc, bias, dtype, window)
    return Sight(mask, False, window)
