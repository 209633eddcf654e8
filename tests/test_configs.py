"""config.json in and out: each key of five config classes, real models' shapes, RoPE's settings twice.

hf_configs.json has the default configs of transformers 4.40 to 5.24, from each version's own
`json.loads(LlamaConfig().to_json_string(use_diff=False))`: under "all" and each kind the keys, with what
they are from which version on; a version alone is the first one without the key.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from test_hf import GPT2_SIZES, LLAMA_SIZES, export, open_peer
from test_model import redraw
from test_parity import SCALE, preset
from test_prepare import DOCS

import checkpoint_file
import hf
import sample
from config import Refusal, configure
from interop import hf_config, hf_keys, hf_layout
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TABLE = json.loads((Path(__file__).parent / "hf_configs.json").read_text(encoding="utf-8"))
VERSIONS = [(version, kind) for kind, versions in TABLE["versions"].items() for version in versions]
KINDS = [*TABLE["versions"]]


def number(version):
    return [int(part) for part in version.split(".")[:2]]


def default_config(version, kind):
    """Returns the default config of a version's class, as the table has it."""
    data = {"model_type": kind, "transformers_version": version}
    for key, history in (TABLE["all"] | TABLE[kind]).items():
        entries = [entry for entry in history if number(entry[0]) <= number(version)]
        if entries and len(entries[-1]) == 2:
            data[key] = entries[-1][1]
    return data


def installed_config(kind, **keys):
    """Returns all that the installed transformers writes for a kind."""
    config = transformers.AutoConfig.for_model(kind, **keys)
    return json.loads(config.to_json_string(use_diff=False))


def open_config(data):
    """Returns what is read of a config.json, without keys that would be passed over."""
    assert hf_keys.unknown_keys(data) == []
    keys, without = hf_config.read_config(data)
    return ModelConfig(**keys), without


# ---- keys

# they would change what is computed, where they are not empty
REFUSED_UNLESS_EMPTY = {"pruned_heads", "cross_attention_hidden_size"}


def keys_without_meaning(data):
    """Returns the keys of a config.json that have no meaning here, whatever their values."""
    return set(hf_keys.unknown_keys(dict.fromkeys(data, 1) | {"model_type": data["model_type"]}))


@pytest.mark.parametrize("version, kind", VERSIONS)
def test_the_default_config_of_each_version_is_known_key_by_key(version, kind):
    data = default_config(version, kind)
    assert keys_without_meaning(data) <= REFUSED_UNLESS_EMPTY
    window = 4096 if kind == "mistral" else 0
    assert open_config(data)[0].window == window


@pytest.mark.parametrize("kind", KINDS)
def test_the_installed_version_has_no_key_that_is_not_known(kind):
    data = installed_config(kind)
    assert keys_without_meaning(data) <= REFUSED_UNLESS_EMPTY
    version = ".".join(transformers.__version__.split(".")[:2])
    if version in TABLE["versions"][kind]:
        assert data | {"transformers_version": version} == default_config(version, kind)


def check_missing_keys(data):
    """Asserts that a config.json means the same without any key of it, each by itself, but for the sizes."""
    kind = data["model_type"]
    whole = open_config(data)
    missing = []
    for key in data.keys() - {"model_type"}:
        without_key = {name: value for name, value in data.items() if name != key}
        try:
            assert open_config(without_key) == whole, key
        except ValueError as e:
            assert str(e) == f"{key} is missing"
            missing.append(key)
    sizes = set(hf_keys.SIZES[kind].values()) - {"n_inner"} - hf_keys.DEFAULTS[kind].keys()
    assert set(missing) == sizes


@pytest.mark.parametrize("version, kind", VERSIONS)
def test_a_missing_key_is_the_default_of_its_class(version, kind):
    data = default_config(version, kind)
    if kind == "mistral":  # the window's default, 4096, is no window then
        data["max_position_embeddings"] = 4096
    check_missing_keys(data)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_missing_key_of_experts_is_the_default_of_its_class(kind):
    """That of the installed version, in which Qwen3-MoE's experts are counted by Mixtral's key."""
    data = installed_config(kind)
    if "num_local_experts" in data:
        data[hf_keys.SIZES[kind]["n_expert"]] = data.pop("num_local_experts")
    check_missing_keys(data)


