"""A user's mistakes in all scripts: one line with advice, exit status 2, and nothing changed on disk."""

import contextlib
import hashlib
import json
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import call, shell
from test_prepare import DOCS, write, write_jsonl, write_parquet, write_txt
from test_train import SMALL

import bench
import checkpoint_file
import eval as evaluation
import export_onnx
import finetune_lora
import hf
import onnx_model
import prepare
import sample
import serve
import train
from config import run
from interop import hf_config
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

SCRIPTS = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "bench": bench,
    "eval": evaluation,
    "finetune_lora": finetune_lora,
    "export_onnx": export_onnx,
    "hf": hf,
    "serve": serve,
}
WORDS = {"bench": bench.BENCHES}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with good data, a good checkpoint, and files that are broken in all ways."""
    folder = tmp_path_factory.mktemp("shop")
    make_texts(folder)
    make_checkpoints(folder)
    make_datasets(folder)
    make_rows(folder)
    make_adapters(folder)
    make_onnx_folders(folder)
    make_hf_folders(folder)
    return folder


def make_texts(folder):
    """Makes data/toy, a checkpoint of it in out, and texts, TOML files and tokenizers."""
    with contextlib.chdir(folder):
        call(prepare, "--num_stories=2000", "--num_proc=1")
        call(train, *SMALL, "--max_iters=1", "--block_size=32")
        write_txt("good.txt", DOCS)
        write_jsonl("good.jsonl", DOCS)
        write_parquet("good.parquet", DOCS)
        write("empty.txt", "")
        write("blank.txt", " \n<|endoftext|>\n")
        write("short.txt", "abcdefghij")
        write("x.csv", "a,b")
        write("x.xml", "<a/>")
        Path("folder").mkdir()
        Path("latin.txt").write_bytes(b"caf\xe9 " * 10)
        Path("latin.toml").write_bytes(b'out_dir = "caf\xe9"')
        Path("binary.txt").write_bytes(bytes(range(256)) * 10)
        write("bad.jsonl", '{"text": "a"}\n{"text": \n')
        write("cut.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": \n')
        write("list.jsonl", "[1, 2]\n")
        write("number.jsonl", '{"text": 5}\n')
        write("half.jsonl", '{"text": "\\ud83d"}\n')
        write("bad.parquet", "PAR1 but not really")
        write("tokenizer.json", "{}")
        write("data/taken/x", "")
        write("foreign/report.html", "<p>somebody's page")
        write("a_file", "in the way")
        Tokenizer.char(["abc"]).save("abc.json")
        for name, text in {
            "broken": "n_layer = ",
            "unknown": "n_layers = 3",
            "type": 'n_layer = "3"',
            "float": "n_layer = 3.0",
            "table": "[model]\nn_layer = 3",
            "list": "n_layer = [3]",
            "twice": "n_layer = 3\nn_layer = 4",
            "nan": "learning_rate = nan",
            "vocab": "vocab_size = 300",
        }.items():
            write(f"{name}.toml", text)


def make_checkpoints(folder):
    """Makes broken checkpoints, and good ones that do not fit a script."""
    with contextlib.chdir(folder):
        write("empty.pt", "")
        write("text.pt", "hello")
        Path("pickle.pt").write_bytes(pickle.dumps({"format": 1}))
        Path("truncated.pt").write_bytes(Path("out/ckpt.pt").read_bytes()[:5000])
        good = checkpoint_file.load("out/ckpt.pt")
        good_model = good["model_config"]
        down = "blocks.1.mlp.down_proj.weight"
        changes = {
            "version": {"format": 99},
            "shape": {"model_config": good["model_config"] | {"n_layer": 3}},
            "step": {"step": "1"},
            "huge": {"model_config": good["model_config"] | {"n_layer": 10**6}},
            "theta": {"model_config": good["model_config"] | {"rope_theta": 10**30}},
            "other_tokenizer": {"tokenizer": Tokenizer.char(["abc"]).to_str()},
            "hash": {"tokenizer_sha256": "0" * 64},
            "optimizers": {"optimizers": [{}, {}]},
            "config": {"config": good["config"] | {"batch_size": 2.5}},
            "losses": {"losses": ["a"]},
            "moments": {"optimizers": [cut_moments(state) for state in good["optimizers"]]},
            "large": {"config": good["config"] | {"eval_tokens": 10**400}},
            "start": {"config": {"start": 5, "given": 1}},
            "model": {"model": {"a": 1}},
            "gone": {"config": good["config"] | {"dataset": "nowhere"}},
            "broken_data": {"config": good["config"] | {"dataset": "changed_bin"}},
            "other_data": {"config": good["config"] | {"dataset": "chars"}},
            "elsewhere": {"config": good["config"] | {"dataset": "chars"}, "tokenizer_sha256": "0" * 64},
            "tuned": {"config": good["config"] | {"rows_sha256": "0", "task": "fine-tuning"}},
            "logged": {"config": good["config"] | {"wandb_log": True}},
            "nan": {"model": {k: w * torch.nan for k, w in good["model"].items()}},
            "infinite": {"model": good["model"] | {down: good["model"][down] / 0}},
            "integer": {"model": good["model"] | {"norm.weight": good["model"]["norm.weight"].long()}},
            "complex": {"model": good["model"] | {"norm.weight": good["model"]["norm.weight"] + 0j}},
            "negative": {"step": -5},
            "nan_loss": {"val_loss": torch.nan},
            "no_loss": {"best_val_loss": torch.inf},
        }
        for name, change in changes.items():
            Path(name).mkdir()
            torch.save(good | change, f"{name}/ckpt.pt")
        Path("code").mkdir()
        torch.save(good | {"config": Touch()}, "code/ckpt.pt")
        Path("merged").mkdir()
        torch.save(good | {"config": {}, "optimizers": []}, "merged/ckpt.pt")
        torch.save(good | {"model_config": good_model | {"block_size": 4}}, "tiny.pt")
        post = Transformer(ModelConfig(**good_model | {"norm_position": "post"}))
        save_untrained("post.pt", post, Tokenizer.load("data/toy/tokenizer.json"))


def cut_moments(state):
    """Returns an optimizer's state with moments that do not have their parameter's shape."""
    cut = {}
    for i, moments in state["state"].items():
        cut[i] = {key: x[..., :1] if x.dim() else x for key, x in moments.items()}
    return state | {"state": cut}


def save_untrained(path, model, tokenizer):
    checkpoint_file.save(path, model, tokenizer, {}, checkpoint_file.RunState(1, 1.0, 1.0))


def make_datasets(folder):
    """Makes broken copies of data/toy, data/chars, and a checkpoint with the tokenizer of that."""
    with contextlib.chdir(folder):
        for name in (
            "no_meta",
            "meta_text",
            "version_meta",
            "short_bin",
            "changed_bin",
            "odd_bin",
            "no_tokenizer",
            "foreign_tokenizer",
            "big_ids",
        ):
            shutil.copytree("data/toy", f"data/{name}")
        Path("data/no_meta/meta.json").unlink()
        write("data/meta_text/meta.json", "hello")
        meta = json.loads(Path("data/toy/meta.json").read_text())
        write("data/version_meta/meta.json", json.dumps(meta | {"format": 99}))
        whole = Path("data/toy/train.bin").read_bytes()
        Path("data/short_bin/train.bin").write_bytes(whole[:1000])
        Path("data/odd_bin/train.bin").write_bytes(whole[:1001])
        Path("data/changed_bin/train.bin").write_bytes(whole[:-2] + b"\x07\x00")
        Path("data/no_tokenizer/tokenizer.json").unlink()
        Tokenizer.train(DOCS, 300).save("data/foreign_tokenizer/tokenizer.json")
        big = np.full(len(whole) // 2, 5000, "<u2").tobytes()
        Path("data/big_ids/train.bin").write_bytes(big)
        meta["splits"]["train"]["files"][0]["sha256"] = hashlib.sha256(big).hexdigest()
        write("data/big_ids/meta.json", json.dumps(meta))
        call(prepare, "--dataset=good.txt", "--tokenizer=char", "--name=chars")
        chars = Tokenizer.load("data/chars/tokenizer.json")
        shape = checkpoint_file.load("out/ckpt.pt")["model_config"] | {"vocab_size": chars.vocab_size}
        save_untrained("chars.pt", Transformer(ModelConfig(**shape)), chars)


def make_rows(folder):
    """Makes files of rows to tune on."""
    with contextlib.chdir(folder):
        pair = {"prompt": "a", "response": "b"}
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        for name, rows in {
            "pairs": [pair] * 20,
            "other_rows": [{"question": "a"}],
            "half_pair": [pair, {"prompt": "a"}],
            "number": [{"prompt": "a", "response": 5}],
            "role": [chat, {"messages": [{"role": "critic", "content": "a"}]}],
            "no_role": [{"messages": ["a"]}],
            "no_list": [{"messages": 5}],
            "scalar": [pair, 5],
            "one": [pair],
            "mute": [{"prompt": "a", "response": ""}] * 20,
            "none": [],
            "object": pair,
            "long_rows": [{"prompt": "a" * 999, "response": "b"}] * 20,
        }.items():
            write(f"{name}.json", json.dumps(rows))
        write("broken.json", '[{"prompt": "a"')
        Path("latin.json").write_bytes(b'["caf\xe9"]')


def make_adapters(folder):
    """Makes adapters over out in lora, and broken copies."""
    with contextlib.chdir(folder):
        argv = ["--max_iters=1", "--rank=2", "--out_dir=lora", "--device=cpu"]
        call(finetune_lora, "--dataset=pairs.json", *argv)
        good = checkpoint_file.load("lora/adapter.pt", checkpoint_file.ADAPTER_KEYS)
        first = next(iter(good["adapters"]))
        for name, change in {
            "a_version": {"format": 9},
            "a_shape": {"adapters": good["adapters"] | {first: torch.zeros(3, 3)}},
            "a_layers": {"adapters": {"x.A": torch.zeros(2)}},
            "a_rank": {"config": good["config"] | {"rank": 10**9}},
            "a_config": {"config": {}},
            "a_base": {"base_sha256": "0" * 64},
            "a_gone": {"base": "moved/ckpt.pt"},
            "a_key": {"adapters": 5},
            "a_nan": {"adapters": good["adapters"] | {first: good["adapters"][first] * torch.nan}},
            "a_integer": {"adapters": good["adapters"] | {first: good["adapters"][first].long()}},
            "a_code": {"config": Touch()},
        }.items():
            Path(name).mkdir()
            torch.save(good | change, f"{name}/adapter.pt")
        Path("a_cut").mkdir()
        Path("a_cut/adapter.pt").write_bytes(Path("lora/adapter.pt").read_bytes()[:3000])


def make_onnx_folders(folder):
    """Makes o_good, and broken copies."""
    with contextlib.chdir(folder):
        model, tokenizer = checkpoint_file.restore(checkpoint_file.load("out/ckpt.pt"), "out")
        good = onnx_model.describe(model.config, tokenizer, "", "", "whose")
        graph = onnx_folder("o_good", good, tokenizer)
        for name, change in {
            "o_format": {"format": 9},
            "o_layers": {"model": good["model"] | {"n_layer": 3}, "n_layer": 3},
            "o_unlike": {"n_layer": 3},
            "o_model": {"model": {"a": 1}},
            "o_shape": {"model": good["model"] | {"n_layer": "2"}},
            "o_deep": {"model": good["model"] | {"n_layer": 10**7}, "n_layer": 10**7},
            "o_heads": {"model": good["model"] | {"n_kv_head": 1}, "n_kv_head": 1},
            "o_start": {"start": 5},
            "o_float": {"model": good["model"] | {"n_layer": 2.0}},
            "o_other": {"fingerprint": "another"},
        }.items():
            onnx_folder(name, good, tokenizer)
            write(f"{name}/config.json", json.dumps(good | change))
        other = Tokenizer.train(DOCS, 300)
        onnx_folder("o_tokenizer", good, other)
        onnx_folder("o_vocab", good | {"tokenizer_sha256": other.sha256}, other)
        for name, file, content in (
            ("o_cut", "model.onnx", graph[: len(graph) // 2]),
            ("o_text", "model.onnx", b"hello"),
            ("o_empty", "model.onnx", b""),
            ("o_json", "config.json", b"{"),
            ("o_list", "config.json", b"[]"),
            ("o_latin", "config.json", b'{"a": "caf\xe9"}'),
            ("o_tok", "tokenizer.json", b"{}"),
        ):
            onnx_folder(name, good, tokenizer)
            Path(name, file).write_bytes(content)
        for name, file in (
            ("o_no_model", "model.onnx"),
            ("o_no_config", "config.json"),
            ("o_no_tokenizer", "tokenizer.json"),
        ):
            onnx_folder(name, good, tokenizer)
            Path(name, file).unlink()


def make_hf_folders(folder):
    """Makes a folder of transformers and one of peft, and broken and foreign ones."""
    with contextlib.chdir(folder):
        for name, config in {
            "empty_hf": None,
            "gemma3": {"model_type": "gemma3"},
            "no_sizes": {"model_type": "llama"},
            "list_hf": [1],
            "moe": {"model_type": "llama", "num_local_experts": 8},
            "no_tensors": hf_config.write_config("llama", ModelConfig(vocab_size=99, qk_norm=False)),
        }.items():
            Path(name).mkdir()
            if config is not None:
                write(f"{name}/config.json", json.dumps(config))
        shutil.copy("data/toy/tokenizer.json", "no_tensors/tokenizer.json")
        write("no_tensors/tokenizer_config.json", '{"eos_token": "<|endoftext|>"}')
        Path("half_hf").mkdir()
        write("half_hf/config.json", '{"model_type": ')
        call(hf, "--out_dir=out", "--to=good_hf")
        for name in "cut_hf", "no_tokenizer_hf":
            shutil.copytree("good_hf", name)
        whole = Path("good_hf/model.safetensors").read_bytes()
        Path("cut_hf/model.safetensors").write_bytes(whole[:999])
        Path("no_tokenizer_hf/tokenizer.json").unlink()
        call(hf, "--adapter=lora", "--to=good_peft")
        spoil("good_hf", "nan_hf", "model.safetensors", "model.norm.weight")
        lora_B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
        spoil("good_peft", "nan_peft", "adapter_model.safetensors", lora_B)
        config = json.loads(Path("good_peft/adapter_config.json").read_text())
        for name, change in {
            "ia3": {"peft_type": "IA3"},
            "dora": {"use_dora": True},
            "rank_9": {"r": 9},
        }.items():
            shutil.copytree("good_peft", name)
            write(f"{name}/adapter_config.json", json.dumps(config | change))


def spoil(good, name, file, tensor):
    """Copies a folder, but for one number of a tensor, which becomes nan."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(good, name)
    tensors = {key: x.clone() for key, x in load_file(f"{good}/{file}").items()}
    tensors[tensor].view(-1)[-1] = torch.nan
    save_file(tensors, f"{name}/{file}")


