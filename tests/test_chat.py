"""Conversations: transformers' apply_chat_template as the second implementation, and a chat in the terminal."""

import io
import itertools
import json
import random
from types import SimpleNamespace

import pytest
from scripts import call, printed, written
from test_hf import save_checkpoint, smollm, tinyllama, write_folder

import chat
import finetune_lora
import sample
from chat import Chat, conversation_ids, encode_answers
from config import Refusal, configure
from data import AS_IT_STANDS, STRIPPED, prompt_ids
from generate import Row
from interop import hf_folder
from interop.chat_template import ChatTemplate
from messages import EQUAL, preferences
from messages import conversations as read_conversations
from rows import MODELS_OWN, LeftOut, encode, encode_row
from tokenizer import EOT, Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

# in the manner of SmolLM2's, Llama 3's, Qwen's and of those with marks for training
SYSTEM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
<s>system
You are kind.</s>
{% endif %}<s>{{ message['role'] }}
{{ message['content'] }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
HEADERS = """{{ bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {{- '<s>' + message.role + '\\n\\n' + content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n\\n' }}{% endif %}"""
NAMESPACE = """{%- set ns = namespace(last=messages|length) %}
{%- if tools %}{{ tools | tojson }}{%- endif %}
{%- for message in messages %}
{%- if message.role == "system" and not loop.first %}{{ raise_exception("a system message comes first") }}{% endif %}
{%- if loop.index == ns.last %}{%- set ns.last = -1 %}{% endif %}
{{ '<s>' ~ message.role }}{{ message.content | tojson }}</s>
{%- if message.role == "x" %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<s>assistant{% endif %}"""
MARKS = """{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{
message.content + eos_token }}{% endgeneration %}
{% else %}{{ bos_token + message.role + ': ' + message.content }}
{% endif %}{% endfor %}"""
TEMPLATES = {"system": SYSTEM, "headers": HEADERS, "namespace": NAMESPACE, "marks": MARKS}
WORDS = ["the ", " cat", "\n", "  ", "12", "</s>", "<s>", "é", ".", "user\n", "{{ 7 }}", "don't"]


def conversations(n):
    """Conversations with and without a system message, whose texts spell special tokens and Jinja too."""
    rng = random.Random(n)
    result = []
    for _ in range(n):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(4) + ["user"]
        texts = ["".join(rng.choices(WORDS, k=rng.randrange(8))) for _ in roles]
        result.append([{"role": role, "content": text} for role, text in zip(roles, texts)])
    return result


def instruct(folder, tokenizer, source, **generation):
    """Writes a model's folder with a chat template, as transformers does; returns its AutoTokenizer."""
    write_folder(folder, "llama", tokenizer, max_position_embeddings=256)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    reference.chat_template = source
    reference.save_pretrained(folder)
    if generation:
        transformers.GenerationConfig(do_sample=True, **generation).save_pretrained(folder)
    return reference


@pytest.mark.parametrize("tokenizer", [smollm, tinyllama])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_of_conversations_are_those_of_transformers(name, tokenizer, tmp_path):
    reference = instruct(tmp_path, tokenizer, TEMPLATES[name])
    ours = hf_folder.read_tokenizer(str(tmp_path))
    for messages in conversations(50):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert conversation_ids(ours, messages) == expected


@pytest.mark.parametrize("lists_added_tokens", [False, True])
def test_special_tokens_are_those_of_the_file_that_transformers_reads(lists_added_tokens, tmp_path):
    """tokenizer_config.json alone where it lists all added tokens, else special_tokens_map.json before it."""
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"
    instruct(tmp_path, smollm, source)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    end = {"content": EOT, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    if lists_added_tokens:
        settings["added_tokens_decoder"] = {"0": end | {"special": True}}
    path.write_text(json.dumps(settings))
    special_tokens = {"bos_token": end, "eos_token": "<|im_start|>", "pad_token": EOT}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = hf_folder.read_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "a cat"}]
    expected = f"a cat{EOT}" if lists_added_tokens else f"{EOT}a cat<|im_start|>{EOT}"
    assert reference.apply_chat_template(messages, tokenize=False) == expected
    assert ours.chat_template.render(messages) == expected
    assert ours.eot == reference.eos_token_id


