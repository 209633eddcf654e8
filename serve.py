"""Serves the page in browser/ and a model exported by export_onnx.py, to this machine alone.

    make browser                              installs, exports the demo model if need be, and serves
    python serve.py --model=out/ts/onnx       another model; or --model=out/ts/onnx/model_int8.onnx
    python serve.py --port=0                  at any free port

Nothing but the files named in FILES and MODEL leaves the disk.
"""

import errno
import os
import sys
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from config import Refusal, check_range, run
from folders import onnx_advice, split_onnx

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "browser")
ORT = "node_modules/onnxruntime-web/dist/"
FILES = [
    "index.html",
    "style.css",
    "app.js",
    "model.js",
    "sample.js",
    "spans.js",
    "settings.js",
    "tokenizer.js",
    "get.js",
    ORT + "ort.wasm.min.mjs",
    ORT + "ort-wasm-simd-threaded.mjs",
    ORT + "ort-wasm-simd-threaded.wasm",
]
MODEL = ["model/config.json", "model/tokenizer.json", "model/model.onnx"]
TYPES = {  # not the system's own table, which may hold anything
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".onnx": "application/octet-stream",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
    "img-src data:; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next one a page may have threads and exact clocks
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass
class Config:
    model: str = "out/demo/onnx"  # the folder that export_onnx.py wrote, or one .onnx file in it
    port: int = 8000  # 0 = any free one, as where 8000 is taken and no port was given

    def __post_init__(self):
        check_range(self, "at least 0 and at most 65535", "port")


class Handler(SimpleHTTPRequestHandler):
    """Answers with the page's files and the model's, and with 404 for any other path."""

    extensions_map = TYPES
    protocol_version = "HTTP/1.1"

    def send_head(self):
        # a foreign page may have its own name resolve to this machine (DNS rebinding)
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            return self.send_error(403)
        # a browser may ask by the date of another folder's file, which was served at this port before
        del self.headers["If-Modified-Since"]
        return super().send_head()

    def translate_path(self, path):
        name = path.partition("?")[0].removeprefix("/") or "index.html"
        if name in FILES:
            return os.path.join(HERE, name)
        if name not in MODEL:
            return os.path.join(HERE, "there is no such file")
        file = self.server.file if name.endswith(".onnx") else os.path.basename(name)
        return os.path.join(self.server.folder, file)

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Prints the errors of a request, but not that a page was closed or loaded again."""

    def handle_error(self, *args):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


def serve(model, port):
    """Returns the server, bound to 127.0.0.1 and not started. Raises OSError where the port is taken."""
    server = Server(("127.0.0.1", port), Handler)
    server.folder, server.file = split_onnx(model)
    return server


def main(cfg):
    folder, file = split_onnx(cfg.model)
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        raise Refusal(f"there is no {path}; {onnx_advice(folder, file)}")
    if not os.path.isfile(os.path.join(HERE, FILES[-1])):
        raise Refusal("onnxruntime-web is not installed: make browser, or npm ci in browser/")
    try:
        server = serve(cfg.model, cfg.port)
    except OSError as e:
        if "port" in cfg.given or e.errno != errno.EADDRINUSE:
            raise Refusal(f"cannot serve at port {cfg.port}: {e.strerror}; --port=0 takes any free one")
        server = serve(cfg.model, 0)
    print(f"http://127.0.0.1:{server.server_port}    Ctrl-C ends it", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run(main, Config)
