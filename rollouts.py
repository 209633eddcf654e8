"""Rollouts: the prompts of rows, the answers that a model draws to them, and the rewards of these. finetune_ppo.py
learns from them.

A prompt is (a text or messages, its ids). A reward is a function of (prompt, answer), two texts; the prompt of a
conversation is its messages, [{"role", "content"}].
"""

import os
import re
from contextlib import nullcontext

import numpy as np
import torch

import lora
import toy_stories
from chat import conversation_ids
from config import Refusal
from generate import generate
from messages import NO_RESPONSE, chat_messages, kind_of
from reward_model import load_reward
from rows import LeftOut


def find_reward(name, device="cpu", load=False):
    """Returns the reward function of a name. Without load it returns None for a folder of finetune_reward.py, which
    takes long to load. Raises ValueError or Refusal.
    """
    kind, _, argument = name.partition(":")
    if os.path.isdir(name):
        return load_reward(name, device) if load else None
    if name == "toy":
        return lambda prompt, answer: float(toy_stories.is_preferred(prompt + answer))
    if kind == "length" and argument.isdigit() and int(argument):
        length = int(argument)
        return lambda prompt, answer: -abs(len(answer) - length) / length
    if kind == "match" and argument:
        try:
            pattern = re.compile(argument)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"reward: {argument!r:.80} is no regular expression: {e}")
        return lambda prompt, answer: float(pattern.search(answer) is not None)
    raise ValueError(
        f"reward must be toy, length:CHARACTERS, match:REGEX or the folder of a reward model, not {name!r}"
    )


# -----------------------------------------------------------------------------------------------------
# Prompts of rows, whose answers are not looked at


def prompt_row(row):
    """Returns a row as one that messages.conversations reads, without need of an answer: one of texts gets an empty
    answer, one whose prompt is messages becomes a conversation. It has the template that its kind has in
    finetune_lora.py, or where that reads no such rows in finetune_dpo.py.
    """
    if not isinstance(row, dict):
        return row
    kind = kind_of(row)
    column, *answers = kind.columns
    prompt = row.get("prompt")
    if {*answers} <= row.keys() and isinstance(row.get(column), kind.type):  # finetune_lora.py reads it
        if kind.type is str:
            return row | {answers[-1]: ""}
        return {"messages": prompt} if answers else row
    if isinstance(row.get("chosen"), list):  # a conversation; its prompt may have a column of its own
        return {"messages": prompt if isinstance(prompt, list) else row["chosen"]}
    if isinstance(prompt, str) or row.keys() == {"prompt"} and not isinstance(prompt, list):
        return {"prompt": prompt, "response": ""}
    if "instruction" in row:
        return row | {"output": ""}
    return {"messages": prompt} if isinstance(prompt, list) else row


def prompt_messages(conversation):
    """Returns the messages before the last answer of a Conversation, as chat.py has them, without empty ones. An empty
    one of the system stays, as a model's own template may write it otherwise than none.
    """
    messages = [message for message in conversation.messages if message.text or message.role == "system"]
    if messages and messages[-1].role == "assistant":
        messages.pop()
    return chat_messages(messages)


def encode_prompt(conversation, tokenizer, template, T):
    """Returns the prompt of a Conversation; or a LeftOut where it leaves no room for an answer in T tokens. Raises
    Refusal.
    """
    place, problem = conversation.place, conversation.problem
    messages = prompt_messages(conversation)
    if problem in ("", NO_RESPONSE):
        problem = "" if any(message["content"] for message in messages) else "without a prompt"
    if problem:
        return LeftOut(place, problem)
    try:
        ids = conversation_ids(tokenizer, messages, template)
    except ValueError as e:
        raise Refusal(f"{place}: {e}")
    if len(ids) >= T:
        return LeftOut(place, f"that leave no room in {T} tokens")
    is_text = [message["role"] for message in messages] == ["user"]
    return messages[0]["content"] if is_text else messages, ids


# -----------------------------------------------------------------------------------------------------
# Answers


def draw(model, tokenizer, prompts, max_new_tokens, seed, compute):
    """Returns a generate.Row for each of prompts: an answer, drawn from all that the model finds likely."""
    ids = [list(ids) for _, ids in prompts]
    # a processor writes text in float32, as in sample.py
    is_cpu = compute.device.type == "cpu"
    with lora.folded_in(model), nullcontext() if is_cpu else compute.autocast():
        *_, answers = generate(
            model,
            ids,
            max_new_tokens,
            temperature=1.0,
            top_k=0,
            stop=tokenizer.ends,
            seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
            logps=True,
        )
    return answers


def answer_batch(prompts, answers):
    """Returns two things: a batch of prompts with their answers, "idx" and "targets" (rows, T), the latter -100 where
    nothing was drawn, and "is_whole" (rows,), whether an answer has come to its end; and log p of each target at the
    draw, (rows, T) float32, 0 where there is none.
    """
    texts = [
        [*ids, *answer.ids, *[answer.stop] * answer.is_whole]
        for (_, ids), answer in zip(prompts, answers)
    ]
    shape = len(texts), max(map(len, texts)) - 1
    idx = torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, -100)
    logps = torch.zeros(shape)
    for row, (text, (_, ids), answer) in enumerate(zip(texts, prompts, answers)):
        first, end = len(ids) - 1, len(text) - 1
        idx[row, :end] = torch.tensor(text[:-1])
        targets[row, first:end] = torch.tensor(text[first + 1 :])
        logps[row, first:end] = torch.tensor(answer.logps)
    is_whole = torch.tensor([answer.is_whole for answer in answers])
    return {"idx": idx, "targets": targets, "is_whole": is_whole}, logps
