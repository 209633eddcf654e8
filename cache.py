"""The KV cache: what a model keeps of the tokens it has read, so that the next one costs one token.

    cache = model.new_cache(batch_size, max_len)
    logits, _ = model(idx, cache=cache)           # again and again: idx (B, T) comes after what is in it
    cache.rewind([0, 2])                          # the second row forgets its last two tokens

A layer with a window keeps only the last tokens, in a ring. StaticCache has the same methods for steps that are
captured once and replayed.
"""

import copy
import numbers

import torch

REWIND = 8  # tokens that a ring holds beyond its window, so that as many can be forgotten
PADDING = 64  # tokens: a processor reads less padding than that sooner than it makes another call


def positions(doc):
    """Returns each token's place in its own document: (B, S) -> (B, S). A document is a run of equal numbers; padding
    (-1) has place 0, however much there is.
    """
    place = torch.arange(doc.size(1), device=doc.device)
    is_first = torch.ones_like(doc, dtype=torch.bool)
    is_first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    places = place - torch.where(is_first, place, 0).cummax(dim=1).values
    return places.masked_fill(doc == -1, 0)


def capacity(window, max_len):
    """Returns how many tokens a layer with this window (0: it sees all) keeps of max_len."""
    return min(max_len, window + REWIND) if window else max_len


