"""Out to Hugging Face's folders and in from what transformers and PEFT write there, with their own classes as the second implementation."""

import contextlib
import json
import os
import random
import resource
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import redraw
from test_parity import SCALE, preset
from test_prepare import DOCS
from test_train import CPU, SMALL

import checkpoint
import eval as evaluation
import finetune_lora
import hf
import lora
import prepare
import sample
import train
from config import Refusal, configure
from data import document_slices, prompt_ids
from interop import hf_folder
from interop.any_tokenizer import from_tokenizer_json, load_tokenizer
from model import HAS_CHUNKED_LOSS, Transformer
from score import token_nats
from tokenizer import EOT, Tokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

OURS = Tokenizer.train(DOCS, 300)
WORDS = [
    "the ",
    " cat",
    "é",
    "\n",
    "   ",
    "12",
    "'s",
    "你",
    "🙂",
    ".",
    "don't",
    "\t",
    " a",
    "Z",
    EOT,
    "</s>",
    "<0x41>",
    "\ufeff",
    "́",
]


def texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.randrange(12))) for _ in range(n)]


def smol():
    """As SmolLM's: byte-level, each digit on its own."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        DOCS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[EOT, "<|im_start|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return made, {"eos_token": EOT, "bos_token": EOT}


def tiny():
    """As TinyLlama's: a space before each text, <s> before that, bytes for what has no token."""
    vocab = {
        text: i
        for i, text in enumerate(
            [
                "<unk>",
                "<s>",
                "</s>",
                *(f"<0x{b:02X}>" for b in range(256)),
                "▁",
                "t",
                "h",
                "e",
                "c",
                "a",
                "▁t",
                "▁th",
                "▁the",
                "▁c",
                "▁ca",
                "at",
            ]
        )
    }
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("a", "t")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made, {"eos_token": "</s>", "bos_token": "<s>"}


def space(pre):
    """As tokenizers that put a space before a text where there is none yet: Llama's newer kind, or GPT-2's with add_prefix_space."""

    def make():
        made, ends = tiny() if isinstance(pre, pre_tokenizers.Metaspace) else smol()
        made.pre_tokenizer, made.normalizer = pre, None
        return made, ends

    return make


def qwen():
    """As Qwen's, to which a mark and the end of its line are one word."""
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        tokenizers.Regex(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [".\n\n_\n...\n cat.\n"] * 999 + DOCS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[EOT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return made, {"eos_token": EOT, "bos_token": EOT}


def ours():
    return tokenizers.Tokenizer.from_str(OURS.to_str()), {"eos_token": EOT, "bos_token": EOT}


def write(folder, kind, tokenizer=ours, shard="5GB", dtype=torch.float32, **keys):
    """A folder as transformers writes it, of a model with random weights, small enough for a test; returns the model."""
    made, ends = tokenizer()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **ends).save_pretrained(folder)
    sizes = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        if kind == "gpt2"
        else {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "head_dim": 8,
        }
    )
    eot = made.token_to_id(ends["eos_token"])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": made.get_vocab_size(),
            "initializer_range": 0.2,
            "bos_token_id": eot,
            "eos_token_id": eot,
            **sizes,
            **keys,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # gains and biases too
                p.add_(0.3 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()  # .to() rounds RoPE's frequencies


def read(folder):
    path = f"hf:{folder}"
    return checkpoint.restore(checkpoint.load(path), path)


def close(a, b, tolerance=1e-4):
    assert b.std() > 0.5 and (a - b).abs().max() / b.std() < tolerance


@torch.no_grad()
def same_logits(model, peer, V):
    idx = torch.randint(V, (2, 60), generator=torch.Generator().manual_seed(1))
    close(model(idx)[0], peer(idx).logits[..., :V])


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FOLDERS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "theta": ("llama", {"rope_theta": 500.0}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "attention biases": ("llama", {"attention_bias": True}),
    "mlp biases": ("llama", {"mlp_bias": True}),
    "sharded": ("llama", {"shard": "10KB"}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16, "shard": "10KB", "tie_word_embeddings": True}),
    "padded": ("llama", {"vocab_size": 320}),
    "smol": ("llama", {"tokenizer": smol}),
    "tiny": ("llama", {"tokenizer": tiny}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "shard": "10KB"}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "wide heads": ("llama", {"head_dim": 20}),
    "qwen3 0.6B": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": (
        "gpt2",
        {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3, "shard": "10KB"},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_transformers_writes_is_read(name, tmp_path):
    kind, keys = FOLDERS[name]
    peer = write(tmp_path, kind, **keys)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in keys)
    model, tokenizer = read(tmp_path)
    same_logits(model, peer, tokenizer.vocab_size)
    assert model.wte.weight.dtype == torch.float32 and (tokenizer.kind == "foreign") == (
        "tokenizer" in keys
    )


