"""A local server of files, with ranges, that fails as a test tells it to."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("503", "reset", "short", "stall", "wrong length", "wrong bytes", "closed")


class FileServer(ThreadingHTTPServer):
    """Serves a folder; a share of its replies goes wrong."""

    folder: Path
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.share, self.stall = folder, 0.0, 1.0
        self.random, self.lock, self.faults = random.Random(0), threading.Lock(), Counter[str]()
        self.tag, self.redirect, self.status, self.gets = '"1"', "", 0, 0

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_port}/data"

    def fault(self) -> str:
        """What goes wrong with this reply, if anything."""
        with self.lock:
            if self.random.random() >= self.share:
                return ""
            fault = self.random.choice(FAULTS)
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: FileServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.server.gets += 1
        self.reply(body=True)

    def reply(self, body: bool) -> None:
        path = self.server.folder / self.path.removeprefix("/data/").partition("?")[0]
        if self.server.redirect:
            target = self.server.redirect.replace("{name}", path.name)
            return self.head(302, {"Location": target, "Content-Length": "0"})
        if self.server.status or not path.is_file():
            return self.head(self.server.status or 404, {"Content-Length": "0"})
        data, status, headers = path.read_bytes(), 200, {"ETag": self.server.tag, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.head(416, {"Content-Length": "0"})
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        fault = self.server.fault()
        if fault == "503":
            return self.head(503, {"Content-Length": "0"})
        self.close_connection = fault in ("closed", "reset", "stall", "wrong length")
        if fault == "closed":
            return None
        if not body:
            return self.head(status, {**headers, "Content-Length": str(len(data) + 100 * (fault == "wrong length"))})
        length = len(data)
        if fault == "short":
            data = data[: len(data) // 2]
            length = len(data)
        if fault == "wrong bytes":
            data = bytes(byte ^ 1 for byte in data[:64]) + data[64:]
        if fault == "wrong length":
            length += 100
        self.head(status, {**headers, "Content-Length": str(length)})
        if fault in ("reset", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(self.server.stall)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by RST
        else:
            self.wfile.write(data)
            self.wfile.flush()
        return None

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Quietly."""


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """A server that is up."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
