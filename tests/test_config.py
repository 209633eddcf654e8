"""config.py: the command line, the files, and what is refused."""

import importlib
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import metadata

import numpy as np
import pytest
import torch
import tqdm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripts import ROOT

import config
import train
from config import Refusal, check_choice, check_range, configure


@dataclass
class Base:
    n_layer: int = 6  # how deep
    learning_rate: float = 3e-4  # of the optimizer


@dataclass
class Config(Base):
    out_dir: str = "out"  # where to
    compile: bool = False  # with torch.compile
    bias: bool = True  # in every Linear
    dtype: str = "auto"  # auto | float32

    def __post_init__(self):
        if self.n_layer == 13:
            raise ValueError("n_layer 13\nis unlucky: take 12")


def refusal(argv):
    """Returns the message of the Refusal of a command line."""
    with pytest.raises(Refusal) as e:
        configure(Config, argv)
    assert e.value.status == 2
    assert "\n" not in str(e.value)
    return str(e.value)


def toml(folder, text, name="a.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "words, inside, outside",
    [
        ("at least 1", [1, 10**400], [0, 0.999]),
        ("above 0 and at most 1", [1, 1e-300], [0, 1.001]),
        ("at least 0 and below 1", [0, 0.999], [-1e-300, 1]),
        ("above 0 and below inf", [1e300], [math.inf, math.nan]),
    ],
)
def test_a_range_has_the_ends_that_its_words_say(words, inside, outside):
    for value in inside:
        check_range(Config(learning_rate=value), words, "learning_rate")
    for value in outside:
        with pytest.raises(ValueError, match=f"learning_rate must be {words}, not {value}"):
            check_range(Config(learning_rate=value), words, "learning_rate")


def test_a_choice_is_one_of_those_named():
    check_choice(Config(dtype="float32"), "dtype", ("auto", "float32"))
    with pytest.raises(ValueError, match=r"dtype must be one of auto \| float32, not 'float64'"):
        check_choice(Config(dtype="float64"), "dtype", ("auto", "float32"))


def test_without_arguments_all_is_default():
    cfg = configure(Config, [])
    assert cfg == Config()
    assert cfg.given == {}


def test_files_left_to_right_then_keys(tmp_path):
    a = toml(tmp_path, 'n_layer = 1\nout_dir = "a"\nlearning_rate = 1', "a.toml")
    b = toml(tmp_path, "n_layer = 2", "b.toml")
    assert configure(Config, [a, b]).n_layer == 2
    assert configure(Config, [b, a]).n_layer == 1
    cfg = configure(Config, ["--n_layer=3", a, "--n_layer", "4", b])
    assert (cfg.n_layer, cfg.out_dir, cfg.learning_rate) == (4, "a", 1.0)
    assert type(cfg.learning_rate) is float
    assert cfg.given == {"n_layer": "command line", "out_dir": a, "learning_rate": a}


@pytest.mark.parametrize(
    "argv, compile, bias",
    [
        (["--compile"], True, True),
        (["--no-compile"], False, True),
        (["--no-bias"], False, False),
        (["--no_bias"], False, False),
        (["--compile", "--bias=false"], True, False),
        (["--compile=1"], True, True),
        (["--bias=0"], False, False),
        (["--compile=True", "--bias=False"], True, False),
        (["--bias", "false", "--compile", "true"], True, False),
        (["--compile", "1", "--bias", "0"], True, False),
        (["--compile", "--no-compile"], False, True),
    ],
)
def test_booleans(argv, compile, bias):
    cfg = configure(Config, argv)
    assert (cfg.compile, cfg.bias) == (compile, bias)


