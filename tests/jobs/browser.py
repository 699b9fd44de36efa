"""Headless Chromium spoken to over its own pipe: real keys, its console, its pictures; no library for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
TIMEOUT_S = 120


class Page:
    """One open page. `complaints`: what its console said so far."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def open(self, url: str, *, width: int, dark: bool) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        self._wait_for("document.readyState === 'complete' && location.href !== 'about:blank'", url)

    def reload(self) -> None:
        self.ask("window.isOld = true")
        self.call("Page.reload")
        self._wait_for("document.readyState === 'complete' && !window.isOld", "the page")

    def _wait_for(self, condition: str, what: str) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not self.ask(condition):
            assert time.monotonic() < until, f"{what} did not load"
            time.sleep(0.05)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key goes down and up, as a person's."""
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **fields, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next(method)
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said.get('error')}"
                return said["result"]
            if said.get("method") in COMPLAINTS:
                self.complaints.append(json.dumps(said["params"]))

    def _next(self, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], TIMEOUT_S)
            assert ready, f"the browser did not answer {method} within {TIMEOUT_S} s"
            more = os.read(self._back, 1 << 20)
            assert more, f"the browser ended during {method}"
            self._rest += more
        body, self._rest = self._rest.split(b"\0", 1)
        return json.loads(body)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a Chromium of its own, with a profile in `folder`."""
    read_3, to = os.pipe()
    back, write_4 = os.pipe()
    # The browser reads descriptor 3 and writes 4: a shell puts them there.
    shell = f'exec "$0" "$@" 3<&{read_3} 4>&{write_4}'
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    process = subprocess.Popen(
        ["bash", "-c", shell, str(CHROMIUM), *flags, f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(read_3, write_4), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_3)
    os.close(write_4)
    try:
        yield Page(to, back)
    finally:
        process.terminate()
        process.wait(30)
        os.close(to)
        os.close(back)
