"""Two layouts of adapters: ours and PEFT's, which has the same A (rank, in) and B (out, rank), but for the modules of
Hugging Face's models.

    config, tensors = to_peft(model.config, lora_config, adapters)  # adapter_config.json and its tensors
    settings, adapters = from_peft(model.config, config, tensors)
"""

import re

import torch
import torch.nn as nn

from interop import known_logits
from interop.hf_config import read_number
from interop.hf_kinds import choose_kind
from interop.hf_layout import locate
from lora import LINEARS, LoRAConfig, inject
from sizes import meta_model
from tensors import check_finite


def peft_names(module):
    """Returns the names of A and B of a module."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def to_peft(c, lora, adapters):
    """Returns (adapter_config.json as a dict, tensors) of our adapters. Raises ValueError.

    GPT-2's q, k and v are one module there, which gets one adapter whose rank is the sum of their ranks:
    A stacked, B block by block.
    """
    kind = choose_kind(c)
    known_logits.check(kind)
    modules = {}  # name -> [(third, A, B)] of our Linears in it
    for key, A in adapters.items():
        linear, _, part = key.rpartition(".")
        if A.dim() > 2:
            raise ValueError(
                f"{linear} has an adapter an expert, and PEFT's layout of those is not written here: "
                "finetune_lora.py --merge makes a whole model, which hf.py writes"
            )
        if part == "A":
            name, third, _ = locate(kind, f"{linear}.weight")
            module = name.removesuffix(".weight")
            modules.setdefault(module, []).append((third, A, adapters[f"{linear}.B"]))
    tensors = {}
    ranks = {}
    for module, parts in modules.items():
        A = torch.cat([A for _, A, _ in parts])
        name_A, name_B = peft_names(module)
        tensors[name_A] = A
        tensors[name_B] = join_B(parts, lora.rank)
        ranks[re.sub(r".*\.\d+\.", "", module)] = len(A)
    return write_peft_config(kind, lora, ranks), tensors


def join_B(parts, rank):
    """Returns B of a module there with the parts [(third, A, B)]: the only one, or those of q, k and v in blocks."""
    third, _, B = parts[0]
    if third is None:
        return B
    joined = torch.zeros(3, len(B), rank * len(parts))
    for n, (third, _, B) in enumerate(parts):
        joined[third, :, n * rank : (n + 1) * rank] = B
    return joined.flatten(0, 1)


def write_peft_config(kind, lora, ranks):
    """Returns adapter_config.json as a dict, for modules of these ranks."""
    rank_pattern = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    alpha_pattern = {module: lora.alpha * rank / lora.rank for module, rank in rank_pattern.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": kind == "gpt2",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


# keys that change nothing of what a trained adapter computes
PEFT_HARMLESS = set(
    """auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules layers_pattern megatron_core fan_in_fan_out runtime_config qalora_group_size
    lora_dropout r lora_alpha rank_pattern alpha_pattern use_rslora ensure_weight_tying""".split()
)
PEFT_FIXED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


def check_peft_config(data):
    for key, value in data.items():
        if key in PEFT_FIXED:
            check_peft_value(key, value)
        elif key not in PEFT_HARMLESS and value not in (None, False, {}, [], "", 0):
            raise ValueError(f"{key} is {value!r:.60}, which is not known here")
    patterns = [data.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if "peft_type" not in data or not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError("adapter_config.json is not PEFT's")


def check_peft_value(key, value):
    allowed = PEFT_FIXED[key]
    is_text = isinstance(value, str) and value in allowed
    if not is_text and not any(value is constant for constant in allowed):  # 1 is not True
        raise ValueError(f"{key} is {value!r:.60}; only {allowed[0]!r} is read here")


def read_peft_number(data, key, pattern_key, module):
    """Returns a module's number: that of the first pattern that fits its name, else the common one under `key`."""
    patterns = data.get(pattern_key) or {}
    fitting = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    return read_number(patterns, fitting[0]) if fitting else read_number(data, key)


