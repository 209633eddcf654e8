#!/bin/sh
# torch 2.13.0: torchrun --max_restarts with a --master_port or an --rdzv_endpoint of one's own, processes on gloo.
# One would guess: after a worker has failed all are started again and find each other, as with --standalone.
# What happens: the store outlives the attempt, the new processes read the dead ones' addresses in it, and no restart
# ever connects. A PrefixStore named by TORCHELASTIC_RESTART_COUNT, given to init_process_group, helps.
# Output seen: "standalone 2, master_port 0, endpoint 0, master_port with a prefix 2 processes met again"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
options = {}
if "prefix" in sys.argv:
    store, rank, size = next(dist.rendezvous("env://"))
    options = {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": size}
dist.init_process_group("gloo", **options)
x = torch.ones(1)
dist.all_reduce(x)
if attempt == "0" and dist.get_rank() == 1:
    sys.exit(3)  # which ends this process with an error: all are started again
if attempt == "1":
    print("met again", flush=True)
dist.all_reduce(x)
dist.destroy_process_group()
PYTHON
port() { "$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
met() { "$folder/venv/bin/torchrun" --nproc_per_node=2 --max_restarts=1 "$@" 2> "$folder/log" | grep -c "met again" || true; }
own=$(met --standalone "$folder/run.py")
static=$(met --master_port="$(port)" "$folder/run.py")
endpoint=$(met --rdzv_backend=c10d --rdzv_id=1 --rdzv_endpoint="localhost:$(port)" "$folder/run.py")
prefix=$(met --master_port="$(port)" "$folder/run.py" prefix)
seen="standalone $own, master_port $static, endpoint $endpoint, master_port with a prefix $prefix processes met again"
echo "$seen"
test "$seen" = "standalone 2, master_port 0, endpoint 0, master_port with a prefix 2 processes met again"
