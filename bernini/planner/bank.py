"""Conversations written once, in every variant that dropout makes of them, as dense tensors to gather batches from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bernini.bank import load_tensors, save_tensors
from bernini.conversation import Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import DataError
from bernini.planner.masking import TARGET, TEXT
from bernini.planner.template import IGNORED, PlannerSample, PlannerTemplate
from bernini.planner.vision import VisionConfig, Visual, add_visuals
from bernini.tasks import TASKS, UNDERSTANDING

NAMES = (*TASKS, *UNDERSTANDING)
"""Tasks, in the order of their numbers."""

COINS = ("text", "image", "video")
"""What dropout leaves out; coin i adds ``2**i`` to the number of a variant."""


@dataclass(frozen=True)
class PlanStack:
    """S samples as the planner reads them, in V variants, which see F frames, pairs of them for clips.

    Rows are filled up behind to the longest; a token that fills is text and later than all others, so that none of them
    sees it. Numbers are as small as they can be: int32 and less.

    Attributes:
        task: ``[S]`` number of the task in `NAMES`.
        count: ``[S]`` target tokens.
        own: ``[S, K]`` frames of a sample; what fills is a frame that nothing refers to.
        variants: ``[S, 8]`` the row of the sample without what the coins of `COINS` say.
        ids: ``[V, L]`` token ids.
        token_type: ``[V, L]`` text, source or target.
        segment_id: ``[V, L]``.
        position_ids: ``[V, L, 3]``.
        shows: ``[V, L]`` which token of the sample's K frames a visual's token stands for.
        targets: ``[V, N]`` places of the target tokens.
        labelled: ``[V, A]`` places of the tokens that predict labels.
        labels: ``[V, A]`` the labels; what fills is -100.
        length: ``[V]`` tokens without those that fill.
        frames: ``[F, P, C]`` uint8 patches of a frame, to be normalised.
        grid: Rows and columns of patches, the same for all frames.
    """

    task: Tensor
    count: Tensor
    own: Tensor
    variants: Tensor
    ids: Tensor
    token_type: Tensor
    segment_id: Tensor
    position_ids: Tensor
    shows: Tensor
    targets: Tensor
    labelled: Tensor
    labels: Tensor
    length: Tensor
    frames: Tensor
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.task)

    def map(self, function: Callable[[Tensor], Tensor]) -> "PlanStack":
        """The stack with each tensor given to a function."""
        return PlanStack(**{name: function(x) for name, x in self.tensors().items()}, grid=self.grid)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}

    def save(self, path: Path, made_from: str) -> None:
        """Write a safetensors file; ``made_from`` is whatever decides the samples, which `load` compares."""
        save_tensors(path, self.tensors(), made_from, grid=" ".join(map(str, self.grid)))

    @classmethod
    def load(cls, path: Path, device: torch.device, made_from: str) -> "PlanStack":
        """Read what `save` wrote onto a device.

        Raises:
            DataError: The file is damaged, is something else, or was made from something else.
        """
        tensors, told = load_tensors(path, device, made_from)
        if absent := {f.name for f in fields(cls) if f.name != "grid"} - tensors.keys():
            why, fix = f"there is no {min(absent)} in it", "delete the file to have it made anew"
            raise DataError("the file of samples is of an older version", where=str(path), why=why, fix=fix)
        rows, columns = map(int, told["grid"].split())
        return cls(**tensors, grid=(rows, columns))


def write(sample: Conversation, template: PlannerTemplate) -> PlanStack:
    """A stack of one sample. Only samples with a target lose anything to dropout.

    Args:
        sample: The sample, with all pixels.
        template: Writes it.

    Raises:
        DataError: Its images and clips differ in size, or the template refuses it.
    """
    written: dict[tuple[int, ...], PlannerSample] = {}
    shows, variants = [], []
    add_visuals(sample, template.vision)
    visuals = [media.visual for media in sample.media() if media.visual is not None]
    tokens = [visual.tokens for visual in visuals]
    places = torch.arange(sum(tokens)).split(tokens)
    own = dict(zip(map(id, sample.visual), places, strict=True))
    for number in range(2 ** len(COINS)):
        kept = _without(sample, number) if sample.targets else sample
        key = tuple(map(id, kept.messages))
        if key not in written:
            written[key] = template(kept)
            shows.append(_shown(written[key], [own[id(message)] for message in kept.visual]))
        variants.append(list(written).index(key))
    rows = list(written.values())
    asked = [torch.nonzero(row.labels[1:] != IGNORED).squeeze(1) for row in rows]
    grids = {visual.grid[1:] for visual in visuals}
    if len(grids) != 1:
        raise DataError(
            f"images and clips of {len(grids)} sizes in one sample",
            where=sample.key,
            why="a bank holds frames of one size",
            fix="resize them to one, or train with bernini.planner.module.PlannerModule",
        )
    frames = torch.cat([_to_bytes(visual) for visual in visuals])
    return PlanStack(
        task=torch.tensor([NAMES.index(sample.task)], dtype=torch.int16),
        count=(rows[0].token_type == TARGET).sum(dtype=torch.int16)[None],
        own=torch.arange(len(frames), dtype=torch.int32)[None],
        variants=torch.tensor([variants], dtype=torch.int32),
        ids=_rows([row.ids for row in rows]).int(),
        token_type=_rows([row.token_type for row in rows]).to(torch.int8),
        segment_id=_rows([row.segment_id for row in rows]).short(),
        position_ids=_rows([row.position_ids.T for row in rows]).short(),
        shows=_rows(shows).short(),
        targets=_rows([torch.nonzero(row.token_type == TARGET).squeeze(1) for row in rows]).short(),
        labelled=_rows(asked).short(),
        labels=_rows([row.labels[1:][places] for row, places in zip(rows, asked, strict=True)], IGNORED).int(),
        length=torch.tensor([len(row) for row in rows], dtype=torch.int32),
        frames=frames,
        grid=grids.pop(),
    )


def _without(sample: Conversation, number: int) -> Conversation:
    """The sample as dropout leaves it when the coins of a variant's number fall."""
    coins = DropoutConfig(**{name: float(number >> place & 1) for place, name in enumerate(COINS)})
    return coins.apply(sample, torch.Generator())


