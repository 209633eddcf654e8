"""Conversations: their ids, by the chat template that came with a model, and a chat in the terminal.

    python sample.py --out_dir=hf:FOLDER --chat --system="You are brief."

A message is {"role": system | user | assistant, "content": text}. A model of the hub has its own template
(interop/chat_template.py); the template of a model that was fine-tuned here is a text with {prompt} in it.
"""

import itertools
from typing import NamedTuple

from config import Refusal
from data import AS_IT_STANDS, MODELS_OWN, by_text_rule, prompt_ids, render

HELP = "/reset starts anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def conversation_ids(tokenizer, messages, template=MODELS_OWN):
    """Returns the ids of a conversation up to where the assistant's next answer starts.

    template: a text with {prompt} in it, or MODELS_OWN. Raises ValueError for messages that the model's own
    template refuses.
    """
    if template == MODELS_OWN:
        _, ids = own_start(tokenizer, messages)
        return ids
    waiting = {"role": "assistant", "content": ""}
    ids, _ = encode_turns(tokenizer, turns_of([*messages, waiting], itertools.repeat(False)), template)
    return ids


class Turn(NamedTuple):
    prompt: str
    response: str  # "" where it is still to come
    is_learned: bool = True


def turns_of(messages, is_learned):
    """Returns the Turns of messages. The messages before an answer are its prompt; those after the last answer are
    left out. is_learned: for each message, whether it is learned if it is an answer.
    """
    turns = []
    prompts = []
    for message, is_target in zip(messages, is_learned):
        if message["role"] == "assistant":
            turns.append(Turn("\n".join(filter(None, prompts)), message["content"] or "", is_target))
            prompts = []
        else:
            prompts.append(message["content"])
    return turns


def encode_turns(tokenizer, turns, template):
    """Returns (ids, whether each is learned), two lists. Prompt and response are encoded apart, so that no
    token has a part of both, and a prompt's ids are those that sample.py makes of it.
    """
    ids = []
    is_target = []
    for prompt, response, is_learned in turns:
        text = render(template, prompt)
        new_ids = tokenizer.encode_more(text) if ids else prompt_ids(tokenizer, text)
        response_ids = tokenizer.encode_more(response) + [tokenizer.eot] if response else []
        ids += new_ids + response_ids
        is_target += [False] * len(new_ids) + [is_learned] * len(response_ids)
    return ids, is_target


def start_of_answer(tokenizer, prompt, template):
    """Returns (the text that a model reads before it answers a prompt, its ids). Raises ValueError for a prompt that
    the model's own template refuses, and for a character that a character model lacks.
    """
    if template == MODELS_OWN:
        return own_start(tokenizer, [{"role": "user", "content": prompt}])
    text = render(template, prompt)
    return text, prompt_ids(tokenizer, text)


def own_start(tokenizer, messages):
    """Returns what start_of_answer returns, for a conversation in the model's own template."""
    text = own_template(tokenizer).render(messages, add_generation_prompt=True)
    return text, tokenizer.encode_special(text)


def has_own_template(tokenizer):
    """Returns whether a model came with a chat template. Raises Refusal for one that cannot be read."""
    try:
        return tokenizer.chat_template is not None
    except ValueError as e:
        raise Refusal(e)


def own_template(tokenizer):
    """Returns the model's ChatTemplate. Raises ValueError where it has none."""
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template")
    return tokenizer.chat_template


def encode_answers(tokenizer, messages, is_learned):
    """Returns (ids of a conversation by the model's own chat template, whether each is learned).

    An answer and the token that ends it are learned where is_learned, a flag for each message, says so. What
    comes after the last answer is left out. Raises ValueError for messages that the template refuses, and for
    a template that writes earlier turns otherwise once another turn follows.
    """
    template = own_template(tokenizer)
    ids = []
    is_target = []
    text = ""
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:n], add_generation_prompt=True)
        after = template.render(messages[: n + 1])
        if not before.startswith(text) or not after.startswith(before):
            raise ValueError("its chat template writes earlier turns otherwise once others follow")
        prompt = added_ids(tokenizer, ids, text, before)
        answer = added_ids(tokenizer, ids + prompt, before, after)
        ends = [place for place, id in enumerate(answer, 1) if id in tokenizer.ends]
        if not ends:
            raise ValueError("its chat template puts no token that ends a text after an answer")
        n_learned = ends[-1] if is_learned[n] else 0
        ids += prompt + answer
        is_target += [False] * len(prompt)
        is_target += [place < n_learned for place in range(len(answer))]
        text = after
    return ids, is_target


def added_ids(tokenizer, ids, text, longer):
    """Returns the ids that a longer text adds to those of a text that it starts with."""
    whole = tokenizer.encode_special(longer)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # not simply longer: the text's last token becomes another one when more follows
    return tokenizer.encode_special_more(longer[len(text) :])


class Chat:
    """A conversation with a model: its messages, and what it answers.

    generate: a function from [ids] to the steps of generate.generate. system: the text of the system message,
    None where there is none. text_rule: how the model learned such texts, see data.text_rule.
    """

    def __init__(
        self, generate, tokenizer, block_size, template=MODELS_OWN, system=None, text_rule=AS_IT_STANDS
    ):
        self.generate = generate
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.template = template
        self.text_rule = text_rule
        self.first = [] if system is None else [self.message("system", system)]
        self.messages = list(self.first)

    def message(self, role, text):
        return {"role": role, "content": by_text_rule(text, self.text_rule)}

    def reset(self):
        self.messages = list(self.first)

    def answer(self, text):
        """Yields the answer to a message in pieces, as it is written. The message and the answer are part of the
        conversation from then on.

        Where the consumer stops, the answer is what it was given so far. Raises ValueError for a conversation that
        does not fit in the context; the message is not part of it then.
        """
        messages = [*self.messages, self.message("user", text)]
        ids = conversation_ids(self.tokenizer, messages, self.template)
        if len(ids) >= self.block_size:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens with this and the context {self.block_size:,}: "
                "/reset starts anew, or say less"
            )
        stream = self.tokenizer.stream()
        pieces = []
        end = ""
        try:
            for [row] in self.generate([ids]):
                end = row.end
                if row.new is not None:
                    pieces.append(stream(row.new))
                    yield pieces[-1]
            pieces.append(stream(None))  # of a character that was not finished
            yield pieces[-1]
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        if end == "block_size":
            yield f"\n[the context of {self.block_size:,} tokens is full: /reset starts anew]"
        if end == "length":
            yield "\n[stopped; --max_new_tokens=N allows more tokens]"


def talk(chat):
    """Reads messages from the terminal, or lines of another stdin, and prints the answers."""
    try:
        import readline  # noqa: F401  (input() then edits and remembers lines; Windows has none)
    except ImportError:
        pass
    print(HELP)
    while True:
        try:
            text = input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n[{HELP}]")
            continue
        if text.strip() == "/quit":
            return
        if text.strip() == "/reset":
            chat.reset()
            print("[a new conversation]")
        elif text.strip():
            write_answer(chat, text)


def write_answer(chat, text):
    answer = chat.answer(text)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except ValueError as e:
        print(f"[{e}]")
    finally:
        answer.close()