PASSED = [
    ("llama", {"_name_or_path": "a/b", "_model_name_or_path": "a/b", "unk_token_id": 0}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "max_sequence_length": 64}),
    ("llama", {"bad_words_ids": [[5]], "forced_eos_token_id": 2, "prefix": "x", "num_labels": 3}),
    ("llama", {"classifier_dropout": 0.1, "neftune_noise_alpha": 5, "gradient_checkpointing": True}),
    ("llama", {"quantization_config": None, "auto_map": {}, "num_experts": None, "pruned_heads": {}}),
    ("qwen2", {"use_mrope": False, "attention_bias": True, "mlp_bias": False, "max_window_layers": 21}),
    ("mistral", {"sliding_window": None, "use_sliding_window": False, "attention_bias": False}),
    ("gpt2", {"n_ctx": 1024, "hidden_size": 768, "num_hidden_layers": 12, "summary_type": "mean"}),
]


@pytest.mark.parametrize("kind, keys", PASSED)
def test_keys_that_change_no_logit_pass_in_silence(kind, keys):
    plain = installed_config(kind) | {"sliding_window": None}
    assert open_config(plain | keys) == open_config(plain)


NOTED = [
    "my_note",
    "trained_on",
    "dataset_revision",
    "license",
    "iterations",
    "converted_from",
    "train_batch_size",
    "\x1b[31m" * 99,
]


@pytest.mark.parametrize("key", NOTED)
def test_a_key_that_nobody_knows_passes(key):
    data = installed_config("llama")
    assert hf_keys.unknown_keys(data | {key: 1}) == [key]
    assert hf_config.read_config(data | {key: 1}) == hf_config.read_config(data)


