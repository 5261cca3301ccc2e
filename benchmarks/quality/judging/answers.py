"""Answers as they came, kept in a file that is only ever appended to, under the hash of what was asked.

An answer is on the disk before anything is made of it. Reading scores out of answers is a step of its own, so that it
can be done again with better readers and without a call.
"""

import fcntl
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bernini.chat import Completion

_FIELDS = tuple(f.name for f in fields(Completion))
_APPENDING = 1 << 61  # byte of the lock file that stands for the end of the answers; addresses lie below
_POLL = 0.01  # seconds


def answered(path: Path) -> dict[str, list[tuple[str, str]]]:
    """What was said about each item: what was asked, and the last answer to it, in the order of the file.

    Args:
        path: Answers that `Answers` keeps; it may be missing.
    """
    found: dict[str, dict[tuple[str, int], dict[int, str]]] = {}
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            row = json.loads(line)
            asking = found.setdefault(row.get("item", row["question"]), {}).setdefault(
                (row["question"], row["repeat"]), {}
            )
            if row["turn"] == 0:  # what was said about an output that was made again is past
                asking.clear()
            asking[row["turn"]] = row["text"]
        except (ValueError, KeyError):
            continue  # what a crash left of a line
    return {
        item: [
            (f"{question}{f', repeat {repeat}' * (repeat > 0)}{', after a reminder' * (turn > 0)}", text)
            for (question, repeat), turns in askings.items()
            for turn, text in turns.items()
        ]
        for item, askings in found.items()
    }


class Answers:
    """The answers of a run. Several processes can use one file at the same time, and the threads of each one object.

    What a process that was killed left of a line counts as not there.

    Args:
        path: JSON lines; ``.lock`` beside it is empty, and holds who is asking for what.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Completion] = {}
        self._read_to = 0
        self._claimed: set[str] = set()
        self._turn = threading.Condition()
        self._locks = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, self._locks)
        self._refresh()

    def __len__(self) -> int:
        """How many there are, as far as this process has read."""
        return len(self._known)

    def __contains__(self, address: str) -> bool:
        return address in self._known

    @contextmanager
    def asking(self, address: str) -> Iterator[Completion | None]:
        """Keep everybody else from asking the same.

        Args:
            address: Hash of what is asked.

        Yields:
            The answer that is there, or null: then it is to be asked for, and given to `add`.
        """
        if address in self._known:
            yield self._known[address]
            return
        with self._turn:
            self._turn.wait_for(lambda: address not in self._claimed)
            self._claimed.add(address)
        try:
            with self._locked(int(address[:15], 16)):
                self._refresh()
                yield self._known.get(address)
        finally:
            with self._turn:
                self._claimed.discard(address)
                self._turn.notify_all()

    def add(self, address: str, completion: Completion, about: Mapping[str, Any]) -> None:
        """Keep an answer; it is on the disk when this returns.

        Args:
            address: Hash of what was asked.
            completion: The answer.
            about: What people who read the file want to know besides.
        """
        told = {**about, **asdict(completion), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps({"address": address, **told}).encode() + b"\n"
        with self._turn, self._locked(_APPENDING), self.path.open("a+b") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # ends what a crash left
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._known[address] = completion

    def _refresh(self) -> None:
        """Read what was added since."""
        with self._turn:
            if not self.path.is_file():
                return
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read_to += len(whole)
            for line in whole.splitlines():
                try:
                    row = json.loads(line)
                    self._known.setdefault(row["address"], Completion(**{name: row[name] for name in _FIELDS}))
                except (ValueError, TypeError, KeyError):
                    continue  # what a crash left of a line

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        """Hold one byte of the lock file; the system gives it back when a process dies.

        It is polled for: the system takes two processes whose threads wait for each other's locks for a deadlock.
        """
        while True:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                break
            except BlockingIOError:
                time.sleep(_POLL)
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)
