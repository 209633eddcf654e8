"""Two layouts of one model's tensors: ours, and Hugging Face's.

    data, tensors = to_hf(model.config, model.state_dict())     # config.json and its tensors
    state = from_hf(data["model_type"], ModelConfig(**keys), tensors, without)

Dicts in, dicts out; hf_kinds.py has the kinds, hf_config.py their config.json. What has no counterpart on the other
side is a ValueError that names it.
"""

import re

import torch

from interop import known_logits
from interop.hf_config import write_config
from interop.hf_kinds import CLASSES, QWEN2_WITHOUT, choose_kind
from sizes import meta_model, model_sizes
from tensors import check_finite, check_tensor, count_stored_numbers

LLAMA_NAMES = {
    "wte": "embed_tokens",
    "blocks": "layers",
    "attn": "self_attn",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
GPT2_NAMES = {
    "add_pos": "wpe",
    "blocks": "h",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "norm": "ln_f",
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
}
QWEN3_MOE_NAMES = LLAMA_NAMES | {"router": "gate"}
MIXTRAL_NAMES = QWEN3_MOE_NAMES | {
    "mlp": "block_sparse_moe",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
NAMES = dict.fromkeys(CLASSES, LLAMA_NAMES) | {
    "gpt2": GPT2_NAMES,
    "mixtral": MIXTRAL_NAMES,
    "qwen3_moe": QWEN3_MOE_NAMES,
}
BUFFERS = r"\.rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$"


def locate(kind, key):
    """Returns where our tensor `key` is in a model of this kind: (name, third, transposed).

    GPT-2 stores its linears transposed, and q, k and v as one: third is 0, 1 or 2 of the last axis of
    that tensor, None where the tensor is our whole one.
    """
    if key == "head.weight":
        return "lm_head.weight", None, False
    parts = key.split(".")
    names = [NAMES[kind].get(part, part) for part in parts]
    if kind != "gpt2":
        return ".".join(["model", *names]), None, False
    name = ".".join(["transformer", *names])
    module, parameter = parts[-2:]
    if not module.endswith("_proj"):
        return name, None, False
    third = "qkv".index(module[0]) if module[0] in "qkv" else None
    return name, third, parameter == "weight"


def to_hf(c, state):
    """Returns (config.json as a dict, without token ids; the tensors) of our config and state dict.

    Raises ValueError.
    """
    kind = choose_kind(c)
    known_logits.check(kind)
    if kind == "llama" and has_qwen2_biases(c, state):
        kind = "qwen2"
        state = {key: x for key, x in state.items() if not is_absent(key, QWEN2_WITHOUT)}
    return write_config(kind, c), tensors_to_hf(kind, split_experts(state))


def has_qwen2_biases(c, state):
    """Returns whether only q, k and v have biases that are not 0, and heads are as wide as Qwen2's always were before
    transformers 4.48.
    """
    if not c.bias or c.n_embd != c.n_head * c.head_dim:
        return False
    biases = [key for key in state if key.endswith("_proj.bias")]
    used = [key for key in biases if state[key].any()]
    return bool(used) and not any(is_absent(key, QWEN2_WITHOUT) for key in used)


def is_absent(key, without):
    return any(re.search(pattern, key) for pattern in without)


def split_experts(state):
    """Returns a state dict with a matrix an expert, "blocks.0.mlp.experts.3.up_proj.weight", as Hugging
    Face's files have them, where ours has one tensor of all, "blocks.0.mlp.up_proj.weight".
    """
    matrices = {}
    for key, x in state.items():
        if x.dim() < 3:
            matrices[key] = x
            continue
        mlp, projection, parameter = key.rsplit(".", 2)
        for expert, matrix in enumerate(x):
            matrices[f"{mlp}.experts.{expert}.{projection}.{parameter}"] = matrix
    return matrices


def join_experts(matrices):
    """Returns our state dict of what split_experts returns."""
    state = {}
    for key, x in matrices.items():
        joined = re.sub(r"\.experts\.\d+\.", ".", key)
        if joined == key:
            state[key] = x
        else:
            state.setdefault(joined, []).append(x)
    return {key: torch.stack(x) if isinstance(x, list) else x for key, x in state.items()}


def tensors_to_hf(kind, state):
    tensors = {}
    for key, x in state.items():
        name, third, transposed = locate(kind, key)
        if transposed:
            x = x.T
        if third:  # q, 0, comes first, then k, then v
            x = torch.cat([tensors[name], x], dim=-1)
        tensors[name] = x
    return tensors


def from_hf(kind, c, tensors, without):
    """Returns our state dict, float32, from the tensors of a Hugging Face model.

    without: patterns of our tensors that may be absent and are zero then, as biases that only half of the
    Linears have. Raises ValueError for tensors that are missing, misshapen or have no place.
    """
    if not c.tie_embeddings and "lm_head.weight" not in tensors:
        problem = 'there is no lm_head.weight, and config.json does not have "tie_word_embeddings": true'
        advice = "write that there if the head is the embedding; if not, the model was not saved whole"
        raise ValueError(f"{problem}; {advice}")
    # before anything of that size is made
    if model_sizes(c).matrices > count_stored_numbers(tensors.values()):
        raise ValueError("the tensors have fewer numbers than config.json needs")
    meta_state = split_experts(meta_model(c).state_dict())
    shapes = {name: tuple(x.shape) for name, x in tensors_to_hf(kind, meta_state).items()}
    tensors = {full_name(kind, name): x for name, x in tensors.items() if not re.search(BUFFERS, name)}
    if c.tie_embeddings:
        tie_head(kind, tensors)
    for key, x in meta_state.items():
        if is_absent(key, without):
            tensors.setdefault(locate(kind, key)[0], torch.zeros(x.shape, device="cpu"))
    check_tensors(tensors, shapes)
    state = {}
    for key in meta_state:
        name, third, transposed = locate(kind, key)
        x = tensors[name]
        if third is not None:
            x = x.chunk(3, dim=-1)[third]
        if transposed:
            x = x.T
        state[key] = x.float().contiguous()
    if c.tie_embeddings:
        state["head.weight"] = state["wte.weight"]
    return join_experts(state)


def full_name(kind, name):
    """Returns a tensor's name with the "transformer." that GPT-2's files on the hub leave out."""
    if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def tie_head(kind, tensors):
    embedding = tensors.get(locate(kind, "wte.weight")[0])
    if embedding is None:
        return
    head = tensors.setdefault("lm_head.weight", embedding)
    if not torch.equal(head, embedding):
        setting = "where config.json has tie_word_embeddings"
        raise ValueError(f"lm_head.weight is not the embedding, {setting}")


def check_tensors(tensors, shapes):
    missing = shapes.keys() - tensors.keys()
    extra = tensors.keys() - shapes.keys()
    for names, problem in (missing, "is missing"), (extra, "has no place in this model"):
        if names:
            rest = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"tensor {min(names)} {problem}{rest}")
    for name, x in tensors.items():
        shape = tuple(x.shape)
        if shape != shapes[name]:
            raise ValueError(f"tensor {name} is {shape} and not {shapes[name]}, as config.json has it")
        check_tensor(name, x)
    check_finite(tensors)
