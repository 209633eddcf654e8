"""Out to Hugging Face's folders, and in from what transformers and PEFT write there.

Their own classes are the second implementation.
"""

import contextlib
import itertools
import json
import os
import random
import re
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import call
from test_eval import stream
from test_parity import build_preset
from test_prepare import DOCS, file_size_limit
from test_train import CPU, SMALL

import checkpoint
import checkpoint_file
import dataset
import eval as evaluation
import finetune_lora
import hf
import lora
import prepare
import sample
import train
from chat import conversation_ids
from config import Refusal, configure
from data import AS_IT_STANDS, STRIPPED, document_slices, prompt_ids
from interop import hf_folder
from interop.any_tokenizer import from_files, load_tokenizer
from interop.foreign_tokenizer import FILES
from lenses import likelihood
from tokenizer import EOT, Tokenizer
from vocabulary import bos_processor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TOKENIZER = Tokenizer.train(DOCS, 300)
PLAIN_CPU = ["--device=cpu", "--dtype=float32"]
# what random texts are made of
WORDS = ["the ", " cat", "é", "\n", "   ", "12", "'s", "你", "🙂", ".", "don't", "\t", " a", "Z"]
WORDS += [EOT, "</s>", "<0x41>", "\ufeff", "\u0301"]


def texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.randrange(12))) for _ in range(n)]


def export(folder, *argv):
    call(hf, *argv, folder=folder)


def open_peer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def write_text(path):
    Path(path).write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")


def edit_json(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


# -----------------------------------------------------------------------------------------------------
# Tokenizers as other models have them: each function returns the tokenizer and its special tokens


def train_bpe(backend, special_tokens, docs=DOCS):
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(docs, trainer)


def tinylm():
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.to_str())
    return backend, {"eos_token": EOT, "bos_token": EOT}


def smollm():
    """Byte-level, each digit on its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    train_bpe(backend, [EOT, "<|im_start|>"])
    return backend, {"eos_token": EOT, "bos_token": EOT}


def qwen():
    """A mark and the end of its line are one word."""
    backend = tokenizers.Tokenizer(models.BPE())
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(word), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    train_bpe(backend, [EOT], [".\n\n_\n...\n cat.\n"] * 999 + DOCS)
    return backend, {"eos_token": EOT, "bos_token": EOT}


def tinyllama():
    """A space before each text, <s> before that, bytes for what has no token."""
    special_tokens = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = ["▁", "t", "h", "e", "c", "a"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("a", "t")]
    tokens = [*special_tokens, *byte_tokens, *characters, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(special_tokens)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend, {"eos_token": "</s>", "bos_token": "<s>"}


def llama_metaspace_first():
    """A space before a text that has none: Llama's newer kind, here of the whole text as one word."""
    backend, special_tokens = tinyllama()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.normalizer = None
    return backend, special_tokens


def llama_metaspace_always():
    backend, special_tokens = tinyllama()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.normalizer = None
    return backend, special_tokens


def gpt2_with_prefix_space():
    backend, special_tokens = smollm()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend, special_tokens


def load_backend(make):
    """Returns the Tokenizer of this lab for one of the functions above."""
    backend, special_tokens = make()
    eot = backend.token_to_id(special_tokens["eos_token"])
    text = backend.to_str()
    return from_files({"tokenizer.json": text}, json.loads(text), eot)


# -----------------------------------------------------------------------------------------------------
# Folders

GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def write_tokenizer(folder, make):
    """Writes a tokenizer as transformers does. Returns its size, and the id that ends a text."""
    backend, special_tokens = make()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    tokenizer.save_pretrained(folder)
    return backend.get_vocab_size(), backend.token_to_id(special_tokens["eos_token"])


