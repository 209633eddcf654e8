#!/bin/sh
# onnxruntime-genai 0.18.0 (its model builder, float32, CPU; onnxruntime 1.32.0, onnx 1.23.2) with transformers 5.24.0 and torch
# 2.13.0: files built from folders that save_pretrained wrote, beside the models that wrote them.
# One would guess: the file is the model that config.json describes, or the builder refuses it, as it refuses "dynamic" scaling
# of a Mistral with NotImplementedError.
# What happens, without a word:
#   Llama: its class in the builder knows "llama3" and drops any other scaling, while the base class has "linear" (as
#   DeepSeek-Coder has it) and "yarn". 0.14.0 had "linear" for a Llama; since 0.15.0 LlamaModel.make_rope_init hides the base's.
#   YaRN elsewhere: attention_factor is not read. The usual one, 0.1 ln(4) + 1, is put on cosines and sines. (truncate is false
#   here, as the rounding of the range that is the default is not done, either.)
#   Windows: a Mistral has no layer_types, so that is_local takes each of its layers for one that sees all (0.14.0 wrote the
#   window). Phi-3's goes the same way. genai's own Generator then fails soon after the window's length, onnxruntime does not.
#   OLMo: LayerNorm becomes a root mean square, no mean taken off, with 1e-6 for its epsilon of 1e-5.
# Names, shapes and weights are right, and a text within the window, or short for the scaling, says little.
# Output seen (the difference of logits of 40 tokens to transformers', as a share of their norm; "without": to those of the same
# weights without the setting; figures may differ among processors):
#   Llama, llama3: 0.000
#   Llama, linear: 1.002, without 0.000
#   Llama, yarn: 0.912, without 0.000
#   Mistral, linear: 0.000
#   Mistral, yarn: 0.000
#   Mistral, yarn, attention_factor 1: 0.205, without 0.000
#   Mistral, no window: 0.000
#   Mistral, a window of 8: 1.055, without 0.000
#   Olmo, as it is: 0.262, to root mean squares 0.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 tokenizers==0.23.3 \
    onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0
cd "$folder"
cat > "$folder/run.py" <<'PYTHON'
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))
sizes = dict(vocab_size=300, hidden_size=256, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
linear = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
yarn |= dict(beta_fast=4.0, beta_slow=1.0, truncate=False)
llama3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
llama3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0)


def make(kind, settings):
    """Returns a model of random weights, the same for the same kind."""
    model_class = getattr(transformers, kind + "ForCausalLM")
    model = model_class(getattr(transformers, kind + "Config")(**sizes, **settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.1)
    return model


def build(model, name):
    """Returns the logits (1, 40, 300) of the file that is built from the model's folder."""
    source = os.path.join(sys.argv[1], name)
    model.save_pretrained(source)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    special = dict(unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(source)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*builder, "-i", source, "-o", source + "-onnx"], check=True, stdout=sys.stderr)
    session = onnxruntime.InferenceSession(os.path.join(source + "-onnx", "model.onnx"))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 40), dtype=np.int64)}
    for x in session.get_inputs():
        if x.name.startswith("past"):
            feeds[x.name] = np.zeros((1, 2, 0, 64), dtype=np.float32)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


@torch.no_grad()
def share(logits, model):
    expected = model(input_ids=ids).logits
    return ((logits - expected).norm() / expected.norm()).item()


def root_mean_square(norm, x):
    return F.rms_norm(x, norm.normalized_shape, eps=1e-6)


cases = [
    ("Llama", "llama3", dict(rope_parameters=llama3), None),
    ("Llama", "linear", dict(rope_parameters=linear), {}),
    ("Llama", "yarn", dict(rope_parameters=yarn), {}),
    ("Mistral", "linear", dict(rope_parameters=linear, sliding_window=None), None),
    ("Mistral", "yarn", dict(rope_parameters=yarn, sliding_window=None), None),
    (
        "Mistral",
        "yarn, attention_factor 1",
        dict(rope_parameters=yarn | dict(attention_factor=1.0), sliding_window=None),
        dict(rope_parameters=yarn, sliding_window=None),
    ),
    ("Mistral", "no window", dict(sliding_window=None), None),
    ("Mistral", "a window of 8", dict(sliding_window=8), dict(sliding_window=None)),
    ("Olmo", "as it is", {}, {}),
]
is_as_seen = True
for kind, name, settings, plain in cases:
    model = make(kind, settings)
    logits = build(model, f"{kind}-{name}".replace(" ", "-"))
    off = share(logits, model)
    line = f"{kind}, {name}: {off:.3f}"
    if plain is None:
        is_as_seen &= off < 1e-3
    else:
        if kind == "Olmo":
            OlmoLayerNorm.forward = root_mean_square
        without = share(logits, make(kind, plain))
        line += f", {'to root mean squares' if kind == 'Olmo' else 'without'} {without:.3f}"
        is_as_seen &= off > 0.1 and without < 1e-3
    print(line)
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
