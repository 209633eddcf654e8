"""The promise: an idea is one class and one line; strange ones go through all scripts."""

import time
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scripts import call, printed, written
from test_model import GRID, build, cached, exactly, tokens
from test_prepare import write_rows
from test_train import SMALL, same

import checkpoint_file
import eval as evaluation
import export_onnx
import finetune_lora
import hf
import model
import prepare
import rope_scaling
import sample
import train
from config import Refusal
from model import Attention, ModelConfig, RoPE, Transformer
from sizes import model_sizes, num_params
from tokenizer import Tokenizer

PAIRS = [
    {"prompt": f"Why is Tom {mood}?", "response": f"{mood.capitalize()} he is."}
    for mood in ("sad", "glad", "slow")
]


class ScaleNorm(nn.Module):
    """x / |x| times one number (Nguyen & Salazar 2019): its only parameter has no dimension."""

    def __init__(self, dim, eps, bias=False):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(dim**0.5))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) * self.gain


class SquaredReLU(nn.Module):
    """Two matrices (So et al. 2021), and a third parameter of three dimensions, as experts have them."""

    def __init__(self, c):
        super().__init__()
        self.up_proj = nn.Linear(c.n_embd, c.n_inner)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd)
        self.mix = nn.Parameter(torch.ones(2, 1, c.n_inner))

    @staticmethod
    def inner_width(n_embd):
        return 3 * n_embd

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square() * self.mix.mean(0))