def write_folder(folder, kind, tokenizer=tinylm, shard="5GB", dtype=torch.float32, **keys):
    """Writes a model with random weights and a tokenizer as transformers does; returns the model."""
    vocab_size, eot = write_tokenizer(folder, tokenizer)
    settings = {
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
        "bos_token_id": eot,
        "eos_token_id": eot,
        **(GPT2_SIZES if kind == "gpt2" else LLAMA_SIZES),
        **keys,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # gains and biases too
                p.add_(0.3 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    # read again, for .to() rounds RoPE's frequencies
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()


def read_folder(folder):
    path = f"hf:{folder}"
    return checkpoint_file.restore(checkpoint_file.load(path), path)


def check_close(logits, reference, tolerance=1e-4):
    """The tolerance is of a standard deviation."""
    assert reference.std() > 0.5
    assert (logits - reference).abs().max() / reference.std() < tolerance


@torch.no_grad()
def check_logits(model, peer, vocab_size=300):
    ids = torch.randint(vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    check_close(model(ids)[0], peer(ids).logits[..., :vocab_size])


# -----------------------------------------------------------------------------------------------------
# In

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
FOLDERS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "theta": ("llama", {"rope_theta": 500.0}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "qwen3 with yarn": (
        "qwen3",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 64, "attention_factor": 1.5}},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "attention biases": ("llama", {"attention_bias": True}),
    "mlp biases": ("llama", {"mlp_bias": True}),
    "sharded": ("llama", {"shard": "10KB"}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16, "shard": "10KB", "tie_word_embeddings": True}),
    "padded": ("llama", {"vocab_size": 320}),
    "smollm": ("llama", {"tokenizer": smollm}),
    "tinyllama": ("llama", {"tokenizer": tinyllama}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "shard": "10KB"}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "wide heads": ("llama", {"head_dim": 20}),
    "qwen3 0.6B": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "shard": "10KB"}),
    "mixtral tied": ("mixtral", {"tie_word_embeddings": True, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe normalised": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": (
        "gpt2",
        {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3, "shard": "10KB"},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_transformers_is_read(name, tmp_path):
    kind, keys = FOLDERS[name]
    peer = write_folder(tmp_path, kind, **keys)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in keys)
    model, tokenizer = read_folder(tmp_path)
    check_logits(model, peer, tokenizer.vocab_size)
    assert model.wte.weight.dtype == torch.float32
    assert (tokenizer.kind == "foreign") == ("tokenizer" in keys)


# The keys that config.json has on the hub beside those above, of gpt2, distilgpt2 and gpt2-medium,
# SmolLM2, TinyLlama and Llama-3.2, and in a dump of all of transformers 4's
GPT2_KEYS = {
    "architectures": ["GPT2LMHeadModel"],
    "initializer_range": 0.02,
    "n_ctx": 64,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
DISTILGPT2_KEYS = GPT2_KEYS | {
    "_num_labels": 1,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "tokenizer_class": "GPT2TokenizerFast",
}
GPT2_MEDIUM_KEYS = GPT2_KEYS | {"n_special": 0, "predict_special_tokens": True, "output_past": True}
LLAMA_KEYS = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "4.45.0.dev0",
}
SMOLLM2_KEYS = LLAMA_KEYS | {
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
TINYLLAMA_KEYS = LLAMA_KEYS | {"rope_scaling": None, "max_sequence_length": 64}
LLAMA32_KEYS = LLAMA_KEYS | {
    "eos_token_id": [0, 1],
    "_attn_implementation_autoset": True,
    "partial_rotary_factor": 1.0,
}
ALL_KEYS = LLAMA_KEYS | {
    "is_causal": True,
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "num_labels": 2,
    "output_attentions": False,
    "output_hidden_states": False,
    "torchscript": False,
    "_flash_attn_2_enabled": True,
}
HUB = {
    "gpt2": ("gpt2", GPT2_KEYS),
    "distilgpt2": ("gpt2", DISTILGPT2_KEYS),
    "gpt2-medium": ("gpt2", GPT2_MEDIUM_KEYS),
    "SmolLM2": ("llama", SMOLLM2_KEYS),
    "TinyLlama": ("llama", TINYLLAMA_KEYS),
    "Llama-3.2": ("llama", LLAMA32_KEYS),
    "all": ("llama", ALL_KEYS),
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_is_read(name, tmp_path):
    kind, keys = HUB[name]
    peer = write_folder(tmp_path, kind)
    edit_json(tmp_path / "config.json", lambda config: config.update(keys))
    check_logits(read_folder(tmp_path)[0], peer)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_rope_keys_of_transformers_4_are_read(type_key, tmp_path):
    peer = write_folder(tmp_path, "llama", rope_parameters=LLAMA3 | {"rope_theta": 1000.0})
    scaling = dict(LLAMA3)
    scaling[type_key] = scaling.pop("rope_type")

    def use_old_keys(config):
        del config["rope_parameters"]
        config.update(rope_theta=1000.0, rope_scaling=scaling)

    edit_json(tmp_path / "config.json", use_old_keys)
    check_logits(read_folder(tmp_path)[0], peer)


def test_a_bin_file_with_the_frequencies_of_rope_is_read(tmp_path):
    peer = write_folder(tmp_path, "llama", rope_parameters=LLAMA3 | {"rope_theta": 1000.0})
    (tmp_path / "model.safetensors").unlink()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(peer.state_dict() | frequencies, tmp_path / "pytorch_model.bin")
    check_logits(read_folder(tmp_path)[0], peer)


def test_gpt2_without_prefixes_and_with_masks_is_read(tmp_path):
    """As it is on the hub."""
    peer = write_folder(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    weights = {name.removeprefix("transformer."): x for name, x in peer.state_dict().items()}
    del weights["lm_head.weight"]
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    check_logits(read_folder(tmp_path)[0], peer)


def test_the_default_of_rms_norm_eps_is_transformers(tmp_path):
    peer = write_folder(tmp_path, "llama", rms_norm_eps=1e-6)
    edit_json(tmp_path / "config.json", lambda config: config.pop("rms_norm_eps"))
    default = type(peer.config)().rms_norm_eps
    assert read_folder(tmp_path)[0].config.norm_eps == peer.config.rms_norm_eps == default


def test_qwen3_without_head_dim_has_128(tmp_path):
    peer = write_folder(tmp_path, "qwen3", head_dim=128)
    edit_json(tmp_path / "config.json", lambda config: config.pop("head_dim"))
    check_logits(read_folder(tmp_path)[0], peer)


# -----------------------------------------------------------------------------------------------------
# Out

# the preset, what is different, and the class of transformers
MODELS = {
    "llama": ("llama", {"n_kv_head": 2}, "LlamaForCausalLM"),
    "biases": ("llama", {"bias": True, "tie_embeddings": False}, "LlamaForCausalLM"),
    "llama3": (
        "llama",
        {"rope_scaling": "llama3:8,1,4,256", "rope_theta": 5e5},
        "LlamaForCausalLM",
    ),
    "linear": ("llama", {"rope_scaling": "linear:4"}, "LlamaForCausalLM"),
    "yarn": ("llama", {"rope_scaling": "yarn:4,64,16,1,1.25"}, "LlamaForCausalLM"),
    "qwen3 with yarn": ("llama", {"qk_norm": True, "rope_scaling": "yarn:8,32"}, "Qwen3ForCausalLM"),
    "qwen3": ("llama", {"qk_norm": True}, "Qwen3ForCausalLM"),
    "qwen3 of a head_dim of its own": (
        "llama",
        {"qk_norm": True, "head_dim": 24, "n_kv_head": 2},
        "Qwen3ForCausalLM",
    ),
    "mistral": ("llama", {"window": 16, "n_kv_head": 2}, "MistralForCausalLM"),
    "mistral of one window": ("llama", {"window": 256}, "MistralForCausalLM"),
    "qwen3 with windows": (
        "llama",
        {"qk_norm": True, "window": 16, "window_pattern": "SL", "n_layer": 5},
        "Qwen3ForCausalLM",
    ),
    "qwen3 with windows last": (
        "llama",
        {"qk_norm": True, "window": 16, "window_pattern": "LS"},
        "Qwen3ForCausalLM",
    ),
    "mixtral": ("llama", {"mlp": "moe", "n_expert": 5, "n_inner": 40}, "MixtralForCausalLM"),
    "qwen3_moe": (
        "llama",
        {"mlp": "moe", "qk_norm": True, "n_inner": 40, "norm_topk_prob": False},
        "Qwen3MoeForCausalLM",
    ),
    "mixtral with windows": (
        "llama",
        {"mlp": "moe", "n_expert": 4, "n_inner": 40, "window": 16},
        "MixtralForCausalLM",
    ),
    "qwen3_moe with windows": (
        "llama",
        {"mlp": "moe", "qk_norm": True, "n_inner": 40, "window": 16},
        "Qwen3MoeForCausalLM",
    ),
    "gpt2": ("gpt2", {"dropout": 0.1}, "GPT2LMHeadModel"),
    "gpt2 untied": ("gpt2", {"tie_embeddings": False}, "GPT2LMHeadModel"),
}


def save_checkpoint(path, name="llama", tokenizer=TOKENIZER, config=None, **changes):
    """Saves a model of MODELS with random weights; returns it."""
    preset, settings, _ = MODELS[name]
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 256, "n_layer": 2}
    model = build_preset(preset, **(sizes | settings | changes))
    checkpoint_file.save(
        str(path), model, tokenizer, config or {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    return model


def save_adapter(folder, model, config):
    """Saves the adapters of a model as adapter.pt, over the ckpt.pt in folder."""
    base_path = str(folder / "ckpt.pt")
    checkpoint_file.save_adapters(
        str(folder / "adapter.pt"),
        model,
        base_path,
        checkpoint_file.fingerprint(checkpoint_file.load(base_path)),
        config,
        checkpoint_file.RunState(1, 2.0, 2.0),
    )


def test_a_model_goes_out_stretched(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", "llama")
    export(tmp_path, "--out_dir=.", "--to=folder", "--block_size=512", "--rope_scaling=yarn:2,256")
    ckpt = checkpoint.open_checkpoint(str(tmp_path / "ckpt.pt"))
    ckpt.stretch("yarn:2,256", 512)
    stretched, _ = ckpt.restore()
    folder = tmp_path / "folder"
    peer = open_peer(folder)
    check_logits(stretched, peer)
    again, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/folder").restore()
    assert again.config == stretched.config
    with pytest.raises(Refusal, match="block_size is 256, and by rope_scaling=yarn:2,256 512"):
        export(tmp_path, "--out_dir=.", "--to=other", "--rope_scaling=yarn:2,256")


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name, tmp_path):
    """Equal logits, ids and greedy text in transformers, and the same bits again here."""
    model = save_checkpoint(tmp_path / "ckpt.pt", name)
    export(tmp_path, "--out_dir=.", "--to=folder")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "folder"]
    folder = tmp_path / "folder"
    peer = open_peer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert type(peer).__name__ == MODELS[name][2]
    check_logits(model, peer)

    for text in texts(60):
        if EOT not in text:
            assert tokenizer(text).input_ids == prompt_ids(TOKENIZER, text)
            assert tokenizer.decode(TOKENIZER.encode(text)) == text
    assert tokenizer.model_max_length == 256
    assert tokenizer.eos_token_id == TOKENIZER.eot
    assert peer.config.eos_token_id == TOKENIZER.eot
    assert peer.generation_config.eos_token_id == TOKENIZER.eot

    prompt = prompt_ids(TOKENIZER, "the cat")
    *_, [row] = sample.generate(model, [prompt], 60, temperature=0, stop=TOKENIZER.ends)
    reference = peer.generate(
        **tokenizer("the cat", return_tensors="pt"), do_sample=False, max_new_tokens=60
    )[0, len(prompt) :].tolist()
    n = len(row.ids)
    assert len(set(row.ids)) > 3
    assert reference[:n] == row.ids
    assert n == 60 or reference[n] == TOKENIZER.eot
    empty = tokenizer("", return_tensors="pt")
    assert peer.generate(**empty, max_new_tokens=1).shape == (1, 2)

    before = checkpoint_file.load(str(tmp_path / "ckpt.pt"))
    after = checkpoint_file.load(f"hf:{folder}")
    settings = before["model_config"]
    assert {key: after["model_config"][key] for key in settings} == settings
    assert checkpoint_file.fingerprint(before) == checkpoint_file.fingerprint(after)


TURNS = ["the cat", "sat on", "the mat?", "No.", "Where then"]


@pytest.mark.parametrize("rule", [AS_IT_STANDS, STRIPPED])
@pytest.mark.parametrize("template", ["Q: {prompt}\nA:", "{# {{ {prompt} #}\n}}", "{prompt}\n"])
def test_the_template_of_a_fine_tuned_model_goes_out_and_in_again(template, rule, tmp_path):
    """AutoTokenizer's apply_chat_template gives the ids that chat.py does, and here the tokenizer stays our own."""
    settings = {"template": template, "text_rule": rule}
    save_checkpoint(tmp_path / "ckpt.pt", config=settings)
    export(tmp_path, "--out_dir=.", "--to=folder")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    for n in 1, 3, 5:
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": role, "content": text} for role, text in zip(roles, TURNS[:n])]
        ids = conversation_ids(TOKENIZER, messages, template)
        text = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == TOKENIZER.decode(ids)
        if template.endswith("\n"):  # else a token may join a prompt and its answer
            assert peer(text, add_special_tokens=False).input_ids == ids
    after = checkpoint_file.load(f"hf:{tmp_path}/folder")
    assert after["config"] == settings
    assert (
        after["tokenizer_sha256"] == checkpoint_file.load(str(tmp_path / "ckpt.pt"))["tokenizer_sha256"]
    )

    # where transformers 4 keeps it
    path = tmp_path / "folder/chat_template.jinja"
    source = path.read_text()
    edit_json(tmp_path / "folder/tokenizer_config.json", lambda data: data.update(chat_template=source))
    path.unlink()
    assert checkpoint_file.load(f"hf:{tmp_path}/folder")["config"] == settings

    # an edited one is a chat template as any other folder's
    path.write_text(source + "!")
    edited = checkpoint.open_checkpoint(f"hf:{tmp_path}/folder")
    assert edited.config == {}
    text = edited.restore()[1].chat_template.render(messages, add_generation_prompt=True)
    assert text == TOKENIZER.decode(ids) + "!"


def test_a_template_that_stays_behind_is_named(tmp_path, capsys):
    """Where the tokenizer's own files go out, of which a chat template may be one."""
    for template, is_named in ("Q: {prompt}\nA:", True), ("", False):
        write_folder(tmp_path / "a", "llama", smollm)
        model, tokenizer = checkpoint.open_checkpoint(f"hf:{tmp_path}/a").restore()
        path = str(tmp_path / "ckpt.pt")
        checkpoint_file.save(path, model, tokenizer, {"template": template}, checkpoint_file.RunState())
        export(tmp_path, "--out_dir=.", "--to=folder", "--overwrite")
        assert ("the template 'Q: {prompt}\\nA:'; a .gguf has it" in capsys.readouterr().out) == is_named
        assert not (tmp_path / "folder/chat_template.jinja").exists()


@pytest.mark.parametrize("tokenizer", [tinylm, smollm, tinyllama, qwen])
def test_a_foreign_tokenizer_goes_out_as_it_came_in(tokenizer, tmp_path):
    write_folder(tmp_path / "a", "llama", tokenizer)
    keys = {"chat_template": "{{ messages }}", "unk_token": "Z", "pad_token": "12"}
    edit_json(tmp_path / "a/tokenizer_config.json", lambda config: config.update(keys))
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [0, 2],\r\n "top_p": 0.8}')
    (tmp_path / "a/chat_template.jinja").write_text("{{ bos_token }}")
    export(tmp_path, "--out_dir=hf:a", "--to=b")
    for name in FILES:
        if (tmp_path / "a" / name).exists():
            assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert before.special_tokens_map == after.special_tokens_map
    assert before.chat_template == after.chat_template == "{{ bos_token }}"
    for text in texts(500):
        assert after(text).input_ids == before(text).input_ids
        ids = before(text, add_special_tokens=False).input_ids
        assert after(text, add_special_tokens=False).input_ids == ids
    fingerprints = [
        checkpoint_file.fingerprint(checkpoint_file.load(f"hf:{tmp_path}/{f}")) for f in "ab"
    ]
    assert fingerprints[0] == fingerprints[1]
    assert hf_folder.read_tokenizer(str(tmp_path / "b")).ends == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [smollm, tinyllama])
def test_a_foreign_tokenizer_goes_out_to_onnx(tokenizer, tmp_path, monkeypatch, capsys):
    for library in "onnx", "onnxscript", "onnxruntime":
        pytest.importorskip(library)
    import export_onnx

    monkeypatch.chdir(tmp_path)
    write_folder("a", "llama", tokenizer)
    call(export_onnx, "--out_dir=hf:a", "--to=b", "--seconds=0")
    capsys.readouterr()
    outputs = []
    for model in "--onnx=b", "--out_dir=hf:a", "--onnx=b/model.onnx":
        for start in "the cat at 12", "":
            call(sample, model, f"--start={start}", "--max_new_tokens=40")
        lines = capsys.readouterr().out.splitlines()
        # without the paths and the speed
        outputs.append([line for line in lines if not line.startswith(("prefill", "b/", "hf:a"))])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len("".join(outputs[0])) > 400
    foreign = read_folder("a")[1]
    reference = tokenizers.Tokenizer.from_file("b/tokenizer.json")
    reference.encode_special_tokens = True
    for text in texts(20):
        assert reference.encode(text, add_special_tokens=False).ids == foreign.encode(text)


@pytest.mark.slow
def test_ends_that_config_json_alone_names_go_out_to_onnx(tmp_path, monkeypatch):
    for library in "onnx", "onnxscript", "onnxruntime":
        pytest.importorskip(library)
    import export_onnx
    import onnx_model

    monkeypatch.chdir(tmp_path)
    write_folder("a", "llama", tinylm)
    for name in "tokenizer_config.json", "generation_config.json":
        Path("a", name).unlink()
    start = {"post_processor": bos_processor(EOT, 0)}
    edit_json(Path("a/tokenizer.json"), lambda config: config.update(start))
    edit_json(Path("a/config.json"), lambda config: config.update(eos_token_id=[0, 200]))
    call(export_onnx, "--out_dir=hf:a", "--to=b", "--seconds=0")
    _, tokenizer, _ = onnx_model.load("b")
    assert (tokenizer.bos, tokenizer.ends) == (0, (0, 200))


def test_a_character_model_goes_out(tmp_path):
    tokenizer = Tokenizer.char(DOCS)
    save_checkpoint(tmp_path / "ckpt.pt", tokenizer=tokenizer)
    export(tmp_path, "--out_dir=.", "--to=folder")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    for doc in DOCS:
        ids = tokenizer.encode(doc)
        assert reference(doc).input_ids == ids
        assert reference.decode(ids) == doc
    assert read_folder(tmp_path / "folder")[1].sha256 == tokenizer.sha256


# -----------------------------------------------------------------------------------------------------
# Where it is written


@pytest.fixture
def occupied(tmp_path):
    """A folder with a checkpoint, and a folder `to` with a file in it."""
    save_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "to").mkdir()
    (tmp_path / "to/note").write_text("x")
    return tmp_path


def test_a_folder_in_the_way_stays(occupied):
    save_checkpoint(occupied / "post.pt", norm_position="post")
    for argv, message in (
        (["--out_dir=ckpt.pt", "--to=to"], "--overwrite"),
        (["--out_dir=post.pt", "--to=new"], "norm_position=post"),
        (["--out_dir=post.pt", "--to=to", "--overwrite"], "norm_position=post"),
    ):
        with pytest.raises(Refusal, match=message):
            export(occupied, *argv)
        assert sorted(os.listdir(occupied)) == ["ckpt.pt", "post.pt", "to"]
        assert os.listdir(occupied / "to") == ["note"]


def test_overwrite_moves_a_folder_aside(occupied):
    export(occupied, "--out_dir=ckpt.pt", "--to=to", "--overwrite")
    [old] = occupied.glob("to.old-*")
    assert os.listdir(old) == ["note"]
    assert (occupied / "to/model.safetensors").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_who_may_read_a_folder_may_read_its_weights(mask, occupied):
    before = os.umask(mask)
    try:
        export(occupied, "--out_dir=ckpt.pt", "--to=new")
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode) for path in (occupied / "new").iterdir()}
    assert modes == {oct(0o100666 & ~mask)}


