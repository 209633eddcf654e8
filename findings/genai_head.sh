#!/bin/sh
# onnxruntime-genai 0.18.0 (its model builder, float32, CPU; onnxruntime 1.32.0, onnx 1.23.2) with transformers 5.24.0 and torch
# 2.13.0: the folder of a Llama whose vocabulary is as large as one of its widths, as a model of 256 bytes easily is.
# One would guess: the head is what the model calls lm_head, get_output_embeddings() returns and config.json describes, and sizes
# are the user's affair.
# What happens: the builder takes each Linear with vocab_size outputs for the head, and they come up layer by layer. The first
# of them ends the model: the logits are lm_head's product with what the norm in the middle of the first layer gives, and the
# other layers fill the cache and nothing else. Names, shapes and the head's weights are right, and the file runs; the log says
# "Reading LM head" several times, and there is no warning. Width, the MLP's width and heads (or heads of keys) times head_dim
# count alike. With one token more in the vocabulary all is right.
# Output seen (the difference of logits to transformers', as a share of their norm, which may differ among processors):
#   vocabulary 256, width 128, MLP 512: 0.000, logits from /model/layers.2/final_norm_layernorm/output_0
#   vocabulary 256, width 256, MLP 512: 1.200, logits from /model/layers.0/post_attention_layernorm/output_0
#   vocabulary 256, width 128, MLP 256: 1.158, logits from /model/layers.0/post_attention_layernorm/output_0
#   vocabulary 257, width 256, MLP 512: 0.000, logits from /model/layers.2/final_norm_layernorm/output_0
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
import onnx
import onnxruntime
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))


def build(vocabulary, width, inner):
    """Returns how far the built file is from the model, and what its logits are computed from."""
    settings = dict(num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, **settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.1)
    source = os.path.join(sys.argv[1], f"{vocabulary}-{width}-{inner}")
    model.save_pretrained(source)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(source)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*builder, "-i", source, "-o", source + "-onnx"], check=True, stdout=sys.stderr)
    path = os.path.join(source + "-onnx", "model.onnx")
    [head] = [node for node in onnx.load(path, load_external_data=False).graph.node if "logits" in node.output]
    session = onnxruntime.InferenceSession(path)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 40), dtype=np.int64)}
    for x in session.get_inputs():
        if x.name.startswith("past"):
            feeds[x.name] = np.zeros((1, 4, 0, width // 4), dtype=np.float32)
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    return ((logits - expected).norm() / expected.norm()).item(), head.input[0]


is_as_seen = True
for sizes in ((256, 128, 512), (256, 256, 512), (256, 128, 256), (257, 256, 512)):
    share, source = build(*sizes)
    print("vocabulary {}, width {}, MLP {}: {:.3f}, logits from {}".format(*sizes, share, source))
    if sizes[0] in sizes[1:]:
        is_as_seen &= share > 0.5 and source == "/model/layers.0/post_attention_layernorm/output_0"
    else:
        is_as_seen &= share < 1e-4 and source == "/model/layers.2/final_norm_layernorm/output_0"
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
