"""The process that decodes for a `Decoder`: it may die, and holds nothing that would be missed.

What goes over the socket is a length, JSON, and at times an open file; nothing is pickled.
"""

import json
import mmap
import os
import resource
import socket
import struct
import tempfile
from dataclasses import asdict
from typing import Any

import numpy as np

from bernini.decoding import Limits, OutOfMemory, open_video
from bernini.errors import DataError

MAX_MESSAGE = 1 << 24  # bytes
_PAGES = "/proc/self/statm"  # Linux; elsewhere the system does not tell
_LENGTH = struct.Struct("<I")


def send(to: socket.socket, message: dict[str, Any], *files: int) -> None:
    """Send a message, and open files with it."""
    data = json.dumps(message).encode()
    data = _LENGTH.pack(len(data)) + data
    to.sendall(data[socket.send_fds(to, [data], files) :])


def receive(source: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a message, and at most one open file.

    Raises:
        EOFError: The other side has closed, or sent what is not a message.
        TimeoutError: The socket's time is over.
    """
    data, files, _, _ = socket.recv_fds(source, _LENGTH.size, 1)
    while data and len(data) < _LENGTH.size:
        data += source.recv(_LENGTH.size - len(data))
    left = _LENGTH.unpack(data)[0] if data else MAX_MESSAGE + 1
    if left > MAX_MESSAGE:
        raise EOFError
    parts = []
    while left and (part := source.recv(left)):
        parts.append(part)
        left -= len(part)
    try:
        message = json.loads(b"".join(parts))
    except ValueError as error:
        raise EOFError from error
    if left or not isinstance(message, dict):
        raise EOFError
    return message, list(files)


def memory_file(size: int) -> int:
    """An open file in memory, of ``size`` bytes, which take memory once they are written."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("frames")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


def _serve(parent: socket.socket, buffers: dict[int, mmap.mmap]) -> None:
    """Answer one request: what the file holds, then the frames picked from it, if any, in a buffer of the parent's."""
    request, (file,) = receive(parent)
    limits, where = Limits(**request["limits"]), request["where"]
    try:
        with os.fdopen(file, "rb") as source, open_video(source, request["suffix"], where, limits) as video:
            send(parent, {"probe": asdict(video.probed)})
            picked, new = receive(parent)
            if not picked["frames"]:
                return
            for number in picked["dropped"]:
                buffers.pop(number, None)
            for file in new:
                buffers[picked["buffer"]] = mmap.mmap(file, 0)
                os.close(file)
            buffer = buffers[picked["buffer"]]

            def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
                return np.frombuffer(buffer, dtype, int(np.prod(shape))).reshape(shape)

            shape = video.decode(picked["frames"], allocate).shape
        send(parent, {"shape": shape})
    except DataError as error:
        told = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        send(parent, {"error": told, "full": isinstance(error, OutOfMemory)})


def main(file: int, memory: int) -> None:
    """Serve until the other side closes.

    Args:
        file: Number of the socket.
        memory: Bytes that may be allocated from now on, on Linux.
    """
    import av  # noqa: F401  (before the limit is set)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.path.exists(_PAGES):  # the limit counts what is held already
        with open(_PAGES) as pages:
            memory += int(pages.read().split()[5]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with socket.socket(fileno=file) as parent:
        buffers: dict[int, mmap.mmap] = {}
        send(parent, {"ready": True})
        while True:
            try:
                _serve(parent, buffers)
            except (EOFError, ConnectionError):
                return
