#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: alpha_pattern and rank_pattern with a rule for one layer and a rule for
# all others, as {"layers.1.mlp.down_proj": 64, "down_proj": 8}; save_pretrained, then PeftModel.from_pretrained.
# One would guess: the model that is loaded is the one that was saved, whichever rule peft gives way to where two of them fit.
# What happens: where several keys fit, get_pattern_key (peft/utils/other.py) takes the first one of the dict; the
# documentation has no word of which. save_pretrained writes adapter_config.json with sort_keys=True (peft/config.py), so that
# in the file, and in every model that is loaded from it, the first one of the alphabet comes first. The layer then has the
# other rule's alpha, and so another scale, without a word, merged into the weights as well; the file does not tell what was
# meant. It depends on nothing but spelling: "layers.1..." is sorted before "q_proj", "up_proj" and "v_proj", and after
# "down_proj", "gate_proj" and "k_proj", so that of two pairs of rules of one form the one survives and the other does not.
# "^model.layers.1..." is sorted before all names. With rank_pattern, LoRA is refused on loading, since sizes differ (its own
# folder cannot be read back); LoKr's weights may be of one size for several ranks, and there the scale, alpha through rank, is
# another one without a word.
# Output seen (the difference of logits to those of the model that was saved, as a share of what the adapter changes, and the
# scale of the module of layer 1 as it was saved and loaded; the differences may be others on other processors):
#   LoRA, alpha of up_proj: 0.000, merged 0.000, scale 8, then 8
#   LoRA, alpha of down_proj: 0.696, merged 0.696, scale 8, then 1
#   LoRA, alpha of down_proj, ^: 0.000, merged 0.000, scale 8, then 8
#   LoRA, alpha of all in layer 1: 0.427, merged 0.427, scale 8, then 1
#   LoHa, alpha of down_proj: 0.754, merged 0.754, scale 8, then 1
#   LoKr, alpha of down_proj: 0.806, merged 0.806, scale 8, then 1
#   LoKr, rank of down_proj: 0.134, merged 0.134, scale 0.5, then 1
#   LoRA, rank of down_proj: refused, sizes differ
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def make():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))


def scale(model, name):
    part = "self_attn" if name in ("q_proj", "k_proj") else "mlp"
    return model.get_submodule(f"base_model.model.model.layers.1.{part}.{name}").scaling["default"]


@torch.no_grad()
def reload(config, name):
    """Returns how far the model that is loaded is from the one that was saved, the scale of the one and of the other."""
    base = make().eval()
    untuned = base(ids).logits
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    tuned = model(ids).logits
    folder = os.path.join(sys.argv[1], "adapter")
    model.save_pretrained(folder)
    try:
        again = PeftModel.from_pretrained(make(), folder).eval()
    except RuntimeError as error:
        assert "size mismatch" in str(error)
        return None
    scales = [scale(model, name), scale(again, name)]
    logits = [again(ids).logits, again.merge_and_unload()(ids).logits]
    return [((y - tuned).norm() / (tuned - untuned).norm()).item() for y in logits] + scales


common = dict(target_modules=["q_proj", "k_proj", "down_proj", "up_proj"])
down = dict(alpha_pattern={"layers.1.mlp.down_proj": 64, "down_proj": 8})
up = dict(alpha_pattern={"layers.1.mlp.up_proj": 64, "up_proj": 8})
layer = dict(alpha_pattern={r"layers\.1\..*": 64, "[kq]_proj": 8})
start = dict(alpha_pattern={"^model.layers.1.mlp.down_proj": 64, "down_proj": 8})
ranks = dict(rank_pattern={"layers.1.mlp.down_proj": 16, "down_proj": 8})
cases = [
    ("LoRA, alpha of up_proj", LoraConfig(**common, **up), "up_proj", [8, 8]),
    ("LoRA, alpha of down_proj", LoraConfig(**common, **down), "down_proj", [8, 1]),
    ("LoRA, alpha of down_proj, ^", LoraConfig(**common, **start), "down_proj", [8, 8]),
    ("LoRA, alpha of all in layer 1", LoraConfig(**common, **layer), "k_proj", [8, 1]),
    ("LoHa, alpha of down_proj", LoHaConfig(**common, **down), "down_proj", [8, 1]),
    ("LoKr, alpha of down_proj", LoKrConfig(**common, **down), "down_proj", [8, 1]),
    ("LoKr, rank of down_proj", LoKrConfig(**common, **ranks), "down_proj", [0.5, 1]),
    ("LoRA, rank of down_proj", LoraConfig(**common, **ranks), "down_proj", None),
]
is_as_seen = True
for label, config, name, scales in cases:
    result = reload(config, name)
    if result is None:
        print(f"{label}: refused, sizes differ")
        is_as_seen &= scales is None
        continue
    print("{}: {:.3f}, merged {:.3f}, scale {:g}, then {:g}".format(label, *result))
    is_as_seen &= result[2:] == scales
    is_as_seen &= max(result[:2]) < 1e-3 if scales == [8, 8] else min(result[:2]) > 0.05
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/models" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