def test_a_full_disk_leaves_nothing(occupied):
    message = "cannot write model.safetensors: .*File too large"
    with file_size_limit(20_000), pytest.raises(Refusal, match=message) as e:
        export(occupied, "--out_dir=ckpt.pt", "--to=new")
    assert e.value.status == 1
    assert "\n" not in str(e.value)
    assert sorted(os.listdir(occupied)) == ["ckpt.pt", "to"]


def test_a_folder_that_the_model_is_read_from_is_not_overwritten(tmp_path):
    folder = tmp_path / "folder"
    (folder / "out/demo").mkdir(parents=True)
    save_checkpoint(folder / "out/demo/ckpt.pt")
    model = save_checkpoint(folder / "ckpt.pt")
    export(folder, "--out_dir=ckpt.pt", "--to=out/hub")
    cfg = lora.LoRAConfig(rank=1)
    lora.inject(model, cfg)
    save_adapter(folder, model, asdict(cfg))
    export(folder, "--adapter=adapter.pt", "--to=out/peft")
    for argv in (
        ["--out_dir=out/demo", "--to=out"],
        ["--out_dir=out/demo", "--to=out/demo"],
        ["--out_dir=hf:out/hub", "--to=out"],
        ["--out_dir=ckpt.pt", "--adapter=hf:out/peft", "--to=out"],
        ["--out_dir=out/demo", f"--to={folder}"],
        ["--out_dir=ckpt.pt", f"--to={folder.parent}"],
    ):
        with pytest.raises(Refusal, match="cannot be written: .* is in it"):
            export(folder, *argv, "--overwrite")
    assert os.listdir(folder / "out/demo") == ["ckpt.pt"]
    assert not list(tmp_path.parent.glob("*.old-*"))
    assert not list(tmp_path.rglob("*.old-*"))


