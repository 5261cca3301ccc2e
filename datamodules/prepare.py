"""`bernini prepare`: clips to shards, raw or with the features of a frozen VAE, text encoder and vision tower."""

import json
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from bernini.conversation import Conversation, Media, Message
from bernini.decoding import Limits
from bernini.errors import BerniniError, ConfigError
from bernini.media import fit, read_image, read_video
from bernini.planner.vision import VisionConfig
from bernini.tasks import get_task
from datamodules.buckets import Bounds
from datamodules.commands import underscored
from datamodules.decoder import decoder
from datamodules.loading import BAD_SAMPLES, ErrorsAsValues
from datamodules.shards import Shards, write_shards
from datamodules.sources import CLIP_OPTIONS, Source, find_sources

if TYPE_CHECKING:
    from bernini.planner.features import ViTEncoder
    from bernini.text.encoder import TextEncoder
    from bernini.vae.codec import LatentCodec

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLAGS: dict[str | int, str] = {
    "lossless": "store clips without any loss",
    "no_targets": "leave targets out, as for prediction; a plain NAME.mp4 is then a source",
    "skip_bad": "leave bad samples out and list them in bad_samples.jsonl",
}
TEXT_FEATURES = "text_features.safetensors"
TOY_BATCH = 8


class Reader(Dataset[Conversation]):
    """Reads samples from their files.

    Args:
        sources: Samples to read.
        task: Task that goes before the samples' own.
        targets: Whether targets are required; if not, they are left out.
        fps: Frames per second of the clips; ``None`` keeps each file's.
        bounds: What is taken of them; without limits, edges are only rounded to multiples of 16.
        copy: Whether a file that is used as it is may be copied, in place of its decoded pixels.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        task: str | None,
        targets: bool,
        fps: float | None,
        bounds: Bounds,
        copy: bool,
    ) -> None:
        self.sources, self.task, self.targets = sources, task, targets
        self.fps, self.bounds, self.copy = fps, bounds, copy

    def __getitem__(self, number: int) -> Conversation:
        source = self.sources[number]
        sample = source.conversation(self.task, self.targets)
        for message in sample.messages:
            if message.media is not None:
                message.media = self._read(message, message.media, source.where)
        return sample

    def _read(self, message: Message, media: Media, where: str) -> Media:
        assert media.path is not None
        path, where = Path(media.path), f"{media.path} (sample {where})"
        if message.is_image:
            read = read_image(path, where=where, limits=self.bounds.limits)
            whole = path.suffix.lower() in (".png", ".jpg", ".jpeg")
        else:
            known = {name: media.options[name] for name in CLIP_OPTIONS if media.options.get(name) is not None}
            decode = decoder(self.bounds.limits)
            known |= {"max_frames": self.bounds.max_frames, "decode": decode}
            read = read_video(path, fps=self.fps, where=where, **known)
            whole = path.suffix.lower() == ".mp4" and read.source["sampled"] == decode.probe(path, where).frames
        fitted = fit(read, self.bounds.max_edge, max_area=self.bounds.max_area)
        fitted.options = media.options
        if self.copy and whole and fitted.pixels is read.pixels:  # as it was
            fitted.pixels = None
        return fitted


class Featurizer:
    """Replaces pixels and texts by the features of frozen models.

    Args:
        vae: Folder of a Wan VAE; without it and a planner pixels stay pixels.
        text: Folder of a Wan checkpoint with a text encoder; without it texts stay texts.
        dtype: Dtype in which features are stored; they are computed in fp32.
        device: Device that computes.
        planner: Folder of a planner, for its vision tower; without it nothing is made for a planner.
        vision: How that tower takes pixels; what the folder says if null.

    Raises:
        CheckpointError: A folder does not hold what it should.
        ConfigError: The tower takes other patches.
    """

    def __init__(
        self,
        vae: str | None,
        text: str | None,
        dtype: torch.dtype,
        device: torch.device,
        planner: str | None = None,
        vision: VisionConfig | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.codec: LatentCodec | None = None
        self.encoder: TextEncoder | None = None
        self.vit: ViTEncoder | None = None
        if planner:
            from bernini.planner import features

            self.vit = features.ViTEncoder.from_pretrained(planner, vision, device)
        if vae:
            from bernini.vae import codec

            self.codec = codec.LatentCodec.from_pretrained(vae).to(device)
        if text:
            from bernini.text import encoder

            self.encoder = encoder.TextEncoder.from_pretrained(text).to(device)

    @property
    def reads_pixels(self) -> bool:
        """Whether features take the place of pixels."""
        return self.codec is not None or self.vit is not None

    def __call__(self, samples: Sequence[Conversation]) -> Sequence[Conversation]:
        """Fill ``posterior``, ``visual`` and ``text_features`` of samples in, and take their pixels out.

        Clips of one size are encoded together.
        """
        clips = [media for sample in samples for media in sample.media()]
        if self.vit:
            self.vit.add_features(samples, self.dtype)
        if self.codec:
            from bernini.renderer.latents import encode_media

            for media, posterior in zip(clips, encode_media(self.codec, clips), strict=True):
                media.posterior = posterior.to("cpu", self.dtype)
        if self.reads_pixels:
            for media in clips:
                media.pixels = None
        if self.encoder:
            from bernini.text.prompt import renderer_text

            texts = self._encode([renderer_text(sample.task, sample.prompt) for sample in samples])
            for sample, rows in zip(samples, texts, strict=True):
                sample.text_features = {"text": rows}
        return samples

    def write_table(self, path: Path, tasks: Iterable[str], negative_prompt: str) -> None:
        """Write the features that samples share: of each task without a prompt, and of the negative prompt."""
        if self.encoder:
            from bernini.text.encoder import save_features
            from bernini.text.prompt import renderer_text

            texts = [*(renderer_text(task, "") for task in sorted(tasks)), negative_prompt]
            save_features(path, dict(zip(texts, self._encode(texts), strict=True)))

    def _encode(self, texts: list[str]) -> list[torch.Tensor]:
        assert self.encoder is not None
        return [rows.to("cpu", self.dtype) for rows in self.encoder.encode(texts)]


def prepare(
    input: str,
    output: str,
    task: str | None = None,
    fps: float | None = 16,
    max_frames: int | None = 81,
    max_edge: int | None = 480,
    max_area: int | None = None,
    limits: Limits | None = None,
    vae: str | None = None,
    text: str | None = None,
    planner: str | None = None,
    vision: VisionConfig | None = None,
    negative_prompt: str = "",
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16",
    device: str = "auto",
    workers: int = 0,
    samples_per_shard: int = 1000,
    lossless: bool = False,
    no_targets: bool = False,
    skip_bad: bool = False,
) -> Shards:
    """Turn clips into shards.

    Args:
        input: Folder with NAME.src.mp4, NAME.tgt.mp4, NAME.ref0.png, NAME.txt (prompt), or a JSON-lines list with
            task, prompt, videos, images, target on each line.
        output: Folder for the shards.
        task: Task of every sample, in place of what the input says.
        fps: Frames per second of the clips; null keeps each file's.
        max_frames: Most frames of a clip, 4k + 1; null for no limit.
        max_edge: Longest edge of the frames in pixels; null keeps sizes but for rounding to multiples of 16.
        max_area: Most pixels of a frame, as 230400; larger frames keep their aspect ratio. Null for no limit.
        limits: What a file may cost before it is resized; null takes the defaults.
        vae: Folder of a Wan VAE: store its latents in place of pixels.
        text: Folder with the text_encoder and tokenizer of Wan: store text features too.
        planner: Folder of a planner: store what its vision tower makes of images and clips, in place of their pixels.
        vision: How that tower takes pixels, as in the planner's training; null takes what its folder says.
        negative_prompt: Text of the negative guidance arm, encoded once for all samples.
        dtype: Number format of stored features.
        device: Device for the features; auto takes the GPU if there is one.
        workers: Processes that decode; 0 decodes in this one.
        samples_per_shard: Most samples in one shard.
        lossless: Store clips without any loss.
        no_targets: Leave targets out, as for prediction; a plain NAME.mp4 is then a source.
        skip_bad: Leave bad samples out and list them in bad_samples.jsonl, in place of stopping at the first.

    Returns:
        The shards.

    Raises:
        ConfigError: The input is not there, or the output holds shards already.
        DataError: A sample is bad, or none is left.
        CheckpointError: The VAE, the text encoder or the planner cannot be read.
    """
    started = time.monotonic()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    task = task and get_task(task).name
    sources = find_sources(input, targets=not no_targets)
    features = Featurizer(vae, text, DTYPES[dtype], torch.device(device), planner, vision)
    bounds = Bounds(max_frames, max_edge, max_area, limits or Limits())
    reader = Reader(sources, task, not no_targets, fps, bounds, copy=not features.reads_pixels)
    loader = DataLoader(ErrorsAsValues(reader), sampler=range(len(sources)), batch_size=None, num_workers=workers)
    bad: list[tuple[Source, BerniniError]] = []
    samples = _good(sources, loader, features, bad if skip_bad else None)
    try:
        shards = write_shards(samples, output, samples_per_shard=samples_per_shard, lossless=lossless, limits=limits)
    finally:
        _list_bad(Path(output) / BAD_SAMPLES, bad)
    features.write_table(Path(output) / TEXT_FEATURES, {entry.task for entry in shards.entries}, negative_prompt)
    size = sum(path.stat().st_size for path in Path(output).iterdir()) / 1e6
    skipped = f", {len(bad)} bad ones skipped (see {BAD_SAMPLES})" if bad else ""
    print(f"{len(shards)} samples in {output}{skipped}, {size:.1f} MB, {time.monotonic() - started:.0f} s")
    return shards


def _good(
    sources: Sequence[Source],
    results: Iterable[Conversation | BerniniError],
    features: Featurizer,
    bad: list[tuple[Source, BerniniError]] | None,
) -> Iterator[Conversation]:
    """Finished samples; the errors of bad ones go to ``bad`` or, without it, are raised."""
    from rich.progress import track

    for source, result in track(zip(sources, results, strict=True), "preparing", total=len(sources)):
        try:
            if isinstance(result, BerniniError):
                raise result
            (sample,) = features([result])
        except BerniniError as error:
            if bad is None:
                raise
            bad.append((source, error))
        else:
            yield sample


def _list_bad(path: Path, bad: Sequence[tuple[Source, BerniniError]]) -> None:
    if bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"key": s.key, "what": e.what, "where": e.where or s.where, "why": e.why} for s, e in bad]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_toy_shards(
    folder: str | Path,
    tasks: Sequence[str] | Mapping[str, float],
    count: int,
    *,
    seed: int = 0,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    split: Literal["train", "held_out"] = "train",
    edits: Sequence[str] | None = None,
    vae: str | None = None,
    text: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Shards:
    """Write samples of the toy world as shards: raw ones that keep every pixel, or prepared ones.

    Args:
        folder: Folder for the shards.
        tasks: See `datamodules.toyworld.items`, as for the arguments down to ``edits``.
        count: See there.
        seed: See there.
        frames: See there.
        height: See there.
        width: See there.
        split: See there.
        edits: See there.
        vae: Folder of a Wan VAE: store its latents in place of pixels.
        text: Folder with a text encoder: store text features too.
        progress: Called with the number of samples made.
    """
    from datamodules.toyworld import items

    features = Featurizer(vae, text, torch.float32, torch.device("cpu"))
    made = items(tasks, count, seed=seed, frames=frames, height=height, width=width, split=split, edits=edits)

    def finished() -> Iterator[Conversation]:
        done = 0
        while samples := list(islice(made, TOY_BATCH)):
            yield from features(samples)
            done += len(samples)
            progress(done)

    shards = write_shards(finished(), folder, lossless=True)
    features.write_table(Path(folder) / TEXT_FEATURES, {entry.task for entry in shards.entries}, "")
    return shards


def main(argv: Sequence[str]) -> int:
    """Run `bernini prepare`; options may be written with dashes."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="bernini prepare", exit_on_error=False, description="Turn clips into shards.")
    parser.add_function_arguments(prepare, as_positional=True, skip=set(FLAGS))
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    try:
        options: Any = parser.instantiate(parser.parse_args([underscored(arg) for arg in argv]))
    except ArgumentError as error:
        raise ConfigError(str(error), fix="`bernini prepare --help` lists the options") from error
    prepare(**vars(options))
    return 0
