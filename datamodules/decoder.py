"""Decoding in a process that may die, hang or run out of memory: it is replaced, and the file is named."""

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bernini.decoding import Limits, Pick, Probe, open_source
from bernini.errors import DataError
from datamodules.decoding_child import buffer, receive, send

_START = 60.0  # seconds that a new process may take before it answers
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG")  # of the environment: no keys where hostile files are read
_CODE = "import sys; from datamodules.decoding_child import main; main(int(sys.argv[1]), int(sys.argv[2]))"


class Decoder:
    """Decodes as `bernini.decoding.decode_video` does, in a process of its own.

    The process is started with the first file and kept. It gets the open file and writes the frames to memory that
    both share; it knows none of this process's environment. When it dies or takes longer than ``limits.timeout``, it is
    killed, the file's error says so, and the next file has a new one.

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
        source, suffix = open_source(file, where)
        with source:
            number = _in_memory(file) if isinstance(file, bytes) else os.dup(source.fileno())
        asked = {"suffix": suffix, "where": where, "limits": asdict(self.limits)}
        answered = False
        try:
            connection = self._connected()
            send(connection, asked, number)
            probed = Probe(**self._answer(connection)[0]["probe"])
            picked = list(pick(probed))
            send(connection, {"frames": picked})
            answer, files = self._answer(connection)
            frames = _mapped(answer["shape"], len(picked), files, self.limits)
            answered = True
            return probed, frames
        except (EOFError, ConnectionError, TimeoutError, KeyError, TypeError, ValueError) as error:
            raise self._died(isinstance(error, TimeoutError), where) from error
        except _Refused as refused:
            answered = True
            raise DataError(**refused.args[0]) from None
        finally:
            os.close(number)
            if not answered:
                self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._socket:
            self._socket.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = self._socket = None

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
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**known, "PYTHONPATH": path},
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

    def _answer(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
        connection.settimeout(self.limits.timeout)
        answer, files = receive(connection)
        if "error" in answer:
            raise _Refused({name: str(answer["error"][name]) for name in ("what", "where", "why", "fix")})
        return answer, files

    def _died(self, late: bool, where: str) -> DataError:
        why = f"it took longer than {self.limits.timeout:g} seconds" if late else "its process broke off"
        with suppress(subprocess.TimeoutExpired):  # what closed the socket is known a moment later
            if not late and self.process and (code := self.process.wait(1)) < 0:
                why = f"its process ended by {signal.Signals(-code).name}"
        fix = "encode the clip again, or leave the sample out"
        return DataError("the clip cannot be decoded", where=where, why=why, fix=fix)


class _Refused(Exception):
    """What the process says is wrong with a file."""


@cache
def _decoder(process: int, limits: Limits) -> Decoder:
    return Decoder(limits)


def decoder(limits: Limits) -> Decoder:
    """The decoder of this process for those limits; a fork has one of its own."""
    return _decoder(os.getpid(), limits)


def _in_memory(data: bytes) -> int:
    file = buffer(len(data))
    os.pwrite(file, data, 0)
    return file


def _mapped(shape: Sequence[int], frames: int, files: Sequence[int], limits: Limits) -> np.ndarray:
    """The frames in the memory that the process wrote to.

    Raises:
        ValueError: That memory is not what the process says.
    """
    try:
        count, height, width, channels = map(int, shape)
        size = frames * height * width * 3
        if (count, channels) != (frames, 3) or not 0 < size <= limits.decoded or os.fstat(files[0]).st_size != size:
            raise ValueError(f"{list(shape)} for {frames} frames")
        return np.frombuffer(mmap.mmap(files[0], size), np.uint8).reshape(frames, height, width, 3)
    finally:
        for file in files:
            os.close(file)