# -----------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    "make, class_name",
    [
        (smollm, "PreTrainedTokenizerFast"),
        (smollm, "GPT2Tokenizer"),
        (tinyllama, "PreTrainedTokenizerFast"),
        (tinyllama, "LlamaTokenizer"),
        (tinylm, "GPT2Tokenizer"),
        (llama_metaspace_first, "PreTrainedTokenizerFast"),
        (llama_metaspace_always, "PreTrainedTokenizerFast"),
        (gpt2_with_prefix_space, "PreTrainedTokenizerFast"),
    ],
)
def test_a_tokenizer_of_a_folder_does_what_transformers_does(make, class_name, tmp_path):
    write_tokenizer(tmp_path, make)
    edit_json(
        tmp_path / "tokenizer_config.json", lambda config: config.update(tokenizer_class=class_name)
    )
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    assert tokenizer.eot == reference.eos_token_id
    head = reference("").input_ids
    assert tokenizer.bos == (head[0] if head else None)

    special = [token.content for token in reference.added_tokens_decoder.values() if token.special]
    # no second space is put before a text that begins with one, and decoding takes one away
    takes_a_space = make not in (smollm, tinyllama, tinylm)
    for text in texts(200):
        ids = tokenizer.encode(text)
        lossy = takes_a_space and text.startswith(" ")
        assert tokenizer.eot not in ids
        assert lossy or tokenizer.decode(ids) == text
        # LlamaTokenizer puts no second space there either, whatever tokenizer.json says
        other_ids = class_name == "LlamaTokenizer" and text.startswith(" ")
        if not other_ids and not any(token in text for token in special):
            assert reference(text, add_special_tokens=False).input_ids == ids
            assert reference(text).input_ids == [*head, *ids]
        check_halves(tokenizer, text, lossy)
    assert tokenizer.encode_batch(texts(20)) == [tokenizer.encode(text) for text in texts(20)]
    with pytest.raises(ValueError, match="outside this vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def check_halves(tokenizer, text, lossy):
    """What goes on after the first half of a text is the second one, whatever its ids."""
    for cut in range(0, len(text), 5):
        rest = tokenizer.encode_more(text[cut:])
        whole = tokenizer.decode(tokenizer.encode(text[:cut]) + rest)
        takes_a_prefix = cut == 0 and tokenizer.prefix
        assert whole == text or lossy or takes_a_prefix
        assert tokenizer.decode_more(rest) == text[cut:]
        stream = tokenizer.stream()
        assert "".join(map(stream, rest)) + stream(None) == text[cut:]


@pytest.mark.parametrize(
    "make",
    [
        smollm,
        tinyllama,
        tinylm,
        llama_metaspace_first,
        llama_metaspace_always,
        gpt2_with_prefix_space,
    ],
)
def test_a_tokenizer_is_the_same_after_it_was_written(make, tmp_path):
    write_tokenizer(tmp_path, make)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    again = load_tokenizer(tokenizer.to_str())
    assert type(again) is type(tokenizer)
    assert again.sha256 == tokenizer.sha256
    assert again.eot == tokenizer.eot
    assert again.bos == tokenizer.bos
    assert again.vocab_size == tokenizer.vocab_size
    for text in texts(200):
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("make", [smollm, tinyllama])
def test_the_bytes_of_a_foreign_tokenizers_tokens_are_those_of_the_text(make):
    """What bits a byte are counted with."""
    tokenizer = load_backend(make)
    documents = [text for text in texts(50) if text]
    ids = stream(documents, True, tokenizer)
    unit, lengths = likelihood.units(tokenizer.encode_batch(documents), tokenizer, few=False)
    assert np.bincount(unit, lengths).tolist() == [len(document.encode()) for document in documents]
    assert likelihood.split_documents(ids, tokenizer) == (documents, True)


@pytest.mark.parametrize("make", [smollm, tinyllama, qwen])
def test_data_of_a_foreign_tokenizer_is_what_sample_and_eval_read(make, tmp_path, monkeypatch):
    """Long documents in pieces too; each begins with bos where that is not the end-of-text before it."""
    monkeypatch.setattr(prepare, "CHUNK", 50)
    tokenizer = load_backend(make)
    long_document = ("the cat.\n\nate 12 é. The cat_\nsat...\n" * 9 + "cat.\n" * 30) * 2 + "end"
    documents = [long_document, "the", *DOCS[:3]]
    monkeypatch.chdir(tmp_path)
    # as prepare.py itself keeps it
    Path("tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    Path("text.txt").write_text(EOT.join(documents), encoding="utf-8")
    settings = ["--dataset=text.txt", "--tokenizer=tokenizer.json", "--name=d", "--val_fraction=0.01"]
    prepare.prepare(configure(prepare.Config, settings))
    _, data, foreign = dataset.load("data/d")
    assert foreign.sha256 == tokenizer.sha256

    train_documents, _ = likelihood.split_documents(data["train"], foreign)
    val_documents, _ = likelihood.split_documents(data["val"], foreign)
    assert train_documents[:4] == documents[:4]
    assert train_documents[4] + val_documents[0] == documents[4]
    train_ids = data["train"].tolist()
    assert stream(train_documents, False, foreign).tolist() == train_ids
    backend, _ = make()
    expected = []
    for document in documents[:4]:
        library_ids = backend.encode(document, add_special_tokens=False).ids
        expected += [*foreign.head, *library_ids, foreign.eot]
    assert train_ids[: len(expected)] == expected
    starts = np.r_[0, np.flatnonzero(data["train"] == foreign.eot) + 1]
    for start, document in zip(starts, documents[:3]):
        ids = prompt_ids(foreign, document)
        assert train_ids[start : start + len(ids)] == ids
    slices = [ids.tolist() for ids in islice(document_slices(data["train"], foreign), 3)]
    assert slices == [foreign.encode(document) for document in documents[:3]]


def small_subject(tokenizer):
    """A model with a context of 64 tokens, as eval.py asks it."""
    model = build_preset("llama", vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1)
    return evaluation.Subject("a", "a", 1, model, tokenizer, "d", "none", None)


def test_logits_of_one_row_that_are_too_many_are_made_in_parts(monkeypatch):
    subject = small_subject(TOKENIZER)
    cfg = evaluation.Config(resamples=1000)
    whole, _ = likelihood.measure(subject, DOCS, True, CPU, cfg)
    monkeypatch.setattr(likelihood, "LOGITS", 999)
    parts, _ = likelihood.measure(subject, DOCS, True, CPU, cfg)
    assert subject.model.chunked_loss
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)


BERT_TEMPLATE = {"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["</s>", 2]}
NO_BYTES = {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "byte_fallback": False, "unk_token": "zz"}
UNDERSCORES = {"replacement": "_", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: t.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "its decoder is",
        ),
        (lambda t: t.update(decoder=None), "its decoder is None|its decoder is null"),
        (lambda t: t["model"].update(type="Magic"), "does not read it"),
        (lambda t: t["model"].pop("vocab"), "does not read it"),
        (lambda t: t.pop("model"), "tokenizer.json"),
        (lambda t: t.update(post_processor=BERT_TEMPLATE), "at most one token"),
        (lambda t: t.update(post_processor=5), "does not read it"),
        (
            lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
            "does not take the text",
        ),
        (lambda t: t["model"].update(merges=[], **NO_BYTES), "does not take the text"),
        (lambda t: t["model"].update(dropout=0.5), "dropout 0.5"),
        (
            lambda t: t.update(decoder={"type": "Metaspace", **UNDERSCORES}),
            "replacement for a space is '_'",
        ),
    ],
)
def test_a_tokenizer_is_refused_by_name(edit, message, tmp_path):
    write_folder(tmp_path, "llama", tinyllama)
    edit_json(tmp_path / "tokenizer.json", edit)
    with pytest.raises(Refusal, match=message) as e:
        read_folder(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("make, space", [(smollm, True), (tinylm, True), (tinyllama, False)])
def test_add_prefix_space_may_not_contradict_the_tokenizer(make, space, tmp_path):
    write_folder(tmp_path, "llama", make)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(add_prefix_space=space))
    with pytest.raises(Refusal, match=f"add_prefix_space in tokenizer_config.json is {space}"):
        read_folder(tmp_path)


