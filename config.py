"""Flat configuration: a dataclass, overridden by *.toml files and then by --key=value.

    python train.py -h                                            every key, its default, what it is for
    python train.py --n_layer=8 --learning_rate=3e-4              keys
    python train.py configs/gpt.toml configs/small.toml --seed=7  files, left to right, then keys

A script declares its keys as a dataclass, one line and one comment a field, and ends with
`run(main, Config)`.
"""

import ast
import dataclasses
import difflib
import math
import operator
import os
import re
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

try:
    import tomllib
except ImportError:  # the first import that an older Python has not
    problem = f"Python 3.11 or later is needed; {sys.executable} is {sys.version.split()[0]}"
    print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr)
    raise SystemExit(2)

BOOLS = {"true": True, "1": True, "false": False, "0": False}
KINDS = {bool: "a boolean (true or false)", int: "an integer", float: "a finite number", str: "a string"}
# keys that decide how much memory a script takes
SIZES = (
    "num_samples",
    "max_new_tokens",
    "batch_size",
    "max_length",
    "block_size",
    "n_layer",
    "n_embd",
    "num_proc",
)
COMMAND_LINE = "command line"  # the source of a key that no file sets


def end_at_once(number, frame):
    """Handles Ctrl-C while a script imports, when there is nothing to clean up: torch would turn a
    KeyboardInterrupt into other errors.
    """
    os._exit(128 + number)


def required_packages():
    """Returns the names in requirements.txt."""
    text = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
    return re.findall(r"^[\w-]+", text, re.MULTILINE)


def name_missing(kind, error, trace):
    """Python's excepthook: one line, and status 2, for a package of requirements.txt that is not installed."""
    if kind is not ModuleNotFoundError or error.name not in required_packages():
        sys.__excepthook__(kind, error, trace)
        return
    problem = f"this Python has no {error.name}: {sys.executable} -m pip install -r requirements.txt"
    print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr, flush=True)
    os._exit(2)  # Python's own way out of a hook has status 1


def is_script():
    """Returns whether Python runs a script of this folder, not a test or a notebook that imports one."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    folder = os.path.dirname(os.path.realpath(__file__))
    return path is not None and os.path.dirname(os.path.realpath(path)) == folder


if is_script():  # which imports this module before anything slow
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    sys.excepthook = name_missing
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # closed: the next file that is opened would get this number, and C code would print into it
            os.open(os.devnull, os.O_RDWR)


def is_hf(value):
    """Whether a value is hf:FOLDER_OR_NAME: a folder as transformers writes it, or a hub's NAME."""
    return value.startswith("hf:")


def hf_name(value):
    """Returns the folder or NAME in hf:FOLDER_OR_NAME, or any other value as it is."""
    return value.removeprefix("hf:")


def new_lines(text):
    """Returns an option's text with a new line for each \\n in it; other backslashes stay."""
    return text.replace("\\n", "\n")


BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def check_range(cfg, words, *keys):
    """Raises ValueError where the value of a key is outside the range of these words, such as "above 0" or "at least 0
    and below 1".
    """
    limits = [limit.rsplit(" ", 1) for limit in words.split(" and ")]
    for key in keys:
        value = getattr(cfg, key)
        if not all(BOUNDS[bound](value, float(number)) for bound, number in limits):
            raise ValueError(f"{key} must be {words}, not {value}")


def check_choice(cfg, key, choices):
    """Raises ValueError where the value of a key is none of the choices."""
    value = getattr(cfg, key)
    if value not in choices:
        raise ValueError(f"{key} must be one of {' | '.join(map(str, choices))}, not {value!r:.60}")


class Refusal(Exception):
    """What the user has to know, in one line.

    status is the exit status: 2 where the command was wrong, 1 where the run failed, above 128 where a
    signal ended it.
    """

    def __init__(self, message, status=2):
        line = " ".join(str(message).split())
        if len(line) > 500:  # it quotes a broken file
            line = f"{line[:300]} ... {line[-150:]}"
        super().__init__(line)
        self.status = status


