"""The KV cache: what a model keeps of the tokens it has read, so that the next one costs one token.

    cache = model.new_cache(batch_size, max_len)
    logits, _ = model(idx, cache=cache)           # again and again: idx (B, T) comes after what is in it
    cache.rewind([0, 2])                          # the second row forgets its last two tokens

Windows, speculation and captured graphs are to be other fillings of the same methods.
"""

import numbers

import torch


class KVCache:
    """Keys and values of the tokens seen so far: a buffer pair a layer [B, n_kv_head, max_len, D],
    written in place.

    One generation makes one. Each row has a length of its own, and its next tokens go to the places
    after it: all layers `update` them there, then model.hidden lets the cache `advance`. Rows of equal
    length, which is what all are until one is rewound further than another, are written and read as
    slices. Capacity is fixed; nothing is ever copied or moved.

        lengths   (B,) int64 on the model's device: tokens in each row
        length    of the longest row: the same knowledge without asking the device
        doc       (B, max_len) int64 once documents or padding were named: the one that each token belongs to; else None
    """

    def __init__(self, model, batch_size, max_len):
        c = model.config
        embedding = model.wte.weight
        shape = (batch_size, c.n_kv_head, max_len, c.head_dim)
        self.k = [
            torch.zeros(shape, dtype=embedding.dtype, device=embedding.device) for _ in range(c.n_layer)
        ]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=embedding.device)
        self.length = 0
        self.max_len = max_len
        self.is_level = True  # all rows have the same length
        self.doc = None

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

    def update(self, layer, places, k, v):
        """Stores k, v (B, n_kv_head, T, D) of new tokens; returns those of all tokens (B, n_kv_head, S,
        D), as views.
        """
        end = self.length + k.size(2)
        if self.is_level:
            self.k[layer][:, :, self.length : end] = k
            self.v[layer][:, :, self.length : end] = v
        else:
            index = places[:, None, :, None].expand_as(k)
            self.k[layer].scatter_(2, index, k.type_as(self.k[layer]))
            self.v[layer].scatter_(2, index, v.type_as(self.v[layer]))
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def update_doc(self, places, doc):
        """Stores doc (B, T) of new tokens, None: each row goes on with its last. Returns that of all (B,
        S), or None.
        """
        B, T = self.lengths.size(0), places.size(-1)
        if doc is None and self.doc is None:
            return None
        if self.doc is None:
            self.doc = torch.zeros(B, self.max_len, dtype=torch.long, device=doc.device)
        if doc is None:
            last = (self.lengths - 1).clamp(min=0)
            doc = self.doc.gather(1, last[:, None])
        self.doc.scatter_(1, places.expand(B, T), doc.expand(B, T))
        return self.doc[:, : self.length + T]

    def advance(self, T):
        """Counts T new tokens, which every layer has stored."""
        self.length += T
        self.lengths += T

    def rewind(self, n):
        """Forgets the last n tokens: of every row, or with a list of numbers so many of each. Raises
        ValueError past the start.
        """
        counts = [n] * self.lengths.size(0) if isinstance(n, numbers.Integral) else list(n)
        lengths = [self.length] * len(counts) if self.is_level else self.lengths.tolist()
        for count, length in zip(counts, lengths, strict=True):
            if not 0 <= count <= length:
                raise ValueError(f"cannot rewind {count} tokens: the cache holds {length}")
        lengths = [length - count for length, count in zip(lengths, counts)]
        self.length = max(lengths)
        self.is_level = min(lengths) == self.length
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
