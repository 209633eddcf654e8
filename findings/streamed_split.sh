#!/bin/sh
# datasets 5.2.0 with transformers 5.24.0, accelerate 1.15.0 and torch 2.13.0: a streamed dataset, a part of which is held out as
# the page on streaming has it: shuffle(seed=42, buffer_size=10_000), then take(1000) and skip(1000); "You should shuffle your
# dataset before splitting it", since take and skip "lock in the order of the shards".
# One would guess: the split is made once. take(1000) is the first 1,000 rows, whoever reads them, and skip(1000) never has one of
# them; set_epoch, by which Trainer has each epoch in another order, shuffles within the part.
# What happens: both count rows again each time they are read, in the order of that reading, without a word.
#   Epochs: set_epoch gives the buffer beneath take and skip another seed (_prepare_ex_iterable_for_iteration, by
#   shift_ex_examples_rngs), and "the first 1,000" are others. From the second epoch on nine tenths of the rows that were held
#   out are trained on (1 - 1000 / 10000), and Trainer's eval_loss is of rows that the model has learned. Splitting before the
#   shuffle, against the page's advice, is right in this.
#   Workers: SkipExamplesIterable.shard_data_sources divides n by the workers of a DataLoader, each of which skips its share in
#   its own files. Rows that were held out by another number of workers, as by a loop in the program itself, are trained on from
#   the first epoch on, whichever came first, the shuffle or the split.
# A split that does not count is right: files that are kept apart, or filter() by something in a row. (The second epoch is the
# same in 2.21.0 and 4.0.0. Issue 5435 of datasets, closed, asked in 2023 whether the page's example leaks; the page has kept it.)
# Output seen (20,000 rows in four files; rows of the part that is trained on which had been held out before, by epoch and by
# number of workers; then Trainer: 30 epochs of 256 rows by chance, 64 of them held out, of which nothing but themselves can be
# learned; the losses may differ among processors):
#   shuffle, split: 1000 held out, epochs 1 to 3 [0, 892, 897], 0 and 2 workers [0, 954]
#   split, shuffle: 1000 held out, epochs 1 to 3 [0, 0, 0], 0 and 2 workers [0, 500]
#   filter: 1011 held out, epochs 1 to 3 [0, 0, 0], 0 and 2 workers [0, 0]
#   Trainer, shuffle, split: 64 of 64 trained on, eval_loss 1.59, rows never seen 3.62
#   Trainer, split, shuffle: 0 of 64 trained on, eval_loss 4.67, rows never seen 4.77
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/run.py" <<'PYTHON'
import json
import random
import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

torch.set_num_threads(1)
V, L = 16, 16


def streamed(name, count):
    """Returns a streamed dataset of four files, count rows by chance in all."""
    rng, files = random.Random(0), []
    for i in range(4):
        files.append(f"{sys.argv[1]}/{name}{i}.jsonl")
        with open(files[-1], "w") as f:
            for _ in range(count // 4):
                row = [rng.randrange(V) for _ in range(L)]
                f.write(json.dumps({"input_ids": row, "labels": row}) + "\n")
    return load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=sys.argv[1])


def rows(dataset):
    return {tuple(row["input_ids"]) for row in dataset}


def split(dataset, kind, n, size):
    """Returns the part to train on and the part that is held out, n rows (by filter: one in twenty)."""
    if kind == "shuffle, split":
        dataset = dataset.shuffle(seed=42, buffer_size=size)
        return dataset.skip(n), dataset.take(n)
    if kind == "split, shuffle":
        return dataset.skip(n).shuffle(seed=42, buffer_size=size), dataset.take(n)
    is_held = lambda row: sum(row["input_ids"]) % 20 == 0  # noqa: E731
    train = dataset.filter(lambda row: not is_held(row)).shuffle(seed=42, buffer_size=size)
    return train, dataset.filter(is_held)


class Recorder(LlamaForCausalLM):
    """Keeps the rows that it is trained on."""

    def forward(self, input_ids=None, labels=None):
        if self.training:
            self.read.update(map(tuple, input_ids.tolist()))
        return super().forward(input_ids=input_ids, labels=labels)


def trained(kind):
    """Returns how many of 64 rows were trained on, and the losses of these and of rows of which none was."""
    torch.manual_seed(0)
    train, held = split(streamed("small", 256), kind, 64, 10_000)
    names = rows(held)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = Recorder(LlamaConfig(vocab_size=V, **sizes, use_cache=False))
    model.read = set()
    # 16 steps of 12 rows are an epoch of 192 rows; a stream has no length, so that epochs are counted in steps.
    arguments = TrainingArguments(
        sys.argv[1] + "/out",
        max_steps=480,
        per_device_train_batch_size=12,
        per_device_eval_batch_size=64,
        learning_rate=3e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    ids = torch.randint(0, V, (256, L), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fresh = model.eval()(ids, labels=ids).loss.item()
    return len(names), len(names & model.read), loss, fresh


is_as_seen = True
large = streamed("large", 20_000)
expected = {"shuffle, split": (0.85, 0.95), "split, shuffle": (0, 0), "filter": (0, 0)}
for kind, (low, high) in expected.items():
    train, held = split(large, kind, 1000, 10_000)
    names, seen = rows(held), []
    for epoch in range(3):
        train.set_epoch(epoch)
        seen.append(len(names & rows(train)))
    train.set_epoch(0)
    by_workers = [len(names & rows(DataLoader(train, batch_size=None, num_workers=w))) for w in (0, 2)]
    print(f"{kind}: {len(names)} held out, epochs 1 to 3 {seen}, 0 and 2 workers {by_workers}")
    is_as_seen &= seen[0] == by_workers[0] == 0 and all(low <= k / len(names) <= high for k in seen[1:])
    is_as_seen &= by_workers[1] == 0 if kind == "filter" else by_workers[1] >= 500
for kind in ("shuffle, split", "split, shuffle"):
    count, k, loss, fresh = trained(kind)
    print(f"Trainer, {kind}: {k} of {count} trained on, eval_loss {loss:.2f}, rows never seen {fresh:.2f}")
    is_right = kind == "split, shuffle"
    is_as_seen &= k == 0 if is_right else k >= count / 2
    is_as_seen &= abs(loss - fresh) < 0.1 * fresh if is_right else loss < 0.7 * fresh
raise SystemExit(not is_as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" > "$folder/seen" || {
    cat "$folder/seen" "$folder/log"
    exit 1
}
cat "$folder/seen"
