"""A real Firefox without a window, driven through WebDriver BiDi over a WebSocket.

Nothing has to be installed beside it.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import browsers

PROGRAMS = "firefox", "firefox-esr"
PATH = next(filter(None, map(shutil.which, PROGRAMS)), None)
KEYS = {  # WebDriver's characters
    "Tab": "\ue004",
    "Enter": "\ue007",
    "Shift": "\ue008",
    "Escape": "\ue00c",
    "End": "\ue010",
    "Home": "\ue011",
    "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013",
    "ArrowRight": "\ue014",
    "ArrowDown": "\ue015",
}


class WebSocket:
    """A client's end of one (RFC 6455), for texts that are not split."""

    def __init__(self, host, port, path):
        self.socket = socket.create_connection((host, port))
        self.input = self.socket.makefile("rb")
        request = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
            "\r\n",
        ]
        self.socket.sendall("\r\n".join(request).encode())
        status = self.input.readline()
        if b" 101 " not in status:
            raise ConnectionError(f"no WebSocket: {status}")
        while self.input.readline().strip():
            pass

    def send(self, text):
        data = text.encode()
        size = len(data)
        if size < 126:
            length = bytes([size])
        elif size < 1 << 16:
            length = bytes([126]) + size.to_bytes(2, "big")
        else:
            length = bytes([127]) + size.to_bytes(8, "big")
        head = bytes([0x81, 0x80 | length[0]]) + length[1:]
        mask = b"\1\1\1\1"  # Firefox takes any but zeros
        self.socket.sendall(head + mask + bytes(byte ^ 1 for byte in data))

    def texts(self):
        """Yields what comes until the other end closes."""
        while head := self.input.read(2):
            kind, size = head
            if size > 125:
                size = int.from_bytes(self.input.read(2 if size == 126 else 8), "big")
            data = self.input.read(size)
            if kind == 0x81:
                yield data.decode()


class Browser(browsers.Browser):
    PAGE_IS_LOADING = "no such frame"

    def __init__(self, folder):
        super().__init__()
        self.launch(folder)
        threading.Thread(target=self.listen, daemon=True).start()
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        # the focus of the first tab is in the address bar
        self.page = self.send("browsingContext.create", type="tab")["context"]
        [window] = self.send("browsingContext.getTree", **{"moz:scope": "chrome"})["contexts"]
        self.window = window["context"]

    def launch(self, folder):
        """Starts the process, which leaves its address in its profile."""
        flags = [
            "--headless",
            "--no-remote",
            "--profile",
            str(folder),
            "--remote-debugging-port=0",
            "--remote-allow-system-access",  # for size()
        ]
        self.process = subprocess.Popen(
            [PATH, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        path = Path(folder) / "WebDriverBiDiServer.json"
        end = time.monotonic() + 60
        while not (path.exists() and path.read_text().endswith("}")):
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError("Firefox does not start")
            time.sleep(0.05)
        address = json.loads(path.read_text())
        self.socket = WebSocket(address["ws_host"], address["ws_port"], "/session")

    def listen(self):
        for text in self.socket.texts():
            self.receive(text)

    def receive_event(self, method, params):
        if method == "log.entryAdded" and params["level"] in ("error", "warn"):
            self.errors.append(json.dumps(params)[:500])
        elif method == "network.beforeRequestSent":
            self.urls.append(params["request"]["url"])

    def send(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        return self.result(number, method)

    def evaluate(self, script, context):
        response = self.send(
            "script.evaluate",
            expression=script,
            target={"context": context},
            awaitPromise=True,
            userActivation=True,
        )
        if response["type"] == "exception":
            raise RuntimeError(json.dumps(response["exceptionDetails"])[:2000])
        return response["result"].get("value")

    def run(self, script):
        script = f"Promise.resolve({script}).then(value => JSON.stringify(value))"
        return json.loads(self.evaluate(script, self.page) or "null")

    def navigate(self, url):
        self.send("browsingContext.navigate", context=self.page, url=url, wait="complete")

    def act(self, kind, actions, device="keyboard", **parameters):
        source = {"type": kind, "id": device, "actions": actions, **parameters}
        self.send("input.performActions", context=self.page, actions=[source])

    def key(self, key, modifiers=0):
        keys = ["Shift", key] if modifiers else [key]
        downs = [{"type": "keyDown", "value": KEYS[key]} for key in keys]
        ups = [{"type": "keyUp", "value": KEYS[key]} for key in reversed(keys)]
        self.act("key", downs + ups)

    def type(self, text):
        self.run(f"document.execCommand('insertText', false, {json.dumps(text)})")

    def point(self, device, element, click):
        place = {name: round(value) for name, value in self.middle(element).items()}
        move = {"type": "pointerMove", **place}
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        actions = [move, *press] if click else [move]
        self.act("pointer", actions, device, parameters={"pointerType": device})

    def mouse(self, element, click=False):
        self.point("mouse", element, click)

    def tap(self, element):
        self.point("touch", element, click=True)

    def size(self, width, height, mobile=False):
        self.send(
            "browsingContext.setViewport",
            context=self.page,
            viewport={"width": width, "height": height},
            devicePixelRatio=2 if mobile else 1,
        )
        # (pointer: coarse), as in Firefox's own view of phones
        touch = "enabled" if mobile else "none"
        tab = "gBrowser.selectedBrowser.browsingContext"
        self.evaluate(f"{tab}.touchEventsOverride = '{touch}'", self.window)

    def close(self):
        try:
            self.send("browser.close")
            self.process.wait(20)
        except Exception:
            self.process.kill()
            self.process.wait()
        self.socket.socket.close()