def configure(Config, argv, words=(), defaults=None):
    """Returns the dataclass Config with argv applied. Pure, but for -h, which prints the keys and exits.

    Bare *.toml arguments are applied first, left to right, wherever they stand; then --key=value or
    --key value. Only booleans take --flag and --no-flag as well. `words` may stand bare, as in
    `bench.py train decode`. defaults: values of keys that argv may set otherwise. The result has three
    attributes more: `given` {key: what set it, a path or "command line"}, `values` {key: its value as it
    was set, or its default here}, and `words`, those of argv.

    Raises Refusal for an unknown key or word (naming the nearest), a wrong type, or what Config's own
    __post_init__ rejects.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    values = dict(defaults or {})
    given = {}
    bare_words = []

    def put(key, value, source):
        kind = find_field(fields, key, source).type
        values[key] = convert(value, kind, f"{source}: {key}", parse=source == COMMAND_LINE)
        given[key] = source

    paths = [arg for i, arg in enumerate(argv) if is_file(argv, i, fields)]
    for path in paths:
        for key, value in read_toml(path).items():
            put(key, value, path)

    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", "--help"):
            print(describe(sys.modules[Config.__module__].__file__, Config.__name__, words), flush=True)
            raise SystemExit(0)
        elif arg in words:
            bare_words.append(arg)
        elif arg not in paths:
            key, value = read_argument(arg, rest, fields, words)
            put(key, value, COMMAND_LINE)

    try:
        cfg = Config(**values)
    except ValueError as e:
        raise Refusal(e)
    cfg.given = given
    cfg.values = values
    cfg.words = bare_words
    return cfg


def read_argument(arg, rest, fields, words):
    """Returns (key, value) of an argument. A value that follows the key, as in --key value, is taken off `rest`,
    the arguments after this one. Raises Refusal.
    """
    if arg.endswith(".py") and not arg.startswith("--"):  # as nanoGPT's
        advice = "keys stand in a FILE.toml, each as key = value, like those in configs/"
        raise Refusal(f"cannot read {arg!r}: a .py file would run code; {advice}")
    if not arg.startswith("--"):
        expected = ", ".join([*words, "FILE.toml"])
        advice = nearest(arg, words)
        raise Refusal(f"cannot read {arg!r}: expected {expected} or --key=value; {advice}")
    key, equals, value = arg.removeprefix("--").partition("=")
    if equals:
        return key, value
    if is_bool(fields, key):
        has_value = rest and rest[0].lower() in BOOLS
        return key, rest.pop(0) if has_value else True
    if key.startswith(("no-", "no_")) and is_bool(fields, key[3:]):
        return key[3:], False
    kind = find_field(fields, key, COMMAND_LINE).type
    if not rest or rest[0].startswith("--"):
        raise Refusal(f"--{key} needs a value: --{key}={kind.__name__.upper()}")
    return key, rest.pop(0)


def find_field(fields, key, source):
    """Returns the field of a key. Raises Refusal where there is none; source: what set the key."""
    if key not in fields:
        advice = nearest(key.replace("-", "_"), fields)
        if key == "init_from" and "out_dir" in fields:  # as in nanoGPT's sample.py
            advice = "a model is named by --out_dir=FOLDER or --out_dir=hf:gpt2"
        raise Refusal(f"{source}: there is no key {key!r}; {advice}")
    return fields[key]


def nearest(name, names):
    """Returns advice that names the likeliest of names: lr is learning_rate, n_layers is n_layer."""
    likely = [full for full in names if name == "".join(word[:1] for word in full.split("_"))]
    likely += difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {likely[0]}?" if likely else "-h lists them all"


def is_bool(fields, key):
    return key in fields and fields[key].type is bool


def is_file(argv, i, fields):
    """Returns whether argv[i] is a file of keys and not a value, as in `--out_dir my.toml`."""
    if not argv[i].endswith(".toml") or argv[i].startswith("-"):
        return False
    if i == 0 or not argv[i - 1].startswith("--"):
        return True
    key = argv[i - 1].removeprefix("--")
    return key not in fields or is_bool(fields, key)


def read_toml(path):
    """Returns a TOML file as a dict. Raises Refusal."""
    try:
        # tomllib takes no byte order mark, which Windows' editors may write
        with open(path, encoding="utf-8-sig") as f:
            return tomllib.loads(f.read())
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    except (ValueError, RecursionError) as e:  # tomllib's own, no UTF-8, an integer of 4,300 digits
        raise Refusal(f"{path} is not a TOML file: {e}")


def convert(value, kind, name, parse):
    """Returns value as kind: bool, int, float or str. Raises Refusal, which calls the value `name`.

    Text is parsed if parse; a value of a TOML file must have the type already, though an int may stand
    for a float.
    """
    try:
        if parse and isinstance(value, str):
            value = BOOLS[value.lower()] if kind is bool else kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
            raise Refusal(f"{name} must be at least -2^63 and below 2^63, not {value!r:.60}")
        if type(value) is kind and (kind is not float or math.isfinite(value)):
            return value
    except (ValueError, KeyError, OverflowError):
        pass
    raise Refusal(f"{name} must be {KINDS[kind]}, not {value!r}")


def describe(path, name="Config", words=()):
    """Returns the text of -h of a script: its docstring, the words, then a line a key of its dataclass `name`."""
    keys = read_keys(path, name)
    lines = [ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or "", ""]
    if words:
        lines += [f"words: {' '.join(words)}", ""]
    lines.append("keys:")
    flags = {key: f"--{key}={default!r}" for key, (default, _) in keys.items()}
    width = max(map(len, flags.values()))
    for key, (_, comment) in keys.items():
        lines.append(f"  {flags[key]:<{width}}  {comment}")
    return "\n".join(lines)


def read_keys(path, name):
    """Returns {key: (default, comment)} of the dataclass `name` in a source file, its bases' keys first.

    The file is read and not run: a dataclass does not keep its comments, and importing torch takes longer
    than reading -h.
    """
    source = Path(path).read_text(encoding="utf-8")
    modules = {}  # that names were imported from
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.name: node.module for alias in node.names}
        if isinstance(node, ast.ClassDef) and node.name == name:
            break
    keys = {}
    for base in reversed(node.bases):
        module, _, base_name = ast.unparse(base).rpartition(".")
        module = module or modules.get(base_name)
        base_path = os.path.join(os.path.dirname(path), f"{module}.py") if module else path
        keys |= read_keys(base_path, base_name)
    for line in source.splitlines()[node.lineno : node.end_lineno]:
        if match := re.match(r"    (\w+): \w+ = (.*?)(?:  +# (.*))?$", line):
            key, default, comment = match.groups()
            keys[key] = ast.literal_eval(default), comment or keys.get(key, ("", ""))[1]
    return keys


class Output:
    """stdout or stderr while a script runs. Once it cannot be written to (closed, full, or a pipe that
    nobody reads any more), what is printed is dropped; where is_needed is set, the script ends instead,
    with status 1.
    """

    def __init__(self, stream):
        # None: closed before Python began. What stands in for it is open for reading alone, so that a
        # write fails here too
        self.stream = stream or open(os.devnull)
        if getattr(self.stream, "errors", "") == "strict":
            # a story may have quotes that an encoding lacks: they are printed as stderr would
            self.stream.reconfigure(errors="backslashreplace")
        self.is_needed = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as e:
            self.drop(e)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as e:
            self.drop(e)

    def drop(self, error):
        """Sends to nowhere what will be printed, and what is buffered and would be written at exit."""
        nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")
        os.dup2(nowhere.fileno(), self.stream.fileno())
        self.stream = nowhere
        if not self.is_needed:
            return
        if isinstance(error, BrokenPipeError):  # of `python sample.py | head`
            raise SystemExit(1)
        raise Refusal(f"cannot print: {error.strerror or 'stdout is closed'}", status=1)


def is_out_of_memory(error):
    """Returns whether an error is Python's, torch's or the C++ library's for want of memory."""
    words = ("not enough memory", "out of memory", "bad alloc", "bad_alloc", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)


