"""A model that export_onnx.py has written, computed by onnxruntime in place of model.Transformer.

    import onnx_model
    model, tokenizer, config = onnx_model.load("out/onnx")     # or out/onnx/model_int8.onnx
    generate.generate(model, ...)                                # and score.evaluate(model, ...)

A folder holds model.onnx, tokenizer.json, config.json and, if it was asked for, one in integers, as model_int8.onnx.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Refusal
from data import AS_IT_STANDS, text_rule
from folders import onnx_advice, split_onnx
from interop.foreign_tokenizer import FILES, ForeignTokenizer
from model import ModelConfig
from onnx_cache import Cache, FusedPast, Past, cache_names
from tokenizer import Tokenizer

# Format 1 had no fingerprint, 2 had the keys and values of a row together, 3 had no bos, 4 no ends, 5 no places
FORMAT = 6
READABLE = (4, 5, FORMAT)


class OnnxModel(nn.Module):
    """A model that onnxruntime computes, with what generate.generate and score.evaluate need of a Transformer."""

    device = torch.device("cpu")

    def __init__(self, session, config, path):
        super().__init__()
        self.session = session
        self.config = config
        self.path = path
        self.counts = find_counts(session)

    def new_past(self, batch_size, max_len):
        """Returns an empty Past with room for max_len tokens, but never for more than block_size."""
        kind = FusedPast if "total" in self.counts else Past
        return kind(self.config, batch_size, min(max_len, self.config.block_size), self.counts)

    def run(self, idx, past, places=None):
        """Appends ids idx (B, T) to a Past and returns the logits (B, K, V) of those at K places, by default of all,
        a NumPy array.

        Raises ValueError where they do not fit, Refusal where onnxruntime fails.
        """
        c = self.config
        B, T = idx.shape
        total = past.length + T
        if total > past.max_len:
            room = f"{past.max_len}, the room made for them; block_size is {c.block_size}"
            raise ValueError(f"{total} tokens do not fit in {room}")
        places = np.array(range(T) if places is None else places, np.int64)
        has_places = "places" in self.counts
        logits = np.empty((B, len(places) if has_places else T, c.vocab_size), np.float32)
        try:
            past.read(self.session, np.ascontiguousarray(idx), places, logits)
        except Exception as e:  # onnxruntime has many kinds
            raise Refusal(f"{self.path} cannot be computed; export the model again ({str(e):.200})")
        return logits if has_places else logits[:, places]

    def last_logits(self, idx, past):
        """Returns the logits (B, V) after the last of ids idx (B, T), as run does."""
        return torch.from_numpy(self.run(idx, past, [idx.size(1) - 1])[:, 0])

    def new_cache(self, batch_size, max_len):
        return Cache(max_len)

    def next_logits(self, idx, cache):
        """Does what Transformer.next_logits does: returns logits (B, V) after the last of idx (B, T)."""
        if not cache.parts:
            return cache.read(self, idx.tolist())
        if len(cache.parts) == 1:  # the usual case, without a copy
            return self.last_logits(idx, cache.parts[0].past)
        logits = torch.zeros(len(idx), self.config.vocab_size)
        for part in cache.parts:
            logits[part.rows] = self.last_logits(idx[part.rows], part.past)
        return logits

    def forward(self, idx, targets, reduction="mean"):
        """Returns (logits, loss) as Transformer does, by two calls, so that int8's loss after a past counts too."""
        past = self.new_past(*idx.shape)
        halves = idx.split((idx.size(1) + 1) // 2, dim=1)
        logits = torch.cat([torch.from_numpy(self.run(half, past)) for half in halves], 1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        if reduction == "none":
            loss = loss.view_as(targets)
        return logits, loss


# -----------------------------------------------------------------------------------------------------
# The folder


def older_than(version):
    """Returns what to say where onnxruntime is older than a version, "" where it is not."""
    import onnxruntime

    own = onnxruntime.__version__  # not by the package, which may have another name, as onnxruntime-gpu
    numbers, least = (tuple(map(int, x.split(".")[:2])) for x in (own, version))
    if numbers >= least:
        return ""
    return f"needs onnxruntime {version}, and this is {own}: pip install --upgrade onnxruntime"


def open_session(path, c):
    """Returns the OnnxModel in a file, on as many threads as torch has.

    Raises Refusal without a fitting onnxruntime, and for a file that does not fit the ModelConfig c.
    """
    try:
        import onnxruntime
    except ImportError:
        raise Refusal("running ONNX needs onnxruntime: pip install onnxruntime")
    vector = onnxruntime.capi.onnxruntime_pybind11_state.OrtValueVector
    if not hasattr(vector, "push_back_batch"):  # before 1.21
        version = onnxruntime.__version__
        raise Refusal(f"onnxruntime {version} is too old: pip install --upgrade onnxruntime")
    if not os.path.isfile(path):
        raise Refusal(f"there is no {path}; {onnx_advice(*os.path.split(path))}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal alone: a Refusal says what goes wrong
    try:
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it would print
        )
    except Exception as e:  # onnxruntime has many kinds, protobuf its own
        reason = str(e).splitlines()[0][:200] if str(e) else repr(e)
        raise Refusal(f"{path} is damaged or not a model that onnxruntime reads: {reason}")
    if not fits_config(session, c):
        message = f"{path} is not the model that its config.json describes"
        raise Refusal(f"{message}: inputs, outputs or their shapes are others")
    return OnnxModel(session, c, path)


def find_counts(session):
    """Returns the names of a graph's inputs between ids and the keys and values, in its order: "places", which graphs
    of older formats lack, and "total", which graphs for FusedPast have.
    """
    inputs = {tensor.name for tensor in session.get_inputs()}
    return [name for name in ("places", "total") if name in inputs]


def fits_config(session, c):
    """Returns whether a session's inputs and outputs are those of a model with the ModelConfig c."""
    counts = find_counts(session)
    types = {"places": ("tensor(int64)", ["K"]), "total": ("tensor(int32)", [])}
    past_shape = ["P", "B", c.n_kv_head, c.head_dim]
    if "total" in counts:
        past_shape = ["B", c.n_kv_head, "S", c.head_dim]
    n_inputs = 1 + len(counts) + 2 * c.n_layer
    if len(session.get_inputs()) != n_inputs:  # else a damaged config.json might ask for an endless list
        return False
    expected_inputs = [("ids", "tensor(int64)", ["B", "T"])]
    expected_inputs += [(name, *types[name]) for name in counts]
    expected_inputs += [(name, "tensor(float)", past_shape) for name in cache_names(c, "past")]
    expected_outputs = [(name, "tensor(float)") for name in ("logits", *cache_names(c, "present"))]
    inputs = [(tensor.name, tensor.type, tensor.shape) for tensor in session.get_inputs()]
    outputs = [(tensor.name, tensor.type) for tensor in session.get_outputs()]
    if inputs != expected_inputs or outputs != expected_outputs:
        return False
    return session.get_outputs()[0].shape == ["B", "K" if "places" in counts else "T", c.vocab_size]


@contextlib.contextmanager
def refusing(folder, name, onnx_name):
    """Turns an error in reading a file, which belongs to the model onnx_name, into a Refusal."""
    path = os.path.join(folder, name)
    try:
        yield
    except FileNotFoundError:
        raise Refusal(f"there is no {path}; {onnx_advice(folder, onnx_name)}")
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    except (ValueError, RecursionError) as e:
        raise Refusal(f"{path}: {e}")
    except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
        raise Refusal(f"{path} was not written by export_onnx.py ({e!r})")


def read_text(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8", newline="") as f:
        return f.read()


def describe(c, tokenizer, start, template, fingerprint, text_rule=AS_IT_STANDS):
    """Returns config.json, a dict: what a reader needs beside the weights and the tokenizer.

    fingerprint is that of the weights; the graphs carry it too.
    """
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(c),
        "n_layer": c.n_layer,
        "n_kv_head": c.n_kv_head,
        "head_dim": c.head_dim,
        "block_size": c.block_size,
        "vocab_size": c.vocab_size,
        "eot": tokenizer.eot,
        "bos": tokenizer.bos,
        "ends": list(tokenizer.ends),
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "start": start,
        "template": template,
        "text_rule": text_rule,
        "fingerprint": fingerprint,
    }


def check_description(config, c, tokenizer):
    """Raises ValueError where config.json is not what describe() makes of its model and tokenizer."""
    texts = [str(config[key]) for key in ("start", "template", "fingerprint", "text_rule")]
    for key, value in describe(c, tokenizer, *texts).items():
        if key != "model" and config[key] != value:  # model may lack a setting that came later
            message = f"{key} is {config[key]!r:.60}"
            raise ValueError(f"{message}, and by its model and tokenizer.json {value!r:.60}")
    if tokenizer.vocab_size != c.vocab_size:
        message = f"vocab_size is {c.vocab_size}"
        raise ValueError(f"{message}, and tokenizer.json has {tokenizer.vocab_size} tokens")


def fingerprint(folder):
    """Returns the fingerprint of the model whose files are in a folder; "" where there is none, or where it cannot be
    read or run here.
    """
    has_model = os.path.isfile(os.path.join(folder, "model.onnx"))
    if not has_model or not importlib.util.find_spec("onnxruntime"):
        return ""
    try:
        config = json.loads(read_text(folder, "config.json"))
        return config["fingerprint"] if config["format"] in READABLE else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def read_description(folder):
    """Returns config.json as a dict, that of an older format with what was added since. Raises ValueError."""
    config = json.loads(read_text(folder, "config.json"))
    if config["format"] not in READABLE:
        message = f"format {config['format']!r}; this version reads format {FORMAT}"
        raise ValueError(f"{message}: export the model again, with --overwrite")
    if config["format"] == 4:
        config["ends"] = [config["eot"]]
    config["format"] = FORMAT
    config.setdefault("text_rule", text_rule(config))  # exports from before it was kept
    return config


def read_tokenizer(folder, kind, eot, bos, ends):
    """Returns the tokenizer of a folder, ours or a foreign one, with these settings of config.json."""
    text = read_text(folder, "tokenizer.json")
    files = [name for name in FILES if os.path.exists(os.path.join(folder, name))]
    # ours has no file but tokenizer.json, and one token ends its texts
    is_like_ours = kind == "char" or kind == "bpe" and bos == eot
    if is_like_ours and ends == [eot] and len(files) == 1:
        return Tokenizer.from_str(text)
    return ForeignTokenizer({name: read_text(folder, name) for name in files}, eot, bos, ends)


def load(path):
    """Returns (OnnxModel, tokenizer, config.json as a dict) of a folder or of one .onnx file in it.

    Raises Refusal where the files are damaged, do not belong together or are of another format.
    """
    folder, file = split_onnx(path)
    with refusing(folder, "config.json", file):
        config = read_description(folder)
        c = ModelConfig(**config["model"])
        settings = [config[key] for key in ("tokenizer", "eot", "bos", "ends")]
    with refusing(folder, "tokenizer.json", file):
        tokenizer = read_tokenizer(folder, *settings)
    with refusing(folder, "config.json", file):
        check_description(config, c, tokenizer)
    model = open_session(os.path.join(folder, file), c)
    metadata = model.session.get_modelmeta().custom_metadata_map
    with refusing(folder, file, file):
        if problem := older_than(metadata.get("onnxruntime", "1.21")):
            raise Refusal(f"{model.path} {problem}")
    if metadata.get("fingerprint") != config["fingerprint"]:
        message = f"{model.path} is another model than the one of config.json and tokenizer.json"
        raise Refusal(f"{message} beside it: export it again")
    return model, tokenizer, config
