"""Chromium without a window, steered over its own protocol (--remote-debugging-pipe): no driver, no package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

PATIENCE = 120
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900"]


def find():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab."""

    def __init__(self, folder):
        commands, self.out = high_pipe()
        self.into, answers = high_pipe()
        # It reads commands from descriptor 3 and answers on 4.
        redirect = f'exec "$@" 3<&{commands} 4>&{answers} {commands}<&- {answers}>&-'
        command = ["bash", "-c", redirect, "bash", find(), *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        log = open(folder / "chromium.log", "w")
        self.process = subprocess.Popen(command, pass_fds=(commands, answers), stdout=log, stderr=log)
        os.close(commands)
        os.close(answers)
        self.rest, self.number, self.session = b"", 0, None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tell("Page.enable")

    def tell(self, method, **params):
        """A command and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def next_message(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], PATIENCE)
            assert ready, f"the browser said nothing for {PATIENCE} s"
            news = os.read(self.into, 1 << 20)
            assert news, "the browser went away"
            self.rest += news
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url):
        self.tell("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression in the page, awaited if it is a promise."""
        answer = self.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, script):
        """Until the expression is true."""
        end = time.monotonic() + PATIENCE
        while True:
            if self.run(f"!!({script})"):
                return
            assert time.monotonic() < end, f"not yet {script}:\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def fill(self, field, text):
        """As somebody who types and leaves the field."""
        self.run(f"(f => {{ f.value = {json.dumps(text)}; f.dispatchEvent(new Event('change')); }})(document.getElementById('{field}'))")

    def click(self, field):
        self.run(f"document.getElementById('{field}').click()")

    def choose_file(self, field, path):
        root = self.tell("DOM.getDocument")["root"]["nodeId"]
        node = self.tell("DOM.querySelector", nodeId=root, selector=f"#{field}")["nodeId"]
        self.tell("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"]))

    def end(self):
        self.session = None
        self.tell("Browser.close")
        assert self.process.wait(timeout=PATIENCE) == 0
        os.close(self.out)
        os.close(self.into)


def high_pipe():
    """Above the descriptors that the browser wants for itself."""
    pair = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pair]
    for end in pair:
        os.close(end)
    return ends
