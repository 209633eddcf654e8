"""Teaches a trained model to answer: supervised fine-tuning of LoRA adapters (lora.py), or with --rank=0 of all its weights.

    python finetune_lora.py --init_from=out/demo                                       the morals of the toy stories, as a demonstration
    python finetune_lora.py --init_from=out/ts --dataset=rows.jsonl --out_dir=out/ts-lora
    python finetune_lora.py --out_dir=out/ts-lora --merge                              the adapter and its base as one checkpoint
    python sample.py --adapter=out/ts-lora --start="Why is the sky blue?"

A row is an object with prompt and response; with instruction, output and perhaps input (Alpaca); or with messages, each with a role
(system, user, assistant) and content. The loop is train.py's fit: --init_from=resume, signals, torchrun and log are as they are there.
Only responses and the end of text after each are learned. Examples share a row of the context, but none sees another.
"""
import functools
import hashlib
import json
import math
import os
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import checkpoint
import folders
import lora
import prepare
import toy_stories
from config import Refusal, hf_name, is_hf, run
from device import check_memory, resolve
from lenses import probes
from log import plot
from model import choose_rmsnorm
from sample import finish, generate, prompt_ids, render
from train import (DATA_KEYS, TrainConfig, evenly, fit, floor_line, in_the_way, inherit, mean_nats, micro_batches,
                   rows_each, to, training_bytes)