def test_both_forms_and_values_that_look_like_files_and_keys():
    argv = ["--out_dir", "my.toml", "--n_layer", "-3", "--dtype=--compile", "--learning_rate=1e-3"]
    cfg = configure(Config, argv)
    assert cfg.out_dir == "my.toml"
    assert cfg.n_layer == -3
    assert cfg.dtype == "--compile"
    assert cfg.learning_rate == 1e-3
    assert configure(Config, ["--out_dir=my.toml"]).out_dir == "my.toml"
    assert configure(Config, ["--out_dir=a=b"]).out_dir == "a=b"
    assert configure(Config, ["--out_dir="]).out_dir == ""


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layers=3"], "did you mean n_layer?"),
        (["--n-layer=3"], "did you mean n_layer?"),
        (["--no-compiel"], "compile"),
        (["--xyzzy=3"], "-h lists them all"),
        (["--"], "no key ''"),
        (["n_layer=3"], "expected FILE.toml or --key=value"),
        (
            ["config/train.py"],
            "a .py file would run code; keys stand in a FILE.toml, each as key = value",
        ),
        (["--no-out_dir"], "no key 'no-out_dir'"),
        (["--n_layer"], "--n_layer=INT"),
        (["--n_layer", "--bias"], "--n_layer=INT"),
        (["--n_layer=3.0"], "must be an integer, not '3.0'"),
        (["--n_layer="], "must be an integer"),
        (["--n_layer=x"], "integer"),
        (["--n_layer=" + "9" * 5000], "integer"),
        (["--learning_rate=x"], "must be a finite number, not 'x'"),
        (["--learning_rate=nan"], "finite"),
        (["--learning_rate=1e999"], "finite"),
        (["--compile=yes"], "must be a boolean"),
        (["--compile", "yes"], "cannot read 'yes'"),
        (["nowhere.toml"], "nowhere.toml"),
        (["\0.toml"], ".toml"),
        (["\ud800.toml"], ".toml"),
        (["--n_layer=13"], "n_layer 13 is unlucky: take 12"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(argv, message):
    assert message in refusal(argv)


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layer = 3.0", "n_layer must be an integer, not 3.0"),
        ('n_layer = "3"', "n_layer must be an integer, not '3'"),
        ("n_layer = true", "n_layer must be an integer, not True"),
        ('learning_rate = "1e-3"', "must be a finite number, not '1e-3'"),
        ("learning_rate = nan", "finite"),
        ("learning_rate = inf", "finite"),
        ("learning_rate = 1" + "0" * 400, "finite"),
        ("learning_rate = true", "finite"),
        ("out_dir = 3", "must be a string, not 3"),
        ("compile = 1", "must be a boolean"),
        ('compile = "true"', "must be a boolean"),
        ("n_layer = [3]", "integer"),
        ("n_layer = 1979-05-27", "integer"),
        ("n_layers = 3", "did you mean n_layer?"),
        ("[model]\nn_layer = 3", "no key 'model'"),
        ("n_layer.x = 3", "integer"),
        ("[n_layer]\nn_layer = 3", "n_layer must be an integer"),
        ("n_layer = ", "not a TOML file"),
        ("n_layer = 3\nn_layer = 4", "not a TOML file"),
        ("n_layer = " + "9" * 5000, "not a TOML file"),
        ("n_layer = " + "[" * 100000, "not a TOML file"),
    ],
)
def test_mistakes_in_a_file_are_refused(tmp_path, text, message):
    path = toml(tmp_path, text)
    line = refusal([path])
    assert message in line
    assert path in line


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    assert configure(Config, [toml(tmp_path, "\ufeffn_layer = 3\n")]).n_layer == 3


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'out_dir = "\xe9"')
    assert "not a TOML file" in refusal([str(tmp_path / "latin.toml")])
    (tmp_path / "folder.toml").mkdir()
    assert "cannot read" in refusal([str(tmp_path / "folder.toml")])


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--n_layer=3", "-h"]])
def test_help_lists_every_key_with_default_and_comment(argv, capsys):
    with pytest.raises(SystemExit) as e:
        configure(Config, argv)
    assert e.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert __doc__ in out
    lines = [line.strip() for line in out.splitlines() if line.startswith("  --")]
    keys = [line.split("  ")[0] for line in lines]
    comments = [line.split("  ")[-1].strip() for line in lines]
    assert keys == [f"--{field.name}={field.default!r}" for field in fields(Config)]
    assert comments == [
        "how deep",
        "of the optimizer",
        "where to",
        "with torch.compile",
        "in every Linear",
        "auto | float32",
    ]


