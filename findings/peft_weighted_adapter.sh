#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: add_weighted_adapter, which makes one adapter of several, here of two,
# of which the first has the weight 1 and the second the weight 0.
# One would guess: what comes out is the first adapter; by the docstring "cat" and "svd" are "precise methods". What a method
# cannot mix is refused, as adapters with target_parameters are, and modules_to_save that both adapters have.
# What happens: only A and B are mixed, with their scales worked in, and the new adapter has lora_alpha = r, for a scale of 1.
#   rsLoRA: the setting is taken over, so that the scale is sqrt(r) and not 1: 5.7 times the adapters by cat (r is 16 + 16), 4
#   times by svd or linear (r is 16).
#   DoRA: the magnitudes are the norms of the base's rows, as if nothing had been tuned.
#   lora_bias: the new adapter's are zeros. trainable_token_indices (tokens that were added for a chat) and modules_to_save that
#   only one adapter has: the new adapter's are the base's.
# No word of any of it, and what is saved or merged into the weights is the same. (Issue 3761 of peft has rsLoRA, lora_bias and
# DoRA; for rsLoRA a change was merged after this release.)
# Output seen (the difference of logits to those of the first adapter, as a share of what that one changes; figures may differ
# among processors):
#   LoRA: cat 0.000, merged 0.000, scale 1.0; svd 0.000, merged 0.000, scale 1.0; linear 0.000, merged 0.000, scale 1.0
#   trainable_token_indices: cat 0.821, merged 0.821, scale 1.0; svd 0.821, merged 0.821, scale 1.0; linear 0.821, merged 0.821,
#     scale 1.0
#   rsLoRA: cat 2.863, merged 2.863, scale 5.7; svd 2.297, merged 2.297, scale 4.0; linear 2.297, merged 2.297, scale 4.0
#   DoRA: cat 0.974, merged 0.974, scale 1.0; svd 0.974, merged 0.974, scale 1.0; linear 0.974, merged 0.974, scale 1.0
#   lora_bias: cat 0.998, merged 0.998, scale 1.0; svd 0.998, merged 0.998, scale 1.0; linear 0.998, merged 0.998, scale 1.0
#   modules_to_save: cat 0.989, merged 0.989, scale 1.0; svd 0.989, merged 0.989, scale 1.0; linear 0.989, merged 0.989, scale 1.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
common = dict(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])


@torch.no_grad()
def mixed(kind, first, second):
    """Returns how far the mix, merged into the weights as well, is from the first adapter; and its scale."""
    torch.manual_seed(0)
    bias = "lora_bias" in first
    base = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=bias, mlp_bias=bias))
    model = get_peft_model(base, LoraConfig(**common, **first), adapter_name="first")
    model.add_adapter("second", LoraConfig(**common, **second))
    model.eval()
    for name, p in model.named_parameters():
        if {"first", "second"} & set(name.split(".")):
            p.add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.01)
    with model.disable_adapter():
        untuned = model(ids).logits
    model.set_adapter("first")
    tuned = model(ids).logits
    model.add_weighted_adapter(["first", "second"], [1.0, 0.0], "mix", combination_type=kind)
    model.set_adapter("mix")
    outputs = [model(ids).logits]
    scale = model.base_model.model.model.layers[0].mlp.up_proj.scaling["mix"]
    model = model.merge_and_unload(adapter_names=["mix"])
    outputs.append(model(ids).logits)
    return [((y - tuned).norm() / (tuned - untuned).norm()).item() for y in outputs], scale


cases = [
    ("LoRA", {}, {}),
    ("trainable_token_indices", dict(trainable_token_indices=[1, 2, 3]), {}),
    ("rsLoRA", dict(use_rslora=True), dict(use_rslora=True)),
    ("DoRA", dict(use_dora=True), dict(use_dora=True)),
    ("lora_bias", dict(lora_bias=True), dict(lora_bias=True)),
    ("modules_to_save", dict(modules_to_save=["lm_head"]), {}),
]
is_as_seen = True
for name, first, second in cases:
    parts = []
    for kind in ("cat", "svd", "linear"):
        (share, merged), scale = mixed(kind, first, second)
        parts.append(f"{kind} {share:.3f}, merged {merged:.3f}, scale {scale:.1f}")
        is_right = name == "LoRA"
        is_as_seen &= (max(share, merged) < 1e-3) if is_right else (min(share, merged) > 0.5)
        expected = 1.0 if name != "rsLoRA" else 32**0.5 if kind == "cat" else 4.0
        is_as_seen &= abs(scale - expected) < 1e-6
    print(f"{name}: " + "; ".join(parts))
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