REFUSED = [
    (
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        "'auto_map' is .*own code computes it, which is not run",
    ),
    ({"quantization_config": {"bits": 4}}, "'quantization_config' is .*: weights of fewer bits"),
    ({"compression_config": {"bits": 4}}, "'compression_config' is .*: weights of fewer bits"),
    ({"num_local_experts": 8}, "'num_local_experts' is 8.*: there are no experts"),
    ({"num_experts_per_tok": 0}, "'num_experts_per_tok' is 0.*: there are no experts"),
    ({"use_moe": False}, "'use_moe' is False.*: there are no experts"),
    ({"attention_chunk_size": 8}, "'attention_chunk_size' is 8.*: such windows are not here"),
    ({"no_rope_layers": [1, 0]}, r"'no_rope_layers' is \[1, 0\].*: layers without positions"),
    ({"pruned_heads": {"0": [1]}}, "'pruned_heads' is .* may change what is computed; take it out"),
    ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "'per_layer_config' is .* may change"),
    ({"original_max_position_embeddings": 9}, "'original_max_position_embeddings' is 9.* may change"),
    ({"logit_scale": 0}, "'logit_scale' is 0.* may change"),
    ({"attention_multiplier": 0.5}, "'attention_multiplier' is 0.5.* may change"),
    ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0.* may change"),
    ({"use_bias_anywhere": False}, "'use_bias_anywhere' is False.* may change"),
    ({"text_config": {"hidden_size": 8}}, "'text_config' is .* may change"),
    ({"use_mrope": True}, "use_mrope is True; here it can only be False"),
    ({"use_sliding_window": True}, "use_sliding_window is True; here it can only be False"),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_a_key_that_may_change_what_is_computed_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message) as e:
        hf_config.read_config(installed_config("llama") | keys)
    assert len(str(e.value)) < 300 and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("gpt2", {"hidden_size": 64}, "hidden_size is 64 beside n_embd 768"),
        ("gpt2", {"rope_theta": 5.0}, "'rope_theta' is 5.0, which is not known here for gpt2"),
        ("qwen2", {"attention_bias": False}, "attention_bias is False; here it can only be True"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is True; here it can only be False"),
        ("mistral", {"attention_bias": True}, "attention_bias is True; here it can only be False"),
    ],
)
def test_a_key_of_another_kind_is_refused_by_name(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        hf_config.read_config(installed_config(kind) | keys)


def test_gpt2s_sizes_may_have_the_names_that_its_class_maps():
    own = installed_config("gpt2", n_layer=3, n_head=2, n_embd=32, n_positions=64)
    renamed = {
        name: value for name, value in own.items() if name not in hf_keys.ALIASES["gpt2"].values()
    }
    renamed |= {alias: own[key] for alias, key in hf_keys.ALIASES["gpt2"].items()}
    assert open_config(renamed) == open_config(own)
    assert transformers.GPT2Config(**renamed).to_dict() == transformers.GPT2Config(**own).to_dict()


WHOLE = {"num_hidden_layers": 4, "max_position_embeddings": 64}
FULL = ["full_attention"] * 4
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
QWENS = {"use_sliding_window": True, "sliding_window": 32}
WINDOWS = [
    ("llama", {"sliding_window": None}, None),
    ("llama", {"sliding_window": 64}, None),
    (
        "llama",
        {"sliding_window": 63},
        "sliding_window is 63 in a context of 64: not here in a LlamaForCausalLM",
    ),
    ("llama", {"layer_types": FULL}, None),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 64}, (64, "S")),
    ("mistral", {"sliding_window": 65}, None),
    ("mistral", {"sliding_window": 64, "layer_types": FULL}, None),
    ("mistral", {}, None),  # 4096 of its class
    ("mistral", {"max_position_embeddings": 4097}, (4096, "S")),
    ("mistral", {"sliding_window": 8}, (8, "S")),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0 in a context of 64: not here in a Mistral"),
    ("mistral", {"sliding_window": 8, "layer_types": FULL}, "sliding_window is 8"),
    ("llama", {"sliding_window": 8}, "with max_position_embeddings 8 in config.json there is none"),
    ("mistral", {"sliding_window": "8"}, "sliding_window is '8', where a number"),
    ("qwen2", {"sliding_window": 32}, None),
    ("qwen3", {"sliding_window": 32, "use_sliding_window": False}, None),
    ("qwen2", QWENS, None),  # from layer 28 on, of its class
    ("qwen3", QWENS | {"max_window_layers": 4}, None),
    ("qwen3", QWENS | {"max_window_layers": 3}, (32, "LLLS")),
    ("qwen2", QWENS | {"max_window_layers": 0}, (32, "S")),
    ("qwen3", QWENS | {"layer_types": MIXED}, (32, "SLS")),
    ("qwen3", QWENS | {"layer_types": MIXED, "use_sliding_window": False}, "without use_sliding_window"),
    ("qwen3", QWENS | {"layer_types": MIXED[:3]}, "for 4 layers"),
    ("qwen3", QWENS | {"layer_types": [[], *FULL[1:]]}, "for 4 layers"),
    ("qwen3", QWENS | {"layer_types": "full_attention"}, "for 4 layers"),
    ("qwen2", QWENS | {"max_window_layers": 0, "sliding_window": 64}, (64, "S")),
    ("qwen2", QWENS | {"max_window_layers": 0, "sliding_window": None}, None),
    ("qwen2", QWENS | {"max_window_layers": 0, "layer_types": FULL}, None),
    ("qwen2", {"layer_types": ["sliding_attention", *FULL[1:]]}, "layer_types is"),
    ("qwen3", {"layer_types": FULL[1:]}, "here it is full_attention or sliding_attention for 4 layers"),
    ("qwen3", {"use_sliding_window": 1}, "use_sliding_window is 1, where true or false"),
    ("qwen3_moe", {}, None),
    ("qwen3_moe", {"sliding_window": 32}, None),
    ("qwen3_moe", QWENS, (32, "S")),
    ("qwen3_moe", QWENS | {"layer_types": FULL}, "sliding_window is 32 in a context of 64: not here"),
]


