#!/bin/sh
# onnxruntime-genai 0.18.0: a folder written by its own model builder from a Llama with a byte-level BPE tokenizer, and
# Tokenizer.encode() of that folder beside transformers 5.24.0 (tokenizers 0.23.3) on the same folder.
# One would guess: both read one tokenizer.json and give the same ids, or the one that cannot do what the file says refuses it.
# What happens: much of the file is left out without a word, and the model is asked in tokens that it was not trained on:
# normalizers, add_prefix_space, use_regex=False (the text is split all the same), and what Split is to do with what it finds.
# The first token of a TemplateProcessing is left out as well, until update_options(add_special_tokens="true"): that is off
# unless set, while transformers' add_special_tokens is on.
# Output seen ("The cat"; where there is a third, it is genai with add_special_tokens):
#   ByteLevel alone: transformers T he Ġcat, genai T he Ġcat
#   TemplateProcessing <s> $A: transformers <s> T he Ġcat, genai T he Ġcat, <s> T he Ġcat
#   Lowercase: transformers the Ġcat, genai T he Ġcat
#   Replace T by t: transformers the Ġcat, genai T he Ġcat
#   add_prefix_space=True: transformers Ġ T he Ġcat, genai T he Ġcat
#   use_regex=False: transformers T heĠ cat, genai T h e Ġ cat
#   Split merged_with_previous: transformers T heĠ cat, genai T h e Ġ cat
#   Split removed: transformers T he cat, genai T he Ġ cat
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 tokenizers==0.23.3 \
    onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0
cd "$folder"
cat > run.py <<'PYTHON'
import subprocess
import sys

import onnxruntime_genai
from tokenizers import Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLAIN = ByteLevel(add_prefix_space=False)
WHOLE = ByteLevel(add_prefix_space=False, use_regex=False)
TEMPLATE = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
kinds = {
    "ByteLevel alone": {},
    "TemplateProcessing <s> $A": {"post_processor": TEMPLATE},
    "Lowercase": {"normalizer": normalizers.Lowercase()},
    "Replace T by t": {"normalizer": normalizers.Replace("T", "t")},
    "add_prefix_space=True": {"pre_tokenizer": ByteLevel(add_prefix_space=True)},
    "use_regex=False": {"pre_tokenizer": WHOLE},
    "Split merged_with_previous": {"pre_tokenizer": Sequence([Split(" ", "merged_with_previous"), WHOLE])},
    "Split removed": {"pre_tokenizer": Sequence([Split(" ", "removed"), PLAIN])},
}


def learn(pre_tokenizer=PLAIN, **parts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    settings = dict(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet())
    texts = 20 * ["the cat the cat sat the cat"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def convert(tokenizer, source, target):
    """Writes a tiny Llama and its tokenizer to source, and what the builder makes of them to target."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    ends = dict(bos_token_id=0, eos_token_id=1)
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*builder, "-i", source, "-o", target], check=True, stdout=sys.stderr)


results = {}
for number, (kind, parts) in enumerate(kinds.items()):
    target = f"genai{number}"
    convert(learn(**parts), f"llama{number}", target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    genai = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(target))
    rows = [tokenizer("The cat").input_ids, genai.encode("The cat").tolist()]
    genai.update_options(add_special_tokens="true")
    rows.append(genai.encode("The cat").tolist())
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in rows]
    results[kind] = texts[: 3 if texts[2] != texts[1] else 2]
    print("{}: transformers {}, genai {}".format(kind, texts[0], ", ".join(results[kind][1:])), flush=True)
expected = {
    "ByteLevel alone": ["T he Ġcat", "T he Ġcat"],
    "TemplateProcessing <s> $A": ["<s> T he Ġcat", "T he Ġcat", "<s> T he Ġcat"],
    "Lowercase": ["the Ġcat", "T he Ġcat"],
    "Replace T by t": ["the Ġcat", "T he Ġcat"],
    "add_prefix_space=True": ["Ġ T he Ġcat", "T he Ġcat"],
    "use_regex=False": ["T heĠ cat", "T h e Ġ cat"],
    "Split merged_with_previous": ["T heĠ cat", "T h e Ġ cat"],
    "Split removed": ["T he cat", "T he Ġ cat"],
}
raise SystemExit(results != expected)
PYTHON
venv/bin/python run.py 2> log || { cat log; exit 1; }
