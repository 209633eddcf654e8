#!/bin/sh
# transformers 5.24.0, tokenizers 0.23.3: AutoTokenizer on a folder whose tokenizer_config.json has add_bos_token.
# One would guess: "add_bos_token": true puts bos_token before a text and false does not, as the key's name says and as
# version 4's Llama tokenizer did it.
# What happens: nothing. The post_processor of tokenizer.json alone decides, for LlamaTokenizer, PreTrainedTokenizerFast
# and no class named, without a word.
# Output seen: "true without a processor: [5]; false with one: [0, 5]"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/run.py" <<'PYTHON'
import json
import os
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer


def encode(add_bos_token, post_processor, tokenizer_class):
    vocab = {"<s>": 0, "</s>": 1, "b": 2, "c": 3, "d": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, "b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos_token}
    if tokenizer_class:
        settings["tokenizer_class"] = tokenizer_class
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(os.path.join(folder, "tokenizer.json"))
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump(settings, f)
        return AutoTokenizer.from_pretrained(folder)("a").input_ids


results = []
for name in (None, "PreTrainedTokenizerFast", "LlamaTokenizer"):
    results.append((encode(True, False, name), encode(False, True, name)))
print("true without a processor: {}; false with one: {}".format(*results[0]))
raise SystemExit(results != [([5], [0, 5])] * 3)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
