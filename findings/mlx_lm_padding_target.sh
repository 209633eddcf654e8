#!/bin/sh
# mlx-lm 0.32.2 with mlx 0.32.4 on a CPU, transformers 5.24.0: tuning by mlx_lm.tuner (what mlx_lm.lora runs) on short texts.
# One would guess: a text's targets are its own tokens, <eos> the last; val_loss is the mean of their losses. val_batches=-1,
# all of the validation set by its help, leaves nothing out, and neither does a training that goes round and round.
# What happens: lengths are compared with positions off by one, and a batch is padded to at least one token more than its texts
# have. So each text (but one of max_seq_length) has a target after <eos>: token 0, whatever that is (<unk> for Llama 2, "!"
# for GPT-2 and Qwen), in training and in evaluation, with mask_prompt as well. It is learned in no time, and from then on
# val_loss is too small, the more so the shorter texts or answers are. And the rows that are left over after whole batches,
# the last ones of the file, are never evaluated, and not trained on in any epoch.
# Output seen (rows of two words, the second drawn of four, so that no model can be below ln 4 / 2 = 0.693; figures may
# differ among processors):
#   targets counted in 8 rows of three tokens: 24
#   after 200 steps: val_loss 0.473, the rows' own 0.710, probability of token 0 after <eos> 1.000
#   rows of 10 in 100 batches of 4: 0 1 2 3 4 5 6 7
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import random
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, evaluate, iterate_batches, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
mx.disable_compile()  # no compiler of C++ is needed
words = ["<unk>", "<eos>", *"abcdefgh"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
random.seed(0)
mx.random.seed(0)
np.random.seed(0)


def make_rows(n):
    texts = [random.choice("abcd") + " " + random.choice("efgh") for _ in range(n)]
    return CacheDataset(TextDataset([{"text": text} for text in texts], tokenizer))


settings = dict(model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=4)
model = Model(ModelArgs(rms_norm_eps=1e-5, vocab_size=len(words), tie_word_embeddings=False, **settings))
training, validation = make_rows(512), make_rows(512)
[(batch, lengths)] = list(iterate_batches(make_rows(8), 8, 2048))
counted = default_loss(model, batch, lengths)[1].item()
print(f"targets counted in 8 rows of three tokens: {counted}")

args = TrainingArgs(batch_size=8, iters=200, steps_per_eval=1000, steps_per_save=1000, adapter_file=sys.argv[1])
train(model, mlx.optimizers.Adam(learning_rate=3e-3), training, None, args)
val_loss = evaluate(model, validation, batch_size=8, num_batches=-1)
ids = mx.array([validation[i][0] for i in range(512)])
losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
own = losses.mean().item()
after = mx.softmax(model(ids)[:, -1], axis=-1)[:, 0].mean().item()
print(f"after 200 steps: val_loss {val_loss:.3f}, the rows' own {own:.3f}, probability of token 0 after <eos> {after:.3f}")

ten = CacheDataset(TextDataset([{"text": words[i]} for i in range(10)], tokenizer))
seen = set()
for _, (batch, _) in zip(range(100), iterate_batches(ten, 4, 2048, loop=True)):
    seen.update(batch[:, 0].tolist())
print("rows of 10 in 100 batches of 4:", *sorted(seen))
is_whole = "entire validation set" in TrainingArgs.__dataclass_fields__["val_batches"].metadata["help"]
is_as_seen = counted == 24 and abs(val_loss - own * 2 / 3) < 0.01 and own > 0.69 and after > 0.98 and seen == set(range(8))
raise SystemExit(not is_as_seen or not is_whole)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/adapter.safetensors" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
grep -E '^(targets|after|rows)' "$folder/seen"