# the keys that config.json has on the hub beside those above, of gpt2, distilgpt2 and gpt2-medium, SmolLM2, TinyLlama and Llama-3.2, and in a dump of all of transformers 4's
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
HUB = {
    "gpt2": ("gpt2", GPT2_KEYS),
    "distilgpt2": (
        "gpt2",
        GPT2_KEYS
        | {
            "_num_labels": 1,
            "gradient_checkpointing": False,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "tokenizer_class": "GPT2TokenizerFast",
        },
    ),
    "gpt2-medium": (
        "gpt2",
        GPT2_KEYS | {"n_special": 0, "predict_special_tokens": True, "output_past": True},
    ),
    "SmolLM2": (
        "llama",
        LLAMA_KEYS
        | {
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_scaling": None,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "TinyLlama": ("llama", LLAMA_KEYS | {"rope_scaling": None, "max_sequence_length": 64}),
    "Llama-3.2": (
        "llama",
        LLAMA_KEYS
        | {"eos_token_id": [0, 1], "_attn_implementation_autoset": True, "partial_rotary_factor": 1.0},
    ),
    "all": (
        "llama",
        LLAMA_KEYS
        | {
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
        },
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_keys_that_configs_have_on_the_hub(name, tmp_path):
    kind, keys = HUB[name]
    peer = write(tmp_path, kind)
    change(tmp_path, "config.json", lambda c: c.update(keys))
    same_logits(read(tmp_path)[0], peer, 300)


def test_rope_keys_of_version_4_a_bin_file_and_names_without_prefix(tmp_path):
    peer = write(tmp_path / "a", "llama", rope_parameters=LLAMA3 | {"rope_theta": 1000.0})
    config = json.loads((tmp_path / "a/config.json").read_text())
    del config["rope_parameters"]
    for key in "type", "rope_type":
        scaling = {key if k == "rope_type" else k: value for k, value in LLAMA3.items()}
        (tmp_path / "a/config.json").write_text(
            json.dumps(config | {"rope_theta": 1000.0, "rope_scaling": scaling})
        )
        same_logits(read(tmp_path / "a")[0], peer, 300)
    (tmp_path / "a/model.safetensors").unlink()
    torch.save(
        peer.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        tmp_path / "a/pytorch_model.bin",
    )
    same_logits(read(tmp_path / "a")[0], peer, 300)
    peer = write(tmp_path / "b", "gpt2")  # as on the hub: no "transformer.", and the masks
    (tmp_path / "b/model.safetensors").unlink()
    names = {
        name.removeprefix("transformer."): x
        for name, x in peer.state_dict().items()
        if name != "lm_head.weight"
    }
    torch.save(
        names | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)},
        tmp_path / "b/pytorch_model.bin",
    )
    same_logits(read(tmp_path / "b")[0], peer, 300)


# Out

MODELS = {
    "llama": ("llama", {"n_kv_head": 2}),
    "biases": ("llama", {"bias": True, "tie_embeddings": False}),
    "llama3": ("llama", {"rope_scaling": "llama3:8,1,4,256", "rope_theta": 5e5}),
    "linear": ("llama", {"rope_scaling": "linear:4"}),
    "qwen3": ("llama", {"qk_norm": True}),
    "qwen3 of a head_dim of its own": ("llama", {"qk_norm": True, "head_dim": 24, "n_kv_head": 2}),
    "gpt2": ("gpt2", {"dropout": 0.1}),
    "gpt2 untied": ("gpt2", {"tie_embeddings": False}),
}


def save(path, name="llama", tokenizer=OURS, **more):
    preset_, keys = MODELS[name]
    model = redraw(
        Transformer(
            preset(
                preset_,
                **{"vocab_size": tokenizer.vocab_size, "block_size": 256, "n_layer": 2} | keys | more,
            )
        ),
        SCALE,
    ).eval()
    checkpoint.save(str(path), model, tokenizer, {}, checkpoint.RunState(1, 2.0, 2.0))
    return model


def export(folder, *argv):
    with contextlib.chdir(folder):
        hf.main(configure(hf.Config, list(argv)))


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name, tmp_path):
    """Equal logits, ids and greedy text in transformers, and the same bits again here."""
    model = save(tmp_path / "ckpt.pt", name)
    export(tmp_path, "--out_dir=.", "--to=theirs")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "theirs"]
    peer, tokenizer = (
        auto.from_pretrained(tmp_path / "theirs", local_files_only=True)
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    assert type(peer).__name__ == {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}.get(
        name.split()[0], "LlamaForCausalLM"
    )
    same_logits(model, peer.eval(), 300)
    for text in texts(60):
        if EOT not in text:
            assert (
                tokenizer(text).input_ids == prompt_ids(OURS, text)
                and tokenizer.decode(OURS.encode(text)) == text
            )
    prompt = prompt_ids(OURS, "the cat")
    *_, [row] = sample.generate(model, [prompt], 60, temperature=0, stop=OURS.eot)
    greedy = row.ids
    reference = peer.generate(
        **tokenizer("the cat", return_tensors="pt"), do_sample=False, max_new_tokens=60
    )[0, len(prompt) :]
    assert (
        peer.generate(**tokenizer("", return_tensors="pt"), max_new_tokens=1).shape == (1, 2)
        and tokenizer.model_max_length == 256
    )
    assert (
        len(set(greedy)) > 3
        and reference.tolist()[: len(greedy)] == greedy
        and (len(greedy) == 60 or reference[len(greedy)] == OURS.eot)
    )
    assert (
        peer.config.eos_token_id
        == peer.generation_config.eos_token_id
        == tokenizer.eos_token_id
        == OURS.eot
    )
    before, after = checkpoint.load(str(tmp_path / "ckpt.pt")), checkpoint.load(f"hf:{tmp_path}/theirs")
    assert {key: after["model_config"][key] for key in before["model_config"]} == before[
        "model_config"
    ] | ({"dropout": 0.1} if "dropout" in MODELS[name][1] else {})
    assert checkpoint.fingerprint(before) == checkpoint.fingerprint(after)


def no_bos():
    """What add_bos_token alone puts <s> before, in transformers 4."""
    made, ends = tiny()
    made.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return made, ends


@pytest.mark.parametrize(
    "tokenizer, keys",
    [
        (smol, {}),
        (tiny, {}),
        (no_bos, {}),
        (no_bos, {"add_bos_token": True}),
        (tiny, {"add_bos_token": False}),
    ],
)
def test_a_foreign_tokenizer_goes_out_with_what_sample_puts_before_a_text(tokenizer, keys, tmp_path):
    write(tmp_path / "a", "llama", tokenizer)
    change(tmp_path / "a", "tokenizer_config.json", lambda t: t.update(keys))
    export(tmp_path, "--out_dir=hf:a", "--to=b")
    first, again = (transformers.AutoTokenizer.from_pretrained(tmp_path / f) for f in "ab")
    model, foreign = read(tmp_path / "a")
    assert (
        first.eos_token_id == again.eos_token_id == foreign.eot
        and again.bos_token_id
        == foreign.bos
        == (1 if keys.get("add_bos_token", tokenizer is tiny) else foreign.eot)
    )
    for text in texts(60):
        assert again(text).input_ids == [foreign.bos, *first(text, add_special_tokens=False).input_ids]
        if tokenizer is tiny and not keys:
            assert again(text).input_ids == first(text).input_ids
    assert checkpoint.fingerprint(checkpoint.load(f"hf:{tmp_path}/a")) == checkpoint.fingerprint(
        checkpoint.load(f"hf:{tmp_path}/b")
    )


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [smol, tiny])
def test_a_foreign_tokenizer_goes_out_to_onnx(tokenizer, tmp_path, monkeypatch, capsys):
    for library in "onnx", "onnxscript", "onnxruntime":
        pytest.importorskip(library)
    import export_onnx

    monkeypatch.chdir(tmp_path)
    write("a", "llama", tokenizer)
    export_onnx.main(configure(export_onnx.Config, ["--out_dir=hf:a", "--to=b", "--seconds=0"]))
    capsys.readouterr()
    written = []
    for model in "--onnx=b", "--out_dir=hf:a", "--onnx=b/model.onnx":
        for start in "the cat at 12", "":
            sample.main(configure(sample.Config, [model, f"--start={start}", "--max_new_tokens=40"]))
        written.append(
            [
                line
                for line in capsys.readouterr().out.splitlines()
                if not line.startswith(("prefill", "b/", "hf:a"))
            ]
        )
    assert written[0] == written[1] == written[2] and len("".join(written[0])) > 400
    foreign, reference = read("a")[1], tokenizers.Tokenizer.from_file("b/tokenizer.json")
    reference.encode_special_tokens = True
    assert all(reference.encode(text).ids == foreign.encode(text) for text in texts(20))


