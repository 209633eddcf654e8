"""Two layouts of one model: ours, and GGUF's, which llama.cpp, Ollama and LM Studio run.

    metadata, tensors = to_gguf(model.config, model.state_dict())
    c = gguf_config.read_config(metadata, tensors.keys(), None)    # our ModelConfig
    state = from_gguf(metadata["general.architecture"], c, tensors)

Dicts in, dicts out, and no library. Metadata are gguf_config.py's, tokenizers gguf_tokenizer.py's.
"""

import math
import re

import torch

from interop.gguf_config import write_config
from sizes import meta_model, model_sizes
from tensors import check_finite

NAMES = {
    "wte": "token_embd",
    "add_pos": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
}


def to_gguf(c, state):
    """Returns (metadata, tensors) of our config and state dict: all of the file but the tokenizer.

    Raises ValueError for what llama.cpp does not have or would compute otherwise.
    """
    metadata, rope_tensors = write_config(c)
    return metadata, tensors_to_gguf(metadata["general.architecture"], c, state) | rope_tensors


def gguf_name(key, x):
    """Returns what our tensor `key` is called: "blocks.0.attn.q_proj.weight" is "blk.0.attn_q.weight"."""
    module, _, parameter = key.rpartition(".")
    block = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        block = f"blk.{layer}."
    experts = "_exps" if x.dim() == 3 else ""
    return f"{block}{NAMES[module]}{experts}.{parameter}"


def interleave(x, n_head):
    """Returns the rows of a q or k projection as llama.cpp's llama wants them: what rotates together, row
    i and i + D/2 of a head, side by side.
    """
    return x.reshape(n_head, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def separate(x, n_head):
    """Returns the rows that interleave was given."""
    return x.reshape(n_head, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def fused_name(name):
    """Returns the name in GPT-2, which has one tensor of q, k and v, for that of any of them."""
    return re.sub(r"attn_[qkv]\.", "attn_qkv.", name)


def rotated_heads(c, key):
    """Returns how many heads the rows of a q or k projection are; 0 for any other tensor of ours."""
    _, _, module = key.rpartition("attn.")
    return {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(module.partition(".")[0], 0)


def tensors_to_gguf(architecture, c, state):
    """Returns GGUF's tensors of our state dict. GPT-2's q, k and v are one; a tied head is left out."""
    tensors = {}
    for key, x in state.items():
        if key == "head.weight" and c.tie_embeddings:
            continue
        name = gguf_name(key, x)
        if architecture == "gpt2":
            name = fused_name(name)
            if name in tensors:  # q comes first, then k, then v
                x = torch.cat([tensors[name], x])
        elif architecture == "llama" and (n_head := rotated_heads(c, key)):
            x = interleave(x, n_head)
        tensors[name] = x
    return tensors


def expected_shapes(architecture, c):
    """Returns {name: shape} of the tensors that a model of config c has in a GGUF file."""
    state = meta_model(c).state_dict()
    return {name: tuple(x.shape) for name, x in tensors_to_gguf(architecture, c, state).items()}


def check_shapes(architecture, c, shapes):
    """Raises ValueError where the tensors of these shapes are not those of a model of config c, but for
    biases that are absent.

    shapes are bounded by a file's size, so that no model is made that is larger than its file.
    """
    numbers = sum(math.prod(shape) for shape in shapes.values())
    if model_sizes(c).matrices > numbers:
        raise ValueError("its tensors have fewer numbers than its metadata needs")
    expected = expected_shapes(architecture, c)
    for name, shape in shapes.items():
        if name not in expected:
            raise ValueError(f"tensor {name} has no place in this model")
        if shape != expected[name]:
            raise ValueError(
                f"tensor {name} is {shape} and not {expected[name]}, as its metadata has it"
            )
    for name in expected:
        if name not in shapes and not (architecture != "gpt2" and name.endswith(".bias")):
            raise ValueError(f"tensor {name} is missing")


def from_gguf(architecture, c, tensors):
    """Returns our state dict, float32, of the tensors that check_shapes took; absent biases are zero.

    Raises ValueError where they are not finite.
    """
    check_finite(tensors)
    state = {}
    for key, meta in meta_model(c).state_dict().items():
        name = gguf_name(key, meta)
        if key == "head.weight" and c.tie_embeddings:
            x = state["wte.weight"]
        elif architecture == "gpt2" and fused_name(name) != name:
            third = "qkv".index(name.rpartition("attn_")[2][0])
            x = tensors[fused_name(name)].chunk(3)[third].clone()
        elif name not in tensors:
            x = torch.zeros(meta.shape)
        elif architecture == "llama" and (n_head := rotated_heads(c, key)):
            x = separate(tensors[name], n_head)
        else:
            x = tensors[name]
        state[key] = x
    return state
