#!/bin/sh
# transformers 5.24.0 with schedulefree 1.4.1, accelerate 1.15.0 and torch 2.13.0: Trainer with optim="schedule_free_adamw" and
# lr_scheduler_type="constant", which the documentation recommends for it, and warmup_steps=0.03.
# One would guess: the first 3 steps of 100 are a warm-up, as with warmup_steps=3 and with AdamW; "a float in range [0, 1)" is a
# "ratio of total training steps" by the docstring, and has been the only ratio since warmup_ratio is gone. And what save_model
# writes after train() is the model that evaluate() measures.
# What happens: _get_schedule_free_optimizer hands warmup_steps on as it stands, where all else asks get_warmup_steps(). The
# optimizer multiplies the rate by (step + 1) / warmup_steps while step < warmup_steps: in the first step by 1 / 0.03, in the
# others by 1. In place of a warm-up there is one step at 33 times the rate, with moments of one batch, and the model that
# is tuned is wrecked. The learning rate in the log is the scheduler's, without that. "schedule_free_sgd" does the same.
# And such an optimizer trains other weights (y) than it is meant to give (x); eval() and train() of the optimizer change the one
# into the other. schedulefree asks for eval() before saving. Trainer calls it before evaluation alone, so that checkpoints
# and save_model() have y or x by whether an evaluation went before them.
# Output seen (a tiny Llama, trained with AdamW and then tuned for 100 steps at 0.005 on other text; the change is the largest of a
# weight of the head in the first step, as a share of the rate; figures may differ among processors):
#   before: loss 2.70
#   adamw_torch, warmup_steps 0.03: first change 0.0, loss after it 2.70, at the end 2.69; saved before 2.687, after 2.687
#   schedule_free_adamw, warmup_steps 3: first change 0.3, loss after it 2.69, at the end 2.61; saved before 2.623, after 2.611
#   schedule_free_adamw, warmup_steps 0.03: first change 33.3, loss after it 7.30, at the end 3.40; saved before 3.359, after 3.400
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 accelerate==1.15.0 schedulefree==1.4.1
cat > "$folder/run.py" <<'PYTHON'
import copy
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

torch.set_num_threads(1)
folder = sys.argv[1]
generator = torch.Generator().manual_seed(0)
old = 2 * torch.randn(64, 64, generator=generator)
new = old + 0.7 * torch.randn(64, 64, generator=generator)


def make_rows(scores, n):
    """Returns n rows of 32 tokens, each drawn by the scores (64, 64) of the token before it."""
    ids = torch.randint(0, 64, (n, 1), generator=generator)
    for _ in range(31):
        following = torch.multinomial(scores[ids[:, -1]].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, following], 1)
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


rows_old, rows_new, rows_eval = make_rows(old, 4000), make_rows(new, 400), make_rows(new, 256)
ids = torch.tensor([row["input_ids"] for row in rows_eval])


@torch.no_grad()
def measure(model):
    return model.eval()(input_ids=ids, labels=ids).loss.item()


class FirstStep(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weight = model.lm_head.weight.detach().clone()

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.change = (model.lm_head.weight - self.weight).abs().max().item() / args.learning_rate
            self.loss = measure(model)


def train(model, rows, **settings):
    first = FirstStep()
    args = TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", **settings
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows_eval, callbacks=[first])
    trainer.train()
    return trainer, first


def saved(trainer):
    trainer.save_model(folder)
    return measure(LlamaForCausalLM.from_pretrained(folder))


torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**sizes))
train(base, rows_old, learning_rate=3e-3, max_steps=250, per_device_train_batch_size=16)
seen = [f"before: loss {measure(base):.2f}"]
results = {}
for optim, schedule, warmup in (
    ("adamw_torch", "constant_with_warmup", 0.03),
    ("schedule_free_adamw", "constant", 3),
    ("schedule_free_adamw", "constant", 0.03),
):
    settings = dict(optim=optim, lr_scheduler_type=schedule, warmup_steps=warmup, learning_rate=5e-3)
    trainer, first = train(copy.deepcopy(base), rows_new, max_steps=100, per_device_train_batch_size=4, **settings)
    before = saved(trainer)
    end = trainer.evaluate()["eval_loss"]
    after = saved(trainer)
    results[optim, warmup] = (first.change, first.loss, end, before, after)
    seen.append(
        f"{optim}, warmup_steps {warmup}: first change {first.change:.1f}, loss after it {first.loss:.2f}, "
        f"at the end {end:.2f}; saved before {before:.3f}, after {after:.3f}"
    )
print("", *seen, sep="\nSEEN ")
plain, whole, share = results.values()
is_as_seen = plain[0] == 0 and abs(whole[0] - 1 / 3) < 0.01 and abs(share[0] - 1 / 0.03) < 0.1
is_as_seen &= max(plain[1], whole[1]) < 3 and share[1] > 4 and share[2] > whole[2] + 0.3
is_as_seen &= abs(plain[3] - plain[4]) < 1e-4
is_as_seen &= all(abs(y[3] - y[4]) > 0.003 and abs(y[2] - y[4]) < 1e-3 for y in (whole, share))
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
sed -n 's/^SEEN //p' "$folder/log"
