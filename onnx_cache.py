"""Keys and values between the calls of a graph that export_onnx.py has written, which takes them and returns them.

past = Past(config, batch_size, max_len, counts)     # for graphs with onnxruntime's own attention: FusedPast
past.read(session, idx, places, logits)
"""

import copy
import dataclasses

import numpy as np
import torch


def cache_names(c, which):
    """Returns the names of the keys and values in the graph, in its order.

    "past" gives past_k.0, past_v.0, past_k.1 ...: the inputs after ids (B, T), places (K,) and, in a graph of
    FusedPast, total. "present" gives the outputs after logits (B, K, V). export_onnx.py says their shapes.
    """
    return [f"{which}_{kv}.{layer}" for layer in range(c.n_layer) for kv in "kv"]


class Past:
    """Keys and values of the `length` tokens seen so far, in arrays (max_len, B, n_kv_head, head_dim).

    A call writes present to the memory from which it reads past, so that only new tokens move: onnxruntime's
    Concat copies each input to its place with memcpy, and so the past onto itself. That is how it is built, and
    nothing that it promises (1.21, 1.22, 1.24 and 1.31 give the same bits as with fresh arrays), so the tests
    and each export check it.
    """

    row_axis = 1

    def __init__(self, c, batch_size, max_len, counts):
        import onnxruntime

        state = onnxruntime.capi.onnxruntime_pybind11_state
        self.Vector = state.OrtValueVector
        self.options = onnxruntime.RunOptions()
        self.length = 0
        self.max_len = max_len
        self.counts = counts  # inputs between ids and the keys and values: onnx_model.find_counts
        self.inputs = ["ids", *counts, *cache_names(c, "past")]
        self.outputs = ["logits", *cache_names(c, "present")]
        shape = self.shape(c, batch_size, max_len)
        self.arrays = [np.empty(shape, np.float32) for _ in range(2 * c.n_layer)]
        self.addresses = [array.ctypes.data for array in self.arrays]
        self.types = [np.float32] * len(self.arrays)
        cpu = state.OrtDevice(state.OrtDevice.cpu(), state.OrtDevice.default_memory(), 0)
        self.devices = [cpu] * len(self.inputs)

    def shape(self, c, batch_size, max_len):
        return max_len, batch_size, c.n_kv_head, c.head_dim

    def bound_shape(self, length):
        """Returns the shape of the part of each array that a call reads or writes, with so many tokens in it."""
        return self.arrays[0][:length].shape  # a slice's, so that it never reaches beyond the array

    def vector(self, firsts, shape):
        """Returns the vector of what a call reads or writes: the arrays `firsts`, then the first part of each array of
        keys or values, with this shape.

        To bind each array by its name would take 0.15 ms more a call.
        """
        vector = self.Vector()
        vector.push_back_batch(
            [*firsts, *self.arrays],
            [*(first.ctypes.data for first in firsts), *self.addresses],
            [*(first.dtype.type for first in firsts), *self.types],
            [*(first.shape for first in firsts), *[shape] * len(self.arrays)],
            self.devices,
        )
        return vector

    def read(self, session, idx, places, logits):
        """Reads T more tokens idx (B, T) and writes the logits of K of them, those at places (K,), into the array
        logits (B, K, V), or of all where the graph has no places.
        """
        total = self.length + idx.shape[1]
        counts = {"places": places, "total": np.array(total, np.int32)}
        firsts = [idx, *(counts[name] for name in self.counts)]
        feeds = self.vector(firsts, self.bound_shape(self.length))
        fetches = self.vector([logits], self.bound_shape(total))
        session.run_with_ortvaluevector(
            self.options, self.inputs, feeds, self.outputs, fetches, self.devices
        )
        self.length = total

    def keep(self, rows):
        """Makes row i what row rows[i] was, and forgets all others."""
        self.arrays = [array.take(rows, self.row_axis) for array in self.arrays]
        self.addresses = [array.ctypes.data for array in self.arrays]

    def keys_and_values(self):
        """Returns the arrays' tokens, each (length, B, n_kv_head, head_dim), in the order of cache_names()."""
        return [array[: self.length] for array in self.arrays]


class FusedPast(Past):
    """Keys and values of a graph with onnxruntime's own attention, in arrays (B, n_kv_head, max_len, head_dim).
    A call is given whole arrays, and how many tokens there will be; it writes the new ones to their places.
    """

    row_axis = 0

    def shape(self, c, batch_size, max_len):
        return batch_size, c.n_kv_head, max_len, c.head_dim

    def bound_shape(self, length):
        return self.arrays[0].shape

    def read(self, session, idx, places, logits):
        """Does what Past.read does. After a past GroupQueryAttention does not take several tokens of several rows:
        those are read row by row.
        """
        B, T = idx.shape
        if self.length and B > 1 and T > 1:
            for row in range(B):
                part = copy.copy(self)
                part.arrays = [array[row : row + 1] for array in self.arrays]
                part.addresses = [array.ctypes.data for array in part.arrays]
                part.read(session, idx[row : row + 1], places, logits[row : row + 1])
            self.length += T
            return
        super().read(session, idx, places, logits)

    def keys_and_values(self):
        """Does what Past.keys_and_values does."""
        return [array[:, :, : self.length].transpose(2, 0, 1, 3) for array in self.arrays]


@dataclasses.dataclass
class Part:
    """The rows of a batch whose prompts have the same length, so that they share one Past."""

    rows: torch.Tensor
    past: Past


@dataclasses.dataclass
class Cache:
    """What OnnxModel.next_logits keeps between calls."""

    max_len: int
    parts: list = dataclasses.field(default_factory=list)

    def read(self, model, windows):
        """Does what KVCache.read does, for windows of one length at a time, as the graph has no padding."""
        lengths = torch.tensor([len(window) for window in windows])
        logits = torch.zeros(len(windows), model.config.vocab_size)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            past = model.new_past(len(rows), self.max_len)
            self.parts.append(Part(rows, past))
            logits[rows] = model.last_logits(torch.tensor([windows[row] for row in rows]), past)
        return logits

    def keep(self, rows):
        """Makes row i what row rows[i] was, and forgets all others."""
        parts = []
        for part in self.parts:
            new = [i for i, row in enumerate(rows) if row in part.rows]
            if new:
                part.past.keep([part.rows.tolist().index(rows[i]) for i in new])
                parts.append(Part(torch.tensor(new), part.past))
        self.parts = parts