def test_a_character_model_goes_out(tmp_path):
    tokenizer = Tokenizer.char(DOCS)
    save(tmp_path / "ckpt.pt", tokenizer=tokenizer)
    export(tmp_path, "--out_dir=.", "--to=theirs")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert all(
        reference(doc).input_ids == tokenizer.encode(doc)
        and reference.decode(tokenizer.encode(doc)) == doc
        for doc in DOCS
    )
    assert read(tmp_path / "theirs")[1].sha256 == tokenizer.sha256


@contextlib.contextmanager
def capped(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_in_the_way_stays_and_a_failure_leaves_nothing(tmp_path):
    save(tmp_path / "ckpt.pt")
    save(tmp_path / "post.pt", norm_position="post")
    (tmp_path / "to").mkdir()
    (tmp_path / "to/mine").write_text("x")
    for argv, says in (
        (["--out_dir=ckpt.pt", "--to=to"], "--overwrite"),
        (["--out_dir=post.pt", "--to=n"], "norm_position=post"),
        (["--out_dir=post.pt", "--to=to", "--overwrite"], "norm_position=post"),
    ):
        with pytest.raises(Refusal, match=says):
            export(tmp_path, *argv)
        assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "post.pt", "to"] and os.listdir(
            tmp_path / "to"
        ) == ["mine"]
    (tmp_path / "out/demo").mkdir(parents=True)
    save(tmp_path / "out/demo/ckpt.pt")
    for argv in (
        ["--out_dir=out/demo", "--to=out"],
        ["--out_dir=out/demo", "--to=out/demo"],
        ["--out_dir=hf:out/demo", "--to=out"],
        ["--out_dir=ckpt.pt", "--adapter=hf:out/demo", "--to=out"],
        ["--out_dir=out/demo", f"--to={tmp_path}"],
        ["--out_dir=ckpt.pt", f"--to={tmp_path.parent}"],
    ):
        with pytest.raises(Refusal, match="cannot be written: .* is in it"):
            export(tmp_path, *argv, "--overwrite")
    assert (
        os.listdir(tmp_path / "out/demo") == ["ckpt.pt"]
        and not list(tmp_path.parent.glob("*.old-*"))
        and not list(tmp_path.rglob("*.old-*"))
    )
    with (
        capped(20_000),
        pytest.raises(Refusal, match="cannot write model.safetensors: .*File too large") as e,
    ):
        export(tmp_path, "--out_dir=ckpt.pt", "--to=n")
    assert (
        e.value.status == 1
        and "\n" not in str(e.value)
        and sorted(os.listdir(tmp_path)) == ["ckpt.pt", "out", "post.pt", "to"]
    )
    export(tmp_path, "--out_dir=ckpt.pt", "--to=to", "--overwrite")
    old = next(tmp_path.glob("to.old-*"))
    assert os.listdir(old) == ["mine"] and (tmp_path / "to/model.safetensors").exists()


# Tokenizers