def spread(tokenizer, ids, is_target):
    """Returns the learned pieces of a conversation as texts, and the others'."""
    pieces = []
    for learned, group in itertools.groupby(zip(ids, is_target), key=lambda pair: pair[1]):
        pieces.append((tokenizer.decode_more([id for id, _ in group]), bool(learned)))
    return pieces


def test_only_answers_and_the_token_that_ends_each_are_learned(tmp_path):
    instruct(tmp_path, smollm, SYSTEM.replace("<s>", "<|im_start|>").replace("</s>", EOT))
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a cat?"},
        {"role": "assistant", "content": "\nYes."},
        {"role": "user", "content": "sat?"},
        {"role": "assistant", "content": "No. "},
        {"role": "user", "content": "left out"},
    ]
    ids, is_target = encode_answers(tokenizer, messages, [True] * 6)
    start = "<|im_start|>"
    assert spread(tokenizer, ids, is_target) == [
        (f"{start}system\nBe brief.{EOT}\n{start}user\na cat?{EOT}\n{start}assistant\n", False),
        (f"\nYes.{EOT}", True),
        (f"\n{start}user\nsat?{EOT}\n{start}assistant\n", False),
        (f"No. {EOT}", True),
        ("\n", False),
    ]
    prompt = conversation_ids(tokenizer, messages[:4])
    assert ids[: len(prompt)] == prompt  # what the model is given when it answers
    _, is_target = encode_answers(tokenizer, messages, [False] * 4 + [True] * 2)
    assert spread(tokenizer, ids, is_target)[1] == (f"No. {EOT}", True)


@pytest.mark.parametrize("tokenizer", [smollm, tinyllama])
@pytest.mark.parametrize("name", ["system", "namespace"])
def test_what_is_learned_are_the_ids_of_transformers(name, tokenizer, tmp_path):
    end = tokenizer()[1]["eos_token"]
    reference = instruct(tmp_path, tokenizer, TEMPLATES[name].replace("</s>", end))
    ours = hf_folder.read_tokenizer(str(tmp_path))
    for messages in conversations(50):
        if len(messages) < 3:
            continue
        ids, _ = encode_answers(ours, messages[:-1], [True] * len(messages))
        assert ids == reference.apply_chat_template(messages[:-1], return_dict=False)


def test_answers_that_a_template_makes_the_same_are_no_pair(tmp_path):
    instruct(tmp_path, smollm, HEADERS.replace("<s>", "<|im_start|>"))
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    prompt = {"role": "user", "content": "a cat?"}
    chosen, rejected = ([prompt, {"role": "assistant", "content": text}] for text in ("Yes.", "Yes. "))
    [pair] = preferences([("line 1", {"chosen": chosen, "rejected": rejected})])
    assert encode_row(pair, tokenizer, MODELS_OWN, 99) == LeftOut("line 1", EQUAL)


def test_templates_that_are_broken_or_run_on_are_one_line():
    refusals = {
        "{% if %}": "Expected an expression",
        "{{ messages[5].x }}": "no element 5",
        "{{ raise_exception('no\nsystem') }}": "no system",
        "{% for i in range(99) %}{% for j in range(99) %}a{% endfor %}{% endfor %}": "does not end",
    }
    for source, reason in refusals.items():
        with pytest.raises(ValueError, match=reason) as e:
            ChatTemplate(source, {}, lines=500).render([])
        assert "\n" not in str(e.value)
    assert ChatTemplate("{{ ''.__class__ }}", {}).render([]) == ""  # the sandbox shows nothing of Python


def test_a_template_that_rewrites_earlier_turns_is_refused_for_rows(tmp_path):
    source = "{% for m in messages %}{{ m.role if loop.last else 'x' }}{{ m.content }}{% endfor %}"
    instruct(tmp_path, smollm, source)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="writes earlier turns otherwise"):
        encode_answers(tokenizer, messages, [True, True])