def last_places(slots, place, size):
    """Returns which place each slot of a ring of this size holds when the last token stands at `place`; negative for
    a slot that holds none. In a ring of 4 whose last token stands at place 5, slots 0 to 3 hold 4, 5, 2 and 3.
    """
    return slots + size * ((place - slots) // size)


def cut(lengths, first=0):
    """Splits windows of these lengths, which grow from row to row, into runs that are read in one call each: halves,
    and halves of those, as long as that saves PADDING. Returns (first, end) of each run's rows.
    """
    middle = len(lengths) // 2
    if middle * (lengths[-1] - lengths[middle - 1]) < PADDING:
        return [(first, first + len(lengths))]
    return cut(lengths[:middle], first) + cut(lengths[middle:], first + middle)


def rearranged(x, rows):
    """Returns x (B, ...) with row i what row rows[i] was. It is changed in place where no row comes from above its
    new place, so that none is overwritten before it is read.
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

    Each generation makes its own. Each row has its own length, and its next tokens go to the places after
    that: every layer stores them there with `update`, then model.hidden calls `advance`. Place p of a
    row is in slot p % capacity, so that a layer with a window, whose capacity is smaller than max_len,
    writes over what it no longer sees. All rows have the same length until one is rewound further than
    another; as long as they have, they are written and read as slices. Capacity is fixed; nothing grows.

        lengths   (B,) int64 on the model's device: tokens in each row
        length    of the longest row, a number on the host: nobody has to wait for the device to learn it
        docs      {window: (B, 1, capacity, 2) int64}, each token's document and its position in that; None
                  until documents or padding are named
        last      (B, 2) int64, the same of each row's last token, position -1 where it has none; else None
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
        self.last = None
        # the length of each row before it was rewound: what its ring had written over by then is gone
        self.longest = [0] * batch_size

    def read(self, model, windows):
        """Reads one window of ids a row, padded on the left, into this cache, which is empty; returns logits (B, V) of
        what comes after each. On a processor windows of growing length get little padding; see cut.
        """
        lengths = [len(window) for window in windows]
        longest = max(lengths)
        if min(lengths) == longest:
            return model.next_logits(torch.tensor(windows, device=model.device), self)
        self.name_documents()
        runs = cut(lengths) if model.device.type == "cpu" else [(0, len(lengths))]
        logits = []
        for first, end in runs:
            T = max(lengths[first:end])
            padding = [T - length for length in lengths[first:end]]
            idx = [[0] * n + list(window) for n, window in zip(padding, windows[first:end])]
            doc = [[-1] * n + [0] * (T - n) for n in padding]
            rows = self.part(slice(first, end), longest - T)
            idx, doc = torch.tensor((idx, doc), device=model.device)
            logits.append(model.next_logits(idx, rows, doc))
        self.advance(longest)
        return torch.cat(logits)

    def part(self, rows, padding):
        """Returns a cache for a slice of the rows of this empty one, in the same memory, that has already read so many
        tokens of padding.
        """
        part = copy.copy(self)
        part.k = [k[rows] for k in self.k]
        part.v = [v[rows] for v in self.v]
        part.lengths = self.lengths[rows] + padding
        part.length = padding
        part.docs = {window: docs[rows] for window, docs in self.docs.items()}
        part.last = self.last[rows]
        for docs in part.docs.values():
            docs[..., 0] = -1
        part.last.fill_(-1)
        return part

    def name_documents(self):
        """Begins to keep documents. Each row's tokens so far are one document."""
        self.docs = {}
        for window, size in self.sizes.items():
            docs = self.lengths.new_zeros(len(self.lengths), 1, size, 2)
            places = self.slot_places(size, 0)
            docs[:, 0, : places.size(-1), 1] = places
            self.docs[window] = docs
        self.last = torch.stack((torch.zeros_like(self.lengths), self.lengths - 1), -1)

    def places(self, T):
        """Returns where T new tokens go: (T,) where all rows have one length, else (B, T). Raises ValueError
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
        # the first one sees window - 1 tokens before it, and the ring keeps the last window + REWIND
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
        return last_places(slots, ends - 1, size)

    def begin(self, T, doc=None):
        """Says where T new tokens go, and counts their documents. doc (B, T): their documents; None: each row
        goes on with its last one.

        Returns (places, pos, doc, keys): where the tokens go and their positions in their documents, each
        ([B,] T); their documents (B, T) or None; and keys {window: (places ([B,] S), documents or None)} of
        all tokens that `update` returns for layers with that window. Raises ValueError where they do not fit.
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

        if self.docs is None:
            self.name_documents()
        last_doc, last_pos = self.last.split(1, -1)  # (B, 1)
        steps = torch.arange(T, device=places.device)
        if doc is None:
            doc = last_doc.expand(-1, T)
            pos = last_pos + 1 + steps
        else:
            pos = positions(doc)
            goes_on = (pos == steps) & (doc == last_doc)
            pos = pos + torch.where(goes_on, last_pos + 1, 0)
        new = torch.stack((doc, pos), -1)  # (B, T, 2)
        doc = new[..., 0]
        self.last.copy_(new[:, -1])
        keys = {}
        for window, docs in self.docs.items():
            joined = self.join(docs, places, new[:, None])
            keys[window] = (key_places[window], joined[:, 0, :, 0])
        return places, pos, doc, keys

    def update(self, layer, places, k, v):
        """Stores k, v (B, n_kv_head, T, D) of new tokens; returns k and v of all tokens that these may see, each
        (B, n_kv_head, S, D).
        """
        return self.join(self.k[layer], places, k), self.join(self.v[layer], places, v)

    def join(self, buffer, places, x):
        """Stores x (B, h, T, d) of new tokens; returns x of all tokens that these may see, (B, h, S, d)."""
        T, size = x.size(2), buffer.size(2)
        x = x.type_as(buffer)
        if not self.overtakes(size, T):
            self.store(buffer, places, x, self.length)
            return buffer[:, :, : self.length + T]
        joined = torch.cat((buffer[:, :, : self.length], x), 2)
        first = max(0, T - size)  # the ring keeps no new token before this one
        self.store(buffer, places[..., first:], x[:, :, first:], self.length + first)
        return joined

    def store(self, buffer, places, x, start):
        """Writes x (B, h, T, d) into the slots of these places; where all rows have one length, they are `start`
        and the ones after it.
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
        """Makes row i what row rows[i] was, and forgets all others. A row may be there more than once."""
        self.k = [rearranged(k, rows) for k in self.k]
        self.v = [rearranged(v, rows) for v in self.v]
        self.lengths = rearranged(self.lengths, rows)
        self.longest = [self.longest[row] for row in rows]
        if not self.is_level:
            lengths = self.lengths.tolist()
            self.length = max(lengths)
            self.is_level = min(lengths) == self.length
        if self.docs is not None:
            self.docs = {window: rearranged(docs, rows) for window, docs in self.docs.items()}
            self.last = rearranged(self.last, rows)

    def rewind(self, n):
        """Forgets the last n tokens of every row, or of each row as many as a list says. Raises ValueError
        past the start, and where a ring has written over what would be seen then.
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
        if self.docs is not None:
            docs = next(iter(self.docs.values()))  # any: each has the last token
            last_slots = (self.lengths - 1).clamp(min=0) % docs.size(2)
            self.last = docs[torch.arange(len(counts), device=docs.device), 0, last_slots]
            self.last[self.lengths == 0, 1] = -1


class StaticCache:
    """The buffers of a KVCache whose rows have one length, with all that changes kept on the device: each call adds
    one token to each row by the same work on the same tensors, whatever is in them. Queries are given every slot,
    with a mask that hides those without a token.

    Past the last slot, and past the model's last position, a row writes over its last token again and
    again: only rows that have ended get there, and nobody reads what they compute.

        place     (1,) int64: where the next token of each row goes
        pos       (1,) or (B, 1) int64: its position, one a row where there is padding
        joint     {layer: products.joined of its q, k and v}, for layers that compute them as one product
    """

    length = 0  # no count on the host: the caller knows where a row's context ends

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
        self.joint = {}
        self.docs = None  # {window: (B, size)}, the document of each slot, where rows are padded
        self.row_docs = None  # (B, 1), the document of each row's next token: its last one's
        if cache.docs is not None:
            self.docs = {window: docs[:, 0, :, 0].clone() for window, docs in cache.docs.items()}
            self.row_docs, last_pos = cache.last.clone().split(1, -1)
            self.pos = last_pos + 1

    def begin(self, T, doc=None):
        """Returns what KVCache.begin returns for one more token; places have an axis for rows, (1, 1) and (1, S)."""
        keys = {}
        for window, slots in self.slots.items():
            size = len(slots)
            places = last_places(slots, self.place, size)
            if self.docs is not None:
                self.docs[window].index_copy_(1, self.place % size, self.row_docs)
                keys[window] = places[None], self.docs[window]
            else:
                keys[window] = places[None], None
        return self.place[None], self.pos, self.row_docs, keys

    def update(self, layer, places, k, v):
        """Stores k, v (B, n_kv_head, 1, D) of the new tokens; returns k and v of all slots (B, n_kv_head, S, D)."""
        slot = places[0]
        size = self.k[layer].size(2)
        if size <= self.last_place:  # a ring; elsewhere this would launch a kernel a layer for nothing
            slot = slot % size
        self.k[layer].index_copy_(2, slot, k.type_as(self.k[layer]))
        self.v[layer].index_copy_(2, slot, v.type_as(self.v[layer]))
        return self.k[layer], self.v[layer]

    def advance(self, T):
        """Counts a new token, which every layer has stored."""
        self.place.add_(T).clamp_(max=self.last_place)
        self.pos.add_(T).clamp_(max=self.last_pos)
