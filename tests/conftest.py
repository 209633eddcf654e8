import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import torch
    torch.set_num_threads(1)  # the tensors are small, and threads that wait for each other spin
except ImportError:
    pass
