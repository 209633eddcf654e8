"""Scripts as a user runs them: in this process, or from a shell."""

import contextlib
import subprocess
import sys
from pathlib import Path

from config import configure

ROOT = Path(__file__).parents[1]


def call(script, *argv, folder="."):
    """Runs a script, which is a module, in folder; argv is its command line."""
    with contextlib.chdir(folder):
        script.main(configure(script.Config, argv))


def printed(capsys, script, *argv, folder="."):
    """Returns what a script prints."""
    capsys.readouterr()
    call(script, *argv, folder=folder)
    return capsys.readouterr().out


def shell(script, *argv, folder=ROOT, **settings):
    """Runs script.py in a new Python, as from a shell; returns the subprocess.CompletedProcess.

    settings: more of subprocess.run's.
    """
    return subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


def written(output):
    """Returns the text that sample.py wrote, of one sample, from what it printed around it."""
    return output.split("-" * 80)[1]
