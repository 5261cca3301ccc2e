"""Reads back what W&B keeps of a run on disk: records in LevelDB's log format, and files."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, PREFIX = 7, 32768, 7  # bytes; a prefix is checksum (4), length (2) and kind (1)
FULL, LAST = 1, 4


def fresh_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Offline, quiet and without credentials; W&B reads the environment when it is first used, and forgets it here."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "SILENT": "true", "CONFIG_DIR": str(folder / "wandb-config")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    wandb.teardown()


@dataclass
class StoredRun:
    """A run as its folder tells it.

    Attributes:
        folder: ``offline-run-DATE-ID`` or ``run-DATE-ID``.
        id: Its id.
        config: Its configuration.
        history: What was logged, call by call; values as JSON gives them.
        axes: The metric that is the x-axis of each metric or pattern.
        git: Address and commit that W&B has of the checkout.
        arguments: The command line that W&B has.
        exit_code: 0 for a run that succeeded, None for one that was not finished.
    """

    folder: Path
    id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    git: tuple[str, str] = ("", "")
    arguments: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def names(self) -> set[str]:
        """Names of everything that was logged."""
        return {name for row in self.history for name in row}

    def values(self, name: str) -> list[tuple[int, Any]]:
        """Steps and values of one metric."""
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]


def stored_runs(root: Path) -> list[StoredRun]:
    """All runs below a folder, oldest first."""
    logs = sorted(root.rglob("run-*.wandb"), key=lambda log: log.stat().st_ctime_ns)
    return [_read(log) for log in logs]


def stored_bytes(root: Path) -> bytes:
    """Everything that lies below a folder: names and contents."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return b"\n".join(str(file.relative_to(root)).encode() + file.read_bytes() for file in files)


def _read(log: Path) -> StoredRun:
    run = StoredRun(log.parent)
    for record in _records(log.read_bytes()):
        if record.HasField("run"):
            run.id = record.run.run_id
            run.git = (record.run.git.remote_url, record.run.git.commit)
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("config"):
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif record.HasField("environment"):
            run.arguments += record.environment.args
        elif record.HasField("metric"):
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif record.HasField("history"):
            run.history.append(_nested(record.history.item))
        elif record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run


def _nested(items: Any) -> dict[str, Any]:
    """Values by name; what was logged as a mapping comes in parts."""
    row: dict[str, Any] = {}
    for item in items:
        *groups, name = list(item.nested_key) or [item.key]
        part = row
        for group in groups:
            part = part.setdefault(group, {})
        part[name] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> Iterator[Record]:
    at, joined = HEADER, b""
    while at + PREFIX <= len(data):
        if BLOCK - at % BLOCK < PREFIX:  # too little is left of a block for another record
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        joined += data[at + PREFIX : at + PREFIX + length]
        at += PREFIX + length
        if kind in (FULL, LAST):
            yield Record.FromString(joined)
            joined = b""