@pytest.mark.parametrize(
    "make, name",
    [
        (smol, "PreTrainedTokenizerFast"),
        (smol, "GPT2Tokenizer"),
        (tiny, "PreTrainedTokenizerFast"),
        (tiny, "LlamaTokenizer"),
        (ours, "GPT2Tokenizer"),
        *[
            (space(pre), "PreTrainedTokenizerFast")
            for pre in (
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(prepend_scheme="always"),
                pre_tokenizers.ByteLevel(add_prefix_space=True),
            )
        ],
    ],
)
def test_a_tokenizer_of_a_folder_does_what_transformers_does(make, name, tmp_path):
    made, ends = make()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **ends).save_pretrained(tmp_path)
    change(tmp_path, "tokenizer_config.json", lambda t: t.update(tokenizer_class=name))
    reference, tokenizer = (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        hf_folder.read_tokenizer(str(tmp_path)),
    )
    again = load_tokenizer(tokenizer.to_str())
    assert (
        type(again) is type(tokenizer)
        and again.sha256 == tokenizer.sha256
        and (again.eot, again.bos, again.vocab_size)
        == (tokenizer.eot, tokenizer.bos, tokenizer.vocab_size)
    )
    assert (tokenizer.eot, tokenizer.bos) == (
        made.token_to_id(ends["eos_token"]),
        made.token_to_id(ends["bos_token"]),
    )
    special = [t.content for t in reference.added_tokens_decoder.values() if t.special]
    for text in texts(200):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids and again.encode(text) == ids
        lossy = text.startswith(" ") and make not in (
            smol,
            tiny,
            ours,
        )  # no second space is put there, and decoding takes one
        assert tokenizer.decode(ids) == text or lossy
        if not any(s in text for s in special) and not (
            name == "LlamaTokenizer" and text.startswith(" ")
        ):  # it puts no second space there, whatever tokenizer.json says
            assert reference(text, add_special_tokens=False).input_ids == ids
            assert reference(text).input_ids == [*tokenizer.head, *ids]
        # a text in two halves: what goes on after the first one is the second one, whatever its ids
        for cut in range(0, len(text), 5):
            rest = tokenizer.encode_more(text[cut:])
            assert (
                tokenizer.decode(tokenizer.encode(text[:cut]) + rest) == text
                or lossy
                or not cut
                and tokenizer.prefix
            )
            assert tokenizer.decode_more(rest) == text[cut:]
            stream = tokenizer.stream()
            assert "".join(map(stream, rest)) + stream(None) == text[cut:]
    assert tokenizer.encode_batch(texts(20)) == [tokenizer.encode(t) for t in texts(20)]
    with pytest.raises(ValueError, match="outside this vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("make", [smol, tiny])
def test_the_bytes_of_a_foreign_tokenizers_tokens_are_those_of_the_text(make):
    """What bits a byte are counted with."""
    made, ends = make()
    tokenizer = from_tokenizer_json(json.loads(made.to_str()), made.token_to_id(ends["eos_token"]))
    documents = [t for t in texts(50) if t]
    ids = evaluation.encode(documents, True, tokenizer)
    unit, lengths = evaluation.units(ids, tokenizer, few=False)
    assert np.bincount(unit, lengths).tolist() == [len(t.encode()) for t in documents]
    assert evaluation.split_documents(ids, tokenizer) == (documents, True)


@pytest.mark.parametrize("make", [smol, tiny, qwen])
def test_data_for_a_foreign_tokenizer_is_each_document_as_sample_and_eval_have_it(
    make, tmp_path, monkeypatch
):
    """Long documents in pieces too; each begins with bos where that is not the end-of-text before it."""
    monkeypatch.setattr(prepare, "CHUNK", 50)
    made, ends = make()
    tokenizer = from_tokenizer_json(json.loads(made.to_str()), made.token_to_id(ends["eos_token"]))
    documents = [
        ("the cat.\n\nate 12 é. The cat_\nsat...\n" * 9 + "cat.\n" * 30) * 2 + "end",
        "the",
        *DOCS[:3],
    ]
    with contextlib.chdir(tmp_path):
        Path("tokenizer.json").write_text(
            tokenizer.to_str(), encoding="utf-8"
        )  # as prepare.py itself keeps it
        Path("text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
        prepare.prepare(
            configure(
                prepare.Config,
                ["--dataset=text.txt", "--tokenizer=tokenizer.json", "--name=d", "--val_fraction=0.01"],
            )
        )
        _, data, foreign = prepare.load("data/d")
    assert foreign.sha256 == tokenizer.sha256
    whole, tail = (
        evaluation.split_documents(data["train"], foreign)[0],
        evaluation.split_documents(data["val"], foreign)[0],
    )
    assert whole[:4] == documents[:4] and whole[4] + tail[0] == documents[4]
    assert evaluation.encode(whole, False, foreign).tolist() == data["train"].tolist()
    starts = np.r_[0, np.flatnonzero(data["train"] == foreign.eot) + 1]
    for start, text in zip(starts, documents[:3]):
        ids = prompt_ids(foreign, text)[foreign.bos == foreign.eot :]
        assert data["train"][start : start + len(ids)].tolist() == ids
    assert [ids.tolist() for ids in islice(document_slices(data["train"], foreign), 3)] == [
        foreign.encode(text) for text in documents[:3]
    ]


def test_logits_of_one_row_that_are_too_many_are_made_in_parts(monkeypatch):
    model = redraw(
        Transformer(preset("llama", vocab_size=OURS.vocab_size, block_size=64, n_layer=1)), SCALE
    ).eval()
    subject = evaluation.Subject("a", "a", 1, model, OURS, "d", "none")
    figures = [
        evaluation.likelihood(subject, DOCS, True, CPU, evaluation.Config(resamples=1000))[0],
        monkeypatch.setattr(evaluation, "LOGITS", 999),
        evaluation.likelihood(subject, DOCS, True, CPU, evaluation.Config(resamples=1000))[0],
    ]
    assert model.chunked_loss == HAS_CHUNKED_LOSS
    assert figures[0]["loss"] == pytest.approx(figures[2]["loss"], rel=1e-5)


def test_loss_is_of_the_text_and_its_end_not_of_the_bos_before_it():
    made, ends = tiny()
    tokenizer = from_tokenizer_json(json.loads(made.to_str()), 2)
    model = redraw(
        Transformer(preset("llama", vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1)), SCALE
    ).eval()
    subject, documents = (
        evaluation.Subject("a", "a", 1, model, tokenizer, "d", "none"),
        ["the cat", "a cat"] * 20,
    )
    result, columns = evaluation.likelihood(
        subject, documents, True, CPU, evaluation.Config(resamples=1000)
    )
    ids = evaluation.encode(documents, True, tokenizer)
    nats = token_nats(model, ids, 64, CPU).astype(np.float64)
    assert columns[:, 0].sum() == pytest.approx(nats[ids[1:] != tokenizer.bos].sum()) and result[
        "bytes"
    ] == sum(map(len, documents))


def change(folder, name, edit):
    data = json.loads((folder / name).read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "edit, says",
    [
        (
            lambda t: t.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "its decoder is",
        ),
        (lambda t: t.update(decoder=None), "its decoder is None|its decoder is null"),
        (lambda t: t["model"].update(type="Magic"), "does not read it"),
        (lambda t: t["model"].pop("vocab"), "does not read it"),
        (lambda t: t.pop("model"), "tokenizer.json"),
        (
            lambda t: t.update(
                post_processor={"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["</s>", 2]}
            ),
            "at most one token",
        ),
        (lambda t: t.update(post_processor=5), "does not read it"),
        (
            lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
            "does not take the text",
        ),
        (
            lambda t: t["model"].update(
                unk_token="zz", byte_fallback=False, vocab={"<unk>": 0, "<s>": 1, "</s>": 2}, merges=[]
            ),
            "does not take the text",
        ),
        (lambda t: t["model"].update(dropout=0.5), "dropout 0.5"),
        (
            lambda t: t.update(
                decoder={
                    "type": "Metaspace",
                    "replacement": "_",
                    "prepend_scheme": "always",
                    "split": False,
                }
            ),
            "replacement for a space is '_'",
        ),
    ],
)
def test_tokenizers_that_are_refused(edit, says, tmp_path):
    write(tmp_path, "llama", tiny)
    change(tmp_path, "tokenizer.json", edit)
    with pytest.raises(Refusal, match=says) as e:
        read(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "make, space", [(smol, True), (ours, True), (tiny, False), (ours, False), (tiny, True), (ours, None)]
)
def test_add_prefix_space_may_not_contradict_the_tokenizer(make, space, tmp_path):
    write(tmp_path, "llama", make)
    change(tmp_path, "tokenizer_config.json", lambda t: t.update(add_prefix_space=space))
    with (
        pytest.raises(Refusal, match=f"add_prefix_space in tokenizer_config.json is {space}")
        if space is (make is not tiny)
        else contextlib.nullcontext()
    ):
        read(tmp_path)


def test_end_of_text_is_the_tokenizers_then_the_configs(tmp_path):
    write(tmp_path, "llama", smol)
    assert read(tmp_path)[1].eot == 0
    change(tmp_path, "tokenizer_config.json", lambda t: t.update(eos_token={"content": "<|im_start|>"}))
    assert (read(tmp_path)[1].eot, read(tmp_path)[1].bos) == (1, 1)
    change(tmp_path, "tokenizer_config.json", lambda t: t.update(eos_token=None))
    change(tmp_path, "config.json", lambda c: c.update(eos_token_id=[1, 0]))
    assert read(tmp_path)[1].eot == 1
    change(tmp_path, "tokenizer_config.json", lambda t: t.update(add_bos_token=True, bos_token=EOT))
    assert (read(tmp_path)[1].eot, read(tmp_path)[1].bos) == (1, 0)
    change(tmp_path, "config.json", lambda c: c.update(eos_token_id=None))
    with pytest.raises(Refusal, match="which token ends a text"):
        read(tmp_path)


# What is refused

CONFIGS = [
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"sliding_window": 32}, "'sliding_window' is 32"),
    ({"head_dim": 16}, "fewer numbers"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"head_dim": "8"}, "head_dim is '8'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_local_experts": 8}, "'num_local_experts' is 8"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta is 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": 5}, "rope_scaling is 5"),
    ({"rope_theta": "x"}, "rope_theta is 'x'"),
    ({"rope_theta": 5.0}, "rope_theta is 5.0 beside"),
    (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
            }
        },
        "original_max_position_embeddings is missing",
    ),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"logit_scale": 0.5}, "'logit_scale' is 0.5"),
    ({"is_causal": False}, "is_causal is False"),
    ({"is_causal": 1}, "is_causal is 1"),
    ({"use_bias_anywhere": False}, "'use_bias_anywhere' is False"),
    ({"logit_scale": 0}, "'logit_scale' is 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "only one can be meant"),
    ({"\x1b[31m" * 99: 1}, r"^[^\x1b]{1,300}$"),
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
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write(folder, "llama")
    return folder, (folder / "config.json").read_text()


@pytest.mark.parametrize("keys, says", CONFIGS)
def test_a_config_that_is_refused_by_name(keys, says, llama):
    folder, whole = llama
    try:
        change(folder, "config.json", lambda c: c.update(keys))
        with pytest.raises(Refusal, match=says) as e:
            read(folder)
    finally:
        (folder / "config.json").write_text(whole)
    assert "\n" not in str(e.value) and e.value.status == 2


@pytest.mark.parametrize(
    "kind, keys, says",
    [
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"attn_pdrop": 0.2}, "there is one dropout"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
        ("qwen3", {"head_dim": 4}, r"is \(8,\) and not \(4,\)"),
        ("qwen3", {"mlp_bias": True}, "'mlp_bias' is True"),
    ],
)
def test_other_kinds_are_refused_by_name(kind, keys, says, tmp_path):
    write(tmp_path, kind)
    change(tmp_path, "config.json", lambda c: c.update(keys))
    with pytest.raises(Refusal, match=says):
        read(tmp_path)


