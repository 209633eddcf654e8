"""What 65ab30d wrote, before the redesign, opens, writes the same text and goes on: tests/older has it.

There: `prepare.py --dataset=old.txt --name=old --vocab_size=280` of 300 short stories, `train.py --dataset=old --n_layer=1
--n_embd=16 --n_head=2 --block_size=48 --batch_size=8 --max_iters=300`, `finetune_lora.py --dataset=rows.jsonl --rank=4`
over it, and `export_onnx.py`. Its texts and losses, below, are those that 65ab30d itself wrote.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

import finetune_lora
import sample
import train
from config import configure

GREEDY = ["--max_new_tokens=30", "--temperature=0"]


@pytest.fixture
def older(tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(Path(__file__).parent / "older", folder)
    with contextlib.chdir(folder):
        yield folder


def last_figures(path):
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if "val_loss" in line
    ][-1]


@pytest.mark.parametrize(
    "argv, text",
    [
        (
            ["--out_dir=out", "--start=Tom was", "--device=cpu"],
            "Tom was sad. So Lily went home and was sad no more.",
        ),
        (["--onnx=out/onnx", "--start=Tom was"], "Tom was sad. So Lily went home and was sad no more."),
        (
            ["--adapter=lora", "--start=Lily was", "--device=cpu", "--max_new_tokens=2"],
            "Lily was\n no no",
        ),
    ],
)
def test_the_same_text(older, argv, text, capsys):
    sample.main(configure(sample.Config, [*GREEDY, *argv]))
    assert capsys.readouterr().out.split("-" * 80)[1].strip("\n") == text


def test_a_run_goes_on(older):
    # another warm-up than 20 steps: the rates are those of one run of 310, as 65ab30d had them
    argv = ["--out_dir=out", "--init_from=resume", "--max_iters=310", "--warmup_iters=21"]
    train.main(configure(train.Config, argv))
    figures = last_figures(older / "out/log.jsonl")
    assert figures["step"] == 310 and figures["val_loss"] == pytest.approx(0.23945545, rel=1e-3)


def test_fine_tuning_goes_on(older):
    argv = ["--out_dir=lora", "--init_from=resume", "--max_iters=210", "--warmup_iters=21"]
    finetune_lora.main(configure(finetune_lora.Config, argv))
    figures = last_figures(older / "lora/log.jsonl")
    assert figures["step"] == 210 and figures["val_loss"] == pytest.approx(0.7008724848429362, rel=1e-2)
