"""tokenizer.py against Hugging Face's tokenizers (training, encoding, the file) and against itself."""

import itertools
import json
import random
import sys
import unicodedata
from collections import Counter

import pytest
import tiktoken
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken import load as tiktoken_load
from tokenizers import models, pre_tokenizers, trainers

import tokenizer as tokenizer_py
from tokenizer import (
    BYTE_CHAR,
    EOT,
    GAP,
    SPLIT,
    Tokenizer,
    merge_by_heap,
    merge_word,
    recover_merges,
    split,
)

FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# Unicode 3.2 is assigned in all versions of the three regular-expression engines; the emoji are newer.
ASSIGNED = [
    chr(i) for i in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs")
]
SPACES = " \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000"
CHARS = st.one_of(
    st.sampled_from("etaoin 'sdmtlvr<|>"),
    st.sampled_from(SPACES),
    st.sampled_from("0123½Ⅷ٣.,!?-_👩🏽‍🚀😀é\u0301ß語ก"),
    st.sampled_from(ASSIGNED),
)
PIECES = [
    "the",
    " cat",
    " sat",
    "'s",
    "'d",
    "'m",
    "'t",
    "'ll",
    "'ve",
    "'re",
    "'S",
    "'",
    EOT,
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\t",
    "12",
    " 345",
    "!?",
    " é",
    "日本",
    "👍",
]
TEXTS = st.text(CHARS, max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


def sentences(rng, words, n):
    """Returns n texts of one to eleven words, each with an end."""
    ends = [".", "!", " ", "\n", "'s"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 12))) + rng.choice(ends) for _ in range(n)]


def corpora():
    """Returns a dict of documents and vocab_size by name."""
    rng = random.Random(0)
    english = (
        "once upon a time there was little girl named Lily she loved to play with her friend's dog "
        "don't we'll it's they're we've I'd I'm"
    ).split()
    world = [
        "naïve",
        "Straße",
        "日本語",
        "日本",
        "привет",
        "мир",
        "नमस्ते",
        "👩🏽‍🚀",
        "👍🏽",
        "½",
        "٣٤",
        "e\u0301",
        "\u2028",
        "ﬁ",
    ]
    syllables = ["ka", "to", "mi", "ren", "sha", "u", "lo", "th", "ing", "é"]
    made_up = ["".join(rng.choices(syllables, k=rng.randrange(1, 5))) for _ in range(800)]
    result = {
        "made up": (sentences(rng, made_up, 400), 1200),
        "english": (sentences(rng, english, 400), 700),
        "unicode": (sentences(rng, world + english[:5], 300), 900),
        "literal endoftext": (
            [f"a {EOT} b{EOT}{EOT}", EOT, f"x {EOT}"] * 5 + sentences(rng, english, 20),
            400,
        ),
        "blank lines and trailing spaces": (
            [f"one\n\ntwo \n\n\n three  {'  ' * i}\t\n" for i in range(30)],
            330,
        ),
        "one document": (["low low low low low lower lower newest newest newest widest widest"], 300),
        "long runs": (["a" * n for n in range(1, 40)] + [" " * n + "b" for n in range(30)], 320),
        "empty documents": (["", "ab ab", ""], 300),
        "one long word": (["".join(rng.choices("ACGT", k=20_000))], 1500),
        "long words among short ones": (
            ["".join(rng.choices("ab" if i % 2 else "aab ", k=i * i)) for i in range(60)] * 2,
            900,
        ),
    }
    for i in range(60):  # nearly each count ties with others here
        alphabets = rng.choices(["ab", "abc", "ab ", "zyx ", "aAé ", "\n a"], k=4)
        docs = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for alphabet in alphabets]
        result[f"ties {i}"] = (docs + ["a"], 257 + rng.randrange(60))
    return result


CORPORA = corpora()


def hf_train(docs, vocab_size):
    """Returns the tokenizer that Hugging Face trains on docs."""
    reference = hf.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(docs, trainer)
    return reference


def hf_open(tokenizer):
    """Returns a tokenizer as Hugging Face reads its file."""
    reference = hf.Tokenizer.from_str(tokenizer.to_str())
    reference.encode_special_tokens = True
    return reference


