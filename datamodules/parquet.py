"""Rows of the released trainer's parquet files: conversations, and what its VAE and vision tower made of their media.

Columns: ``inputs`` (JSON message list), ``images`` (paths), ``videos`` (path, duration, crop method), and where the
released preprocessing went over it ``KIND_vae_latents``, ``KIND_embeds`` and ``KIND_grid_thw`` of the ``image`` and
``video`` messages, in order. Latents ``[1, 2C, t, h, w]`` and embeddings ``[tokens, D]`` are files of ``torch.save``.
These are pickles; they are read by the one loader of torch that runs nothing, and only after their size was checked.
"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.conversation import Conversation, Media
from bernini.errors import ConfigError, DataError
from bernini.planner.vision import VisionConfig, Visual
from datamodules.sources import finished

LATENTS, EMBEDS, GRIDS = "{}_vae_latents", "{}_embeds", "{}_grid_thw"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FRAMES, _PIXELS = 4, 8  # frames and pixels, along an edge, of a cell of Wan's latents
_AGAIN = "make the row again with the released preprocessing, or leave it out with --skip-bad"


@dataclass(frozen=True)
class ParquetRow:
    """One row that has been found but not read.

    Attributes:
        key: Key it gets.
        file: The parquet file.
        group: Number of the row group in the file.
        row: Number of the row in the group.
        vision: What the vision tower of its embeddings was told.
        fps: Frames per second of its latents, of which the file says nothing.
    """

    key: str
    file: Path
    group: int
    row: int
    vision: VisionConfig
    fps: float

    @property
    def where(self) -> str:
        """File, row group and row."""
        return f"{self.file}, row group {self.group}, row {self.row}"

    @property
    def identity(self) -> str:
        """Text that changes when another row takes its place."""
        return f"{self.key} {self.file.name} {self.file.stat().st_size} {self.group} {self.row}"

    def conversation(self, task: str | None = None, targets: bool = True) -> Conversation:
        """The sample with latents and embeddings as far as the row has them; other media are known by path alone.

        Embeddings do not say which tower made them.

        Args:
            task: Task that goes before the row's own ``source_name``.
            targets: Whether a target is required; if not, a given one is left out.

        Raises:
            ConfigError: The task is unknown.
            DataError: The row cannot be understood, holds anything but tensors, or does not suit its task.
        """
        row = _group(self.file, self.file.stat().st_mtime_ns, self.group)[self.row]
        try:
            sample = Conversation.from_row(row, task, self.key)
        except DataError as error:
            raise DataError(error.what, where=self.where, why=error.why, fix=error.fix or _AGAIN) from error
        for kind, chosen in (("image", "is_image"), ("video", "is_video")):
            media = [m.media for m in sample.visual if m.media is not None and getattr(m, chosen)]
            self._fill(row, kind, media)
        return finished(sample, self.file.parent, self.where, targets)

    def _fill(self, row: Mapping[str, Any], kind: str, media: Sequence[Media]) -> None:
        for number, (item, blob) in enumerate(zip(media, self._column(row, LATENTS.format(kind), media), strict=True)):
            if blob is None:
                break
            posterior = read_latent(blob, f"{self.where}, {LATENTS.format(kind)}[{number}]")
            _, t, h, w = posterior.shape
            frames = _FRAMES * (t - 1) + 1
            item.fps = self.fps if kind == "video" else 0.0
            item.posterior = posterior
            size = {"height": _PIXELS * h, "width": _PIXELS * w}
            item.source = {**size, "frames": frames, "fps": item.fps, "sampled": frames}
        embeds, grids = (self._column(row, name.format(kind), media) for name in (EMBEDS, GRIDS))
        for number, (item, blob, grid) in enumerate(zip(media, embeds, grids, strict=True)):
            if blob is None:
                break
            where = f"{self.where}, {EMBEDS.format(kind)}[{number}]"
            item.visual = read_embeds(blob, grid, kind == "video", self.vision, where)

    def _column(self, row: Mapping[str, Any], name: str, media: Sequence[Media]) -> Sequence[Any]:
        """A value for each visual of one kind, or nothings where the row lacks the column."""
        values = row.get(name) or [None] * len(media)
        if len(values) != len(media):
            what = f"{len(values)} {name} for {len(media)} messages"
            raise DataError(what, where=self.where, why="the row is not in the released format", fix=_AGAIN)
        return values


def find_rows(path: str | Path, vision: VisionConfig, fps: float) -> list[ParquetRow]:
    """Rows of a parquet file, or of all in a folder by name.

    Args:
        path: File or folder.
        vision: What the vision tower of the embeddings was told.
        fps: Frames per second of the latents; the released preprocessing takes 16.

    Raises:
        ConfigError: pyarrow is not installed, or there is no such path.
        DataError: A file is no parquet of conversations, or there is no row.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ConfigError("no parquet file here", where=str(path), fix="name a .parquet file or a folder with them")
    rows: list[ParquetRow] = []
    for file in files:
        with _opened(file) as opened:
            if "inputs" not in opened.schema_arrow.names:
                what, why = "the file has no column `inputs`", f"it has {', '.join(opened.schema_arrow.names)}"
                raise DataError(what, where=str(file), why=why, fix="give parquet files of the released format")
            sizes = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
        places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        rows += [ParquetRow(f"{len(rows) + n:08d}", file, *place, vision, fps) for n, place in enumerate(places)]
    if not rows:
        raise DataError("no sample found", where=str(path), why="the files have no rows")
    return rows


