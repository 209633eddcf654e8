#!/bin/sh
# transformers 5.24.0 with trl 1.16.0 and torch 2.13.0: a Llama whose tokenizer has <eos> for its padding token, as is usual for
# models without one; rows without any padding, where <eos> stands between documents or turns.
# One would guess: pad_token_id matters where rows are padded; a token that the model reads learns, and each run of a script
# trains the same weights as the run before.
# What happens: the first run trains <eos>, and Trainer and SFTTrainer write the tokenizer's pad_token_id into config.json. From
# then on from_pretrained makes nn.Embedding(padding_idx=pad_token_id), which gives that row no gradient, in every place: in the
# second run (or DPO after SFT) the embedding of <eos> stands still. A model that is made from such a config starts with zeros
# there and keeps them: it cannot read <eos> at all. (Llama 2's page says of padding_idx that padding then reads as zeros, and
# recommends it; that <eos> may be meant is not said, nor on the other models' pages or the trainers'.) Qwen, Mistral, Gemma,
# Phi, OLMo, SmolLM3 and OPT are made in this way, GPT-2 and GPT-NeoX are not.
# Output seen (the largest change of an embedding in three steps at 0.01; the figures may differ a little among processors):
#   Trainer, run 1: <eos> 0.0200, a 0.0196, pad_token_id before None, after 0
#   Trainer, run 2: <eos> 0.0000, a 0.0200, pad_token_id before 0, after 0
#   SFTTrainer, run 1: <eos> 0.0200, a 0.0196, pad_token_id before None, after 0
#   SFTTrainer, run 2: <eos> 0.0000, a 0.0200, pad_token_id before 0, after 0
#   made from the config: row of <eos> zero before True, after True
#   rows without gradient: gpt2 False, gpt_neox False, gemma3_text True, mistral True, olmo2 True, qwen3 True, smollm3 True
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

words = {word: id for id, word in enumerate(["<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<eos>", eos_token="<eos>")
ids = [1, 2, 0, 3, 4, 0, 5, 6]
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
settings = dict(max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
trainers = {
    "Trainer": (Trainer, TrainingArguments, {}, [dict(input_ids=ids, labels=ids)] * 8),
    "SFTTrainer": (SFTTrainer, SFTConfig, dict(bf16=False), [dict(input_ids=ids)] * 8),
}


def train(name, model):
    """Returns the largest changes of the embeddings of <eos> and of a in three steps, and saves the model as trainers do."""
    trainer_class, config_class, more, rows = trainers[name]
    folder = os.path.join(sys.argv[1], name)
    before = model.get_input_embeddings().weight.detach().clone()
    arguments = config_class(folder, **settings, **more)
    trainer = trainer_class(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    changes = (model.get_input_embeddings().weight - before).abs().amax(1)
    return *changes[:2].tolist(), folder


is_as_seen = True
for name in trainers:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, eos_token_id=0, bos_token_id=None, **sizes))
    for run in (1, 2):
        pad = model.config.pad_token_id
        eos, a, folder = train(name, model)
        print(f"{name}, run {run}: <eos> {eos:.4f}, a {a:.4f}, pad_token_id before {pad}, after {model.config.pad_token_id}")
        is_as_seen &= (eos > 0.01) == (run == 1) and a > 0.01 and model.config.pad_token_id == 0
        model = AutoModelForCausalLM.from_pretrained(folder)
made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
zeros = [not made.get_input_embeddings().weight[0].any()]
train("SFTTrainer", made)
zeros.append(not made.get_input_embeddings().weight[0].any())
print("made from the config: row of <eos> zero before {}, after {}".format(*zeros))
frozen = {}
for kind in ("gpt2", "gpt_neox", "gemma3_text", "mistral", "olmo2", "qwen3", "smollm3"):
    config = AutoConfig.for_model(kind, vocab_size=9, pad_token_id=0, eos_token_id=0, bos_token_id=0, **sizes)
    embedding = AutoModelForCausalLM.from_config(config).get_input_embeddings()
    embedding(torch.tensor([0, 1])).sum().backward()
    frozen[kind] = not embedding.weight.grad[0].any()
print("rows without gradient: " + ", ".join(f"{kind} {is_frozen}" for kind, is_frozen in frozen.items()))
free = [kind for kind, is_frozen in frozen.items() if not is_frozen]
raise SystemExit(not is_as_seen or zeros != [True, True] or free != ["gpt2", "gpt_neox"])
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(Trainer|SFTTrainer|made|rows)' "$folder/seen"