def _shown(row: PlannerSample, own: Sequence[Tensor]) -> Tensor:
    """For each token of a row the number of what it shows, which is given visual by visual."""
    shows = torch.zeros_like(row.ids)
    if own:
        shows[row.token_type != TEXT] = torch.cat(list(own))
    return shows


def _rows(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    return pad_sequence(list(parts), batch_first=True, padding_value=fill)


def join(stacks: Sequence[PlanStack]) -> PlanStack:
    """Stacks as one, their rows filled up to the longest.

    Raises:
        DataError: Their frames have different sizes.
    """
    if len({(stack.grid, stack.frames.shape[1:]) for stack in stacks}) > 1:
        raise DataError("samples of several frame sizes", why="a bank holds frames of one size", fix="resize them")

    def rows(name: str, fill: int = 0) -> Tensor:
        parts = [getattr(stack, name) for stack in stacks]
        shape = sum(map(len, parts)), max(part.shape[1] for part in parts), *parts[0].shape[2:]
        whole, start = parts[0].new_full(shape, fill), 0
        for part in parts:
            whole[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return whole

    def shifted(name: str, by: str) -> Tensor:
        """Row numbers within each stack as row numbers within all."""
        sizes = torch.tensor([len(getattr(stack, by)) for stack in stacks])
        before = (sizes.cumsum(0) - sizes).repeat_interleave(torch.tensor([len(stack) for stack in stacks]))
        numbers = rows(name)
        return numbers + before[:, None].to(numbers)

    return PlanStack(
        task=torch.cat([stack.task for stack in stacks]),
        count=torch.cat([stack.count for stack in stacks]),
        own=shifted("own", "frames"),
        variants=shifted("variants", "ids"),
        **{name: rows(name) for name in ("ids", "token_type", "segment_id", "position_ids", "shows", "targets")},
        labelled=rows("labelled"),
        labels=rows("labels", IGNORED),
        length=torch.cat([stack.length for stack in stacks]),
        frames=torch.cat([stack.frames for stack in stacks]),
        grid=stacks[0].grid,
    )


def _to_bytes(visual: Visual) -> Tensor:
    """Patches ``[t, P, C]`` as the bytes that they were made of."""
    mean, std = statistics(visual.config, visual.patches.device)
    patches = visual.patches.unflatten(1, (3, -1))
    return ((patches * std + mean) * 255).round().to(torch.uint8).flatten(1).unflatten(0, (visual.grid[0], -1))


def statistics(config: VisionConfig, device: torch.device) -> Tensor:
    """Mean and standard deviation of the channels, ``[2, 3, 1]``."""
    return torch.tensor([config.mean, config.std], device=device)[..., None]


def to_patches(frames: Tensor, channels: Tensor) -> Tensor:
    """Patches ``[..., C]`` as `bernini.planner.vision.prepare` makes them, to the bit, from the bytes of a stack.

    Args:
        frames: ``[..., C]`` uint8.
        channels: Their `statistics`.
    """
    mean, std = channels
    return ((frames.float().unflatten(-1, (3, -1)) / 255 - mean) / std).flatten(-2)
