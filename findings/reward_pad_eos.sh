#!/bin/sh
# trl 1.16.0 with transformers 5.24.0 and torch 2.13.0: RewardTrainer of a Llama whose tokenizer has no padding token.
# One would guess: the reward is read at the last token of an answer. RewardTrainer puts <eos> after each text itself, so that
# is <eos>: a model can learn that an answer has come to its end, and GRPO with it that one which was cut off has not.
# What happens: without a padding token RewardTrainer takes <eos> for it, as its documentation says, and a model for sequence
# classification reads the last token which is not the padding token, whatever the attention mask says. So it steps over the
# <eos> that was put there, to the token before. An answer has one reward with its end and cut off before it, and pairs that
# differ in this alone cannot be learned: their loss stays at log 2. No warning. A padding token of its own, as
# pad_token="<pad>", mends it. (An <eos> between turns is no matter: the last other token counts.)
# Output seen (the losses of steps 1 and 20; those of <pad> may differ among processors; "apart" says whether the reward with
# <eos> differs from that without it):
#   <pad>: ids [[5, 6, 1], [5, 6, 2]], mask [[1, 1, 1], [1, 1, 0]], loss 0.94, then 0.00, apart True
#   none: ids [[5, 6, 1], [5, 6, 1]], mask [[1, 1, 1], [1, 1, 0]], loss 0.69, then 0.69, apart False
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0
cat > "$folder/run.py" <<'PYTHON'
import math
import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

VOCAB = {token: id_ for id_, token in enumerate(["<unk>", "<eos>", "<pad>", "a", "b", "c", "d"])}
ENDED, CUT_OFF = [5, 6, 1], [5, 6]


def train(name, **pad):
    """Trains rewards on one pair, an answer with and without its end. Returns a line and whether it was learned."""
    words = Tokenizer(models.WordLevel(VOCAB, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **pad)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=7, eos_token_id=1, num_labels=1, **sizes))
    settings = RewardConfig(
        os.path.join(sys.argv[1], name),
        per_device_train_batch_size=4,
        max_steps=20,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = Dataset.from_list([{"chosen_ids": ENDED, "rejected_ids": CUT_OFF}] * 80)
    trainer = RewardTrainer(model, settings, processing_class=tokenizer, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = batch["input_ids"][[0, -1]].tolist(), batch["attention_mask"][[0, -1]].tolist()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with torch.no_grad():
        ended, cut_off = (model.eval()(torch.tensor([row])).logits.item() for row in (ENDED, CUT_OFF))
    is_apart = abs(ended - cut_off) > 1e-5
    line = f"{name}: ids {ids}, mask {mask}, loss {losses[0]:.2f}, then {losses[-1]:.2f}, apart {is_apart}"
    return line, is_apart, losses[-1]


own, own_is_apart, own_loss = train("<pad>", pad_token="<pad>")
none, none_is_apart, none_loss = train("none")
print(own, none, sep="\n")
raise SystemExit(not (own_is_apart and own_loss < 0.1 and not none_is_apart and abs(none_loss - math.log(2)) < 1e-3))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(<pad>|none):' "$folder/seen"
