"""What docs/INTEROP.md says is avoided by how folders are written.

transformers 5 stands in for the programs that cannot be installed beside it: a folder is cut down to the
keys that such a program reads. That all kinds agree with it as a whole is in test_hf.py.
"""

import json
import shutil

import pytest
import torch
from test_hf import MODELS, TOKENIZER, check_logits, edit_json, export, open_peer, save_checkpoint

import onnx_model
from hf import write_json

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file

ROPE_MODELS = {
    "llama3": {},
    "linear": {"rope_theta": 500.0},
    "llama": {"rope_theta": 500.0},
    "qwen3": {"rope_theta": 500.0, "rope_scaling": "linear:4"},
}
OLD_KEYS = ["rope_theta", "rope_scaling"]  # transformers 4, mlx-lm
NEW_KEYS = ["rope_parameters"]  # transformers 5


def write_folder(tmp_path, name, **changes):
    """Returns (the model, the folder that hf.py makes of it), for a model of test_hf.MODELS."""
    model = save_checkpoint(tmp_path / "ckpt.pt", name, **changes)
    export(tmp_path, "--out_dir=.", "--to=folder")
    return model, tmp_path / "folder"


@pytest.mark.parametrize("name", ROPE_MODELS)
@pytest.mark.parametrize("unread", [OLD_KEYS, NEW_KEYS], ids=["new keys alone", "old keys alone"])
@torch.no_grad()
def test_either_generation_of_ropes_keys_is_enough(name, unread, tmp_path):
    model, folder = write_folder(tmp_path, name, **ROPE_MODELS[name])

    def drop_unread(config):
        for key in unread:
            del config[key]

    edit_json(folder / "config.json", drop_unread)
    check_logits(model, open_peer(folder))


def test_a_gpt2_has_the_names_of_the_hub(tmp_path):
    """Those of the class without a head: mlx-lm reads no others."""
    _, folder = write_folder(tmp_path, "gpt2")
    names = load_file(folder / "model.safetensors").keys()
    assert names == open_peer(folder).transformer.state_dict().keys()


def test_an_untied_gpt2_has_the_names_of_the_class_with_a_head(tmp_path):
    _, folder = write_folder(tmp_path, "gpt2 untied")
    names = load_file(folder / "model.safetensors").keys()
    assert names == open_peer(folder).state_dict().keys()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_autotokenizer_splits_as_the_file_says(name, tmp_path):
    """With GPT2Tokenizer for a class, the pre_tokenizer would be GPT-2's whatever the file says."""
    _, folder = write_folder(tmp_path, name)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    digits = {"type": "Digits", "individual_digits": True}

    def split_digits(data):
        pre_tokenizers = [digits, data["pre_tokenizer"]]
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}

    edit_json(changed / "tokenizer.json", split_digits)
    for path in folder, changed:
        peer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        read = json.loads(peer.backend_tokenizer.to_str())
        written = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        assert read["pre_tokenizer"] == written["pre_tokenizer"]
    # transformers 4 knows no TokenizersBackend
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_a_window_where_the_model_has_one_alone(name, tmp_path):
    """mlx-lm and llama.cpp pass over it."""
    model, folder = write_folder(tmp_path, name)
    config = open_peer(folder).config
    assert getattr(config, "sliding_window", None) == (model.config.window or None)
    if not model.config.window:
        assert set(getattr(config, "layer_types", None) or []) <= {"full_attention"}


def test_an_onnx_folder_is_no_transformers_folder(tmp_path):
    """Its graph has other inputs: a program that knows transformers' names must not open it."""
    model = save_checkpoint(tmp_path / "ckpt.pt")
    write_json(tmp_path / "config.json", onnx_model.describe(model.config, TOKENIZER, "", "", ""))
    with pytest.raises(ValueError, match="model_type"):
        transformers.AutoConfig.from_pretrained(tmp_path, local_files_only=True)