def onnx_folder(name, about, tokenizer):
    """Writes a folder as export_onnx.py does, with a model of the right inputs and outputs alone.

    Returns the bytes of the model.
    """
    import onnx
    from onnx import helper
    from onnx.helper import make_node

    def tensors(name, shape, prefix):
        """The first input or output and a tensor for the keys and values of each layer."""
        layers = [
            helper.make_tensor_value_info(f"{prefix}_{key}", onnx.TensorProto.FLOAT, kv_shape)
            for key in keys
        ]
        kind = onnx.TensorProto.INT64 if name == "ids" else onnx.TensorProto.FLOAT
        return [helper.make_tensor_value_info(name, kind, shape), *layers]

    V = about["vocab_size"]
    kv_shape = ["P", "B", about["n_kv_head"], about["head_dim"]]
    keys = [f"{kv}.{layer}" for layer in range(about["n_layer"]) for kv in "kv"]
    nodes = [
        make_node("Cast", ["ids"], ["x"], to=onnx.TensorProto.FLOAT),
        make_node("Unsqueeze", ["x", "last"], ["y"]),
        make_node("Expand", ["y", "wide"], ["logits"]),
        *(make_node("Identity", [f"past_{key}"], [f"present_{key}"]) for key in keys),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([-1]), "last"),
        onnx.numpy_helper.from_array(np.array([1, 1, V]), "wide"),
    ]
    inputs = tensors("ids", ["B", "T"], "past")
    outputs = tensors("logits", ["B", "T", V], "present")
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    model.metadata_props.add(key="fingerprint", value="whose")
    data = model.SerializeToString()
    Path(name).mkdir()
    Path(name, "model.onnx").write_bytes(data)
    Path(name, "config.json").write_text(json.dumps(about))
    tokenizer.save(f"{name}/tokenizer.json")
    return data