@pytest.mark.parametrize("kind, keys, outcome", WINDOWS)
def test_windows_are_read_or_refused_by_name(kind, keys, outcome):
    """outcome: a message, or (window, window_pattern), None for no window."""
    data = installed_config(kind) | WHOLE
    data = {key: value for key, value in data.items() if "window" not in key and key != "layer_types"}
    if isinstance(outcome, str):
        with pytest.raises(ValueError, match=outcome):
            hf_config.read_config(data | keys)
        return
    c = open_config(data | keys)[0]
    assert (c.window, c.window_pattern) == (outcome or (0, "S"))


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "smollm3",
            "model_type is 'smollm3': one layer in four has no positions; only llama, qwen2, qwen3",
        ),
        ("gemma3_text", "its norms multiply by 1"),
        ("phi", "it rotates only a part"),
        ("phi3", "its q, k and v are one tensor"),
        ("olmoe", "'olmoe': it has experts of another kind"),
        ("gpt_oss", "'gpt_oss': it has experts of another kind"),
        ("opt", "model_type is 'opt'; only"),
    ],
)
def test_kinds_that_are_not_here_are_refused_with_the_reason(kind, message):
    with pytest.raises(ValueError, match=message):
        hf_config.read_config(installed_config(kind))


# ---- shapes of real models, as their config.json has them, with 2 layers, 300 tokens and random weights

SHAPES = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "distilgpt2": {
        "model_type": "gpt2",
        "_num_labels": 1,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    },
}
# a quarter as wide where the whole takes more than a second or two
SHAPES["Mistral-7B-v0.3, a quarter"] = SHAPES["Mistral-7B-v0.3"] | {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
SLOW = "Llama-3.2-1B", "Qwen2.5-7B", "Mistral-7B-v0.3"


def random_peer(data):
    """Returns transformers' model of a config.json, every weight random, biases and gains too."""
    width = data.get("hidden_size") or data["n_embd"]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**data | {"initializer_range": 1.2 * width**-0.5})
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in peer.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return peer.eval()


@torch.no_grad()
def close(model, peer):
    """Asserts equal logits, and the same 20 tokens greedily."""
    V = model.config.vocab_size
    ids = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = model(ids)[0]
    assert logits.std() > 0.5
    assert (logits - peer(ids).logits).abs().max() / logits.std() < 1e-4
    peer.generation_config.eos_token_id = None
    prompt = ids[:1, :10]
    reference = peer.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)[
        0, 10:
    ].tolist()
    *_, [row] = sample.generate(model, prompt.tolist(), 20, temperature=0)
    assert row.ids == reference
    assert len(set(reference)) > 2


def own_model(data, tensors):
    """Returns our model of a config.json and its tensors."""
    keys, without = hf_config.read_config(data)
    c = ModelConfig(**keys)
    model = Transformer(c)
    model.load_state_dict(hf_layout.from_hf(data["model_type"], c, tensors, without))
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SHAPES]
)
def test_real_shapes_compute_what_transformers_does(name):
    layers = "n_layer" if SHAPES[name]["model_type"] == "gpt2" else "num_hidden_layers"
    data = SHAPES[name] | {layers: 2, "vocab_size": 300}
    peer = random_peer(data)
    assert hf_keys.unknown_keys(data) == []
    model = own_model(data, peer.state_dict())
    close(model, peer)


