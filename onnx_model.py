"""A model that export_onnx.py has written, computed by onnxruntime in the place of model.Transformer.

    import onnx_model
    model, tokenizer, config = onnx_model.load("out/onnx")     # or out/onnx/model_int8.onnx
    sample.generate(model, ...)                                # and train.evaluate(model, ...)

A folder holds model.onnx, maybe model_int8.onnx, tokenizer.json and config.json. Of the graph's inputs and outputs see names().
"""
import dataclasses
import json
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Refusal
from folders import advice
from interop.foreign_tokenizer import ForeignTokenizer
from model import ModelConfig
from tokenizer import Tokenizer

FORMAT = 4  # 1 had no fingerprint, 2 the keys and values of a row together, 3 no bos


def describe(c, tokenizer, start, template, fingerprint):
    """config.json: what a reader needs beside the weights and the tokenizer. fingerprint: of the weights, also in the files."""
    return {"format": FORMAT, "model": dataclasses.asdict(c), "n_layer": c.n_layer, "n_kv_head": c.n_kv_head, "head_dim": c.head_dim,
            "block_size": c.block_size, "vocab_size": c.vocab_size, "eot": tokenizer.eot, "bos": tokenizer.bos, "tokenizer": tokenizer.kind,
            "tokenizer_sha256": tokenizer.sha256, "start": start, "template": template, "fingerprint": fingerprint}


def names(c, which):
    """past_k.0, past_v.0, past_k.1 ...: after ids (B, T) the graph's inputs, (P, B, n_kv_head, head_dim) each; with "present", after
    logits (B, T, V), its outputs, with P + T instead of P."""
    return [f"{which}_{kv}.{layer}" for layer in range(c.n_layer) for kv in "kv"]


class Past:
    """Keys and values of the tokens seen so far: an array (max_len, B, n_kv_head, head_dim) for each of names(), filled from the start.

    What comes out of a call lies where what went in lay. So only the new tokens are moved: onnxruntime's Concat copies each input to its
    place with memcpy, and the past onto itself. That is how it is built, not what it promises (1.21, 1.22, 1.24 and 1.31 give the same bits as
    with fresh arrays); the tests and each export compare.
    """

    def __init__(self, c, batch_size, max_len):
        import onnxruntime
        state = onnxruntime.capi.onnxruntime_pybind11_state
        self.length, self.max_len, self.Vector, self.options = 0, max_len, state.OrtValueVector, onnxruntime.RunOptions()
        self.inputs, self.outputs = ["ids", *names(c, "past")], ["logits", *names(c, "present")]
        self.arrays = [np.empty((max_len, batch_size, c.n_kv_head, c.head_dim), np.float32) for _ in names(c, "past")]
        self.addresses, self.types = [a.ctypes.data for a in self.arrays], [np.float32] * len(self.arrays)
        self.devices = [state.OrtDevice(state.OrtDevice.cpu(), state.OrtDevice.default_memory(), 0)] * len(self.inputs)

    def vector(self, first, length):
        """What onnxruntime is to read or write: an array, and the first `length` tokens of the others. To bind each by its name takes 0.15 ms more."""
        shape, vector = self.arrays[0][:length].shape, self.Vector()
        vector.push_back_batch([first, *self.arrays], [first.ctypes.data, *self.addresses], [first.dtype.type, *self.types],
                               [first.shape, *[shape] * len(self.arrays)], self.devices)
        return vector

    def read(self, session, idx, logits):
        """Reads idx (B, T), writes its logits (B, T, V), and is T tokens longer then."""
        total = self.length + idx.shape[1]
        session.run_with_ortvaluevector(self.options, self.inputs, self.vector(idx, self.length), self.outputs, self.vector(logits, total), self.devices)
        self.length = total


@dataclasses.dataclass
class Part:
    """Rows of a batch that have as many tokens as each other, and so one past."""
    rows: torch.Tensor
    padding: int  # tokens to leave out on the left
    past: Past


@dataclasses.dataclass
class Cache:
    max_len: int
    parts: list = dataclasses.field(default_factory=list)


