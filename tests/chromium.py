"""A real Chromium without a window, driven through the DevTools protocol over a pipe (--remote-debugging-pipe): nothing to install beside it."""

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
import time

PATH = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Browser:
    """One page. `errors` collects what the console was told, `urls` what was asked for."""

    def __init__(self, folder):
        to_read, self.out = os.pipe()
        self.inp, to_write = os.pipe()
        flags = [
            "--headless=new",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--no-first-run",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", PATH, *flags, "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.answers, self.numbers, self.session, self.errors, self.urls = (
            queue.Queue(),
            itertools.count(),
            None,
            [],
            [],
        )
        threading.Thread(target=self.listen, daemon=True).start()
        target = next(
            t["targetId"] for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.send(f"{domain}.enable")
        self.send(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )  # workers too
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def listen(self):
        left = b""
        while chunk := os.read(self.inp, 1 << 16):
            *messages, left = (left + chunk).split(b"\0")
            for m in map(json.loads, messages):
                kind, p = m.get("method", ""), m.get("params", {})
                if "id" in m:
                    self.answers.put(m)
                elif kind == "Target.attachedToTarget" and p["targetInfo"]["type"] == "worker":
                    for method in "Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger":
                        self.write(p["sessionId"], method)
                elif kind == "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(p["exceptionDetails"])[:500])
                elif kind == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                    self.errors.append(json.dumps(p["args"])[:500])
                elif kind == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                    self.errors.append(json.dumps(p["entry"])[:500])
                elif kind == "Network.requestWillBeSent":
                    self.urls.append(p["request"]["url"])

    def write(self, session, method, **params):
        n = next(self.numbers)
        message = {"id": n, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        left = json.dumps(message).encode() + b"\0"
        while left:  # a pipe takes a part of what is long
            left = left[os.write(self.out, left) :]
        return n

    def send(self, method, **params):
        n = self.write(self.session, method, **params)
        while (answer := self.answers.get(timeout=120))["id"] != n:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def run(self, script):
        """The value of a JavaScript expression in the page; of a promise, what it gives."""
        result = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def wait(self, script, seconds=20):
        """The value of the expression as soon as it is true."""
        end, value = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if value := self.run(script):
                    return value
            except RuntimeError as e:
                if "-32000" not in str(e):  # that the page is being loaded again
                    raise
            time.sleep(0.02)
        raise TimeoutError(
            f"{script} is still {value!r}; the page says: {self.run('document.body?.innerText')!r}"
        )

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def key(self, key, modifiers=0):
        codes = {
            "Enter": 13,
            "Escape": 27,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Tab": 9,
            "Home": 36,
            "End": 35,
        }
        p = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", **p, **({"text": "\r"} if key == "Enter" else {})
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", **p)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def at(self, script):
        """The middle of the first line of an element."""
        return self.run(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const r = e.getClientRects()[0]; return {{x: r.x + r.width / 2, y: r.y + r.height / 2}}; }})({script})"
        )

    def mouse(self, script, click=False):
        place = self.at(script)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def tap(self, script):
        place = self.at(script)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def size(self, width, height, mobile=False, dark=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def screenshot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        try:
            self.session = None
            self.send("Browser.close")
            self.process.wait(20)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
