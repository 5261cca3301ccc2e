"""FiVE and FiVE-Acc: fine-grained edits of clips, with masks and questions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.fidelity import mse, psnr, ssim
from benchmarks.quality.metrics.frames import five_compared
from benchmarks.quality.metrics.preparing import by_pillow
from benchmarks.quality.official.base import Clips, Scorer, Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import CLIP_L14, COTRACKER3, DINO_B8, Judge, Needs, Weights
from benchmarks.quality.official.reading import Schema, checked, read_json, refuse
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import five
from benchmarks.quality.totals.records import Range
from bernini.errors import DataError
from bernini.media import read_image

TYPES = ("rigid_replace", "non_rigid_replace", "color", "material", "add", "remove")
"""Kinds of edit of the files ``edit1`` to ``edit6``."""
ENTRIES = ((100, 100), (100, 100), (100, 100), (100, 100), (9, 10), (10, 10))
"""Fewest and most entries of each file: 420 were announced, the published tables have 419."""
QUESTIONS = ("source_yes_no_question", "target_yes_no_question", "multiple_choice_question")
SCHEMA = Schema(
    required={
        "video_name": str,
        "editing_type_id": object,
        "source_prompt": str,
        "target_prompt": str,
        "save_dir": str,
    },
    optional=dict.fromkeys(QUESTIONS, object),
    closed=False,
)
IMAGES = (".png", ".jpg", ".jpeg")

Figure = Callable[[Tensor, Tensor, Tensor], float | None]


def compared(folder: Path, item: Item) -> list[str]:
    """Names of the source frames that an output is compared with: every eighth, as many as the output has, too.

    The mask of a frame has its name. Source: FiVE-Bench, `evaluation/evaluate.py`.

    Raises:
        DataError: There are no frames.
    """
    place = folder / item.extra["frames"]
    names = sorted(file.name for file in place.iterdir() if file.suffix in IMAGES)
    if not names:
        raise DataError("there are no frames of the source", where=str(place), fix="unpack images.zip")
    return [names[number] for number in five_compared(min(len(names), item.expect.frames))]


def background(figure: Figure, folder: Path, item: Item, output: Tensor) -> float | None:
    """A figure of what lies outside the mask of the edit, mean over the frames that are `compared`.

    Args:
        figure: Takes output, source and mask.
        folder: Of the download.
        item: What the output is of.
        output: ``[3, T, H, W]`` uint8.

    Returns:
        The figure; none if the masks hide all frames.

    Raises:
        DataError: A frame or a mask is missing or damaged, or they differ in size.
    """
    source = frames(folder, item)
    return figure(beside(output, source), source, masks(folder, item, source))


def frames(folder: Path, item: Item) -> Tensor:
    """The source's frames that are `compared`, ``[3, T, H, W]`` uint8.

    Raises:
        DataError: One is missing or damaged, or they differ in size.
    """
    return _stacked(folder, item, "frames")


def masks(folder: Path, item: Item, source: Tensor) -> Tensor:
    """Where each of the source's frames is edited, ``[T, H, W]`` bool: where its mask is not black.

    Raises:
        DataError: A mask is missing or damaged, or is not as large as its frame.
    """
    found = _stacked(folder, item, "masks").amax(0) > 0
    if found.shape != source.shape[1:]:
        what = f"masks are {tuple(found.shape[1:])}, and frames {tuple(source.shape[2:])}"
        raise DataError(what, where=str(folder / item.extra["masks"]), fix="unpack the download again")
    return found


def beside(output: Tensor, source: Tensor) -> Tensor:
    """The frames of an output that are compared with the source's frames, in their size, by Pillow."""
    taken = five_compared(output.shape[1])[: source.shape[1]]
    return by_pillow(output[:, taken], *source.shape[2:])


def _stacked(folder: Path, item: Item, kind: str) -> Tensor:
    files = [folder / item.extra[kind] / name for name in compared(folder, item)]
    images = [read_image(file).pixels for file in files]
    sizes = {tuple(image.shape) for image in images if image is not None}
    if len(sizes) > 1:
        raise DataError(
            f"frames are of {len(sizes)} sizes", where=str(files[0].parent), fix="unpack the download again"
        )
    return torch.cat([image for image in images if image is not None], 1)