@pytest.mark.parametrize("make, space", [(tinylm, False), (tinyllama, True), (tinylm, None)])
def test_add_prefix_space_may_agree_with_the_tokenizer(make, space, tmp_path):
    write_folder(tmp_path, "llama", make)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(add_prefix_space=space))
    read_folder(tmp_path)


def test_end_of_text_is_the_tokenizers_then_the_configs(tmp_path):
    write_folder(tmp_path, "llama", smollm)

    def update(name, **keys):
        edit_json(tmp_path / name, lambda config: config.update(keys))

    def eot():
        return read_folder(tmp_path)[1].eot

    assert eot() == 0
    update("tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    assert eot() == 1
    update("tokenizer_config.json", eos_token=None)
    update("config.json", eos_token_id=[1, 0])
    assert eot() == 1
    update("config.json", eos_token_id=None)
    with pytest.raises(Refusal, match="which token ends a text"):
        read_folder(tmp_path)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("make, head", [(smollm, []), (tinyllama, [1])])
def test_add_bos_token_changes_nothing_as_in_transformers_5(make, head, add_bos, tmp_path, capsys):
    """The post_processor alone decides; a key that says otherwise is named."""
    write_tokenizer(tmp_path, make)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(add_bos_token=add_bos))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference("").input_ids == head
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    assert tokenizer.bos == (head[0] if head else None)
    assert ("add_bos_token" in capsys.readouterr().out) == (add_bos != bool(head))


