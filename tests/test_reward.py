"""Reward models: the loss beside its definition, text judged as it was in training, resuming to the bit."""

import copy
import math
import random
import shutil

import pytest
import torch
from scripts import call
from test_chat import SYSTEM, instruct
from test_dpo import ANSWERS, moved, shop  # shop is a fixture
from test_finetune import TINY, adapter, chat, one_and_two
from test_hf import smollm
from test_ppo import REWARDED
from test_ppo import shop as letters  # a fixture
from test_prepare import write_rows
from test_processes import run_together
from test_train import lab, log, same  # lab is a fixture

import eval as evaluation
import finetune_dpo
import finetune_lora
import finetune_ppo
import finetune_reward
import hf
import reward_model
import sample
import train
from config import Refusal, configure
from tokenizer import EOT
from tuning import open_tuning

ANSWERED = {"chosen": "The cat sat.", "rejected": "No"}


def rate(shop, *argv):
    call(finetune_reward, *TINY, "--init_from=base", "--dataset=pairs.jsonl", *argv, folder=shop)


@pytest.fixture(scope="module")
def judge(shop):
    """The folder of a reward model that has learned the pairs."""
    rate(shop, "--max_iters=40", "--eval_interval=40", "--out_dir=judge")
    return shop / "judge"


def test_the_loss_and_its_gradient_are_those_of_the_definition(shop):
    argv = [
        *TINY,
        f"--init_from={shop}/base",
        f"--dataset={shop}/pairs.jsonl",
        f"--out_dir={shop}/there",
    ]
    tuning = open_tuning(configure(finetune_reward.Config, argv), finetune_reward.KIND)
    task = finetune_reward.Rewarding(tuning)
    task.trained = tuning.prepare(task.length)
    task.begin()
    model = tuning.model
    packs = task.packs[:4]
    assert task.loss(model, task.make_batch(packs)).item() == pytest.approx(
        0.693147 * sum(map(len, packs)) / 2, rel=1e-5
    )
    moved(model)
    exact = copy.deepcopy(model).double()
    loss = task.loss(model, task.make_batch(packs))
    loss.backward()
    numbers = [number for pack in packs for number in pack]
    expected = 0.0
    for chosen, rejected in zip(numbers[::2], numbers[1::2]):
        values = []
        for number in (chosen, rejected):
            idx = torch.from_numpy(task.examples[number][0])[None]
            values.append(exact.reward_head(exact.hidden(idx)[0, -1]))
        expected = expected - torch.log(1 / (1 + torch.exp(values[1] - values[0])))
    expected.sum().backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.count(task.make_batch(packs)) == len(numbers) // 2
    grads = dict(exact.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), grads[name].grad, rtol=1e-3, atol=2e-5)


