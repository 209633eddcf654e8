"""From logits to text: the draw of a token, and many of them, for many prompts together.

    *_, rows = generate(model, prompts, 100)      # prompts are lists of ids; row.ids are the new ones

Nothing here reads a file or prints: sample.py is the command line, and speculate.py the same text in fewer
calls of the model.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cache import StaticCache
from graphs import Decoder, is_worth_a_capture

GREEDY = 1e-5  # temperatures below take the likeliest token: divided by less, logits overflow

# -----------------------------------------------------------------------------------------------------
# One token


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Returns (probabilities (B, n), ids (B, n)): what may be drawn from logits (B, V) under these rules, and how
    likely each of it is. ids is None where it is all ids in order. next_token and speculate.Draws both draw from
    this. top_p keeps the token that crosses it (Holtzman et al. 2019).
    """
    ids = None
    if 0 < top_k < logits.size(-1):
        # sorted by id: in order of size, rounding could change which id a place stands for
        ids = logits.topk(top_k, sorted=False).indices.sort(-1).values
        logits = logits.gather(-1, ids)
    logits = logits.float() / temperature
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        is_dropped = p.cumsum(-1) - p >= top_p  # the likelier tokens alone make up top_p
        logits = logits.masked_fill(is_dropped.scatter(-1, order, is_dropped), -torch.inf)
    return logits.softmax(-1), ids


def likeliest(logits):
    """Returns logits.argmax(-1), on a processor by NumPy, which takes 3 us for 49,152 numbers and torch 28."""
    is_plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    if not is_plain or torch.compiler.is_compiling():
        return logits.argmax(-1)
    return torch.as_tensor(logits.detach().numpy().argmax(-1))  # of one row a number


def next_token(logits, temperature=1.0, top_k=0, top_p=1.0, uniform=None):
    """Returns a token a row (B,), drawn from logits (B, V) by the numbers `uniform` (B, 1) from [0, 1); greedy text
    needs none. A rule that changes probabilities belongs in distribution, which --draft draws from too.
    """
    if temperature < GREEDY:
        return likeliest(logits)
    p, ids = distribution(logits, temperature, top_k, top_p)
    edges = p.cumsum(-1, dtype=uniform.dtype)
    place = torch.searchsorted(edges, uniform * edges[:, -1:], right=True)
    place = place.clamp(max=p.size(-1) - 1)  # where p is nan, the place is past the end
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def penalized(logits, seen, penalty):
    """Returns logits (..., V) in which seen tokens are less likely: theirs are divided by the penalty where they are
    positive, else multiplied. seen (..., V): bool.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(prompts, model, penalty):
    """Returns which tokens occur in each prompt (B, V), bool; None where there is no penalty to need it."""
    if penalty == 1:
        return None
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


# -----------------------------------------------------------------------------------------------------
# Many


class Limits(NamedTuple):
    """What ends a row."""

    max_new_tokens: int
    block_size: float  # inf where a text slides
    stop: tuple  # ids
    is_recomputed: bool  # past block_size the last half of the window is read again

    @property
    def half(self):
        return max(1, self.block_size // 2)


@dataclass
class Row:
    """What happens to one prompt in generate()."""

    window: list  # ids that the model sees: the prompt's and new ones
    ids: list = field(default_factory=list)  # new ids so far
    new: int | None = None  # the id of this step; None where the row has ended
    end: str = ""  # why it has ended: stop | length | block_size; "" while it goes on
    stop: int | None = None  # the token of stop that ended it
    # log p of each of ids, and of stop, where they were asked for
    logps: list = field(default_factory=list)

    @property
    def is_whole(self):
        return self.stop is not None

    def take(self, id, limits):
        """Takes the next id of a row that has no end yet. Returns whether the window is another one now, which
        the model must read anew.
        """
        if id in limits.stop:
            self.end = "stop"
            self.stop = id
            self.window = [id]
            return False
        self.new = id
        self.window.append(id)
        self.ids.append(id)
        is_full = len(self.window) > limits.block_size
        if is_full and not limits.is_recomputed:
            self.end = "block_size"
        elif is_full:
            self.window = self.window[-limits.half :]
        if not self.end and len(self.ids) == limits.max_new_tokens:
            self.end = "length"
        return is_full and limits.is_recomputed


def start_rows(model, prompts, max_new_tokens, stop, past_end):
    """Returns (a Row a prompt, the Limits). Raises ValueError as generate does."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    block_size = model.config.block_size
    if past_end == "slide":
        block_size = math.inf
        if model.config.what_ends_a_text:
            raise ValueError(f"no text slides past block_size: {model.config.what_ends_a_text}")
    limits = Limits(max_new_tokens, block_size, stop, past_end == "recompute")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError("a prompt must have at least one token")
        if len(prompt) > block_size and past_end == "stop":
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise ValueError(
                f"{name} has {len(prompt)} tokens and the context {block_size}: shorten it, or keep only its "
                f"end with --past_end=recompute"
            )
        rows.append(Row(list(prompt) if len(prompt) <= block_size else list(prompt[-limits.half :])))
    return rows, limits


