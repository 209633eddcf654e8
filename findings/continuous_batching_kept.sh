#!/bin/sh
# transformers 5.24.0 with torch 2.13.0: model.generate_batch(prompts, generation_config, continuous_batching_config,
# persistent_manager=True), whose manager is kept for the next call, as in a loop of rollouts and evaluations.
# One would guess: what is kept is what is dear to make (the pages of the cache, graphs); each call is answered by its own
# generation_config and by the weights as they are. "whether to persist the manager after the generation is finished", says the
# docstring; the one warning is that the manager was sized for the first call's workload.
# What happens: init_continuous_batching returns the kept manager before it looks at either config, with a word at INFO alone.
#   Whether and how to sample, eos_token_id and return_logprobs are the first call's for good, also in a call with
#   persistent_manager=False: an evaluation that asks for greedy text is sampled as the rollouts were.
#   The manager keeps the keys and values of whole pages (256 tokens) of old prompts and finds them by their ids. A prompt that
#   comes again after a step of training is read by the old weights and answered by the new ones, a model that does not exist.
#   Shorter prompts are right, so that a short test says nothing.
# destroy_cached_continuous_batching_manager() before the call mends both. (vLLM and others have a call that empties this cache,
# for use after each change of the weights. By its source, trl 1.16.0's GRPOTrainer makes a new manager for each batch.)
# Output seen (of 8 prompts, how many get the text of generate(), greedy, one prompt at a time, by the weights of the moment):
#   greedy 8; the next call, which is to sample at a temperature of 10: 8
#   the next call's eos_token_id is the fourth token: 12 tokens of 12; the next one's return_logprobs=True: 0 log-probabilities
#   a new manager, to sample: 0; the next call, which is to be greedy: 0; the same with persistent_manager=False: 0
#   200 tokens: 8, after a change of the weights 8, by a new manager 8
#   300 tokens: 8, after a change of the weights 0, by a new manager 8
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cd "$folder"
cat > "$folder/run.py" <<'PYTHON'
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)).eval()
matrices = [p for p in model.parameters() if p.dim() > 1]
with torch.no_grad():
    for p in matrices:
        p.normal_(std=0.1)
greedy = dict(do_sample=False, max_new_tokens=12, eos_token_id=63, pad_token_id=0)
sampled = greedy | dict(do_sample=True, temperature=10.0, top_k=0)


def prompts(length):
    return torch.randint(3, 63, (8, length), generator=torch.Generator().manual_seed(1)).tolist()


def by_batch(texts, settings, is_kept=True, **config):
    config = ContinuousBatchingConfig(num_blocks=64, **config)
    outputs = model.generate_batch(texts, GenerationConfig(**settings), config, persistent_manager=is_kept)
    return list(outputs.values())


def right(texts, outputs):
    """Returns how many of the outputs are the tokens that generate() gives, one text at a time, greedily."""
    count = 0
    for text, output in zip(texts, outputs):
        ids = model.generate(torch.tensor([text]), generation_config=GenerationConfig(**greedy))
        count += ids[0, len(text) :].tolist() == output.generated_tokens
    return count


def forget():
    model.destroy_cached_continuous_batching_manager()


texts = prompts(20)
first = right(texts, by_batch(texts, greedy))
second = right(texts, by_batch(texts, sampled))
print(f"greedy {first}; the next call, which is to sample at a temperature of 10: {second}")
is_as_seen = first >= 7 and second == first

end = by_batch(texts[:1], greedy)[0].generated_tokens[3]
tokens = len(by_batch(texts[:1], greedy | dict(eos_token_id=end))[0].generated_tokens)
logprobs = len(by_batch(texts[:1], greedy, return_logprobs=True)[0].logprobs)
forget()
print(
    f"the next call's eos_token_id is the fourth token: {tokens} tokens of 12; "
    f"the next one's return_logprobs=True: {logprobs} log-probabilities"
)
is_as_seen &= tokens == 12 and logprobs == 0

first = right(texts, by_batch(texts, sampled))
second = right(texts, by_batch(texts, greedy))
third = right(texts, by_batch(texts, greedy, is_kept=False))
forget()
print(
    f"a new manager, to sample: {first}; the next call, which is to be greedy: {second}; "
    f"the same with persistent_manager=False: {third}"
)
is_as_seen &= first == second == third == 0

for length in (200, 300):
    texts = prompts(length)
    before = right(texts, by_batch(texts, greedy))
    with torch.no_grad():
        for p in matrices:
            p.add_(torch.randn_like(p), alpha=0.05)
    after = right(texts, by_batch(texts, greedy))
    forget()
    new = right(texts, by_batch(texts, greedy))
    forget()
    print(f"{length} tokens: {before}, after a change of the weights {after}, by a new manager {new}")
    is_as_seen &= min(before, new) >= 7 and (after >= 7 if length < 256 else after <= 1)
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
