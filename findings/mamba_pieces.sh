#!/bin/sh
# transformers 5.24.0 with torch 2.13.0: Mamba, FalconMamba and Jamba that read a text in pieces, each with the cache of the one
# before, as for the next turn of a chat, a prompt that many questions share, or generate(prefill_chunk_size=).
# One would guess: the logits of the text that is read at once, as from Mamba2 and FalconH1; or a
# refusal, as assisted generation refuses models with a state.
# What happens: a piece of one token goes on from the state. A piece of two or more takes the last few inputs of the convolution
# out of the cache and begins the scan at zero: what was read before is forgotten but for these and for Jamba's layers of
# attention, and the state that is kept is the piece's own. generate() is right in one go, since after the prompt it reads
# single tokens. No warning; model and cache take the piece. (A review of transformers' PR 47087 knows that Mamba's first kind
# cannot read pieces.)
# Output seen (random weights; the difference of logits to those of the whole text, as a share of their norm; figures may differ
# among processors):
#   Mamba2ForCausalLM: after 16 tokens 24 at once 0.000, one by one 0.000
#   FalconH1ForCausalLM: after 16 tokens 24 at once 0.000, one by one 0.000
#   MambaForCausalLM: after 16 tokens 24 at once 0.044, one by one 0.000
#   FalconMambaForCausalLM: after 16 tokens 24 at once 0.269, one by one 0.000
#   JambaForCausalLM: after 16 tokens 24 at once 0.292, one by one 0.000
#   JambaForCausalLM.generate(prefill_chunk_size=4): 0.177
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, FalconMambaConfig, FalconMambaForCausalLM, JambaConfig
from transformers import JambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
heads = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
jamba = dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=16)
ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))


def share(y, reference):
    return ((y - reference).norm() / reference.norm()).item()


@torch.no_grad()
def differences(kind, config):
    """Returns how far logits of the last 24 tokens are, read at once or singly after 16, from those of the whole text."""
    torch.manual_seed(0)
    model = kind(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=0.2)
    expected = model(ids).logits[:, 16:]
    results = []
    for width in (24, 1):
        output = model(ids[:, :16], use_cache=True)
        pieces = []
        for start in range(16, 40, width):
            name = "cache" if "cache" in output else "past_key_values"
            output = model(ids[:, start : start + width], use_cache=True, **{name: output[name]})
            pieces.append(output.logits)
        results.append(share(torch.cat(pieces, 1), expected))
    return results, model


cases = [
    (Mamba2ForCausalLM, Mamba2Config(**sizes, num_heads=8, head_dim=8, n_groups=1)),
    (FalconH1ForCausalLM, FalconH1Config(**sizes)),
    (MambaForCausalLM, MambaConfig(**sizes)),
    (FalconMambaForCausalLM, FalconMambaConfig(**sizes)),
    (JambaForCausalLM, JambaConfig(**sizes, **heads, **jamba)),
]
is_as_seen = True
for kind, config in cases:
    (at_once, singly), model = differences(kind, config)
    print(f"{kind.__name__}: after 16 tokens 24 at once {at_once:.3f}, one by one {singly:.3f}")
    is_right = kind in (Mamba2ForCausalLM, FalconH1ForCausalLM)
    is_as_seen &= singly < 1e-4 and (at_once < 1e-4 if is_right else at_once > 5e-3)
settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
whole, parts = (model.generate(ids, prefill_chunk_size=n, **settings).logits[0] for n in (None, 4))
print(f"JambaForCausalLM.generate(prefill_chunk_size=4): {share(parts, whole):.3f}")
is_as_seen &= share(parts, whole) > 5e-3
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
grep ForCausalLM "$folder/seen"