def prefill(model, windows, capacity, spare=0):
    """Reads one window of ids a row: returns the last tokens' logits (B, V) and a cache with room for
    `capacity` tokens more, but for none past block_size, and for `spare` beyond either.
    """
    # a number for each different window: one that several rows share, as answers to one prompt do, is read once
    numbers = {}
    for window in windows:
        numbers.setdefault(tuple(window), len(numbers))
    lengths = [len(window) for window in numbers]
    capacity += max(lengths)
    if model.config.what_ends_a_text:
        capacity = min(capacity, model.config.block_size + max(lengths) - min(lengths))
    capacity += spare
    if model.device.type == "cuda":  # where SDPA would copy a mask of another width in each layer
        capacity += -capacity % 8
    cache = model.new_cache(len(numbers), capacity)
    logits = cache.read(model, list(numbers))
    if len(numbers) < len(windows):
        rows = [numbers[tuple(window)] for window in windows]
        cache.keep(rows)
        logits = logits[rows]
    return logits, cache


def documents_of(rows, T, device):
    """Returns the documents (B, T) of T new tokens a row, None where no row has ended: one that has goes
    on as padding.
    """
    if not any(row.end for row in rows):
        return None
    return torch.tensor([[-1 if row.end else 0] * T for row in rows], device=device)


def most_steps(rows, limits):
    """Returns how many steps there can be until the first window is full and must be read anew. Where no window
    is read anew it is block_size, whatever the prompts' lengths, so that a compiler sees one shape.
    """
    if not limits.is_recomputed:
        return limits.block_size
    return min(limits.block_size + 1 - len(row.window) for row in rows if not row.end)


def going_on(rows):
    """Returns the places of the rows that have not ended. The last ones fill the gaps, so that few rows move."""
    places = list(range(len(rows)))
    for place in reversed(places.copy()):
        if rows[place].end:
            places[place] = places[-1]
            places.pop()
    return places


