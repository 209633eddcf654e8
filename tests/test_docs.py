"""The commands of README.md, docs/ and -h, which a reader pastes one after the other."""

import ast
import shlex
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# where a script writes, by its keys
PLACES = {
    "prepare.py": "data/{name}",
    "quantize.py": "{to}",
    "hf.py": "{to}",
    "export_onnx.py": "{out_dir}/onnx",
}
TRAINING = "train finetune_lora finetune_dpo finetune_reward finetune_ppo".split()
PLACES |= {f"{name}.py": "{out_dir}" for name in TRAINING}


def commands():
    """Yields the words of each command that starts with python."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("    python ") and line.count('"') % 2 == 0:
                for command in line.partition(" # ")[0].split("&&"):
                    yield shlex.split(command)


def written_place(words):
    """Returns the place that a command writes to, which must be free; None for one that writes nowhere, to what is
    there, or to a place that the reader names.
    """
    _, script, *rest = words
    keys = dict(word.removeprefix("--").partition("=")[::2] for word in rest)
    goes_on = keys.get("init_from") == "resume" or "merge" in keys
    if script not in PLACES or goes_on or {"--to=FOLDER", "--pos=POS", "[--bits=32|16|8|4]"} & {*rest}:
        return None
    return PLACES[script].format_map(defaultdict(lambda: f"the default of {script}", keys))


def test_no_command_of_a_page_writes_where_another_has():
    places = Counter(filter(None, map(written_place, commands())))
    assert len(places) > 25
    assert [place for place, n in places.items() if n > 1] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_a_docstring_prints_as_it_is_written_but_for_backslashes(path):
    """A new line within a command's quotes would be one that no shell takes."""
    source = path.read_text(encoding="utf-8")
    first, *_ = ast.parse(source).body
    if isinstance(first, ast.Expr):
        written = ast.get_source_segment(source, first)
        assert written[3:-3].replace(r"\\", "\\") == first.value.value
