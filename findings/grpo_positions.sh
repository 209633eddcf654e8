#!/bin/sh
# trl 1.16.0 with transformers 5.24.0 and torch 2.13.0: GRPOTrainer of a GPT-2 (positions are looked up in a table), prompts
# of different lengths, completions by the model's own generate().
# One would guess: the policy that is updated is the one that wrote: a completion's log-probabilities are those that it was
# drawn with. The prompts are padded on the left, but the attention mask goes in, and generate() is right with no more.
# What happens: generate() works out positions from the mask; GPT-2's forward pass does not, and the trainer hands over none.
# So a completion after a shorter prompt is scored, and learned from, as many positions further on as its prompt was padded,
# by rows of the table that had no part in writing it. The reference's log-probabilities and the ratio are taken in the same
# way, so that no metric shows it. (By its source RLOOTrainer leaves them out as well.) A Llama, which knows distances alone,
# is right.
# Output seen (a prompt of one word beside one of eight, whose rewards are all 0 and so teach nothing; the average may differ
# among processors):
#   gpt2: a token's log-probability is off by 1.313 on average; positions written at [0..7], with a gradient [7..14]
#   llama: a token's log-probability is off by 0.000 on average
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

words = {word: id for id, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
ids = dict(vocab_size=10, pad_token_id=0, eos_token_id=1, bos_token_id=None)
configs = {
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ids
    ),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, **ids
    ),
}


def one_step(config):
    """Returns the model, the update's rows, masks and log-probabilities, and the positions of generate() and update."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    updates, written_at, gradients = [], [], []

    def forward(module, args, kwargs, output):
        if kwargs.get("labels") is not None:
            updates.append((kwargs["input_ids"], kwargs["attention_mask"], output.log_probs.detach()))
        else:
            is_padded = kwargs["attention_mask"][:, 0] == 0
            written_at.extend(kwargs["position_ids"][is_padded, -1].tolist())

    handle = model.register_forward_hook(forward, with_kwargs=True)
    if config.model_type == "gpt2":
        model.transformer.wpe.weight.register_hook(gradients.append)

    def reward(prompts, completion_ids, **_):
        return [float(len(ids)) if prompt == "a" else 0.0 for prompt, ids in zip(prompts, completion_ids)]

    settings = GRPOConfig(
        sys.argv[1],
        max_completion_length=8,
        num_generations=8,
        per_device_train_batch_size=16,
        learning_rate=0.0,
        max_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": "a b c d e f g h"}, {"prompt": "a"}])
    GRPOTrainer(model, reward, settings, train_dataset=data, processing_class=tokenizer).train()
    handle.remove()
    [(rows, masks, log_probs)] = updates
    return model, rows, masks, log_probs, written_at, gradients


def span(positions):
    return f"[{min(positions)}..{max(positions)}]"


results = {}
for kind, config in configs.items():
    model, rows, masks, log_probs, written_at, gradients = one_step(config)
    differences = []
    for row, mask, in_update in zip(rows, masks, log_probs):
        if mask[:8].all():
            continue
        alone = row[mask.bool()]
        with torch.no_grad():
            expected = model(alone[None]).logits[0, :-1].log_softmax(-1)
        expected = expected.gather(-1, alone[1:, None])[:, 0]
        differences += (expected - in_update[7 : 7 + len(expected)]).abs().tolist()
    mean = sum(differences) / len(differences)
    line = f"{kind}: a token's log-probability is off by {mean:.3f} on average"
    results[kind] = mean
    for gradient in gradients:
        learned = gradient.abs().sum(1).nonzero()[:, 0].tolist()
        results["positions"] = min(written_at), min(learned)
        line += f"; positions written at {span(written_at)}, with a gradient {span(learned)}"
    print(line)
same = results["gpt2"] > 0.1 and results["llama"] < 1e-4 and results["positions"] == (0, 7)
raise SystemExit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(gpt2|llama)' "$folder/seen"