def test_a_text_ends_at_each_token_that_generation_config_names(tmp_path):
    peer = write_folder(tmp_path, "llama", smollm)
    model, tokenizer = read_folder(tmp_path)
    assert tokenizer.ends == (0,)
    prompt = prompt_ids(tokenizer, "the cat")
    *_, [row] = sample.generate(model, [prompt], 30, temperature=0)
    end = row.ids[5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    model, tokenizer = read_folder(tmp_path)
    assert tokenizer.ends == (0, end)
    *_, [row] = sample.generate(model, [prompt], 30, temperature=0, stop=tokenizer.ends)
    ids = torch.tensor([prompt])
    reference = peer.generate(ids, do_sample=False, max_new_tokens=30, eos_token_id=[0, end])
    assert [*row.ids, end] == reference[0, len(prompt) :].tolist()


# -----------------------------------------------------------------------------------------------------
# What is refused

LLAMA3_WITHOUT_LENGTH = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
}
CONFIGS = [
    ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"sliding_window": 32}, "sliding_window is 32"),
    ({"head_dim": 16}, "fewer numbers"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"head_dim": "8"}, "head_dim is '8'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_local_experts": 8}, "'num_local_experts' is 8"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_.* is missing"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta is 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": 5}, "rope_scaling is 5"),
    ({"rope_theta": "x"}, "rope_theta is 'x'"),
    ({"rope_theta": 5.0}, "rope_theta is 5.0 beside"),
    ({"rope_parameters": LLAMA3_WITHOUT_LENGTH}, "original_max_position_embeddings is missing"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"logit_scale": 0.5}, "'logit_scale' is 0.5"),
    ({"is_causal": False}, "is_causal is False"),
    ({"is_causal": 1}, "is_causal is 1"),
    ({"use_bias_anywhere": False}, "'use_bias_anywhere' is False"),
    ({"logit_scale": 0}, "'logit_scale' is 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "only one can be meant"),
    ({"hidden_size": 31}, r"is \(300, 32\) and not \(300, 31\)"),
    ({"hidden_size": 33, "head_dim": None}, "multiple of n_head"),
    ({"num_attention_heads": 0}, "its sizes cannot be"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_hidden_layers": 3}, "fewer numbers"),
    ({"num_hidden_layers": 10**9}, "its sizes cannot be"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_key_value_heads": 3}, "multiple of n_kv_head"),
    ({"intermediate_size": 41}, "fewer numbers"),
    ({"intermediate_size": 39}, r"mlp.down_proj.weight is \(32, 40\) and not \(32, 39\)"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ({"attention_bias": True}, "self_attn.k_proj.bias is missing"),
    ({"vocab_size": 301}, r"lm_head.weight is \(300, 32\) and not \(301, 32\)"),
    ({"rms_norm_eps": 0}, "norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"attention_bias": 1}, "attention_bias is 1"),
]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama")
    return folder


@pytest.mark.parametrize("keys, message", CONFIGS)
def test_a_config_is_refused_by_name(keys, message, llama_folder):
    path = llama_folder / "config.json"
    whole = path.read_text()
    try:
        edit_json(path, lambda config: config.update(keys))
        with pytest.raises(Refusal, match=message) as e:
            read_folder(llama_folder)
    finally:
        path.write_text(whole)
    assert e.value.status == 2
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"attn_pdrop": 0.2}, "there is one dropout"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
        ("qwen3", {"head_dim": 4}, r"is \(8,\) and not \(4,\)"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_a_config_of_gpt2_or_qwen3_is_refused_by_name(kind, keys, message, tmp_path):
    write_folder(tmp_path, kind)
    edit_json(tmp_path / "config.json", lambda config: config.update(keys))
    with pytest.raises(Refusal, match=message):
        read_folder(tmp_path)


UP_PROJ = "model.layers.1.mlp.up_proj.weight"
# so that it is not by the number of numbers that a missing tensor is noticed
SPARE = {"spare": torch.zeros(9999)}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: {name: x for name, x in weights.items() if name != UP_PROJ} | SPARE,
            f"{UP_PROJ} is missing",
        ),
        (lambda weights: weights | SPARE, "spare has no place"),
        (
            lambda weights: weights | {UP_PROJ: weights[UP_PROJ].T.contiguous()},
            r"up_proj.weight is \(32, 40\) and not \(40, 32\)",
        ),
        (
            lambda weights: weights | {UP_PROJ: weights[UP_PROJ].to(torch.float8_e4m3fn)},
            "is float8_e4m3fn",
        ),
        (lambda weights: weights | {UP_PROJ: weights[UP_PROJ].to(torch.int8)}, "is int8"),
        (
            lambda weights: {name: weights[name] for name in (UP_PROJ, "lm_head.weight")},
            "fewer numbers than config.json needs",
        ),
    ],
    ids=["missing", "spare", "transposed", "float8", "int8", "one alone"],
)
def test_weights_are_refused_by_name(change, message, tmp_path):
    write_folder(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    # older releases map the file, which is written anew here
    weights = {name: x.clone() for name, x in load_file(path).items()}
    save_file(change(weights), path)
    with pytest.raises(Refusal, match=message) as e:
        read_folder(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind, edit",
    [
        ("llama", lambda config: config.update(tie_word_embeddings=False)),
        ("llama", lambda config: config.pop("tie_word_embeddings")),
        ("gpt2", lambda config: config.update(tie_word_embeddings=False)),
    ],
)
def test_a_file_without_a_head_is_refused_with_the_way_out(kind, edit, tmp_path):
    """transformers leaves a head that is the embedding out of the file."""
    write_folder(tmp_path, kind, tie_word_embeddings=True)
    whole, _ = read_folder(tmp_path)
    edit_json(tmp_path / "config.json", edit)
    message = 'there is no lm_head.weight, and config.json does not have "tie_word_embeddings": true; '
    with pytest.raises(Refusal, match=message) as e:
        read_folder(tmp_path)
    assert "\n" not in str(e.value)
    # what the message advises
    edit_json(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=True))
    again, _ = read_folder(tmp_path)
    assert again.config == whole.config
    for name, x in whole.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])