class Touch:
    """Code in a pickle, which makes a file if it runs."""

    def __reduce__(self):
        return Path.touch, (Path("code_ran"),)


CASES = [
    ("prepare", "--datasets=good.txt", "did you mean dataset?"),
    ("prepare", "--vocab_size=big", "must be an integer"),
    ("prepare", "good.txt", "expected FILE.toml or --key=value"),
    ("prepare", "--dataset=nowhere.txt", "no file or folder nowhere.txt"),
    ("prepare", "--dataset=x.csv", "--column= chooses from: a, b"),
    ("prepare", "--dataset=x.xml", ".csv .parquet, also with .gz .zst"),
    ("prepare", "--dataset=folder", ".csv .parquet, also with .gz .zst"),
    ("prepare", "--dataset=", "dataset is empty"),
    ("prepare", "--dataset=empty.txt", "no text"),
    ("prepare", "--dataset=blank.txt", "no text"),
    ("prepare", "--dataset=short.txt --tokenizer=char", "val split has 1 tokens"),
    ("prepare", "--dataset=latin.txt", "latin.txt is not UTF-8: byte 0xe9 at offset 3;"),
    ("prepare", "--dataset=binary.txt", "binary.txt is not UTF-8"),
    ("prepare", "--dataset=good.jsonl --column=story", "--column= chooses from: id, text"),
    ("prepare", "--dataset=bad.jsonl", "bad.jsonl line 2 is not JSON"),
    ("prepare", "--dataset=list.jsonl", "it is a list"),
    ("prepare", "--dataset=number.jsonl", "number.jsonl line 1: column 'text' is not text but 5"),
    ("prepare", "--dataset=half.jsonl", "not text"),
    ("prepare", "--dataset=good.parquet --column=story", "--column= chooses from: id, text"),
    ("prepare", "--dataset=good.parquet --column=id", "not text but 0"),
    ("prepare", "--dataset=bad.parquet", "cannot read bad.parquet as parquet"),
    # before anything is read
    ("prepare", "--dataset=nowhere.txt --vocab_size=100", "257"),
    ("prepare", "--dataset=nowhere.txt --vocab_size=-1", "257"),
    ("prepare", "--dataset=good.txt --tokenizer=gpt3", "gpt2:FOLDER"),
    ("prepare", "--dataset=good.txt --tokenizer=tokenizer.json", "tokenizer.json"),
    ("prepare", "--dataset=good.txt --tokenizer=missing.json", "missing.json"),
    ("prepare", "--dataset=good.txt --tokenizer=gpt2:folder", "encoder.json"),
    ("prepare", "--dataset=good.txt --tokenizer=abc.json", "character"),
    ("prepare", "--dataset=good.txt --name=taken", "--overwrite"),
    ("prepare", "--dataset=good.txt --name=../escape", "name '../escape'"),
    ("prepare", "--dataset=good.txt --name=/tmp/x", "name '/tmp/x'"),
    ("prepare", "--dataset=good.txt --name=.", "name '.'"),
    ("prepare", "--dataset=good.txt --val_fraction=0", "above 0 and below 1"),
    ("prepare", "--dataset=good.txt --val_fraction=nan", "finite number"),
    ("prepare", "--dataset=good.txt --val_fraction=0.001", "leave the val split none"),
    ("prepare", "--dataset=good.txt --val_fraction=0.999", "leave the train split none"),
    ("prepare", "--num_stories=0", "num_stories must be at least 1"),
    ("prepare", "--name=n --num_proc=-1", "num_proc must be at least 0"),
    ("prepare", "--dataset=good.txt --num_proc=1000000000", "num_proc"),
    ("prepare", "--seed=-1", "seed must be at least 0"),
    ("prepare", "--dataset=hf: --name=n", "hf:NAME"),
    ("prepare", "--name=n --overwrite=maybe", "true or false"),
    ("train", "--n_layers=3", "did you mean n_layer?"),
    ("train", "--lr=3", "did you mean learning_rate?"),
    ("train", "n_layer=3", "expected FILE.toml or --key=value"),
    ("train", "--n_layer", "--n_layer needs a value"),
    ("train", "--n_layer=three", "must be an integer"),
    ("train", "--n_layer=3.5", "must be an integer"),
    ("train", "--learning_rate=nan", "finite number"),
    ("train", f"--eval_tokens={10**400}", "eval_tokens must be at least -2^63 and below 2^63, not 1000"),
    ("train", f"--batch_size={2**63}", "batch_size must be at least"),
    ("train", "--out_dir=large --init_from=resume", "large/ckpt.pt: eval_tokens must be at least"),
    ("train", "--learning_rate=inf", "finite number"),
    ("train", "--overwrite=perhaps", "true or false"),
    ("train", "missing.toml", "cannot read missing.toml"),
    ("train", "folder.toml/", "folder.toml/"),
    ("train", "broken.toml", "not a TOML file"),
    ("train", "unknown.toml", "did you mean n_layer?"),
    ("train", "type.toml", "must be an integer"),
    ("train", "float.toml", "must be an integer"),
    ("train", "table.toml", "model"),
    ("train", "list.toml", "must be an integer"),
    ("train", "twice.toml", "not a TOML file"),
    ("train", "nan.toml", "finite number"),
    ("train", "latin.toml", "not a TOML file"),
    ("train", "vocab.toml --out_dir=n", "vocab_size is the tokenizer's"),
    ("train", "--out_dir=n --dataset=data/good", "as in --dataset=good"),
    ("train", "--out_dir=n --dataset=", "as in --dataset=toy"),
    ("train", "--out_dir=n --dataset=../good.txt", "good.txt is a file: python prepare.py --dataset="),
    ("train", "--out_dir=n --dataset=nowhere", "--dataset=FILE --name=nowhere makes it"),
    ("train", "--n_layer=0", "n_layer must be at least 1"),
    ("train", "--n_layer=-1", "n_layer must be at least 1"),
    ("train", "--n_embd=130", "multiple of n_head"),
    ("train", "--n_head=3", "multiple of n_head"),
    ("train", "--n_kv_head=3", "multiple of n_kv_head"),
    ("train", "--n_embd=12 --n_head=4", "must be even"),
    ("train", "--n_embd=100000000000", "n_embd must be"),
    ("train", "--n_layer=1000000000000", "n_layer must be"),
    ("train", "--out_dir=n --n_embd=1000000", "GiB"),
    ("train", "--out_dir=n --block_size=150000 --batch_size=1 --pos=alibi", "GiB"),
    ("train", "--out_dir=n --learning_rate=1e308", "1e36 at most"),
    ("train", "--out_dir=n --embd_lr_scale=1e308", "1e36 at most"),
    ("train", "--out_dir=n --n_layer=10000000", "GiB"),
    ("train", "--out_dir=n --batch_size=1000000000", "GiB"),
    ("train", "--init_from=resume --batch_size=1000000000", "GiB"),
    (
        "train",
        "--out_dir=n --batch_size=1000000000 --loss=chunked",
        "GiB",
    ),
    ("train", "--out_dir=n --gradient_accumulation_steps=1000000000", "GiB"),
    ("train", "--block_size=0", "block_size must be"),
    ("train", "--out_dir=n --block_size=1000000", "not enough for block_size"),
    ("train", "--norm=batchnorm", "layernorm | rmsnorm"),
    ("train", "--pos=rotary", "rope"),
    ("train", "--mlp=relu", "gelu | swiglu"),
    ("train", "--norm_position=middle", "pre | post"),
    ("train", "--rope_scaling=yarn:2", "yarn:FACTOR,CONTEXT"),
    ("train", "--rope_scaling=linear:0.5", "at least 1"),
    ("train", "--rope_scaling=linear:2 --pos=learned", "pos is learned"),
    ("train", "--rope_theta=0", "above 0"),
    ("train", "--norm_eps=0", "above 0"),
    ("train", "--dropout=1", "dropout"),
    ("train", "--dropout=-0.1", "dropout"),
    ("train", "--batch_size=0", "batch_size must be at least 1"),
    ("train", "--max_iters=0", "max_iters must be at least 1"),
    ("train", "--gradient_accumulation_steps=-1", "gradient_accumulation_steps"),
    ("train", "--eval_interval=0", "eval_interval"),
    ("train", "--save_minutes=0", "save_minutes must be above 0"),
    ("train", "--learning_rate=0", "learning_rate"),
    ("train", "--learning_rate=-1", "learning_rate"),
    ("train", "--min_lr=1", "min_lr must be at most learning_rate"),
    ("train", "--weight_decay=-1", "weight_decay"),
    ("train", "--grad_clip=-1", "grad_clip"),
    ("train", "--beta1=1", "beta1"),
    ("train", "--momentum=-0.1", "momentum"),
    ("train", "--decay_frac=0", "decay_frac"),
    ("train", "--optimizer=sgd", "muon | adamw"),
    ("train", "--schedule=step", "cosine | linear"),
    ("train", "--seed=-1", "seed"),
    ("train", "--seed=100000000000000000000", "seed"),
    ("train", "--loss=focal", "plain | chunked"),
    ("train", "--device=gpu --out_dir=n", "only cuda, mps and cpu are known to work"),
    ("sample", "--init_from=resume", "a model is named by --out_dir=FOLDER or --out_dir=hf:gpt2"),
    ("train", "--device=cuda:99 --out_dir=n", "cuda:99"),
    ("train", "--device=meta --out_dir=n", "meta"),
    ("train", "--dtype=int8 --out_dir=n", "dtype must be"),
    ("train", "--dtype=float16 --device=cpu --out_dir=n", "float16"),
    ("train", "--compile=maybe --out_dir=n", "compile must be"),
    ("train", "", "--overwrite"),
    ("train", "--out_dir=a_file --init_from=resume", "a_file"),
    ("train", "--out_dir=", "out_dir"),
    ("train", "--out_dir=n --dataset=none", "no dataset data/none"),
    ("train", "--out_dir=n --dataset=no_meta", "meta.json: there is no such file"),
    ("train", "--out_dir=n --dataset=meta_text", "meta.json"),
    ("train", "--out_dir=n --dataset=version_meta", "format 99"),
    ("train", "--out_dir=n --init_from=nowhere", "no checkpoint in nowhere"),
    ("train", "--out_dir=n --init_from=resume", "no checkpoint in n"),
    ("train", "--out_dir=n --init_from=folder", "no checkpoint in folder"),
    ("train", "--out_dir=n --init_from=text.pt", "not a checkpoint that is safe to read"),
    ("train", "--out_dir=n --init_from=code", "not a checkpoint that is safe to read"),
    ("train", "--out_dir=n --init_from=out --dataset=chars", "--tokenizer=data/toy/tokenizer.json"),
    ("train", "--out_dir=n --init_from=elsewhere", "--dataset=chars is what it learned from"),
    ("train", "--out_dir=n --init_from=elsewhere --dataset=toy", "prepare the data with its own\n"),
    ("train", "--init_from=elsewhere --eval_only", "--dataset=chars is what it learned from"),
    ("train", "--out_dir=n --init_from=out --n_layer=5", "n_layer=2"),
    ("train", "--init_from=resume --seed=7", "seed=1337"),
    ("train", "--init_from=resume --dataset=chars", "dataset='toy'"),
    ("train", "--init_from=resume --optimizer=adamw", "than adamw; leave optimizer out"),
    ("train", "--out_dir=config --init_from=resume", "batch_size must be an integer"),
    ("train", "--out_dir=start --init_from=resume", "start must be a string"),
    ("train", "--init_from=resume --pos=alibi", "pos='rope'"),
    ("train", "--out_dir=huge --init_from=resume", "GiB"),
    ("sample", "--temprature=1", "did you mean temperature?"),
    ("sample", "--temperature=-1", "temperature"),
    ("sample", "--temperature=hot", "finite number"),
    ("sample", "--top_k=-1", "top_k"),
    ("sample", "--top_k=1.5", "must be an integer"),
    ("sample", "--top_p=0", "top_p"),
    ("sample", "--top_p=1.1", "top_p"),
    ("sample", "--repetition_penalty=0", "repetition_penalty"),
    ("sample", "--num_samples=0", "num_samples"),
    ("sample", "--num_samples=1000000000000", "num_samples"),
    ("sample", "--max_new_tokens=-5", "max_new_tokens"),
    ("sample", "--past_end=wrap", "past_end"),
    ("sample", "--past_end=slide", "no text slides past block_size: window=0 lets all layers see"),
    ("sample", "--compile=yes", "compile must be auto, true or false"),
    ("sample", "--compile=true --draft=ngram", "leave out onnx and draft"),
    ("sample", "--onnx=o_good --compile=true", "leave out onnx and draft"),
    ("sample", "--onnx=o_good --past_end=slide", "keeps a text whole, until block_size: no slide"),
    ("train", "--window=-1", "window must be at least 0"),
    ("train", "--window=4 --window_pattern=SX", "window_pattern has an S (windowed) or L (full)"),
    ("train", "--n_layer=2 --window=4 --window_pattern=SSSL", "has 4 letters and n_layer is 2"),
    ("sample", "--seed=100000000000000000000", "seed"),
    ("sample", "--block_size=-1", "block_size must be at least 1"),
    ("sample", "--block_size=100000000", "at most 1e7"),
    ("sample", "--rope_scaling=yarn:2", "yarn:FACTOR,CONTEXT"),
    ("sample", "--rope_scaling=ntk:0.5", "at least 1"),
    ("sample", "--onnx=out --block_size=64", "leave out"),
    ("sample", "--out_dir=nowhere", "no checkpoint in nowhere"),
    ("sample", "--out_dir=folder", "no checkpoint in folder"),
    ("sample", "--out_dir=a_file", "not a checkpoint that is safe to read"),
    ("sample", "--out_dir=empty.pt", "not a checkpoint that is safe to read"),
    ("sample", "--out_dir=text.pt", "not a checkpoint that is safe to read"),
    ("sample", "--out_dir=truncated.pt", "not a checkpoint that is safe to read"),
    ("sample", "--out_dir=pickle.pt", "pickle.pt"),
    ("sample", "--out_dir=code", "holds code"),
    ("sample", "--out_dir=version", "format 99"),
    ("sample", "--device=cuda:99", "cuda:99"),
    ("sample", "--dtype=float16 --device=cpu", "float16"),
    ("sample", "--start=FILE:nowhere.txt", "cannot read nowhere.txt"),
    ("sample", "--start=FILE:latin.txt", "not UTF-8"),
    ("sample", "--start=FILE:folder", "cannot read folder"),
    ("sample", f"--start='{'once upon a time ' * 20}'", "the context 32"),
    ("sample", "--start=FILE:good.txt", "tokens and the context 32"),
    ("bench", "trian", "did you mean train?"),
    ("bench", "everything", "expected train, experts, decode"),
    ("bench", "--train", "there is no key 'train'"),
    ("bench", "unknown.toml", "did you mean n_layer?"),
    ("bench", "--seconds=-1", "seconds must be at least 0 and at most 3600"),
    ("bench", "--block_size=8", "at least 16"),
    ("bench", "--vocab_size=0", "vocab_size must be at least 1"),
    ("bench", "--n_layer=-1", "n_layer must be at least 1"),
    ("bench", "--n_embd=1000000 --n_head=1000", "GiB"),
    ("bench", "--text=nowhere.txt", "text must be a file"),
    ("bench", "--text=folder", "text must be a file"),
    ("bench", "--text=x.xml", ".csv .parquet"),
    ("bench", "tokenizer --text=latin.txt", "not UTF-8"),
    ("bench", "tokenizer --text=empty.txt", "no text"),
    ("bench", "tokenizer --text=good.txt --vocab_size=100", "257"),
    ("bench", "--device=cuda:99", "cuda:99"),
    ("bench", "--dtype=float16 --device=cpu", "float16"),
    ("bench", "kvcache --compile=maybe", "compile must be"),
    ("bench", "decode trian", "did you mean train?"),
    ("eval", "--outdir=out", "did you mean out_dir?"),
    ("eval", "--out_dir=", "out_dir must name"),
    ("eval", "--out_dir=out,", "out_dir must name"),
    ("eval", "--out_dir=nowhere", "no checkpoint in nowhere"),
    ("eval", "--out_dir=out,nowhere", "no checkpoint in nowhere"),
    ("eval", "--out_dir=folder", "no checkpoint in folder"),
    ("eval", "--out_dir=text.pt", "not a checkpoint that is safe to read"),
    ("eval", "--out_dir=out,code", "holds code"),
    ("eval", "--out_dir=gone", "--text=FILE"),
    ("eval", "--out_dir=broken_data", "sha256"),
    ("eval", "--out_dir=other_data", "another tokenizer"),
    ("eval", "--out_dir=start", "--text=FILE"),
    ("eval", "--text=nowhere.txt", "no file nowhere.txt"),
    ("eval", "--block_size=-1", "block_size must be at least 1"),
    ("eval", "--rope_scaling=yarn:2", "yarn:FACTOR,CONTEXT"),
    ("eval", "--lengths --block_size=32", "past the context of 32"),
    ("eval", "--lengths --rope_scaling=linear", "linear:FACTOR"),
    ("eval", "--text=folder", "no file folder"),
    ("eval", "--text=x.xml", ".csv .parquet"),
    ("eval", "--text=empty.txt", "no text"),
    ("eval", "--text=blank.txt", "no text"),
    ("eval", "--text=latin.txt", "not UTF-8"),
    ("eval", "--text=bad.jsonl", "is not JSON"),
    ("eval", "--text=bad.parquet", "as parquet"),
    ("eval", "--report_dir=foreign", "not written by eval.py"),
    ("eval", "--report_dir=a_file", "cannot write a_file"),
    ("eval", "--num_samples=0", "num_samples must be at least 1"),
    ("eval", "--max_new_tokens=0", "max_new_tokens"),
    ("eval", "--resamples=999", "resamples must be at least 1000"),
    ("eval", "--num_cases=5", "num_cases"),
    ("eval", "--top_k=-1", "top_k"),
    ("eval", "--temperature=-1", "temperature"),
    ("eval", "--temperature=warm", "finite number"),
    ("eval", "--seed=-1", "seed"),
    ("eval", "--seed=100000000000000000000", "seed"),
    ("eval", "--judge_url=127.0.0.1:8000", "judge_url must be like"),
    ("eval", "--judge_url=ftp://127.0.0.1/v1", "judge_url must be like"),
    ("eval", "--judge_url=http://", "judge_url must be like"),
    ("eval", "--judge_url=http://host:port/v1", "judge_url must be like"),
    ("eval", "--judge_url='http://a b/v1'", "judge_url must be like"),
    ("eval", "--judge_timeout=0", "judge_timeout"),
    ("eval", "--judge_timeout=nan", "finite number"),
    ("eval", "--device=cuda:99", "cuda:99"),
    ("eval", "--dtype=float16 --device=cpu", "float16"),
    ("sample", "--adapter=nowhere", "no adapter in nowhere"),
    ("sample", "--adapter=out", "holds a whole checkpoint, not an adapter"),
    ("sample", "--adapter=out/ckpt.pt", "whole checkpoint"),
    ("sample", "--out_dir=lora", "holds an adapter"),
    ("sample", "--adapter=text.pt", "not a checkpoint that is safe to read"),
    ("sample", "--adapter=a_code", "holds code"),
    ("sample", "--adapter=a_cut", "not a checkpoint that is safe to read"),
    ("sample", "--adapter=good_peft", "--adapter=hf:good_peft"),
    ("sample", "--out_dir=good_peft", "--adapter=hf:good_peft"),
    ("sample", "--out_dir=hf:good_peft", "--adapter=hf:good_peft"),
    ("train", "--out_dir=n --init_from=good_hf", "read as hf:good_hf"),
    ("train", "--out_dir=merged --init_from=resume", "--init_from=merged --out_dir=OTHER"),
    ("train", "--out_dir=tuned --init_from=resume", "was fine-tuned"),
    ("train", "--out_dir=n --eval_only", "--init_from=resume for out_dir"),
    ("train", "--out_dir=a_file", "is a file"),
    ("train", "--out_dir=out/ckpt.pt --init_from=resume --max_iters=3", "out/ckpt.pt is a file"),
    ("finetune_lora", "--out_dir=lora/adapter.pt --init_from=resume", "lora/adapter.pt is a file"),
    ("train", "--out_dir=n --dataset=tinystories", "prepare.py --dataset=tinystories makes"),
    ("train", "--out_dir=n --init_from=gpt2", "hub is hf:gpt2"),
    ("sample", "--adapter=good_hf", "a whole model"),
    ("sample", "--adapter=hf:good_hf", "a whole model"),
    (
        "finetune_lora",
        "--out_dir=n --init_from=chars.pt --dataset=pairs.json --template='€ {prompt}'",
        "the template",
    ),
    ("export_onnx", "--out_dir=merged --to=n --quantize=int8", "--dataset=NAME names data"),
    ("eval", "--out_dir=merged", "ckpt.pt: it was trained elsewhere, on what is not here; give a text"),
    ("prepare", "--dataset=good.txt --name=n --tokenizer=tokenizer.json", "--tokenizer=hf:FOLDER"),
    ("sample", "--adapter=a_version", "format 9"),
    ("sample", "--adapter=a_base", "another base"),
    ("sample", "--adapter=a_gone", "moved/ckpt.pt"),
    ("sample", "--adapter=lora --out_dir=nowhere", "no checkpoint in nowhere"),
    ("finetune_lora", "--ranks=3", "did you mean rank?"),
    ("finetune_lora", "--rank=-1", "rank"),
    ("finetune_lora", "--rank=33 --out_dir=n --dataset=pairs.json", "rank 33 is more than"),
    ("finetune_lora", "--alpha=0", "alpha"),
    ("finetune_lora", "--alpha=1e308", "alpha must be above 0 and at most 1e36"),
    ("finetune_lora", "--lora_dropout=1", "lora_dropout"),
    ("finetune_lora", "--target=head", "takes no adapter"),
    ("finetune_lora", "--target=wte", "takes no adapter"),
    ("finetune_lora", "--target=q_proj,", "takes no adapter"),
    ("finetune_lora", "--optimizer=muon", "--rank=0"),
    ("finetune_lora", "--template=Answer:", "{prompt}"),
    ("finetune_lora", "--val_fraction=1", "above 0 and below 1"),
    ("finetune_lora", "--val_dataset=pairs.json", "leave val_dataset out"),
    ("finetune_lora", "--n_layer=3", "no key"),
    (
        "finetune_lora",
        "--dataset=pairs.json --out_dir=out --overwrite",
        "the base out/ckpt_best.pt is in out",
    ),
    ("finetune_lora", "--dataset=pairs.json --out_dir=lora", "--overwrite"),
    ("finetune_lora", "--init_from=scratch --out_dir=n", "no checkpoint in scratch"),
    ("finetune_lora", "--init_from=resume --out_dir=n", "no adapter in n"),
    ("finetune_lora", "--init_from=lora --out_dir=n", "holds an adapter"),
    ("finetune_lora", "--init_from=code --out_dir=n", "holds code"),
    (
        "finetune_lora",
        "--out_dir=n --dataset=toy",
        "moral, a .json .jsonl .csv .parquet file or hf:NAME",
    ),
    ("finetune_lora", "--out_dir=n --dataset=nowhere.jsonl", "cannot read nowhere.jsonl"),
    ("finetune_lora", "--out_dir=n --dataset=nowhere.json", "cannot read nowhere.json"),
    ("finetune_lora", "--out_dir=n --dataset=nowhere.parquet", "nowhere.parquet"),
    ("finetune_lora", "--out_dir=n --dataset=bad.parquet", "cannot read bad.parquet as parquet"),
    ("finetune_lora", "--out_dir=n --dataset=cut.jsonl", "cut.jsonl line 2 is not JSON"),
    ("finetune_lora", "--out_dir=n --dataset=good.parquet", "rows have prompt and response"),
    ("finetune_lora", "--out_dir=n --dataset=broken.json", "broken.json is not JSON"),
    ("finetune_lora", "--out_dir=n --dataset=latin.json", "latin.json is not UTF-8"),
    (
        "finetune_lora",
        "--out_dir=n --dataset=other_rows.json",
        "other_rows.json row 1 has no column 'prompt'; rows have prompt and response, "
        "instruction and output, messages, conversations, or prompt and completion; here is: question",
    ),
    (
        "finetune_lora",
        "--out_dir=n --dataset=half_pair.json",
        "half_pair.json row 2 has no column 'response'",
    ),
    ("finetune_lora", "--out_dir=n --dataset=number.json", "not text but 5"),
    ("finetune_lora", "--out_dir=n --dataset=role.json", "a role is 'critic'"),
    ("finetune_lora", "--out_dir=n --dataset=no_role.json", "no column 'role'"),
    ("finetune_lora", "--out_dir=n --dataset=no_list.json", "not a list of messages but 5"),
    ("finetune_lora", "--out_dir=n --dataset=scalar.json", "it is a int"),
    ("finetune_lora", "--out_dir=n --dataset=object.json", "not an array of rows but a dict"),
    ("finetune_lora", "--out_dir=n --dataset=none.json", "needs two rows"),
    ("finetune_lora", "--out_dir=n --dataset=one.json", "needs two rows"),
    ("finetune_lora", "--out_dir=n --dataset=mute.json", "none of its 18 rows has a response"),
    ("finetune_lora", "--out_dir=n --dataset=long_rows.json", "fits in 32 tokens"),
    ("finetune_lora", "--out_dir=n --dataset=pairs.json --val_dataset=none.json", "no row in it"),
    ("finetune_lora", "--out_dir=n --dataset=pairs.json --batch_size=1000000000", "GiB"),
    ("finetune_lora", "--out_dir=lora --init_from=resume --rank=3", "rank=2, which cannot become 3"),
    ("finetune_lora", "--out_dir=a_base --init_from=resume", "another base"),
    ("finetune_lora", "--out_dir=a_gone --init_from=resume", "moved/ckpt.pt"),
    ("finetune_lora", "--merge --out_dir=out", "holds a whole checkpoint, not an adapter"),
    ("sample", "--onnx=nowhere", "no nowhere/config.json"),
    ("sample", "--onnx=folder", "no folder/config.json"),
    ("sample", "--onnx=a_file", "a_file"),
    ("sample", "--onnx=o_no_model", "no o_no_model/model.onnx"),
    ("sample", "--onnx=o_no_config", "no o_no_config/config.json"),
    ("sample", "--onnx=o_no_tokenizer", "no o_no_tokenizer/tokenizer.json"),
    ("sample", "--onnx=o_good/other.onnx", "no o_good/other.onnx"),
    ("sample", "--onnx=o_format", "format 9"),
    ("sample", "--onnx=o_layers", "inputs, outputs or their shapes"),
    ("sample", "--onnx=o_unlike", "n_layer is 3"),
    ("sample", "--onnx=o_model", "not written by export_onnx.py"),
    ("sample", "--onnx=o_shape", "n_layer must be of type int"),
    ("sample", "--onnx=o_float", "n_layer must be of type int"),
    ("sample", "--onnx=o_other", "is another model than"),
    ("sample", "--onnx=o_deep", "inputs, outputs or their shapes"),
    ("sample", "--onnx=o_heads", "inputs, outputs or their shapes"),
    ("sample", "--onnx=o_start", "start is 5"),
    ("sample", "--onnx=o_tokenizer", "by its model and tokenizer.json"),
    ("sample", "--onnx=o_vocab", "tokenizer.json has"),
    ("sample", "--onnx=o_cut", "damaged or not a model"),
    ("sample", "--onnx=o_text", "damaged or not a model"),
    ("sample", "--onnx=o_empty", "damaged or not a model"),
    ("sample", "--onnx=o_json", "o_json/config.json"),
    ("sample", "--onnx=o_list", "not written by export_onnx.py"),
    ("sample", "--onnx=o_latin", "o_latin/config.json"),
    ("sample", "--onnx=o_tok", "o_tok/tokenizer.json"),
    ("sample", "--out_dir=o_good", "--onnx=o_good reads"),
    ("sample", "--onnx=out", "--out_dir=out writes out/onnx"),
    ("sample", "--onnx=hf:good_hf", "--to=FOLDER writes one"),
    ("sample", "--onnx=o_good/model_int8.onnx", "--quantize=int8 writes one"),
    ("sample", "--onnx=o_good --adapter=lora", "leave out adapter"),
    ("sample", "--onnx=o_good --start=once", "cannot be computed"),
    ("sample", "--onnx=o_good --device=cuda", "leave out adapter"),
    ("sample", "--onnx=o_good --dtype=bfloat16", "leave out adapter"),
    ("sample", "--onnx=o_good --out_dir=out", "takes the place of out_dir"),
    ("sample", f"--onnx=o_good --start='{'once upon a time ' * 20}'", "the context 32"),
    ("sample", "--onnx=o_good --num_samples=1000000000000", "num_samples"),
    ("export_onnx", "--quantise=int8", "did you mean quantize?"),
    ("export_onnx", "--quantize=int2", "none | int8 | int4 | plain_int8"),
    ("export_onnx", "--eval_tokens=-1", "eval_tokens"),
    ("export_onnx", "--block_size=-1", "block_size must be at least 1"),
    ("export_onnx", "--rope_scaling=yarn:2", "yarn:FACTOR,CONTEXT"),
    ("export_onnx", "--seconds=-1", "seconds"),
    ("export_onnx", "--out_dir=nowhere", "no checkpoint in nowhere"),
    ("export_onnx", "--out_dir=lora", "holds an adapter"),
    ("export_onnx", "--out_dir=text.pt", "not a checkpoint that is safe to read"),
    ("export_onnx", "--out_dir=code", "holds code"),
    ("export_onnx", "--to=.", "to is a folder"),
    ("export_onnx", "--to=a.onnx", "to is a folder"),
    ("export_onnx", "--to=foreign", "--overwrite moves it aside"),
    ("export_onnx", "--to=a_file", "--overwrite moves it aside"),
    ("export_onnx", "--out_dir=gone --quantize=int8", "int8 is judged by a validation split"),
    ("export_onnx", "--dataset=chars --quantize=int8", "another tokenizer"),
    ("export_onnx", "--out_dir=tiny.pt", "block_size is 4"),
    ("finetune_lora", "--merge --out_dir=a_base", "another base"),
    ("finetune_lora", "--merge --out_dir=a_cut", "not a checkpoint that is safe to read"),
    ("hf", "--outdir=out --to=n", "did you mean out_dir?"),
    ("hf", "", "--to=FOLDER"),
    ("hf", "--to=n --rope_scaling=ntk", "ntk:FACTOR"),
    ("hf", "--to=n --adapter=x --block_size=64", "an adapter has no positions"),
    ("hf", "--to=.", "--to=FOLDER"),
    ("hf", "--to=foreign", "--overwrite"),
    ("hf", "--to=a_file", "--overwrite"),
    ("hf", "--to=n --out_dir=nowhere", "no checkpoint in nowhere"),
    ("hf", "--to=n --out_dir=text.pt", "not a checkpoint that is safe to read"),
    ("hf", "--to=n --out_dir=code", "holds code"),
    ("hf", "--to=n --out_dir=post.pt", "norm_position=post"),
    ("hf", "--to=n --out_dir=lora", "holds an adapter"),
    ("hf", "--to=n --adapter=nowhere", "no adapter in nowhere"),
    ("hf", "--to=n --adapter=a_base", "another base"),
    ("hf", "--to=n --adapter=a_gone", "moved/ckpt.pt"),
    ("hf", "--to=n --out_dir=hf:nowhere/at/all", "no folder"),
    ("hf", "--to=n --out_dir=hf:gemma3", "model_type is 'gemma3'"),
    ("hf", "--to=n --adapter=hf:ia3", "peft_type is 'IA3'"),
    ("hf", "--to=n --adapter=hf:dora", "use_dora is True"),
    ("hf", "--to=n --adapter=hf:rank_9", "lora_A.weight is (2, 32)"),
    ("hf", "--to=n --adapter=hf:folder", "adapter_config.json"),
    ("hf", "--to=n --adapter=hf:good_hf", "adapter_config.json"),
    ("sample", "--out_dir=hf:", "no folder"),
    ("sample", "--out_dir=hf:empty_hf", "config.json"),
    ("sample", "--out_dir=hf:a_file", "no folder"),
    ("sample", "--out_dir=hf:no_sizes", "is missing"),
    ("sample", "--out_dir=hf:list_hf", "not a JSON object"),
    ("sample", "--out_dir=hf:half_hf", "half_hf/config.json"),
    ("sample", "--out_dir=hf:moe", "'num_local_experts' is 8"),
    ("sample", "--out_dir=hf:no_tensors", "no model.safetensors in no_tensors"),
    ("sample", "--out_dir=hf:cut_hf", "cut_hf/model.safetensors"),
    ("sample", "--out_dir=hf:no_tokenizer_hf", "no tokenizer.json"),
    ("sample", "--adapter=hf:good_peft", "python hf.py"),
    ("eval", "--out_dir=hf:good_hf", "--text=FILE"),
    ("eval", "--out_dir=out,hf:gemma3", "model_type is 'gemma3'"),
    ("train", "--out_dir=n --init_from=hf:gemma3", "model_type is 'gemma3'"),
    ("train", "--out_dir=n --init_from=hf:good_hf --n_layer=3", "n_layer=2, which cannot become 3"),
    (
        "train",
        "--out_dir=n --init_from=hf:good_hf --block_size=64",
        "block_size=32, which cannot become 64",
    ),
    ("train", "--out_dir=n --init_from=hf:good_hf --dataset=chars", "--tokenizer=hf:good_hf"),
    ("finetune_lora", "--out_dir=n --init_from=hf:gemma3", "model_type is 'gemma3'"),
    ("finetune_lora", "--out_dir=n --max_length=-1", "max_length"),
    (
        "finetune_lora",
        "--out_dir=n --init_from=hf:good_hf --dataset=pairs.json --max_length=2",
        "fits in 2 tokens",
    ),
    ("prepare", "--dataset=good.txt --tokenizer=hf:folder", "no tokenizer.json"),
    ("serve", "--prot=1", "did you mean port?"),
    ("serve", "--port=-1", "port must be"),
    ("serve", "--port=65536", "port must be"),
    ("serve", "--port=http", "must be an integer"),
    ("serve", "--model=nowhere", "nowhere"),
    ("serve", "--model=folder", "folder"),
    ("serve", "--model=out", "--out_dir=out writes out/onnx"),
    ("serve", "--model=out/model_int8.onnx", "--out_dir=out --quantize=int8 writes"),
    ("serve", "--model=nowhere.onnx", "nowhere.onnx"),
]

