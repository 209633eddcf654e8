#!/bin/sh
# mlx-lm 0.32.2 with mlx 0.32.4 on a CPU, transformers 5.24.0: generate() with a byte-level BPE tokenizer, as GPT-2's.
# One would guess: the text that generate() returns is tokenizer.decode() of the new tokens, to be put after the prompt.
# What happens: the detokenizer leaves out a space that the text starts with, since trim_space is its default, so that
# prompt + text runs two words together.
# Output seen: "decode ' cat cat cat', generate 'cat cat cat', without its first space True"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
characters = {"<|endoftext|>": 0, "Ġ": 1, "c": 2, "a": 3, "t": 4, "Ġc": 5, "Ġca": 6, "Ġcat": 7}
backend = Tokenizer(models.BPE(characters, [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(sys.argv[1])
tokenizer = load(Path(sys.argv[1]))
args = ModelArgs(
    model_type="llama",
    hidden_size=8,
    num_hidden_layers=1,
    intermediate_size=8,
    num_attention_heads=1,
    rms_norm_eps=1e-5,
    vocab_size=8,
    tie_word_embeddings=False,
)
model = Model(args)
# each logit is 0 but that of " cat", whose row of the head is the sum of what it is given
model.model.embed_tokens.weight = mx.ones((8, 8))
for projection in model.layers[0].self_attn.o_proj, model.layers[0].mlp.down_proj:
    projection.weight = mx.zeros((8, 8))
model.lm_head.weight = mx.zeros((8, 8)).at[7].add(1.0)
decoded = tokenizer.decode([7, 7, 7])
text = generate(model, tokenizer, [7], max_tokens=3)
print(f"decode {decoded!r}, generate {text!r}, without its first space {decoded == ' ' + text}")
raise SystemExit((decoded, text) != (" cat cat cat", "cat cat cat"))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/tokenizer" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
