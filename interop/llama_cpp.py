"""llama.cpp itself, prebuilt in PyPI's xllamacpp, on a GGUF file: bench.py races it, and tests compare with it.

llama = server("out/demo.gguf", n_ctx=256)
ids = write(llama, [0, 17, 4], 100)
"""

import json
import urllib.request


def server(path, n_ctx, n_threads=1, exact=False):
    """Returns a server of a GGUF file with room for n_ctx tokens. exact: keys and values in float32, without
    flash attention. Raises ImportError without xllamacpp.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def post(llama, path, **data):
    """Returns the answer of a server."""
    headers = {"Content-Type": "application/json"}
    address = f"{llama.listening_address}/{path}"
    request = urllib.request.Request(address, json.dumps(data).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def write(llama, prompt, n):
    """Returns n greedy ids after a prompt, ids, whatever they are."""
    settings = dict(temperature=0, n_predict=n, ignore_eos=True, cache_prompt=False, return_tokens=True)
    return post(llama, "completion", prompt=prompt, **settings)["tokens"]
