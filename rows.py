"""From rows of examples to batches for tuning: rows of a file or of the hub become conversations, these ids, and
several examples share a row of the context.

A row is an object with prompt and response; with instruction, output and perhaps input (Alpaca); with
messages, each with a role (system, user, assistant) and content; with conversations, whose messages say
from (human, gpt) and value (ShareGPT); or with prompt and completion, both texts or both lists of
messages (TRL). Content may be a list of parts of type text. Text is taken as it stands. Responses and
the end of text after each are learned, prompts are not. Examples that share a row do not see each other.
"""

import functools
import itertools
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import readers
import sources
import toy_stories
from chat import encode_answers, encode_turns, turns_of
from config import Refusal, hf_name, is_hf
from data import AS_IT_STANDS, MODELS_OWN, STRIPPED, by_text_rule

MORAL_SEED = 0  # of other stories than those of data/toy, which a test checks


# -----------------------------------------------------------------------------------------------------
# Rows are (place, row); place names the row in messages, as "rows.jsonl line 3"


def read_rows(dataset, split="train", built_in=""):
    """Yields (place, row) of all rows of a file, or of a split of a dataset on the hub; none where it has no
    such split.

    built_in: the other name that --dataset may be, "" for --val_dataset; only for the message. Raises Refusal for
    what cannot be read.
    """
    if is_hf(dataset):
        rows = sources.hub_splits(hf_name(dataset)).get(split, ())
        for n, row in enumerate(rows, 1):
            yield f"{dataset} row {n}", row
        return
    kind = readers.file_kind(dataset)
    if kind not in readers.ROW_READERS:
        key = f"dataset must be {built_in}," if built_in else "val_dataset must be"
        raise Refusal(f"{key} a {' '.join(readers.ROW_READERS)} file or hf:NAME, not {dataset!r}")
    yield from readers.ROW_READERS[kind](dataset)


class BuiltIn(NamedTuple):
    """Rows that are made here. The first ones are to learn from."""

    make: Callable  # (n, seed) -> n rows
    n_learned: int
    n_held_out: int

    def rows(self):
        return self.make(self.n_learned + self.n_held_out, MORAL_SEED)


BUILT_IN = {
    "moral": BuiltIn(toy_stories.moral_rows, 200, 200),
    "toy": BuiltIn(toy_stories.preference_rows, 1800, 600),
}


def read_both(cfg):
    """Returns (rows to learn from, rows to hold out), both iterables of (place, row). The latter is empty
    where rows of the former are held out. Raises Refusal, also while they are read.
    """
    if cfg.dataset == cfg.built_in:
        built_in = BUILT_IN[cfg.dataset]
        rows = [(f"{cfg.dataset} {n}", row) for n, row in enumerate(built_in.rows())]
        return rows[: built_in.n_learned], rows[built_in.n_learned :]
    rows = read_rows(cfg.dataset, built_in=cfg.built_in)
    if cfg.val_dataset:
        return rows, read_rows(cfg.val_dataset)
    return rows, read_rows(cfg.dataset, "validation") if is_hf(cfg.dataset) else ()


def split_numbers(cfg, n, n_held_out):
    """Returns (numbers of rows to learn from, numbers of rows held out), two arrays. The n rows of the first
    dataset of read_both() are numbered first, then the n_held_out rows of the second. Raises Refusal.
    """
    numbers = np.arange(n + n_held_out)
    if cfg.val_dataset or n_held_out:
        return numbers[:n], numbers[n:]
    if n < 2:
        raise Refusal(
            f"{cfg.dataset} needs two rows, as one is held out, and has {n}; "
            "--val_dataset names others to hold out"
        )
    order = np.random.default_rng(cfg.seed).permutation(n)
    n_val = min(n - 1, max(1, round(cfg.val_fraction * n)))
    return order[n_val:], order[:n_val]


def split_rows(cfg, convert):
    """Returns (what to learn from, what is held out), two lists. convert(rows) returns a list with an item for
    each (place, row). Raises Refusal.
    """
    # converted before they are shuffled, so that a Refusal is about the first wrong row
    learned, held_out = [convert(rows) for rows in read_both(cfg)]
    both = [*learned, *held_out]
    return tuple([both[i] for i in side] for side in split_numbers(cfg, len(learned), len(held_out)))


# -----------------------------------------------------------------------------------------------------
# Messages of a row, whatever its kind


class Message(NamedTuple):
    role: str  # system | user | assistant | tool
    text: str | None  # None where it has no content
    is_learned: bool = True  # if it is an answer
    has_calls: bool = False  # it calls a tool, or is a call or its result