# a file that is not as it was written: exit status 1
DAMAGED = [
    ("train", "--out_dir=n --dataset=short_bin", "train.bin"),
    ("train", "--out_dir=n --dataset=odd_bin", "train.bin"),
    ("train", "--out_dir=n --dataset=changed_bin", "sha256"),
    ("train", "--out_dir=n --dataset=no_tokenizer", "tokenizer.json: there is no such file"),
    ("train", "--out_dir=n --dataset=foreign_tokenizer", "not the tokenizer"),
    ("train", "--out_dir=n --dataset=big_ids", "holds id 5000"),
    ("train", "--out_dir=optimizers --init_from=resume --max_iters=3", "damaged"),
    ("train", "--out_dir=losses --init_from=resume --max_iters=3", "damaged"),
    (
        "train",
        "--out_dir=moments --init_from=resume --max_iters=3",
        "32) torch.float32; its weights are whole",
    ),
    ("sample", "--out_dir=shape", "damaged"),
    ("sample", "--out_dir=huge", "damaged"),
    ("sample", "--out_dir=model", "damaged"),
    ("sample", "--out_dir=other_tokenizer", "damaged"),
    ("sample", "--out_dir=hash", "damaged"),
    ("eval", "--out_dir=shape", "damaged"),
    ("sample", "--adapter=a_shape", "damaged"),
    ("sample", "--adapter=a_layers", "damaged"),
    ("sample", "--adapter=a_rank", "damaged"),
    ("sample", "--adapter=a_config", "damaged"),
    ("sample", "--adapter=a_key", "damaged"),
    ("finetune_lora", "--out_dir=a_shape --init_from=resume", "damaged"),
    ("export_onnx", "--out_dir=shape", "damaged"),
    ("hf", "--to=n --adapter=a_shape", "damaged"),
    ("sample", "--out_dir=step", "step"),
    ("sample", "--out_dir=theta", "theta/ckpt.pt is damaged"),
    ("sample", "--out_dir=nan", "nan/ckpt.pt is damaged: tensor wte.weight holds nan"),
    ("eval", "--out_dir=nan", "tensor wte.weight holds nan"),
    ("export_onnx", "--out_dir=nan --to=n", "tensor wte.weight holds nan"),
    ("hf", "--out_dir=nan --to=n", "tensor wte.weight holds nan"),
    ("train", "--out_dir=nan --init_from=resume --eval_only", "tensor wte.weight holds nan"),
    ("train", "--out_dir=n --init_from=nan", "tensor wte.weight holds nan"),
    (
        "finetune_lora",
        "--out_dir=n --init_from=nan --dataset=pairs.json",
        "tensor wte.weight holds nan",
    ),
    ("sample", "--out_dir=infinite", "tensor blocks.1.mlp.down_proj.weight holds nan or infinity"),
    ("sample", "--out_dir=integer", "tensor norm.weight is int64: only float32"),
    ("sample", "--out_dir=complex", "tensor norm.weight is complex64: only float32"),
    ("sample", "--out_dir=negative", "step is -5"),
    ("train", "--out_dir=negative --init_from=resume", "step is -5"),
    ("sample", "--out_dir=nan_loss", "val_loss is nan at step 1"),
    ("sample", "--out_dir=no_loss", "best_val_loss is inf at step 1"),
    ("sample", "--out_dir=losses", "losses has 'a'"),
    (
        "sample",
        "--adapter=a_nan",
        "a_nan/adapter.pt is damaged: tensor blocks.0.attn.q_proj.A holds nan",
    ),
    ("finetune_lora", "--out_dir=a_nan --init_from=resume", "tensor blocks.0.attn.q_proj.A holds nan"),
    ("finetune_lora", "--merge --out_dir=a_nan", "tensor blocks.0.attn.q_proj.A holds nan"),
    ("hf", "--to=n --adapter=a_integer", "tensor blocks.0.attn.q_proj.A is int64"),
    ("sample", "--out_dir=hf:nan_hf", "nan_hf is damaged: tensor model.norm.weight holds nan"),
    ("hf", "--to=n --adapter=hf:nan_peft", "layers.1.self_attn.v_proj.lora_B.weight holds nan"),
]