class Parallel(nn.Module):
    """GPT-J's layout: attention and MLP side by side, after one norm."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm1 = model.NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.attn = Attention(c, layer)
        self.mlp = model.MLPS[c.mlp](c)

    def forward(self, x, context):
        y = self.norm1(x)
        return x + self.attn(y, context) + self.mlp(y)


class Slope(nn.Module):
    """ALiBi with one slope, which is learned."""

    part = "bias"

    def __init__(self, c):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, distance):
        bias = self.slope * distance.float()
        return bias[None] if bias.dim() == 2 else bias  # (1, T, S) or (B, 1, T, S)


class SlowRoPE(RoPE):
    """RoPE at half the speed."""

    def __init__(self, c):
        model.Float32Tables.__init__(self, c, rope_scaling.rope_frequencies(c) / 2)


class Ramp(nn.Module):
    """A learned direction, further along it with each position."""

    part = "add"

    def __init__(self, c):
        super().__init__()
        self.direction = nn.Parameter(torch.ones(c.n_embd))

    def forward(self, x, pos):
        return x + 0.01 * pos[..., None] * self.direction


STRANGE = ["--norm=scalenorm", "--mlp=relu2", "--norm_position=parallel", "--bias"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(model.NORMS, "scalenorm", ScaleNorm)
    monkeypatch.setitem(model.MLPS, "relu2", SquaredReLU)
    monkeypatch.setitem(model.BLOCKS, "parallel", Parallel)
    for name, position in ("slope", Slope), ("slowrope", SlowRoPE), ("ramp", Ramp):
        monkeypatch.setitem(model.POSITIONS, name, position)


SLOW = [pytest.param(pos, marks=pytest.mark.slow) for pos in ("slowrope", "ramp")]


@pytest.mark.parametrize("pos", ["slope", *SLOW])
def test_strange_classes_go_through_every_script(pos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(prepare, "--num_stories=400", "--num_proc=1")
    shape = [*STRANGE, f"--pos={pos}", "--block_size=48", "--n_head=4", "--n_kv_head=2"]
    call(train, *SMALL, *shape, "--max_iters=8", "--out_dir=whole")
    call(train, *SMALL, *shape, "--max_iters=4", "--lr_decay_iters=8", "--out_dir=parts")
    call(train, "--out_dir=parts", "--init_from=resume", "--max_iters=8")
    whole = checkpoint_file.load("whole/ckpt.pt")
    parts = checkpoint_file.load("parts/ckpt.pt")
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    trained, _ = checkpoint_file.restore(whole, "whole")
    assert type(trained.norm) is ScaleNorm
    assert trained.config.n_inner == 96
    untrained = Transformer(trained.config).state_dict()
    learned = {"slope": "score_bias.slope", "ramp": "add_pos.direction", "slowrope": "norm.gain"}
    for name in learned[pos], "blocks.0.mlp.mix", "blocks.1.norm1.gain":
        assert not torch.equal(whole["model"][name], untrained[name]), name

    greedy = ["--temperature=0", "--start=Once", "--max_new_tokens=30"]
    text = written(printed(capsys, sample, "--out_dir=whole", "--device=cpu", *greedy))
    call(export_onnx, "--out_dir=whole", "--seconds=0")
    assert written(printed(capsys, sample, "--onnx=whole/onnx", *greedy)) == text

    few = ["--num_samples=1", "--max_new_tokens=8", "--num_cases=22", "--resamples=1000"]
    figures = printed(capsys, evaluation, "--out_dir=whole", "--device=cpu", *few)
    assert '"loss"' in figures.splitlines()[-1]

    write_rows("rows.jsonl", PAIRS)
    brief = ["--max_iters=2", "--batch_size=2", "--rank=2", "--device=cpu"]
    call(finetune_lora, "--init_from=whole", "--dataset=rows.jsonl", *brief, "--out_dir=lora")
    call(sample, "--adapter=lora", "--device=cpu", "--start=Why?", "--max_new_tokens=4")
    with pytest.raises(Refusal, match="scalenorm|relu2|parallel|pos=" + pos):
        call(hf, "--out_dir=whole", "--to=whole-hf")


@pytest.mark.parametrize("pos", ["slope", "slowrope", "ramp"])
def test_strange_classes_are_cached_as_exactly(pos):
    """The identities of the grid, for a model that it does not have."""
    strange = build("scalenorm", "parallel", pos, "relu2", 2).double()
    idx = tokens()
    doc = torch.tensor([[0] * 6 + [1] * 10] * 2)
    with torch.no_grad():
        exactly(cached(strange, idx, [5, 1, 10], strange.new_cache(2, 24)), strange(idx)[0])
        exactly(strange(idx, doc=doc)[0][:, 6:], strange(idx[:, 6:])[0])


def test_sizes_are_right_for_every_class():
    combinations = [*GRID[::7]]
    for pos in "slope", "slowrope", "ramp":
        combinations.append(("scalenorm", "parallel", pos, "relu2", 4, True, True))
    for combination in combinations:
        whole = build(*combination, n_layer=3)
        sizes = model_sizes(whole.config)
        assert sizes.parameters == num_params(whole), combination
        assert sizes.buffers == sum(b.numel() for b in whole.buffers()), combination


def test_a_position_without_a_part_is_refused(monkeypatch):
    monkeypatch.setitem(model.POSITIONS, "silent", nn.Identity)
    with pytest.raises(ValueError, match="must say its part"):
        Transformer(ModelConfig(vocab_size=10, pos="silent"))


@pytest.mark.parametrize(
    "hostile",
    [
        {"n_layer": 10**7},
        {"n_embd": 10**7, "n_head": 1, "n_kv_head": 1},
        {"block_size": 10**7, "head_dim": 10**6},
    ],
)
def test_a_hostile_size_is_refused_before_anything_is_made(hostile):
    small = build()
    tokenizer = Tokenizer.train(["abc"], 257)
    ckpt = {
        "model": small.state_dict(),
        "model_config": asdict(small.config) | {"vocab_size": 257} | hostile,
        "tokenizer": tokenizer.to_str(),
        "tokenizer_sha256": tokenizer.sha256,
    }
    start = time.perf_counter()
    with pytest.raises(Refusal, match="fewer than|larger machine|cannot be made"):
        checkpoint_file.restore(ckpt, "hostile.pt")
    assert time.perf_counter() - start < 30  # a model that is made takes minutes, and all memory