@pytest.mark.parametrize(
    "kind, keys",
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 1}),
        ("mistral", {"sliding_window": None, "head_dim": 24}),
    ],
)
def test_windows_are_those_of_transformers(kind, keys):
    data = installed_config(kind, **small(kind), **keys)
    peer = random_peer(data)
    model = own_model(data, peer.state_dict())
    ids = torch.randint(300, (1, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(ids)[0]
        assert (logits - peer(ids).logits).abs().max() / logits.std() < 1e-4


# ---- folders


def small(kind):
    sizes = GPT2_SIZES if kind == "gpt2" else LLAMA_SIZES
    return {key: value for key, value in sizes.items() if key != "head_dim"} | {"vocab_size": 300}


def write_folder(folder, kind, **keys):
    """Writes a folder as transformers does, with our tokenizer of 300 tokens; returns the model."""
    tokenizer = Tokenizer.train(DOCS, 300)
    peer = random_peer(installed_config(kind, **small(kind) | keys))
    peer.save_pretrained(folder)
    hf.write_tokenizer(folder, tokenizer, 64)
    return peer


def load_folder(folder):
    path = f"hf:{folder}"
    return checkpoint_file.restore(checkpoint_file.load(path), path)[0].eval()


def test_unknown_keys_are_named_in_one_line(tmp_path, capsys):
    peer = write_folder(tmp_path, "llama")
    capsys.readouterr()
    close(load_folder(tmp_path), peer)
    assert capsys.readouterr().out == ""
    data = json.loads((tmp_path / "config.json").read_text())
    more = {f"note_{i}": i for i in range(9)}
    (tmp_path / "config.json").write_text(json.dumps(data | {"\x1b[31m" * 99: 1} | more))
    close(load_folder(tmp_path), peer)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out
    assert (
        "'note_3' and 5 more in config.json is passed over: transformers does not have that for llama"
        in out
    )
    (tmp_path / "config.json").write_text(json.dumps(data | {"logit_scale": 2.0}))
    with pytest.raises(Refusal, match="'logit_scale' is 2.0, which is not known here for llama: it may"):
        load_folder(tmp_path)


def test_qwen2_goes_out_as_it_came_in(tmp_path):
    from safetensors.torch import load_file

    peer = write_folder(tmp_path / "a", "qwen2", tie_word_embeddings=True, rope_theta=5e5)
    model = load_folder(tmp_path / "a")
    close(model, peer)
    export(tmp_path, "--out_dir=hf:a", "--to=b")
    again = open_peer(tmp_path / "b")
    assert type(again).__name__ == "Qwen2ForCausalLM"
    close(model, again)
    before = load_file(tmp_path / "a/model.safetensors")
    after = load_file(tmp_path / "b/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("changed", ["o_proj.bias", "down_proj.bias"])
def test_qwen2_with_more_biases_goes_out_as_llama(changed, tmp_path):
    write_folder(tmp_path / "a", "qwen2")
    model = load_folder(tmp_path / "a")
    for name, p in model.named_parameters():
        if name.endswith(f"1.attn.{changed}") or name.endswith(f"1.mlp.{changed}"):
            p.data[3] = 0.7
    tokenizer = Tokenizer.train(DOCS, 300)
    checkpoint_file.save(
        str(tmp_path / "ckpt.pt"), model, tokenizer, {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    export(tmp_path, "--out_dir=ckpt.pt", "--to=b")
    again = open_peer(tmp_path / "b")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert again.config.attention_bias and again.config.mlp_bias
    close(model, again)


def test_mistral_goes_out_as_llama(tmp_path):
    peer = write_folder(tmp_path / "a", "mistral", sliding_window=None, head_dim=24)
    model = load_folder(tmp_path / "a")
    close(model, peer)
    export(tmp_path, "--out_dir=hf:a", "--to=b")
    again = open_peer(tmp_path / "b")
    assert type(again).__name__ == "LlamaForCausalLM"
    close(model, again)


# ---- RoPE's settings, for versions 4 and 5 of transformers

OLD_KEYS = "rope_theta", "rope_scaling"
ROPES = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_scaling": "linear:4", "rope_theta": 5e5},
    "llama3": {"rope_scaling": "llama3:8,1,4,256", "rope_theta": 5e5},
    "qwen3": {"qk_norm": True, "rope_scaling": "linear:2.5", "rope_theta": 1e6},
    "ntk": {"rope_scaling": "ntk:8", "rope_theta": 500.0},
    "yarn": {"rope_scaling": "yarn:64,16", "rope_theta": 5e5},
    "yarn whole": {"rope_scaling": "yarn:16,64,8,0.5,1.25"},
    "qwen3 yarn": {"qk_norm": True, "rope_scaling": "yarn:16,64", "rope_theta": 1e6},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_written_twice_and_either_is_enough(name):
    c = preset("llama", **{"vocab_size": 300, "n_layer": 2, "qk_norm": False} | ROPES[name])
    model = redraw(Transformer(c), SCALE).eval()
    data, tensors = hf_layout.to_hf(c, model.state_dict())
    old = {key: value for key, value in data.items() if key != "rope_parameters"}
    new = {key: value for key, value in data.items() if key not in OLD_KEYS}
    neither = {key: value for key, value in old.items() if key not in OLD_KEYS}
    for keys in data, old, new:
        assert rope_difference(model, keys, tensors) < 1e-4
        assert hf_config.read_config(keys) == hf_config.read_config(data)
    assert rope_difference(model, neither, tensors) > 0.01


@torch.no_grad()
def rope_difference(model, data, tensors):
    """Returns how far transformers' logits are from ours with this config.json, in our deviations."""
    settings = {key: value for key, value in data.items() if "dtype" not in key}
    config = transformers.AutoConfig.for_model(**settings)
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    peer.load_state_dict(tensors)
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(1))
    logits = model(ids)[0]
    return (peer.eval()(ids).logits - logits).abs().max() / logits.std()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "kind, changes, written",
    [
        ("llama", {}, {"max_position_embeddings": 64, "rope_scaling": YARN}),
        ("llama", {"qk_norm": True}, {"max_position_embeddings": 256, "rope_scaling": YARN}),
        (
            "llama",
            {"qk_norm": True, "mlp": "moe"},
            {"max_position_embeddings": 256, "rope_scaling": YARN},
        ),
    ],
)
def test_yarn_is_written_for_each_version_that_knows_the_kind(kind, changes, written):
    """Up to 4.50 the context of pre-training is max_position_embeddings, and there is no Qwen3; from 4.51
    to 4.55 the factor is max_position_embeddings over original_max_position_embeddings.
    """
    c = preset("llama", rope_scaling="yarn:4,64", block_size=256, **changes)
    data, _ = hf_layout.to_hf(c, {})
    assert {key: data[key] for key in written} == written
    assert hf_config.read_config(data)[0]["block_size"] == 256


def test_a_context_that_is_not_yarns_is_refused_on_the_way_out():
    c = preset("llama", rope_scaling="yarn:4,64", block_size=255)
    with pytest.raises(ValueError, match="block_size is 255, and by rope_scaling=yarn:4,64 256"):
        hf_layout.to_hf(c, {})


def test_mlx_lm_has_the_attention_factor_as_mscale():
    """By its formula, in mlx_lm/models/rope_utils.py of 0.32.2, where mscale_all_dim is 0."""
    scaling = hf_config.write_rope_scaling("yarn:8,128,32,1,0.75")
    assert 0.1 * scaling["mscale"] * math.log(scaling["factor"]) + 1 == pytest.approx(0.75)
    assert scaling["attention_factor"] == 0.75


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, (10000.0, "none")),
        ({"rope_scaling": YARN}, (10000.0, "yarn:4,64")),
        ({"rope_scaling": YARN | {"truncate": True, "beta_fast": None}}, (10000.0, "yarn:4,64")),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, (10000.0, "yarn:4,64,32,1,1.5")),
        ({"rope_theta": 5.0, "rope_scaling": None}, (5.0, "none")),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5.0}}, (5.0, "none")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (10000.0, "linear:2")),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5},
            },
            (5, "linear:2"),
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}},
            (5.0, "none"),
        ),
    ],
)
def test_rope_is_read_from_either_place(keys, expected):
    assert hf_config.read_rope(keys) == expected


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 5.0}},
            "rope_scaling is linear:2 and rope_parameters none, of which only one",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5.0}},
            "rope_theta is 10000.0 beside .* 5.0",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention is"),
        ({"rope_parameters": [5]}, r"rope_parameters is \[5\], where an object"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            "rope_type is 'dynamic'; only default, linear",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "original_max_position_embeddings is missing",
        ),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale is 1.0"),
        ({"rope_scaling": YARN | {"mscale": 1.0, "attention_factor": 1.0}}, "mscale is 1.0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"beta_slow": 2.0}},
            "yarn:4,64 and rope_parameters yarn:4,64,32,2, of which only one",
        ),
    ],
)
def test_two_ropes_that_disagree_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        hf_config.read_rope(keys)