def test_shards_are_refused_by_name(tmp_path):
    write_folder(tmp_path, "llama", shard="10KB")
    shard, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(Refusal, match=shard.name):
        read_folder(tmp_path)
    shard.unlink()
    with pytest.raises(Refusal, match=shard.name):
        read_folder(tmp_path)

    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes(whole)

    def point_outside(index):
        index["weight_map"] = dict.fromkeys(index["weight_map"], f"../{outside.name}")

    edit_json(tmp_path / "model.safetensors.index.json", point_outside)
    with pytest.raises(Refusal, match="files of its folder"):
        read_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_folder(tmp_path, "llama", shard="10KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    name, x = next(iter(load_file(first).items()))
    weights = load_file(second) | {name: x}
    save_file({key: weight.clone() for key, weight in weights.items()}, second, {"format": "pt"})
    with pytest.raises(Refusal, match=f"{name} is in another file too"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**9),
        torch.empty(10**9, device="meta"),
        torch.zeros(1).expand(300, 32),
    ],
    ids=["stride 0", "meta", "stride 0, right shape"],
)
def test_a_small_file_takes_little_memory(tensor, tmp_path):
    """Tensors of stride 0, or on the meta device, have any number of elements."""
    peer = write_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict.fromkeys(peer.state_dict(), tensor), tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="fewer numbers"):
        read_folder(tmp_path)

    save_checkpoint(tmp_path / "ckpt.pt")
    ckpt = checkpoint_file.load(str(tmp_path / "ckpt.pt"))
    ckpt["model"] = dict.fromkeys(ckpt["model"], tensor)
    with pytest.raises(Refusal, match="weights are fewer"):
        checkpoint_file.restore(ckpt, "ckpt.pt")


def test_code_in_a_bin_file_is_refused_and_does_not_run(tmp_path):
    write_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"a": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="pytorch_model.bin") as e:
        read_folder(tmp_path)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_folder_of_a_model_is_refused(tmp_path):
    for name, message in (
        (str(tmp_path / "nowhere"), "no folder"),
        (str(tmp_path), "config.json"),
        ("a/b/c", "no folder"),
        ("", "no folder"),
    ):
        with pytest.raises(Refusal, match=message):
            checkpoint_file.load(f"hf:{name}")


@pytest.mark.parametrize("vocab_size", [500, 299])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(vocab_size, tmp_path):
    write_folder(tmp_path, "llama", vocab_size=vocab_size)
    with pytest.raises(Refusal, match=f"{vocab_size} tokens and its tokenizer 300"):
        read_folder(tmp_path)


def test_a_name_of_the_hub_without_a_network_is_one_line_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    message = "hf:HuggingFaceTB/SmolLM2-135M is no folder here and could not be downloaded"
    with pytest.raises(Refusal, match=message) as e:
        checkpoint_file.load("hf:HuggingFaceTB/SmolLM2-135M")
    assert "\n" not in str(e.value)
    assert time.monotonic() - start < 20


def test_a_downloaded_tokenizer_without_its_weights_is_named(tmp_path, monkeypatch):
    commit = "0" * 40
    model = tmp_path / "models--a--b"
    write_folder(model / "snapshots" / commit, "llama")
    (model / "snapshots" / commit / "model.safetensors").unlink()
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = hf_folder.find_folder("a/b", weights="")
    assert hf_folder.read_tokenizer(folder).sha256 == TOKENIZER.sha256
    message = "hf:a/b is no folder here and could not be downloaded.*tokenizer.json.*no weights"
    with pytest.raises(Refusal, match=message):
        checkpoint_file.load("hf:a/b")


# -----------------------------------------------------------------------------------------------------
# LoRA


def draw_adapters(model, cfg):
    """Gives the model adapters that are not zero."""
    torch.manual_seed(3)
    lora.inject(model, cfg)
    for x in lora.state_dict(model).values():
        x.copy_(0.3 * torch.randn_like(x))


def restore_adapted(base_path, adapter_path):
    """Returns the model of a checkpoint with an adapter."""
    ckpt = checkpoint_file.load(base_path)
    adapter = checkpoint_file.load(adapter_path, checkpoint_file.ADAPTER_KEYS)
    model, _ = checkpoint_file.restore(ckpt, base_path)
    checkpoint.Checkpoint(base_path, ckpt, adapter_path, adapter).restore_adapters(model)
    return model


@pytest.mark.parametrize(
    "name, keys",
    [
        ("llama", {}),
        ("llama", {"target": "q_proj,v_proj"}),
        ("qwen3", {"target": "o_proj,down_proj"}),
        ("gpt2", {}),
        ("gpt2", {"target": "q_proj"}),
        ("gpt2", {"target": "k_proj,v_proj,up_proj"}),
    ],
)
def test_our_adapter_in_peft_and_back(name, keys, tmp_path):
    base_path = str(tmp_path / "ckpt.pt")
    config = {"dataset": "stories", "template": "Q: {prompt}"}
    model = save_checkpoint(base_path, name, config=config)
    base = hf.to_transformers(model)
    cfg = lora.LoRAConfig(rank=3, alpha=5.0, **keys)
    draw_adapters(model, cfg)
    rule = {} if name == "gpt2" else {"text_rule": AS_IT_STANDS}  # older adapters say none
    save_adapter(tmp_path, model, asdict(cfg) | {"template": "A: {prompt}"} | rule)

    ids = torch.arange(60)[None]
    base_logits = base(ids).logits
    export(tmp_path, "--adapter=.", "--to=peft")
    peer = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    check_logits(model, peer)
    assert (peer(ids).logits - base_logits).abs().max() > 0.1

    export(tmp_path, "--out_dir=ckpt.pt", "--adapter=hf:peft", "--to=back")
    adapter_path = str(tmp_path / "back/adapter.pt")
    check_logits(restore_adapted(base_path, adapter_path), peer)
    adapter = checkpoint_file.load(adapter_path, checkpoint_file.ADAPTER_KEYS)
    assert adapter["config"]["base_dataset"] == "stories"  # the base's
    assert adapter["config"]["template"] == "A: {prompt}"  # the adapter's
    assert adapter["config"]["text_rule"] == rule.get("text_rule", STRIPPED)
    if name != "gpt2":  # whose q, k and v are one matrix there
        assert adapter["config"]["rank"] == 3
        for key, x in lora.state_dict(model).items():
            assert torch.equal(adapter["adapters"][key], x)

    save_checkpoint(tmp_path / "other.pt", name, norm_eps=2e-5)
    with pytest.raises(
        Refusal, match="another base than other.pt: over a base without a name as it was"
    ):
        export(tmp_path, "--out_dir=other.pt", "--adapter=hf:peft", "--to=new")