def test_the_default_of_rms_norm_eps_is_transformers(tmp_path):
    peer = write(tmp_path, "llama", rms_norm_eps=1e-6)
    change(tmp_path, "config.json", lambda c: c.pop("rms_norm_eps"))
    assert (
        read(tmp_path)[0].config.norm_eps == peer.config.rms_norm_eps == type(peer.config)().rms_norm_eps
    )


def test_qwen3_without_head_dim_has_128(tmp_path):
    peer = write(tmp_path, "qwen3", head_dim=128)
    change(tmp_path, "config.json", lambda c: c.pop("head_dim"))
    same_logits(read(tmp_path)[0], peer, 300)


def put(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors")


def test_weights_that_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file

    write(tmp_path, "llama")
    good = {
        name: x.clone() for name, x in load_file(tmp_path / "model.safetensors").items()
    }  # older releases map the file, which is written anew below
    name = "model.layers.1.mlp.up_proj.weight"
    more = {
        "spare": torch.zeros(9999)
    }  # so that it is not by the number of numbers that a missing one is found
    for tensors, says in (
        ({key: x for key, x in good.items() if key != name} | more, f"{name} is missing"),
        (good | more, "spare has no place"),
        (good | {name: good[name].T.contiguous()}, r"up_proj.weight is \(32, 40\) and not \(40, 32\)"),
        (good | {name: good[name].to(torch.float8_e4m3fn)}, "is float8_e4m3fn"),
        (good | {name: good[name].to(torch.int8)}, "is int8"),
        ({name: good[name]}, "fewer numbers than config.json needs: there is no lm_head.weight"),
    ):
        put(tmp_path, tensors)
        with pytest.raises(Refusal, match=says) as e:
            read(tmp_path)
        assert "\n" not in str(e.value)


def test_shards_that_are_refused(tmp_path):
    write(tmp_path, "llama", shard="10KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:100])
    with pytest.raises(Refusal, match=f"{first.name}"):
        read(tmp_path)
    first.unlink()
    with pytest.raises(Refusal, match=f"{first.name}"):
        read(tmp_path)
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes(whole)
    change(
        tmp_path,
        "model.safetensors.index.json",
        lambda d: d.update(weight_map={key: f"../{outside.name}" for key in d["weight_map"]}),
    )
    with pytest.raises(Refusal, match="files of its folder"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write(tmp_path, "llama", shard="10KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    name, x = next(iter(load_file(first).items()))
    save_file(
        {key: w.clone() for key, w in load_file(second).items()} | {name: x.clone()},
        second,
        {"format": "pt"},
    )
    with pytest.raises(Refusal, match=f"{name} is in another file too"):
        read(tmp_path)


def test_a_small_file_takes_little_memory(tmp_path):
    """Tensors of stride 0, or on the meta device, have any number of elements."""
    peer = write(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    save(tmp_path / "ckpt.pt")
    ckpt = checkpoint.load(str(tmp_path / "ckpt.pt"))
    for big in (
        torch.zeros(1).expand(10**9),
        torch.empty(10**9, device="meta"),
        torch.zeros(1).expand(300, 32),
    ):
        torch.save({name: big for name in peer.state_dict()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(Refusal, match="fewer numbers"):
            read(tmp_path)
        with pytest.raises(Refusal, match="weights are fewer"):
            checkpoint.restore(ckpt | {"model": {name: big for name in ckpt["model"]}}, "ckpt.pt")


def test_other_tokens_that_end_a_text_are_said(tmp_path, capsys):
    write(tmp_path, "llama", smol)
    read(tmp_path)
    assert "ends" not in capsys.readouterr().out
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    read(tmp_path)
    assert (
        "a text ends at '<|endoftext|>' alone here, in transformers at '<|im_start|>' too"
        in capsys.readouterr().out
    )


def test_code_in_a_bin_file_is_refused_and_does_not_run(tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="pytorch_model.bin") as e:
        read(tmp_path)
    assert not (tmp_path / "ran").exists() and "\n" not in str(e.value)


def test_folders_that_are_none(tmp_path):
    for name, says in (
        (str(tmp_path / "nowhere"), "no folder"),
        (str(tmp_path), "config.json"),
        ("a/b/c", "no folder"),
        ("", "no folder"),
    ):
        with pytest.raises(Refusal, match=says):
            checkpoint.load(f"hf:{name}")
    write(tmp_path, "llama", vocab_size=500)
    with pytest.raises(Refusal, match="500 tokens and its tokenizer 300"):
        read(tmp_path)


def test_a_name_of_the_hub_without_a_network_is_one_line_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(
        Refusal, match="hf:HuggingFaceTB/SmolLM2-135M is no folder here and could not be downloaded"
    ) as e:
        checkpoint.load("hf:HuggingFaceTB/SmolLM2-135M")
    assert "\n" not in str(e.value) and time.monotonic() - began < 20


def test_a_name_of_which_the_tokenizer_alone_was_downloaded_is_said_to_lack_its_weights(
    tmp_path, monkeypatch
):
    snapshot = tmp_path / "models--a--b/snapshots" / ("0" * 40)
    write(snapshot, "llama")
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hf_folder.read_tokenizer(hf_folder.find_folder("a/b", weights="")).sha256 == OURS.sha256
    with pytest.raises(
        Refusal, match="hf:a/b is no folder here and could not be downloaded.*tokenizer.json.*no weights"
    ):
        checkpoint.load("hf:a/b")


# LoRA

LORAS = [
    ("llama", {}),
    ("llama", {"target": "q_proj,v_proj"}),
    ("qwen3", {"target": "o_proj,down_proj"}),
    ("gpt2", {}),
    ("gpt2", {"target": "q_proj"}),
    ("gpt2", {"target": "k_proj,v_proj,up_proj"}),
]


def adapted(model, cfg):
    """The model with adapters that are not zero."""
    torch.manual_seed(3)
    lora.inject(model, cfg)
    for name, x in lora.state_dict(model).items():
        x.copy_(0.3 * torch.randn_like(x))
    return model.eval()


@pytest.mark.parametrize("name, keys", LORAS)
def test_our_adapter_in_peft_and_back(name, keys, tmp_path):
    model, cfg = save(tmp_path / "ckpt.pt", name), lora.LoRAConfig(rank=3, alpha=5.0, **keys)
    torch.save(
        checkpoint.load(str(tmp_path / "ckpt.pt"))
        | {"config": {"dataset": "stories", "template": "Q: {prompt}"}},
        tmp_path / "ckpt.pt",
    )
    base = hf.to_transformers(model)
    plain = base(torch.arange(60)[None]).logits
    sha256 = checkpoint.fingerprint(checkpoint.load(str(tmp_path / "ckpt.pt")))
    adapted(model, cfg)
    kept = {} if name == "gpt2" else {"text_rule": "as it stands"}
    checkpoint.save_adapters(
        str(tmp_path / "adapter.pt"),
        model,
        str(tmp_path / "ckpt.pt"),
        sha256,
        asdict(cfg) | {"template": "A: {prompt}"} | kept,
        checkpoint.RunState(1, 2.0, 2.0),
    )
    export(tmp_path, "--adapter=.", "--to=theirs")
    peer = peft.PeftModel.from_pretrained(base, str(tmp_path / "theirs")).eval()
    same_logits(model, peer, 300)
    assert (peer(torch.arange(60)[None]).logits - plain).abs().max() > 0.1
    export(tmp_path, "--out_dir=ckpt.pt", "--adapter=hf:theirs", "--to=back")
    foreign = checkpoint.load(str(tmp_path / "back/adapter.pt"), checkpoint.ADAPTER_KEYS)["config"]
    assert (foreign["base_dataset"], foreign["template"]) == (
        "stories",
        "A: {prompt}",
    )  # the base's data, the adapter's template
    assert foreign["text_rule"] == ("as it stands" if kept else "stripped")
    save(tmp_path / "other.pt", name, **({"norm_eps": 2e-5}))
    with pytest.raises(Refusal, match="trained over another base than other.pt"):
        export(tmp_path, "--out_dir=other.pt", "--adapter=hf:theirs", "--to=n")
    path, ckpt = str(tmp_path / "back/adapter.pt"), checkpoint.load(str(tmp_path / "ckpt.pt"))
    again, result = (
        checkpoint.restore(ckpt, "ckpt.pt")[0],
        checkpoint.load(path, checkpoint.ADAPTER_KEYS),
    )
    checkpoint.Checkpoint("ckpt.pt", ckpt, path, result).restore_adapters(again)
    same_logits(again, peer, 300)
    if name != "gpt2":
        assert (
            all(torch.equal(result["adapters"][key], x) for key, x in lora.state_dict(model).items())
            and result["config"]["rank"] == 3
        )


PEFTS = [
    ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 7, "lora_dropout": 0.25}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "qwen3",
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"k_proj": 1},
        },
    ),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 3}),
]


def peft_folder(folder, peer, **keys):
    torch.manual_seed(4)
    made = peft.get_peft_model(
        peer, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **keys})
    ).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(0.15 * torch.randn_like(p))
    made.save_pretrained(folder)
    return made


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind, keys", PEFTS)
def test_an_adapter_of_peft_comes_in(kind, keys, tmp_path, capsys):
    made = peft_folder(
        tmp_path / "peft",
        write(tmp_path / "base", kind, max_position_embeddings=64)
        if kind != "gpt2"
        else write(tmp_path / "base", kind),
        **keys,
    )
    export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=ours")
    assert (
        f"hf:peft was trained over {str(tmp_path / 'base')!r}, as it says; whether that is hf:base is not known"
        in capsys.readouterr().out
    )
    ckpt, result = (
        checkpoint.load(f"hf:{tmp_path}/base"),
        checkpoint.load(str(tmp_path / "ours/adapter.pt"), checkpoint.ADAPTER_KEYS),
    )
    assert result["config"]["lora_dropout"] == keys.get("lora_dropout", 0)
    model = checkpoint.restore(ckpt, "base")[0]
    checkpoint.Checkpoint("base", ckpt, "ours", result).restore_adapters(model)
    same_logits(model, made, 300)
    lora.merge(model)
    same_logits(model, made, 300)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "keys, says",
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
def test_adapters_that_are_refused_by_name(keys, says, tmp_path):
    peft_folder(
        tmp_path / "peft", write(tmp_path / "base", "llama"), **({"target_modules": ["q_proj"]} | keys)
    )
    with pytest.raises(Refusal, match=says) as e:
        export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=ours")
    assert (
        "\n" not in str(e.value)
        and "damaged" not in str(e.value)
        and sorted(os.listdir(tmp_path)) == ["base", "peft"]
    )


