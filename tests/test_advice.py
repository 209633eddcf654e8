"""Advice never leads in a circle: what a refusal says is done, until something is done."""

import contextlib
import re
import shlex
import shutil

import pytest
from scripts import call
from test_train import SMALL, lab  # lab is a fixture

import eval as evaluation
import export_onnx
import finetune_lora
import hf
import sample
import train
from config import Refusal
from data import prompt_ids
from tokenizer import Tokenizer

SCRIPTS = {
    "train": train,
    "finetune_lora": finetune_lora,
    "sample": sample,
    "eval": evaluation,
    "export_onnx": export_onnx,
    "hf": hf,
}
TRAIN = [*SMALL, "--max_iters=2", "--eval_interval=2", "--block_size=64"]
TUNE = ["--dataset=rows.jsonl", "--max_iters=1", "--rank=2", "--device=cpu", "--dtype=float32"]
SHORT = {
    "train": TRAIN,
    "finetune_lora": TUNE,
    "sample": ["--max_new_tokens=2"],
    "eval": [],
    "export_onnx": ["--seconds=0"],
    "hf": [],
}


@pytest.fixture(scope="module")
def states(lab, tmp_path_factory):
    """A folder with one folder for each state that a run can have left behind."""
    with contextlib.chdir(lab):
        rows = '{"prompt": "Who?", "response": "The cat."}\n' * 8
        (lab / "rows.jsonl").write_text(rows)
        run("train", *TRAIN, "--out_dir=both")
        run("finetune_lora", *TUNE, "--init_from=both", "--out_dir=adapter")
        run("hf", "--out_dir=both", "--to=folder")
        for name, files in {
            "best": ["ckpt_best.pt", "log.jsonl"],
            "last": ["ckpt.pt", "log.jsonl"],
            "log": ["log.jsonl"],
        }.items():
            (lab / name).mkdir()
            for file in files:
                (lab / name / file).write_bytes((lab / "both" / file).read_bytes())
        (lab / "adapter-best").mkdir()
        content = (lab / "adapter/adapter_best.pt").read_bytes()
        (lab / "adapter-best/adapter_best.pt").write_bytes(content)
        (lab / "empty").mkdir()
        run("finetune_lora", "--out_dir=adapter", "--merge")
        (lab / "merged").mkdir()
        (lab / "adapter/ckpt.pt").rename(lab / "merged/ckpt.pt")
    return lab


def run(script, *argv):
    call(SCRIPTS[script], *argv)


def follow(script, argv, message):
    """Returns (script, argv) of the first piece of advice in a refusal."""
    command = re.search(r"(?:python )?(\w+)\.py((?: --[\w.]+(?:=[^\s,;)]+)?)+)", message)
    if command:
        script = command[1]
        return script, [*shlex.split(command[2]), *SHORT[script]]
    flags = re.search(r"--[\w.]+(?:=[^\s,;)]+)?(?: --[\w.]+(?:=[^\s,;)]+)?)*", message)
    if not flags:
        return None
    keys = [flag.split("=")[0] for flag in shlex.split(flags[0])]
    rest = [argument for argument in argv if argument.split("=")[0] not in keys]
    if "--init_from=resume" in flags[0]:  # which takes all else from the run
        rest = [argument for argument in rest if argument.startswith("--out_dir")]
    return script, [*rest, *shlex.split(flags[0])]


COMMANDS = {
    "train": ["--out_dir={}"],
    "train resume": ["--out_dir={}", "--init_from=resume"],
    "train start": ["--init_from={}", "--out_dir=new"],
    "finetune_lora": ["--init_from={}", "--out_dir=new"],
    "finetune_lora into": ["--init_from=both", "--out_dir={}"],
    "finetune_lora resume": ["--out_dir={}", "--init_from=resume"],
    "sample": ["--out_dir={}"],
    "sample adapter": ["--adapter={}"],
    "sample hf": ["--out_dir=hf:{}"],
    "hf": ["--out_dir={}", "--to=new"],
}
STATES = ["empty", "log", "best", "last", "both", "adapter", "adapter-best", "merged", "folder", "gone"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("command", COMMANDS)
def test_advice_that_is_followed_leads_to_something(states, command, state, tmp_path, monkeypatch):
    """In two steps at most; where a refusal only says what is wrong, that is an end too."""
    folder = tmp_path / "lab"
    folder.mkdir()
    for path in states.iterdir():
        if path.name in (*STATES, "rows.jsonl"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
    (folder / "data").symlink_to(states / "data")
    monkeypatch.chdir(folder)
    script = command.split()[0]
    short = [] if "resume" in command else SHORT[script]
    argv = [*(part.format(state) for part in COMMANDS[command]), *short]
    messages = []
    for _ in range(4):
        try:
            run(script, *argv)
            return
        except Refusal as e:
            messages.append(str(e))
        advice = follow(script, argv, messages[-1].replace("OTHER", "other").replace("FOLDER", "to"))
        if advice is None:
            return
        script, argv = advice
        if any("BASE" in argument for argument in argv):
            argv = [argument.replace("BASE", "both") for argument in argv]
    raise AssertionError(f"advice in a circle: {messages}")


def test_a_start_longer_than_the_context_is_refused_before_training(states, monkeypatch):
    monkeypatch.chdir(states)
    start = "once upon a time there was a day that lasted all day"
    with pytest.raises(Refusal, match="start has .* tokens and the context 8: shorten it"):
        run("train", *TRAIN, "--block_size=8", f"--start={start}", "--out_dir=new")
    tokenizer = Tokenizer.load("data/toy/tokenizer.json")
    n = len(prompt_ids(tokenizer, "once upon"))
    run("train", *TRAIN, f"--block_size={n}", "--start=once upon", "--out_dir=fits")
