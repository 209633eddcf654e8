import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

tests = Path(__file__).parent
offline = tests / "offline"
# for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join([str(offline), str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
exec((offline / "sitecustomize.py").read_text(encoding="utf-8"))

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are small, tests run side by side, and threads that wait for each other spin
