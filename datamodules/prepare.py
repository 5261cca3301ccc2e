"""`bernini prepare`: clips to shards, raw or with the features of a frozen VAE, text encoder and vision tower."""

import time
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bernini.conversation import Conversation, Media, Message
from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.files import replacing
from bernini.media import fit, read_image, read_video
from bernini.planner.vision import VisionConfig
from bernini.tasks import get_task
from datamodules.buckets import Bounds
from datamodules.commands import underscored
from datamodules.decoder import decoder
from datamodules.loading import BAD_SAMPLES
from datamodules.parquet import ParquetRow, find_rows
from datamodules.preparing import Job, Making, in_processes, on_ray, one_thread
from datamodules.progress import Run
from datamodules.shards import Shards
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
    "from_parquet": "the input is a parquet file of the released format, or a folder of them",
    "ray": "share the work among the workers of a Ray cluster",
}
TEXT_FEATURES = "text_features.safetensors"
RELEASED_FPS = 16  # of the latents in released parquet files


class Reader:
    """Reads samples from their files.

    Args:
        task: Task that goes before the samples' own.
        targets: Whether targets are required; if not, they are left out.
        fps: Frames per second of the clips; ``None`` keeps each file's.
        bounds: What is taken of them; without limits, edges are only rounded to multiples of 16.
        copy: Whether a file that is used as it is may be copied, in place of its decoded pixels.
    """

    def __init__(
        self,
        task: str | None,
        targets: bool,
        fps: float | None,
        bounds: Bounds,
        copy: bool,
    ) -> None:
        self.task, self.targets = task, targets
        self.fps, self.bounds, self.copy = fps, bounds, copy

    def __call__(self, source: Source | ParquetRow) -> Conversation:
        """The sample with pixels, or the file that is stored as it is, of all media without features."""
        sample = source.conversation(self.task, self.targets)
        for message in sample.messages:
            if message.media is not None and not message.media.prepared:
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
        else:
            for media in clips:  # a released row brings features of a tower, which none is named for
                media.visual = None
        if self.codec:
            from bernini.renderer.latents import encode_media

            for media, posterior in zip(clips, encode_media(self.codec, clips), strict=True):
                media.posterior = posterior.to("cpu", self.dtype) if media.posterior is None else posterior
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


@dataclass(frozen=True)
class Recipe:
    """All that a prepared sample depends on, but for what it is made of; see `prepare`."""

    task: str | None
    targets: bool
    fps: float | None
    bounds: Bounds
    vae: str | None
    text: str | None
    planner: str | None
    vision: VisionConfig | None
    dtype: str

    def plan(self) -> dict[str, Any]:
        """Plain values on which the bytes of a sample depend; limits refuse samples and change none."""
        plan = asdict(self)
        return {name: value for name, value in (plan | plan.pop("bounds")).items() if name != "limits"}

    def open(self, device: str) -> Callable[[Source | ParquetRow], Conversation]:
        """The map from a sample that was found to the sample that is stored.

        Args:
            device: Device of the models, which are loaded.

        Raises:
            CheckpointError: The VAE, the text encoder or the planner cannot be read.
            ConfigError: The tower takes other patches.
        """
        models = self.vae, self.text, DTYPES[self.dtype], torch.device(device), self.planner, self.vision
        features = Featurizer(*models)
        copy = not features.reads_pixels
        reader = Reader(self.task, self.targets, self.fps, self.bounds, copy=copy)

        def prepared(source: Source | ParquetRow) -> Conversation:
            (sample,) = features([reader(source)])
            return sample

        return prepared


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
    devices: list[str] | None = None,
    workers: int = 0,
    samples_per_shard: int = 100,
    lossless: bool = False,
    no_targets: bool = False,
    skip_bad: bool = False,
    from_parquet: bool = False,
    ray: bool = False,
) -> Shards:
    """Turn clips into shards; a run that was broken off goes on where it stopped.

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
        devices: Devices that workers share, as [cuda:0,cuda:1]; null takes all GPUs, or the CPU.
        workers: Processes that make shards, each with models of its own; 0 makes them in this one.
        samples_per_shard: Samples of the input that a shard is made of.
        lossless: Store clips without any loss.
        no_targets: Leave targets out, as for prediction; a plain NAME.mp4 is then a source.
        skip_bad: Leave bad samples out and list them in bad_samples.jsonl, in place of stopping at the first.
        from_parquet: The input is a parquet file of the released format, or a folder of them; what its VAE and, if the
            planner is given, its vision tower made is taken over.
        ray: Share the work among the workers of a Ray cluster, in place of processes of this machine.

    Returns:
        The shards.

    Raises:
        ConfigError: The input is not there, or the output holds shards of something else.
        DataError: A sample is bad, or none is left.
        CheckpointError: The VAE, the text encoder or the planner cannot be read.
    """
    started = time.monotonic()
    task, names = task and get_task(task).name, _device_names(devices)
    for number, least, what in ((workers, 0, "workers"), (samples_per_shard, 1, "samples_per_shard")):
        if number < least:
            raise ConfigError(f"{what} is {number}", where=f"--{what}", fix=f"give {least} or more")
    if ray and devices:
        raise ConfigError("Ray shares the devices out itself", where="--devices", fix="leave --devices away")
    found: Sequence[Source | ParquetRow]
    if from_parquet:
        found = find_rows(input, vision or _vision_of(planner), fps or RELEASED_FPS)
    else:
        found = find_sources(input, targets=not no_targets)
    bounds = Bounds(max_frames, max_edge, max_area, limits or Limits())
    recipe = Recipe(task, not no_targets, fps, bounds, vae, text, planner, vision, dtype)
    run = Run(
        output, recipe.plan() | {"lossless": lossless, "negative_prompt": negative_prompt}, found, samples_per_shard
    )
    making, left = Making(run.root, recipe.open, bounds.limits, lossless, skip_bad), run.left
    done = on_ray(making, left, max(workers, 1)) if ray else in_processes(making, left, names, workers)
    _show(done, len(found), sum(len(job.samples) for job in left))

    def write_table(tasks: set[str]) -> None:
        if text:
            features = Featurizer(None, text, DTYPES[dtype], torch.device(names[0]))
            with replacing(run.root / TEXT_FEATURES) as path, one_thread():
                features.write_table(path, tasks, negative_prompt)

    bad = run.finish(write_table)
    shards = Shards(output)
    size = sum(path.stat().st_size for path in Path(output).iterdir()) / 1e6
    skipped = f", {bad} bad ones skipped (see {BAD_SAMPLES})" if bad else ""
    print(f"{len(shards)} samples in {output}{skipped}, {size:.1f} MB, {time.monotonic() - started:.0f} s")
    return shards


def _vision_of(planner: str | None) -> VisionConfig:
    if planner is None:
        return VisionConfig()
    from bernini.planner.settings import PlannerSettings  # with all of transformers' planner

    return PlannerSettings.of(Path(planner)).vision


def _device_names(devices: list[str] | None) -> list[str]:
    if not devices:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    for name in devices:
        try:
            torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"there is no device {name!r}", where="--devices", fix="as [cuda:0,cuda:1]") from error
    return devices


def _show(done: Iterable[Job], total: int, left: int) -> None:
    """A bar that counts samples, while shards are made."""
    from rich.progress import Progress

    with Progress() as progress:
        bar = progress.add_task("preparing", total=total, completed=total - left)
        for job in done:
            progress.advance(bar, len(job.samples))


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
