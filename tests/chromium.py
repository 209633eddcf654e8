"""A real Chromium without a window, driven through the DevTools protocol over a pipe.

Nothing has to be installed beside it.
"""

import json
import os
import shutil
import subprocess
import threading

import browsers

PROGRAMS = "chromium", "chromium-browser", "google-chrome", "chrome"
PATH = next(filter(None, map(shutil.which, PROGRAMS)), None)
KEY_CODES = {
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


class Browser(browsers.Browser):
    PAGE_IS_LOADING = "-32000"

    def __init__(self, folder):
        super().__init__()
        self.session = None
        self.launch(folder)
        threading.Thread(target=self.listen, daemon=True).start()
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.send(f"{domain}.enable")
        # workers too
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def launch(self, folder):
        """Starts the process, which reads messages from its descriptor 3 and writes them to 4."""
        browser_input, self.output = os.pipe()
        self.input, browser_output = os.pipe()
        flags = [
            "--headless=new",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--no-first-run",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        redirect = f'exec "$@" 3<&{browser_input} 4>&{browser_output}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", PATH, *flags, "about:blank"],
            pass_fds=(browser_input, browser_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_input)
        os.close(browser_output)

    def listen(self):
        """Takes in the messages, which end with a null byte, until the browser is gone."""
        rest = b""
        while chunk := os.read(self.input, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                self.receive(message)

    def receive_event(self, method, params):
        if method == "Target.attachedToTarget" and params["targetInfo"]["type"] == "worker":
            for command in "Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger":
                self.write(params["sessionId"], command)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"])[:500])
        elif method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])

    def write(self, session, method, **params):
        """Writes a message to a session, or to the browser where that is None; returns its number."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        rest = json.dumps(message).encode() + b"\0"
        while rest:  # a pipe takes a part of what is long
            written = os.write(self.output, rest)
            rest = rest[written:]
        return number

    def send(self, method, **params):
        return self.result(self.write(self.session, method, **params), method)

    def run(self, script):
        response = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in response:
            raise RuntimeError(json.dumps(response["exceptionDetails"])[:2000])
        return response["result"].get("value")

    def navigate(self, url):
        self.send("Page.navigate", url=url)

    def key(self, key, modifiers=0):
        press = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": KEY_CODES[key],
            "modifiers": modifiers,
        }
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **press, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **press)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def mouse(self, element, click=False):
        place = self.middle(element)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if click:
            button = {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type="mousePressed", **button, **place)
            self.send("Input.dispatchMouseEvent", type="mouseReleased", **button, **place)

    def tap(self, element):
        place = self.middle(element)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def size(self, width, height, mobile=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)

    def close(self):
        try:
            self.session = None
            self.send("Browser.close")
            self.process.wait(20)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.output)
