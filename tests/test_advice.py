"""Advice never leads in a circle: what a refusal says is done, until something is done."""

import contextlib
import re
import shutil
import sys

import pytest
import torch
from scripts import call
from test_train import SMALL, lab  # lab is a fixture

import checkpoint
import eval as evaluation
import export_onnx
import finetune_lora
import hf
import sample
import serve
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
    "serve": serve,
}
TRAIN = [*SMALL, "--n_layer=1", "--max_iters=2", "--eval_interval=2", "--block_size=64"]
TUNE = ["--dataset=rows.jsonl", "--max_iters=1", "--rank=2", "--device=cpu", "--dtype=float32"]
SHORT = {
    "train": TRAIN,
    "finetune_lora": TUNE,
    "sample": ["--max_new_tokens=2"],
    "eval": ["--num_samples=1", "--max_new_tokens=5", "--num_cases=22", "--resamples=1000"],
    "export_onnx": ["--seconds=0"],
    "hf": [],
    "serve": [],
}


@pytest.fixture(scope="module")
def states(lab, tmp_path_factory):
    """A folder with one folder for each state that a run can have left behind, and what is no run's."""
    with contextlib.chdir(lab):
        rows = '{"prompt": "Who?", "response": "The cat."}\n' * 8
        (lab / "rows.jsonl").write_text(rows)
        (lab / "story.txt").write_text("Once upon a time there was a cat. " * 40)
        run("train", *TRAIN, "--out_dir=both")
        run("finetune_lora", *TUNE, "--init_from=both", "--out_dir=adapter")
        run("finetune_lora", *TUNE, "--init_from=both", "--out_dir=tuned", "--rank=0")
        run("hf", "--out_dir=both", "--to=folder")
        run("hf", "--adapter=adapter", "--to=peft")
        run("export_onnx", "--out_dir=both", "--to=onnx", "--seconds=0")
        for name, files in {
            "best": ["both/ckpt_best.pt", "both/log.jsonl"],
            "last": ["both/ckpt.pt", "both/log.jsonl"],
            "log": ["both/log.jsonl"],
            "adapter-best": ["adapter/adapter_best.pt"],
            "tuned-best": ["tuned/ckpt_best.pt"],
            "empty": [],
        }.items():
            (lab / name).mkdir()
            for file in files:
                shutil.copy(file, name)
        shutil.copytree("adapter", "adapter-merged")
        run("finetune_lora", "--out_dir=adapter-merged", "--merge")
        (lab / "merged").mkdir()
        shutil.copy("adapter-merged/ckpt.pt", "merged")
        (lab / "foreign").mkdir()
        (lab / "foreign/thesis.txt").write_text("somebody's")
    return lab


def run(script, *argv):
    call(SCRIPTS[script], *argv)


FLAG = r"--[a-z_]+(?:=[^\s,;)]*[^\s,;:)])?"
# what a reader puts in the place of a word in capitals
WORDS = {
    "--init_from=FOLDER": "--init_from=both",
    "=FOLDER": "=to",
    "another --out_dir": "--out_dir=other",
    "OTHER": "other",
    "BASE": "both",
    "--out_dir=OUT ": "--out_dir=both ",
    "FILE": "story.txt",
}


def read_advice(script, argv, message):
    """Returns each (script, argv) that a refusal of script with argv advises: commands, flags for the same
    command, and another name for the folder.
    """
    for word, value in WORDS.items():
        message = message.replace(word, value)
    steps = []
    for command in re.finditer(rf"(?:python )?(\w+)\.py((?: {FLAG})+)", message):
        steps.append((command[1], command[2].split()))
    message = re.sub(rf"\w+\.py(?: {FLAG})+", "", message)
    for match in re.finditer(rf"{FLAG}(?: {FLAG})*", message):
        flags = match[0].split()
        keys = [flag.split("=")[0] for flag in flags]
        rest = [argument for argument in argv if argument.split("=")[0] not in keys]
        if "--init_from=resume" in flags:  # which takes all else from the run
            rest = [flag for flag in rest if flag.startswith("--out_dir") or flag == "--eval_only"]
        steps.append((script, [*rest, *flags]))
    for match in re.finditer(
        r"(\S+) holds .* is read as (\S+?),|it is read as (\S+?), without", message
    ):
        old, new = (match[1], match[2]) if match[1] else (f"hf:{match[3]}", match[3])
        steps.append((script, [argument.replace(f"={old}", f"={new}") for argument in argv]))
    return [(script, with_short(script, argv)) for script, argv in steps]


def with_short(script, argv):
    """Returns argv with what makes the script quick, but where it takes its settings from a run."""
    if "--init_from=resume" in argv or "--merge" in argv:
        return argv
    keys = {argument.split("=")[0] for argument in argv}
    return [*argv, *(flag for flag in SHORT[script] if flag.split("=")[0] not in keys)]


