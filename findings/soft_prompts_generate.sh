#!/bin/sh
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: generate() of a language model with a soft prompt
# (PromptTuningConfig) or a prefix (PrefixTuningConfig), greedy, one text, no padding.
# One would guess: it writes what one gets from calling the tuned model again and again for its likeliest next token,
# and use_cache changes the speed only.
# What happens: transformers now hands the cache on as "cache"; peft looks for "past_key_values", finds none, and takes
# each token for the first. With a soft prompt, all of its vectors go in again before each new token, and the text
# leaves the right one; the one warning is that position ids are ignored. A prefix is thrown away, and the
# text is that of the model without it; a FutureWarning says that one of two caches is ignored, not that it is the
# trained one. With use_cache=False the soft prompt's text is right.
# Output seen (16 tokens each):
#   soft prompt: as forward calls False, as the model without it False, without cache as forward calls True
#   prefix: as forward calls False, as the model without it True
#   the model sees of 4 vectors and 4 tokens, then: [8, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
ids = torch.tensor([[5, 6, 7, 8]])
settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)


def generate(model, **others):
    return model.generate(input_ids=ids, **settings, **others)[0].tolist()


def tuned(config):
    """Returns a model with random vectors, its text by forward calls, and the text of the model without the vectors."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    without = generate(model.eval())
    model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    text = ids
    with torch.no_grad():
        for _ in range(16):
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            text = torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return model, text[0].tolist(), without


model, expected, without = tuned(PromptTuningConfig)
slow = generate(model, use_cache=False)
lengths = []
model.base_model.register_forward_pre_hook(
    lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
)
text = generate(model)
soft = (text == expected, text == without, slow == expected)
print("soft prompt: as forward calls {}, as the model without it {}, without cache as forward calls {}".format(*soft))
model, expected, without = tuned(PrefixTuningConfig)
text = generate(model)
prefix = (text == expected, text == without)
print("prefix: as forward calls {}, as the model without it {}".format(*prefix))
print(f"the model sees of 4 vectors and 4 tokens, then: {lengths}")
raise SystemExit((soft, prefix, lengths) != ((False, False, True), (False, True), [8] + 15 * [5]))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