def out_of_memory(Config):
    """Returns the line to print when memory runs out: which of this script's keys to make smaller."""
    fields = {field.name for field in dataclasses.fields(Config)}
    sizes = [key for key in SIZES if key in fields]
    return f"out of memory: a smaller {' or '.join(sizes) or 'model'} takes less"


def run(main, Config, words=()):
    """Runs main(cfg) with the arguments of the command line; a script's last line.

    A Refusal becomes one line on stderr and its exit status. The work goes on where nobody reads what
    is printed, unless cfg.only_prints: then the text is the only result, and the script ends.
    """
    handler = signal.getsignal(signal.SIGINT)
    with redirect_stdout(Output(sys.stdout)) as output, redirect_stderr(Output(sys.stderr)):
        try:
            if handler is end_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            output.is_needed = True  # by -h
            cfg = configure(Config, sys.argv[1:], words)
            output.is_needed = getattr(cfg, "only_prints", False)
            main(cfg)
            output.flush()
        except Refusal as e:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(2)  # where the first process says the same, torchrun ends this one meanwhile
            print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
            raise SystemExit(e.status)
        except KeyboardInterrupt:
            raise SystemExit(130)
        except (MemoryError, OSError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            print(f"{os.path.basename(sys.argv[0])}: {out_of_memory(Config)}", file=sys.stderr)
            raise SystemExit(1)
        finally:
            if handler is end_at_once:
                signal.signal(signal.SIGINT, end_at_once)
            output.is_needed = False
            output.flush()


# -h is answered here, before the script imports torch, which takes seconds
if is_script() and sys.argv[1:] in (["-h"], ["--help"]):
    source = Path(sys.modules["__main__"].__file__).read_text(encoding="utf-8")
    if "    run(main, Config)\n" in source:  # bench.py has words too, and answers by itself
        run(None, dataclasses.make_dataclass("Config", [], namespace={"__module__": "__main__"}))