def write_adapter(folder, peer, **keys):
    """Writes an adapter as PEFT does; returns the model with it."""
    torch.manual_seed(4)
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **keys})
    model = peft.get_peft_model(peer, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.15 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


RANK_PATTERN = {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "kind, keys",
    [
        ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 7, "lora_dropout": 0.25}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        (
            "qwen3",
            {
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "rank_pattern": RANK_PATTERN,
                "alpha_pattern": {"k_proj": 1, "proj": 9},  # no module has the second name
            },
        ),
        ("gpt2", {"target_modules": ["c_attn"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 3}),
    ],
)
def test_an_adapter_of_peft_is_read(kind, keys, tmp_path, capsys):
    peer = write_adapter(tmp_path / "peft", write_folder(tmp_path / "base", kind), **keys)
    export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=lora")
    base = str(tmp_path / "base")
    note = f"hf:peft was trained over {base!r}, as it says; whether that is hf:base is not known"
    assert note in capsys.readouterr().out
    adapter_path = str(tmp_path / "lora/adapter.pt")
    adapter = checkpoint_file.load(adapter_path, checkpoint_file.ADAPTER_KEYS)
    assert adapter["config"]["lora_dropout"] == keys.get("lora_dropout", 0)
    model = restore_adapted(f"hf:{base}", adapter_path)
    check_logits(model, peer)
    lora.merge(model)
    check_logits(model, peer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "keys, message",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "lm_head.*takes an adapter"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "layers_to_transform"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        (
            {"target_modules": r".*layers\.0.*q_proj"},
            "blocks.1.attn.q_proj has no adapter where other layers have one",
        ),
        ({"lora_bias": True}, "lora_bias is True"),
        (
            {"target_modules": ["q_proj", "k_proj"], "r": 24},
            "rank 24 is more than blocks.0.attn.k_proj, 16 x 32, can have",
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 24}},
            "rank 24 is more than blocks.0.attn.k_proj",
        ),
    ],
)
def test_an_adapter_is_refused_by_name(keys, message, tmp_path):
    base = write_folder(tmp_path / "base", "llama")
    write_adapter(tmp_path / "peft", base, **{"target_modules": ["q_proj"], **keys})
    with pytest.raises(Refusal, match=message) as e:
        export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=lora")
    assert "\n" not in str(e.value)
    assert "damaged" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["base", "peft"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"r": 5}, r"lora_A.weight is \(4, 32\)"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": None}, "r is None"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
    ],
)
def test_an_adapters_config_is_checked(keys, message, tmp_path):
    write_adapter(tmp_path / "peft", write_folder(tmp_path / "base", "llama"), target_modules=["q_proj"])
    edit_json(tmp_path / "peft/adapter_config.json", lambda config: config.update(keys))
    with pytest.raises(Refusal, match=message):
        export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=lora")


# -----------------------------------------------------------------------------------------------------
# The scripts


@pytest.mark.parametrize("tokenizer, kind", [(tinyllama, "llama"), (smollm, "qwen3"), (tinylm, "gpt2")])
def test_prepare_train_and_sample_from_a_folder(tokenizer, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer = write_folder("folder", kind, tokenizer)
    write_text("text.txt")
    call(prepare, "--dataset=text.txt", "--tokenizer=hf:folder", "--name=d")
    _, data, foreign = dataset.load("data/d")
    call(
        train,
        *(setting for setting in SMALL if not setting.startswith("--n_")),
        "--dataset=d",
        "--init_from=hf:folder",
        "--max_iters=2",
        "--block_size=48",
        "--dropout=0",
        "--learning_rate=1e-9",
        "--embd_lr_scale=1",
    )
    model, model_tokenizer = checkpoint_file.restore(checkpoint_file.load("out/ckpt.pt"), "out")
    assert model.config.block_size == 48
    assert model_tokenizer.sha256 == foreign.sha256 == read_folder("folder")[1].sha256
    ids = torch.from_numpy(data["val"][:48].astype(np.int64))[None]
    with torch.no_grad():
        check_close(model(ids)[0], peer(ids).logits, 1e-3)  # the rate is next to nothing

    capsys.readouterr()
    settings = ["--start=the cat", "--max_new_tokens=8", "--temperature=0", *PLAIN_CPU]
    call(sample, "--out_dir=hf:folder", *settings)
    prompt = prompt_ids(read_folder("folder")[1], "the cat")
    generated = peer.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
    reference = generated[0, len(prompt) :].tolist()
    if foreign.eot in reference:
        reference = reference[: reference.index(foreign.eot)]
    text = f"the cat{foreign.decode_more(reference)}"
    assert text.split("\ufffd")[0] in capsys.readouterr().out  # the last character may be cut off


def test_eval_starts_from_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder("folder", "llama", tinyllama)
    write_text("text.txt")
    sizes = ["--num_samples=1", "--max_new_tokens=8", "--num_cases=22", "--resamples=1000"]
    call(evaluation, "--out_dir=hf:folder", "--text=text.txt", *sizes, *PLAIN_CPU)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path("out/compare/report.html").exists()
    with pytest.raises(Refusal, match="--text=FILE"):
        call(evaluation, "--out_dir=hf:folder")


def test_fine_tuning_starts_from_a_folder_and_ends_in_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder("folder", "llama", tinyllama)
    vocab_size = read_folder("folder")[1].vocab_size
    rows = [{"prompt": "the cat", "response": doc[:20]} for doc in DOCS[:20]]
    lines = [json.dumps(row) + "\n" for row in rows]
    Path("rows.jsonl").write_text("".join(lines), encoding="utf-8")
    sizes = ["--max_iters=1", "--rank=2", "--max_length=40"]
    settings = ["--init_from=hf:folder", "--dataset=rows.jsonl", "--out_dir=lora", *sizes]
    call(finetune_lora, *settings, *PLAIN_CPU)
    call(sample, "--adapter=lora", "--start=the cat", "--max_new_tokens=4", *PLAIN_CPU)
    assert "hf:folder and lora/adapter" in capsys.readouterr().out

    # PEFT's folder names its base
    export(tmp_path, "--adapter=lora", "--to=lora-peft")
    peer = peft.AutoPeftModelForCausalLM.from_pretrained("lora-peft")
    assert peer.config.vocab_size == vocab_size

    call(finetune_lora, "--merge", "--out_dir=lora")
    export(tmp_path, "--out_dir=lora/ckpt.pt", "--to=merged")
    peer = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert peer.config.vocab_size == vocab_size


def test_train_says_how_to_prepare_with_the_tokenizer_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder("folder", "llama", smollm)
    write_text("text.txt")
    prepare.prepare(configure(prepare.Config, ["--dataset=text.txt", "--name=d", "--vocab_size=300"]))
    settings = ["--dataset=d", "--init_from=hf:folder"]
    with pytest.raises(Refusal, match="prepare.py --tokenizer=hf:folder"):
        call(train, *settings, "--block_size=32")
    with pytest.raises(Refusal, match="block_size=64, which cannot become 128"):
        call(train, *settings, "--block_size=128")


@pytest.mark.slow
def test_the_refusal_of_a_longer_context_leads_to_a_run_that_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("text.txt")
    prepare.prepare(configure(prepare.Config, ["--dataset=text.txt", "--name=d", "--vocab_size=300"]))
    settings = [*SMALL, "--dataset=d", "--max_iters=1"]
    call(train, *settings, "--block_size=16", "--out_dir=short")
    rest = [key for key in settings if not key.startswith(("--n_", "--block_size"))]
    with pytest.raises(Refusal, match="block_size=16, which cannot become 32") as e:
        call(train, *rest, "--init_from=short", "--block_size=32", "--out_dir=long")
    advice = re.search("hf.py (.*) --to=FOLDER .* --init_from=hf:FOLDER$", str(e.value))[1]
    call(hf, *advice.split(), "--to=stretched")
    call(train, *rest, "--init_from=hf:stretched", "--out_dir=long")
    assert checkpoint_file.load("long/ckpt.pt")["model_config"]["block_size"] == 32

    call(train, *settings, "--block_size=16", "--pos=learned", "--out_dir=table")
    with pytest.raises(Refusal, match="cannot become 32; leave it out"):
        call(train, *rest, "--init_from=table", "--block_size=32", "--out_dir=longer_table")
