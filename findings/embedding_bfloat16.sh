#!/bin/sh
# torch 2.13.0 (2.14.1 is the same), transformers 5.24.0: the gradient of a token embedding in bfloat16 on a processor, as in a
# model that is trained in the dtype of its checkpoint.
# One would guess: a row's gradient is the sum over the places where its token stands, kept in float32 and rounded once, as the
# products keep theirs: every other gradient of this model is right to half a per cent.
# What happens: F.embedding's backward pass adds to the row in bfloat16, place by place. Once the sum is 256 times a term, the
# term is lost, so that frequent tokens (a space, a line break, <eos>) learn the less the larger the batch, and rare ones
# rightly. A sum of ones stays at 256 (in float16 at 2,048). Casting the rows that were looked up to float32 is no remedy;
# F.one_hot(ids) @ weight, or an embedding in float32, is.
# Output seen (a Llama of random weights, tokens by Zipf's law; the error of gradients, relative to the same gradients that
# arrive at the embedding's output, summed in float32; row 0 is the most frequent token's; figures may differ a little among
# processors):
#   16384 ones: 256 in bfloat16, 2048 in float16
#   2048 tokens: embedding 0.02, row 0 0.03 with norm 1.00 of what it is, row 63 0.00, by one_hot 0.00
#   32768 tokens: embedding 0.56, row 0 0.66 with norm 0.36 of what it is, row 63 0.01, by one_hot 0.00
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
sums = []
for dtype in (torch.bfloat16, torch.float16):
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    F.embedding(torch.zeros(16384, dtype=torch.long), weight).sum().backward()
    sums.append(int(weight.grad[0].item()))
print("16384 ones: {} in bfloat16, {} in float16".format(*sums))
is_as_seen = sums == [256, 2048]

sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes)).bfloat16()
embedding = model.model.embed_tokens
share = 1 / torch.arange(1, 65)


def keep_gradient(module, inputs, output):
    output.register_hook(gradients.append)


embedding.register_forward_hook(keep_gradient)
for rows in (16, 256):
    ids = torch.multinomial(share, rows * 128, replacement=True).view(rows, 128)
    gradients = []
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    [arrived] = gradients
    right = torch.zeros(64, 64).index_add_(0, ids.flatten(), arrived.float().flatten(0, 1))
    weight = embedding.weight.detach().requires_grad_()
    (F.one_hot(ids, 64).bfloat16() @ weight).backward(arrived)

    def error(gradient, row=slice(None)):
        return ((gradient[row].float() - right[row]).norm() / right[row].norm()).item()

    gradient = embedding.weight.grad
    whole, first, last, product = error(gradient), error(gradient, 0), error(gradient, 63), error(weight.grad)
    norm = (gradient[0].float().norm() / right[0].norm()).item()
    line = "{} tokens: embedding {:.2f}, row 0 {:.2f} with norm {:.2f} of what it is, row 63 {:.2f}, by one_hot {:.2f}"
    print(line.format(rows * 128, whole, first, norm, last, product))
    is_as_seen &= last < 0.03 and product < 0.01
    is_as_seen &= whole < 0.1 if rows == 16 else whole > 0.3 and norm < 0.6
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