COMMANDS = [
    "train --out_dir={}",
    "train --out_dir={} --init_from=resume",
    "train --init_from={} --out_dir=new",
    "train --out_dir={} --init_from=resume --eval_only",
    "train --out_dir={} --eval_only",
    "finetune_lora --init_from={} --out_dir=new",
    "finetune_lora --init_from=both --out_dir={}",
    "finetune_lora --out_dir={} --init_from=resume",
    "finetune_lora --out_dir={} --merge",
    "sample --out_dir={}",
    "sample --adapter={}",
    "sample --out_dir=hf:{}",
    "sample --adapter=hf:{}",
    "hf --out_dir={} --to=new",
    "hf --adapter={} --to=new",
    "hf --adapter=hf:{} --to=new",
]
# exporting and evaluating take seconds
SLOW_COMMANDS = {
    "both": ["sample --onnx={}", "serve --model={}"],
    "gone": ["sample --onnx={}", "serve --model={}", "eval --out_dir={}", "export_onnx --out_dir={}"],
    "best": ["sample --onnx={}"],
    "folder": ["eval --out_dir={}", "export_onnx --out_dir={}"],
    "adapter": ["eval --out_dir={}", "export_onnx --out_dir={}"],
}
QUICK_STATES = ["empty", "log", "last", "adapter", "tuned", "folder", "onnx", "gone"]
SLOW_STATES = [
    "best",
    "both",
    "adapter-best",
    "adapter-merged",
    "merged",
    "tuned-best",
    "peft",
    "foreign",
]
STATES = QUICK_STATES + SLOW_STATES
QUICK = [(state, COMMANDS) for state in QUICK_STATES]
SLOW = [(state, COMMANDS) for state in SLOW_STATES] + list(SLOW_COMMANDS.items())


@pytest.fixture(scope="module")
def refusals():
    """What each command was refused with from the states as they are: {(script, *argv): message or None}."""
    return {}


@pytest.mark.parametrize(
    "state, commands", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_advice_that_is_followed_leads_to_something(states, refusals, state, commands, tmp_path):
    """Each piece of advice works, or what the next refusal advises does; each from the same state."""

    def refusal(script, argv):
        """Returns what a command is refused with, or None, in a fresh copy of all states."""
        key = (script, *argv)
        if key not in refusals:
            folder = tmp_path / str(len(refusals))
            folder.mkdir()
            for path in states.iterdir():
                if path.name in STATES:
                    shutil.copytree(path, folder / path.name)
            for name in "data", "rows.jsonl", "story.txt":
                (folder / name).symlink_to(states / name)
            with contextlib.chdir(folder):
                try:
                    refusals[key] = run(script, *argv)
                except Refusal as e:
                    refusals[key] = str(e)
            shutil.rmtree(folder)
        return refusals[key]

    for command in commands:
        if state == "gone" and "hf:" in command:  # a name of the hub then
            continue
        script, *argv = command.format(state).split()
        argv = with_short(script, argv)
        message = refusal(script, argv)
        for first in read_advice(script, argv, message or ""):
            second_message = refusal(*first)
            if second_message is None:
                continue
            seconds = read_advice(*first, second_message)
            story = f"{command}: {message} -> {first}: {second_message}"
            assert seconds, story
            for second in seconds:
                assert refusal(*second) is None, f"{story} -> {second}: {refusal(*second)}"


@pytest.mark.parametrize(
    "script, named",
    [
        ("finetune_lora", "finetune_lora"),
        ("finetune_dpo", "finetune_dpo"),
        ("finetune_reward", "finetune_reward"),
        ("finetune_ppo", "finetune_ppo"),
        ("sample", "finetune_lora"),
    ],
)
def test_the_script_that_tunes_names_itself(script, named, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(Refusal, match=f"; python {named}.py --init_from=BASE --out_dir=.* makes one"):
        checkpoint.find(str(tmp_path), "adapter.pt")
    (tmp_path / "adapter_best.pt").touch()
    with pytest.raises(Refusal, match=f", {named}.py --out_dir=.* --overwrite begins anew"):
        checkpoint.find(str(tmp_path), "adapter.pt")


def test_a_start_longer_than_the_context_is_refused_before_training(states, monkeypatch):
    monkeypatch.chdir(states)
    start = "once upon a time there was a day that lasted all day"
    with pytest.raises(Refusal, match="start has .* tokens and the context 8: shorten it"):
        run("train", *TRAIN, "--block_size=8", f"--start={start}", "--out_dir=new")
    tokenizer = Tokenizer.load("data/toy/tokenizer.json")
    n = len(prompt_ids(tokenizer, "once upon"))
    run("train", *TRAIN, f"--block_size={n}", "--start=once upon", "--out_dir=fits")
    # --eval_only writes no samples
    ckpt = torch.load("fits/ckpt.pt")
    ckpt["config"]["start"] = start
    torch.save(ckpt, "fits/ckpt.pt")
    run("train", "--out_dir=fits", "--init_from=resume", "--eval_only")
    with pytest.raises(Refusal, match="leave it out with --start="):
        run("train", "--out_dir=fits", "--init_from=resume")
    run("train", "--out_dir=fits", "--init_from=resume", "--start=")