# the names of chat formats and of ShareGPT
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_call": "tool",
    "observation": "tool",
}
ROW = (
    "rows have prompt and response, instruction and output, messages, conversations, "
    "or prompt and completion; here is"
)
PREFERENCE = (
    "rows have prompt or instruction, chosen and rejected, or chosen and rejected as whole "
    "conversations; here is"
)
MESSAGE = "a message has role and content, or from and value; here is"
PART = "a part of a content has type and text; here is"


def messages_of_texts(row, place, columns):
    """Returns the Messages of a row of texts: the last column is the answer, those before it make one prompt."""
    *prompts, answer = [readers.field(row, column, place, ROW) for column in columns]
    prompt = "\n".join(filter(None, prompts))
    return [Message("user", prompt), Message("assistant", answer)]


def messages_of_alpaca(row, place, columns):
    """Returns the Messages of a row of texts that may have a column `input`, which ends the prompt."""
    *prompts, answer = columns
    optional = ["input"] if "input" in row else []
    return messages_of_texts(row, place, [*prompts, *optional, answer])


def messages_of_chat(row, place, columns):
    """Returns the Messages of a row of lists of messages. Answers in the last column are learned, those in a
    column before it are part of the prompt.
    """
    messages = []
    for column in columns:
        if not isinstance(row[column], list):
            value = "null" if row[column] is None else f"{row[column]!r:.60}"
            raise Refusal(f"{place}: column {column!r} is not a list of messages but {value}")
        for n, message in enumerate(row[column], 1):
            name = f"{place}, message {n} of {column!r}"
            messages.append(read_message(message, name, is_learned=column == columns[-1]))
    return messages


def read_message(message, place, is_learned):
    """Returns the Message of an object with role and content, or from and value. Raises Refusal."""
    role_key, content_key = "role", "content"
    if isinstance(message, dict) and message.get("from") is not None:
        role_key, content_key = "from", "value"
    role = readers.field(message, role_key, place, MESSAGE)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise Refusal(f"{place}: a role is {role!r:.40}, which is not read; known are {known}")
    has_calls = bool(message.get("tool_calls") or message.get("function_call")) or ROLES[role] == "tool"
    text = None
    if content_key in message or not has_calls:
        text = read_content(message, content_key, place)
    return Message(ROLES[role], text, is_learned, has_calls)


def read_content(message, key, place):
    """Returns a message's text, None where it is null or has no parts. Raises Refusal for parts that are no text."""
    content = message.get(key)
    if content is None and key in message:
        return None
    if not isinstance(content, list):
        return readers.field(message, key, place, MESSAGE)
    texts = []
    for part in content:
        kind = readers.field(part, "type", place, PART)
        if kind != "text":
            raise Refusal(f"{place}: a part of its content is of type {kind!r:.40}; only text is read")
        texts.append(readers.field(part, "text", place, PART))
    return "".join(texts) if texts else None


class Kind(NamedTuple):
    """A form of rows."""

    columns: tuple  # that all rows of this kind have
    type: type  # of what the columns hold
    messages: Callable  # (row, place, columns) -> the row's Messages
    template: str  # that is taken where neither the user nor the base has one


CHAT_TEMPLATE = "User:\n{prompt}\n\nAssistant:\n"
ALPACA_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
KINDS = [
    Kind(("prompt", "response"), str, messages_of_texts, "{prompt}\n"),
    Kind(("instruction", "output"), str, messages_of_alpaca, ALPACA_TEMPLATE),
    Kind(("messages",), list, messages_of_chat, CHAT_TEMPLATE),
    Kind(("conversations",), list, messages_of_chat, CHAT_TEMPLATE),
    Kind(("prompt", "completion"), str, messages_of_texts, "{prompt}"),  # as TRL joins them
    Kind(("prompt", "completion"), list, messages_of_chat, CHAT_TEMPLATE),
]


# The last two columns are two answers, or two conversations with a common start
PREFERENCE_KINDS = [
    Kind(("prompt", "chosen", "rejected"), str, messages_of_texts, "{prompt}\n"),
    Kind(("instruction", "chosen", "rejected"), str, messages_of_alpaca, ALPACA_TEMPLATE),
    Kind(("prompt", "chosen", "rejected"), list, messages_of_chat, CHAT_TEMPLATE),
    Kind(("chosen", "rejected"), list, messages_of_chat, CHAT_TEMPLATE),
]


def kind_of(row, kinds=KINDS):
    """Returns the first Kind whose columns the row has with values of its type, else the first whose columns it has
    at all, as a table has each column in all rows, else the first Kind.
    """
    columns = row if isinstance(row, dict) else ()
    named = [kind for kind in kinds if all(column in columns for column in kind.columns)]
    filled = [
        kind for kind in named if all(isinstance(row[column], kind.type) for column in kind.columns)
    ]
    return (filled or named or kinds)[0]


