#!/bin/sh
# torch 2.14.1: torch.compile on a processor without AVX-512, with the artifacts that torch.compiler.save_cache_artifacts wrote on one
# that has it. (ATEN_CPU_CAPABILITY=avx2 stands in for the former. The script needs a processor with AVX-512.)
# One would guess: artifacts of another processor are not used, as those of another GPU are not, or they are compiled anew and right.
# What happens: they are used, and most of what they compute is wrong, without a word. The key of a cached graph (FxGraphHashDetails
# and CacheBase.get_system, torch/_inductor/codecache.py) has the GPU's name, but of a processor nothing. The graph on disk holds its
# C++ as text, whose loops go on by 16 numbers, as a vector of AVX-512 has. That text is compiled for the processor at hand, whose
# vectors have 8, so that the second half of each 16 is neither read nor written: sums lack half of their numbers, and outputs keep
# what lay in memory there. A run that trains has wrong losses or nan. The same holds for a cache folder that two such machines
# share (TORCHINDUCTOR_CACHE_DIR, a home folder, an image that was warmed up), as the folder's files have the same keys.
# Another such mixture ended the process; it is not kept here.
# Output seen (what the wrong one computes differs from run to run):
#   AVX512, plain: loss 2.3655, its gradient norm 0.4271
#   AVX512, compiled: graphs from the cache 0; loss 2.3655, its gradient norm 0.4271
#   AVX2, compiled: graphs from the cache 0; loss 2.3655, its gradient norm 0.4271
#   AVX2, compiled with artifacts: graphs from the cache 3; loss nan, its gradient norm nan
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6 setuptools
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, target = torch.randn(2, 64, 256, generator=generator).unbind()
up = torch.randn(1024, 256, generator=generator) / 16
down = torch.randn(256, 512, generator=generator) / 23


def mlp(x, up, down, target):
    """The loss of a norm and a SwiGLU with a residual."""
    gate, value = F.linear(F.rms_norm(x, (256,)), up).chunk(2, -1)
    return F.mse_loss(x + F.linear(F.silu(gate) * value, down), target)


def measure(function):
    weight = up.clone().requires_grad_()
    loss = function(x, weight, down, target)
    loss.backward()
    return loss.item(), weight.grad.norm().item()


artifacts, kind = sys.argv[1:]
if kind == "read":
    with open(artifacts, "rb") as file:
        torch.compiler.load_cache_artifacts(file.read())
exact = measure(mlp)
result = measure(torch.compile(mlp))
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
capability = torch.backends.cpu.get_cpu_capability()
if kind == "write":
    with open(artifacts, "wb") as file:
        file.write(torch.compiler.save_cache_artifacts()[0])
    print("{}, plain: loss {:.4f}, its gradient norm {:.4f}".format(capability, *exact))
label = "compiled with artifacts" if kind == "read" else "compiled"
print("{}, {}: graphs from the cache {}; loss {:.4f}, its gradient norm {:.4f}".format(capability, label, hits, *result))
is_right = all(abs(a - b) < 1e-4 * b for a, b in zip(result, exact))
is_as_seen = is_right != (kind == "read") and (hits > 0) == (kind == "read")
raise SystemExit(not is_as_seen or capability != ("AVX512" if kind == "write" else "AVX2"))
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/one" "$folder/venv/bin/python" "$folder/run.py" "$folder/artifacts" write
export ATEN_CPU_CAPABILITY=avx2
TORCHINDUCTOR_CACHE_DIR="$folder/two" "$folder/venv/bin/python" "$folder/run.py" "$folder/artifacts" none
TORCHINDUCTOR_CACHE_DIR="$folder/three" "$folder/venv/bin/python" "$folder/run.py" "$folder/artifacts" read