def read_peft_module(data, tensors, module, n_in, n_out):
    """Returns (A, B, what B A is multiplied by) of a module (n_out, n_in). Raises ValueError."""
    rank = read_peft_number(data, "r", "rank_pattern", module)
    alpha = read_peft_number(data, "lora_alpha", "alpha_pattern", module)
    if rank < 1 or alpha <= 0:
        raise ValueError(f"r is {rank} and lora_alpha {alpha}; both must be above 0")
    name_A, name_B = peft_names(module)
    for name, shape in (name_A, (rank, n_in)), (name_B, (n_out, rank)):
        x = tensors.get(name)
        if x is None:
            raise ValueError(f"tensor {name} is missing")
        if tuple(x.shape) != shape or not x.is_floating_point():
            raise ValueError(f"tensor {name} is {tuple(x.shape)} {x.dtype} and not {shape}")
        check_finite({name: x})
    scale = alpha / (rank**0.5 if data.get("use_rslora") else rank)
    return tensors[name_A].float(), tensors[name_B].float(), scale


def from_peft(c, data, tensors):
    """Returns (LoRAConfig's keys, our adapters) of an adapter_config.json and its tensors.

    c is the config of the base. Ours have one rank and one alpha: a smaller rank is filled up with
    zeros, another scale goes into B. Raises ValueError.
    """
    kind = choose_kind(c)
    check_peft_config(data)
    model = meta_model(c)
    modules = model.named_modules()
    linears = {
        name: module
        for name, module in modules
        if name.rpartition(".")[2] in LINEARS and isinstance(module, nn.Linear)
    }
    parts = {}  # our Linear's name -> (A, B, scale)
    names = set()
    for key, linear in linears.items():
        name, third, _ = locate(kind, f"{key}.weight")
        module = name.removesuffix(".weight")
        if tensors.keys().isdisjoint(peft_names(module)):
            continue
        names.update(peft_names(module))
        n_out, n_in = linear.weight.shape
        if third is None:
            parts[key] = read_peft_module(data, tensors, module, n_in, n_out)
        else:
            A, B, scale = read_peft_module(data, tensors, module, n_in, 3 * n_out)
            parts[key] = A, B.chunk(3)[third], scale
    if extra := sorted(tensors.keys() - names):
        place = f"no Linear that takes an adapter here ({','.join(LINEARS)})"
        raise ValueError(f"tensor {extra[0]} belongs to {place}")
    target = choose_target(linears, parts)
    settings, adapters = unify(parts)
    settings["lora_dropout"] = float(read_number(data, "lora_dropout", 0.0))
    settings["target"] = ",".join(target)
    inject(model, LoRAConfig(**settings))  # raises ValueError where the base cannot have such adapters
    return settings, adapters


def choose_target(linears, parts):
    """Returns which of LINEARS have adapters. Raises ValueError where not all layers have the same."""
    if not parts:
        raise ValueError("there is no adapter in it")
    target = [name for name in LINEARS if any(key.endswith(f".{name}") for key in parts)]
    for key in linears:
        if key.rpartition(".")[2] in target and key not in parts:
            problem = "has no adapter where other layers have one; here all layers do"
            raise ValueError(f"{key} {problem}")
    return target


def unify(parts):
    """Returns (a dict of rank and alpha, our adapters), all of one rank and scale.

    parts is {Linear: (A, B, scale)}.
    """
    rank = max(len(A) for A, _, _ in parts.values())
    _, _, common_scale = next(iter(parts.values()))
    adapters = {}
    for key, (A, B, scale) in parts.items():
        if scale != common_scale:
            B = B * (scale / common_scale)
        rest = rank - len(A)
        adapters[f"{key}.A"] = torch.cat([A, A.new_zeros(rest, A.size(1))])
        adapters[f"{key}.B"] = torch.cat([B, B.new_zeros(len(B), rest)], dim=1)
    return {"rank": rank, "alpha": float(common_scale * rank)}, adapters