@dataclass(frozen=True)
class FiVE(Clips, Sourced):
    """FiVE, one clip a pair of prompts; frames keep the source's rate, since they are compared one by one.

    The prompt is the target prompt, without the brackets that mark what changes; a file of rewritten prompts can turn
    it into an instruction. ``extra`` has ``source_prompt``, ``target_prompt``, ``questions``, and the folders of source
    frames and masks, ``frames`` and ``masks``, relative to the root.

    Attributes:
        root: Folder with ``edit_prompt/``, ``images/``, ``bmasks/`` and ``videos/``.
    """

    name: ClassVar[str] = "five"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "FiVE and FiVE-Acc, 420 pairs of six kinds of edit; CC-BY-NC-4.0."
    source: ClassVar[Source] = Source(
        home="https://huggingface.co/datasets/LIMinghan/FiVE-Fine-Grained-Video-Editing-Benchmark",
        download=(
            "hf download --repo-type dataset LIMinghan/FiVE-Fine-Grained-Video-Editing-Benchmark, "
            "and unpack images.zip, bmasks.zip and videos.zip"
        ),
        licence="CC-BY-NC-4.0, not for commercial use",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "yn": "both yes-no questions are answered as for the target",
        "mc": "the target is chosen",
        "union": "one of the two",
        "inter": "both of the two",
        "structure_distance": "how far the layout is from the source's, lower is better",
        "psnr_unedit_part": "PSNR outside the mask in dB",
        "lpips_unedit_part": "LPIPS outside the mask, lower is better",
        "mse_unedit_part": "squared error outside the mask, lower is better",
        "ssim_unedit_part": "SSIM outside the mask",
        "clip_similarity_target_image": "frames show the target prompt, 0 to 100",
        "clip_similarity_target_image_edit_part": "the same within the mask",
        "niqe_target_image": "NIQE, lower is better",
        "motion_fidelity_score": "points move as in the source",
    }
    lower_is_better: ClassVar[tuple[str, ...]] = (
        "structure_distance",
        "lpips_unedit_part",
        "mse_unedit_part",
        "niqe_target_image",
    )
    needs: ClassVar[Needs] = {
        **dict.fromkeys(five.ACCURACY, (Judge("Qwen/Qwen2.5-VL-7B-Instruct", answers=3),)),
        "structure_distance": (DINO_B8,),
        "lpips_unedit_part": (Weights("squeezenet1_1-b8a52dc0.pth", origin="download.pytorch.org/models"),),
        "clip_similarity_target_image": (CLIP_L14,),
        "clip_similarity_target_image_edit_part": (CLIP_L14,),
        "niqe_target_image": (Weights("niqe_modelparameters.mat", origin="github.com/chaofengc/IQA-PyTorch"),),
        "motion_fidelity_score": (COTRACKER3,),
    }

    scorers: ClassVar[dict[str, Scorer]] = {
        "psnr_unedit_part": partial(background, psnr),
        "mse_unedit_part": partial(background, mse),
        "ssim_unedit_part": partial(background, partial(ssim, border="reflected")),
    }
    ranges: ClassVar[Mapping[str, Range]] = five.CONVENTIONAL

    root: str = "data/FiVE"
    frames: int = 41
    fps: int = 0
    max_edge: int = 832

    def read(self) -> Iterator[Draft]:
        """One item a pair, file by file."""
        for kind, (name, (fewest, most)) in enumerate(zip(TYPES, ENTRIES, strict=True), 1):
            path = self.folder / "edit_prompt" / f"edit{kind}_FiVE.json"
            rows = list(checked(read_json(path, self.source, list), SCHEMA, path, self.source))
            if not fewest <= len(rows) <= most:
                asked = f"{fewest}" if fewest == most else f"{fewest} or {most}"
                raise DataError(
                    f"{len(rows)} entries instead of {asked}", where=str(path), fix=f"get {self.source.download}"
                )
            for number, row in enumerate(rows):
                if str(row["editing_type_id"]) != str(kind):
                    what = f"an edit of type {row['editing_type_id']}"
                    raise refuse(what, path, number, "editing_type_id", f"the file holds type {kind}", self.source)
                video, target = row["video_name"], row["target_prompt"]
                for folder in ("images", "bmasks"):
                    if not (self.folder / folder / video).is_dir():
                        raise refuse(
                            f"the folder {folder}/{video} is missing", path, number, "video_name", "", self.source
                        )
                questions = {question: row[question] for question in QUESTIONS if row.get(question)}
                yield Draft(
                    id=f"edit{kind}-{number:03d}-{word(video)}",
                    task="v2v",
                    prompt=plain(target),
                    # As the official script has it: as many letters of the prompt as the entry's own folder name has.
                    output=f"{video}/{kind}_{target[: len(row['save_dir']) - 2]}.mp4",
                    metrics=tuple(metric for metric in self.metrics if questions or metric not in five.ACCURACY),
                    category=name,
                    videos=(f"videos/{video}.mp4",),
                    extra={
                        "source_prompt": plain(row["source_prompt"]),
                        "target_prompt": plain(target),
                        "questions": questions,
                        "frames": f"images/{video}",
                        "masks": f"bmasks/{video}",
                    },
                )

    def source_files(self, item: Item) -> dict[str, Path]:
        """The clip, and the frames and masks that its edit is compared with."""
        names = [f"{item.extra[kind]}/{name}" for name in compared(self.folder, item) for kind in ("frames", "masks")]
        return {**super().source_files(item), **{name: self.folder / name for name in names}}

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """FiVE-Acc over the items that have questions, and the conventional figures over all."""
        asked = [item for item in items if set(five.ACCURACY) <= set(item.metrics)]
        return [
            Tally("FiVE-Acc", facts(asked, five.ACCURACY), five.accuracies, "five_acc"),
            Tally("FiVE", facts(items, five.CONVENTIONAL), five.conventional, "five", apart=True),
        ]


def plain(prompt: str) -> str:
    """A prompt without the brackets that mark what changes."""
    return prompt.replace("[", "").replace("]", "")
