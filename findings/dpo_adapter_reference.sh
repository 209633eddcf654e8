#!/bin/sh
# trl 1.16.0 with peft 0.21.2, transformers 5.24.0 and torch 2.13.0: DPOTrainer that goes on with an adapter which was tuned
# before, PeftModel.from_pretrained(base, folder, is_trainable=True), and no ref_model.
# One would guess: the reference is the model as it was before the training, as the docstring has it, adapter included, so that
# the loss begins at log 2 = 0.6931; and making a trainer does not change the model.
# What happens: the trainer adds a second adapter, "ref", and copies into it what has ".default." inside its name. LoRA of linear
# layers has, DoRA and modules_to_save as well. Where a name ends in ".default" nothing is copied, without a word, and in that
# part the reference is an adapter that was never tuned: trainable_token_indices (tokens that were added for a chat), LoRA of
# embeddings, IA3, VeRA, LoHa, LoKr, HRA, BOFT, MiSS.
# A second adapter of PiSSA or OLoRA takes its start out of the base's weights once more, so that the policy itself is another
# model from then on, and the loss does not show it, as the reference is wrong in the same way. With peft_config=, before any
# tuning, the reference of these two is what their start left of the base. (By their sources KTO, RLOO and GRPO do the same.)
# Output seen (the change is that of the policy's logits by making the trainer, in their own norm; figures may differ among
# processors):
#   LoRA: loss 0.6931, change 0.00
#   LoRA and three tokens: loss 0.7426, change 0.00
#   LoRA of embeddings: loss 0.5165, change 0.00
#   IA3: loss 0.6691, change 0.00
#   PiSSA: loss 0.6931, change 0.96
#   PiSSA by peft_config: loss 0.6550, change 0.00
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
with torch.no_grad():
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=0.2)
base = os.path.join(sys.argv[1], "base")
model.save_pretrained(base)
row = {"prompt": "a b", "chosen": " c d", "rejected": " e f g"}
rows = Dataset.from_list([row, {"prompt": "b h", "chosen": " g c", "rejected": " d a"}])
settings = dict(report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
args = DPOConfig(os.path.join(sys.argv[1], "dpo"), per_device_eval_batch_size=2, **settings)
ids = torch.randint(3, len(words), (2, 8))
linear = dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def read_base():
    return LlamaForCausalLM.from_pretrained(base)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


def begin(policy, peft_config=None):
    """Returns the loss before the first step, and how far making the trainer has moved the policy's logits."""
    before = logits(policy)
    trainer = DPOTrainer(policy, None, args, None, rows, rows, tokenizer, peft_config=peft_config)
    change = (logits(trainer.model) - before).norm() / before.norm()
    return trainer.evaluate()["eval_loss"], change.item()


kinds = {
    "LoRA": LoraConfig(r=4, **linear),
    "LoRA and three tokens": LoraConfig(r=4, trainable_token_indices=[3, 4, 5], **linear),
    "LoRA of embeddings": LoraConfig(r=4, target_modules=[*linear["target_modules"], "embed_tokens"]),
    "IA3": IA3Config(feedforward_modules=[], **linear),
    "PiSSA": LoraConfig(r=4, init_lora_weights="pissa", **linear),
}
is_as_seen = True
for kind, config in kinds.items():
    torch.manual_seed(1)
    tuned = get_peft_model(read_base(), config)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    adapter = os.path.join(sys.argv[1], kind)
    tuned.save_pretrained(adapter)
    policy = PeftModel.from_pretrained(read_base(), adapter, is_trainable=True)
    is_as_seen &= torch.allclose(logits(policy), logits(tuned), atol=1e-3)
    loss, change = begin(policy)
    print(f"{kind}: loss {loss:.4f}, change {change:.2f}")
    is_as_seen &= (abs(loss - 0.6931) < 1e-3) == (kind in ("LoRA", "PiSSA"))
    is_as_seen &= change > 0.1 if kind == "PiSSA" else change < 1e-4

loss, change = begin(read_base(), kinds["PiSSA"])
print(f"PiSSA by peft_config: loss {loss:.4f}, change {change:.2f}")
is_as_seen &= abs(loss - 0.6931) > 0.01 and change < 1e-4
is_promised = "before DPO training starts" in " ".join(DPOTrainer.__doc__.split())
raise SystemExit(not is_as_seen or not is_promised)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/models" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
grep -E '^[A-Za-z0-9_ ]+: loss' "$folder/seen"