def contents(folder):
    """Returns the bytes of the files in folder, by path, and None for its folders; encoded rows may come and
    go.
    """
    paths = [path for path in folder.rglob("*") if ".encoded" not in path.parts]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("script, args, message", CASES)
def test_bad_input_is_one_line(script, args, message, shop, monkeypatch, capfd, status=2):
    monkeypatch.chdir(shop)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(args)])
    before = contents(shop)
    with pytest.raises(SystemExit) as e:
        run(SCRIPTS[script].main, SCRIPTS[script].Config, WORDS.get(script, ()))
    out, err = capfd.readouterr()
    assert not (out and "slide" in args)  # known before a prompt is printed
    assert e.value.code == status, err
    assert err.startswith(f"{script}.py: ")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 400
    assert contents(shop) == before


@pytest.mark.parametrize("script, args, message", DAMAGED)
def test_a_damaged_file_is_one_line(script, args, message, shop, monkeypatch, capfd):
    test_bad_input_is_one_line(script, args, message, shop, monkeypatch, capfd, status=1)


@pytest.mark.parametrize("script, args, message", CASES[:1] + CASES[50:51] + CASES[-1:])
def test_bad_input_from_a_shell_is_one_line(script, args, message, shop):
    result = shell(script, *shlex.split(args), folder=shop)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script, args, library, message",
    [
        ("train", "--out_dir=n --wandb_log", "wandb", "pip install wandb"),
        ("bench", "--plot", "matplotlib", "pip install matplotlib"),
        ("bench", "decode --init_from=out --against=llama.cpp", "xllamacpp", "pip install xllamacpp"),
        ("export_onnx", "--to=n", "onnxruntime", "pip install onnxruntime"),
        ("export_onnx", "--to=n", "onnxscript", "pip install onnxscript"),
        ("sample", "--onnx=o_good", "onnxruntime", "pip install onnxruntime"),
        (
            "train",
            "--out_dir=logged --init_from=resume",
            "wandb",
            "settings of logged/ckpt.pt: wandb_log needs wandb: pip install wandb; --no-wandb_log",
        ),
        ("prepare", "--dataset=hf:a/b --name=n", "datasets", "pip install datasets"),
        ("hf", "--to=n", "safetensors.torch", "pip install safetensors"),
        ("sample", "--out_dir=hf:good_hf", "safetensors.torch", "pip install safetensors"),
        ("sample", "--out_dir=hf:a/b", "huggingface_hub", "pip install huggingface_hub"),
        ("prepare", "--dataset=good.parquet --name=n", "pyarrow", "pip install -r requirements.txt"),
    ],
)
def test_a_missing_library_is_one_line(script, args, library, message, shop, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, library, None)
    test_bad_input_is_one_line(script, args, message, shop, monkeypatch, capfd)