@pytest.fixture(scope="module")
def bpe():
    docs = []
    for name in "made up", "english", "unicode", "literal endoftext", "long runs":
        docs += CORPORA[name][0]
    return Tokenizer.train(docs, 1200)


@pytest.fixture(scope="module")
def reference(bpe):
    return hf_open(bpe)


# ---- training


@pytest.mark.parametrize("name", CORPORA)
def test_merges_and_ids_are_those_of_hugging_face(name):
    docs, vocab_size = CORPORA[name]
    tokenizer = Tokenizer.train(iter(docs), vocab_size)
    model = json.loads(tokenizer.to_str())["model"]
    expected = json.loads(hf_train(docs, vocab_size).to_str())["model"]
    assert [merge.split(" ") for merge in model["merges"]] == expected["merges"]
    assert model["vocab"] == expected["vocab"]
    assert tokenizer.vocab_size == len(expected["vocab"]) <= vocab_size


def test_words_are_counted_in_bounded_memory(monkeypatch):
    common = [f"common{'abcdefghij'[i]}" for i in range(10)]
    docs = [" ".join([*common, f"x{'yz'[n % 2] * 30}q" + chr(0x4E00 + n)]) for n in range(20_000)]
    exact = Counter(word for doc in docs for word in split(doc))
    assert tokenizer_py.count_words(docs) == exact
    monkeypatch.setattr(tokenizer_py, "WORD_BYTES", 200_000)
    words = tokenizer_py.count_words(docs)
    assert tokenizer_py.word_bytes(exact) > 700_000
    # at most what it had when it last looked, and what came in since
    assert len(words) < 17_000
    assert all(words[word] == n for word, n in exact.items() if n > 1)
    # of words that are all as rare some are kept
    assert tokenizer_py.count_words([str(n) for n in range(100_000)])


def test_layout_of_ids():
    tokenizer = Tokenizer.train(["aaab aaab"], 259)
    assert (tokenizer.kind, tokenizer.eot, tokenizer.vocab_size) == ("bpe", 0, 259)
    # bytes are in the order of GPT-2's characters, where the space is Ġ
    assert tokenizer.decode_bytes([1, 34, 221]) == b"!B "
    # aa comes 4 times; then ab and aaa come twice each, and ab is smaller
    assert tokenizer.decode_bytes([257]) == b"aa"
    assert tokenizer.decode_bytes([258]) == b"ab"


def test_training_ends_when_no_pair_is_left():
    tokenizer = Tokenizer.train(["ab ab"], 5000)
    assert tokenizer.vocab_size == 257 + 2
    assert tokenizer.encode("ab ab") == [257, 258] == tokenizer.encode_plain("ab ab")


def test_progress_sees_each_merge_and_changes_none():
    docs, _ = CORPORA["made up"]
    ids = []

    def progress(new_ids):
        for new in new_ids:
            ids.append(new)
            yield new

    tokenizer = Tokenizer.train(docs, 700, progress)
    assert ids == list(range(257, 700))
    assert tokenizer.sha256 == Tokenizer.train(docs, 700).sha256
    totals = []

    def count(new_ids):
        totals.append(len(new_ids))
        return new_ids

    Tokenizer.train(["ab ab"], 10**30, count)
    assert totals[0] <= 8  # no more than there are places, so a bar has an end


def test_training_is_deterministic_and_sha256_tells_vocabularies_apart():
    docs, _ = CORPORA["made up"]
    first, second = Tokenizer.train(docs, 500), Tokenizer.train(docs, 500)
    larger = Tokenizer.train(docs, 501)
    assert first.to_str() == second.to_str()
    assert first.sha256 == second.sha256 != larger.sha256
    assert len(first.sha256) == 64


# ---- encoding and decoding


@FUZZ
@given(text=TEXTS)
def test_plain_and_fast_and_hugging_face_agree_and_decode_inverts(bpe, reference, text):
    ids = bpe.encode(text)
    assert ids == bpe.encode_plain(text) == reference.encode(text).ids
    assert text == bpe.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    assert bpe.decode_bytes(ids) == text.encode()
    assert bpe.eot not in ids


