"""Preferences: rows, the loss beside its definition and TRL's, the reference, resuming to the bit."""

import copy
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from scripts import call, printed
from test_finetune import BYTES, TINY, chat, check_gradients, one_and_two, spelled
from test_prepare import hub, write_rows  # hub is a fixture
from test_processes import run_together
from test_train import SMALL, lab, log, same  # lab is a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint_file
import finetune_dpo as dpo
import finetune_lora
import hf
import rows
import toy_stories
import train
from chat import Turn
from config import Refusal, configure
from messages import preferences
from tuning import open_tuning

ANSWERS = [
    {"prompt": f"Is {a} {b}?", "chosen": f" {b.capitalize()}, yes.", "rejected": " No, never."}
    for a in ("Tom", "Lily", "the fox", "the hare")
    for b in ("sad", "glad", "brave", "slow", "small")
]


@pytest.fixture(scope="module")
def shop(lab):
    """A folder with data/toy, a tiny model in base, and pairs.jsonl."""
    call(train, *SMALL, "--max_iters=1", "--block_size=48", "--out_dir=base", folder=lab)
    write_rows(lab / "pairs.jsonl", ANSWERS)
    return lab


def prefer(shop, *argv):
    call(dpo, *TINY, "--init_from=base", "--dataset=pairs.jsonl", *argv, folder=shop)


# Rows


def sides(row):
    """Returns (what is read, what is learned) of the chosen and the rejected answer of a row, spelled."""
    result = []
    [pair] = preferences([("r.jsonl line 1", row)])
    for conversation in pair:
        idx, targets = rows.example(*rows.encode(conversation, BYTES, "Q{prompt}A"))
        result.append((spelled(idx), spelled(targets)))
    return result


SAME = [("$QabAcd", "____cd$"), ("$QabAe", "____e$")]
TWO_TURNS = [("$QaAbc$QdAe", "_______e$"), ("$QaAbc$QdAfg", "_______fg$")]
START = [("user", "a"), ("assistant", "bc"), ("user", "d")]


def messages(*turns):
    return chat(*turns)["messages"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "ab", "chosen": "cd", "rejected": "e"}, SAME),
        ({"instruction": "ab", "input": "", "output": "x", "chosen": "cd", "rejected": "e"}, SAME),
        (
            {
                "prompt": messages(("user", "ab")),
                "chosen": messages(("assistant", "cd")),
                "rejected": messages(("assistant", "e")),
            },
            SAME,
        ),
        (
            {
                "prompt": "ab",
                "chosen": messages(("user", "ab"), ("assistant", "cd")),
                "rejected": messages(("user", "ab"), ("assistant", "e")),
            },
            SAME,
        ),
        (
            {
                "prompt": messages(("user", "ab")),
                "chosen": messages(("user", "ab"), ("assistant", "cd")),
                "rejected": messages(("user", "ab"), ("assistant", "e")),
            },
            SAME,
        ),
        (
            {
                "chosen": messages(*START, ("assistant", "e")),
                "rejected": messages(*START, ("assistant", "fg")),
            },
            TWO_TURNS,
        ),
        (
            {
                "prompt": messages(*START),
                "chosen": messages(("assistant", "e")),
                "rejected": messages(("assistant", "fg")),
            },
            TWO_TURNS,
        ),
    ],
)
def test_of_every_kind_of_row_the_answers_alone_are_learned(row, expected):
    got = sides(row)
    assert [read for read, _ in got] == [read for read, _ in expected]
    assert [learned.lstrip("_") for _, learned in got] == [
        learned.lstrip("_") for _, learned in expected
    ]
    assert all(len(read) == len(learned) for read, learned in got)


