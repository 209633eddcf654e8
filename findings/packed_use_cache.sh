#!/bin/sh
# transformers 5.24.0 with torch 2.13.0: documents packed into one row by DataCollatorWithFlattening, whose position_ids start
# again with each, and model(**batch) in a training loop of one's own; attention by sdpa or eager.
# One would guess: the positions say where each document begins, so that none attends to the one before it, as in Trainer,
# whose loss on such a batch is right; use_cache matters to generate() only, and never to a loss.
# What happens: the packing is found in position_ids only where no cache is given and no attention mask. use_cache is true by
# default, in training as well, so that the model makes an empty cache first, and then all documents of a row see those
# before them, without a word. A mask of ones does the same. Trainer is right since it sets config.use_cache to False.
# Output seen (the loss of four documents, random weights, model.train(); the figures may differ among processors):
#   sdpa: alone 5.497, packed 5.323, without cache 5.497, and with a mask of ones 5.323, by Trainer 5.497
#   eager: alone 5.497, packed 5.323, without cache 5.497, and with a mask of ones 5.323, by Trainer 5.497
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

torch.manual_seed(0)
documents = [{"input_ids": torch.randint(0, 32, (length,)).tolist()} for length in (9, 14, 7, 18)]
collator = DataCollatorWithFlattening()
batch = collator(documents)
ones = torch.ones_like(batch["input_ids"])
sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)


@torch.no_grad()
def losses(attention):
    """Returns the mean loss of a token of documents alone, and of their packed row in four ways."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(attn_implementation=attention, **sizes)).train()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    total = 0.0
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
    results = [total / (ones.numel() - len(documents))]
    results.append(model(**batch).loss.item())
    results.append(model(**batch, use_cache=False).loss.item())
    results.append(model(**batch, use_cache=False, attention_mask=ones).loss.item())
    settings = TrainingArguments(sys.argv[1], report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, settings, data_collator=collator, eval_dataset=documents)
    results.append(trainer.evaluate()["eval_loss"])
    return results


is_as_seen = True
line = "alone {:.3f}, packed {:.3f}, without cache {:.3f}, and with a mask of ones {:.3f}, by Trainer {:.3f}"
for attention in ("sdpa", "eager"):
    alone, packed, without_cache, with_mask, by_trainer = results = losses(attention)
    print(f"{attention}: " + line.format(*results))
    is_as_seen &= abs(packed - alone) > 0.05 and abs(with_mask - packed) < 1e-4
    is_as_seen &= max(abs(without_cache - alone), abs(by_trainer - alone)) < 1e-4
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(sdpa|eager)' "$folder/seen"
