"""A local server with the chat endpoint of OpenAI's interface, which replies as a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = Callable[[BaseHTTPRequestHandler], None]


def say(content: Any, status: int = 200, **choice: Any) -> Reply:
    return send(json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}), status)


def send(body: str, status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return reply


class Server(ThreadingHTTPServer):
    """Gives the replies it is told to, the last one for ever, and keeps what it was asked."""

    replies: list[Reply]
    asked: list[tuple[dict[str, str], Any]]

    @property
    def url(self) -> str:
        """Root of its interface."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(({**self.headers, "path": self.path}, self.body))
        replies = self.server.replies
        (replies.pop(0) if len(replies) > 1 else replies[0])(self)

    def log_message(self, *_: Any) -> None:
        """Quietly."""


@contextmanager
def chat_server() -> Iterator[Server]:
    """A server that is up, and says "ok"."""
    server = Server(("127.0.0.1", 0), Handler)
    server.replies, server.asked = [say("ok")], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")
            yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
