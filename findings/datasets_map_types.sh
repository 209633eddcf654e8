#!/bin/sh
# datasets 5.2.0: Dataset.map with a function that writes a column which is there already.
# One would guess: the column holds what the function returns, in a type that can hold it; of try_original_type, true by default,
# the documentation says that it tries to keep types ("e.g. int32 -> int32"), so that a type which cannot hold the values
# gives way, as it does where halves are written over whole numbers.
# What happens: the values are cast to the old type wherever pyarrow can cast them, and casts lose. Every number but 0 is True in
# a column of bools: rewards of 1 and -1, probabilities, and labels of -100 made from a mask all come out True. Strings
# that read as numbers go back to whole numbers in a column of numbers, zeros and all: an answer that was made a string to be
# compared with text is none. Naming the column in remove_columns does not help, and try_original_type=False, which is to infer
# types always, is read for batched=True alone. features= does help, or a column of another name, and IterableDataset.map is
# right with the same function.
# Output seen:
#   rewards [1, -1] are [True, True]
#   rewards [0.9, 0.1] are [True, True]
#   labels [[11, -100], [-100, 12]] are [[True, True], [True, True]]
#   answers ['007', '8'] are [7, 8]
#   halves [3.5, 4.0] are [3.5, 4.0]
#   rewards with try_original_type=False: [True, True], batched [1, -1]
#   rewards by IterableDataset: [1, -1]
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
rows = {
    "is_good": [True, False],
    "mask": [[True, False], [False, True]],
    "ids": [[11, 12], [11, 12]],
    "answer": [7, 8],
}
data = Dataset.from_dict(rows)


def reward(row):
    return {"is_good": 1 if row["is_good"] else -1}


def probability(row):
    return {"is_good": 0.9 if row["is_good"] else 0.1}


def labels(row):
    return {"mask": [id if is_kept else -100 for id, is_kept in zip(row["ids"], row["mask"])]}


def text(row):
    return {"answer": "007" if row["answer"] == 7 else "8"}


def half(row):
    return {"answer": row["answer"] / 2}


cases = [
    ("rewards", reward, "is_good", [True, True]),
    ("rewards", probability, "is_good", [True, True]),
    ("labels", labels, "mask", [[True, True], [True, True]]),
    ("answers", text, "answer", [7, 8]),
    ("halves", half, "answer", [3.5, 4.0]),
]
is_as_seen = True
for name, function, column, expected in cases:
    written = [function(row)[column] for row in data]
    for settings in ({}, dict(remove_columns=[column])):
        read = data.map(function, **settings)[column][:]
        is_as_seen &= repr(read) == repr(expected)
    print(f"{name} {written} are {read}")


def rewards(batch):
    return {"is_good": [1 if is_good else -1 for is_good in batch["is_good"]]}


one_by_one = data.map(reward, try_original_type=False)["is_good"][:]
batched = data.map(rewards, batched=True, try_original_type=False)["is_good"][:]
print(f"rewards with try_original_type=False: {one_by_one}, batched {batched}")
streamed = [row["is_good"] for row in data.to_iterable_dataset().map(reward)]
print(f"rewards by IterableDataset: {streamed}")
is_as_seen &= repr((one_by_one, batched, streamed)) == "([True, True], [1, -1], [1, -1])"
raise SystemExit(not is_as_seen)
PYTHON
HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
