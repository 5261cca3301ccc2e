"""What `bernini generate` is asked to make: one case on the command line, or many in a list."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bernini.conversation import Conversation
from bernini.errors import BerniniError, DataError
from bernini.inputs import ask
from bernini.presets import check_names
from bernini.suggest import closest
from bernini.tasks import get_task

SUFFIXES = {"image": ".png", "video": ".mp4"}
KEYS = ("name", "task", "prompt", "videos", "images", "plan", "preset", "rewrite")


@dataclass(frozen=True)
class Case:
    """One image or clip to make.

    Attributes:
        out: File to write.
        task: Name in the task table.
        prompt: What to make, or to do.
        videos: Source clips.
        images: Source images.
        plan: File of a plan to render, if it is not to be planned anew.
        preset: Name of a preset; the model's own if null.
        rewrite: Whether the rewriter, which the list does not name, changes its prompt.
        settings: Settings that are asked for.
        where: Place in its list, for errors.
    """

    out: Path
    task: str
    prompt: str
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    plan: str | None = None
    preset: str | None = None
    rewrite: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def manifest(self) -> Path:
        """File that says how it was made."""
        return self.out.with_suffix(".json")

    @property
    def kept_plan(self) -> Path:
        """File of its plan, if that is kept."""
        return self.out.with_suffix(".plan.safetensors")

    @property
    def kept_frame(self) -> Path:
        """File of the frame that was edited first, if one was."""
        return self.out.with_suffix(".frame.png")

    def request(self) -> Conversation:
        """The conversation, its media not read yet.

        Raises:
            ConfigError: The task is unknown.
            DataError: Media are missing or not those of the task, or the file to write has the wrong suffix.
        """
        conversation = ask(self.task, self.prompt, self.videos, self.images, key=self.where)
        wanted = SUFFIXES[get_task(self.task).target]
        if self.out.suffix != wanted:
            raise DataError(f"{self.out} cannot hold what {self.task} makes", where=self.where, fix=f"a {wanted} file")
        for file in (*self.videos, *self.images, *filter(None, [self.plan])):
            if not Path(file).is_file():
                raise DataError("a file does not exist", where=f"{self.where}: {file}" if self.where else file)
        return conversation


def read_cases(
    path: Path, out: Path, settings: Mapping[str, Any], preset: str | None = None, rewrite: bool = False
) -> list[Case]:
    """Read a list of cases.

    Args:
        path: JSON file with a list of objects, whose keys are `KEYS` and settings; files are relative to it.
        out: Folder of what is made.
        settings: Settings of all cases; a case's own go before them.
        preset: Preset of cases that name none.
        rewrite: Whether the prompts of cases that do not say are rewritten.

    Raises:
        ConfigError: A setting is unknown, or its value of another type.
        DataError: The file is missing or no such list, or a case has an unknown or missing key, or another's name.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError("the cases cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError("the cases are no list of objects", where=str(path), fix='[{"name": ..., "task": ...}, ...]')
    cases = [
        _case(row, f"{path}, case {number}", path.parent, out, settings, preset, rewrite)
        for number, row in enumerate(rows)
    ]
    names: dict[Path, str] = {}
    for case in cases:
        if case.out in names:
            raise DataError(
                f"two cases have the name {case.out.stem!r}", where=case.where, why=f"so has {names[case.out]}"
            )
        names[case.out] = case.where
    return cases


def _case(
    row: dict[str, Any],
    where: str,
    root: Path,
    out: Path,
    settings: Mapping[str, Any],
    preset: str | None,
    rewrite: bool,
) -> Case:
    if missing := [key for key in ("name", "task", "prompt") if not isinstance(row.get(key), str)]:
        raise DataError(f"the case has no {missing[0]}", where=where, why="name, task and prompt are texts")
    if wrong := [key for key in ("plan", "preset") if not isinstance(row.get(key, ""), str)]:
        raise DataError(f"{wrong[0]} is {row[wrong[0]]!r}", where=where, why="it is a text")
    if not isinstance(row.get("rewrite", True), bool):
        raise DataError(f"rewrite is {row['rewrite']!r}", where=where, why="it is true or false")
    own = {key: value for key, value in row.items() if key not in KEYS}
    for key in own:
        try:
            check_names({key: own[key]}, where)
        except BerniniError as error:
            known = closest(key, KEYS)
            raise type(error)(error.what, where=where, why=error.why, fix=known or error.fix) from error
    for key in ("videos", "images"):
        if not _texts(row.get(key, [])):
            raise DataError(f"{key} is {row[key]!r}", where=where, fix=f'a list of files: "{key}": ["a.mp4"]')
    name = row["name"]
    if not name or Path(name).name != name:
        raise DataError(f"{name!r} cannot be the name of a file", where=where, fix="a name without folder and suffix")

    def files(key: str) -> tuple[str, ...]:
        return tuple(str(root / file) for file in row.get(key, []))

    return Case(
        out=out / f"{name}{SUFFIXES[get_task(row['task']).target]}",
        task=row["task"],
        prompt=row["prompt"],
        videos=files("videos"),
        images=files("images"),
        plan=str(root / row["plan"]) if row.get("plan") else None,
        preset=row.get("preset", preset),
        rewrite=row.get("rewrite", rewrite),
        settings={**settings, **own},
        where=where,
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def batches(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """Cases that can be made together, those of equal settings but for the seed, at most ``size`` of them."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        same = {name: value for name, value in case.settings.items() if name != "seed"}
        key = json.dumps([case.preset, case.plan is None, case.rewrite, same], sort_keys=True)
        groups.setdefault(key, []).append(case)
    return [same[at : at + size] for same in groups.values() for at in range(0, len(same), size)]