def test_a_number_keeps_its_bits_under_autocast():
    torch.manual_seed(0)
    head, states = torch.nn.Linear(64, 1), torch.randn(5, 7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        numbers = reward_model.read_head(head, states)
    exact = (states.double() * head.weight.double()).sum(-1) + head.bias.double()
    torch.testing.assert_close(numbers, exact.float(), rtol=0, atol=1e-6)


def test_text_is_judged_as_it_was_in_training(shop, judge, monkeypatch):
    monkeypatch.chdir(shop)
    *_, last = [line for line in log(shop, "judge") if "accuracy" in line]
    assert last["accuracy"] == 1 and last["val_loss"] < 0.3
    argv = [*TINY, "--init_from=resume", "--out_dir=judge", "--dataset=pairs.jsonl", "--eval_only"]
    tuning = open_tuning(configure(finetune_reward.Config, argv), finetune_reward.KIND)
    task = finetune_reward.Rewarding(tuning)
    task.trained = tuning.prepare(task.length)
    task.begin()
    score = reward_model.load_reward(str(judge))
    batch = task.make_batch(task.packs)
    values = reward_model.rewards(tuning.model.eval(), batch).tolist()
    order = [number for pack in task.packs for number in pack]
    texts = {}
    for number in order:
        idx, targets = task.examples[number]
        first = int((targets != -100).argmax()) + 1
        tokenizer = tuning.tokenizer
        prompt = tokenizer.decode(idx[1:first].tolist()).removesuffix("\n")
        texts[number] = prompt, tokenizer.decode(idx[first:].tolist())
    assert set(texts.values()) <= {
        (row["prompt"], row[side]) for row in ANSWERS for side in ("chosen", "rejected")
    }
    for number, value in zip(order, values):
        assert score(*texts[number]) == pytest.approx(value, abs=1e-5)


def test_conversations_are_judged_as_in_training(shop, tmp_path):
    """By the template of a model, which writes a new line after what ends an answer."""
    template = SYSTEM.replace("<s>", "<|im_start|>").replace("</s>", EOT)
    instruct(tmp_path / "instruct", smollm, template)
    turns = [("user", "a cat?"), ("assistant", "Yes."), ("user", "sat?")]
    sides = {side: chat(*turns, ("assistant", text)) for side, text in ANSWERED.items()}
    write_rows(tmp_path / "pairs.jsonl", [{side: row["messages"] for side, row in sides.items()}] * 4)
    argv = [*TINY, f"--init_from=hf:{tmp_path}/instruct", f"--dataset={tmp_path}/pairs.jsonl"]
    argv += ["--max_iters=4", "--eval_interval=4", f"--out_dir={tmp_path}/judge"]
    call(finetune_reward, *argv, folder=shop)
    *_, last = [line for line in log(tmp_path, "judge") if "accuracy" in line]
    score = reward_model.load_reward(str(tmp_path / "judge"))
    prompt = chat(*turns)["messages"]
    for side, text in ANSWERED.items():
        assert score(prompt, text) == pytest.approx(last[f"reward_{side}"], abs=1e-4)
    assert score(prompt, ANSWERED["chosen"]) - score(prompt, ANSWERED["rejected"]) > 0.01
    # the context may be full: a digit is a token
    with pytest.raises(ValueError, match="tokens do not fit in the reward model's block_size=256") as e:
        score(prompt, "7" * 300)
    n = 300 - (int(str(e.value).split()[0]) - 256)
    assert math.isfinite(score(prompt, "7" * n))
    with pytest.raises(ValueError, match="^257 tokens do not fit"):
        score(prompt, "7" * (n + 1))


def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(shop):
    argv = ["--lora_dropout=0.2", "--gradient_accumulation_steps=2"]
    rate(shop, *argv, "--out_dir=r-whole")
    rate(shop, *argv, "--out_dir=r-parts", "--max_iters=4", "--lr_decay_iters=8")
    call(finetune_reward, "--out_dir=r-parts", "--init_from=resume", "--max_iters=8", folder=shop)
    whole, parts = adapter(shop, "r-whole"), adapter(shop, "r-parts")
    for key in "adapters", "optimizers", "val_loss", "best_val_loss", "step":
        assert same(whole[key], parts[key]), key
    assert whole["config"]["reward_head"] == parts["config"]["reward_head"]
    assert log(shop, "r-whole") == log(shop, "r-parts")


def test_two_processes_are_one(shop):
    one, two = one_and_two(shop, finetune_reward, "--dataset=pairs.jsonl")
    assert one["config"]["reward_head"] == two["config"]["reward_head"]


def test_what_it_judges_is_learned(shop, letters):
    """That words shall have no e: by a model of another folder, whose texts end."""
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        chosen, rejected = ("".join(rng.choices(alphabet, k=4)) for alphabet in ("abcd", "abee"))
        rows.append({"prompt": rng.choice("abcde"), "chosen": chosen, "rejected": rejected})
    write_rows(shop / "words.jsonl", rows)
    length = "--max_iters=60", "--eval_interval=60"
    rate(shop, "--dataset=words.jsonl", "--template={prompt}", *length, "--out_dir=words")
    argv = [
        *TINY,
        *REWARDED,
        f"--init_from={letters}/base",
        f"--dataset={letters}/prompts.jsonl",
        f"--val_dataset={letters}/held.jsonl",
        "--reward=words",
        "--batch_size=5",
        "--group=16",
        "--learning_rate=2e-3",
        "--kl=0.05",
        "--max_iters=40",
        "--eval_interval=40",
    ]
    call(finetune_ppo, *argv, "--out_dir=judged", folder=shop)
    first, last = (line for line in log(shop, "judged") if "reward" in line)
    assert last["cut_off"] < 0.5
    assert last["reward"] > first["reward"] + 0.1  # 0.3 to 1.2 more, by seven seeds of the base


@pytest.mark.slow
def test_a_run_keeps_its_reward_model(shop, letters, judge):
    """By what it computes: its folder may hold another one by then."""
    shutil.copytree(judge, shop / "passing")
    prompts = f"--dataset={letters}/prompts.jsonl", f"--val_dataset={letters}/held.jsonl"
    argv = [*TINY, *REWARDED, *prompts, "--reward=passing", "--eval_interval=1"]
    call(
        finetune_ppo,
        *argv,
        f"--init_from={letters}/base",
        "--out_dir=kept",
        "--max_iters=1",
        folder=shop,
    )
    resume = "--init_from=resume", "--out_dir=kept"
    call(finetune_ppo, *resume, "--max_iters=2", folder=shop)
    rate(shop, "--max_iters=1", "--out_dir=passing", "--overwrite")
    with pytest.raises(Refusal, match="passing is another one than when kept/adapter.pt was begun"):
        call(finetune_ppo, *resume, "--max_iters=3", folder=shop)


@pytest.mark.parametrize(
    "script, argv, message",
    [
        (
            sample,
            ["--adapter=judge"],
            "judge/adapter_best.pt is a reward model, which judges text and writes none",
        ),
        (evaluation, ["--out_dir=judge"], "is a reward model, which judges text"),
        (sample, ["--out_dir=judge"], "is a reward model, which judges text"),
        (finetune_dpo, ["--init_from=judge", "--out_dir=there"], "is a reward model, which judges text"),
        (sample, ["--out_dir=base", "--draft=judge"], "is a reward model, which judges text"),
        (hf, ["--adapter=judge", "--to=there"], "is a reward model"),
        (finetune_lora, ["--out_dir=judge", "--merge"], "is a reward model"),
        (finetune_dpo, ["--out_dir=judge", "--init_from=resume"], "is a reward model, which judges"),
        (finetune_reward, ["--init_from=base", "--rank=0"], "rank must be at least 1"),
        (finetune_reward, ["--init_from=base", "--start=a", "--out_dir=there"], "leave it out"),
        (
            finetune_ppo,
            ["--init_from=base", "--eval_tokens=9", "--out_dir=there"],
            "samples 200 held-out prompts: leave eval_tokens out",
        ),
        (
            finetune_ppo,
            ["--init_from=base", "--dataset=pairs.jsonl", "--reward=base", "--out_dir=there"],
            "no reward model",
        ),
        (
            finetune_ppo,
            ["--init_from=base", "--reward=judge", "--out_dir=judge", "--overwrite"],
            "the reward model is in judge: give another --out_dir",
        ),
    ],
)
def test_mistakes_are_one_line(shop, judge, script, argv, message):
    with pytest.raises(Refusal) as refusal:
        call(script, *argv, folder=shop)
    assert message in str(refusal.value) and not (shop / "there").exists()
