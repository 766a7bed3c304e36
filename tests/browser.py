"""Headless Chromium by its own protocol (Chrome DevTools Protocol), for the tests of the playground. It needs no
driver; the websocket is aiohttp's, which BentoML brings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-first-run", "--disable-gpu", "--disable-extensions", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--mute-audio", "--window-size=1200,1600",
    "--remote-debugging-port=0",
)  # fmt: skip


def found() -> str | None:
    """The browser that PATCHBAY_CHROMIUM names, or the first that is on the path; None where there is none."""
    return os.environ.get("PATCHBAY_CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)


class Page:
    """One open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.asked = 0
        self.faults: list[str] = []
        """exceptions of the page's script and what its policy refused"""

    async def send(self, method: str, **params: Any) -> Any:
        """The result of one command. Raises RuntimeError with the browser's words."""
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": params})
        while True:
            said = await self.socket.receive_json(timeout=30)
            if said.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(said["params"]["exceptionDetails"])[:600])
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.faults.append(json.dumps(said["params"]["entry"])[:600])
            if said.get("id") == self.asked:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return said["result"]

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, as JSON would hold it."""
        got = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    async def until(self, expression: str, seconds: float = 20) -> Any:
        """The first value of `expression` that is true."""
        for _ in range(int(seconds / 0.05)):
            if got := await self.value(expression):
                return got
            await asyncio.sleep(0.05)
        text = await self.value("document.body.innerText")
        raise AssertionError(f"never true: {expression}\nThe page says:\n{text}\n{self.faults}")

    async def click(self, text: str) -> None:
        """Press the mouse's button on the middle of the first button that says `text`."""
        find = f"[...document.querySelectorAll('button')].find((b) => b.textContent.trim() === {json.dumps(text)})"
        await self.until(f"Boolean({find}) && !({find}).disabled")
        box = await self.value(
            f"(() => {{ const b = {find}; b.scrollIntoView({{block: 'center'}}); const r = b.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)


@contextlib.asynccontextmanager
async def opened(app: Any, folder: Path) -> AsyncIterator[Page]:
    """A page of a browser that shows `/` of a running application; folder: for the browser's profile."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    command = [str(found()), *FLAGS, *root, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        said = folder / "DevToolsActivePort"
        for _ in range(600):
            if said.exists() and "\n" in said.read_text():
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            await asyncio.sleep(0.05)
        at = f"http://127.0.0.1:{said.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            listed = await (await session.get(f"{at}/json/list")).json()
            url = next(one["webSocketDebuggerUrl"] for one in listed if one["type"] == "page")
            async with session.ws_connect(url, max_msg_size=2**26) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
                yield page
    finally:
        process.kill()
        process.wait()
        server.should_exit = True
        await serving