@FUZZ
@given(
    docs=st.lists(st.text("ab é\n", max_size=30), min_size=1, max_size=4),
    text=st.text("ab é\n", max_size=40),
)
def test_they_agree_on_vocabularies_full_of_ties(docs, text):
    tokenizer = Tokenizer.train([*docs, "a"], 300)
    assert tokenizer.encode(text) == tokenizer.encode_plain(text) == hf_open(tokenizer).encode(text).ids
    # reading a file recovers the merges, which are not in it as ids
    assert Tokenizer.from_str(tokenizer.to_str()).merges == tokenizer.merges


def test_every_assigned_character_is_split_alike(bpe, reference):
    for i in range(0, len(ASSIGNED), 1000):
        text = "".join(f"a{c}1{c}{c} {c}" for c in ASSIGNED[i : i + 1000 : 5])
        assert bpe.encode(text) == bpe.encode_plain(text) == reference.encode(text).ids


def test_ascii_is_split_by_re_as_by_regex():
    """Each string of up to four of these, one of each kind of character that the pattern tells apart."""
    letters = "'stlverdX7_. \n\x1c\x00"
    for length in range(1, 5):
        for chars in itertools.product(letters, repeat=length):
            text = "".join(chars)
            assert split(text) == SPLIT.findall(text), repr(text)


def test_batch_is_encode_of_each(bpe):
    texts = [*CORPORA["unicode"][0], "", EOT]
    ids = [bpe.encode(text) for text in texts]
    assert bpe.encode_batch(texts) == ids
    assert bpe.encode_batch(iter(texts), num_threads=3) == ids


def test_text_that_spells_the_special_token_is_ordinary(bpe):
    ids = bpe.encode(EOT)
    assert len(ids) > 1
    assert bpe.decode(ids) == bpe.decode([bpe.eot]) == EOT


def test_surrogates_count_as_replacement_characters(bpe):
    for text, replaced in [
        ("a\ud800b", "a\ufffdb"),
        ("\udfff", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("x \ude00\ud83d", "x \ufffd\ufffd"),
    ]:
        assert bpe.encode(text) == bpe.encode_plain(text) == bpe.encode(replaced)
        assert Tokenizer.train([text], 300).to_str() == Tokenizer.train([replaced], 300).to_str()
        assert Tokenizer.char([text]).encode(text) == Tokenizer.char([replaced]).encode(replaced)


def test_whitespace_without_end_does_not_panic(bpe, reference):
    for n in (GAP - 1, GAP, GAP + 1):
        for text in ("a" + " " * n + "a", "\n" * n):
            assert bpe.encode(text) == reference.encode(text).ids
    text = "\n" * 1_000_002 + "a"  # tiktoken alone dies here
    assert bpe.decode(bpe.encode(text)) == text


def test_every_id_sequence_decodes(bpe):
    rng = random.Random(1)
    for _ in range(200):
        ids = rng.choices(range(bpe.vocab_size), k=20)
        assert bpe.decode_bytes(ids) == b"".join(bpe.decode_bytes([i]) for i in ids)
        assert bpe.decode(ids) == bpe.decode_bytes(ids).decode("utf-8", "replace")
    assert bpe.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 1200, 10**9])
def test_decode_refuses_ids_outside(bpe, wrong):
    assert bpe.vocab_size == 1200
    for decode in (bpe.decode, bpe.decode_bytes, lambda ids: bpe.stream()(ids[-1])):
        with pytest.raises(ValueError, match=rf"{wrong} .*1200 tokens"):
            decode([5, wrong])


@FUZZ
@given(ids=st.lists(st.integers(0, 1199), max_size=30), text=TEXTS)
def test_stream_joins_to_decode_and_never_splits_a_character(bpe, ids, text):
    stream = bpe.stream()
    parts = [stream(i) for i in [*ids, None]]
    assert "".join(parts) == bpe.decode(ids)
    stream = bpe.stream()
    streamed = ""
    for i in bpe.encode(text):
        streamed += stream(i)
        assert text.startswith(streamed)  # half a character would be U+FFFD here
    assert streamed == text
    assert stream(None) == ""


