"""llama.cpp, from PyPI's xllamacpp, which has it prebuilt: bench.py races it, and tests compare with it.

    llama = Server("out/demo.gguf", n_ctx=256)
    ids = llama.write([0, 17, 4], 100)

It runs in a process of its own, which is killed at the end: a server of xllamacpp 2026.10 that is shut down
soon after its start sometimes hangs.
"""

import json
import os
import subprocess
import sys
import urllib.request
import weakref

ADDRESS = "listens at "


class Server:
    """A server of a GGUF file with room for n_ctx tokens. exact: keys and values in float32, without flash
    attention. Raises ImportError without xllamacpp, RuntimeError where llama.cpp does not take the file.
    """

    def __init__(self, path, n_ctx, n_threads=1, exact=False):
        import xllamacpp  # noqa: F401

        command = [sys.executable, __file__, str(path), str(n_ctx), str(n_threads), str(exact)]
        # it ends when its input does, also if this process is killed
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        process = subprocess.Popen(command, **pipes)
        weakref.finalize(self, process.kill)
        for line in process.stdout:
            if line.startswith(ADDRESS):
                break
        else:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.address = line.removeprefix(ADDRESS).strip()

    def post(self, path, **data):
        """Returns the answer of one of its addresses."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/{path}", json.dumps(data).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def write(self, prompt, n):
        """Returns n greedy ids after a prompt, ids; the end of a text is not among them."""
        settings = dict(temperature=0, n_predict=n, ignore_eos=True, cache_prompt=False)
        return self.post("completion", prompt=prompt, return_tokens=True, **settings)["tokens"]


def serve(path, n_ctx, n_threads, exact):
    """Serves a file until the input ends, and prints where."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(f"{ADDRESS}{server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    path, n_ctx, n_threads, exact = sys.argv[1:]
    serve(path, int(n_ctx), int(n_threads), exact == "True")
