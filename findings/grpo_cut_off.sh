#!/bin/sh
# trl 1.16.0 with transformers 5.24.0 and torch 2.13.0: GRPOTrainer with mask_truncated_completions=True.
# One would guess: a completion that was cut off at max_completion_length has no part in the update; its tokens are
# masked out of the loss, so what reward it got does not matter.
# What happens: its reward still counts in the mean (and deviation) of its group, and so decides the advantages of the
# others. Here every completion that ends gets 0 and every one that is cut off gets 1: among those that are learned from
# there is nothing to prefer, and yet each step pushes all of them down, that is, away from ending. Where those that are cut
# off get 0 too, the same step has no gradient.
# Output seen: "cut off gets 1: gradient norm 0.682, cut off gets 0: 0.000, 18 of 32 completions ended"
# (the figures may differ among processors)
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 trl==1.16.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

folder = sys.argv[1]
words = {word: id for id, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def one_step(reward_of_cut_off):
    """Returns the gradient norm of one step, and how many of 32 completions had an end."""
    set_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes))
    ended = []

    def reward(completion_ids, **_):
        ended[:] = [1 in ids for ids in completion_ids]
        return [0.0 if end else reward_of_cut_off for end in ended]

    config = GRPOConfig(
        folder,
        mask_truncated_completions=True,
        max_completion_length=8,
        num_generations=8,
        per_device_train_batch_size=32,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": word} for word in "abcdefgh"])
    trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    [norm] = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return float(norm), sum(ended)


with_one, ended = one_step(1.0)
with_none, same = one_step(0.0)
print(
    f"cut off gets 1: gradient norm {with_one:.3f}, cut off gets 0: {with_none:.3f}, "
    f"{ended} of 32 completions ended"
)
raise SystemExit(not (with_one > 0.01 and with_none < 1e-6 and 0 < ended == same < 32))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" || { tail -3 "$folder/err"; exit 1; }
