"""Where text comes from: files, folders and patterns of them, the Hugging Face hub.

    find_files(cfg, folder, progress)      which files are of which split
    hub_splits("roneneldan/TinyStories")   the rows of a dataset there, as they are fetched

cfg is prepare.py's Config, whose docstring says what is read and how.
"""

import glob
import json
import os
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tqdm import tqdm

import toy_stories
from config import Refusal, hf_name, is_hf
from folders import sync
from readers import PACKINGS, READERS, field, file_kind, open_parquet_rows, unpacked
from shards import SPLITS

FILES_SHOWN = 10

# The words by which the library `datasets` knows the splits of a folder (its data_files.py), and the files
# that it leaves out. A name with words of two splits is held out, so that nothing held out is trained on.
SPLIT_WORDS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
    "train": ("train", "training"),
}
CARDS = ("readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
HELD_OUT = ("val", "test", "train")  # which split of --val_dataset is taken: the first that is there


def find_files(cfg, tmp, progress):
    """Returns ({"train": files, "val": files}, {split: words that say where it comes from}).

    Where there are no files for val, split_documents makes that split. A source that is no local file is
    written to one in tmp. Prints which files of a folder are read. Raises Refusal.
    """
    wanted = {"train": [cfg.split or "train"]}
    if not cfg.val_dataset and cfg.split != "validation":
        wanted["val"] = ["validation"]
    splits = find_splits("dataset", cfg, tmp, progress, wanted)
    files = {"train": splits.pop("train")}
    files["val"] = [] if cfg.val_dataset else splits.pop("val", [])
    origins = {}
    for split, paths in files.items():
        if paths:
            origins[split] = origin(cfg.dataset, paths)
            title = split if files["val"] or cfg.val_dataset else "train and val"
            print_files(cfg.dataset, title, paths)
    left_out = [path for paths in splits.values() for path in paths]
    print_files(cfg.dataset, "left out", left_out)
    if cfg.val_dataset:
        splits = find_splits("val_dataset", cfg, tmp, progress, {"val": ["validation", "test", "train"]})
        files["val"] = next(splits[split] for split in HELD_OUT if splits.get(split))
        origins["val"] = origin(cfg.val_dataset, files["val"])
        print_files(cfg.val_dataset, "val", files["val"])
    return files, origins


def find_splits(key, cfg, tmp, progress, wanted):
    """Returns {split: files} of the source that the key (dataset or val_dataset) names.

    wanted: {split: its possible names on the hub}. Of a hub dataset the first name that is there is fetched
    for each split; the first split must have one. A source that is no local file is written to one in tmp.
    Raises Refusal.
    """
    dataset = getattr(cfg, key)
    if dataset in ("toy", "tinystories") or is_hf(dataset):
        splits = progress.fetched(key)
        if not splits:
            splits = fetch(dataset, cfg, tmp / key, wanted)
            progress.note_fetched(key, splits)
        return splits
    splits = local_splits(dataset, key)
    if key == "dataset" and not splits["train"]:
        names = file_names(dataset, [file for files in splits.values() for file in files])
        raise Refusal(f"{dataset}: no file to train on, only {names}; name a file or a folder in it")
    return splits


def local_splits(dataset, key):
    """Returns {split: files} of a file, a folder or a pattern, which the key names. Raises Refusal where no file is
    one to read.
    """
    path = Path(dataset)
    if is_pattern(dataset):
        folder = base_folder(dataset)  # not part of the pattern, as its name may have a [ in it
        pattern = str(path.relative_to(folder))
        # a set, as a pattern with ** twice finds a file more than once
        paths = {folder / match for match in glob.iglob(pattern, root_dir=folder, recursive=True)}
        if not paths:
            raise Refusal(f"{dataset} matches no file")
        splits = named_splits(paths, folder)
    elif path.is_dir():
        splits = named_splits(path.rglob("*"), path)
    elif path.exists():
        splits = {"train": [path] if file_kind(path) else []}
    else:
        raise Refusal(
            f"there is no file or folder {path}; a dataset of the Hugging Face hub is --{key}=hf:NAME"
        )
    if not any(splits.values()):
        endings = f"{' '.join(READERS)}, also with {' '.join(PACKINGS)}"
        raise Refusal(f"{path}: no file here ends in {endings}")
    return splits


def is_pattern(dataset):
    """Returns whether a dataset is a pattern of file names, as shells have them, and not a path that exists."""
    return not set("*?[").isdisjoint(dataset) and not is_hf(dataset) and not os.path.exists(dataset)


def base_folder(dataset):
    """Returns the folder in which a pattern looks for files, the part of it before any *; a folder as it is."""
    path = Path(dataset)
    while is_pattern(str(path)):
        path = path.parent
    return path


def named_splits(paths, folder):
    """Returns {split: files} of paths in a folder: train, val, test, "card" and "" for the others.

    As in `datasets`, files without a split in their names are training data unless other files are named
    so, and hidden files are not looked at.
    """
    splits = {"train": [], "val": [], "test": [], "": [], "card": []}
    for path in sorted(paths, key=lambda p: p.parts):
        name = path.relative_to(folder)
        is_hidden = name.name.startswith(".") or any(p.startswith((".", "__")) for p in name.parts[:-1])
        if is_hidden or not file_kind(path) or not path.is_file():
            continue
        split = "card" if name.name.lower() in CARDS else named_split(name)
        splits[split].append(path)
    if not splits["train"]:
        splits["train"], splits[""] = splits[""], []
    if not any(splits[split] for split in SPLITS + ("test",)):  # cards alone are the text
        splits["train"], splits["card"] = splits["card"], []
    return splits


def named_split(path):
    """Returns "train", "val" or "test" where a relative path has a word for it, else "".

    The innermost folder with such a word counts, then the file's name.
    """
    *folders, name = path.parts
    for part in (*reversed(folders), name):
        words = re.split("[-._ 0-9]", part.lower())
        for split, names in SPLIT_WORDS.items():
            if not set(names).isdisjoint(words):
                return split
    return ""


def file_names(dataset, files):
    """Returns "2 files: a.txt, b/c.txt"; of more than ten the first ten and how many more there are."""
    folder = base_folder(dataset)
    names = [path.relative_to(folder).as_posix() for path in files[:FILES_SHOWN]]
    text = ", ".join(name if name.isprintable() else ascii(name) for name in names)
    rest = len(files) - len(names)
    more = f" and {rest:,} more" if rest else ""
    return f"{len(files):,} file{'' if len(files) == 1 else 's'}: {text}{more}"


def is_folder(dataset):
    return os.path.isdir(dataset) or is_pattern(dataset)


def print_files(dataset, title, files):
    """Prints which files of a folder or a pattern are of a split or left out; nothing of one file."""
    if files and is_folder(dataset) and base_folder(dataset) in files[0].parents:
        print(f"{dataset}: {title}, {file_names(dataset, files)}")


def origin(dataset, files):
    """Returns the words for meta.json that say where the files of a split come from."""
    if is_hf(dataset) or dataset == "tinystories":
        return f"{dataset}, split {unpacked(files[0]).stem}"
    if is_folder(dataset) and dataset != "toy":
        return f"{dataset}, {file_names(dataset, files)}"
    return dataset


def spool(texts, path, cfg):
    """Writes texts to a .jsonl or .jsonl.zst file as they arrive; returns its path."""
    desc = f"fetching {unpacked(path).stem}"
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as f:
        packed = pack_zstd(f) if path.suffix == ".zst" else nullcontext(f)
        with packed as lines:
            for text in tqdm(texts, desc, unit=" documents", disable=None, leave=False):
                lines.write(json.dumps({cfg.column: text}).encode() + b"\n")
    with open(path, "rb+") as f:  # pyarrow closes what it packs to
        sync(f)
    return path


def fetch(dataset, cfg, folder, wanted):
    """Writes the texts of a dataset that is no file to files in folder; returns {split: [file]}."""
    if dataset == "toy":
        texts = (text for text, _ in toy_stories.stories(cfg.num_stories, cfg.seed))
        return {"train": [spool(texts, folder / "toy.jsonl", cfg)]}
    name = "roneneldan/TinyStories" if dataset == "tinystories" else hf_name(dataset)
    if cfg.subset and dataset == cfg.dataset:
        name += f":{cfg.subset}"
    return fetch_from_hub(name, cfg, folder, wanted)


def fetch_from_hub(name, cfg, folder, wanted):
    """Streams splits of a hub dataset to packed files in folder, once; returns {split: [file]}."""
    files = {}
    splits = hub_splits(name, next(iter(wanted.values())), cfg.column)
    for split, names in wanted.items():
        if full_name := next((name for name in names if name in splits), ""):
            texts = (field(row, cfg.column, name) for row in splits[full_name])
            files[split] = [spool(texts, folder / f"{full_name}.jsonl.zst", cfg)]
    return files


def hub_splits(name, needed=("train",), column=None):
    """Returns the splits of NAME or NAME:CONFIG on the Hugging Face hub: {name: an iterable of rows}. Rows are
    fetched as they are read, and may have only the one column. NAME may be a folder as well.

    Raises Refusal, also where all splits of `needed` are missing; so do the rows, as they are read.
    """
    name, _, config = name.partition(":")
    with refusing_hub(name):
        import datasets
        from huggingface_hub import HfApi

        if not os.path.isdir(name):
            HfApi().dataset_info(name, timeout=10)  # without a network load_dataset retries for 20 s
        splits = load_splits(name, config, column, datasets)
    if not any(split in splits for split in needed):
        raise Refusal(f"{name} has no split {' or '.join(needed)}, only: {', '.join(splits)}")
    return {split: hub_rows(name, rows) for split, rows in splits.items()}


def hub_rows(name, rows):
    with refusing_hub(name):
        yield from rows


@contextmanager
def refusing_hub(name):
    """Turns what goes wrong inside the with, where a dataset of the hub is read, into a Refusal."""
    try:
        from huggingface_hub.errors import RepositoryNotFoundError

        yield
    except Refusal:
        raise
    except ImportError as e:
        raise Refusal(
            f"reading {name} from the Hugging Face hub needs its libraries ({e}): pip install datasets"
        )
    except RepositoryNotFoundError:
        raise Refusal(
            f"the Hugging Face hub has no dataset {name}, or a private one: "
            "see https://huggingface.co/datasets"
        )
    except Exception as e:  # the libraries raise exceptions of their own, and each version others
        raise Refusal(
            f"cannot read {name} from the Hugging Face hub ({type(e).__name__}: {e}); "
            "without a network, --dataset=FILE takes one of your own"
        )


def load_splits(name, config, column, datasets):
    """Returns {name: rows to stream} of a dataset. Raises Refusal for a config that is missing."""
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except ValueError:
        configs = datasets.get_dataset_config_names(name)
        if (config or "default") in configs:
            raise
        problem = f"no subset {config}" if config else "several subsets"
        raise Refusal(f"{name} has {problem}; --subset= chooses from: {', '.join(configs)}")
    if builder.name != "parquet":
        return builder.as_streaming_dataset()
    # not by the library, which would fetch every column, and read a whole file of rows ahead
    files = builder.config.data_files
    return {split: hub_parquet_rows(paths, column) for split, paths in files.items()}


def hub_parquet_rows(paths, column):
    """Yields the rows of .parquet files on the hub, or of those in a folder, as they are read."""
    import fsspec  # which datasets opens files with

    for path in paths:
        with fsspec.open(path) as f:
            for _, row in open_parquet_rows(f, path, column):
                yield row


def pack_zstd(f):
    """Returns a stream that packs what is written to it into the file f, and closes f."""
    import pyarrow  # which datasets has, too

    return pyarrow.CompressedOutputStream(f, "zstd")
