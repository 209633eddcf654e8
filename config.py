"""Flat configuration: a dataclass, overridden by *.toml files and then by --key=value.

    python train.py -h                                            every key, its default, what it is for
    python train.py --n_layer=8 --learning_rate=3e-4              keys
    python train.py configs/gpt.toml configs/small.toml --seed=7  files, left to right, then keys

A script declares its keys as a dataclass, one line and one comment a field, and ends with `run(main, Config)`.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import tomllib

BOOLS = {"true": True, "1": True, "false": False, "0": False}


def is_hf(value):
    """Whether a value is hf:FOLDER_OR_NAME: a folder as transformers writes it, or a hub's NAME."""
    return value.startswith("hf:")


def hf_name(value):
    """Returns the folder or NAME in hf:FOLDER_OR_NAME, or any other value as it is."""
    return value.removeprefix("hf:")


class Refusal(Exception):
    """What the user has to know, in one line. status 2: the command was wrong; 1: the run failed; above 128: a signal ended it."""

    def __init__(self, message, status=2):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= 500 else f"{line[:300]} ... {line[-150:]}")  # what a broken file holds may be long
        self.status = status


def configure(Config, argv, words=()):
    """The dataclass Config with argv applied. Pure, but for -h, which prints the keys and exits.

    Bare *.toml arguments are applied first, left to right, wherever they stand; then --key=value or --key value.
    Only booleans take --flag and --no-flag as well. `words` may stand bare, as in `bench.py train decode`.
    The result's `given` maps each key that was set to who set it, its `words` are those that stood there.
    Raises Refusal for an unknown key or word (naming the nearest), a wrong type, or what Config's own __post_init__ rejects.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values, given, stood = {}, {}, []

    def put(key, value, where):
        if key not in fields:
            raise Refusal(f"{where}: there is no key {key!r}; {nearest(key.replace('-', '_'), fields)}")
        values[key] = convert(value, fields[key].type, f"{where}: {key}", parse=where == "command line")
        given[key] = where

    files = [a for i, a in enumerate(argv) if a.endswith(".toml") and not a.startswith("-") and not is_value(argv, i, fields)]
    for path in files:
        for key, value in read_toml(path).items():
            put(key, value, path)
    i = 0
    while i < len(argv):
        arg, i = argv[i], i + 1
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg in ("-h", "--help"):
            print(describe(Config, words))
            raise SystemExit(0)
        elif arg in files:
            continue
        elif arg in words:
            stood.append(arg)
        elif not arg.startswith("--"):
            raise Refusal(f"cannot read {arg!r}: expected {', '.join([*words, 'FILE.toml'])} or --key=value; {nearest(arg, words)}")
        elif equals:
            put(key, value, "command line")
        elif is_bool(fields, key):
            literal = i < len(argv) and argv[i].lower() in BOOLS
            put(key, argv[i] if literal else True, "command line")
            i += literal
        elif key.startswith(("no-", "no_")) and is_bool(fields, key[3:]):
            put(key[3:], False, "command line")
        elif key in fields and (i == len(argv) or argv[i].startswith("--")):
            raise Refusal(f"--{key} needs a value: --{key}={fields[key].type.__name__.upper()}")
        else:
            put(key, argv[i] if i < len(argv) else "", "command line")
            i += 1
    try:
        cfg = Config(**values)
    except ValueError as e:
        raise Refusal(e)
    cfg.given, cfg.words = given, stood
    return cfg


def nearest(name, names):
    near = [n for n in names if name == "".join(word[:1] for word in n.split("_"))]  # lr, bs, wd
    near += difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "-h lists them all"


def is_bool(fields, key):
    return key in fields and fields[key].type is bool


def is_value(argv, i, fields):
    """Whether argv[i] is the value of a `--key value` before it, as in `--out_dir my.toml`."""
    key = argv[i - 1].removeprefix("--")
    return i > 0 and argv[i - 1].startswith("--") and key in fields and not is_bool(fields, key)


def read_toml(path):
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    except (ValueError, RecursionError) as e:  # tomllib's own, no UTF-8, an integer of 4,300 digits
        raise Refusal(f"{path} is not a TOML file: {e}")


def convert(value, kind, where, parse):
    """value as kind (bool, int, float or str): text is parsed if parse, a toml value must have the type already."""
    try:
        if parse and isinstance(value, str):
            value = BOOLS[value.lower()] if kind is bool else kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind and (kind is not float or math.isfinite(value)):
            return value
    except (ValueError, KeyError, OverflowError):
        pass
    article = "an" if kind is int else "a"
    names = {bool: "boolean (true or false)", int: "integer", float: "finite number", str: "string"}
    raise Refusal(f"{where} must be {article} {names[kind]}, not {value!r}")


def describe(Config, words=()):
    """The text of -h: the module's docstring, the words, then a line a key."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):  # a dataclass does not keep its comments; the source does
        for line in inspect.getsource(cls).splitlines():
            if m := re.match(r"    (\w+): \w+ = .*?  # (.*)", line):
                comments[m[1]] = m[2]
    doc = inspect.getdoc(sys.modules[Config.__module__]) or ""
    rows = [(f"--{f.name}={f.default!r}", comments.get(f.name, "")) for f in dataclasses.fields(Config)]
    width = max(len(left) for left, _ in rows)
    return "\n".join([doc, "", *([f"words: {' '.join(words)}", ""] if words else []), "keys:"] + [f"  {left:<{width}}  {comment}" for left, comment in rows])


def run(main, Config, words=()):
    """A script's last line: main(configure(Config, words=words)), with a Refusal as one line on stderr and its exit status."""
    try:
        main(configure(Config, sys.argv[1:], words))
        sys.stdout.flush()
    except Refusal as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        raise SystemExit(e.status)
    except KeyboardInterrupt:
        raise SystemExit(130)
    except BrokenPipeError:  # `python sample.py | head`; the interpreter would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
