#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: one batch for two adapters of a kind, model(ids, adapter_names=
# ["first", "second"]), a name for each row.
# One would guess: a kind that cannot do this refuses it, as LoRA itself refuses it for DoRA and for names that are not
# there; else each row gets its own adapter.
# What happens: LoRA alone of these kinds reads the names. For the others they are dropped without a word, whether they
# exist or not, and each row is answered by the active adapter.
# Output seen:
#   LoRA: rows by ['first', 'second'], a name that is not there: refused
#   IA3: rows by ['first', 'first'], a name that is not there: taken
#   OFT: rows by ['first', 'first'], a name that is not there: taken
#   HRA: rows by ['first', 'first'], a name that is not there: taken
#   LoHa: rows by ['first', 'first'], a name that is not there: taken
#   LoKr: rows by ['first', 'first'], a name that is not there: taken
#   VeRA: rows by ['first', 'first'], a name that is not there: taken
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import torch
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
parts = dict(target_modules=["q_proj", "o_proj"])
configs = {
    "LoRA": LoraConfig(r=2, **parts),
    "IA3": IA3Config(feedforward_modules=[], **parts),
    "OFT": OFTConfig(r=0, oft_block_size=4, **parts),
    "HRA": HRAConfig(r=2, **parts),
    "LoHa": LoHaConfig(r=2, **parts),
    "LoKr": LoKrConfig(r=2, **parts),
    "VeRA": VeraConfig(r=2, **parts),
}


@torch.no_grad()
def serve(config):
    """Returns which adapters answer two equal rows, and whether a name that is not there is refused or taken."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), config, adapter_name="first")
    model.add_adapter("second", config)
    model.eval()
    for name, p in model.named_parameters():
        if "first" in name or "second" in name:
            p.add_(torch.randn_like(p))
    alone = {}
    for name in ("second", "first"):
        model.set_adapter(name)
        alone[name] = model(ids).logits[0]
    assert not torch.allclose(alone["first"], alone["second"], atol=1e-3)
    rows = model(ids, adapter_names=["first", "second"]).logits
    answers = [name for row in rows for name in alone if torch.allclose(row, alone[name], atol=1e-5)]
    try:
        model(ids, adapter_names=["first", "third"])
        return answers, "taken"
    except ValueError:
        return answers, "refused"


results = {kind: serve(config) for kind, config in configs.items()}
for kind, (answers, unknown) in results.items():
    print(f"{kind}: rows by {answers}, a name that is not there: {unknown}")
expected = dict.fromkeys(configs, (["first", "first"], "taken")) | {"LoRA": (["first", "second"], "refused")}
raise SystemExit(results != expected)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
