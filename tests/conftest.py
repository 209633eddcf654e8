import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

tests = Path(__file__).parent
offline = tests / "offline"
# for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(offline), str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
exec((offline / "sitecustomize.py").read_text(encoding="utf-8"))

# the tensors are small, tests run side by side, and threads that wait for each other spin
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_terminal_summary(terminalreporter):
    """Says in which ways rmsnorm_kernel.cu was checked: as ops of torch, its kernels on the processor, by nvcc, on a GPU."""
    ran = []
    for way in "ops", "host", "nvcc", "device":
        outcomes = [
            f"{len(result)} {outcome}"
            for outcome in ("passed", "failed", "skipped", "error")
            if (
                result := [
                    r
                    for r in terminalreporter.stats.get(outcome, ())
                    if f"test_rmsnorm.py::test_{way}" in r.nodeid
                ]
            )
        ]
        ran.append(f"{way} {', '.join(outcomes) or 'not run'}")
    terminalreporter.write_line(f"rmsnorm_kernel.cu: {'; '.join(ran)}")
