"""Checkpoints: whole, safe, atomic."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT
from test_model import redraw

import checkpoint
from config import Refusal
from model import ModelConfig, Transformer
from tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint, and the model and the tokenizer in it."""
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, 270)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2)
    model = redraw(Transformer(config))
    path = str(tmp_path / "ckpt.pt")
    checkpoint.save(path, model, tokenizer, {"seed": 1}, checkpoint.RunState(7, 2.5, 2.25))
    return path, model, tokenizer


def test_a_checkpoint_restores_model_tokenizer_and_state(saved):
    path, model, tokenizer = saved
    ckpt = checkpoint.load(path)
    assert ckpt["step"] == 7
    assert ckpt["val_loss"] == 2.5
    assert ckpt["best_val_loss"] == 2.25
    assert ckpt["config"] == {"seed": 1}
    restored, restored_tokenizer = checkpoint.restore(ckpt, path)
    idx = torch.arange(20)[None]
    assert torch.equal(restored(idx)[0], model.eval()(idx)[0])
    assert restored.head.weight is restored.wte.weight
    assert not restored.training
    assert restored_tokenizer.to_str() == tokenizer.to_str()
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]


def test_a_compiled_model_is_saved_unwrapped(saved):
    path, model, tokenizer = saved
    checkpoint.save(path, torch.compile(model), tokenizer, {}, checkpoint.RunState(1, 1, 1))
    assert checkpoint.load(path)["model"].keys() == model.state_dict().keys()


def test_code_in_a_checkpoint_is_refused_and_does_not_run(saved, tmp_path):
    path, *_ = saved
    mark = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    with_code = checkpoint.load(path) | {"config": Touch()}
    for write in (
        lambda: torch.save(with_code, path),
        lambda: Path(path).write_bytes(pickle.dumps(Touch())),
    ):
        write()
        with pytest.raises(Refusal, match="not a checkpoint that is safe to read"):
            checkpoint.load(path)
        assert not mark.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format=99), "format 99"),
        (lambda c: c.pop("format"), "not a TinyLM checkpoint"),
        (lambda c: c.pop("model"), "model"),
        (lambda c: c.update(step="7"), "step"),
        (lambda c: c["model"].pop("norm.weight"), "norm.weight|Error"),
        (lambda c: c["model_config"].update(n_layer=3), "damaged"),
        (lambda c: c["model_config"].update(color=3), "color"),
        (lambda c: c.update(tokenizer_sha256="0" * 64), "tokenizer"),
        (lambda c: c.update(tokenizer="{}"), "damaged"),
    ],
)
def test_damage_is_one_line(saved, change, message):
    path, *_ = saved
    ckpt = checkpoint.load(path)
    change(ckpt)
    torch.save(ckpt, path)
    with pytest.raises(Refusal, match=message) as e:
        checkpoint.restore(checkpoint.load(path), path)
    assert e.value.status == 2
    assert "\n" not in str(e.value)


def test_truncated_empty_and_foreign_files_are_one_line(saved, tmp_path):
    whole = Path(saved[0]).read_bytes()
    path = tmp_path / "bad.pt"
    for content in (
        whole[: len(whole) // 2],
        whole[:100],
        b"",
        b"hello world",
        b"\x80\x02.",
        pickle.dumps([1, 2]),
    ):
        path.write_bytes(content)
        with pytest.raises(Refusal) as e:
            checkpoint.load(str(path))
        assert "\n" not in str(e.value)
    with pytest.raises(Refusal, match="cannot read"):
        checkpoint.load(str(tmp_path / "none.pt"))
    with pytest.raises(Refusal, match="no checkpoint in"):
        checkpoint.find(str(tmp_path / "nowhere"))


def test_a_write_that_fails_leaves_the_old_file(saved):
    """A full disk, by a limit on the size of files: torch then raises RuntimeError."""
    path, *_ = saved
    before = Path(path).read_bytes()
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, config
ckpt = checkpoint.load({path!r})
model, tokenizer = checkpoint.restore(ckpt, {path!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    checkpoint.save({path!r}, model, tokenizer, {{}}, checkpoint.RunState(8, 1, 1))
except config.Refusal as e:
    print(e.status, e)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith("1 cannot write"), result.stderr
    assert result.stdout.count("\n") == 1
    assert Path(path).read_bytes() == before
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]


def test_best_is_preferred_for_reading_and_last_for_resuming(tmp_path):
    last, best = tmp_path / "ckpt.pt", tmp_path / "ckpt_best.pt"
    last.touch()
    best.touch()
    assert checkpoint.find(str(tmp_path)) == str(best)
    assert checkpoint.find(str(tmp_path), "ckpt.pt") == str(last)
    assert checkpoint.find(str(last)) == str(last)
    best.unlink()
    assert checkpoint.find(str(tmp_path)) == str(last)
