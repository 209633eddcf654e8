#!/bin/sh
# transformers 5.24.0 with torch 2.13.0: generate(guidance_scale=1.5), classifier-free guidance: each step takes the model's
# log-probabilities with the prompt further away from those without it; here with beams, and with guesses that the model checks
# (prompt_lookup_num_tokens, assistant_model).
# One would guess: the text that the formula gives in each of these searches, as in greedy search and sampling, and that
# sequences_scores is the guided score of the text beside it; guesses change the speed only.
# What happens: UnbatchedClassifierFreeGuidanceLogitsProcessor reads the text without its prompt itself, in its own cache, and
# adds the last token of each row at each call. Beam search puts its rows in another order and reorders its own cache only: from
# then on a beam is guided by what the model says of other beams' text, glued to its own last token. Scores and choice are
# wrong, and the text that wins may be worse than the greedy one. Guesses that were not accepted stay in that cache as well, so
# that greedy text is another one. There is no warning (but for an assistant, that the processor was handed to it and made by
# it, too). use_cache=False keeps ids in place of the cache and is wrong in the same way. (negative_prompt_ids of one row are
# refused with beams; repeated for each beam they are taken, and it is no better.)
# Output seen (how many of 20 tokens are those of the same call with a processor that reads each row anew; the mean guided score
# of a token, read anew, of this text and of that one; with beams, what sequences_scores says of this one; random weights,
# figures may differ among processors):
#   Llama, greedy: 20 of 20, score 0.41 and 0.41
#   Llama, sampled: 20 of 20, score -1.31 and -1.31
#   Llama, 4 beams: 6 of 20, score -0.29 and 0.38, said 0.68
#   Llama, 4 beams without cache: 6 of 20, score -0.29 and 0.38, said 0.68
#   Llama, prompt lookup: 16 of 20, score 0.36 and 0.41
#   Llama, assistant: 8 of 20, score 0.14 and 0.41
#   GPT-2, greedy: 20 of 20, score 0.31 and 0.31
#   GPT-2, sampled: 20 of 20, score 0.18 and 0.18
#   GPT-2, 4 beams: 3 of 20, score 0.42 and 1.64, said 1.16
#   GPT-2, 4 beams without cache: 3 of 20, score 0.42 and 1.64, said 1.16
#   GPT-2, prompt lookup: 3 of 20, score 0.70 and 0.31
#   GPT-2, assistant: 1 of 20, score 0.60 and 0.31
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LogitsProcessor

SCALE = 1.5
ids = torch.randint(2, 96, (1, 20), generator=torch.Generator().manual_seed(1))
tokens = dict(vocab_size=96, eos_token_id=None, bos_token_id=None)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
small = dict(n_embd=64, n_layer=4, n_head=4)
models = [
    ("Llama", LlamaForCausalLM, LlamaConfig(**tokens, **sizes, initializer_range=0.2)),
    ("GPT-2", GPT2LMHeadModel, GPT2Config(**tokens, **small, initializer_range=0.3)),
]


def guided(scores, without):
    return SCALE * (scores.log_softmax(-1) - without.log_softmax(-1)) + without.log_softmax(-1)


class Anew(LogitsProcessor):
    """Guides by the same formula; reads each row without its prompt (but for the prompt's last token) at each call."""

    def __init__(self, model):
        self.model = model

    def __call__(self, rows, scores):
        return guided(scores, self.model(rows[:, 19:]).logits[:, -1])


def mean_score(model, row):
    scores = guided(model(row).logits[0, 19:-1], model(row[:, 19:]).logits[0, :-1])
    return scores.gather(1, row[0, 20:, None]).mean().item()


def write(model, **settings):
    torch.manual_seed(1)
    settings = {"do_sample": False, "max_new_tokens": 20, "output_scores": True} | settings
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings)


@torch.no_grad()
def compare(model, **settings):
    """Returns how many tokens are equal, the true score of both texts, and the score that generate() gives its own."""
    ours = write(model, guidance_scale=SCALE, **settings)
    right = write(model, logits_processor=[Anew(model)], **settings)
    equal = (ours.sequences == right.sequences)[:, 20:].sum().item()
    said = None
    if "num_beams" in settings:
        said = ours.sequences_scores.item()
        if abs(right.sequences_scores.item() - mean_score(model, right.sequences)) > 0.01:
            raise SystemExit("the scores that are read anew are not those of beam search")
    return equal, mean_score(model, ours.sequences), mean_score(model, right.sequences), said


is_as_seen = True
for name, kind, config in models:
    torch.manual_seed(0)
    model = kind(config).eval()
    ways = [
        ("greedy", {}),
        ("sampled", dict(do_sample=True)),
        ("4 beams", dict(num_beams=4)),
        ("4 beams without cache", dict(num_beams=4, use_cache=False)),
        ("prompt lookup", dict(prompt_lookup_num_tokens=4)),
        ("assistant", dict(assistant_model=copy.deepcopy(model))),
    ]
    for way, settings in ways:
        equal, ours, right, said = compare(model, **settings)
        line = f"{name}, {way}: {equal} of 20, score {ours:.2f} and {right:.2f}"
        print(line if said is None else f"{line}, said {said:.2f}")
        if way in ("greedy", "sampled"):
            is_as_seen &= equal == 20
        else:
            is_as_seen &= equal < 20
        if said is not None:
            is_as_seen &= abs(said - ours) > 0.1 and ours < right
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
