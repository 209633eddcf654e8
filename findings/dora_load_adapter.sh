#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: an adapter folder that peft's save_pretrained wrote, read by
# transformers: model.load_adapter(folder), or AutoModelForCausalLM.from_pretrained(folder).
# One would guess: the model that PeftModel.from_pretrained reads; transformers' documentation says that "all non-prompt learning
# methods" are supported.
# What happens: for DoRA, A and B are read and the magnitudes are not: the file's "lora_magnitude_vector" is put under
# "lora_magnitude_vector.default", and the model's is "lora_magnitude_vector.default.weight". So the model's stay as they were
# made, the norms of the base's rows, which is neither the adapter nor LoRA of its A and B. Nothing fails: the log has a table
# with the one name as UNEXPECTED, which "can be ignored when loading from different task/architecture", and the other as
# MISSING. LoRA, rsLoRA, saved modules and a dozen other kinds (IA3, OFT, HRA, LoHa, LoKr, BOFT, FourierFT, ...) are right.
# Output seen (the difference of logits to the model that was saved, as a share of what the adapter changes; figures may differ
# among processors):
#   LoRA: peft 0.00, load_adapter 0.00, from_pretrained 0.00
#   rsLoRA and lm_head: peft 0.00, load_adapter 0.00, from_pretrained 0.00
#   DoRA: peft 0.00, load_adapter 0.44, from_pretrained 0.44
#   DoRA: A and B as saved True, magnitudes as saved False, norms of the base's rows True
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
with torch.no_grad():
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=0.2)
base_folder = os.path.join(sys.argv[1], "base")
model.save_pretrained(base_folder)
ids = torch.randint(0, 32, (2, 8))


def read_base():
    return LlamaForCausalLM.from_pretrained(base_folder)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


base = logits(read_base())
kinds = {
    "LoRA": {},
    "rsLoRA and lm_head": dict(use_rslora=True, modules_to_save=["lm_head"]),
    "DoRA": dict(use_dora=True),
}
is_as_seen = True
for kind, settings in kinds.items():
    folder = os.path.join(sys.argv[1], kind)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    saved = get_peft_model(read_base(), LoraConfig(r=4, target_modules=targets, **settings))
    with torch.no_grad():
        for p in saved.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    saved.save_pretrained(folder)
    expected = logits(saved)

    def difference(model):
        return ((logits(model) - expected).norm() / (expected - base).norm()).item()

    by_peft = PeftModel.from_pretrained(read_base(), folder)
    by_load = read_base()
    by_load.load_adapter(folder)
    by_auto = AutoModelForCausalLM.from_pretrained(folder)
    shares = [difference(model) for model in (by_peft, by_load, by_auto)]
    print("{}: peft {:.2f}, load_adapter {:.2f}, from_pretrained {:.2f}".format(kind, *shares))
    is_as_seen &= shares[0] < 1e-4
    is_as_seen &= min(shares[1:]) > 0.2 if kind == "DoRA" else max(shares[1:]) < 1e-4

one = saved.base_model.model.model.layers[0].self_attn.q_proj
other = by_load.model.layers[0].self_attn.q_proj
pairs = [torch.equal(part(one).weight, part(other).weight) for part in (lambda x: x.lora_A.default, lambda x: x.lora_B.default)]
magnitudes = [layer.lora_magnitude_vector["default"].weight for layer in (one, other)]
norms = torch.linalg.norm(other.base_layer.weight, dim=1)
facts = all(pairs), torch.allclose(*magnitudes), torch.allclose(magnitudes[1], norms)
print("DoRA: A and B as saved {}, magnitudes as saved {}, norms of the base's rows {}".format(*facts))
raise SystemExit(not is_as_seen or facts != (True, False, True))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/models" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
