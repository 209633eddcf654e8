"""Fine-tuning: masks, packing, resuming to the bit, adapters and their base, and the command line."""

import contextlib
import copy
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from children import error_output, finish, start
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import call, printed, shell, written
from test_lost import wait_for
from test_model import build, tokens
from test_prepare import hub, write_rows  # hub is a fixture
from test_processes import run_together
from test_sample import complete
from test_train import CPU, SMALL, lab, log, same  # lab is a fixture

import checkpoint
import checkpoint_file
import dataset
import eval as evaluation
import finetune_lora as ft
import prepare
import sample
import toy_stories
import train
from chat import Turn
from config import Refusal, configure
from data import MODELS_OWN, count_targets, prompt_ids, render
from generate import Row
from interop import hf_layout
from interop.chat_template import jinja_template
from interop.foreign_tokenizer import ForeignTokenizer
from messages import conversations, default_template, kind_of
from rows import (
    MORAL_SEED,
    encode,
    encode_row,
    example,
    pack,
    packed_batch,
    read_rows,
    side_line,
    split_numbers,
    split_rows,
    training_packs,
)
from tokenizer import EOT, Tokenizer

BYTES = Tokenizer.train(["abc"], 257)  # no merges: a token a byte
PAIRS = [
    {"prompt": f"Why is {a} {b}?", "response": f"{b.capitalize()} it is."}
    for a in ("Tom", "Lily", "the fox", "the hare")
    for b in ("sad", "glad", "brave", "slow", "small")
]
TINY = [
    "--rank=2",
    "--batch_size=2",
    "--max_iters=8",
    "--eval_interval=4",
    "--log_interval=1",
    "--learning_rate=1e-2",
    "--warmup_iters=2",
    "--device=cpu",
    "--dtype=float32",
]


@pytest.fixture(scope="module")
def shop(lab):
    """A folder with data/toy, a tiny model in base, another in other, and rows.jsonl."""
    for out_dir, seed in ("base", 1), ("other", 2):
        argv = [*SMALL, "--max_iters=1", "--block_size=48", f"--seed={seed}", f"--out_dir={out_dir}"]
        call(train, *argv, folder=lab)
    write_rows(lab / "rows.jsonl", PAIRS)
    return lab


def finetune(shop, *argv):
    call(ft, *TINY, "--init_from=base", "--dataset=rows.jsonl", *argv, folder=shop)


def resume(shop, out_dir, *argv):
    call(ft, f"--out_dir={out_dir}", "--init_from=resume", *argv, folder=shop)


def adapter(shop, out_dir, name="adapter.pt"):
    return checkpoint_file.load(str(shop / out_dir / name), checkpoint_file.ADAPTER_KEYS)


# Rows