# -----------------------------------------------------------------------------------------------------
# Conversations: the turns of a row


class Conversation(NamedTuple):
    """The messages of a row, or of one side of a preference."""

    place: str
    kind: Kind
    messages: list
    problem: str = ""  # why it is left out, in words that follow a number of rows

    @property
    def is_learned(self):
        """A flag a message."""
        return [message.is_learned for message in self.messages]

    @property
    def turns(self):
        return turns_of(chat_messages(self.messages), self.is_learned)


def chat_messages(messages):
    """Returns Messages as chat.py and templates have them."""
    return [{"role": message.role, "content": message.text} for message in messages]


NO_RESPONSE = "without a response"
EQUAL = "whose chosen and rejected answer are the same"
NO_PAIR = "whose sides are no two answers to one prompt"


def problem_of(messages):
    """Returns why messages are no conversation to learn from, or ""."""
    roles = [message.role for message in messages]
    if not messages:
        return "without messages"
    if roles[0] == "assistant":
        return "that begin with an answer"
    if ("assistant", "assistant") in itertools.pairwise(roles):
        return "with two answers in a row"
    if any(message.has_calls for message in messages):
        return "with a call of a tool"
    if any(message.text is None for message in messages):
        return "with a message without content"
    if any(message.role == "assistant" and not message.text.strip() for message in messages):
        return NO_RESPONSE
    return ""


def conversations(rows, text_rule=AS_IT_STANDS):
    """Returns the Conversation of each (place, row). Raises Refusal.

    A run that learned text STRIPPED is older than the rules in problem_of, and goes on with all of its rows.
    """
    result = []
    for place, row in rows:
        kind = kind_of(row)
        messages = kind.messages(row, place, kind.columns)
        problem = "" if text_rule == STRIPPED else problem_of(messages)
        messages = [
            message._replace(text=by_text_rule(message.text or "", text_rule)) for message in messages
        ]
        result.append(Conversation(place, kind, messages, problem))
    return result


def texts(messages):
    """Returns role and text of each of messages, whether they are learned or not."""
    return [(message.role, message.text) for message in messages]


def role_at(messages, n):
    """Returns the role of message n, "" where there is none."""
    return messages[n].role if n < len(messages) else ""


def preferences(rows):
    """Returns for each (place, row) a pair: the Conversation with the chosen answer and the one with the rejected
    answer. The messages that both begin with are the prompt. Raises Refusal.
    """
    result = []
    for place, row in rows:
        kind = kind_of(row, PREFERENCE_KINDS)
        sides = read_sides(row, place, kind)
        n_common = count_common(*sides)
        problem = problem_of_sides(sides, n_common)
        pair = []
        for messages in sides:
            prompts = [message._replace(is_learned=False) for message in messages[:n_common]]
            pair.append(Conversation(place, kind, prompts + messages[n_common:], problem))
        result.append(tuple(pair))
    return result


def read_sides(row, place, kind):
    """Returns the Messages of both sides of a preference, chosen and rejected, each with the prompt. Raises Refusal."""
    is_complete = isinstance(row, dict) and {*kind.columns} <= row.keys()
    # two texts without a prompt: it has another name, or stands in both texts
    if not is_complete or kind.type is list and isinstance(row["chosen"], str):
        here = ", ".join(map(str, row)) if isinstance(row, dict) else f"{row!r:.40}"
        raise Refusal(f"{place}: {PREFERENCE} {here:.200}")
    *prompt, chosen, rejected = kind.columns
    sides = [kind.messages(row, place, [*prompt, side]) for side in (chosen, rejected)]
    n = len(row[prompt[0]]) if prompt and kind.type is list else 0
    if all(texts(side[:n]) == texts(side[n : 2 * n]) for side in sides):
        return [side[n:] for side in sides]  # each column has the whole conversation, with the prompt
    return sides


def count_common(one, other):
    """Returns how many items two lists have in common at their start."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def problem_of_sides(sides, n_common):
    """Returns why two lists of Messages that begin with n_common equal ones are no preference, or ""."""
    for messages in sides:
        if problem := problem_of(messages):
            return problem
    if n_common == max(map(len, sides)):
        return EQUAL
    if any(role_at(messages, n_common) != "assistant" for messages in sides):
        return NO_PAIR
    return ""


def default_template(conversations):
    """Returns the template of the conversations' kind. Raises Refusal where they have several."""
    if not conversations:
        return ""
    first = conversations[0]
    for other in conversations:
        if other.kind.template != first.kind.template:
            kinds = [" and ".join(conversation.kind.columns) for conversation in (first, other)]
            raise Refusal(
                f"{first.place} has {kinds[0]}, {other.place} has {kinds[1]}: each kind has another "
                "template; --template=... is one for all rows"
            )
    return first.kind.template


