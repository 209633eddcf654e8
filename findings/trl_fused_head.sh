#!/bin/sh
# trl 1.16.0 with transformers 5.24.0 and torch 2.13.0: SFTTrainer and DPOTrainer of ModernBertDecoderForCausalLM (the class of
# the Ettin decoders), beside transformers' own Trainer and a Llama.
# One would guess: trl learns from the model's logits, as Trainer does, or refuses a model that it cannot score, as it refuses
# LoRA on lm_head.
# What happens: for speed trl no longer calls the model's own forward pass. add_fused_lm_head (trl/trainer/utils.py) takes the
# last hidden state of base_model and multiplies it by get_output_embeddings().weight; what else a head may do is known by a few
# names in the config, as logit_scale and final_logit_softcapping. In a ModernBERT decoder a dense layer, GELU and a norm stand
# between the two. They are left out, without a word, and get no gradient. The loss of a model that has been trained begins
# above that of guessing (ln 62 = 4.13); what then falls is the loss of another model, while the one that is saved, evaluated
# elsewhere and served gets worse. In DPO nothing shows at all: policy and reference lack the same layers, so that the loss
# begins at log 2 and falls as a Llama's does, and rewards/margins grows, while the model itself has learned no preference.
# RecurrentGemma and xLSTM have another name for the cap of their logits, so that it is left out as well, which is little while
# logits are small. (By their sources KTO, GRPO and RLOO call the same function; in the last two the whole model writes what is
# then scored without its head. SFTTrainer with label_smoothing_factor or compute_loss_func is right.)
# Output seen (a Markov chain of entropy 1.1, learned before; 50 steps more on the same text, then 20 steps of DPO; "own" is the
# loss, or beta times the margin, of model(input_ids).logits; figures may differ among processors):
#   Llama: own 1.17
#   Llama, Trainer: loss 1.16, then 1.08; own 1.10
#   Llama, SFTTrainer: loss 1.16, then 1.08; own 1.10
#   Llama, DPOTrainer: loss 0.6931, then 0.24, rewards/margins 1.32; own 1.45
#   RecurrentGemma: own 1.16
#   RecurrentGemma, Trainer: loss 1.10, then 1.08; own 1.09
#   RecurrentGemma, SFTTrainer: loss 1.11, then 1.08; own 1.09
#   ModernBERT decoder: own 1.14
#   ModernBERT decoder, Trainer: loss 1.12, then 1.08; own 1.09
#   ModernBERT decoder, SFTTrainer: loss 9.36, then 2.18; own 2.03
#   ModernBERT decoder, DPOTrainer: loss 0.6931, then 0.28, rewards/margins 1.13; own -0.08
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from transformers import PreTrainedTokenizerFast, RecurrentGemmaConfig, RecurrentGemmaForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

torch.set_num_threads(1)
vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
generator = torch.Generator().manual_seed(0)
followers = torch.randint(2, 64, (64, 3), generator=generator)


def text(count):
    """Returns (count, 32) ids, each but the first drawn of three followers of the one before."""
    columns = [torch.randint(2, 64, (count,), generator=generator)]
    for _ in range(31):
        columns.append(followers[columns[-1], torch.randint(0, 3, (count,), generator=generator)])
    return torch.stack(columns, 1)


def words(ids):
    return "".join(f" w{i}" for i in ids)


ids, test, answers = text(2048), text(64), text(256)
rows = Dataset.from_list([dict(input_ids=row, labels=row) for row in ids.tolist()])
# the rejected answer has the same number of words, each of them 31 further on in the vocabulary
other = torch.cat([answers[:, :16], (answers[:, 16:] - 2 + 31) % 62 + 2], dim=1)
keys = ("prompt", "chosen", "rejected")
parts = zip(answers[:, :16].tolist(), answers[:, 16:].tolist(), other[:, 16:].tolist())
pairs = Dataset.from_list([dict(zip(keys, map(words, part))) for part in parts])
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
kinds = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}),
    "RecurrentGemma": (RecurrentGemmaForCausalLM, RecurrentGemmaConfig, dict(lru_width=64)),
    "ModernBERT decoder": (ModernBertDecoderForCausalLM, ModernBertDecoderConfig, {}),
}
settings = dict(per_device_train_batch_size=16, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True)
settings |= dict(bf16=False, save_strategy="no", disable_tqdm=True)


def make(kind, state=None):
    torch.manual_seed(0)
    model_class, config_class, more = kinds[kind]
    model = model_class(config_class(**sizes, **special, **more))
    if state is not None:
        model.load_state_dict(state)
    return model


@torch.no_grad()
def own_loss(model):
    logits = model.eval()(input_ids=test, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).item()


@torch.no_grad()
def own_margin(model, reference):
    """Returns 0.1 times the mean of what the policy has gained on the chosen answers, less that on the rejected."""
    sums = []
    for batch in (answers, other):
        batch = torch.cat([batch, torch.ones(len(batch), 1, dtype=torch.long)], dim=1)
        scores = [x.eval()(input_ids=batch, use_cache=False).logits[:, 15:-1].log_softmax(-1) for x in (model, reference)]
        picked = [x.gather(-1, batch[:, 16:, None]).sum(1) for x in scores]
        sums.append((picked[0] - picked[1]).mean())
    return 0.1 * (sums[0] - sums[1]).item()


is_as_seen = True
for kind in kinds:
    model = make(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(200):
        batch = ids[torch.randint(0, len(ids), (16,), generator=generator)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    start = own_loss(model)
    print(f"{kind}: own {start:.2f}")
    is_as_seen &= start < 1.3
    is_whole = kind != "ModernBERT decoder"
    more = dict(settings, learning_rate=1e-3, max_steps=50)
    for name in ("Trainer", "SFTTrainer"):
        model = make(kind, state)
        if name == "Trainer":
            trainer = Trainer(model, args=TrainingArguments(sys.argv[1], **more), train_dataset=rows)
        else:
            args = SFTConfig(sys.argv[1], gradient_checkpointing=False, **more)
            trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        end = own_loss(model)
        print(f"{kind}, {name}: loss {losses[0]:.2f}, then {losses[-1]:.2f}; own {end:.2f}")
        is_right = is_whole or name == "Trainer"
        is_as_seen &= losses[0] < 1.3 and end < 1.2 if is_right else losses[0] > 5 and losses[-1] < 4 and end > 1.5
        if not is_right:
            head = {key: x for key, x in model.state_dict().items() if key.startswith("lm_head.")}
            is_as_seen &= len(head) == 2 and all(torch.equal(x, state[key]) for key, x in head.items())
    if kind == "RecurrentGemma":
        continue
    model, reference = make(kind, state), make(kind, state)
    args = DPOConfig(sys.argv[1], gradient_checkpointing=False, learning_rate=3e-4, max_steps=20, **settings)
    trainer = DPOTrainer(model, reference, args, None, pairs, None, tokenizer)
    trainer.train()
    log = [x for x in trainer.state.log_history if "loss" in x]
    losses, margin, own = (log[0]["loss"], log[-1]["loss"]), log[-1]["rewards/margins"], own_margin(model, make(kind, state))
    print(f"{kind}, DPOTrainer: loss {losses[0]:.4f}, then {losses[1]:.2f}, rewards/margins {margin:.2f}; own {own:.2f}")
    is_as_seen &= abs(losses[0] - 0.6931) < 1e-3 and losses[1] < 0.4 and margin > 0.7
    is_as_seen &= own > 0.7 if is_whole else own < 0.2
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
grep -E '^[A-Za-z ]+(, [A-Za-z]+)?: (own|loss)' "$folder/seen"