def chat(*turns):
    """Returns messages of turns, each a role and its content."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def spelled(ids):
    """Returns ids of BYTES as text: "_" for a masked one, "$" for the end of text."""
    signs = {-100: "_", BYTES.eot: "$"}
    return "".join(signs[i] if i in signs else BYTES.decode([i]) for i in ids.tolist())


@pytest.mark.parametrize(
    "row, template, read, learned",
    [
        ({"prompt": "ab", "response": "cd"}, "Q{prompt}A", "$QabAcd", "____cd$"),
        ({"prompt": " ab\n", "response": "\tcd "}, "{prompt}\n", "$ ab\n\n\tcd ", "_____\tcd $"),
        ({"prompt": "", "response": "c"}, "Q{prompt}A", "$QAc", "__c$"),
        # braces in a prompt are only braces
        (
            {"prompt": "{x}{prompt}", "response": "c"},
            "{prompt}{}",
            "${x}{prompt}{}c",
            "_____________c$",
        ),
        ({"instruction": "ab", "input": "", "output": "cd"}, "Q{prompt}A", "$QabAcd", "____cd$"),
        ({"instruction": "ab", "output": "cd"}, "Q{prompt}A", "$QabAcd", "____cd$"),
        ({"prompt": " ab", "completion": " cd"}, "{prompt}", "$ ab cd", "___ cd$"),
        (
            {"instruction": "ab", "input": "xy", "output": "cd", "text": 5},
            "Q{prompt}A",
            "$Qab\nxyAcd",
            "_______cd$",
        ),
        (chat(("user", "ab"), ("assistant", "cd")), "Q{prompt}A", "$QabAcd", "____cd$"),
        (
            chat(
                ("system", "s"),
                ("user", "a"),
                ("assistant", "bc"),
                ("user", "d"),
                ("assistant", "e"),
                ("user", "left out"),
            ),
            "Q{prompt}A",
            "$Qs\naAbc$QdAe",
            "_____bc$___e$",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": " a"},
                    {"from": "gpt", "value": "bc\n"},
                ]
            },
            "Q{prompt}A",
            "$Q aAbc\n",
            "____bc\n$",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
                ]
            },
            "Q{prompt}A",
            "$Qa bAc",
            "_____c$",
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ],
                "completion": [{"role": "assistant", "content": "d"}],
            },
            "Q{prompt}A",
            "$QaAb$QcAd",
            "________d$",
        ),  # an answer in the prompt is not learned
    ],
)
def test_masks_by_hand(row, template, read, learned):
    [conversation] = conversations([("file line 1", row)])
    idx, targets = example(*encode(conversation, BYTES, template))
    assert spelled(idx) == read
    assert spelled(targets) == learned
    assert conversation.problem == ""


CALL = {"role": "assistant", "content": "I ask.", "tool_calls": [{"id": 1}]}
USED = [*chat(("user", "a"))["messages"], CALL | {"content": None}, {"role": "tool", "content": "5"}]


@pytest.mark.parametrize(
    "row, problem",
    [
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "with two answers in a row"),
        (chat(("user", "a"), ("assistant", None)), "with a message without content"),
        (chat(("user", None), ("assistant", "b")), "with a message without content"),
        (chat(("user", []), ("assistant", "b")), "with a message without content"),
        (
            chat(("user", "a"), ("assistant", " \n"), ("user", "b"), ("assistant", "c")),
            "without a response",
        ),
        (chat(("user", "a")), "without a response"),
        (chat(), "without messages"),
        ({"prompt": [], "completion": []}, "without messages"),
        (chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "that begin with an answer"),
        ({"messages": [*chat(("user", "a"))["messages"], CALL]}, "with a call of a tool"),
        (
            {"messages": [*chat(("user", "a"))["messages"], CALL | {"content": None}]},
            "with a call of a tool",
        ),
        ({"messages": [*USED, *chat(("assistant", "5 it is."))["messages"]]}, "with a call of a tool"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "5"},
                    {"from": "gpt", "value": "5 it is."},
                ]
            },
            "with a call of a tool",
        ),
        ({"prompt": "a", "response": None}, "without a response"),
        ({"prompt": "a", "response": "  "}, "without a response"),
        ({"instruction": "a", "output": ""}, "without a response"),
    ],
)
def test_rows_that_are_no_conversation_are_counted_with_their_places(row, problem):
    good = {"prompt": "a", "response": "b"}
    rows = [("r.jsonl line 1", good), ("r.jsonl line 2", row)]
    kept, left_out = [encode_row([one], BYTES, "{prompt}:", 48) for one in conversations(rows)]
    [encoded] = kept
    idx, targets = example(*encoded)
    assert spelled(idx) == "$a:b"
    assert spelled(targets) == "__b$"
    line = side_line("r.jsonl", 2, [left_out], 48)
    assert line == f"r.jsonl: 1 rows; left out: 1 {problem} (r.jsonl line 2)"
    with pytest.raises(Refusal, match=f"none of its 5 rows .*; left out: 5 {problem} ") as e:
        side_line("r.jsonl", 5, [left_out._replace(place="x")] * 5, 48)
    assert str(e.value).endswith("(x, x, x, ...)")


@pytest.mark.parametrize(
    "n, fraction, n_val", [(2, 0.1, 1), (20, 0.1, 2), (20, 0.5, 10), (20, 0.99, 19), (2, 0.9, 1)]
)
def test_a_fraction_leaves_a_row_to_either_side(n, fraction, n_val):
    cfg = configure(ft.Config, ["--dataset=rows.jsonl", f"--val_fraction={fraction}"])
    learned, held_out = split_numbers(cfg, n, 0)
    assert len(held_out) == n_val
    assert sorted([*learned, *held_out]) == list(range(n))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": None}, "r line 3: column 'messages' is not a list of messages but null"),
        ({"messages": "hello"}, "r line 3: column 'messages' is not a list of messages but 'hello'"),
        ({"conversations": None}, "column 'conversations' is not a list of messages but null"),
        (
            chat(("critic", "x")),
            "r line 3, message 1 of 'messages': a role is 'critic', which is not read",
        ),
        (chat(("user", "x"), ("developer", "y")), "message 2 of 'messages': a role is 'developer'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "a role is 'bot'"),
        ({"messages": [{"role": "user"}]}, "no column 'content'; a message has role and content"),
        ({"messages": [None]}, "no column 'role'; a message has .*: none, as it is a NoneType"),
        (
            chat(("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}])),
            "a part of its content is of type 'image_url'; only text is read",
        ),
        (chat(("user", ["a"])), "a part of a content has type and text"),
        (chat(("user", 5)), "not text but 5"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "not text but"),
        ({"prompt": [], "completion": "b"}, "not text but"),
        ({"prompt": [], "completion": None}, "not text but"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_with_their_places(row, message):
    with pytest.raises(Refusal, match=message) as e:
        conversations([("r line 1", {"prompt": "a", "response": "b"}), ("r line 3", row)])
    assert str(e.value).startswith("r line 3")


def test_rows_of_several_kinds_need_a_template_and_a_shuffle_does_not_choose_it(shop):
    pair = {"prompt": "a", "response": "b"}
    rows = [*[pair] * 5, *[chat(("user", "a"), ("assistant", "b"))] * 5]
    (shop / "mixed.json").write_text(json.dumps(rows))
    message = r"mixed.json row \d+ has \w.* mixed.json row \d+ has .*--template"
    for seed in range(4):
        with pytest.raises(Refusal, match=message):
            finetune(shop, "--dataset=mixed.json", "--out_dir=mixed", f"--seed={seed}")
    (shop / "chat.json").write_text(json.dumps(rows[5:]))
    message = "rows.jsonl line .* has prompt and response, chat.json row 1 has m"
    with pytest.raises(Refusal, match=message):
        finetune(shop, "--val_dataset=chat.json", "--out_dir=mixed")
    finetune(shop, "--dataset=mixed.json", "--template={prompt}:", "--out_dir=mixed", "--max_iters=1")
    # each row by its own kind: with one template all of these say the same
    same_text = [
        ("", row)
        for row in (
            rows[0],
            rows[5],
            {"prompt": "a", "completion": "b"},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"instruction": "a", "input": "", "output": "b"},
            # in a table each row has all columns
            rows[5] | {"prompt": None, "response": None, "conversations": None},
            {"prompt": "a", "response": None, "completion": "b", "messages": None},
        )
    ]
    for conversation in conversations(same_text):
        assert conversation.turns == [Turn("a", "b")]
        assert not conversation.problem
    chats = conversations([same_text[1], same_text[3], same_text[5]])
    assert default_template(chats) == "User:\n{prompt}\n\nAssistant:\n"


def test_rows_are_read_as_trl_reads_them():
    """Roles and texts as maybe_convert_to_chatml makes them; prompt and completion joined as by SFTTrainer."""
    data_utils = pytest.importorskip("trl.data_utils")
    rows = [
        chat(("system", "s"), ("user", " a"), ("assistant", "b\n"), ("user", "c"), ("assistant", "d")),
        {"conversations": [{"from": "user", "value": "a "}, {"from": "assistant", "value": " b"}]},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        {
            "prompt": [{"from": "user", "value": "a"}],
            "completion": [{"from": "assistant", "value": "b"}],
        },
    ]
    for row in rows:
        expected = data_utils.maybe_convert_to_chatml(copy.deepcopy(row))
        expected = expected.get("messages") or expected["prompt"] + expected["completion"]
        kind = kind_of(row)
        messages = kind.messages(row, "", kind.columns)
        assert [{"role": message.role, "content": message.text} for message in messages] == expected
    row = {"prompt": "The sky is", "completion": " blue."}
    assert not data_utils.is_conversational(row)
    [conversation] = conversations([("", row)])
    idx, targets = example(*encode(conversation, BYTES, default_template([conversation])))
    assert BYTES.decode(idx[1:]) == row["prompt"] + row["completion"]
    assert BYTES.decode(targets[targets >= 0][:-1]) == row["completion"]


def test_a_prompt_has_the_same_ids_in_training_and_in_sampling():
    """Also where a token of the joined text, "ab", would lie across the boundary."""
    tokenizer = Tokenizer.train(["ab cat"] * 9, 263)
    joined = tokenizer.encode("x ab cat")
    assert len(joined) < len(tokenizer.encode("x a")) + len(tokenizer.encode("b cat"))
    [conversation] = conversations([("file line 1", {"prompt": "x a", "response": "b cat"})])
    idx, targets = example(*encode(conversation, tokenizer, "{prompt}"))
    prompt = prompt_ids(tokenizer, render("{prompt}", "x a"))
    n = len(prompt)
    assert idx[:n].tolist() == prompt
    assert (targets[: n - 1] == -100).all()
    assert tokenizer.decode(targets[n - 1 : -1]) == "b cat"
    assert targets[-1] == tokenizer.eot


def test_every_file_format_gives_the_same_rows(tmp_path, monkeypatch, hub):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    monkeypatch.chdir(tmp_path)
    pairs = [(row["prompt"], row["response"]) for row in PAIRS]
    chats = [chat(("user", prompt), ("assistant", response)) for prompt, response in pairs]
    for rows in PAIRS, chats:
        Path("r.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        Path("r.json").write_text(json.dumps(rows, indent=1))
        write_table(pa.Table.from_pylist(rows), "r.parquet")
        hub.splits = {"train": iter(rows)}
        for name in "r.jsonl", "r.json", "r.parquet", "hf:me/rows":
            dialogues = [conversation.turns for conversation in conversations(read_rows(name))]
            assert dialogues == [[Turn(*pair)] for pair in pairs], name
    hub.splits = {"train": iter([PAIRS[0], {"messages": None}])}
    with pytest.raises(Refusal, match="hf:me/rows row 2: column 'messages' is not a list"):
        conversations(read_rows("hf:me/rows"))


# Packing


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_packs_hold_each_example_once_and_no_two_packs_fit_in_one(lengths):
    packs = pack(lengths, 20)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in members) for members in packs)
    assert all(0 < n <= 20 for n in sizes)
    if len(sizes) > 1:
        assert sizes[0] + sizes[1] > 20


def test_a_pack_depends_on_its_number_alone_and_an_epoch_has_each_once():
    packs = [[i] for i in range(13)]
    whole = training_packs(packs, 7, 0, 65)
    parts = [training_packs(packs, 7, first, 5) for first in range(0, 65, 5)]
    assert whole == [members for part in parts for members in part]
    epochs = [whole[i : i + 13] for i in range(0, 65, 13)]
    assert all(sorted(epoch) == packs for epoch in epochs)
    assert epochs[0] != epochs[1] != packs


def test_packed_examples_never_see_each_other():
    model = build()
    lengths = [5, 7, 3, 9]
    examples = []
    for n in lengths:
        idx, targets = tokens(1, n, seed=n)[0].numpy(), tokens(1, n, seed=9)[0].numpy()
        targets[:2] = -100
        examples.append((idx, targets))
    packs = pack(lengths, 24)
    [members] = packs
    batch = packed_batch(packs, examples, 24)
    idx, doc, targets = batch["idx"], batch["doc"][0], batch["targets"][0]
    assert count_targets(batch) == sum(n - 2 for n in lengths)
    assert (targets[doc == -1] == -100).all()
    with torch.no_grad():
        logits = model(idx, doc=batch["doc"])[0][0]
        for place, i in enumerate(members):
            alone = model(torch.from_numpy(examples[i][0])[None])[0][0]
            torch.testing.assert_close(logits[doc == place], alone, rtol=0, atol=1e-5)
        other = batch | {"idx": torch.where(doc == 1, (idx + 1) % 61, idx)}
        nats, other_nats = (model(**b, reduction="none")[1][0] for b in (batch, other))
        changed = nats != other_nats
        assert changed[doc == 1].any()
        assert not changed[doc != 1].any()


# Whole runs


def test_rows_that_do_not_fit_are_left_out_whole_and_counted(shop, capsys):
    long = {"prompt": "what is this? " * 20, "response": "A story."}
    mute = {"prompt": "why?", "response": " "}
    write_rows(shop / "long.jsonl", [*PAIRS, long, mute, long])
    finetune(shop, "--dataset=long.jsonl", "--val_dataset=rows.jsonl", "--out_dir=long", "--max_iters=1")
    out = capsys.readouterr().out
    assert (
        f"long.jsonl, to learn from: {len(PAIRS)} rows; left out: "
        "2 that are longer than 48 tokens (long.jsonl line 21, long.jsonl line 23), "
        "1 without a response (long.jsonl line 22); in "
    ) in out
    assert f"rows.jsonl, held out: {len(PAIRS)} rows\n" in out
    write_rows(shop / "only.jsonl", [long])
    with pytest.raises(Refusal, match="none of its 1 rows has a response and fits in 48 tokens"):
        finetune(shop, "--dataset=only.jsonl", "--val_dataset=rows.jsonl", "--out_dir=n")


def test_of_a_long_start_the_preview_answers_the_end(shop, capfd):
    start = "why oh why " * 40  # 48 tokens are the context
    finetune(shop, "--out_dir=long-start", "--max_iters=1", f"--start={start}")
    assert start in capfd.readouterr().err
    resume(shop, "long-start", "--max_iters=2")
    assert adapter(shop, "long-start")["step"] == 2


def test_rates_are_said_where_an_adapter_is_learned_too(shop, capsys):
    rates = ["--learning_rate=1e-3", "--warmup_iters=0", "--lr_decay_iters=2", "--max_iters=4"]
    finetune(shop, "--out_dir=rates", *rates)
    assert "steps 3 to 4 have a learning rate of 0" in capsys.readouterr().out
    resume(shop, "rates", "--max_iters=8", "--lr_decay_iters=0")
    line = (
        "step 5: the learning rate goes from 0 to 0.001, the highest, as a finished run is made longer"
    )
    assert line in capsys.readouterr().out
    assert adapter(shop, "rates")["config"]["warmup_iters"] == 4


def test_the_held_out_loss_is_that_of_each_response_token_once(shop, capsys):
    finetune(shop, "--out_dir=loss", "--max_iters=1", "--batch_size=3", "--val_fraction=0.3")
    with contextlib.chdir(shop):
        model, tokenizer = checkpoint_file.restore(checkpoint_file.load("base/ckpt_best.pt"), "base")
        cfg = configure(ft.Config, ["--dataset=rows.jsonl", "--val_fraction=0.3"])
        learn, held_out = split_rows(cfg, conversations)
    assert len(held_out) == 6
    turns = [turn for conversation in learn + held_out for turn in conversation.turns]
    assert sorted(turn.prompt for turn in turns) == sorted(row["prompt"] for row in PAIRS)
    nats = []
    for turn in turns[-6:]:
        prompt = [tokenizer.eot, *tokenizer.encode(turn.prompt + "\n")]
        response = [*tokenizer.encode(turn.response), tokenizer.eot]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + response]))[0][0].log_softmax(-1)
        nats += [-logp[i, id].item() for i, id in enumerate(response, start=len(prompt) - 1)]
    assert log(shop, "loss")[0]["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert f"step 0: val_loss {np.mean(nats):.4f}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rank, name, dtype",
    [(2, "adapter.pt", "float32"), (0, "ckpt.pt", "float32"), (2, "adapter.pt", "bfloat16")],
)
def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(shop, rank, name, dtype):
    argv = [
        "--overwrite",
        f"--dtype={dtype}",
        f"--rank={rank}",
        "--lora_dropout=0.2",
        "--gradient_accumulation_steps=2",
        "--template=Q: {prompt}\\nA: ",
    ]
    whole_dir, parts_dir = f"whole{rank}", f"parts{rank}"
    base = (shop / "base/ckpt_best.pt").read_bytes()
    finetune(shop, *argv, f"--out_dir={whole_dir}")
    finetune(shop, *argv, f"--out_dir={parts_dir}", "--max_iters=4", "--lr_decay_iters=8")
    resume(shop, parts_dir, "--max_iters=8")
    keys = checkpoint_file.ADAPTER_KEYS if rank else checkpoint_file.KEYS
    whole = checkpoint_file.load(str(shop / whole_dir / name), keys)
    parts = checkpoint_file.load(str(shop / parts_dir / name), keys)
    weights = "adapters" if rank else "model"
    for key in weights, "optimizers", "val_loss", "best_val_loss", "step":
        assert same(whole[key], parts[key]), key
    assert log(shop, whole_dir) == log(shop, parts_dir)
    assert parts["config"]["template"] == "Q: {prompt}\nA: "
    best = name.replace(".pt", "_best.pt")
    assert sorted(os.listdir(shop / whole_dir)) == [name, best, "log.jsonl", "loss.png"]
    assert (shop / "base/ckpt_best.pt").read_bytes() == base
    if rank:
        assert {key.rpartition(".")[2] for key in parts["adapters"]} == {"A", "B"}
        assert {x.dtype for x in parts["adapters"].values()} == {torch.float32}
        with pytest.raises(Refusal, match="rank=2, which cannot become 4"):
            resume(shop, parts_dir, "--rank=4")


def test_a_run_that_goes_on_finds_its_rows_as_they_were_encoded(shop):
    write_rows(shop / "found.jsonl", PAIRS[1:])
    finetune(shop, "--dataset=found.jsonl", "--out_dir=found", "--max_iters=1")
    encoded = sorted(os.listdir(shop / "data/.encoded"))
    resume(shop, "found", "--max_iters=2")
    assert adapter(shop, "found")["config"]["template"] != ""
    assert sorted(os.listdir(shop / "data/.encoded")) == encoded


def test_a_run_from_before_text_was_learned_as_it_stands_goes_on_by_its_own_rule(shop, capsys):
    """Of rows with space around their texts it learned what a run now learns of the same rows without it."""
    plain = [
        *PAIRS,
        chat(
            ("user", "Who is Tom?\nThe fox?"),
            ("assistant", "A fox."),
            ("user", "b"),
            ("assistant", "c"),
        ),
    ]
    older = [
        *({"prompt": f"\n {p['prompt']}  ", "response": f"\t{p['response']}\n"} for p in PAIRS),
        chat(
            ("system", ""),
            ("user", "Who is Tom?\n"),
            ("user", " The fox?"),
            ("assistant", " A fox.\n"),
            ("user", "b "),
            ("assistant", " c"),
        ),
    ]
    argv = ["--dataset=aged.json", "--template=Q: {prompt}\\n"]

    def change_to(rows):
        (shop / "aged.json").write_text(json.dumps(rows))

    change_to(plain)
    finetune(shop, *argv, "--out_dir=unaged")
    finetune(shop, *argv, "--out_dir=aged", "--max_iters=4", "--lr_decay_iters=8")
    assert adapter(shop, "aged")["config"]["text_rule"] == "as it stands"
    change_to(older)
    with pytest.raises(Refusal, match="other rows than when"):
        resume(shop, "aged", "--max_iters=8")
    for name in "adapter.pt", "adapter_best.pt":
        content = adapter(shop, "aged", name)
        del content["config"]["text_rule"]
        torch.save(content, shop / "aged" / name)
    capsys.readouterr()
    resume(shop, "aged", "--max_iters=8")
    assert "template: 'Q: {prompt}\\n', text without the space around it\n" in capsys.readouterr().out
    unaged, aged = adapter(shop, "unaged"), adapter(shop, "aged")
    for key in "adapters", "optimizers", "val_loss", "step":
        assert same(unaged[key], aged[key]), key
    assert aged["config"]["text_rule"] == "stripped"

    # its prompts are put into the template by the same rule, also once it is merged
    for out_dir in "aged", "unaged":
        call(ft, "--merge", f"--out_dir={out_dir}", folder=shop)
    for model, prompt in {
        "--adapter=aged": "Q: Why\n",
        "--out_dir=aged": "Q: Why\n",
        "--adapter=unaged": "Q:  Why \n",
        "--out_dir=unaged": "Q:  Why \n",
    }.items():
        argv = [model, "--start= Why ", "--max_new_tokens=1", "--device=cpu"]
        out = printed(capsys, sample, *argv, folder=shop)
        assert written(out).startswith(f"\n{prompt}"), model
        assert (", without the space around it;" in out) == ("unaged" not in model)

    # what is only looked at is looked at by its own rule, what learns anew learns as text stands
    figures = {}
    for rows, out_dir, key in (
        (older, "aged", "--eval_only"),
        (plain, "unaged", "--eval_only"),
        (older, "aged", "--max_iters=1"),
        (older, "unaged", "--max_iters=1"),
    ):
        change_to(rows)
        argv = ["--dataset=aged.json", f"--init_from={out_dir}", "--out_dir=looked", "--overwrite"]
        finetune(shop, *argv, key)
        line = next(line for line in capsys.readouterr().out.splitlines() if "nats a token" in line)
        figures.setdefault(key, []).append(line)
    for lines in figures.values():
        assert lines[0] == lines[1]
    assert figures["--eval_only"][0].partition(":")[2] != figures["--max_iters=1"][0].partition(":")[2]
    assert adapter(shop, "looked")["config"]["text_rule"] == "as it stands"


def test_code_is_learned_with_its_indentation(shop):
    """Word for word, spaces first, from rows whose prompt ends in a newline too."""
    rows = [
        {"prompt": f"def {name}(a, b):\n", "completion": f"    return a {sign} b\n"}
        for name, sign in (("add", "+"), ("sub", "-"))
    ]
    (shop / "code.json").write_text(json.dumps(rows))
    argv = ["--rank=8", "--alpha=32", "--max_iters=200", "--eval_interval=200"]
    finetune(shop, *argv, "--dataset=code.json", "--val_dataset=code.json", "--out_dir=code")
    with contextlib.chdir(shop):
        model, tokenizer = checkpoint.open_checkpoint("", adapter="code").restore()
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    answers, _ = complete(sample.generate(model, prompts, 30, temperature=0, stop=tokenizer.ends))
    assert [tokenizer.decode_more(ids) for ids in answers] == [row["completion"] for row in rows]


def check_gradients(model, peer):
    """Compares each gradient of a model with that of its twin in transformers."""
    _, grads = hf_layout.to_hf(model.config, {name: p.grad for name, p in model.named_parameters()})
    named = dict(peer.named_parameters())
    assert len(grads) >= len(named) > 10
    for name, p in named.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())


def one_and_two(shop, script, *argv):
    """Returns the checkpoints that one process and two wrote of the same run, whose logs are the same, too."""
    argv = [*TINY, "--init_from=base", "--gradient_accumulation_steps=2", "--max_iters=4", *argv]
    call(script, *argv, "--out_dir=one", "--overwrite", folder=shop)
    run_together(shop, script.__name__, 2, *argv, "--out_dir=two", "--overwrite")
    assert log(shop, "one") == log(shop, "two")
    name, keys, learned = "adapter.pt", checkpoint_file.ADAPTER_KEYS, "adapters"
    if "--rank=0" in argv:
        name, keys, learned = "ckpt.pt", checkpoint_file.KEYS, "model"
    one, two = (checkpoint_file.load(str(shop / folder / name), keys) for folder in ("one", "two"))
    for key in learned, "optimizers", "val_loss":
        assert same(one[key], two[key]), key
    return one, two


def test_two_processes_are_one(shop):
    one_and_two(shop, ft, "--dataset=rows.jsonl")


def test_a_signal_ends_the_run_after_its_step_with_advice_how_to_go_on(shop):
    argv = ["--init_from=base", "--dataset=rows.jsonl", "--out_dir=stopped"]
    process = start(shop, "finetune_lora", *TINY, *argv, "--max_iters=100000", "--eval_interval=1000")
    wait_for(shop / "stopped/log.jsonl", 5)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM
    step = adapter(shop, "stopped")["step"]
    assert (
        f"finetune_lora.py: stopped at step {step} by SIGTERM; "
        "python finetune_lora.py --out_dir=stopped --init_from=resume goes on"
    ) in error_output(shop, process)
    resume(shop, "stopped", f"--max_iters={step + 1}")
    assert adapter(shop, "stopped")["step"] == step + 1


@pytest.fixture(scope="module")
def tuned(shop):
    """The shop, with adapters over base in tuned."""
    finetune(shop, "--out_dir=tuned", "--template=Question: {prompt}\\n")
    return shop


def test_another_base_is_refused_whatever_differs(tuned):
    ckpt = checkpoint_file.load(str(tuned / "base/ckpt_best.pt"))
    fingerprint = checkpoint_file.fingerprint(ckpt)
    assert adapter(tuned, "tuned")["base_sha256"] == fingerprint
    older = dict(ckpt["model_config"])
    del older["head_dim"]  # a setting that came later
    for change in {"step": 9, "config": {}}, {"model_config": older}:
        assert checkpoint_file.fingerprint(ckpt | change) == fingerprint
    name = "blocks.1.mlp.up_proj.weight"
    for change in (
        {"model_config": ckpt["model_config"] | {"head_dim": 2}},
        {"model": ckpt["model"] | {name: ckpt["model"][name] * 1.0001}},
        {"model_config": ckpt["model_config"] | {"rope_theta": 5000.0}},
        {"tokenizer_sha256": "0"},
    ):
        assert checkpoint_file.fingerprint(ckpt | change) != fingerprint
    message = "trained over another base than other/ckpt_best.pt: over base/ckpt_best.pt"
    with pytest.raises(Refusal, match=message):
        call(sample, "--adapter=tuned", "--out_dir=other", "--device=cpu", folder=tuned)
    with pytest.raises(Refusal, match="another base"):
        call(ft, "--merge", "--out_dir=tuned", "--init_from=other", folder=tuned)
    assert not (tuned / "tuned/ckpt.pt").exists()


def test_an_adapter_goes_over_its_base_stretched_too(tuned, capsys):
    argv = ["--adapter=tuned", "--start=Why?", "--max_new_tokens=70", "--seed=4", "--device=cpu"]
    longer = ["--block_size=96", "--rope_scaling=yarn:2,48"]
    assert "context of 48" in printed(capsys, sample, *argv, folder=tuned)
    assert "context of 48" not in printed(capsys, sample, *argv, *longer, folder=tuned)


def test_an_adapter_is_no_checkpoint_and_the_other_way_round(tuned):
    for key, message in (
        ("--out_dir=tuned/adapter.pt", "is an adapter, not a checkpoint"),
        ("--out_dir=tuned", "holds an adapter"),
        ("--adapter=base/ckpt.pt", "is a whole checkpoint"),
        ("--adapter=base", "holds a whole checkpoint, not an adapter"),
    ):
        with pytest.raises(Refusal, match=message):
            call(sample, key, folder=tuned)


def test_from_the_command_line_to_a_merged_checkpoint_that_every_script_takes(shop, capsys):
    def output(script, *argv):
        return printed(capsys, script, *argv, "--device=cpu", folder=shop)

    argv = [*TINY, "--init_from=base", "--dataset=rows.jsonl", "--template=Q {prompt}\\n"]
    result = shell("finetune_lora", *argv, "--out_dir=cli", folder=shop)
    assert result.returncode == 0, result.stderr
    assert "next: python sample.py --adapter=cli" in result.stdout

    brief = ["--num_samples=1", "--max_new_tokens=20"]
    figures = json.loads(output(evaluation, "--out_dir=base,cli", *brief).splitlines()[-1])
    base_figures, adapter_figures = figures["checkpoints"]
    assert adapter_figures["checkpoint"] == "cli/adapter_best.pt"

    merged = output(ft, "--merge", "--out_dir=cli")
    assert "cli/ckpt.pt: base/ckpt_best.pt with cli/adapter_best.pt merged" in merged
    largest_difference = float(merged.split()[-1])
    assert largest_difference < 1e-4

    argv = ["--start=Why is Tom sad?", "--temperature=0", "--max_new_tokens=10"]
    unmerged = output(sample, "--adapter=cli", *argv)
    merged = output(sample, "--out_dir=cli", *argv)
    assert written(unmerged) == written(merged)
    assert written(unmerged).startswith("\nQ Why is Tom sad?\n")
    assert "Q {prompt}" in unmerged
    assert "--raw leaves it as it is" in unmerged
    raw = output(sample, "--adapter=cli", "--start=Why", "--raw", "--max_new_tokens=1")
    assert written(raw).startswith("\nWhy")

    assert "nats a token" in output(train, "--init_from=cli", "--out_dir=n", "--eval_only")
    figures = json.loads(output(evaluation, "--out_dir=cli", *brief).splitlines()[-1])
    [merged_figures] = figures["checkpoints"]
    loss = merged_figures["likelihood"]["loss"]  # of the base's text
    assert loss == pytest.approx(adapter_figures["likelihood"]["loss"], abs=1e-5)
    assert loss != pytest.approx(base_figures["likelihood"]["loss"], abs=1e-3)
    argv = [*TINY, "--max_iters=1", "--init_from=cli", "--dataset=rows.jsonl"]
    output(ft, *argv, "--out_dir=cli2")
    assert adapter(shop, "cli2")["config"]["template"] == "Q {prompt}\n"  # the base's
    with pytest.raises(Refusal, match="--overwrite moves it aside"):
        output(ft, "--merge", "--out_dir=cli")
    output(ft, "--merge", "--out_dir=cli", "--overwrite")
    assert len(list((shop / "cli").glob("ckpt.pt.old-*"))) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--rank=8", "--alpha=32", "--learning_rate=1e-2"],
        ["--rank=0", "--optimizer=muon", "--learning_rate=5e-3"],
    ],
)
def test_it_learns(shop, argv):
    """Answers that no story has, word for word, from a model that knows next to nothing."""
    argv = [*argv, "--batch_size=8", "--max_iters=150", "--eval_interval=150"]
    finetune(shop, *argv, "--val_dataset=rows.jsonl", "--out_dir=learned", "--overwrite")
    is_adapter = "--rank=8" in argv
    path = str(shop / ("base/ckpt_best.pt" if is_adapter else "learned/ckpt.pt"))
    ckpt = checkpoint_file.load(path)
    model, tokenizer = checkpoint_file.restore(ckpt, path)
    if is_adapter:
        learned = checkpoint.Checkpoint(path, ckpt, "learned/adapter.pt", adapter(shop, "learned"))
        learned.restore_adapters(model)
    prompts = [prompt_ids(tokenizer, row["prompt"] + "\n") for row in PAIRS]
    answers, _ = complete(sample.generate(model, prompts, 20, temperature=0, stop=tokenizer.ends))
    exact = [tokenizer.decode(ids) == row["response"] for ids, row in zip(answers, PAIRS)]
    assert np.mean(exact) > 0.9


# The built-in task


def test_no_moral_story_is_in_two_splits():
    """Nor among the stories that a model is pretrained on."""
    prompts = [row["prompt"] for row in toy_stories.moral_rows(400, MORAL_SEED)]
    learn, held_out = split_rows(ft.Config(), conversations)
    in_both_splits = [conversation.turns[0].prompt for conversation in learn + held_out]
    assert in_both_splits == prompts
    assert len(set(prompts)) == 400
    assert len(learn) == 200
    defaults = prepare.Config()
    pretrained = set(toy_stories.texts(defaults.num_stories, defaults.seed))
    for prompt in prompts:
        story, _, question = prompt.rpartition("\n")
        assert story not in pretrained
        assert question == "What is the moral of this story?"


def test_answers_are_exact_and_of_tokens_that_the_stories_have(shop):
    for row in toy_stories.moral_rows(50, seed=3):
        story, _, _ = row["prompt"].rpartition("\n")
        moral = toy_stories.moral(story)
        assert row["response"] == f"So {moral[0].lower()}{moral[1:]}"
        assert row["response"] in toy_stories.ANSWERS
    _, data, tokenizer = dataset.load(shop / "data/toy")
    ids = set(np.unique(data["train"]).tolist())
    assert all(ids.issuperset(tokenizer.encode(answer)) for answer in toy_stories.ANSWERS)
    # the morals themselves have others, which is why they are not the answers
    assert not all(ids.issuperset(tokenizer.encode(moral)) for moral in toy_stories.MORALS)


def test_the_morals_are_counted_right(shop, monkeypatch):
    """A model that always gives one answer, and ranks it first, is right as often as rows have it."""
    answer = toy_stories.ANSWERS[3]

    def completion_nats(model, tokenizer, pairs, compute, context_ids):
        return [0.0 if completion == answer else 1.0 for _, completion in pairs]

    def generate(model, prompts, n, temperature, stop):
        yield [Row([], tokenizer.encode(answer)) for _ in prompts]

    monkeypatch.setattr(ft, "completion_nats", completion_nats)
    monkeypatch.setattr(ft, "generate", generate)
    _, _, tokenizer = dataset.load(shop / "data/toy")
    rows = [("", row) for row in toy_stories.moral_rows(60, seed=4)]
    right = [row["response"] == answer for _, row in rows]
    unsaid = [row["response"][3:-1] not in row["prompt"] for _, row in rows]
    right_and_unsaid = [a and b for a, b in zip(right, unsaid)]
    share = f"{np.mean(right):.1%}"
    model = build(vocab_size=tokenizer.vocab_size, block_size=160)
    held_out = conversations(rows)
    line = ft.moral_lines(model, tokenizer, held_out, "{prompt}\n", CPU).splitlines()[0]
    assert line == (
        f"moral of 60 held-out stories: answered word for word {share} "
        f"({sum(right_and_unsaid)} of the {sum(unsaid)} that leave it unsaid), "
        f"the likeliest of the 11 {share} (chance 9.1%)"
    )


def test_morals_are_asked_in_the_models_own_chat_template(shop):
    """One that writes what a template with {prompt} does: the same stories, answers and ranks."""
    _, _, tokenizer = dataset.load(shop / "data/toy")
    template = "Q: {prompt}\nA: "
    files = {
        "tokenizer.json": tokenizer.tokenizer_json(),
        "chat_template.jinja": jinja_template(template, EOT, EOT),
    }
    own = ForeignTokenizer(files, tokenizer.eot, tokenizer.eot)
    model = build(vocab_size=tokenizer.vocab_size, block_size=160)
    model.head.weight.data *= 20  # so that the story decides which answer is the likeliest
    held_out = conversations([("", row) for row in toy_stories.moral_rows(60, seed=4)])
    expected = ft.moral_lines(model, tokenizer, held_out, template, CPU)
    assert ft.moral_lines(model, own, held_out, MODELS_OWN, CPU) == expected


def test_a_run_goes_on_with_its_own_rows_and_its_own_kind(shop):
    rows = shop / "changing.jsonl"
    write_rows(rows, PAIRS)
    finetune(shop, "--dataset=changing.jsonl", "--out_dir=changing", "--max_iters=1")
    write_rows(rows, [*PAIRS, {"prompt": "New?", "response": "Yes."}])
    with pytest.raises(Refusal, match="other rows than when"):
        resume(shop, "changing", "--max_iters=2")
    with pytest.raises(Refusal, match="no fine-tuning run"):
        resume(shop, "base")
    shutil.copy(shop / "base/ckpt_best.pt", shop / "alone.pt")
    with pytest.raises(Refusal, match="alone.pt is a file"):
        finetune(shop, "--init_from=alone.pt", "--out_dir=alone.pt", "--overwrite")
    assert (shop / "alone.pt").is_file()
