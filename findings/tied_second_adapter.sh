#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: a model with tied embeddings and two adapters that tune embed_tokens by
# LoraConfig(ensure_weight_tying=True), which puts the same on lm_head; both are loaded into one model.
# One would guess: each is the adapter that was tuned, whichever is loaded first, as it is when loaded alone.
# What happens: the second one has embed_tokens only; lm_head goes on without an adapter. For LoRA there is no word of it; for
# modules_to_save a warning says that "no tied modules were found in the model". add_adapter leaves lm_head without
# the second adapter as well.
# Where: _get_module_names_tied_with_embedding (peft/utils/other.py) takes the names from the model that the first adapter has
# wrapped. Of LoRA it makes "lm_head.base_layer", which is no target of the second; a ModulesToSaveWrapper has original_module
# in place of base_layer, which it does not know, and the list is empty. trainable_token_indices are right.
# Output seen (the difference of logits to those of the adapter alone, as a share of what the adapter changes; then what that
# function returns after loading, and whether lm_head has each adapter; figures may differ among processors):
#   LoRA: a 0.000, then b 0.923; b 0.000, then a 0.923; tied ['lm_head.base_layer']; lm_head has b True, then a False; warning
#     False
#   modules_to_save: a 0.000, then b 0.923; b 0.000, then a 0.923; tied []; lm_head has b True, then a False; warning True
#   trainable_token_indices: a 0.000, then b 0.000; b 0.000, then a 0.000; tied ['lm_head.token_adapter.base_layer']; lm_head
#     has b True, then a True; warning False
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import os
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import _get_module_names_tied_with_embedding
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
cases = {
    "LoRA": dict(target_modules=["q_proj", "embed_tokens"]),
    "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "trainable_token_indices": dict(target_modules=["q_proj"], trainable_token_indices=[1, 2, 5]),
}


def make():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()


@torch.no_grad()
def tune(settings, seed, folder):
    """Saves an adapter whose weights are moved at random in folder; returns the logits of it loaded alone."""
    torch.manual_seed(seed)
    model = get_peft_model(make(), LoraConfig(r=4, ensure_weight_tying=True, **settings))
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.03)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make(), folder).eval()(ids).logits


is_as_seen = True
with torch.no_grad():
    untuned = make()(ids).logits
    for name, settings in cases.items():
        folders = [os.path.join(sys.argv[1], name, adapter) for adapter in ("a", "b")]
        alone = [tune(settings, seed, folder) for seed, folder in enumerate(folders, 1)]
        shares = []
        for order in ((0, 1), (1, 0)):
            model = PeftModel.from_pretrained(make(), folders[order[0]], adapter_name="ab"[order[0]]).eval()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.load_adapter(folders[order[1]], "ab"[order[1]])
            for i in order:
                model.set_adapter("ab"[i])
                logits = model(ids).logits
                shares.append(((logits - alone[i]).norm() / (alone[i] - untuned).norm()).item())
        tied = _get_module_names_tied_with_embedding(model)
        keys = [key for key, _ in model.named_parameters(remove_duplicate=False) if "lm_head" in key]
        has = [any(adapter in key.split(".") for key in keys) for adapter in "ba"]
        is_told = any("no tied modules were found" in str(warning.message) for warning in caught)
        print("{}: a {:.3f}, then b {:.3f}; b {:.3f}, then a {:.3f}; ".format(name, *shares), end="")
        print(f"tied {tied}; lm_head has b {has[0]}, then a {has[1]}; warning {is_told}")
        is_right = name == "trainable_token_indices"
        is_as_seen &= max(shares[0], shares[2]) < 1e-3 and has == [True, is_right]
        is_as_seen &= max(shares) < 1e-3 if is_right else min(shares[1], shares[3]) > 0.5
        is_as_seen &= is_told == (name == "modules_to_save")
        is_as_seen &= name != "LoRA" or tied == ["lm_head.base_layer"]
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