# -----------------------------------------------------------------------------------------------------
# Examples: a conversation as (idx, targets), targets one token ahead and -100 where nothing is learned


def encode(conversation, tokenizer, template):
    """Returns (ids, whether each is learned), two lists. Raises ValueError for a character that a character
    model lacks, and messages that the model's chat template refuses.
    """
    if template == MODELS_OWN:
        return encode_answers(tokenizer, chat_messages(conversation.messages), conversation.is_learned)
    return encode_turns(tokenizer, conversation.turns, template)


def example(ids, is_learned):
    """Returns (idx, targets), int64 arrays, of ids and whether each is learned."""
    ids = np.asarray(ids, np.int64)
    return ids[:-1], np.where(is_learned, ids, -100)[1:]


class LeftOut(NamedTuple):
    place: str
    reason: str  # in words that follow a number of rows


def encode_row(row, tokenizer, template, T):
    """Returns encode() of each conversation of a row, which has one, or as a preference two; or a LeftOut for the
    whole row where one has no response or more than T tokens. Raises Refusal.
    """
    place, problem = row[0].place, row[0].problem
    if problem:
        return LeftOut(place, problem)
    try:
        encoded = [encode(conversation, tokenizer, template) for conversation in row]
    except ValueError as e:
        raise Refusal(f"{place}: {e}")
    if len(encoded) == 2 and encoded[0] == encoded[1]:  # a template may drop what told their texts apart
        return LeftOut(place, EQUAL)
    if not all(True in is_learned for _, is_learned in encoded):
        return LeftOut(place, NO_RESPONSE)
    if max(len(ids) for ids, _ in encoded) - 1 > T:
        return LeftOut(place, f"that are longer than {T} tokens")
    return encoded


def check_template(template, tokenizer):
    """Raises Refusal where the tokenizer lacks a character of the template."""
    try:
        tokenizer.encode(template.replace("{prompt}", ""))
    except ValueError as e:
        raise Refusal(f"the template {template!r:.120}: {e}; --template=... is another")


def side_names(cfg):
    """Returns the names of both sides in messages: the rows to learn from, and those held out."""
    return f"{cfg.dataset}, to learn from", f"{cfg.val_dataset or cfg.dataset}, held out"


def side_line(name, n, left_out, T, need="has a response and fits in"):
    """Returns a line about the n rows of a side; left_out: a LeftOut for each that is. Raises Refusal where there is
    no row, or where all are left out, as none of them does what `need` says.
    """
    if not n:
        raise Refusal(f"{name}: there is no row in it")
    places = {}  # the reason: where
    for place, reason in left_out:
        places.setdefault(reason, []).append(place)
    reasons = "; left out: " if left_out else ""
    reasons += ", ".join(
        f"{len(where):,} {reason} ({first_places(where)})" for reason, where in places.items()
    )
    if len(left_out) == n:
        raise Refusal(f"{name}: none of its {n} rows {need} {T} tokens{reasons}")
    return f"{name}: {n - len(left_out):,} rows{reasons}"


def first_places(places):
    """Returns the first three places, in words."""
    more = ", ..." if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


# -----------------------------------------------------------------------------------------------------
# Packs: the examples that share a row of the context


def pack(lengths, T):
    """Returns lists of indices whose lengths add up to at most T. The longest ones are placed first, each into
    the list where it leaves the least room.
    """
    packs = []
    room = []  # sorted (tokens left, pack)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[i], 0))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = T, len(packs)
            packs.append([])
        packs[number].append(i)
        insort(room, (left - lengths[i], number))
    return packs


def packed_batch(packs, examples, T):
    """Returns {"idx", "targets", "doc"} (rows, T) int64: a row holds the examples that a pack names,
    each its own document.
    """
    batch = {
        "idx": torch.full((len(packs), T), 0),
        "targets": torch.full((len(packs), T), -100),
        "doc": torch.full((len(packs), T), -1),
    }
    for row, numbers in enumerate(packs):
        end = 0
        for doc, number in enumerate(numbers):
            idx, targets = examples[number]
            start, end = end, end + len(idx)
            batch["idx"][row, start:end] = torch.from_numpy(idx)
            batch["targets"][row, start:end] = torch.from_numpy(targets)
            batch["doc"][row, start:end] = doc
    return batch


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_packs(packs, seed, first, n):
    """Returns packs first .. first+n of the endless stream: all of them in random order, then in another."""
    numbers = []
    for row in range(first, first + n):
        epoch, place = divmod(row, len(packs))
        numbers.append(epoch_order(len(packs), seed, epoch)[place])
    return [packs[number] for number in numbers]
