#!/bin/sh
# trl 1.16.0 with datasets 5.2.0, transformers 5.24.0 and torch 2.13.0: KTOTrainer of pairs (prompt, chosen, rejected), which it
# takes and turns into rows of one answer each.
# One would guess: good and bad answers are mixed in the batches, by chance or as they stand in the pairs, and pairs that were
# shuffled before are in a random order. The same rows, made and shuffled by hand, train much the same model.
# What happens: unpair_preference_dataset is a batched map, by 1,000 pairs, and its _unpair_row puts all chosen of these before
# all rejected. The rows are read in that order, in each epoch: train_sampling_strategy is "sequential", and KTOTrainer refuses
# "random" with its default loss. So up to 1,000 good answers come first, then as many bad ones; of 1,000 pairs or fewer, all
# the good ones before all the bad. No batch has both, rewards/margins is not in the log, and there is no warning. What
# all answers have in common is learned by the one half and unlearned by the other, and which of them wins depends on
# the learning rate of each. The rows of trl's own unpair_preference_dataset(pairs), shuffled, are right.
# Output seen (a tiny Llama of random weights; chosen and rejected share three quarters of their words; the change of the mean
# log-probability of answers that were not trained on; figures may differ among processors):
#   2500 pairs are read as: 1000 good, 1000 bad, 1000 good, 1000 bad, 500 good, 500 bad
#   linear, 3e-04, pairs: 0 of 64 batches have both, 0 margins in the log, chosen +2.19, rejected +1.20
#   linear, 3e-04, rows, shuffled: 63 of 64 batches have both, 7 margins in the log, chosen +0.44, rejected -0.54
#   constant, 1e-03, pairs: 0 of 64 batches have both, 0 margins in the log, chosen -2.63, rejected -11.86
#   constant, 1e-03, rows, shuffled: 63 of 64 batches have both, 7 margins in the log, chosen -0.17, rejected -9.80
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import copy
import itertools
import random
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

torch.set_num_threads(1)
draw = random.Random(0)
words = [f"w{i}" for i in range(61)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
splitter = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(first, last, n):
    return " ".join(words[draw.randrange(first, last)] for _ in range(n))


def make_pairs(n):
    return [{"prompt": text(0, 20, 4) + " ", "chosen": text(20, 52, 6), "rejected": text(28, 60, 6)} for _ in range(n)]


pairs, held_out, many = make_pairs(256), make_pairs(128), make_pairs(2500)
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1))


@torch.no_grad()
def measure(model, key):
    """Returns the mean log-probability of the answers, <eos> included, after their prompts."""
    ids = tokenizer([pair["prompt"] + pair[key] for pair in held_out], return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.ones(len(ids), 1, dtype=ids.dtype)], 1)
    logps = model.eval()(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    return logps[:, 3:].sum((1, 2)).mean().item()


def make_trainer(rows, **settings):
    args = KTOConfig(
        sys.argv[1],
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    model = copy.deepcopy(base)
    return KTOTrainer(model, copy.deepcopy(base), args, train_dataset=rows, processing_class=tokenizer)


labels = make_trainer(Dataset.from_list(many)).train_dataset["label"]
runs = [f"{len(list(run))} {'good' if label else 'bad'}" for label, run in itertools.groupby(labels)]
seen = [f"2500 pairs are read as: {', '.join(runs)}"]
is_as_seen = runs == ["1000 good", "1000 bad"] * 2 + ["500 good", "500 bad"]
rows_pairs = Dataset.from_list(pairs)
rows_mixed = unpair_preference_dataset(rows_pairs).shuffle(seed=0)
for schedule, rate in (("linear", 3e-4), ("constant", 1e-3)):
    changes = {}
    for name, rows in (("pairs", rows_pairs), ("rows, shuffled", rows_mixed)):
        trainer = make_trainer(rows, num_train_epochs=1, lr_scheduler_type=schedule, learning_rate=rate)
        batches = [sum(batch["label"]) for batch in trainer.get_train_dataloader()]
        both = sum(0 < n < 8 for n in batches)
        trainer.train()
        change = [measure(trainer.model, key) - measure(base, key) for key in ("chosen", "rejected")]
        margins = sum("rewards/margins" in line for line in trainer.state.log_history)
        changes[name] = change
        seen.append(
            f"{schedule}, {rate:.0e}, {name}: {both} of {len(batches)} batches have both, {margins} margins in the "
            f"log, chosen {change[0]:+.2f}, rejected {change[1]:+.2f}"
        )
        is_as_seen &= len(batches) == 64 and (both == margins == 0 if name == "pairs" else both > 50 and margins > 0)
    (chosen, rejected), (chosen_mixed, rejected_mixed) = changes.values()
    is_as_seen &= rejected > 0.5 and rejected_mixed < 0 if schedule == "linear" else chosen < chosen_mixed - 1
print("", *seen, sep="\nSEEN ")
try:
    make_trainer(rows_pairs, train_sampling_strategy="random")
    is_as_seen = False
except ValueError:
    pass
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
sed -n 's/^SEEN //p' "$folder/log"
