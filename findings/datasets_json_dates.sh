#!/bin/sh
# datasets 5.2.0 (pyarrow 26.0.1): load_dataset("json") of lines whose answers are strings in quotes that look like a date or a
# time, as of "When did ... ?".
# One would guess: a string in JSON is a string, and the dataset has it letter by letter; features=Features({"answer":
# Value("string")}) makes sure of it.
# What happens: where all strings of a column look so (in one file; by the source, in one chunk of 10 MB), they become
# timestamps. to_json then writes numbers for them. Told that they are strings, load_dataset makes the timestamps all the same
# and then spells them its own way: a date gets " 00:00:00", a time is moved to UTC and loses its zone. So it is without being
# told, too, where an earlier file has shown that the column is one of strings: the answers of a later file are
# rewritten, with a type that looks right and no word. Value("large_string") and streaming change nothing;
# Dataset.from_list of the same rows and features with Json() keep the strings.
# Output seen:
#   dates: timestamp[s], 1969-07-20 00:00:00; to_json writes -14256000000
#   dates, told string: string, 1969-07-20 00:00:00; to_json writes "1969-07-20 00:00:00"
#   zones, told string: string, 1989-11-09 17:53:00; to_json writes "1989-11-09 17:53:00"
#   dates, told large_string: large_string, 1969-07-20 00:00:00; to_json writes "1969-07-20 00:00:00"
#   words: string, in July; to_json writes "in July"
#   words, then a file of dates: string, 1969-07-20 00:00:00; to_json writes "1969-07-20 00:00:00"
#   dates, told string, streaming: 1969-07-20 00:00:00
#   dates, told Json: 1969-07-20
#   dates, from_list: 1969-07-20
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/run.py" <<'PYTHON'
import json
import os
import sys

from datasets import Dataset, Features, Json, Value, load_dataset

os.chdir(sys.argv[1])
answers = {
    "dates": ["1989-11-09", "1969-07-20"],
    "zones": ["1969-07-20T20:17:00Z", "1989-11-09T18:53:00+01:00"],
    "words": ["1989-11-09", "in July"],
}
for name, texts in answers.items():
    with open(f"{name}.jsonl", "w") as f:
        f.writelines(json.dumps({"answer": text}) + "\n" for text in texts)


def read(names, feature=None, **others):
    features = Features({"answer": feature}) if feature else None
    files = [f"{name}.jsonl" for name in names]
    settings = dict(data_files=files, features=features, cache_dir="cache")
    return load_dataset("json", split="train", **settings, **others)


results = {}
for title, names, feature in (
    ("dates", ["dates"], None),
    ("dates, told string", ["dates"], Value("string")),
    ("zones, told string", ["zones"], Value("string")),
    ("dates, told large_string", ["dates"], Value("large_string")),
    ("words", ["words"], None),
    ("words, then a file of dates", ["words", "dates"], None),
):
    data = read(names, feature)
    data.to_json("out.jsonl")
    with open("out.jsonl") as f:
        written = f.read().splitlines()[-1]
    dtype, last = data.features["answer"].dtype, str(data[-1]["answer"])
    results[title] = dtype, last, written
    print(f"{title}: {dtype}, {last}; to_json writes {written[10:-1]}")
streamed = list(read(["dates"], Value("string"), streaming=True))
others = {
    "dates, told string, streaming": streamed[-1]["answer"],
    "dates, told Json": read(["dates"], Json())[-1]["answer"],
    "dates, from_list": Dataset.from_list([{"answer": text} for text in answers["dates"]])[-1]["answer"],
}
for title, last in others.items():
    print(f"{title}: {last}")
day, time = "1969-07-20 00:00:00", "1989-11-09 17:53:00"
expected = {
    "dates": ("timestamp[s]", day, '{"answer":-14256000000}'),
    "dates, told string": ("string", day, f'{{"answer":"{day}"}}'),
    "zones, told string": ("string", time, f'{{"answer":"{time}"}}'),
    "dates, told large_string": ("large_string", day, f'{{"answer":"{day}"}}'),
    "words": ("string", "in July", '{"answer":"in July"}'),
    "words, then a file of dates": ("string", day, f'{{"answer":"{day}"}}'),
}
raise SystemExit(results != expected or list(others.values()) != [day, "1969-07-20", "1969-07-20"])
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
