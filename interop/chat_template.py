"""Chat templates: the text of a conversation as the model's author meant it, by Jinja in its sandbox.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)

The template comes with a model, from anybody: it may not reach Python, and neither its loops nor what they
add up go on without end. What it gets, and Jinja's settings, are those of transformers' apply_chat_template.
"""

import json
import re
import sys
from contextlib import contextmanager
from datetime import datetime

from data import STRIPPED

LINES = 1_000_000  # of Jinja's Python that a template may run; one of ten messages runs some hundreds
LENGTH = 10_000_000  # characters of any of its values


class ChatTemplate:
    """A template of a folder of Hugging Face's. source: Jinja's text; tokens: what bos_token, eos_token ... are.

    ValueError: a source that is not Jinja's, or no jinja2.
    """

    def __init__(self, source, tokens, lines=LINES):
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ValueError("a chat template needs a library: pip install jinja2") from None
        self.source = source
        self.tokens = tokens
        self.lines = lines
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation_tag()]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        with template_errors(jinja2.TemplateError):
            self.template = environment.from_string(source)
        self.error = jinja2.TemplateError

    def render(self, messages, add_generation_prompt=False):
        """Returns the text of a conversation, with the start of an answer if add_generation_prompt.

        messages: dicts with role and content. ValueError: what the template refuses, or fails at.
        """
        with template_errors(self.error), limited(self.lines):
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )


def generation_tag():
    """Returns the extension for {% generation %}, which some templates put around answers; it changes no text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


# jinja_template's text; <words> stand for what depends on the template and the tokenizer
JINJA = (
    "{{ <start> }}"
    "{% set turn = namespace(prompt='', n=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ <turn> }}"
    "{% if message['content'] %}{{ message['content'] ~ <end> }}{% endif %}"
    "{% set turn.prompt = '' %}{% set turn.n = 0 %}"
    "{% else %}"
    "{% set text = <text> %}"
    "{% if text %}"
    r"{% set turn.prompt = turn.prompt ~ ('\n' if turn.prompt else '') ~ text %}"
    "{% endif %}"
    "{% set turn.n = turn.n + 1 %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if turn.n or add_generation_prompt %}{{ <turn> }}{% endif %}"
)


def jinja_template(template, start, end, is_stripped=False):
    """Returns the Jinja text of a template with {prompt} in it, for programs that know no other kind: it
    renders the text that chat.conversation_ids takes in parts.

    start: the text of the token that a conversation starts with, or ""; end: of the one after an answer;
    is_stripped: whether prompts lose the space around them first, as by data.STRIPPED.
    """
    literals = [json.dumps(text, ensure_ascii=False) for text in template.split("{prompt}")]
    words = {
        "<start>": json.dumps(start, ensure_ascii=False),
        "<turn>": " ~ turn.prompt ~ ".join(literals),
        "<end>": json.dumps(end, ensure_ascii=False),
        "<text>": "(message['content'] or '') | trim" if is_stripped else "message['content']",
    }
    return re.sub("|".join(words), lambda match: words[match[0]], JINJA)


def own_jinja(tokenizer, template, text_rule):
    """Returns jinja_template of the template that a model was fine-tuned with here, with its tokenizer's tokens."""
    first_id = tokenizer.first_id
    start = "" if first_id is None else tokenizer.tokens[first_id].decode()
    end = tokenizer.tokens[tokenizer.eot].decode()
    return jinja_template(template, start, end, text_rule == STRIPPED)


def noted_jinja(tokenizer, template, text_rule):
    """Returns own_jinja after a comment that says what it was made of: read_note reads that."""
    note = json.dumps({"template": template, "text_rule": text_rule}).replace("#", r"\u0023")
    return f"{{# tinylm {note} #}}{own_jinja(tokenizer, template, text_rule)}"


def read_note(tokenizer, source):
    """Returns the {"template", "text_rule"} that a chat template was made of by noted_jinja; {} if it was not, or
    has been changed since.
    """
    match = re.match(r"\{# tinylm (\{.*?\}) #\}", source)
    try:
        note = json.loads(match[1]) if match else {}
        is_unchanged = note and noted_jinja(tokenizer, **note) == source
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return note if is_unchanged and "{prompt}" in note["template"] else {}


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise ValueError(message)


@contextmanager
def template_errors(TemplateError):
    """Turns what a template raises into a ValueError of one line."""
    try:
        yield
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"the model's chat template: {reason:.200}") from None
    except (RecursionError, MemoryError, LookupError) as e:
        raise ValueError(f"the model's chat template fails ({type(e).__name__})") from None


@contextmanager
def limited(lines):
    """Raises ValueError once the template's own code has run so many lines, or holds a text that is too
    long: Jinja's sandbox bounds a range, not loops in loops.
    """
    left = lines

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise ValueError(f"it does not end within {lines:,} steps")
            for value in frame.f_locals.values():
                for text in getattr(value, "_Namespace__attrs", {"": value}).values():
                    if isinstance(text, (str, list)) and len(text) > LENGTH:
                        raise ValueError(f"it makes a text of more than {LENGTH:,} characters")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