def test_every_file_format_gives_the_same_pairs(tmp_path, monkeypatch, hub):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    monkeypatch.chdir(tmp_path)
    chats = [
        {
            "prompt": messages(("user", row["prompt"])),
            "chosen": messages(("assistant", row["chosen"])),
            "rejected": messages(("assistant", row["rejected"])),
        }
        for row in ANSWERS
    ]
    expected = [[[Turn(row["prompt"], row[side])] for side in ("chosen", "rejected")] for row in ANSWERS]
    for made in ANSWERS, chats:
        write_rows(Path("r.jsonl"), made)
        Path("r.json").write_text(json.dumps(made, indent=1))
        write_table(pa.Table.from_pylist(made), "r.parquet")
        hub.splits = {"train": iter(made)}
        for dataset in "r.jsonl", "r.json", "r.parquet", "hf:me/pairs":
            pairs = preferences(rows.read_rows(dataset))
            assert [[side.turns for side in pair] for pair in pairs] == expected, dataset


def test_rows_without_two_answers_to_learn_from_are_counted_with_their_places(shop, capsys):
    bad = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "b" * 200, "chosen": "long", "rejected": "x"},
        {"prompt": "c", "chosen": "d", "rejected": ""},
        {
            "chosen": messages(("user", "e"), ("assistant", "f")),
            "rejected": messages(("user", "g"), ("assistant", "h")),
        },
        {"chosen": messages(*START[:2]), "rejected": messages(*START, ("assistant", "i"))},
        {
            "chosen": messages(*START, ("assistant", "j")),
            "rejected": messages(*START[:2], ("user", "k"), ("assistant", "j")),
        },
    ]
    write_rows(shop / "bad.jsonl", ANSWERS + bad)
    write_rows(shop / "held.jsonl", ANSWERS[:2])
    argv = ["--dataset=bad.jsonl", "--val_dataset=held.jsonl", "--eval_only", "--template={prompt}"]
    out = printed(capsys, dpo, *TINY, "--init_from=base", *argv, folder=shop)
    assert "bad.jsonl, to learn from: 20 rows; left out: " in out
    assert "1 whose chosen and rejected answer are the same (bad.jsonl line 21)" in out
    assert "1 that are longer than 48 tokens (bad.jsonl line 22)" in out
    assert "1 without a response (bad.jsonl line 23)" in out
    lines = ", ".join(f"bad.jsonl line {n}" for n in (24, 25, 26))
    assert f"3 whose sides are no two answers to one prompt ({lines})" in out


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "a", "chosen": "b"},
            "rows have prompt or instruction, chosen and rejected, or chosen and rejected as",
        ),
        ({"prompt": "a", "chosen": 5, "rejected": "b"}, "column 'chosen' is not text but 5"),
        ({"chosen": "b", "rejected": "c"}, "as whole conversations; here is chosen, rejected"),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            "as whole conversations; here is question, chosen, rejected",
        ),
        ({"chosen": [], "rejected": "c"}, "column 'rejected' is not a list of messages but 'c'"),
        ("text", "here is 'text'"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(row, message):
    with pytest.raises(Refusal) as refusal:
        preferences([("p.jsonl line 1", row)])
    assert str(refusal.value).startswith("p.jsonl line 1: ") and message in str(refusal.value)


@pytest.mark.slow
def test_the_grammar_tells_what_is_preferred():
    made = toy_stories.preference_rows(300, 5)
    assert len({row["prompt"] for row in made}) == 300
    for row in made:
        assert toy_stories.is_preferred(row["prompt"] + row["chosen"])
        assert not toy_stories.is_preferred(row["prompt"] + row["rejected"])
        assert toy_stories.derivations(row["prompt"] + row["chosen"])
    # of all stories, those that end with name and lesson: six closings in ten
    stories = toy_stories.texts(2000, 6)
    assert abs(np.mean([toy_stories.is_preferred(text) for text in stories]) - 0.6) < 0.04
    # a slip on the way does not change what the story is about
    [(text, _)] = toy_stories.stories(1, 7)
    assert toy_stories.fate(text) == toy_stories.fate(text[:150] + "x" + text[150:])


# The loss


def small_task(shop, *argv):
    """Returns a Preferring that is ready to train, in float32 on a CPU."""
    argv = [*TINY, f"--init_from={shop}/base", f"--dataset={shop}/pairs.jsonl", *argv]
    tuning = open_tuning(configure(dpo.Config, argv), "preference tuning")
    task = dpo.Preferring(tuning)
    task.trained = tuning.prepare(task.length)
    task.begin()
    return task


def moved(model):
    """Moves what is learned away from its start, by the same amount each time."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def logp(model, example):
    """Returns log p of one example's answer, by itself."""
    idx, targets = (torch.from_numpy(array)[None] for array in example)
    logps = model(idx)[0].log_softmax(-1)
    is_target = targets != -100
    return logps[is_target].gather(1, targets[is_target][:, None]).sum()


def texts(task, chosen, rejected):
    """Yields the prompt of a pair of examples and both answers."""
    tokenizer = task.tuning.tokenizer
    for number in (chosen, rejected):
        idx, targets = task.examples[number]
        first = int((targets != -100).argmax()) + 1
        if number == chosen:
            yield tokenizer.decode(idx[1:first].tolist()).removesuffix("\n")
        yield tokenizer.decode(idx[first:].tolist())


def test_so_many_tokens_are_looked_at_also_where_a_pair_is_longer_than_an_example_may_be(shop):
    task = small_task(shop, "--max_length=28", "--val_fraction=0.5")
    assert task.length > task.tuning.T
    for n in 1, 2, 3:
        assert len(task.val_numbers(n * task.length)) == n
    assert len(task.val_numbers(0)) == len(task.val_packs) > 3


@pytest.mark.parametrize("rank", [2, 0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(shop, rank):
    task = small_task(shop, f"--rank={rank}", "--beta=0.3")
    base = copy.deepcopy(task.tuning.model).double()
    model = task.tuning.model
    moved(model)
    exact = copy.deepcopy(model).double()
    packs = task.packs[:4]
    loss = task.loss(model, task.make_batch(packs))
    loss.backward()

    expected = 0
    figures = []  # of each pair
    numbers = [number for pack in packs for number in pack]
    assert len(numbers) > 4  # rows have several pairs
    answers = {tuple(row.values()) for row in ANSWERS}
    for chosen, rejected in zip(numbers[::2], numbers[1::2]):
        assert tuple(texts(task, chosen, rejected)) in answers
        policy = [logp(exact, task.examples[n]) for n in (chosen, rejected)]
        reference = [logp(base, task.examples[n]).detach() for n in (chosen, rejected)]
        margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
        nats = -torch.log(1 / (1 + torch.exp(-0.3 * margin)))
        figures.append([x.item() for x in (nats, margin > 0, 0.3 * margin, *policy)])
        expected = expected + nats
    expected.backward()
    computed = task.figures(task.make_batch(packs)).tolist()
    assert computed == pytest.approx([*np.sum(figures, axis=0), len(figures)], rel=1e-4)
    nothing = torch.zeros(3)
    assert dpo.sums_of_pairs(nothing, nothing, nothing)[1] == 0  # who gained nothing is not ahead
    assert dpo.count_pairs(task.make_batch(packs)) == len(numbers) // 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), grads[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("rank", [2, 0])
def test_it_starts_at_log_2_and_the_reference_does_not_move(shop, rank):
    task = small_task(shop, f"--rank={rank}")
    assert task.validate(tokens=0)["val_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert task.validate(tokens=0)["margin"] == pytest.approx(0, abs=1e-5)
    before = task.reference.copy()
    moved(task.tuning.model)
    assert abs(task.validate(tokens=0)["val_loss"] - np.log(2)) > 1e-4
    if rank:  # computed again with the adapters switched off, as a run that goes on does
        task.begin()
    np.testing.assert_array_equal(task.reference, before)


def test_the_dropout_of_the_base_ends_and_that_of_adapters_stays(shop):
    call(
        train,
        *SMALL,
        "--max_iters=1",
        "--block_size=48",
        "--dropout=0.3",
        "--out_dir=dropping",
        folder=shop,
    )
    task = small_task(shop, f"--init_from={shop}/dropping")
    task.trained.train()
    batch = task.make_batch(task.packs[:2])
    assert task.loss(task.trained, batch).item() == pytest.approx(
        np.log(2) * dpo.count_pairs(batch).item()
    )
    task = small_task(shop, f"--init_from={shop}/dropping", "--lora_dropout=0.5")
    moved(task.tuning.model)
    task.trained.train()
    losses = {task.loss(task.trained, batch).item() for _ in range(3)}
    assert len(losses) == 3


def test_other_held_out_rows_are_refused(shop):
    write_rows(shop / "held1.jsonl", ANSWERS[:3])
    argv = ["--rank=0", "--val_dataset=held1.jsonl", "--out_dir=held", "--max_iters=1"]
    prefer(shop, *argv)
    write_rows(shop / "held1.jsonl", ANSWERS[3:6])
    with pytest.raises(Refusal, match="other rows than when"):
        call(dpo, "--out_dir=held", "--init_from=resume", "--max_iters=2", folder=shop)


@pytest.mark.slow
def test_the_loss_and_its_gradient_are_those_of_trl(shop, tmp_path):
    """Of one batch, from weights that have moved away from the reference."""
    import trl  # takes seconds

    task = small_task(shop, "--rank=0", "--beta=0.3")
    model = task.tuning.model
    call(hf, f"--out_dir={shop}/base", f"--to={tmp_path}/base")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    moved(model)
    checkpoint_file.save(
        f"{tmp_path}/ckpt.pt", model, task.tuning.tokenizer, {}, checkpoint_file.RunState()
    )
    call(hf, f"--out_dir={tmp_path}", f"--to={tmp_path}/moved")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)

    packs = task.packs[:3]
    numbers = [number for pack in packs for number in pack]
    rows = []
    for chosen, rejected in zip(numbers[::2], numbers[1::2]):
        (idx, targets), (other_idx, other_targets) = task.examples[chosen], task.examples[rejected]
        first = int((targets != -100).argmax()) + 1  # of the answer
        prompt, answer, other = np.split(np.r_[idx, targets[-1]], [first]) + [None]
        rows.append(
            {
                "prompt_ids": prompt.tolist(),
                "chosen_ids": answer.tolist(),
                "rejected_ids": np.r_[other_idx, other_targets[-1]][first:].tolist(),
            }
        )
    config = trl.DPOConfig(
        str(tmp_path / "trl"),
        beta=0.3,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        peer,
        reference,
        config,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
        train_dataset=datasets.Dataset.from_list(ANSWERS),
    )
    theirs = trainer.compute_loss(peer, trainer.data_collator(rows))
    theirs.backward()
    loss = task.loss(model, task.make_batch(packs)) / len(rows)
    loss.backward()
    assert abs(loss.item() - np.log(2)) > 1e-3
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    check_gradients(model, peer)


# Runs


@pytest.mark.parametrize("rank, name", [(2, "adapter.pt"), (0, "ckpt.pt")])
def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(shop, rank, name):
    argv = [f"--rank={rank}", "--lora_dropout=0.2", "--gradient_accumulation_steps=2"]
    whole_dir, parts_dir = f"whole{rank}", f"parts{rank}"
    prefer(shop, *argv, f"--out_dir={whole_dir}")
    prefer(shop, *argv, f"--out_dir={parts_dir}", "--max_iters=4", "--lr_decay_iters=8")
    call(dpo, f"--out_dir={parts_dir}", "--init_from=resume", "--max_iters=8", folder=shop)
    keys = checkpoint_file.ADAPTER_KEYS if rank else checkpoint_file.KEYS
    whole, parts = (
        checkpoint_file.load(str(shop / folder / name), keys) for folder in (whole_dir, parts_dir)
    )
    for key in "adapters" if rank else "model", "optimizers", "val_loss", "best_val_loss", "step":
        assert same(whole[key], parts[key]), key
    assert log(shop, whole_dir) == log(shop, parts_dir)


@pytest.mark.parametrize("rank", [2, 0])
def test_two_processes_are_one(shop, rank):
    """Also in the reference, of which each computes a part."""
    one, two = one_and_two(shop, dpo, "--dataset=pairs.jsonl", f"--rank={rank}")
    assert one["config"]["reference"] == two["config"]["reference"]
    assert len(one["config"]["reference"]) == (0 if rank else 2 * len(ANSWERS))


def test_a_run_goes_on_over_its_own_base_or_without_one(shop):
    """Adapters know their base by its hash; a run of all weights keeps what the base said of the answers."""
    prefer(shop, "--rank=0", "--out_dir=undisturbed")
    shutil.copytree(shop / "base", shop / "mine")
    for rank in 2, 0:
        argv = ["--init_from=mine", f"--rank={rank}", "--max_iters=4", "--lr_decay_iters=8"]
        prefer(shop, *argv, f"--out_dir=mine{rank}")
    argv = ["--max_iters=2", "--block_size=48", "--out_dir=mine", "--overwrite"]
    call(train, *SMALL, *argv, folder=shop)  # another one in its place
    with pytest.raises(Refusal, match="mine2/adapter.pt was trained over another base than mine/ckpt"):
        call(dpo, "--out_dir=mine2", "--init_from=resume", "--max_iters=8", folder=shop)
    call(dpo, "--out_dir=mine0", "--init_from=resume", "--max_iters=8", folder=shop)
    undisturbed, kept = (
        checkpoint_file.load(str(shop / folder / "ckpt.pt"), checkpoint_file.KEYS)
        for folder in ("undisturbed", "mine0")
    )
    assert same(undisturbed["model"], kept["model"])
    assert log(shop, "undisturbed") == log(shop, "mine0")


def compiled_is_the_same(shop, script, *argv):
    """Asserts that a compiled run of three steps logs what one that is not compiled does, within rounding."""
    argv = [*TINY, "--init_from=base", "--max_iters=3", "--eval_interval=2", *argv]
    for compile in "false", "true":
        call(script, *argv, f"--compile={compile}", f"--out_dir=compile-{compile}", folder=shop)
    plain, compiled = log(shop, "compile-false"), log(shop, "compile-true")
    assert len(plain) == len(compiled) > 4
    for line, other in zip(plain, compiled):
        if line["step"] == 0 and "accuracy" in line:  # of margins that are rounding alone
            del line["accuracy"], other["accuracy"]
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_compiled_run_is_the_same(shop):
    compiled_is_the_same(shop, dpo, "--dataset=pairs.jsonl")


def test_what_is_preferred_is_learned(shop):
    prefer(shop, "--max_iters=60", "--eval_interval=60", "--beta=1", "--out_dir=learned")
    *_, last = [line for line in log(shop, "learned") if "accuracy" in line]
    assert last["accuracy"] == 1 and last["val_loss"] < 0.3
    assert last["margin"] > 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--beta=0"], "beta must be above 0"),
        (["--dataset=toy", "--val_dataset=pairs.jsonl"], "toy has held-out rows of its own"),
        (["--dataset=pairs"], "dataset must be toy, a .json"),
        (["--dataset=pairs.jsonl", "--val_dataset=toy"], "val_dataset must be a .json"),
    ],
)
def test_mistakes_are_one_line(shop, argv, message):
    with pytest.raises(Refusal) as refusal:
        prefer(shop, "--out_dir=refused", *argv)
    assert message in str(refusal.value)
    assert not (shop / "refused").exists()


def test_a_run_of_another_kind_does_not_go_on_here(shop):
    write_rows(
        shop / "sft.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in ANSWERS]
    )
    call(finetune_lora, *TINY, "--init_from=base", "--dataset=sft.jsonl", "--out_dir=sft", folder=shop)
    message = "is no preference tuning run that could go on; finetune_lora.py --merge --out_dir=sft"
    with pytest.raises(Refusal, match=message):
        call(dpo, "--out_dir=sft", "--init_from=resume", folder=shop)
