"""What a row says: its messages, whatever its kind, as a conversation; of a preference two.

A row is an object with prompt and response; with instruction, output and perhaps input (Alpaca); with
messages, each with a role (system, user, assistant) and content; with conversations, whose messages say
from (human, gpt) and value (ShareGPT); or with prompt and completion, both texts or both lists of
messages (TRL). A preference is such a row with chosen and rejected. Content may be a list of parts of type
text. Text is taken as it stands.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import readers
from chat import turns_of
from config import Refusal
from data import AS_IT_STANDS, STRIPPED, by_text_rule


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
    next_roles = [message.role for messages in sides for message in messages[n_common : n_common + 1]]
    if next_roles != ["assistant", "assistant"]:
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
