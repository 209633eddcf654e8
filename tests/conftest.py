"""Puts the scripts on the path and cuts off the network, here and in the processes that tests start."""

import os
import sys
from pathlib import Path

tests = Path(__file__).parent
offline = tests / "offline"
sys.path.insert(0, str(tests.parent))

# for the processes that tests start
folders = [str(offline), str(tests), str(tests.parent)]
if os.environ.get("PYTHONPATH"):
    folders.append(os.environ["PYTHONPATH"])
os.environ["PYTHONPATH"] = os.pathsep.join(folders)
# and for this one
exec((offline / "sitecustomize.py").read_text(encoding="utf-8"))

# the tensors are small, tests run side by side, and threads that wait for each other spin
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_terminal_summary(terminalreporter):
    """Prints how the tests of rmsnorm_kernel.cu ended, in the four groups that test_rmsnorm.py names."""
    groups = []
    for group in "ops", "host", "nvcc", "device":
        counts = []
        for outcome in "passed", "failed", "skipped", "error":
            reports = terminalreporter.stats.get(outcome, ())
            count = sum(f"test_rmsnorm.py::test_{group}" in report.nodeid for report in reports)
            if count:
                counts.append(f"{count} {outcome}")
        groups.append(f"{group} {', '.join(counts) or 'not run'}")
    terminalreporter.write_line(f"rmsnorm_kernel.cu: {'; '.join(groups)}")
