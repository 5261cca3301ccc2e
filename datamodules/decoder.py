"""Decoding in a process that may die, hang or run out of memory: it is replaced, and the file is named."""

import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bernini.decoding import Limits, Pick, Probe, open_source
from bernini.errors import DataError
from datamodules.decoding_child import memory_file, receive, send

_KEPT = 2  # free buffers: most samples have a source and a target
_START = 60.0  # seconds that a new process may take before it answers
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG")  # of the environment: no keys where hostile files are read
# A frame's memory goes back to the allocator rather than to the system, which would clear it for the next frame.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
_CODE = "import sys; from datamodules.decoding_child import main; main(int(sys.argv[1]), int(sys.argv[2]))"


class Decoder:
    """Decodes as `bernini.decoding.decode_video` does, in a process of its own.

    The process is started with the first file and kept. It gets the open file and writes the frames to memory that both
    share, and that is used again when nobody holds the frames any more; it knows none of this process's environment.
    When it dies or takes longer than ``limits.timeout``, it is killed, the file's error says so, and the next file has
    a new one.

    Args:
        limits: What a file may cost.

    Attributes:
        limits: What a file may cost.
        process: The process, if one is running.
        started: How many have been started.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0
        self._socket: socket.socket | None = None
        self._free: list[_Buffer] = []
        self._numbers = count()
        self._known: set[int] = set()  # numbers of the buffers that the process has
        self._dropped: list[int] = []  # and of those that it can forget

    def __call__(self, file: str | Path | bytes, pick: Pick, where: str) -> tuple[Probe, np.ndarray]:
        """Probe a file, have frames of it picked, and decode those.

        Args:
            file: Path, or the bytes of an MP4.
            pick: Gives the frames to keep, ascending, each below ``Probe.frames``.
            where: What to call the file in an error.

        Returns:
            What the file holds, and the frames, upright: ``[T, H, W, 3]`` uint8.

        Raises:
            DataError: The file is missing, damaged, of a kind that is not decoded, beyond a limit, or more than the
                process could bear.
        """
        with self._probed(file, where) as (connection, probed):
            return probed, self._decoded(connection, list(pick(probed)))

    def probe(self, file: str | Path | bytes, where: str) -> Probe:
        """What a file holds, of which nothing is decoded; see `__call__`."""
        with self._probed(file, where) as (connection, probed):
            send(connection, {"frames": []})
            return probed

    @contextmanager
    def _probed(self, file: str | Path | bytes, where: str) -> Iterator[tuple[socket.socket, Probe]]:
        """A file that is open in the process, which waits for frames to be picked."""
        source, suffix = open_source(file, where)
        with source:
            number = _in_memory(file) if isinstance(file, bytes) else os.dup(source.fileno())
        asked = {"suffix": suffix, "where": where, "limits": asdict(self.limits)}
        answered = False
        try:
            connection = self._connected()
            send(connection, asked, number)
            yield connection, Probe(**self._answer(connection)["probe"])
            answered = True
        except (EOFError, ConnectionError, TimeoutError, KeyError, TypeError, ValueError) as error:
            raise self._died(isinstance(error, TimeoutError), where) from error
        except _Refused as refused:
            answered = not refused.full  # what is left of a large file may be too little for the next one
            raise DataError(**refused.error) from None
        finally:
            os.close(number)
            if not answered:
                self.close()

    def _decoded(self, connection: socket.socket, picked: list[int]) -> np.ndarray:
        """Have frames written to a buffer, which is free again when nobody holds them any more."""
        buffer = self._free.pop() if self._free else _Buffer(next(self._numbers), self.limits.decoded)
        new = [] if buffer.number in self._known else [buffer.file]
        try:
            send(connection, {"frames": picked, "buffer": buffer.number, "dropped": self._dropped}, *new)
            self._known.add(buffer.number)
            self._dropped.clear()
            shape = [int(size) for size in self._answer(connection)["shape"]]
            if len(shape) != 4 or shape[::3] != [len(picked), 3] or min(shape) < 1:
                raise ValueError(f"{shape} for {len(picked)} frames")
            frames = np.frombuffer(buffer.memory, np.uint8, math.prod(shape))
        except BaseException:
            self._release(buffer)
            raise
        weakref.finalize(frames, self._release, buffer).atexit = False
        return frames.reshape(shape)

    def _release(self, buffer: "_Buffer") -> None:
        if len(self._free) < _KEPT:
            self._free.append(buffer)
        else:
            self._dropped.append(buffer.number)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._socket:
            self._socket.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = self._socket = None
        self._known.clear()

    def _connected(self) -> socket.socket:
        if self._socket and self.process and self.process.poll() is None:
            return self._socket
        self.close()
        mine, theirs = socket.socketpair()
        known = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno()), str(self.limits.memory)],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**known, **_ALLOCATOR, "PYTHONPATH": path},
            )  # fmt: skip
        self.started += 1
        self._socket = mine
        mine.settimeout(_START)
        try:
            receive(mine)
        except (EOFError, OSError) as error:  # not a file's fault
            self.close()
            raise RuntimeError("the process that decodes does not start") from error
        return mine

    def _answer(self, connection: socket.socket) -> dict[str, Any]:
        connection.settimeout(self.limits.timeout)
        answer, _ = receive(connection)
        if "error" in answer:
            told = {name: str(answer["error"][name]) for name in ("what", "where", "why", "fix")}
            raise _Refused(told, bool(answer["full"]))
        return answer

    def _died(self, late: bool, where: str) -> DataError:
        why = f"it took longer than {self.limits.timeout:g} seconds" if late else "its process broke off"
        with suppress(subprocess.TimeoutExpired):  # what closed the socket is known a moment later
            if not late and self.process and (code := self.process.wait(1)) < 0:
                why = f"its process ended by {signal.Signals(-code).name}"
        fix = "encode the clip again, or leave the sample out"
        return DataError("the clip cannot be decoded", where=where, why=why, fix=fix)


class _Refused(Exception):
    """What the process says is wrong with a file, and whether it has no memory left."""

    def __init__(self, error: dict[str, str], full: bool) -> None:
        super().__init__(error["what"])
        self.error, self.full = error, full


@cache
def _decoder(process: int, limits: Limits) -> Decoder:
    return Decoder(limits)


def decoder(limits: Limits) -> Decoder:
    """The decoder of this process for those limits; a fork has one of its own."""
    return _decoder(os.getpid(), limits)


class _Buffer:
    """Memory that is shared: pages that were written once need not be made, nor cleared, for the next clip."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.file = number, memory_file(size)
        self.memory = mmap.mmap(self.file, size)

    def __del__(self) -> None:
        os.close(self.file)


def _in_memory(data: bytes) -> int:
    file = memory_file(len(data))
    os.pwrite(file, data, 0)
    return file