# In the terminal


class Answers:
    """A model's part in a chat: an answer from a list, a token at a time."""

    def __init__(self, tokenizer, *answers):
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.prompts = []

    def __call__(self, prompts):
        self.prompts += prompts
        row = Row([])
        for id in self.tokenizer.encode(self.answers.pop(0)):
            row.new = id
            yield [row]
        row.new = None
        row.end = "stop"
        yield [row]


def test_a_chat_has_a_history_that_reset_forgets(tmp_path, monkeypatch, capsys):
    instruct(tmp_path, smollm, SYSTEM)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    answers = Answers(tokenizer, "the cat", "a dog", "sat")
    lines = iter(["Who?", "And?", "/reset", "  ", "What?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.talk(Chat(answers, tokenizer, 10**4, system="Be brief."))
    output = capsys.readouterr().out
    assert "the cat\n" in output and "a dog\n" in output and "a new conversation" in output
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "Who?"}]
    second = [*first, {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "And?"}]
    third = [system, {"role": "user", "content": "What?"}]
    expected = [conversation_ids(tokenizer, messages) for messages in (first, second, third)]
    assert answers.prompts == expected


def test_ctrl_c_stops_the_answer_and_a_full_context_is_said(tmp_path, monkeypatch, capsys):
    instruct(tmp_path, smollm, SYSTEM)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))

    def interrupted(prompts):
        for rows in Answers(tokenizer, "the cat sat")(prompts):
            yield rows
            raise KeyboardInterrupt

    conversation = Chat(interrupted, tokenizer, 200)
    lines = iter(["Who?", "long " * 200])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or raise_end())
    chat.talk(conversation)
    output = capsys.readouterr().out
    assert "[stopped]" in output and "/reset starts anew, or say less" in output
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert "the cat".startswith(conversation.messages[1]["content"])


def test_a_conversation_leaves_room_for_a_token_of_the_answer(tmp_path):
    instruct(tmp_path, smollm, SYSTEM)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    n = len(conversation_ids(tokenizer, [{"role": "user", "content": "Who?"}]))
    answers = Answers(tokenizer, "the cat")
    assert "".join(Chat(answers, tokenizer, n + 1).answer("Who?")).startswith("the cat")
    full = Chat(answers, tokenizer, n)
    with pytest.raises(ValueError, match="the context"):
        next(full.answer("Who?"))
    assert full.messages == []


def raise_end():
    raise EOFError


@pytest.mark.parametrize("system", ["x", ""])
def test_chat_from_the_command_line(tmp_path, monkeypatch, capsys, system):
    """Greedy answers of two turns equal transformers' on the conversation so far."""
    source = SYSTEM.replace("<s>", "<|im_start|>").replace("</s>", EOT)
    reference = instruct(tmp_path, smollm, source, temperature=0.5, top_k=3)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = hf_folder.read_tokenizer(str(tmp_path))
    argv = [f"--out_dir=hf:{tmp_path}", "--chat", "--temperature=0", "--max_new_tokens=8"]
    monkeypatch.setattr("sys.stdin", io.StringIO("cat\nsat\n"))
    call(sample, *argv, f"--system={system}")
    output = capsys.readouterr().out
    assert "top_k 3, as the model's generation_config.json says" in output
    messages = [{"role": "system", "content": system}]
    for text in "cat", "sat":
        messages.append({"role": "user", "content": text})
        ids = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        answer = peer.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.size(1) :].tolist()
        answer = ours.decode_more([id for id in answer if id != peer.config.eos_token_id])
        messages.append({"role": "assistant", "content": answer})
        assert f"> {answer}\n" in output


