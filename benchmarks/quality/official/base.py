"""What all official benchmarks share: terms, checks of what they read, sizes, sources, and what is missing."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.quality.interface import Benchmark, Expectation, Item
from benchmarks.quality.official.drafts import Draft, check_drafts
from benchmarks.quality.official.needs import Need, Needs, inventory
from benchmarks.quality.official.reading import read_rewriting
from benchmarks.quality.official.sizing import clip_like, picture_like
from benchmarks.quality.official.source import Source
from benchmarks.quality.totals.records import Facts
from bernini.conversation import Conversation, Media, Message
from bernini.errors import BerniniError, ConfigError, DataError
from bernini.inputs import ask, read
from bernini.presets import Settings
from bernini.tasks import get_task

SIZES = ("frames", "height", "width", "fps", "max_edge", "min_edge")

Scorer = Callable[[Path, Item, Tensor], float | None]
"""A score of an output ``[3, T, H, W]`` uint8 that needs no weights; the path is the benchmark's folder."""


@dataclass(frozen=True)
class OfficialBenchmark(Benchmark):
    """A published benchmark, read from the files that its authors give out.

    Subclasses say in `read` what the files hold. ``Item.extra`` has ``output``, and where they exist ``videos`` and
    ``images``; ``prompt``, the official prompt where the model is given another; and what the benchmark itself adds.

    Attributes:
        source: Where it comes from, and its licence.
        needs: What each score needs besides pixels.
        scorers: Scores that need nothing but pixels, by name.
        root: Folder of the download.
        accept_licence: Whether its licence is accepted, where that is asked for.
        rewritten: File of rewritten prompts, see `read_rewriting`; output files keep the official ones. Empty for none.
    """

    source: ClassVar[Source]
    places: ClassVar[tuple[str, ...]] = ("root", "accept_licence")
    blank_targets: ClassVar[bool] = True
    needs: ClassVar[Needs] = {}
    scorers: ClassVar[Mapping[str, Scorer]] = {}

    root: str = ""
    accept_licence: bool = False
    rewritten: str = ""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, list):  # as JSON and YAML have it; equal benchmarks would differ
                object.__setattr__(self, setting.name, tuple(value))
        self.sizes()

    @property
    def folder(self) -> Path:
        """Folder of the download."""
        return Path(self.root)

    @abstractmethod
    def read(self) -> Iterator[Draft]:
        """All items as the official files have them, neighbours of one task together.

        Raises:
            DataError: A file is missing, or is not the official one.
        """

    def prompts(self, drafts: Sequence[Draft]) -> list[str]:
        """The official prompts in the order in which rewritten ones are listed: here each one once."""
        return list(dict.fromkeys(draft.prompt for draft in drafts))

    def sizes(self) -> Settings:
        """The settings of sizes and rates that the benchmark has.

        Raises:
            ConfigError: One has no meaning.
        """
        own = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.name in SIZES}
        if isinstance(self, Sourced) and own.get("fps") == 0:
            del own["fps"]
        return Settings(mode="", **own)

    def items(self) -> list[Item]:
        """All items.

        Raises:
            ConfigError: The licence has to be accepted first.
            DataError: A file is missing, is not the official one, or holds what makes no item.
        """
        source = self.source
        if source.restricted and not self.accept_licence:
            raise ConfigError(
                f"the licence of {self.name} has to be accepted: {source.licence}",
                where="accept_licence",
                why=f"read it at {source.home}",
                fix="set accept_licence: true (--accept-licence)",
            )
        drafts = list(self.read())
        check_drafts(drafts, self.folder, source)
        named = dict.fromkeys(path for draft in drafts for path in (*draft.videos, *draft.images))
        if absent := [path for path in named if not (self.folder / path).is_file()]:
            raise DataError(
                f"{len(absent)} of {len(named)} source files of {self.name} are missing, the first is {absent[0]}",
                where=str(self.folder / absent[0]),
                fix=f"get {source.download}",
            )
        rewritten = read_rewriting(Path(self.rewritten), self.prompts(drafts)) if self.rewritten else {}
        measured: dict[tuple[str, str | None], Expectation] = {}  # one source has many items
        return [self._item(draft, rewritten, measured) for draft in drafts]

    def conversation(self, item: Item) -> Conversation:
        """The prompt, the sources, sampled and resized, and a black target, which only says what size is wanted.

        ``info["blank_target"]`` says so: it is no reference.
        """
        request = ask(item.task, item.prompt, *self.sources(item), key=item.id)
        expect, sizes = item.expect, self.sizes()
        read(request, replace(sizes, fps=expect.fps or sizes.fps))
        black = torch.zeros((), dtype=torch.uint8).expand(3, expect.frames, expect.height, expect.width)
        target = Media(pixels=black, fps=expect.fps)
        request.messages.append(Message("image_gen" if request.spec.target == "image" else "video_gen", media=target))
        request.info["blank_target"] = True
        return request

    def sources(self, item: Item) -> tuple[list[Path], list[Any]]:
        """Clips and images that an item is made from: files, or pixels."""
        videos, images = ([self.folder / path for path in item.extra.get(kind, ())] for kind in ("videos", "images"))
        return videos, list(images)

    def source_files(self, item: Item) -> dict[str, Path]:
        """Clips and images that the item is made from."""
        return {name: self.folder / name for kind in ("videos", "images") for name in item.extra.get(kind, ())}

    def score(self, item: Item, pixels: Tensor) -> dict[str, float | None]:
        """The scores of an output that need nothing but pixels; others come from models and judges."""
        own = (name for name in item.metrics if name in self.scorers)
        return {name: self.scorers[name](self.folder, item, pixels) for name in own}

    def measured(self) -> tuple[str, ...]:
        """Names of the scores that need nothing but pixels."""
        return tuple(self.scorers)

    def wants(self, metric: str) -> tuple[str, ...]:
        """Weights and judges that a score needs, by name and revision."""
        return tuple(map(str, self.needs.get(metric, ())))

    def output_path(self, item: Item) -> str:
        """The official file name."""
        return str(item.extra["output"])

    def missing(self, present: Callable[[Need], bool]) -> Iterator[str]:
        """A line for everything that a run would lack: data first, then weights and judges.

        Args:
            present: Whether weights or a judge are there, e.g. `needs.is_cached`.
        """
        return (line for line in self.inventory(present) if line.startswith("missing"))

    def inventory(self, present: Callable[[Need], bool]) -> Iterator[str]:
        """A line for everything that a run takes, whether it is there: data first, then weights and judges.

        Args:
            present: As of `missing`.
        """
        asked = set(self.needs)
        try:
            items = self.items()
            asked = {metric for item in items for metric in item.metrics}
            yield f"there: data of {len(items)} items ({self.root or 'the installed package'})"
        except BerniniError as error:
            yield f"missing: {error.what} ({error.fix})"
        yield from self.wanted(asked, present)

    def wanted(self, scores: Collection[str], present: Callable[[Need], bool]) -> Iterator[str]:
        """A line for all weights and judges that some scores take, whether they are there.

        Args:
            scores: Names of the scores.
            present: As of `missing`.
        """
        return inventory({metric: own for metric, own in self.needs.items() if metric in scores}, present)

    def followed(self, draft: Draft) -> str | None:
        """The source whose size the output has: the first clip, or the image of an edit or of a first frame."""
        images = draft.images if draft.task in ("i2i", "i2v") else ()
        return next(iter((*draft.videos, *images)), None)

    def expect(self, task: str, followed: str | None) -> Expectation:
        """What an output is to be.

        Args:
            task: Name in the task table.
            followed: The source that it follows, relative to the folder; none for the benchmark's own size.
        """
        sizes, spec = self.sizes(), get_task(task)
        frames, fps = (sizes.frames, float(sizes.fps)) if spec.target == "video" else (1, 0.0)
        if followed is None:
            return Expectation(frames, sizes.height, sizes.width, fps)
        file = self.folder / followed
        if spec.videos[0]:
            return clip_like(file, sizes, float(getattr(self, "fps", 0)) or None)
        return picture_like(file.read_bytes(), str(file), sizes, frames, fps)

    def _item(
        self, draft: Draft, rewritten: Mapping[str, str], measured: dict[tuple[str, str | None], Expectation]
    ) -> Item:
        key = draft.task, self.followed(draft)
        if key not in measured:
            measured[key] = self.expect(*key)
        prompt = rewritten.get(draft.prompt, draft.prompt)
        given = {"output": draft.output, "videos": list(draft.videos), "images": list(draft.images)}
        extra = {name: value for name, value in given.items() if value}
        if prompt != draft.prompt:
            extra["prompt"] = draft.prompt
        return Item(
            id=draft.id,
            task=draft.task,
            prompt=prompt,
            expect=measured[key],
            metrics=draft.metrics,
            category=draft.category,
            repeat=draft.repeat,
            extra={**extra, **draft.extra},
        )


