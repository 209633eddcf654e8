"""Files of 65ab30d, before the redesign, open, give the same text and go on: tests/older holds them.

They are from `prepare.py --dataset=old.txt --name=old --vocab_size=280` of 300 short stories, `train.py
--dataset=old --n_layer=1 --n_embd=16 --n_head=2 --block_size=48 --batch_size=8 --max_iters=300`,
`finetune_lora.py --dataset=rows.jsonl --rank=4` over it, and `export_onnx.py`. The texts and losses
below are 65ab30d's own.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from scripts import call, printed, written

import finetune_lora
import sample
import train

STORY = "Tom was sad. So Lily went home and was sad no more."


@pytest.fixture
def older(tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(Path(__file__).parent / "older", folder)
    with contextlib.chdir(folder):
        yield folder


def last_figures(path):
    """Returns the last line of a log that has a val_loss."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads([line for line in lines if "val_loss" in line][-1])


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--out_dir=out", "--start=Tom was", "--device=cpu", "--max_new_tokens=30"], STORY),
        (["--onnx=out/onnx", "--start=Tom was", "--max_new_tokens=30"], STORY),
        (
            ["--adapter=lora", "--start=Lily was", "--device=cpu", "--max_new_tokens=2"],
            "Lily was\n no no",
        ),
    ],
)
def test_the_same_text(older, argv, text, capsys):
    assert written(printed(capsys, sample, "--temperature=0", *argv)).strip("\n") == text


def test_a_run_goes_on(older):
    # another warm-up than 20 steps: the rates are those of one run of 310, as 65ab30d had them
    call(train, "--out_dir=out", "--init_from=resume", "--max_iters=310", "--warmup_iters=21")
    figures = last_figures(older / "out/log.jsonl")
    assert figures["step"] == 310
    assert figures["val_loss"] == pytest.approx(0.23945545, rel=1e-3)


def test_fine_tuning_goes_on(older):
    call(finetune_lora, "--out_dir=lora", "--init_from=resume", "--max_iters=210", "--warmup_iters=21")
    figures = last_figures(older / "lora/log.jsonl")
    assert figures["step"] == 210
    assert figures["val_loss"] == pytest.approx(0.7008724848429362, rel=1e-2)