@pytest.mark.parametrize(
    "data, says",
    [
        ({"r": 5}, r"lora_A.weight is \(4, 32\)"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": None}, "r is None"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
    ],
)
def test_an_adapters_config_is_checked(data, says, tmp_path):
    peft_folder(tmp_path / "peft", write(tmp_path / "base", "llama"), target_modules=["q_proj"])
    change(tmp_path / "peft", "adapter_config.json", lambda c: c.update(data))
    with pytest.raises(Refusal, match=says):
        export(tmp_path, "--out_dir=hf:base", "--adapter=hf:peft", "--to=ours")


# The scripts


@pytest.mark.parametrize("tokenizer, kind", [(tiny, "llama"), (smol, "qwen3"), (ours, "gpt2")])
def test_prepare_train_and_sample_from_a_folder(tokenizer, kind, tmp_path, capsys):
    with contextlib.chdir(tmp_path):
        peer = write("theirs", kind, tokenizer)
        Path("text.txt").write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")
        prepare.main(
            configure(prepare.Config, ["--dataset=text.txt", "--tokenizer=hf:theirs", "--name=d"])
        )
        _, data, made = prepare.load("data/d")
        run = [a for a in SMALL if not a.startswith("--n_")] + [
            "--dataset=d",
            "--init_from=hf:theirs",
            "--max_iters=2",
            "--block_size=48",
            "--dropout=0",
            "--learning_rate=1e-9",
            "--embd_lr_scale=1",
        ]
        train.main(configure(train.Config, run))
        trained, foreign = checkpoint.restore(checkpoint.load("out/ckpt.pt"), "out")
        assert (
            trained.config.block_size == 48 and foreign.sha256 == made.sha256 == read("theirs")[1].sha256
        )
        idx = torch.from_numpy(data["val"][:48].astype(np.int64))[None]
        with torch.no_grad():
            close(trained(idx)[0], peer(idx).logits, 1e-3)  # the rate is next to nothing
        capsys.readouterr()
        sample.main(
            configure(
                sample.Config,
                [
                    "--out_dir=hf:theirs",
                    "--start=the cat",
                    "--max_new_tokens=8",
                    "--temperature=0",
                    "--device=cpu",
                    "--dtype=float32",
                ],
            )
        )
        shown = capsys.readouterr().out
        ids = [made.bos, *made.encode("the cat")]
        wanted = peer.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[
            0, len(ids) :
        ].tolist()
        wanted = wanted[: wanted.index(made.eot)] if made.eot in wanted else wanted
        assert f"the cat{made.decode_more(wanted)}".split("\ufffd")[0] in shown


def test_eval_and_fine_tuning_start_from_a_folder_too(tmp_path, capsys):
    with contextlib.chdir(tmp_path):
        write("theirs", "llama", tiny)
        tokenizer = read("theirs")[1]
        Path("text.txt").write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")
        evaluation.main(
            configure(
                evaluation.Config,
                [
                    "--out_dir=hf:theirs",
                    "--text=text.txt",
                    "--num_samples=1",
                    "--max_new_tokens=8",
                    "--num_cases=22",
                    "--resamples=1000",
                    "--device=cpu",
                    "--dtype=float32",
                ],
            )
        )
        bits = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert Path("out/compare/report.html").exists() and bits
        with pytest.raises(Refusal, match="--text=FILE"):
            evaluation.main(configure(evaluation.Config, ["--out_dir=hf:theirs"]))
        Path("rows.jsonl").write_text(
            "".join(json.dumps({"prompt": "the cat", "response": doc[:20]}) + "\n" for doc in DOCS[:20]),
            encoding="utf-8",
        )
        finetune_lora.main(
            configure(
                finetune_lora.Config,
                [
                    "--init_from=hf:theirs",
                    "--dataset=rows.jsonl",
                    "--max_iters=1",
                    "--rank=2",
                    "--max_length=40",
                    "--out_dir=lora",
                    "--device=cpu",
                    "--dtype=float32",
                ],
            )
        )
        sample.main(
            configure(
                sample.Config,
                [
                    "--adapter=lora",
                    "--start=the cat",
                    "--max_new_tokens=4",
                    "--device=cpu",
                    "--dtype=float32",
                ],
            )
        )
        assert "hf:theirs and lora/adapter" in capsys.readouterr().out
        export(tmp_path, "--adapter=lora", "--to=lora-peft")
        assert (
            peft.AutoPeftModelForCausalLM.from_pretrained("lora-peft").config.vocab_size
            == tokenizer.vocab_size
        )  # which finds its base by name
        finetune_lora.main(configure(finetune_lora.Config, ["--merge", "--out_dir=lora"]))
        export(tmp_path, "--out_dir=lora/ckpt.pt", "--to=merged")
        assert (
            transformers.AutoModelForCausalLM.from_pretrained("merged").config.vocab_size
            == tokenizer.vocab_size
        )


def test_train_says_how_to_prepare_with_the_tokenizer_of_a_folder(tmp_path):
    with contextlib.chdir(tmp_path):
        write("theirs", "llama", smol)
        Path("text.txt").write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")
        prepare.prepare(
            configure(prepare.Config, ["--dataset=text.txt", "--name=d", "--vocab_size=300"])
        )
        with pytest.raises(Refusal, match="prepare.py --tokenizer=hf:theirs"):
            train.main(
                configure(train.Config, ["--dataset=d", "--init_from=hf:theirs", "--block_size=32"])
            )
        with pytest.raises(Refusal, match="block_size=64, which cannot become 128"):
            train.main(
                configure(train.Config, ["--dataset=d", "--init_from=hf:theirs", "--block_size=128"])
            )