@dataclass(frozen=True)
class Clips(OfficialBenchmark):
    """A benchmark of clips.

    Attributes:
        frames: Frames of an output, 4k + 1; a shorter source has as many as it has.
        fps: Frames per second of sources and outputs; 0 keeps each source's own, where there are sources.
    """

    frames: int = 81
    fps: int = 16


@dataclass(frozen=True)
class Made(OfficialBenchmark):
    """A benchmark whose outputs follow no source.

    Attributes:
        height: Height of an output in pixels, a multiple of 16.
        width: Its width in pixels, likewise.
    """

    height: int = 480
    width: int = 848


@dataclass(frozen=True)
class Sourced(OfficialBenchmark):
    """A benchmark with sources.

    Attributes:
        max_edge: Longest edge of a source in pixels; edges become multiples of 16.
        min_edge: Shortest edge of a source in pixels, unless ``max_edge`` forbids it.
    """

    max_edge: int = 848
    min_edge: int = 240


def facts(items: Sequence[Item], scores: Collection[str] | None = None) -> dict[str, Facts]:
    """What totals have to know of items, by their ids.

    Args:
        items: The items.
        scores: Those that the totals are made of, where that is not all.
    """
    own = {i.id: tuple(name for name in i.metrics if scores is None or name in scores) for i in items}
    return {item.id: Facts(own[item.id], item.category, item.expect.frames) for item in items}
