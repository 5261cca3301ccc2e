"""The toy benchmark: samples of the toy world in combinations that are never trained on, scored by its verifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.quality.interface import Benchmark, Expectation, Item
from bernini.conversation import Conversation
from bernini.errors import ConfigError
from bernini.tasks import TASKS, get_task
from datamodules.toyworld import judge, make_item
from datamodules.toyworld.items import FPS, Split


@dataclass(frozen=True)
class ToyBenchmark(Benchmark):
    """As many items of each task of the toy world.

    Attributes:
        tasks: Task names.
        per_task: Items of each task.
        frames: Frames of a clip, 4k + 1; images have one.
        size: Height and width in pixels, at least 32.
        seed: Seed of the world; the default is one that nothing else uses.
        split: ``held_out`` or ``train``; every held-out target has a combination of colour, shape and motion that
            never occurs in training.
        edits: Edit kinds for tasks that have a choice; all if none.
    """

    name: ClassVar[str] = "toy"
    version: ClassVar[str] = "2"
    notes: ClassVar[str] = (
        "Moving shapes of the toy world, scored by its verifier from pixels alone. Figures compare with those of equal "
        "version and settings only."
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": Path("assets/toy"),
        "steps": 16,
        "guidance": {
            False: ("v2v", {"txt": 1.0, "scale": 1.0}),
            True: ("vae_txt_vit", dict.fromkeys(("vid", "img", "txt", "tgt", "scale"), 1.0)),
        },
    }
    metrics: ClassVar[Mapping[str, str]] = {
        "edit_done": "everything that the edit changes is right",
        "rest_unchanged": "share of what was to stay that has stayed",
        "attributes": "share of shapes, colours, textures, sizes, places, background and light that are right",
        "motion": "share of things that move as they should",
        "identity": "share of shape, colour and texture that is as in the references",
    }

    tasks: tuple[str, ...] = tuple(TASKS)
    per_task: int = 256
    frames: int = 9
    size: int = 64
    seed: int = 1000
    split: Split = "held_out"
    edits: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        names = [get_task(task).name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"tasks are {', '.join(names) or 'missing'}", where="tasks", fix="name each task once")
        if self.per_task < 1:
            raise ConfigError(f"per_task is {self.per_task}", where="per_task", fix="1 or more")
        # A list, as JSON and YAML have it, would make equal benchmarks differ.
        object.__setattr__(self, "tasks", tuple(names))
        object.__setattr__(self, "edits", None if self.edits is None else tuple(self.edits))

    def items(self) -> list[Item]:
        """Items task by task, numbered from 0 in each.

        Raises:
            ConfigError: A setting has no meaning, such as edit kinds that a task does not know.
        """
        return [self._item(task, index) for task in self.tasks for index in range(self.per_task)]

    def conversation(self, item: Item) -> Conversation:
        """Sources, prompt and true target, with pixels."""
        return self._sample(item.task, item.extra["index"], self.frames, self.size)

    def score(self, item: Item, pixels: Tensor) -> dict[str, float]:
        """What the verifier reads from an output ``[3, T, H, W]`` uint8, see `judge`."""
        return judge(Conversation(item.task, [], key=item.id, info={"truth": item.extra["truth"]}), pixels)

    def _item(self, task: str, index: int) -> Item:
        sample = self._sample(task, index, 1, 32)  # the scenes do not depend on the size
        truth: dict[str, Any] = sample.info["truth"]
        clip = sample.spec.target == "video"
        applies = {
            "edit_done": bool(truth["edit"]),
            "rest_unchanged": bool(truth["edit"]),
            "attributes": True,
            "motion": clip,
            "identity": bool(truth["references"]),
        }
        return Item(
            id=sample.key,
            task=task,
            prompt=sample.prompt,
            expect=Expectation(self.frames if clip else 1, self.size, self.size, FPS if clip else 0.0),
            metrics=tuple(name for name, yes in applies.items() if yes),
            category=truth["edit"] or "",
            extra={"index": index, "truth": truth},
        )

    def _sample(self, task: str, index: int, frames: int, size: int) -> Conversation:
        return make_item(
            task,
            index,
            seed=self.seed,
            frames=frames,
            height=size,
            width=size,
            split=self.split,
            edits=self.edits,
        )