def test_stream_holds_back_until_the_character_is_complete():
    tokenizer = Tokenizer.train(["x"], 257)
    stream = tokenizer.stream()
    assert [stream(i) for i in tokenizer.encode("é€")] == ["", "é", "", "", "€"]
    first_byte = tokenizer.encode("€")[0]
    assert stream(first_byte) == ""
    assert stream(None) == "\ufffd"


# ---- the file


def test_file_round_trip(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    assert path.read_bytes() == bpe.to_str().encode()
    assert list(tmp_path.iterdir()) == [path]
    text = "the girl's 日本 \n\n"
    for loaded in (Tokenizer.load(path), Tokenizer.load(str(path))):
        assert loaded.to_str() == bpe.to_str()
        assert loaded.sha256 == bpe.sha256
        assert (loaded.kind, loaded.eot, loaded.vocab_size) == (bpe.kind, bpe.eot, bpe.vocab_size)
        assert loaded.encode(text) == loaded.encode_plain(text) == bpe.encode(text)


def raiser(error):
    """Returns a function that raises error, whatever it is called with."""

    def fail(*args):
        raise error

    return fail


def test_a_save_that_fails_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", raiser(OSError("disk full")))
    with pytest.raises(OSError):
        bpe.save(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_transformers_opens_the_file(kind, bpe, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    text = "the girl's  dog .\n\n 日本 , don't !\t"
    tokenizer = bpe if kind == "bpe" else Tokenizer.char([text])
    tokenizer.save(tmp_path / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = tokenizer.encode(text)
    for reference in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    ):
        assert reference(text).input_ids == ids
        assert reference.decode(ids) == text
        assert len(reference) == tokenizer.vocab_size
        assert reference.convert_tokens_to_ids(EOT) == tokenizer.eot
    saved = tmp_path / "saved"
    reference.save_pretrained(saved)
    assert Tokenizer.load(saved / "tokenizer.json").to_str() == tokenizer.to_str()


def test_a_foreign_file_with_our_split_is_read():
    docs, vocab_size = CORPORA["english"]
    foreign = hf_train(docs, vocab_size)
    expected = Tokenizer.train(docs, vocab_size).to_str()
    assert Tokenizer.from_str(foreign.to_str()).to_str() == expected
    for post_processor in (
        hf.processors.ByteLevel(trim_offsets=False),
        hf.processors.TemplateProcessing(single="$A", pair="$A $B:1"),
    ):
        foreign.post_processor = post_processor
        assert Tokenizer.from_str(foreign.to_str()).to_str() == expected
    # older files have no use_regex, and merges as text
    data = json.loads(foreign.to_str())
    del data["pre_tokenizer"]["use_regex"]
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    data["model"]["continuing_subword_prefix"] = ""
    assert Tokenizer.from_str(json.dumps(data)).to_str() == expected


# ---- GPT-2's two files, in miniature


@pytest.fixture
def gpt2_folder(tmp_path):
    """A trained vocabulary as GPT-2 writes it: bytes from 0, merges, <|endoftext|> last."""
    docs = CORPORA["made up"][0] + CORPORA["unicode"][0]
    model = json.loads(Tokenizer.train(docs, 600).to_str())["model"]
    vocab = {token: i - 1 for token, i in model["vocab"].items() if token != EOT} | {EOT: 599}
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    return tmp_path


def test_gpt2_from_its_files(gpt2_folder):
    from transformers import GPT2Tokenizer

    paths = str(gpt2_folder / "encoder.json"), str(gpt2_folder / "vocab.bpe")
    reference = GPT2Tokenizer(*paths)
    bare = hf.ByteLevelBPETokenizer(*paths)
    tokenizer = Tokenizer.gpt2(gpt2_folder)
    opened = hf_open(tokenizer)
    assert (tokenizer.kind, tokenizer.eot, tokenizer.vocab_size) == ("bpe", 599, 600)
    for text in CORPORA["made up"][0][:50] + CORPORA["unicode"][0][:50] + ["", " \n\n x", "they're"]:
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode_plain(text)
        assert ids == bare.encode(text).ids == opened.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert reference("the girl").input_ids == tokenizer.encode("the girl")
    loaded = Tokenizer.from_str(tokenizer.to_str())
    assert loaded.to_str() == tokenizer.to_str()
    assert loaded.eot == 599


def test_gpt2_from_tiktoken(gpt2_folder, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken_load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(gpt2_folder / "vocab.bpe"),
        encoder_json_file=str(gpt2_folder / "encoder.json"),
    )
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={EOT: 599})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    assert Tokenizer.gpt2().to_str() == Tokenizer.gpt2(gpt2_folder).to_str()


def test_gpt2_without_network_or_files_is_refused(gpt2_folder, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", raiser(ConnectionError("no route\nto host")))
    with pytest.raises(ValueError, match=r"could not be downloaded.*encoder\.json and vocab\.bpe") as e:
        Tokenizer.gpt2()
    assert "\n" not in str(e.value)
    (gpt2_folder / "encoder.json").write_text("[1")
    with pytest.raises(ValueError, match="encoder.json"):
        Tokenizer.gpt2(gpt2_folder)
    (gpt2_folder / "encoder.json").unlink()
    with pytest.raises(FileNotFoundError):
        Tokenizer.gpt2(gpt2_folder)


# ---- characters

CHAR_DOCS = [
    "To be, or not to be:\n\n that is",
    "the  question.\t\r\n",
    "é 日本 👩🏽‍🚀 \u2028\xa0\x85",
    EOT,
    "don't.",
]


def test_char_vocabulary():
    tokenizer = Tokenizer.char(iter(["ba", "a\n"]))
    assert (tokenizer.kind, tokenizer.eot, tokenizer.vocab_size) == ("char", 0, 4)
    assert tokenizer.encode("ab\n") == [2, 3, 1] == tokenizer.encode_plain("ab\n")
    assert tokenizer.decode([3, 2, 0]) == "ba" + EOT
    loaded = Tokenizer.from_str(tokenizer.to_str())
    assert loaded.to_str() == tokenizer.to_str()
    assert loaded.kind == "char"
    assert loaded.encode("ab\n") == [2, 3, 1]


@FUZZ
@given(text=st.text(sorted(set("".join(CHAR_DOCS)))))
def test_char_agrees_with_hugging_face(text):
    tokenizer = Tokenizer.char(CHAR_DOCS)
    reference = hf_open(tokenizer)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids == tokenizer.encode_batch([text])[0]
    assert text == tokenizer.decode(ids) == reference.decode(ids)


def test_char_names_the_unknown_character():
    tokenizer = Tokenizer.char(["abc"])
    for encode in (
        tokenizer.encode,
        tokenizer.encode_plain,
        lambda text: tokenizer.encode_batch([text]),
    ):
        with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
            encode("abcé!")
    # Hugging Face refuses too; it does not drop the character
    with pytest.raises(Exception, match="UNK"):
        hf_open(tokenizer).encode("abcé!")


# ---- refusals


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Tokenizer.train(["a b"], 256), "256 is too small"),
        (lambda: Tokenizer.train(["a b"], 0), "0 is too small"),
        (lambda: Tokenizer.train([]), "no text"),
        (lambda: Tokenizer.train(["", ""]), "no text"),
        (lambda: Tokenizer.train("one str"), "one str"),
        (lambda: Tokenizer.char([]), "no text"),
        (lambda: Tokenizer.char([""]), "no text"),
    ],
)
def test_training_refuses_too_few_tokens_and_no_text(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def edited(tokenizer, edit):
    """Returns a tokenizer's file after edit(data, data["model"]), which returns other data or None."""
    data = json.loads(tokenizer.to_str())
    return json.dumps(edit(data, data["model"]) or data)


def move(vocab, token, i):
    vocab[token] = i


SMALL = Tokenizer.train(["abab abab abc"], 262)
# name -> an edit of SMALL's file, the message
BAD = {
    "no model": (lambda d, m: d.pop("model") and None, "model"),
    "a list": (lambda d, m: [1], "no tokenizer.json"),
    "model is a list": (lambda d, m: d.update(model=[]), "no tokenizer.json"),
    "no vocabulary": (lambda d, m: m.pop("vocab") and None, "no vocabulary"),
    "Unigram": (lambda d, m: m.update(type="Unigram", vocab=[["a", 0.0]]), "model.*Unigram"),
    "WordPiece": (lambda d, m: m.update(type="WordPiece"), "model.*WordPiece"),
    "dropout": (lambda d, m: m.update(dropout=0.1), "model.*dropout"),
    "suffix": (lambda d, m: m.update(end_of_word_suffix="</w>"), "</w>"),
    "normalizer": (lambda d, m: d.update(normalizer={"type": "NFC"}), "normalizer.*NFC"),
    "no split": (lambda d, m: d.update(pre_tokenizer=None), "pre_tokenizer.*null"),
    "another split": (
        lambda d, m: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}),
        "pre_tokenizer.*Sequence.*Digits",
    ),
    "prefix space": (
        lambda d, m: d["pre_tokenizer"].update(add_prefix_space=True),
        "pre_tokenizer.*add_prefix_space",
    ),
    "no regex": (lambda d, m: d["pre_tokenizer"].update(use_regex=False), "pre_tokenizer.*use_regex"),
    "a bos": (
        lambda d, m: d.update(
            post_processor={"type": "TemplateProcessing", "special_tokens": {"<s>": 1}}
        ),
        "post_processor.*<s>",
    ),
    "Bert": (
        lambda d, m: d.update(post_processor={"type": "BertProcessing"}),
        "post_processor.*BertProcessing",
    ),
    "more added": (
        lambda d, m: d["added_tokens"].append({"id": 262, "content": "<|im_start|>"}),
        "added_tokens.*im_start",
    ),
    "none added": (lambda d, m: d.update(added_tokens=[]), "added_tokens"),
    "added elsewhere": (lambda d, m: d["added_tokens"][0].update(id=5), "ids"),
    "malformed added": (lambda d, m: d.update(added_tokens=[7]), "added_tokens"),
    "an id twice": (lambda d, m: move(m["vocab"], "ab", 5), "ids of the 262 tokens"),
    "a hole": (lambda d, m: m["vocab"].pop("A") and None, "ids of the 261 tokens"),
    "a fraction": (lambda d, m: move(m["vocab"], "ab", 257.0), "ids"),
    "a text id": (lambda d, m: move(m["vocab"], "ab", "257"), "ids"),
    "True": (lambda d, m: move(m["vocab"], "!", True), "ids"),
    "not byte-level": (lambda d, m: m["vocab"].update({"日": 262}), "262 .*byte characters"),
    "empty token": (lambda d, m: m["vocab"].update({"": 262}), "token 262"),
    "an orphan": (lambda d, m: m["vocab"].update({"zz": 262}), r"merge 5 is None.*\['z', 'z'\]"),
    "a longer orphan": (lambda d, m: m["vocab"].update({"zzz": 262}), "token 262 .*'zzz'"),
    "a byte missing": (lambda d, m: (move(m["vocab"], "zz", m["vocab"].pop("A")), None)[1], "byte 65"),
    "unknown token": (lambda d, m: m["merges"].__setitem__(0, "a qq"), r"merge 0 is \['a', 'qq'\]"),
    "three parts": (lambda d, m: m["merges"].__setitem__(0, "a b c"), "merge 0"),
    "merge is a number": (lambda d, m: m["merges"].__setitem__(0, 3), "merge 0 is 3"),
    "no merges": (lambda d, m: m.pop("merges") and None, "merge 0 is None"),
    "merges is a number": (lambda d, m: m.update(merges=3), "merge 0 is None"),
    "one merge short": (lambda d, m: m["merges"].pop() and None, "merge 4 is None"),
    "one merge twice": (lambda d, m: m["merges"].append(m["merges"][0]), "merge 5 .*None"),
    "merges in another order": (lambda d, m: m["merges"].reverse(), "merge 0"),
    "another pair makes it": (
        lambda d, m: m["merges"].__setitem__(4, "Ġ abab"),
        "merge 4 .*'Ġab', 'ab'",
    ),
}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_heap_merges_as_the_plain_rule_does(seed):
    """Over merges of few letters, so that pairs overlap, tie and are taken apart by others."""
    rng = random.Random(seed)
    merges = {}
    for new in range(3, 15):
        pair = (rng.randrange(new), rng.randrange(new))
        merges.setdefault(pair, new)
    for length in 0, 1, 2, 3, 30:
        ids = [rng.randrange(3) for _ in range(length)]
        assert merge_by_heap(ids, merges) == merge_word(ids, merges)


