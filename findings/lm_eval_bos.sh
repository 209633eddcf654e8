#!/bin/sh
# lm-eval 0.4.13 (torch 2.13.0, transformers 5.24.0): bits a byte of a text, by a task of output_type loglikelihood_rolling, as
# wikitext and pile have it. The model gives each of its 16 tokens 1/16, and a token is a byte: 4 bits a byte, whatever is read.
# One would guess: the token that a text begins with is what its first token is predicted from, and no part of the text; a
# tokenizer that puts it there (Llama's, Gemma's) has the figure of one that does not.
# What happens: lm-eval puts bos before the ids itself, as the prefix that nothing predicts. Where the tokenizer has put one
# there already, that one is scored as if it were text, bos after bos, and the rest is read after both. A word's and a byte's
# perplexity are then of one token too many a text; the shorter the texts, the more. add_bos_token=False mends it and, as the
# prefix is there, takes nothing from the model. (Issue 3333 of lm-evaluation-harness, closed, saw it with Gemma.)
# Output seen:
#   16 bytes: bos by the tokenizer 4.25, by add_bos_token=True 4.25, by add_bos_token=False 4.0; a tokenizer without 4.0
#   4 bytes: bos by the tokenizer 5.0, by add_bos_token=True 5.0, by add_bos_token=False 4.0; a tokenizer without 4.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm-eval==0.4.13 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/run.py" <<'PYTHON'
import json

from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS = ["<s>", *"abcdefghijklmno"]
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes))
model.lm_head.weight.data.zero_()


def make_tokenizer(puts_bos):
    """Returns a tokenizer of letters, which begins a text with <s> or does not."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if puts_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


def bits(text, puts_bos, **settings):
    """Returns the bits a byte of a text."""
    with open("texts.jsonl", "w") as file:
        file.write(json.dumps({"text": text}) + "\n")
    task = {
        "task": "bits",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    lm = HFLM(pretrained=model, tokenizer=make_tokenizer(puts_bos), device="cpu", batch_size=1, **settings)
    results = evaluate(lm, {"bits": ConfigurableTask(config=task)}, bootstrap_iters=0)["results"]
    return round(results["bits"]["bits_per_byte,none"], 4)


found = {}
for text in ("abcdefghijklmnoa", "abcd"):
    found[len(text)] = (
        bits(text, True),
        bits(text, True, add_bos_token=True),
        bits(text, True, add_bos_token=False),
        bits(text, False),
    )
    form = "{} bytes: bos by the tokenizer {}, by add_bos_token=True {}, by add_bos_token=False {}; a tokenizer without {}"
    print(form.format(len(text), *found[len(text)]), flush=True)
raise SystemExit(found != {16: (4.25, 4.25, 4.0, 4.0), 4: (5.0, 5.0, 4.0, 4.0)})
PYTHON
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python run.py 2> log || { cat log; exit 1; }
