"""The KV cache: what a model keeps of the tokens it has read, so that the next one costs one token.

    cache = model.new_cache(batch_size, max_len)
    logits, _ = model(idx, cache=cache)           # again and again: idx (B, T) comes after what is in it
    cache.rewind([0, 2])                          # the second row forgets its last two tokens

A layer with a window keeps the last tokens alone, in a ring. StaticCache is another filling of the same
methods, for steps that are captured once and replayed.
"""

import numbers

import torch

REWIND = 8  # tokens that a ring holds beyond its window, so that as many can be forgotten


def positions(doc):
    """Returns each token's place in its own document: (B, S) -> (B, S). A document is a run of equal numbers."""
    place = torch.arange(doc.size(1), device=doc.device)
    is_first = torch.ones_like(doc, dtype=torch.bool)
    is_first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return place - torch.where(is_first, place, 0).cummax(dim=1).values


def capacity(window, max_len):
    """Returns how many tokens a layer with this window (0: it sees all) keeps of max_len."""
    return min(max_len, window + REWIND) if window else max_len


def rearranged(x, rows):
    """Returns x (B, ...) with row i what row rows[i] was: in its own place, where each comes from itself or from
    below.
    """
    if any(old < new for new, old in enumerate(rows)):
        return x[rows]
    for new, old in enumerate(rows):
        if new != old:
            x[new] = x[old]
    return x[: len(rows)]