@dataclass
class Config(TrainConfig, lora.LoRAConfig):
    init_from: str = "out"                  # the checkpoint to start from, hf:FOLDER_OR_NAME too | resume (from out_dir)
    out_dir: str = "out/lora"               # where adapter.pt, log.jsonl and loss.png go; with --rank=0 ckpt.pt
    dataset: str = "moral"                  # moral (made here) | a .json .jsonl .parquet file | hf:NAME of the Hugging Face hub
    val_dataset: str = ""                   # held-out rows, where they are a file of their own, or a dataset of the hub
    val_fraction: float = 0.1               # of the rows; held out where val_dataset is empty
    template: str = ""                      # text with {prompt} in it, \n a new line; empty: the base's, or one for the kind of rows
    merge: bool = False                     # write out_dir's adapter and its base as one checkpoint, out_dir/ckpt.pt, and stop
    start: str = ""                         # the prompt of the sample at each evaluation; empty: the first held-out one
    eval_interval: int = 50                 # steps between evaluations, samples and checkpoints
    eval_tokens: int = 0                    # of held-out rows looked at meanwhile, always the same ones; 0 = all
    max_length: int = 0                     # tokens a row, of which no example has more; 0 = the base's context
    batch_size: int = 8                     # rows in a micro-batch, each with as many examples as fit
    max_iters: int = 200                    # steps
    optimizer: str = "adamw"                # adamw | muon (with --rank=0 only)
    learning_rate: float = 5e-4             # the highest one; --rank=0 wants a lower one
    weight_decay: float = 0.0               # on matrices; on adapters it pulls towards the base

    def __post_init__(self):
        super().__post_init__()
        self.template = self.template.replace("\\n", "\n")
        if self.template and "{prompt}" not in self.template:
            raise ValueError(f"template must have {{prompt}} in it, where the prompt goes, not {self.template!r}")
        if self.max_length < 0:
            raise ValueError(f"max_length cannot be negative, not {self.max_length}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if self.dataset == "moral" and self.val_dataset:
            raise ValueError("moral has held-out rows of its own: leave val_dataset out")
        if self.optimizer == "muon" and self.rank:
            raise ValueError("muon makes each matrix's update orthogonal, which means something for W and nothing for the halves B and A of "
                             "its change: use --optimizer=adamw, or --rank=0")


# ---------------------------------------------------------------------------------------------------------------------
# Rows: from a file or the hub to [(prompt, response), ...], the turns of one conversation

MORAL_SEED = 0  # other stories than data/toy's: a test looks


def read_rows(dataset, split="train"):
    """(where, row) of all rows, of a dataset on the hub those of a split; None where it has no such split. Raises Refusal."""
    suffix = os.path.splitext(dataset)[1].lower()
    if is_hf(dataset):
        with prepare.hub_splits(hf_name(dataset)) as splits:
            return [(dataset, row) for row in splits[split]] if split in splits else None
    if suffix not in (".json", ".jsonl", ".parquet"):
        raise Refusal(f"dataset must be moral, a .json .jsonl .parquet file or hf:NAME, not {dataset!r}")
    try:
        if suffix == ".json":
            return json_rows(dataset)
        return list(prepare.jsonl_rows(dataset) if suffix == ".jsonl" else prepare.parquet_rows(dataset))
    except OSError as e:
        raise Refusal(f"cannot read {dataset}: {e.strerror}")


def json_rows(path):
    with prepare.opened(path) as f:
        text = f.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Refusal(f"{path} is not JSON ({e})")
    if not isinstance(rows, list):
        raise Refusal(f"{path} is not an array of rows but a {type(rows).__name__}")
    return [(f"{path} row {n}", row) for n, row in enumerate(rows, 1)]


def split(cfg):
    """(rows to learn from, rows held out), each (where, row)."""
    if cfg.dataset == "moral":
        rows = [(f"moral {n}", row) for n, row in enumerate(toy_stories.moral_rows(400, MORAL_SEED))]
        return rows[:200], rows[200:]
    rows = read_rows(cfg.dataset)
    held_out = read_rows(cfg.val_dataset) if cfg.val_dataset else read_rows(cfg.dataset, "validation") if is_hf(cfg.dataset) else None
    if held_out is not None:
        return rows, held_out
    conversations(rows)  # what is wrong is said of the first row that it is wrong with
    if len(rows) < 2:
        raise Refusal(f"{cfg.dataset} needs two rows, as one is held out, and has {len(rows)}; --val_dataset names others to hold out")
    mixed, n = np.random.default_rng(cfg.seed).permutation(len(rows)), max(1, round(cfg.val_fraction * len(rows)))
    return [rows[i] for i in mixed[n:]], [rows[i] for i in mixed[:n]]


def turns_of_pair(row, text):
    return [(text(row, "prompt"), text(row, "response"))]


def turns_of_alpaca(row, text):
    return [("\n".join(filter(None, (text(row, key) for key in ("instruction", "input") if key in row))), text(row, "output"))]


def turns_of_chat(row, text):
    """What stands before an answer is its prompt; what stands after the last one is left out."""
    messages, before, turns = row["messages"], [], []
    for m in messages if isinstance(messages, list) else [messages]:
        role = text(m, "role")
        if role == "assistant":
            turns.append(("\n".join(before), text(m, "content")))
            before = []
        elif role in ("system", "user"):
            before.append(text(m, "content"))
        else:
            raise ValueError(f"a role is {role!r:.40}; system, user and assistant are known")
    return turns


# the columns that tell, the turns of a row, the template where neither the user nor the base has one
KINDS = [(("prompt", "response"), turns_of_pair, "{prompt}\n"),
         (("instruction", "output"), turns_of_alpaca, "### Instruction:\n{prompt}\n\n### Response:\n"),
         (("messages",), turns_of_chat, "User:\n{prompt}\n\nAssistant:\n")]


def conversations(rows):
    """([turns of each row], the default template of the first row's kind). Raises Refusal."""
    found, template = [], ""
    for where, row in rows:
        def text(some, key):
            return prepare.field(some, key, where, "rows have prompt and response, instruction and output, or messages; here is").strip()
        columns = row.keys() if isinstance(row, dict) else ()
        _, turns_of, default = next((kind for kind in KINDS if all(key in columns for key in kind[0])), KINDS[0])
        try:
            found.append(turns_of(row, text))
        except ValueError as e:
            raise Refusal(f"{where}: {e}")
        template = template or default
    return found, template


# ---------------------------------------------------------------------------------------------------------------------
# Examples: a conversation as (idx, targets), targets one token ahead and -100 where nothing is learned

def encode(turns, tokenizer, template):
    """(idx, targets), or None where no response has text. Prompt and response are encoded apart: their boundary is one between
    tokens, and a prompt's ids are those that sample.py makes of it."""
    ids, learned = [], []
    for prompt, response in turns:
        text = render(template, prompt)
        prompt = tokenizer.encode_more(text) if ids else prompt_ids(tokenizer, text)
        response = tokenizer.encode_more(response) + [tokenizer.eot] if response else []
        ids += prompt + response
        learned += [False] * len(prompt) + [True] * len(response)
    ids = np.array(ids, np.int64)
    return (ids[:-1], np.where(learned, ids, -100)[1:]) if any(learned) else None


def examples(rows, tokenizer, template, T, name):
    """The rows that fit in T tokens and have a response, encoded; and a line about the others. Raises Refusal where none is left."""
    try:
        tokenizer.encode(template.replace("{prompt}", ""))
    except ValueError as e:
        raise Refusal(f"the template {template!r:.120}: {e}; --template=... is another")
    try:
        every = [encode(turns, tokenizer, template) for turns in rows]
    except ValueError as e:  # a character that a character model lacks
        raise Refusal(f"{name}: {e}")
    some = [example for example in every if example]
    kept = [example for example in some if len(example[0]) <= T]
    if not kept:
        raise Refusal(f"{name}: none of its {len(every)} rows has a response and fits in {T} tokens")
    said = f"{name}: {len(kept):,} rows"
    if len(every) > len(kept):
        said += f"; left out: {len(some) - len(kept):,} that are longer than {T} tokens, {len(every) - len(some):,} without a response"
    return kept, said


def pack(lengths, T):
    """Lists of indices whose lengths add up to at most T: the longest first, each where it leaves the least room."""
    packs, room = [], []  # room: sorted (tokens left, which)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], 0))
        left, which = room.pop(at) if at < len(room) else (T, len(packs))
        if which == len(packs):
            packs.append([])
        packs[which].append(i)
        insort(room, (left - lengths[i], which))
    return packs


def batch_of(packs, data, T):
    """{"idx", "targets", "doc"} (rows, T) int64: a row holds the examples of data that a pack names, each its own document."""
    batch = {key: torch.full((len(packs), T), fill) for key, fill in (("idx", 0), ("targets", -100), ("doc", -1))}
    for row, pack in enumerate(packs):
        end = 0
        for doc, i in enumerate(pack):
            start, end = end, end + len(data[i][0])
            for key, ids in zip(("idx", "targets", "doc"), (*data[i], np.full(end - start, doc))):
                batch[key][row, start:end] = torch.from_numpy(ids)
    return batch


@functools.lru_cache(maxsize=2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_packs(packs, seed, first, n):
    """Packs first .. first+n of the endless stream: all of them in random order, then in another."""
    return [packs[order(len(packs), seed, r // len(packs))[r % len(packs)]] for r in range(first, first + n)]


# ---------------------------------------------------------------------------------------------------------------------
# The built-in task: 200 stories with the moral as the answer, and 200 others held out

def moral_lines(model, tokenizer, rows, template, compute):
    """What a model knows of the held-out morals, by two accuracies, and how well it still tells stories: two lines."""
    longest, asked, cases, unsaid = 1 + max(len(tokenizer.encode_more(a)) for a in toy_stories.ANSWERS), [], [], []
    for _, row in rows:
        context, right = render(template, row["prompt"]), row["response"]
        prompt = prompt_ids(tokenizer, context)
        if len(prompt) + longest - 1 <= model.config.block_size:
            asked.append(prompt)
            cases.append(probes.Case(context, [right, *(a for a in toy_stories.ANSWERS if a != right)]))
            unsaid.append(right.removeprefix("So ")[:-1] not in row["prompt"])
    if not asked:
        return f"block_size={model.config.block_size} is too short for a story and its moral"
    ranked = probes.ask(probes.Probe("moral", "", cases), lambda pairs: probes.completion_nats(model, tokenizer, pairs, compute))
    unsaid = np.array(unsaid)
    told, _ = finish(generate(model, asked, longest, temperature=0, stop=tokenizer.eot))
    exact = np.array([tokenizer.decode_more(answer) == case.candidates[0] for answer, case in zip(told, cases)])
    stories = np.array([id for text, _ in toy_stories.stories(500, seed=1) for id in (*tokenizer.encode(text), tokenizer.eot)])
    return (f"moral of {len(asked)} held-out stories: answered word for word {exact.mean():.1%} ({exact[unsaid].sum()} of the {unsaid.sum()} that "
            f"leave it unsaid), the likeliest of the {len(toy_stories.ANSWERS)} {ranked['accuracy']:.1%} (chance {ranked['chance']:.1%})\n"
            + floor_line(model, tokenizer, stories, compute))


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

FIXED = DATA_KEYS | {"val_dataset", "val_fraction", "template", "rank", "alpha", "target", "max_length"}  # what a resumed run cannot change


def merge(cfg):
    """Writes out_dir/ckpt.pt, a checkpoint like any other, and says what the merging changed."""
    path, to_path = checkpoint.find(cfg.out_dir, "adapter_best.pt"), os.path.join(cfg.out_dir, "ckpt.pt")
    adapter = checkpoint.load(path, checkpoint.ADAPTER_KEYS)
    if os.path.exists(to_path) and not cfg.overwrite:
        raise Refusal(f"{to_path} is there already: --overwrite moves it aside")
    base = checkpoint.find(cfg.init_from) if "init_from" in cfg.given else checkpoint.base_of(adapter, path)
    ckpt = checkpoint.load(base)
    model, tokenizer = checkpoint.restore(ckpt, base)
    checkpoint.restore_adapters(adapter, path, ckpt, base, model)
    model.eval()
    idx = torch.randint(model.config.vocab_size, (4, min(256, model.config.block_size)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(idx)[0]
        lora.merge(model)
        difference = (model(idx)[0] - before).abs().max()
    if os.path.exists(to_path):
        folders.move_aside(to_path)
    checkpoint.save(to_path, model, tokenizer, adapter["config"], adapter["step"], adapter["val_loss"], adapter["best_val_loss"])
    print(f"{to_path}: {base} with {path} merged; largest logit {before.abs().max():.3g}, largest difference to unmerged {difference:.1e}")


def main(cfg):
    if cfg.merge:
        return merge(cfg)
    resume, path, run_so_far, adapter = cfg.init_from == "resume", None, None, None
    if resume:
        lasts = "adapter.pt", "ckpt.pt"  # the latter by --rank=0; beside the former, by --merge
        path = checkpoint.find(cfg.out_dir, next((last for last in lasts if os.path.exists(os.path.join(cfg.out_dir, last))), lasts[0]))
        run_so_far = checkpoint.load(path, checkpoint.KEYS if path.endswith("ckpt.pt") else checkpoint.ADAPTER_KEYS)
        if "rows_sha256" not in run_so_far["config"] or not run_so_far["optimizers"]:
            raise Refusal(f"{path} is no run of finetune_lora.py that could go on; --init_from={cfg.out_dir} --out_dir=OTHER starts from it")
        cfg = inherit(cfg, run_so_far, path, True, FIXED)
        adapter = run_so_far if "adapters" in run_so_far else None
    base = checkpoint.find(cfg.init_from) if not resume else checkpoint.base_of(adapter, path) if adapter else path
    ckpt = run_so_far if base == path else checkpoint.load(base)
    moving = in_the_way(cfg)
    if moving and (os.path.realpath(hf_name(base)) + os.sep).startswith(os.path.realpath(cfg.out_dir) + os.sep):
        raise Refusal(f"the base {base} is in {cfg.out_dir}, which cannot be moved aside then: give another --out_dir")
    model, tokenizer = checkpoint.restore(ckpt, base)
    compute = resolve(cfg.device, cfg.dtype, cfg.compile, join=True, train_width=model.config.n_embd)
    cfg.dtype = compute.dtype_name  # a resumed run keeps it, on another processor too
    rows_each(cfg, compute)
    T, base_sha256 = min(cfg.max_length or math.inf, model.config.block_size), checkpoint.fingerprint(ckpt)

    rows, held_out = split(cfg)
    (train_rows, default), (val_rows, _) = conversations(rows), conversations(held_out)
    cfg.template = cfg.template or str(ckpt["config"].get("template", "")) or default
    data, said = examples(train_rows, tokenizer, cfg.template, T, f"{cfg.dataset}, to learn from")
    val_data, val_said = examples(val_rows, tokenizer, cfg.template, T, f"{cfg.val_dataset or cfg.dataset}, held out")
    packs, val_packs = (pack([len(idx) for idx, _ in some], T) for some in (data, val_data))

    more = {"rows_sha256": hashlib.sha256(b"".join(ids.tobytes() for example in data for ids in example)).hexdigest(),
            "base_dataset": checkpoint.dataset_of(ckpt)}  # whose text eval.py reads
    if resume and run_so_far["config"]["rows_sha256"] != more["rows_sha256"]:
        raise Refusal(f"{cfg.dataset} holds other rows than when {path} was begun: give another --out_dir")

    torch.manual_seed(cfg.seed)
    try:
        shown = render(cfg.template, cfg.start or next(filter(None, val_rows))[0][0])
        shown_ids = prompt_ids(tokenizer, shown)
        if adapter:
            checkpoint.restore_adapters(adapter, path, ckpt, base, model)
        elif cfg.rank:
            lora.inject(model, cfg)
    except ValueError as e:
        raise Refusal(e)
    learned, every = lora.trainable(model)
    check_memory(compute.device, training_bytes(cfg, replace(model.config, block_size=T), learned), "try a smaller batch_size")
    model = model.to(compute.device)
    said_rmsnorm = choose_rmsnorm(model, cfg.rmsnorm, compute)
    model.gradient_checkpointing, model.chunked_loss = cfg.gradient_checkpointing, cfg.loss == "chunked"
    if compute.first:
        print(f"{base}: {compute.said}{said_rmsnorm}")
        if adapter and os.path.exists(merged := os.path.join(cfg.out_dir, "ckpt.pt")):
            print(f"{merged} is from an earlier --merge, and stays as it is")
        print(f"{said}; in {len(packs):,} rows of {T} tokens\n{val_said}\ntemplate: {cfg.template!r}")
        print(f"{learned:,} of {every:,} parameters are trained, {learned / every:.2%}")
    trained = torch.compile(model) if compute.compile else model

    def get_batches(step):
        return [to(batch_of(training_packs(packs, cfg.seed, first, n), data, T), compute.device) for first, n in micro_batches(step, cfg, compute)]

    def validate(tokens=cfg.eval_tokens):
        looked_at = evenly(np.arange(len(val_packs)), math.ceil(tokens / T))
        return {"val_loss": mean_nats(trained, looked_at, lambda some: batch_of([val_packs[i] for i in some], val_data, T), cfg.batch_size, compute)}

    def save(name, **state):
        if cfg.rank:
            checkpoint.save_adapters(os.path.join(cfg.out_dir, name.replace("ckpt", "adapter")), model, base, base_sha256, asdict(cfg) | more, **state)
        else:
            checkpoint.save(os.path.join(cfg.out_dir, name), model, tokenizer, asdict(cfg) | more, **state)

    def preview():
        [told], _ = finish(generate(model, [shown_ids], min(T, 200), temperature=0, stop=tokenizer.eot, past_end="recompute"))
        return shown + tokenizer.decode_more(told)

    def report(when):
        loss = validate(tokens=0)["val_loss"]
        if compute.first:
            print(f"{when}: {loss:.4f} nats a token of held-out responses")
            if cfg.dataset == "moral":
                print(moral_lines(model, tokenizer, held_out, cfg.template, compute))

    if not resume and not cfg.eval_only:
        report("before")
    compute.wait()  # nothing is written to out_dir before everyone has looked at it
    if moving and compute.first:
        folders.move_aside(cfg.out_dir, folders.runs_in(cfg.out_dir))
    if not cfg.eval_only:
        fit(trained, cfg, compute, get_batches, validate, save, preview, run_so_far)
    report("now" if cfg.eval_only else "after")
    if compute.first and not cfg.eval_only:
        print(plot(cfg.out_dir))
        print(f"next: python sample.py --{'adapter' if cfg.rank else 'out_dir'}={cfg.out_dir} --start=\"...\"")
    compute.leave()


if __name__ == "__main__":
    run(main, Config)