class OnnxModel(nn.Module):
    """What sample.generate and train.evaluate need of a Transformer, from an onnxruntime session."""

    device = torch.device("cpu")

    def __init__(self, session, config, path):
        super().__init__()
        self.session, self.config, self.path = session, config, path

    def new_past(self, batch_size, max_len):
        return Past(self.config, batch_size, min(max_len, self.config.block_size))

    def run(self, idx, past):
        """Logits (B, T, V), an array, of ids idx (B, T) after a Past, which has them too then. Raises ValueError where they do not fit."""
        total = past.length + idx.size(1)
        if total > past.max_len:
            raise ValueError(f"{total} tokens do not fit in {past.max_len}, the room made for them; block_size is {self.config.block_size}")
        logits = np.empty((*idx.shape, self.config.vocab_size), np.float32)
        try:
            past.read(self.session, np.ascontiguousarray(idx), logits)
        except Exception as e:  # whatever onnxruntime stumbles over
            raise Refusal(f"{self.path} cannot be computed; export the model again ({str(e):.200})")
        return logits

    def new_cache(self, batch_size, max_len):
        return Cache(max_len)

    def next_logits(self, idx, cache, doc=None):
        """As Transformer.next_logits. The graph knows no padding, so rows with prompts of other lengths are other parts."""
        if not cache.parts:
            padding = (doc == -1).sum(1) if doc is not None else torch.zeros(len(idx), dtype=torch.long)
            for n in padding.unique().tolist():
                rows = (padding == n).nonzero()[:, 0]
                cache.parts.append(Part(rows, n, self.new_past(len(rows), cache.max_len)))
        if doc is None and len(cache.parts) == 1:  # as it mostly is, and without a copy
            return torch.from_numpy(self.run(idx, cache.parts[0].past)[:, -1])
        logits = torch.zeros(len(idx), self.config.vocab_size)
        for part in cache.parts:
            if doc is not None and (doc[part.rows] == -1).all():  # these rows have ended, maybe at block_size
                continue
            logits[part.rows] = torch.from_numpy(self.run(idx[part.rows, part.padding:], part.past)[:, -1])
            part.padding = 0
        return logits

    def forward(self, idx, targets, reduction="mean"):
        """(logits, loss) as Transformer's, in two calls: how well int8 does with a past counts too."""
        past = self.new_past(*idx.shape)
        logits = torch.cat([torch.from_numpy(self.run(part, past)) for part in idx.split((idx.size(1) + 1) // 2, dim=1)], 1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return logits, loss.view_as(targets) if reduction == "none" else loss


def open_session(path, c):
    """The OnnxModel in a file, on as many threads as torch has. Raises Refusal for a file that does not fit the ModelConfig c."""
    try:
        import onnxruntime
    except ImportError:
        raise Refusal("running ONNX needs onnxruntime: pip install onnxruntime")
    if not hasattr(onnxruntime.capi.onnxruntime_pybind11_state.OrtValueVector, "push_back_batch"):  # before 1.21
        raise Refusal(f"onnxruntime {onnxruntime.__version__} is too old: pip install --upgrade onnxruntime")
    if not os.path.isfile(path):
        raise Refusal(f"there is no {path}; python export_onnx.py makes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4  # 4: what goes wrong is said here
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)  # it would print
    except Exception as e:  # onnxruntime has many kinds, protobuf its own
        raise Refusal(f"{path} is damaged or not a model that onnxruntime reads: {e}")
    got, given, past = session.get_inputs(), session.get_outputs(), ["P", "B", c.n_kv_head, c.head_dim]
    if ([(x.name, x.type, x.shape) for x in got] != [("ids", "tensor(int64)", ["B", "T"]), *((name, "tensor(float)", past) for name in names(c, "past"))]
            or [(x.name, x.type) for x in given] != [(name, "tensor(float)") for name in ("logits", *names(c, "present"))]
            or given[0].shape != ["B", "T", c.vocab_size]):
        raise Refusal(f"{path} is not the model that its config.json describes: inputs, outputs or their shapes are others")
    return OnnxModel(session, c, path)


def load(path):
    """(OnnxModel, tokenizer, config.json) of a folder, or of one .onnx file in it. Raises Refusal."""
    folder, file = (path, "model.onnx") if os.path.isdir(path) or not path.endswith(".onnx") else os.path.split(path)
    name = "config.json"
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            config = json.load(f)
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}; this version reads format {FORMAT}: export the model again, with --overwrite")
        c, kind, eot, bos = ModelConfig(**config["model"]), config["tokenizer"], config["eot"], config["bos"]
        name = "tokenizer.json"
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            text = f.read()
        tokenizer = ForeignTokenizer(json.loads(text), eot, bos) if kind == "foreign" else Tokenizer.from_str(text)
        name = "config.json"
        for key, value in describe(c, tokenizer, str(config["start"]), str(config["template"]), str(config["fingerprint"])).items():
            if key != "model" and config[key] != value:
                raise ValueError(f"{key} is {config[key]!r:.60}, and by its model and tokenizer.json {value!r:.60}")
        if tokenizer.vocab_size != c.vocab_size:
            raise ValueError(f"vocab_size is {c.vocab_size}, and tokenizer.json has {tokenizer.vocab_size} tokens")
    except FileNotFoundError:
        raise Refusal(f"there is no {os.path.join(folder, name)}; {advice(folder, file)}")
    except OSError as e:
        raise Refusal(f"cannot read {os.path.join(folder, name)}: {e.strerror}")
    except (ValueError, RecursionError) as e:
        raise Refusal(f"{os.path.join(folder, name)}: {e}")
    except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
        raise Refusal(f"{os.path.join(folder, name)} was not written by export_onnx.py ({e!r})")
    model = open_session(os.path.join(folder, file), c)
    if model.session.get_modelmeta().custom_metadata_map.get("fingerprint") != config["fingerprint"]:
        raise Refusal(f"{model.path} is another model than the one of config.json and tokenizer.json beside it: export it again")
    return model, tokenizer, config
