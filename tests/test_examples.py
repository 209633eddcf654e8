"""Encoded rows: those that a plain loop makes, found again, made anew where they are damaged."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from children import error_output, finish, ranks, start
from scripts import call
from test_finetune import BYTES, PAIRS, TINY, adapter, chat
from test_finetune import shop as tuned_shop  # a fixture
from test_prepare import hub, write_rows  # hub is a fixture
from test_processes import run_together
from test_train import lab, log, same  # lab is a fixture

import examples
import finetune_lora as ft
from config import Refusal, configure
from data import AS_IT_STANDS, STRIPPED
from examples import Source, find_encoded
from messages import conversations, preferences
from rows import encode, pack, split_rows
from tokenizer import Tokenizer

shop = tuned_shop
T = 48
ANSWERS = [
    {"prompt": f"Is {a} {b}?", "chosen": f" {b.title()}!" * n, "rejected": " No, never."}
    for a in ("Tom", "Lily", "the fox", "the hare")
    for n, b in enumerate(("sad", "glad", "brave", "slow", "small"))
]  # of each five one has no answer


@pytest.fixture
def folder(tmp_path):
    with contextlib.chdir(tmp_path):
        yield tmp_path


def source(*argv, tokenizer=BYTES, template="{prompt}:", text_rule=AS_IT_STANDS, T=T, together=1):
    return Source(configure(ft.Config, argv), tokenizer, template, text_rule, T, together)


def expected(source):
    """Returns of both sides (examples, packs, the places that are left out), and rows_sha256, from lists."""
    convert = preferences if source.conversations_per_row == 2 else conversations
    learned, held_out = split_rows(source.cfg, convert)
    length = source.T
    sides = []
    for rows in learned, held_out:
        kept, places = [], []
        for row in rows:
            row = row if isinstance(row, tuple) and isinstance(row[0], tuple) else (row,)
            encoded = [encode(c, source.tokenizer, source.template) for c in row]
            is_good = not row[0].problem and all(any(answer) for _, answer in encoded)
            if is_good and all(len(ids) <= source.T + 1 for ids, _ in encoded):
                kept.append(encoded)
            else:
                places.append(row[0].place)
        sizes = [sum(len(ids) - 1 for ids, _ in row) for row in kept]
        length = max([length, *sizes])
        n = source.conversations_per_row
        packs = [[n * row + i for row in members for i in range(n)] for members in pack(sizes, length)]
        flat = []
        for ids, is_learned in (example for row in kept for example in row):
            targets = [i if flag else -100 for i, flag in zip(ids, is_learned)]
            flat.append((ids[:-1], targets[1:]))
        sides.append((flat, packs, places))
    digest = hashlib.sha256()
    for flat, _, _ in sides[: source.conversations_per_row]:
        for idx, targets in flat:
            digest.update(np.array(idx).tobytes() + np.array(targets).tobytes())
    return sides, digest.hexdigest()


def check(encoded, source):
    """Asserts that the Encoded is what a source means."""
    sides, rows_sha256 = expected(source)
    for side, (flat, packs, places) in zip((encoded.learn, encoded.val), sides):
        assert [(idx.tolist(), targets.tolist()) for idx, targets in side.examples] == flat
        assert [members.tolist() for members in side.packs] == packs
        assert [members.tolist() for members in side.packs[1:3]] == packs[1:3]
        assert all(place in side.line for place in places[:3])
        assert f" {len(flat) // source.conversations_per_row} rows" in side.line
    assert encoded.rows_sha256 == rows_sha256


def made():
    """Returns the folders of encoded rows, and when each of their files was written."""
    return {path: path.stat().st_mtime_ns for path in Path("data/.encoded").rglob("*.*")}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("argv", [["--seed=1"], ["--val_fraction=0.3"], ["--val_dataset=held.jsonl"]])
def test_they_are_those_of_a_plain_loop_at_the_first_start_and_at_the_second(folder, argv, together):
    long = {"prompt": "long" * 20, "response": "b", "chosen": "b", "rejected": "c"}
    odd = chat(("user", "a"), ("assistant", "b"), ("assistant", "c")) | {"chosen": [], "rejected": []}
    rows = [PAIRS, ANSWERS][together - 1] * 20 + [long, odd]
    write_rows("rows.jsonl", rows)
    write_rows("held.jsonl", rows[5:30])
    settings = source("--dataset=rows.jsonl", *argv, together=together)
    check(find_encoded(settings, True), settings)
    times = made()
    check(find_encoded(settings, True), settings)
    assert made() == times


def test_the_built_in_rows_are_halved_and_found_again(folder):
    settings = source(template="{prompt}\n", T=900)
    check(find_encoded(settings, True), settings)
    times = made()
    find_encoded(settings, True)
    assert made() == times


def test_the_same_bytes_are_found_again_and_any_change_is_not(folder):
    answers = {"chosen": " Yes!", "rejected": " No!"}
    rows = [row | answers for row in PAIRS * 3]
    write_rows("rows.jsonl", rows)
    write_rows("held.jsonl", PAIRS)
    write_rows("held2.jsonl", PAIRS)
    plain = ["--dataset=rows.jsonl"]
    find_encoded(source(*plain), True)
    times = made()
    write_rows("rows.jsonl", rows)
    os.utime("rows.jsonl", (1, 1))
    find_encoded(source(*plain), True)
    assert made() == times

    changes = [
        source(*plain, template="{prompt}?"),
        source(*plain, tokenizer=Tokenizer.train(["Tom Tom"], 258)),
        source(*plain, text_rule=STRIPPED),
        source(*plain, T=T - 1),
        source(*plain, "--seed=3"),
        source(*plain, "--val_fraction=0.2"),
        source(*plain, "--val_dataset=held.jsonl"),
        source(*plain, "--val_dataset=held2.jsonl"),  # lines name the file
        source(*plain, together=2),
    ]
    for n, settings in enumerate(changes, 2):
        check(find_encoded(settings, True), settings)
        assert len(list(Path("data/.encoded").iterdir())) == n
    for name, changed, argv in ("held", PAIRS[1:], ["--val_dataset=held.jsonl"]), ("rows", rows[1:], []):
        write_rows(f"{name}.jsonl", changed)
        settings = source(*plain, *argv)
        check(find_encoded(settings, True), settings)
        n += 1
        assert len(list(Path("data/.encoded").iterdir())) == n
    assert not list(Path("data/.encoded").rglob(".*"))  # no lock, nothing half written


def test_the_kind_of_the_first_row_decides_the_template(folder):
    write_rows("rows.jsonl", PAIRS)
    plain, named = [source("--dataset=rows.jsonl", template=t) for t in ("", "{prompt}\n")]
    assert find_encoded(plain, True).template == "{prompt}\n"
    assert find_encoded(plain, True).rows_sha256 == find_encoded(named, True).rows_sha256
    write_rows("rows.jsonl", [*PAIRS * 20, chat(("user", "a"), ("assistant", "b"))])  # in another chunk
    with pytest.raises(Refusal, match="rows.jsonl line 1 has prompt and response, rows.jsonl line 401 "):
        find_encoded(source("--dataset=rows.jsonl", template=""), True)
    find_encoded(source("--dataset=rows.jsonl"), True)


def test_what_is_damaged_is_noticed_and_made_anew(folder, capsys):
    write_rows("rows.jsonl", PAIRS)
    settings = source("--dataset=rows.jsonl")
    find_encoded(settings, True)
    [rows] = Path("data/.encoded").glob("*/rows")
    names = sorted(path.name for path in rows.iterdir())
    assert len(names) == 10
    for name in names:
        for damage in "cut", "changed", "removed", "longer":
            path = rows / name
            content = bytearray(path.read_bytes())
            if damage == "removed":
                path.unlink()
            elif damage == "cut":
                path.write_bytes(content[:-1])
            elif damage == "longer":
                path.write_bytes(content + b"0")
            else:
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
            is_space = name == "meta.json" and damage == "cut"  # its last new line
            capsys.readouterr()
            check(find_encoded(settings, True), settings)
            out = capsys.readouterr().out
            assert ("rows is damaged" in out) != is_space, (name, damage)
            assert ("what was data/.encoded" in out) != is_space
    # of other rows, as if somebody had copied it
    write_rows("other.jsonl", PAIRS[:10])
    other = source("--dataset=other.jsonl")
    find_encoded(other, True)
    [theirs] = [path for path in Path("data/.encoded").glob("*/rows") if path != rows]
    rows.rename("aside")
    theirs.rename(rows)
    check(find_encoded(settings, True), settings)
    assert "rows is damaged (it is of other rows): it is made anew" in capsys.readouterr().out


def test_rows_that_change_while_they_are_read_are_refused(folder, monkeypatch):
    write_rows("rows.jsonl", PAIRS)
    whole = examples.make

    def make(*args):
        whole(*args)
        write_rows("rows.jsonl", PAIRS[:-1])

    monkeypatch.setattr(examples, "make", make)
    with pytest.raises(Refusal, match="rows.jsonl changed while it was read"):
        find_encoded(source("--dataset=rows.jsonl"), True)
    assert os.listdir() == ["rows.jsonl"]


def test_what_cannot_be_written_is_one_line(folder):
    write_rows("rows.jsonl", PAIRS)
    Path("data").write_text("a file")
    with pytest.raises(Refusal, match="cannot write data/.encoded/"):
        find_encoded(source("--dataset=rows.jsonl"), True)


def test_rows_of_the_hub_are_those_of_a_commit(folder, hub):
    for commit, rows in ("1", PAIRS), ("2", PAIRS[::-1]):
        hub.commit = commit
        for _ in range(2):  # the second time nobody reads them
            hub.splits = {"train": iter(rows)}
            encoded = find_encoded(source("--dataset=hf:me/rows"), True)
        assert len(list(hub.splits["train"])) == len(rows)
        hub.splits = {"train": rows}
        check(encoded, source("--dataset=hf:me/rows"))
    hub.commit, hub.splits = "3", {"train": PAIRS[:9], "validation": PAIRS[9:]}
    encoded = find_encoded(source("--dataset=hf:me/rows"), True)
    check(encoded, source("--dataset=hf:me/rows"))
    assert len(encoded.learn.examples) == 9


# Processes


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError(condition)


def test_a_kill_while_rows_are_encoded_leaves_nothing_that_is_read(shop):
    write_rows(shop / "many.jsonl", PAIRS * 500)
    argv = [
        *TINY,
        "--init_from=base",
        "--dataset=many.jsonl",
        "--val_dataset=rows.jsonl",
        "--max_iters=1",
    ]
    with contextlib.chdir(shop):
        before = set(Path("data/.encoded").glob("*"))
        process = start(shop, "finetune_lora", *argv, "--out_dir=killed")
        wait_until(lambda: list(Path("data/.encoded").glob("*/.rows.tmp-*/ids.bin")))
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
        [mine] = set(Path("data/.encoded").glob("*")) - before
        assert not (mine / "rows").exists()
        call(ft, *argv, "--out_dir=killed", "--overwrite")
        assert os.listdir(mine) == ["rows"]
        written = {path.name: path.read_bytes() for path in (mine / "rows").iterdir()}
        (mine / "rows").rename("killed-rows")
        call(ft, *argv, "--out_dir=alive")
        assert {path.name: path.read_bytes() for path in (mine / "rows").iterdir()} == written


def test_processes_and_runs_that_start_at_once_share_one_folder(shop):
    """Two processes of a run and a run of one, without a folder before; all learn the same."""
    write_rows(shop / "shared.jsonl", PAIRS * 100)
    argv = [*TINY, "--init_from=base", "--dataset=shared.jsonl", "--val_dataset=rows.jsonl"]
    argv += ["--gradient_accumulation_steps=2", "--max_iters=2", "--eval_interval=2"]
    with contextlib.chdir(shop):
        before = set(Path("data/.encoded").glob("*"))
        processes = [start(shop, "finetune_lora", *argv, "--out_dir=both", **env) for env in ranks(2)]
        processes.append(start(shop, "finetune_lora", *argv, "--out_dir=alone"))
        for process in processes:
            assert finish(process) == 0, error_output(shop, process)
        [mine] = set(Path("data/.encoded").glob("*")) - before
        assert os.listdir(mine) == ["rows"]
    both, alone = adapter(shop, "both"), adapter(shop, "alone")
    for key in "adapters", "optimizers", "val_loss":
        assert same(both[key], alone[key]), key
    assert log(shop, "both") == log(shop, "alone")
    out = (shop / f"out.{processes[1].pid}").read_text()
    assert out == ""  # the second process prints nothing, also where it waits


def test_rows_that_are_refused_are_refused_by_every_process(shop):
    write_rows(shop / "refused.jsonl", [*PAIRS * 200, {"prompt": "a", "response": 5}])
    argv = [*TINY, "--init_from=base", "--dataset=refused.jsonl", "--out_dir=refused"]
    before = files(shop / "data")
    for process in run_together(shop, "finetune_lora", 2, *argv, status=2):
        message = "finetune_lora.py: refused.jsonl line 4001: column 'response' is not text but 5\n"
        assert error_output(shop, process) == message
        assert (shop / f"out.{process.pid}").read_text().count("\n") <= 1  # who waited says so
    assert files(shop / "data") == before


def files(folder):
    """Returns the files in a folder, as of two processes at once an empty folder may stay."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def peak(folder, path):
    """Returns the most memory, in MiB, of a process that encodes a file of rows."""
    code = (
        "import sys, resource, examples\n"
        "from test_examples import source\n"
        "examples.find_encoded(source('--dataset=' + sys.argv[1]), True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


@pytest.mark.slow
def test_many_rows_take_little_more_memory_than_few(tmp_path):
    """200,000 short rows, of which the conversations alone would take 160 MiB as Python objects."""
    write_rows(tmp_path / "few.jsonl", PAIRS)
    write_rows(tmp_path / "many.jsonl", PAIRS * 10_000)
    assert peak(tmp_path, "many.jsonl") < peak(tmp_path, "few.jsonl") + 100