def test_reading_a_chain_of_merges_takes_steps_in_proportion_to_its_bytes():
    """Tokens ab, abb, abbb and so on; counted are the calls that Python makes, a few for each byte."""
    tokens = [EOT.encode(), *(bytes([b]) for b in BYTE_CHAR)]
    ids = {token: i for i, token in enumerate(tokens)}
    chain = [b"a" + b"b" * n for n in range(1, 101)]
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        merges = recover_merges(tokens + chain, 0)
    finally:
        sys.setprofile(None)
    assert calls < 20 * sum(map(len, chain))
    lefts = [ids[b"a"], *range(257, 356)]
    assert merges == {(left, ids[b"b"]): 257 + n for n, left in enumerate(lefts)}


def test_small_has_the_tokens_that_the_table_edits():
    assert SMALL.tokens[257:] == [b"ab", b" ab", b"abab", b" abc", b" abab"]
    assert Tokenizer.from_str(edited(SMALL, lambda d, m: None)).to_str() == SMALL.to_str()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name, tmp_path):
    edit, message = BAD[name]
    text = edited(SMALL, edit)
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer.from_str(text)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json: "):
        Tokenizer.load(tmp_path / "bad.json")


CHAR_BAD = {
    "two characters": (lambda d, m: m["vocab"].update(de=4), "token 4 .'de'. is not one character"),
    "a surrogate": (lambda d, m: m["vocab"].update({"\ud800": 4}), "token 4 .*not one character"),
    "byte-level split": (lambda d, m: d.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
    "a hole": (lambda d, m: m["vocab"].update(d=5), "ids"),
}


@pytest.mark.parametrize("name", CHAR_BAD)
def test_a_bad_character_file_is_refused(name):
    edit, message = CHAR_BAD[name]
    text = edited(Tokenizer.char(["abc"]), edit)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_str(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "7", '"x"', "[]", "{}", "not json", "[" * 100_000, '{"model": {"type": "BPE"}}'],
)
def test_a_text_that_is_no_tokenizer_json_is_refused(text):
    with pytest.raises(ValueError):
        Tokenizer.from_str(text)