class Sampler:
    """Draws the next token of each row of a batch, from which rows that have ended are taken off.

    numbers   (B,) which of all prompts the rows of the batch continue
    seen      (B, V) bool, the tokens in each row and its prompt; None without a penalty
    """

    def __init__(self, model, prompts, numbers, seed, repetition_penalty, rules, logps):
        self.device = model.device
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64  # which mps has not
        self.n_prompts = len(prompts)
        self.numbers = torch.tensor(numbers, device=self.device)
        self.penalty = repetition_penalty
        self.seen = seen_tokens([prompts[number] for number in numbers], model, repetition_penalty)
        self.rules = rules  # temperature, top_k and top_p
        self.logps = logps

    def uniform(self):
        """Returns the random numbers (B, 1) of a step. They are drawn for all prompts, so that no row's depend on
        when the others end.
        """
        shape = self.n_prompts, 1
        drawn = torch.rand(shape, generator=self.rng, dtype=self.exact, device=self.device)
        return drawn[self.numbers]

    def draw(self, logits, uniform):
        """Returns the next ids (B,), which count as seen from now on, and their log p (B,), None if not asked for."""
        likely = logits if self.seen is None else penalized(logits, self.seen, self.penalty)
        ids = next_token(likely, *self.rules, uniform)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if not self.logps:
            return ids, None
        return ids, logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def keep(self, places):
        """Makes row i of the batch what row places[i] was, and forgets all others."""
        self.numbers = self.numbers[places]
        if self.seen is not None:
            self.seen = self.seen[places]


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=0.8,
    top_k=200,
    top_p=1.0,
    repetition_penalty=1.0,
    stop=(),
    seed=1337,
    past_end="stop",
    logps=False,
    graph=None,
    compile=False,
):
    """Continues prompts (lists of ids, of any lengths) together; yields the list of their Rows after
    each step.

    A row ends at one of the ids in `stop`, which its own ids leave out, after max_new_tokens, or when
    block_size tokens are in its context. Then past_end="recompute" reads the last half of the window again
    and goes on; "slide" just goes on, which takes a model whose layers all have windows. All steps yield one
    list, which the next step changes: `*_, rows = generate(...)` has the rows as they ended. logps: keep the
    log p that the model gave each new token, before temperature and the other rules. Raises ValueError for
    a prompt that is empty or too long, and where a text cannot slide.

    graph: whether a graphs.Decoder makes the steps after the prompts, which a GPU replays; None: where that
    pays. The draws are the same, and so is the text, but for rounding. compile: a Decoder makes the steps,
    on any device, and they are compiled first.
    """
    rows, limits = start_rows(model, prompts, max_new_tokens, stop, past_end)
    # the rows that go on, in the order of the cache, which likes to read windows of growing length
    numbers = sorted(range(len(rows)), key=lambda number: len(rows[number].window))
    batch = [rows[number] for number in numbers]
    rules = temperature, top_k, top_p
    sampler = Sampler(model, prompts, numbers, seed, repetition_penalty, rules, logps)
    n_left = max_new_tokens
    was_training = model.training
    model.eval()
    try:
        while batch:
            for ids, id_logps in batch_steps(model, batch, sampler, n_left, limits, graph, compile):
                is_moved = take_step(rows, batch, ids, id_logps if logps else None, limits)
                n_left -= 1
                yield rows
                if is_moved or all(row.end for row in batch):
                    break
            places = going_on(batch)
            batch = [batch[place] for place in places]
            sampler.keep(places)
    finally:
        model.train(was_training)


def batch_steps(model, batch, sampler, n_left, limits, graph, compile):
    """Reads the windows of a batch, a list of Rows, and yields what each step has drawn: a list of ids, and a list of
    their log p or None. The first step is drawn from what the windows gave, each other one takes a call of the model;
    a Decoder makes them where graph, compile or the device ask for one. Rows that have ended are taken off the
    batch between steps, but not off one that a Decoder goes on with.
    """
    # a compiler is spared one shape a text
    room = max(n_left, model.config.block_size) if compile else n_left
    logits, cache = prefill(model, [row.window for row in batch], room)
    ids, logps = sampler.draw(logits, sampler.uniform())
    yield ids.tolist(), None if logps is None else logps.tolist()
    n_steps = min(n_left - 1, most_steps(batch, limits))
    if compile or graph or graph is None and is_worth_a_capture(model, n_steps):
        ids = leave_out_ended(batch, sampler, cache, ids)
        static = StaticCache(cache, model.config)
        yield from Decoder(model, static, ids, sampler.draw, sampler.uniform, n_steps, compile)
        return
    while True:
        ids = leave_out_ended(batch, sampler, cache, ids)
        logits = model.next_logits(ids[:, None], cache)
        ids, logps = sampler.draw(logits, sampler.uniform())
        yield ids.tolist(), None if logps is None else logps.tolist()


def take_step(rows, batch, ids, logps, limits):
    """Gives the ids of a step, and their log p or None, to the rows of the batch that go on. Returns whether the
    window of one of them has moved on, so that the batch must be read anew.
    """
    for row in rows:
        row.new = None
    is_moved = False
    for i, (row, id) in enumerate(zip(batch, ids)):
        if row.end:  # a Decoder goes on with those that have
            continue
        if logps is not None:
            row.logps.append(logps[i])
        is_moved = row.take(id, limits) or is_moved
    return is_moved


def leave_out_ended(batch, sampler, cache, ids):
    """Takes the rows that have ended off a batch, its sampler and its cache. Returns the ids (B,) of the others."""
    places = going_on(batch)
    if len(places) == len(batch):
        return ids
    batch[:] = [batch[place] for place in places]
    sampler.keep(places)
    cache.keep(places)
    return ids[places]
