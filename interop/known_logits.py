"""Checks that model.py still computes what transformers and llama.cpp do, before a model is written for these.

    check(choose_kind(model.config))

A folder or a GGUF file has tensors and settings but no formula, so that another activation in model.py would be
left out without a word. So a small model of each kind, with fixed numbers for weights, must give the logits that
transformers gave for it.
"""

import torch

from interop.hf_kinds import CLASSES, NEEDS
from model import ModelConfig, Transformer
from sizes import Undrawn

# all settings that a logit depends on, so that their defaults in model.py may change
SETTINGS = {
    "vocab_size": 11,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "n_inner": 48,
    "block_size": 16,
    "n_expert": 4,
    "n_expert_per_token": 2,
    "norm_topk_prob": True,
    "norm_eps": 0.1,  # so large that it counts
    "rope_theta": 10000.0,
    "rope_scaling": "none",
    "window": 0,
    "window_pattern": "S",
    "tie_embeddings": True,
    "bias": True,
}
IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
# the first logits after the last of them, by transformers 5
LOGITS = {
    "llama": (1.05592, 1.52509, -2.72206, 1.44871),
    "qwen3": (-0.73734, -1.07395, 1.91061, -1.01337),
    "mistral": (-0.43844, -1.05938, 1.5958, -0.684),
    "mixtral": (0.08215, -1.39363, 1.44037, -0.17995),
    "qwen3_moe": (0.85717, 0.25883, -1.13994, 0.98654),
    "gpt2": (2.89905, -4.70085, 2.23655, 2.25745),
}


def known_model(kind):
    """Returns the small model of a kind, float64."""
    more = {} if kind == "gpt2" else {"n_kv_head": 2}
    if kind == "mistral":
        more["window"] = 5
    with Undrawn():
        model = Transformer(ModelConfig(**(SETTINGS | more | NEEDS[kind]))).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            waves = (1.7 * torch.arange(p.numel()).double() + number).sin().view(p.shape)
            p.copy_(0.4 * waves if p.dim() > 1 else 1 + 0.5 * waves)
    return model.eval()


def check(kind):
    """Raises ValueError where model.py computes something else than transformers for a model of this kind."""
    with torch.no_grad():
        logits = known_model(kind)(torch.tensor(IDS))[0][0, -1]
    known = torch.tensor(LOGITS[kind]).double()
    if not torch.allclose(logits[: len(known)], known, rtol=0, atol=2e-5):
        raise ValueError(
            f"model.py was changed and computes something else than {CLASSES[kind]}, which would be given its "
            "tensors: export_onnx.py writes what it computes"
        )