def test_truncated_and_binary_files_are_refused(tmp_path):
    whole = SMALL.to_str().encode()
    path = tmp_path / "tokenizer.json"
    truncated = [whole[:n] for n in range(0, len(whole) - 1, 97)]
    utf16_mark, utf8_mark, pickled = b"\xff\xfe", b"\xef\xbb\xbf", b"\x80\x02}q"
    for content in [*truncated, utf16_mark + whole, utf8_mark + whole, pickled]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.json: ") as e:
            Tokenizer.load(path)
        assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "absent.json")


def paths_into(value, path=()):
    """Yields the paths to the values in a JSON value, the last 20 of each object and list."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items[-20:]:
        yield (*path, key)
        yield from paths_into(inner, (*path, key))


def test_any_one_wrong_value_is_refused_or_changes_nothing():
    """A wrong value in one place of the file is a ValueError, or the tokenizer encodes as before."""
    text = "abab abc  ab's"
    ids = SMALL.encode(text)
    for path in paths_into(json.loads(SMALL.to_str())):
        for junk in (None, True, 3, -1, 0.5, "a", "", [], [1], {}, {"type": "a"}, "\ud800"):
            data = json.loads(SMALL.to_str())
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            try:
                tokenizer = Tokenizer.from_str(json.dumps(data))
            except ValueError:
                continue
            assert ids == tokenizer.encode(text) == tokenizer.encode_plain(text), (path, junk)


def test_byte_characters_are_gpt2s():
    characters = list(BYTE_CHAR.values())
    assert len(set(characters)) == 256
    assert characters == sorted(characters)
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert "".join(BYTE_CHAR[b] for b in " \n!a\xad".encode("latin-1")) == "ĠĊ!aŃ"
