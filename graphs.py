"""Work of fixed shapes that a GPU repeats without the processor: captured once as a CUDA graph, then replayed.

    work = Graph(function, device)                # a function without arguments or result, on tensors that stay
    work()                                        # does what the function does: first by calls, then by replays

In a small model the processor takes longer to launch a step's kernels one by one than the GPU to run them;
a graph is one launch. It runs the same kernels on the same memory each time. So whatever differs between
steps must be in tensors that are written in place, and nothing on the way may wait for the device.

Where there is no GPU a replay is a call, so that the tests run everything here but the capture. Where a
capture fails, calls go on as plain ones, and one line says so.
"""

import functools
import itertools
import sys
import weakref
from contextlib import contextmanager, suppress

import torch

from model import Attention
from products import joined

WARM_UP = 3  # plain calls before the capture: in their first ones libraries load and take memory
CHUNK = 8  # steps that are given to the GPU together, and read together
FEWEST = 4 * CHUNK  # steps: of fewer a capture, as long as some plain steps, is hardly earned back


@functools.cache
def say(line):
    """Prints a line to stderr, each only once."""
    print(line, file=sys.stderr)


@functools.cache
def side_stream(device):
    """Returns the stream that all graphs are captured on: cuBLAS would take workspaces for each other one."""
    return torch.cuda.Stream(device)


captured = weakref.WeakSet()  # torch's graphs


def memory_pool():
    """Returns the memory pool that all graphs share. They may, as no two run at once, and what a graph keeps there
    between its replays counts as used, so that no other graph gets it. A pool ends with its last graph.
    """
    return next((graph.pool() for graph in captured), None) or torch.cuda.graph_pool_handle()


class Graph:
    """A function that works on tensors which stay where they are, captured at its fourth call."""

    def __init__(self, function, device):
        self.function = function
        self.device = device
        self.n_calls = 0
        self.graph = None
        self.is_plain = device.type != "cuda"
        if not self.is_plain:
            # only a side stream can be captured; its device must have a number, which "cuda" may lack
            self.stream = side_stream(torch.cuda.current_stream(device).device)

    def __call__(self):
        if self.graph is not None:
            self.graph.replay()
        elif self.is_plain:
            self.function()
        elif self.n_calls < WARM_UP:
            self.n_calls += 1
            with self.beside():
                self.function()
        else:
            self.capture()
            self()

    @contextmanager
    def beside(self):
        """The context in which work goes to the stream that will be captured, and what comes after waits for it."""
        if self.device.type != "cuda":
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), without_cast_cache():
            yield
        current.wait_stream(self.stream)

    def capture(self):
        """Records what the function launches, without running it. Where that fails, calls stay plain ones."""
        graph = torch.cuda.CUDAGraph()
        pool = memory_pool()
        current = torch.cuda.current_stream(self.device)
        try:
            with without_cast_cache(), torch.cuda.graph(graph, pool, self.stream):
                self.function()
            captured.add(graph)
            self.graph = graph
        except RuntimeError as e:
            self.is_plain = True
            self.failed = graph  # kept, as the allocator may hold a pointer to it
            self.clean_up(current, pool)
            # the function's own error: torch raises another one, as it cannot end the capture
            reason = str(e.__context__ or e).partition("\n")[0]
            say(f"steps are launched one by one, as they cannot be captured as a CUDA graph: {reason}")

    def clean_up(self, current, pool):
        """Undoes what torch leaves behind where a capture cannot be ended: the capture's stream as the current one,
        an allocator that still records, and in some releases a generator that draws nothing until another capture
        has ended, and an allocator of pinned memory that refuses further captures to this pool: later ones get
        another.
        """
        captured.clear()
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # it has stopped recording
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            torch.zeros(1, device=self.device)
        torch.cuda.set_stream(current)


class without_cast_cache:
    """The context in which autocast does not keep the weights that it casts: a graph would read the casts after
    they are freed, and not see that the weights have changed.
    """

    def __enter__(self):
        self.was_enabled = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_):
        torch.set_autocast_cache_enabled(self.was_enabled)


