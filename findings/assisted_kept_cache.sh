#!/bin/sh
# transformers 5.24.0 with torch 2.13.0: generate() of a text whose first part has been read already: the whole text and the cache
# of that part go in, as for a prompt that many texts share or for the next turn of a chat; greedy, with prompt_lookup_num_tokens,
# assistant_model or assistant_early_exit (speculative decoding), which guess tokens that the model then checks.
# One would guess: the text that the same call writes without the cache, and without the guesses: greedy text is to be the same,
# and generate() cuts off what the cache has.
# What happens: it does so in _prefill(), which _assisted_decoding() never calls. That one's first round hands over all ids
# (next_sequence_length=None), and the model reads the whole text behind the part that it has in the cache: two copies of the
# beginning, each in its right position. The text is another, whether the guesses are good or not, and the cache is left with both
# copies for the next turn. No warning. With a window shorter than the new part (Mistral) the first copy is out of sight, and the
# text is right. So it is if only the new ids go in, beside a mask of the whole text.
# Output seen (60 tokens, 50 of them in the cache; how many of 20 new tokens are as written without a cache, and the length that
# the cache should have at the end, and has; random weights, so that the counts of wrong texts may differ among processors):
#   Llama, plain: 20, length 79, 79; new ids alone: 20, length 79, 79
#   Llama, prompt lookup: 0, length 79, 129; new ids alone: 20, length 79, 79
#   Llama, assistant: 0, length 79, 129; new ids alone: 20, length 79, 79
#   Llama, early exit: 0, length 79, 129; new ids alone: 20, length 79, 79
#   Qwen3, plain: 20, length 79, 79; new ids alone: 20, length 79, 79
#   Qwen3, prompt lookup: 1, length 79, 129; new ids alone: 20, length 79, 79
#   Qwen3, assistant: 1, length 79, 129; new ids alone: 20, length 79, 79
#   Mistral, window 8, plain: 20, length 79, 79; new ids alone: 20, length 79, 79
#   Mistral, window 8, prompt lookup: 20, length 79, 129; new ids alone: 20, length 79, 79
#   Mistral, window 8, assistant: 20, length 79, 129; new ids alone: 20, length 79, 79
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import copy

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM

ids = torch.randint(2, 96, (1, 60), generator=torch.Generator().manual_seed(1))
tokens = dict(vocab_size=96, eos_token_id=None, bos_token_id=None, initializer_range=0.2)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
models = [
    ("Llama", LlamaForCausalLM, LlamaConfig(**tokens, **sizes)),
    ("Qwen3", Qwen3ForCausalLM, Qwen3Config(**tokens, **sizes, head_dim=16)),
    ("Mistral, window 8", MistralForCausalLM, MistralConfig(**tokens, **sizes, sliding_window=8)),
]
is_as_seen = True
for name, kind, config in models:
    torch.manual_seed(0)
    model = kind(config).eval()
    assistant = copy.deepcopy(model)
    ways = [
        ("plain", {}),
        ("prompt lookup", dict(prompt_lookup_num_tokens=4)),
        ("assistant", dict(assistant_model=assistant)),
    ]
    if name == "Llama":
        ways.append(("early exit", dict(assistant_early_exit=2)))
    read = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :50], cache=read)

    def write(text, mask=torch.ones_like(ids), **settings):
        return model.generate(text, attention_mask=mask, max_new_tokens=20, do_sample=False, **settings)[:, -20:]

    right = write(ids)
    for way, settings in ways:
        if not torch.equal(write(ids, **settings), right):
            raise SystemExit(f"{name}, {way}: another text without a cache")
        parts = []
        for text in (ids, ids[:, 50:]):
            cache = copy.deepcopy(read)
            equal = (write(text, cache=cache, **settings) == right).sum().item()
            parts.append((equal, cache.get_seq_length()))
        (whole, length), (new, new_length) = parts
        print(f"{name}, {way}: {whole}, length 79, {length}; new ids alone: {new}, length 79, {new_length}")
        is_assisted = way != "plain"
        is_as_seen &= new == 20 and new_length == 79 and length == (129 if is_assisted else 79)
        is_as_seen &= (whole < 20) if is_assisted and "window" not in name else whole == 20
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
