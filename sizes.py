"""How large a model is and what it takes. All is counted on modules, never written as a formula, so that the
figures are right for any class of model.py.
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from cache import capacity
from data import tokens_a_step
from experts import MoE
from masks import make_sight
from model import Transformer, model_config
from quantized import QuantizedLinear


class Sizes(NamedTuple):
    """How many numbers a model holds."""

    parameters: int  # a tied matrix once
    matrices: int  # of them in matrices: biases and gains left out
    buffers: int  # in tables that are never saved
    hidden: int = 0  # in matrices inside blocks

    @property
    def bytes(self):
        return 4 * (self.parameters + self.buffers)


class Undrawn(TorchFunctionMode):
    """The context in which a new model's weights are not drawn: on the meta device to draw them would import
    torch's compiler, which takes a second, and on others it would write to their memory, which is then taken.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


@contextmanager
def refusing_sizes():
    """Turns what torch raises for tensors that are too large into a ValueError."""
    try:
        yield
    except RuntimeError as e:
        raise ValueError(f"a model of these sizes cannot be made: {str(e).splitlines()[0]}")


def meta_model(c):
    """Returns a model of config c that takes no memory, on the meta device."""
    with torch.device("meta"), Undrawn():
        return Transformer(c)


def one_layer(c):
    """Returns the ModelConfig of one layer of config c, a windowed one where it has windows."""
    return replace(model_config(c), n_layer=1, window_pattern="S")


def model_sizes(c):
    """Returns the Sizes of a model of config c without making it: one block on the meta device stands
    for all n_layer.

    Raises ValueError where the numbers are too large to count.
    """
    with refusing_sizes():
        model = meta_model(one_layer(c))
    whole = module_sizes(model)
    block = module_sizes(model.blocks[0])
    sizes = Sizes(*(w + (c.n_layer - 1) * b for w, b in zip(whole, block)))
    return sizes._replace(hidden=c.n_layer * block.matrices)


def mask_bytes(c, batch_size=0):
    """Returns a lower bound of the bytes that the mask of a model of config c takes while it is made: the distances
    between tokens and what is computed from them. batch_size: of rows with documents in them; 0 for plain rows.

    Measured on two tokens of a row, of which a window hides one: a pair of tokens takes as much as in a long text.
    Raises ValueError where the model is too large.
    """
    T = c.block_size
    # the window of the layers that see most; one as long as the text hides nothing
    window = 0 if "L" in c.window_pattern or c.window >= T else c.window
    queries, keys = T, T
    if 0 < 2 * window < T:  # in blocks, as make_sight cuts them
        queries, keys = math.ceil(T / window) * window, 2 * window
    short = replace(one_layer(c), block_size=2, window=min(window, 1))
    # not on the meta device, where a difference imports torch's compiler
    with refusing_sizes(), Undrawn():
        model = Transformer(short)
    places = torch.arange(2)
    doc = torch.zeros(1, 2) if batch_size else None
    mask = make_sight(places, places, doc, doc, model.score_bias, window=short.window).mask
    if mask is None:
        return 0
    pair = mask.nbytes // 4  # two tokens are four pairs of a query and a key
    distance = 8  # an int64
    return (max(1, batch_size) * pair + distance) * queries * keys


def activation_bytes(c, adapt=None):
    """Returns the bytes that training a model of config c keeps of a token for the backward pass, in
    float32, up to the head. adapt(model) changes the model first, as lora.inject does.

    Measured as what autograd keeps more for one token more, so it is right for any class: on models of one
    layer and of two, whose weights are only read and so take no memory. 0 where they are too large for that.
    It is a lower bound, as a token here sees only itself.
    """
    c = replace(model_config(c), block_size=1, window=0, window_pattern="S")
    kept = []
    try:
        for n_layer in (1, 2):
            with Undrawn():
                model = Transformer(replace(c, n_layer=n_layer))
                if adapt:
                    adapt(model)
            kept.append(kept_bytes(model, 3) - kept_bytes(model, 2))
    except RuntimeError:
        return 0
    return kept[0] + (c.n_layer - 1) * (kept[1] - kept[0])


def kept_bytes(model, rows):
    """Returns the bytes that autograd keeps of rows of one token, and of what they share, as weights."""
    storages = {}

    def keep(x):
        storage = x.untyped_storage()
        storages[storage._cdata] = storage  # what several functions keep counts once
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(torch.zeros(rows, 1, dtype=torch.long))
    return sum(storage.nbytes() for storage in storages.values())


def module_sizes(module):
    """Returns the Sizes of a module, without `hidden`."""
    matrices = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
    buffers = sum(b.numel() for b in module.buffers())
    return Sizes(num_params(module), matrices, buffers)


def num_params(module):
    """Returns the number of parameters, a tied matrix counted once, integers as the matrix that they stand for."""
    integers = sum(m.n_weights for m in module.modules() if isinstance(m, QuantizedLinear))
    return integers + sum(p.numel() for p in module.parameters())


def num_active_params(model):
    """Returns the number of parameters that a token uses: all but the experts that it does not go to."""
    idle = 0
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        n_expert = moe.router.out_features
        experts = num_params(moe) - num_params(moe.router)
        idle += experts // n_expert * (n_expert - moe.top_k)
    return num_params(model) - idle


def size_text(model):
    """Returns how large a model is, in words: with experts also what of it a token uses."""
    params = num_params(model)
    active = num_active_params(model)
    if active == params:
        return f"{params:,} parameters"
    flops = flops_per_token(model, model.config.block_size)
    return (
        f"{params:,} parameters ({4 * params / 1e6:,.1f} MB of weights), of which {active:,} are active for "
        f"a token ({flops / 1e6:,.1f} MFLOP to train on it)"
    )


def flops_per_token(model, T):
    """Returns the floating-point operations of training on one token at context T, forward and backward
    (PaLM, appendix B): 6 for each weight that is multiplied, 12 H D T a layer for scores, not halved for
    causality. The embedding and a table of positions are looked up, not multiplied.
    """
    c = model.config
    multiplied = num_active_params(model)
    if not c.tie_embeddings:
        multiplied -= num_params(model.wte)
    if model.add_pos is not None:
        multiplied -= num_params(model.add_pos)
    keys = sum(min(T, c.window_of(layer) or T) for layer in range(c.n_layer))
    return 6 * multiplied + 12 * c.n_head * c.head_dim * keys


def step_flops(cfg):
    """Returns about how many floating-point operations a step takes: 6 a parameter and token. At a usual vocabulary:
    a new run's may not be there yet, and a resumed run must choose as that did.
    """
    try:
        parameters = model_sizes(replace(model_config(cfg), vocab_size=4096)).parameters
    except ValueError:  # a size that check_training_memory refuses
        return math.inf
    return 6 * parameters * tokens_a_step(cfg)


def kv_cache_bytes(c, batch_size, length, bytes_per_number):
    """Returns the bytes of the keys and values that a KVCache of `length` tokens has."""
    places = sum(capacity(c.window_of(layer), length) for layer in range(c.n_layer))
    return 2 * batch_size * c.n_kv_head * places * c.head_dim * bytes_per_number