# -----------------------------------------------------------------------------------------------------
# Decoding


def is_worth_a_capture(model, n_steps):
    """Returns whether a GPU makes so many steps of a model sooner by a graph; never so on a processor."""
    return model.device.type == "cuda" and n_steps >= FEWEST


def decoding_message(device, n_tokens, has_draft=False, is_compiled=False):
    """Returns what to say about graphs where texts of so many tokens are written: "" on a processor, which has none."""
    if device.type != "cuda":
        return ""
    reason = ""
    if has_draft:
        reason = "a draft guesses"
    elif not is_compiled and n_tokens - 1 < FEWEST:  # the first token is drawn by reading the prompt
        reason = f"at most {FEWEST} tokens"
    return outcome(reason, "token")


def outcome(reason, unit):
    """Returns the words that there is a CUDA graph for each unit, or the reason why there is none."""
    return f", no CUDA graph ({reason})" if reason else f", a CUDA graph a {unit}"


def joint_projections(model):
    """Returns {layer: what products.joined gives of its q, k and v} of a model's Attentions."""
    return {x.layer: joined(x.projections) for x in model.modules() if isinstance(x, Attention)}


class Decoder:
    """Steps of one token for all rows of a batch, after their prompts.

    model, cache: a Transformer and its StaticCache; ids (B,): the last tokens. draw(logits, uniform) returns
    (ids (B,), their log p (B,) or None), and may keep the tokens it has seen in a tensor; its settings are part of
    the graph. uniform() returns the random numbers of one step, drawn when the step is launched. n_steps: at most
    so many steps are made. is_compiled: steps go through torch.compile before they are captured, all but the first.

    The GPU is given CHUNK steps, and the next CHUNK before those are read, so that it never waits for the reader.
    Where a text ends early, up to two chunks were computed for nothing.
    """

    def __init__(self, model, cache, ids, draw, uniform, n_steps, is_compiled=False):
        device = ids.device
        self.model = model
        self.cache = cache
        self.draw = draw
        self.uniform = uniform
        self.n_steps = n_steps
        self.n_launched = 0
        self.ids = ids.clone()
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the step
        if device.type == "cuda":  # where a token's products are so small that fewer of them are faster
            cache.joint = joint_projections(model)
        first = uniform()
        self.uniforms = first.new_empty(n_steps, *first.shape)
        self.uniforms[0] = first
        self.new_ids = torch.zeros(n_steps, len(ids), dtype=torch.long, device=device)
        self.logps = torch.zeros(n_steps, len(ids), device=device)
        steps = itertools.repeat(Decoder.step)
        if is_compiled:
            # matrices of integers choose a kernel at their first product, which no compiler can follow
            steps = itertools.chain(
                [Decoder.step], itertools.repeat(torch.compile(Decoder.step, dynamic=False))
            )
        # weak, as a cycle would keep keys, values and graph on the device until the garbage collector runs
        decoder = weakref.ref(self)
        self.graph = Graph(lambda: next(steps)(decoder()), device)

    def step(self):
        """Reads a token of each row and draws the next ones."""
        logits = self.model.next_logits(self.ids[:, None], self.cache)  # (B, V)
        ids, logps = self.draw(logits, self.uniforms.index_select(0, self.number)[0])
        self.ids.copy_(ids)
        self.new_ids.index_copy_(0, self.number, ids[None])
        if logps is not None:
            self.logps.index_copy_(0, self.number, logps[None])
        self.number.add_(1)

    def launch(self):
        """Gives the device the next chunk of n steps. Returns their ids and log p, (n, B) each, which are copied to the
        host meanwhile, and an event that says when they are there; None where no step is left.
        """
        start = self.n_launched
        end = min(start + CHUNK, self.n_steps)
        if start == end:
            return None
        for number in range(start, end):
            if number > 0:
                self.uniforms[number] = self.uniform()
            self.graph()
        self.n_launched = end
        device = self.ids.device
        chunk = [x[start:end].to("cpu", non_blocking=True) for x in (self.new_ids, self.logps)]
        event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return *chunk, event

    def __iter__(self):
        """Yields the ids of each step and their log p, two lists."""
        chunk = self.launch()
        while chunk is not None:
            following = self.launch()
            ids, logps, event = chunk
            if event is not None:
                event.synchronize()
            yield from zip(ids.tolist(), logps.tolist())
            chunk = following


