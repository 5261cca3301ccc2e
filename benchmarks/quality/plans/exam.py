"""Held-out samples to plan and to answer, and samples that a probe learns from, as a planner reads them."""

from dataclasses import dataclass
from functools import lru_cache

from torch.utils.data import Dataset

from bernini.conversation import Conversation
from bernini.planner.template import PlannerSample, PlannerTemplate
from bernini.planner.validation import true_target
from bernini.planner.vision import VisionConfig, Visual
from bernini.tasks import TASKS
from datamodules.toyworld.data import ToyWorld
from datamodules.toyworld.labels import scene_labels
from datamodules.toyworld.questions import QUESTIONS

PLANNED = (*TASKS, "i2i/reason", "v2v/reason")
"""What is planned: all tasks, and reasoning edits, which are a category of their own."""

ANSWERED = tuple(QUESTIONS)
"""What is answered in words."""


@dataclass(frozen=True)
class Exam:
    """Which samples are drawn.

    Attributes:
        items: Held-out samples of each category.
        probe_items: Targets of training samples that a probe learns from, images and clips alike.
        frames: Frames of a clip.
        size: Height and width in pixels.
        seed: Seed of the world; the default is one that nothing is trained on.
    """

    items: int = 256
    probe_items: int = 8000
    frames: int = 9
    size: int = 64
    seed: int = 1000

    def held_out(self, category: str) -> list[Conversation]:
        """Samples of a category, in combinations that are never trained on."""
        world = ToyWorld({category: 1.0}, self.frames, self.size, self.size, self.seed, "held_out")
        return [world[number] for number in range(self.items)]


class ProbeTargets(Dataset[tuple[Visual, list[int]]]):
    """Targets that a probe learns from, with the answers of `SLOTS` that they give.

    Args:
        exam: Which samples.
        moving: Whether those are of all tasks that make clips, or of those that make images.
        vision: How pixels become patches.
    """

    def __init__(self, exam: Exam, moving: bool, vision: VisionConfig) -> None:
        parts = {name: 1.0 for name, task in TASKS.items() if (task.target == "video") == moving}
        self.world = ToyWorld(parts, exam.frames, exam.size, exam.size, exam.seed, "train")
        self.count, self.moving, self.vision = exam.probe_items, moving, vision

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Visual, list[int]]:
        sample = self.world[number]
        return true_target(sample, self.vision), scene_labels(sample.info["truth"], self.moving)


@dataclass(frozen=True)
class Sheet:
    """A sample to plan.

    Attributes:
        key: Its name.
        prompt: What is asked for.
        streams: The sequences that planning guides with.
        sources: What it shows.
        target: What is to be planned.
        labels: Answers of `datamodules.toyworld.labels.SLOTS` that the target gives.
    """

    key: str
    prompt: str
    streams: dict[str, PlannerSample]
    sources: list[Visual]
    target: Visual
    labels: list[int]


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        key: The sample's name.
        kind: What is asked for.
        written: The whole chat.
    """

    key: str
    kind: str
    written: PlannerSample


class Sheets:
    """The samples of an exam, written once for all planners with one tokenizer and one way to take pixels.

    Args:
        exam: Which samples.
        template: Writes them.
    """

    def __init__(self, exam: Exam, template: PlannerTemplate) -> None:
        self.exam, self.template = exam, template
        self.planned = lru_cache(maxsize=None)(self._planned)
        self.asked = lru_cache(maxsize=None)(self._asked)

    def _planned(self, category: str) -> list[Sheet]:
        found = []
        for sample in self.exam.held_out(category):
            streams = self.template.streams(sample)
            target = true_target(sample, self.template.vision)
            seen = zip(sample.visual, streams["cond"].visuals, strict=True)
            sources = [visual for message, visual in seen if not message.is_target]
            labels = scene_labels(sample.info["truth"], target.is_video)
            found.append(Sheet(sample.key, sample.prompt, streams, sources, target, labels))
        return found

    def _asked(self, task: str) -> list[Question]:
        chats = self.exam.held_out(task)
        return [Question(chat.key, chat.info["question"]["kind"], self.template(chat)) for chat in chats]