SCRIPTS = [
    p.stem
    for p in sorted(ROOT.glob("*.py"))
    if "\n    run(main, Config" in p.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_has_each_key_on_one_line(script):
    module = importlib.import_module(script)
    keys = config.read_keys(str(ROOT / f"{script}.py"), "Config")
    assert {key: default for key, (default, _) in keys.items()} == {
        field.name: field.default for field in fields(module.Config)
    }
    assert all(comment for _, comment in keys.values())


def test_words_stand_anywhere_and_an_unknown_one_names_the_nearest(tmp_path, capsys):
    a = toml(tmp_path, "n_layer = 2")
    argv = ["fry", "--compile", "bake", a, "--out_dir", "bake", "--n_layer=3", "fry"]
    cfg = configure(Config, argv, words=("bake", "fry"))
    assert cfg.words == ["fry", "bake", "fry"]
    assert cfg.compile
    assert cfg.out_dir == "bake"
    assert cfg.n_layer == 3
    assert configure(Config, [], words=("bake",)).words == []
    assert configure(Config, []).words == []
    for word, message in (
        ("bke", "did you mean bake?"),
        ("xyzzy", "expected bake, fry, FILE.toml or --key=value; -h lists them all"),
        ("--bake", "no key 'bake'"),
    ):
        with pytest.raises(Refusal) as e:
            configure(Config, [word], words=("bake", "fry"))
        assert message in str(e.value)
    assert "expected FILE.toml or --key=value" in refusal(["bake"])
    with pytest.raises(SystemExit):
        configure(Config, ["-h"], words=("bake", "fry"))
    assert "\nwords: bake fry\n" in capsys.readouterr().out


ARGUMENTS = st.one_of(
    st.text(),
    st.sampled_from(["--", "-h", "x.toml", "--no-", "--no-bias", "3", "true", "-1", "--no_no_bias"]),
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["--", "", "-", "--no-"]),
        st.sampled_from([f.name for f in fields(Config)] + ["", "n-layer"]),
        st.sampled_from(["", "=", " "]),
        st.sampled_from(["", "3", "true", "0", "1e5", "nan", "x.toml", "13"]),
    ),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(ARGUMENTS, max_size=5))
@example(["--out_dir", "--out_dir", "x.toml"])
@example(["x.toml", "--compile", "x.toml"])
def test_any_arguments_give_a_config_a_refusal_or_help(argv):
    try:
        cfg = configure(Config, argv)
    except Refusal as e:
        assert str(e)
        assert "\n" not in str(e)
    except SystemExit as e:
        assert e.code == 0
        assert "-h" in argv or "--help" in argv
    else:
        assert isinstance(cfg, Config)
        assert all(type(getattr(cfg, field.name)) is field.type for field in fields(Config))


def run_script(folder, body, *argv, stdout=subprocess.PIPE):
    """Returns exit status, stdout and stderr of a script whose main has this body."""
    script = folder / "script.py"
    script.write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom config import Refusal, run\n"
        "@dataclass\nclass Config:\n    n_layer: int = 1  # a number\n"
        f"def main(cfg):\n    {body}\nrun(main, Config)\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, script, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        text=True,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "body, argv, result",
    [
        ("print(cfg.n_layer)", ["--n_layer=2"], (0, "2\n", "")),
        (
            "print(cfg.n_layer)",
            ["--layer=2"],
            (2, "", "script.py: command line: there is no key 'layer'; did you mean n_layer?\n"),
        ),
        ("raise Refusal('it\\nbroke', status=1)", [], (1, "", "script.py: it broke\n")),
        ("raise KeyboardInterrupt", [], (130, "", "")),
    ],
)
def test_a_script_ends_with_its_status_and_one_line(tmp_path, body, argv, result):
    assert run_script(tmp_path, body, *argv) == result


@pytest.mark.parametrize(
    "encoding, text", [("latin-1", b"\xe9\\u201c"), ("utf-8", b"\xc3\xa9\xe2\x80\x9c")]
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, text):
    """As of a console or a file of Windows' cp1252; half a surrogate pair is from a path that is not UTF-8."""
    raw = io.BytesIO()
    output = config.Output(io.TextIOWrapper(raw, encoding))
    output.write("\xe9\u201c\udcff")
    output.flush()
    assert raw.getvalue() == text + b"\\udcff"


def break_pipe(number):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