def _opened(file: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        fix = "pip install 'bernini[parquet]'"
        raise ConfigError("pyarrow is not installed", where="--from-parquet", fix=fix) from error
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the file cannot be read: {error}", where=str(file), fix="copy it again") from error


@lru_cache(maxsize=1)
def _group(file: Path, written: int, number: int) -> list[dict[str, Any]]:
    """Rows of a row group, which are asked for one after the other, of the file as it was written at a time."""
    known = ["inputs", "images", "videos", "task", "source_name"]
    known += [name.format(kind) for name in (LATENTS, EMBEDS, GRIDS) for kind in ("image", "video")]
    with _opened(file) as opened:
        try:
            columns = [name for name in known if name in opened.schema_arrow.names]
            rows: list[dict[str, Any]] = opened.read_row_group(number, columns).to_pylist()
        except (ValueError, OSError) as error:  # pyarrow's own errors are among these
            where = f"{file}, row group {number}"
            raise DataError(f"the rows cannot be read: {error}", where=where, fix="copy the file again") from error
    for row in rows:  # a struct has all of its fields, absent ones as nothing
        row["videos"] = [_given(video) for video in row.get("videos") or []]
    return rows


def _given(video: Any) -> Any:
    return {name: value for name, value in video.items() if value is not None} if isinstance(video, dict) else video


def read_latent(blob: Any, where: str) -> Tensor:
    """The posterior ``[2C, t, h, w]`` of a file of ``torch.save`` with ``[1, 2C, t, h, w]``, in its own dtype.

    Raises:
        DataError: It is anything else; see `read_tensor`.
    """
    tensor = read_tensor(blob, where)
    if tensor.ndim != 5 or tensor.shape[0] != 1 or tensor.shape[1] % 2 or 0 in tensor.shape:
        why = "latents are mean and log-variance, [1, 2C, t, h, w]"
        raise DataError(f"a latent has the shape {list(tensor.shape)}", where=where, why=why, fix=_AGAIN)
    return tensor[0]


def read_embeds(blob: Any, grid: Any, is_video: bool, vision: VisionConfig, where: str) -> Visual:
    """What a vision tower made of an image or a clip, from a file of ``torch.save`` with ``[tokens, D]``.

    Args:
        blob: The file's bytes.
        grid: ``(t, h, w)`` in patches.
        is_video: Whether it is a clip.
        vision: What the tower was told.
        where: File, row and column, for errors.

    Raises:
        DataError: It is anything else, or the grid is not of that many tokens.
    """
    tensor = read_tensor(blob, where)
    whole = isinstance(grid, list) and len(grid) == 3 and all(isinstance(n, int) and n > 0 for n in grid)
    if not whole or tensor.ndim != 2 or len(tensor) * vision.merge**2 != math.prod(grid):
        what = f"embeddings of shape {list(tensor.shape)} for a grid of {grid}"
        why = f"{vision.merge} x {vision.merge} patches of the grid make a token"
        raise DataError(what, where=where, why=why, fix=_AGAIN)
    return Visual(torch.empty(0, vision.columns), tuple(grid), is_video, vision, tensor)


def read_tensor(blob: Any, where: str) -> Tensor:
    """The one tensor of a file of ``torch.save``: finite numbers of fp32, fp16 or bf16 on the CPU.

    Raises:
        DataError: The bytes are in another format, claim more than they hold, or are anything but such a tensor.
    """

    def refuse(why: str, cause: Exception | None = None) -> DataError:
        error = DataError("the blob is not allowed", where=where, why=why, fix=_AGAIN)
        error.__cause__ = cause
        return error

    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            members = archive.infolist()
    except (TypeError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise refuse("rule `torch.save only`: it is no archive of torch.save", error) from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(blob):
        raise refuse("rule `no bombs`: what it holds is larger than it is")
    try:
        tensor = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile archive comes to
        reason = str(error).partition("\n")[0][:200]
        raise refuse(f"rule `weights only`: nothing but tensors is loaded ({reason})", error) from error
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise refuse(f"rule `one tensor`: it is {type(tensor).__name__}, not one plain tensor")
    if tensor.dtype not in _DTYPES:
        raise refuse(f"rule `one tensor`: its numbers are {tensor.dtype}, not fp32, fp16 or bf16")
    if tensor.numel() * tensor.element_size() > len(blob):
        raise refuse("rule `no bombs`: what it holds is larger than it is")
    if not tensor.isfinite().all():
        raise refuse("rule `one tensor`: it has numbers that are not finite")
    return tensor.detach()