class KVCache:
    """Keys and values of the tokens seen so far: a buffer pair a layer [B, n_kv_head, capacity, D],
    written in place.

    One generation makes one. Each row has a length of its own, and its next tokens go to the places
    after it: all layers `update` them there, then model.hidden lets the cache `advance`. Place p of a
    row is in slot p % capacity, so that a layer with a window, whose capacity is smaller than max_len,
    writes over what it sees no more. Rows of equal length, which is what all are until one is rewound
    further than another, are written and read as slices. Capacity is fixed; nothing ever grows.

        lengths   (B,) int64 on the model's device: tokens in each row
        length    of the longest row: the same knowledge without asking the device
        docs      {window: (B, 1, capacity, 2) int64} once documents or padding were named: each token's document and
                  its position in it; else None
    """

    def __init__(self, model, batch_size, max_len):
        c = model.config
        example = model.example
        self.sizes = {}  # of the layers' rings, by window
        self.k = []
        for layer in range(c.n_layer):
            window = c.window_of(layer)
            self.sizes[window] = capacity(window, max_len)
            shape = (batch_size, c.n_kv_head, self.sizes[window], c.head_dim)
            self.k.append(torch.zeros(shape, dtype=example.dtype, device=example.device))
        self.v = [torch.zeros_like(k) for k in self.k]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=example.device)
        self.length = 0
        self.max_len = max_len
        self.is_level = True  # all rows have the same length
        self.docs = None
        # the length of each row before it was rewound: what was written over until then is gone
        self.longest = [0] * batch_size

    def places(self, T):
        """Returns where T new tokens go: (T,) where the rows are level, else (B, T). Raises ValueError
        where they do not fit.
        """
        if self.length + T > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} tokens: {self.length} are in it and {T} more do not fit"
            )
        device = self.lengths.device
        if self.is_level:
            return torch.arange(self.length, self.length + T, device=device)
        return self.lengths[:, None] + torch.arange(T, device=device)

    def overtakes(self, size, T):
        """Returns whether T new tokens in a ring of this size write over what the first of them see."""
        return self.length + T > size and T > REWIND + 1

    def slot_places(self, size, T):
        """Returns the places of the tokens in the slots of a ring of this size, ([B,] S), when T new ones
        are in it; negative for a slot that has none.
        """
        end = self.length + T
        slots = torch.arange(min(end, size), device=self.lengths.device)
        if self.is_level and end <= size:
            return slots
        ends = end if self.is_level else (self.lengths + T)[:, None]
        return slots + size * ((ends - 1 - slots) // size)

    def begin(self, T, doc=None):
        """Makes room for T new tokens; doc (B, T) their documents, None: each row goes on with its last.

        Returns (places, pos, doc, keys): where the tokens go and their positions in their documents, each
        ([B,] T); their documents (B, T) or None; and for each window (places ([B,] S), documents or None)
        of all tokens that `update` returns for its layers. Raises ValueError where they do not fit.
        """
        places = self.places(T)
        key_places = {}
        for window, size in self.sizes.items():
            if self.overtakes(size, T):
                old = self.slot_places(size, 0)
                new = places.expand(*old.shape[:-1], T)
                key_places[window] = torch.cat((old, new), -1)
            else:
                key_places[window] = self.slot_places(size, T)
        if doc is None and self.docs is None:
            return places, places, None, {window: (keys, None) for window, keys in key_places.items()}

        B = self.lengths.size(0)
        if self.docs is None:  # what came before is one document
            self.docs = {}
            for window, size in self.sizes.items():
                docs = torch.zeros(B, 1, size, 2, dtype=torch.long, device=doc.device)
                old = self.slot_places(size, 0)
                docs[:, 0, : old.size(-1), 1] = old
                self.docs[window] = docs
        docs = next(iter(self.docs.values()))  # any: each has the last token
        last_slots = (self.lengths - 1).clamp(min=0) % docs.size(2)
        last_doc, last_pos = docs[torch.arange(B, device=docs.device), 0, last_slots].unbind(-1)  # (B,)
        next_pos = torch.where(self.lengths > 0, last_pos + 1, 0)[:, None]
        if doc is None:
            doc = last_doc[:, None].expand(B, T)
            pos = next_pos + torch.arange(T, device=doc.device)
        else:
            pos = positions(doc)
            goes_on = (pos == torch.arange(T, device=doc.device)) & (doc == last_doc[:, None])
            pos = pos + torch.where(goes_on, next_pos, 0)
        keys = {}
        for window, docs in self.docs.items():
            joined = self.join(docs, places, torch.stack((doc, pos), -1)[:, None])
            keys[window] = (key_places[window], joined[:, 0, :, 0])
        return places, pos, doc, keys

    def update(self, layer, places, k, v):
        """Stores k, v (B, n_kv_head, T, D) of new tokens; returns those of all tokens that they may see
        (B, n_kv_head, S, D).
        """
        return self.join(self.k[layer], places, k), self.join(self.v[layer], places, v)

    def join(self, buffer, places, x):
        """Stores x (B, h, T, d) of new tokens; returns that of all tokens that they may see (B, h, S, d)."""
        T, size = x.size(2), buffer.size(2)
        x = x.type_as(buffer)
        if not self.overtakes(size, T):
            self.store(buffer, places, x, self.length)
            return buffer[:, :, : self.length + T]
        joined = torch.cat((buffer[:, :, : self.length], x), 2)
        first = max(0, T - size)  # those before it have no slot any more
        self.store(buffer, places[..., first:], x[:, :, first:], self.length + first)
        return joined

    def store(self, buffer, places, x, start):
        """Writes x (B, h, T, d) into the slots of places, which are start and those after it where rows
        are level.
        """
        T, size = x.size(2), buffer.size(2)
        start = start % size
        if self.is_level and start + T <= size:
            buffer[:, :, start : start + T] = x
        else:
            slots = (places % size).view(-1, 1, T, 1)
            buffer.scatter_(2, slots.expand_as(x), x)

    def advance(self, T):
        """Counts T new tokens, which every layer has stored."""
        self.length += T
        self.lengths += T

    def keep(self, rows):
        """Makes row i what row rows[i] was, once or more often, and forgets all others."""
        self.k = [rearranged(k, rows) for k in self.k]
        self.v = [rearranged(v, rows) for v in self.v]
        self.lengths = rearranged(self.lengths, rows)
        self.longest = [self.longest[row] for row in rows]
        if self.docs is not None:
            self.docs = {window: rearranged(docs, rows) for window, docs in self.docs.items()}

    def rewind(self, n):
        """Forgets the last n tokens: of every row, or with a list of numbers so many of each. Raises
        ValueError past the start, and where a ring has written over what would be seen then.
        """
        counts = [n] * self.lengths.size(0) if isinstance(n, numbers.Integral) else list(n)
        lengths = [self.length] * len(counts) if self.is_level else self.lengths.tolist()
        size = min(self.sizes.values())
        longest = [max(pair) for pair in zip(self.longest, lengths)]
        for count, length, most in zip(counts, lengths, longest, strict=True):
            if not 0 <= count <= length:
                raise ValueError(f"cannot rewind {count} tokens: the cache holds {length}")
            if most > size and most - (length - count) > REWIND:
                raise ValueError(
                    f"cannot rewind {count} tokens to {length - count} of once {most}: a window keeps {REWIND} "
                    f"tokens more than it sees"
                )
        self.longest = longest
        lengths = [length - count for length, count in zip(lengths, counts)]
        self.length = max(lengths)
        self.is_level = min(lengths) == self.length
        self.lengths = torch.tensor(lengths, device=self.lengths.device)


class StaticCache:
    """The buffers of a KVCache whose rows are level, with all that changes kept on the device: each call adds one
    token to each row by the same work on the same tensors, whatever is in them. Queries see every slot, under
    a mask that leaves out those without a token.

    Past the last slot, and past the last position of the model, a row writes over its last token again and
    again: that is for rows that have ended, and nobody reads what they compute.

        place     (1,) int64: where the next token of each row goes
        pos       (1,) or (B, 1) int64: its position, of each row where there is padding
    """

    length = 0  # no count on the host: who calls knows where a row's context ends

    def __init__(self, cache, config):
        if not cache.is_level:
            raise ValueError("rows of different lengths go to different slots")
        device = cache.lengths.device
        self.k = cache.k
        self.v = cache.v
        self.slots = {window: torch.arange(size, device=device) for window, size in cache.sizes.items()}
        self.last_place = cache.max_len - 1
        self.last_pos = config.block_size - 1 if config.what_ends_a_text else cache.max_len - 1
        self.place = torch.full((1,), cache.length, device=device)
        self.pos = self.place.clone()
        self.docs = None  # {window: (B, size)}, the document of each slot, where rows are padded
        self.row_docs = None  # (B, 1), that of the next token: the one of the last
        if cache.docs is not None:
            self.docs = {window: docs[:, 0, :, 0].clone() for window, docs in cache.docs.items()}
            window, docs = next(iter(cache.docs.items()))  # any: each has the last token
            last_slot = (cache.length - 1) % len(self.slots[window])
            self.row_docs, last_pos = docs[:, 0, last_slot : last_slot + 1].clone().unbind(-1)
            self.pos = last_pos + 1

    def begin(self, T, doc=None):
        """Returns what KVCache.begin does for one more token, the places with an axis for rows: (1, 1) and (1, S)."""
        keys = {}
        for window, slots in self.slots.items():
            size = len(slots)
            # the last place up to this one that falls to each slot: negative where there is none
            places = slots + size * ((self.place - slots) // size)
            if self.docs is not None:
                self.docs[window].index_copy_(1, self.place % size, self.row_docs)
                keys[window] = places[None], self.docs[window]
            else:
                keys[window] = places[None], None
        return self.place[None], self.pos, self.row_docs, keys

    def update(self, layer, places, k, v):
        """Stores k, v (B, n_kv_head, 1, D) of the new tokens; returns those of all slots (B, n_kv_head, S, D)."""
        slot = places[0] % self.k[layer].size(2)
        self.k[layer].index_copy_(2, slot, k.type_as(self.k[layer]))
        self.v[layer].index_copy_(2, slot, v.type_as(self.v[layer]))
        return self.k[layer], self.v[layer]

    def advance(self, T):
        """Counts a new token, which every layer has stored."""
        self.place.add_(T).clamp_(max=self.last_place)
        self.pos.add_(T).clamp_(max=self.last_pos)
