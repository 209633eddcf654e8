"""How far prepare.py has got with a dataset, so that the run after a killed one goes on from there."""

import json
import shutil
from contextlib import suppress

from folders import sync, write_atomic
from shards import SPLITS, ShardWriter
from tokenizer import Tokenizer

STATE = "state.json"


class Progress:
    """How far a dataset is, kept in state.json in its unfinished folder: the run after a killed one goes on
    from there, to the same result.

    done: a dict of "settings" and "sources", on which the result depends; "fetched", the files into which
    a source that is no file was written; "counts" of documents and characters; "tokenizer", the sha256 of
    one that was learned; "files" of ids, and "chunks", how many were encoded into them.
    """

    def __init__(self, folder, name, settings):
        self.folder = folder
        self.name = name
        self.done = read_state(folder)
        self.goes_on = bool(self.done)
        older = self.done.get("settings", {})
        if changes := [key for key in settings if settings[key] != older.get(key)]:
            self.begin_anew(f"is of another {' and '.join(changes)}", [])
        elif self.goes_on:
            print(f"going on with what a killed run left of data/{self.name}")
        self.note(settings=settings)

    def note(self, **done):
        self.done |= done
        text = json.dumps(self.done, indent=1)
        write_atomic(self.folder / STATE, lambda f: f.write(text.encode()))

    def begin_anew(self, problem, keep):
        """Forgets all but the keys in keep, and says so."""
        if self.goes_on:
            print(f"what a killed run left of data/{self.name} {problem}: all begins anew")
        self.goes_on = False  # it is said once
        self.done = {key: self.done[key] for key in keep if key in self.done}
        for path in list(self.folder.iterdir()):
            if not path.is_dir():
                path.unlink()
            elif "fetched" not in keep:
                shutil.rmtree(path)

    def fetched(self, key):
        """Returns {split: [file]} of a source that is no file, {} where it is not fetched yet."""
        splits = {}
        for split, (name, size) in self.done.get("fetched", {}).get(key, {}).items():
            path = self.folder / key / name
            if not path.is_file() or path.stat().st_size != size:
                return {}
            splits[split] = [path]
        return splits

    def note_fetched(self, key, splits):
        files = {split: (path.name, path.stat().st_size) for split, [path] in splits.items()}
        self.note(fetched=self.done.get("fetched", {}) | {key: files})

    def check_sources(self, files):
        """Begins anew where the files are not those of the killed run, or have changed since."""
        sources = {}
        for split, paths in files.items():
            sources[split] = []
            for path in paths:
                stat = path.stat()
                name = path.name if self.folder in path.parents else str(path.absolute())
                sources[split].append([name, stat.st_size, stat.st_mtime_ns])
        if "sources" in self.done and sources != self.done["sources"]:
            self.begin_anew("is of other files, or they have changed", ["settings", "fetched"])
        self.note(sources=sources)

    def tokenizer(self):
        """Returns the tokenizer that the killed run learned, or None."""
        with suppress(OSError, ValueError):
            tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
            if tokenizer.sha256 == self.done.get("tokenizer"):
                return tokenizer

    def note_tokenizer(self, tokenizer):
        write_text(self.folder / "tokenizer.json", tokenizer.to_str())
        self.note(tokenizer=tokenizer.sha256)

    def open_writers(self, size, dtype):
        """Returns ({split: its ShardWriter}, how many chunks they have)."""
        try:
            files = self.done.get("files", {split: [] for split in SPLITS})
            return self.new_writers(size, dtype, files), self.done.get("chunks", 0)
        except (OSError, ValueError) as e:
            print(f"what a killed run encoded of data/{self.name} is damaged ({e}): it is encoded anew")
            self.done = {key: self.done[key] for key in self.done if key not in ("files", "chunks")}
            self.note()
            return self.new_writers(size, dtype, {split: [] for split in SPLITS}), 0

    def new_writers(self, size, dtype, files):
        return {split: ShardWriter(self.folder, split, size, dtype, files[split]) for split in SPLITS}

    def note_files(self, writers, chunks):
        for writer in writers.values():
            writer.sync()
        self.note(files={split: writer.files for split, writer in writers.items()}, chunks=chunks)


def read_state(folder):
    """Returns what state.json in a folder holds, {} where there is none."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def has_parts(folder):
    """Returns whether an unfinished folder has what takes long: what was fetched, or finished files of ids."""
    return not {"fetched", "files"}.isdisjoint(read_state(folder))


def write_text(path, text):
    with open(path, "wb") as f:
        f.write(text.encode())
        sync(f)
