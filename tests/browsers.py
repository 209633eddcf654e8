"""What the tests' two browsers share: numbered messages of JSON, and one page that scripts look into."""

import itertools
import json
import queue
import time


class Browser:
    """One page. errors collects what its console reports, urls what it requests.

    A subclass has send(), receive_event(), run(), navigate(), what hands do, and PAGE_IS_LOADING, a part of
    the error of a script whose page goes away under it.
    """

    def __init__(self):
        self.responses = queue.Queue()
        self.numbers = itertools.count()
        self.errors = []
        self.urls = []

    def send(self, method, **params):
        """Writes a message about the page and returns the result that comes back."""
        raise NotImplementedError

    def run(self, script):
        """Returns the value of a JavaScript expression in the page, or what its promise resolves to."""
        raise NotImplementedError

    def receive(self, text):
        """Takes in a message of the browser's."""
        message = json.loads(text)
        if "id" in message:
            self.responses.put(message)
        else:
            self.receive_event(message["method"], message.get("params", {}))

    def result(self, number, method):
        """Waits for the response to the message with a number, and returns what it brings."""
        response = self.responses.get(timeout=120)
        while response["id"] != number:
            response = self.responses.get(timeout=120)
        if "error" in response:
            raise RuntimeError(f"{method}: {response}")
        return response["result"]

    def wait(self, script, seconds=20):
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.run(script):
                    return
            except RuntimeError as e:
                if self.PAGE_IS_LOADING not in str(e):
                    raise
            time.sleep(0.02)
        text = self.run("document.body?.innerText")
        raise TimeoutError(f"{script} is still false; the page shows {text!r}")

    def open(self, url):
        self.navigate(url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def middle(self, element):
        """Scrolls a JavaScript expression's element into view; returns the middle of its first line."""
        return self.run(f"""(element => {{
            element.scrollIntoView({{ block: "nearest" }});
            const line = element.getClientRects()[0];
            return {{ x: line.x + line.width / 2, y: line.y + line.height / 2 }};
        }})({element})""")
