#!/bin/sh
# trl 1.16.0 with transformers 5.24.0 and torch 2.13.0: SFTTrainer and transformers' own Trainer tune a mixture of experts
# (Mixtral) with label_smoothing_factor=0.1.
# One would guess: smoothing changes the targets of the cross entropy, as its documentation says, and the balance loss of the
# experts is added as before: SFTConfig's router_aux_loss_coef is "added to the training loss with this weight", for any mixture
# of experts unless it is 0.
# What happens: the balance loss is dropped. With 0, 0.02 and 1.0 all weights are the same, to the last bit; the routers get the
# gradient of the text alone. SFTTrainer computes the balance loss and logs it as aux_loss all the same, but never adds it to
# the loss. Where: SFTTrainer.compute_loss adds weighted_aux_loss in its last branch only, and the one of label_smoother leaves
# it None; Trainer.compute_loss takes the labels out of the inputs, so that the model makes no loss, and LabelSmoother's is then
# the whole, which reads the logits and nothing else. Trainer says nothing; SFTTrainer warns that label_smoothing_factor is
# deprecated and slow (a second forward pass), and has no word of the balance loss.
# Output seen (routers that begin with all tokens at two of four experts; "gradient" is the norm of the routers' in the first
# step at 0, 0.02 and 1.0; "weights" the largest difference of any weight between 0 and 1.0 after 60 steps; "busiest" the share
# of tokens that the busiest expert then gets at 0.02, of which 0.50 is even; figures may differ a little among processors):
#   Trainer, smoothing 0.0: gradient 0.0010, 0.0248, 1.2386; weights 0.142; busiest 0.55; aux_loss in the log none
#   Trainer, smoothing 0.1: gradient 0.0009, 0.0009, 0.0009; weights 0; busiest 0.82; aux_loss in the log none
#   SFTTrainer, smoothing 0.0: gradient 0.0010, 0.0248, 1.2386; weights 0.142; busiest 0.55; aux_loss in the log 3.53
#   SFTTrainer, smoothing 0.1: gradient 0.0009, 0.0009, 0.0009; weights 0; busiest 0.82; aux_loss in the log 3.53
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 trl==1.16.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

torch.set_num_threads(1)
tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
ids = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(0))
rows = Dataset.from_list([dict(input_ids=row, labels=row) for row in ids.tolist()])
settings = dict(per_device_train_batch_size=8, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1)
settings |= dict(report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)


def train(name, coefficient, smoothing, **more):
    """Returns the routers' change, all weights, aux_loss in the log, and the share of the busiest expert."""
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, router_aux_loss_coef=coefficient, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = MixtralForCausalLM(config)
    gates = [p for key, p in model.named_parameters() if key.endswith("gate.weight")]
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.02)
        for p in gates:
            p[:2] += 0.1
    before = torch.cat([p.detach().flatten() for p in gates])
    more |= dict(settings, label_smoothing_factor=smoothing)
    if name == "Trainer":
        trainer = Trainer(model, args=TrainingArguments(sys.argv[1], **more), train_dataset=rows)
    else:
        arguments = SFTConfig(sys.argv[1], router_aux_loss_coef=coefficient, gradient_checkpointing=False, **more)
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    change = torch.cat([p.detach().flatten() for p in gates]) - before
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        logits = model.eval()(ids, output_router_logits=True).router_logits
    share = max(x.topk(2).indices.flatten().bincount(minlength=4).max().item() / x.shape[0] for x in logits)
    return change, weights, trainer.state.log_history[0].get("aux_loss"), share


is_as_seen = True
for name in ("Trainer", "SFTTrainer"):
    for smoothing in (0.0, 0.1):
        first = [train(name, c, smoothing, optim="sgd", learning_rate=0.1, max_steps=1) for c in (0.0, 0.02, 1.0)]
        norms = [(change / 0.1).norm().item() for change, *_ in first]
        last = [train(name, c, smoothing, optim="adamw_torch", learning_rate=1e-3, max_steps=60) for c in (0.0, 0.02, 1.0)]
        difference = (last[2][1] - last[0][1]).abs().max().item()
        share = last[1][3]
        logged = first[2][2]
        print(
            f"{name}, smoothing {smoothing}: gradient {norms[0]:.4f}, {norms[1]:.4f}, {norms[2]:.4f}; weights {difference:.3g}; "
            f"busiest {share:.2f}; aux_loss in the log {'none' if logged is None else format(logged, '.2f')}"
        )
        is_as_seen &= (logged is None) if name == "Trainer" else logged > 3
        if smoothing:
            is_as_seen &= max(norms) < norms[0] * 1.0001 and difference < 1e-6 and share > 0.7
        else:
            is_as_seen &= norms[1] > 5 * norms[0] and norms[2] > 20 * norms[1] and difference > 1e-3 and share < 0.65
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/out" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(Trainer|SFTTrainer)' "$folder/seen"
