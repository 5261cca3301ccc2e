"""A page in headless Chromium, driven by its DevTools protocol."""

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync", "disable-component-update")
FLAGS += ("disable-background-networking", "hide-scrollbars", "remote-debugging-port=0", "window-size=1280,900")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


class Tab:
    """A tab of the browser.

    Attributes:
        told: What the console said, errors and exceptions included.
        fetched: Schemes of all addresses that were asked for.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.told, self.fetched, self.number = socket, list[Any](), set[str](), 0

    async def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            event = json.loads((await self.socket.receive()).data)
            if event.get("id") == self.number:
                assert "error" not in event, event
                return event["result"]
            if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.told.append(event["params"])
            if event["method"] == "Network.requestWillBeSent":
                self.fetched.add(event["params"]["request"]["url"].partition(":")[0])

    async def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def shoot(self, path: Path) -> None:
        """Save what is seen as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


def browse(page: Path, profile: Path, drive: Callable[[Tab], Awaitable[None]]) -> Tab:
    """Open a file, and do something with it."""

    async def main() -> Tab:
        async with aiohttp.ClientSession() as session:
            port, place = profile / "DevToolsActivePort", None
            async with asyncio.timeout(30):
                while place is None:
                    await asyncio.sleep(0.1)
                    try:
                        url = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json"
                        tabs = await (await session.get(url)).json()
                        place = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                    except (OSError, IndexError, StopIteration):
                        continue
            async with session.ws_connect(place, max_msg_size=0) as socket, asyncio.timeout(60):
                tab = Tab(socket)
                for domain in ("Runtime", "Log", "Network", "Page"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=page.resolve().as_uri())
                await tab.run(
                    "new Promise((done) => { const wait = () => document.readyState === 'complete' "
                    "&& location.protocol === 'file:' ? done() : setTimeout(wait, 20); wait(); })"
                )
                await drive(tab)
                return tab

    process = Popen(
        [str(CHROMIUM), *(f"--{flag}" for flag in FLAGS), f"--user-data-dir={profile}", "about:blank"], stderr=DEVNULL
    )
    try:
        return asyncio.run(main())
    finally:
        process.terminate()
        process.wait()