# -----------------------------------------------------------------------------------------------------
# Training


def whats_not_captured(cfg, compute):
    """Returns what keeps the training steps of a config from being captured on a GPU; "" where nothing does."""
    if compute.world_size > 1:
        return "several processes"
    if compute.dtype == torch.float16:
        return "float16's loss scaler"
    if cfg.gradient_checkpointing:
        return "gradient_checkpointing"
    if cfg.dropout and cfg.gradient_accumulation_steps > 1:
        return "dropout, drawn anew for each micro-batch"
    return ""


def captures_steps(cfg, compute):
    """Returns whether the steps of a config, on batches of one shape, are captured."""
    return compute.device.type == "cuda" and not whats_not_captured(cfg, compute)


def graph_message(cfg, compute, is_static=True):
    """Returns what a training run says about graphs: "" on a processor, which has none. is_static: the task's."""
    if compute.device.type != "cuda":
        return ""
    reason = whats_not_captured(cfg, compute) if is_static else "rows of different lengths"
    return outcome(reason, "step")


class TrainingStep:
    """Steps of training on batches of one shape: a whole step, from the loss to the update, is one graph.

    step(batches, seed) is train.train_step of a model and its optimizers. A graph draws anew from the generator's
    seed, so seed_dropout(seed, 0) is called before each step, and step gets the seed None, with which it seeds
    nothing. What differs from step to step is copied into tensors that stay: the micro-batches, and on a GPU
    the rate of each group. Batches of other shapes than the first ones go through a plain step.
    """

    def __init__(self, step, optimizers, seed_dropout, device):
        self.step = step
        self.optimizers = optimizers
        self.seed_dropout = seed_dropout
        self.device = device
        self.batches = None
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        # tensors, as torch's fused AdamW reads them on a GPU; on a processor plain numbers cost nothing
        self.rates = [torch.zeros((), device=device) for _ in self.groups if device.type == "cuda"]
        self.graph = Graph(self.work, device)

    def __call__(self, batches, seed):
        """Returns (loss, gradient norm), as train_step does."""
        if self.batches is None:
            self.batches = [{key: x.clone() for key, x in batch.items()} for batch in batches]
            if "torch._dynamo" in sys.modules:
                # after evaluations of several sizes torch.compile would take these sizes for variables
                for batch in self.batches:
                    for x in batch.values():
                        torch._dynamo.mark_static(x)
        if shapes(batches) != shapes(self.batches):
            return self.step(batches=batches, seed=seed)
        for held, batch in zip(self.batches, batches):
            for key, x in batch.items():
                held[key].copy_(x, non_blocking=True)
        for rate, group in zip(self.rates, self.groups):
            rate.fill_(group["lr"])
        self.seed_dropout(seed, 0)
        self.graph()
        return self.loss.clone(), self.norm.clone()

    def work(self):
        """Makes the step of the batches that are held."""
        # else a capture that failed would leave gradients that were never computed
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        numbers = [group["lr"] for group in self.groups]
        for rate, group in zip(self.rates, self.groups):
            group["lr"] = rate
        try:
            loss, norm = self.step(batches=self.batches, seed=None)
        finally:
            for number, group in zip(numbers, self.groups):
                group["lr"] = number
        self.loss.copy_(loss)
        self.norm.copy_(norm)


def shapes(batches):
    """Returns the shapes of the tensors of each batch, by their names."""
    return [{key: x.shape for key, x in batch.items()} for batch in batches]