@pytest.mark.parametrize(
    "generation, argv, temperature",
    [
        ({"do_sample": False}, [], 0),
        ({"do_sample": False, "temperature": 0.6}, [], 0),
        ({"do_sample": False}, ["--temperature=0.7"], 0.7),
        ({"do_sample": True, "temperature": 0.6}, [], 0.6),
        ({"do_sample": None, "temperature": 0.6}, [], 0.6),
    ],
)
def test_a_model_that_does_not_sample_is_greedy_unless_a_temperature_is_given(
    generation, argv, temperature
):
    tokenizer = SimpleNamespace(generation=generation)
    cfg, message = sample.model_defaults(configure(sample.Config, argv), tokenizer)
    assert cfg.temperature == temperature
    assert ("temperature" in message) == (not argv)


@pytest.mark.parametrize("rule", [AS_IT_STANDS, STRIPPED])
def test_what_is_typed_is_read_by_the_rule_that_a_model_learned_such_texts_by(
    rule, tmp_path, monkeypatch, capsys
):
    config = {"template": "Q: {prompt}\nA:", "text_rule": rule}
    save_checkpoint(tmp_path / "ckpt.pt", config=config)
    argv = [f"--out_dir={tmp_path}", "--max_new_tokens=20"]
    answers = []
    for system, typed in (" Be brief. ", "  the cat "), ("Be brief.", "the cat"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        answers.append(printed(capsys, sample, *argv, "--chat", f"--system={system}"))
    assert (answers[0] == answers[1]) == (rule == STRIPPED)
    # and so with one message, which --start is
    texts = [printed(capsys, sample, *argv, f"--start={typed}") for typed in ("  the cat ", "the cat")]
    assert (written(texts[0]) == written(texts[1])) == (rule == STRIPPED)


def test_special_and_raw_are_refused_where_they_would_change_nothing(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", config={"template": "Q: {prompt}\nA:"})
    for argv, reason in (
        (["--chat", "--raw"], "leave out raw and special"),
        (["--chat", "--special"], "leave out raw and special"),
        (["--start=a", "--special"], "all of that is text: leave out special, or take --raw"),
    ):
        with pytest.raises(Refusal, match=reason):
            call(sample, f"--out_dir={tmp_path}", *argv)


def test_a_model_without_a_template_is_not_talked_to(tmp_path):
    write_folder(tmp_path, "llama", smollm)
    with pytest.raises(Refusal, match="has no chat template"):
        call(sample, f"--out_dir=hf:{tmp_path}", "--chat")


def test_a_template_that_cannot_be_read_is_one_line_of_each_script(tmp_path):
    folder = tmp_path / "model"
    instruct(folder, smollm, "{% for x in %}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the", "response": "cat"}\n' * 20)
    tune = [f"--init_from=hf:{folder}", f"--dataset={rows}", f"--out_dir={tmp_path}/tuned"]
    for script, argv in (sample, [f"--out_dir=hf:{folder}", "--chat"]), (finetune_lora, tune):
        with pytest.raises(Refusal, match="chat template: Expected an expression"):
            call(script, *argv)


def test_special_tokens_are_special_where_asked(tmp_path):
    write_folder(tmp_path, "llama", smollm)
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"<|im_start|>user\nthe cat{EOT}"
    assert prompt_ids(tokenizer, text, special=True) == reference(text).input_ids
    assert prompt_ids(tokenizer, text) != reference(text).input_ids
    ours = Tokenizer.train(["the cat"], 260)
    assert ours.encode_special(f"a{EOT}b") == [*ours.encode("a"), ours.eot, *ours.encode("b")]


def test_instruction_and_input_are_lines_of_one_message(tmp_path):
    instruct(tmp_path, smollm, SYSTEM.replace("<s>", "<|im_start|>").replace("</s>", EOT))
    tokenizer = hf_folder.read_tokenizer(str(tmp_path))
    for text, expected in [("", "add"), ("1 2", "add\n1 2")]:
        row = {"instruction": "add", "input": text, "output": "3"}
        [conversation] = read_conversations([("here", row)])
        messages = [{"role": "user", "content": expected}, {"role": "assistant", "content": "3"}]
        ids, _ = encode(conversation, tokenizer, MODELS_OWN)
        assert ids == encode_answers(tokenizer, messages, [True] * 2)[0]
