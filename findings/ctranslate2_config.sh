#!/bin/sh
# ctranslate2 4.8.5 with transformers 5.24.0 and torch 2.13.0: TransformersConverter (ct2-transformers-converter) of folders that
# save_pretrained wrote, in float32, beside the models that wrote them.
# One would guess: the converter writes the model that config.json describes, or refuses it. It refuses rope scaling by "yarn",
# and llama3 is among those that it says it supports.
# What happens: much is left out without a word, and the file is another model.
#   "llama3" (the rope of Llama 3.1 and 3.2): its bounds are written and its factor is not. The file is, to the last digits, the
#   model without scaling. That shows the more the longer the text is, so that a short test says little.
#   Gemma 2: the caps of scores and of logits are not there, and head_dim is taken for query_pre_attn_scalar (144 beside 128
#   in the 27B). A Llama's hidden_act is silu whatever it says, while GPT-2's is read; GPT-2's layer_norm_epsilon is 1e-5, and
#   scale_attn_by_inverse_layer_idx is false.
# Output seen (the difference of logits of 500 tokens, as a share of their norm; figures may differ among processors):
#   Llama, linear scaling, biases, an epsilon of 0.1: 0.000
#   Llama, llama3 scaling from 64 positions: 0.740, to the model without it 0.000
#   Llama, llama3 scaling from 8192 positions: 0.073, to the model without it 0.000
#   Llama, hidden_act gelu: 0.177, to the model without it 0.000
#   Gemma 2, no caps: 0.000
#   Gemma 2, attn_logit_softcapping 1: 0.308, to the model without it 0.000
#   Gemma 2, final_logit_softcapping 1: 0.776, to the model without it 0.000
#   Gemma 2, query_pre_attn_scalar 64: 0.304, to the model without it 0.000
#   GPT-2, activation_function relu: 0.000
#   GPT-2, layer_norm_epsilon 0.1: 0.713, to the model without it 0.000
#   GPT-2, scale_attn_by_inverse_layer_idx: 0.062, to the model without it 0.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 ctranslate2==4.8.5
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2")
ids = torch.randint(3, 64, (1, 500), generator=torch.Generator().manual_seed(0))
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
sizes.update(num_key_value_heads=4, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
names = dict(llama="Llama", gemma2="Gemma 2", gpt2="GPT-2")


def make(kind, settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **settings}), attn_implementation="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.12)
    return model.eval()


@torch.no_grad()
def difference(kind, written, read):
    """Returns how far the file of a model with settings written is from a model of the same weights with settings read."""
    base = os.path.join(sys.argv[1], "model")
    make(kind, written).save_pretrained(base)
    tokenizer.save_pretrained(base)
    TransformersConverter(base).convert(base + "-ct2", force=True)
    values = [ctranslate2.StorageView.from_array(np.array(x, dtype=np.int32)) for x in (ids.tolist(), [ids.numel()])]
    generator = ctranslate2.Generator(base + "-ct2", device="cpu", compute_type="float32")
    logits = torch.from_numpy(np.array(generator.forward_batch(*values)))
    expected = make(kind, read)(input_ids=ids).logits
    return ((logits - expected).norm() / expected.norm()).item()


def rope(kind, **settings):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **settings))


linear = rope("linear", factor=4.0)
llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
short = rope("llama3", original_max_position_embeddings=64, **llama3)
long = rope("llama3", original_max_position_embeddings=8192, **llama3)
no_caps = dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=16)
no_caps.update(layer_types=["full_attention"] * 2, tie_word_embeddings=True)
gpt2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)
# kind, what is said of it, settings, what the file has in their place (nothing where it is right)
cases = [
    ("llama", "linear scaling, biases, an epsilon of 0.1", linear | dict(attention_bias=True, rms_norm_eps=0.1), {}),
    ("llama", "llama3 scaling from 64 positions", short, rope("default")),
    ("llama", "llama3 scaling from 8192 positions", long, rope("default")),
    ("llama", "hidden_act gelu", dict(hidden_act="gelu"), dict(hidden_act="silu")),
    ("gemma2", "no caps", no_caps, {}),
    ("gemma2", "attn_logit_softcapping 1", no_caps | dict(attn_logit_softcapping=1.0), no_caps),
    ("gemma2", "final_logit_softcapping 1", no_caps | dict(final_logit_softcapping=1.0), no_caps),
    ("gemma2", "query_pre_attn_scalar 64", no_caps | dict(query_pre_attn_scalar=64), no_caps),
    ("gpt2", "activation_function relu", gpt2 | dict(activation_function="relu"), {}),
    ("gpt2", "layer_norm_epsilon 0.1", gpt2 | dict(layer_norm_epsilon=0.1), gpt2 | dict(layer_norm_epsilon=1e-5)),
    ("gpt2", "scale_attn_by_inverse_layer_idx", gpt2 | dict(scale_attn_by_inverse_layer_idx=True), gpt2),
]
is_as_seen = True
for kind, what, settings, other in cases:
    far = difference(kind, settings, settings)
    print(f"{names[kind]}, {what}: {far:.3f}", end="")
    if other:
        near = difference(kind, settings, other)
        print(f", to the model without it {near:.3f}", end="")
        is_as_seen &= far > 0.01 and near < 1e-4
    else:
        is_as_seen &= far < 1e-4
    print()
refused = ""
try:
    difference("llama", rope("yarn", factor=4.0), {})
except NotImplementedError as e:
    refused = str(e)
is_as_seen &= "llama3" in refused
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
grep -E '^(Llama|Gemma|GPT)' "$folder/seen"