def fill(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


SINKS = {"closed": os.close, "full": fill, "a pipe that nobody reads": break_pipe}
STDOUT = 1
STDERR = 2
WORK = """
import sys, warnings
from dataclasses import dataclass
from tqdm import tqdm
from config import run

@dataclass
class Config:
    only_prints = ONLY_PRINTS

def main(cfg):
    print("out", flush=FLUSH)
    warnings.warn("err")
    with tqdm(range(3)) as bar:
        for i in bar:
            bar.write("err", file=sys.stderr)
    open("done", "w").close()

run(main, Config)
"""


def run_into(folder, sink, numbers, **names):
    """Returns (status, stdout, stderr, whether the work was done) of WORK with streams that cannot be written to."""
    body = WORK
    for name, value in names.items():
        body = body.replace(name, repr(value))
    (folder / "work.py").write_text(body, encoding="utf-8")
    (folder / "done").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "work.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        preexec_fn=lambda: [SINKS[sink](number) for number in numbers],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr, (folder / "done").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("flush", [True, False])
def test_work_does_not_depend_on_a_reader(tmp_path, sink, flush):
    for only_prints in False, True:
        result = run_into(tmp_path, sink, [STDERR], FLUSH=flush, ONLY_PRINTS=only_prints)
        assert result == (0, "out\n", "", True)
    status, _, err, is_done = run_into(tmp_path, sink, [STDOUT], FLUSH=flush, ONLY_PRINTS=False)
    assert (status, is_done) == (0, True) and err.count("err\n") == 4 and "3/3" in err
    assert "Error" not in err and "ignored" not in err
    result = run_into(tmp_path, sink, [STDOUT, STDERR], FLUSH=flush, ONLY_PRINTS=False)
    assert result == (0, "", "", True)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize(
    "sink, line",
    [
        ("closed", "work.py: cannot print: stdout is closed\n"),
        ("full", "work.py: cannot print: No space left on device\n"),
        ("a pipe that nobody reads", ""),  # of `| head`, which ends it on purpose
    ],
)
def test_a_script_that_only_prints_ends_where_it_cannot(tmp_path, sink, line):
    if sink != "closed" and tuple(map(int, tqdm.__version__.split(".")[:2])) < (4, 70):
        pytest.skip("an older tqdm says at its end that it cannot print, too")
    result = run_into(tmp_path, sink, [STDOUT], FLUSH=True, ONLY_PRINTS=True)
    assert result == (1, "", line, False)
    status, _, err, _ = run_into(tmp_path, sink, [STDOUT], FLUSH=False, ONLY_PRINTS=True)
    assert status == 1 and err.endswith(line) and "ignored" not in err


SLOW_TORCH = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("an error of another kind, as an extension module makes of it")
"""


def interrupt(command, is_time, folder, **env):
    """Returns (status, stdout and stderr) of a process that gets a SIGINT once is_time(line) of a line that
    it prints.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        while not is_time(process.stdout.readline()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        return process.wait(60), process.stdout.read()


@pytest.mark.parametrize("script", sorted({*SCRIPTS, "serve"} - {"toy_stories"}))  # that one needs none
def test_a_python_without_the_packages_is_one_line(tmp_path, script):
    """-S leaves out the folder that packages are installed into."""
    command = [sys.executable, "-S", ROOT / f"{script}.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    problem = rf"{script}\.py: this Python has no (\w+): (.+) -m pip install -r requirements\.txt\n"
    package, python = re.fullmatch(problem, result.stderr).groups()
    assert (result.returncode, result.stdout, python) == (2, "", sys.executable)
    assert metadata.version(package)


@pytest.mark.parametrize("module", ["modle", "filelock.no_such_module"])
def test_an_import_that_no_install_mends_keeps_its_traceback(tmp_path, module):
    """As of a name misspelt in a change, or of a module that a package has no more."""
    for name in "config.py", "requirements.txt":
        shutil.copy(ROOT / name, tmp_path)
    edited = tmp_path / "edited.py"
    edited.write_text(f"import config\nimport {module}\n", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": ""}  # the copy of config.py is the one to import
    command = [sys.executable, edited]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith(f"ModuleNotFoundError: No module named '{module}'\n")


@pytest.mark.skipif(os.name != "posix", reason="a signal to a process")
@pytest.mark.parametrize(
    "script", ["train", "finetune_lora", "sample", "eval", "export_onnx", "hf", "bench"]
)
def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path, script):
    (tmp_path / "torch.py").write_text(SLOW_TORCH, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    command = [ROOT / f"{script}.py", "--no_such_key"]
    result = interrupt(command, lambda line: line == "importing\n", tmp_path, PYTHONPATH=path)
    assert result == (130, "")


@pytest.mark.skipif(os.name != "posix", reason="a signal to a process")
@pytest.mark.parametrize("module", ["numpy.linalg", "torch.types", "torch.nn.modules.linear"])
def test_ctrl_c_anywhere_in_the_import_of_torch_is_quiet(tmp_path, module):
    command = ["-X", "importtime", ROOT / "train.py", "--no_such_key"]
    status, printed = interrupt(command, lambda line: line.rsplit("|")[-1].strip() == module, tmp_path)
    assert status == 130
    assert all(line.startswith("import time:") for line in printed.splitlines())


def test_want_of_memory_is_one_line_wherever_it_comes(monkeypatch, capsys):
    """numpy's and torch's own errors of sizes that no machine has."""

    def by_numpy(cfg):
        np.empty(2**60, dtype=np.int8)

    def by_torch(cfg):
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr("sys.argv", ["train.py"])
    for main in by_numpy, by_torch:
        with pytest.raises(SystemExit) as e:
            config.run(main, train.Config)
        assert e.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("train.py: out of memory: ") and error.count("\n") == 1


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch):
    def main(cfg):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(RuntimeError, match="shapes"):
        config.run(main, train.Config)
