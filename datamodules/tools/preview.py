"""`bernini data preview`: some samples as a contact sheet, and as a page whose clips play."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import Tensor

from bernini.errors import ConfigError
from bernini.files import replacing
from bernini.media import fit_size, resize, write_image, write_video
from bernini.report import Case, Report, write_report
from bernini.suggest import closest
from datamodules.index import Entry
from datamodules.shards import Shards
from datamodules.storage import StorageConfig
from datamodules.tools.folder import Feature, Folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from bernini.vae.codec import LatentCodec

SHEET, PAGE = "sheet.png", "preview.html"
THUMB, TEXT, GAP = 112, 300, 8  # pixels of the sheet: height of a frame, width of the words, space between
_COLUMNS, _SIZE, _LINE = 42, 13, 17  # letters of a line; pixels of the letters, and from line to line


@dataclass(frozen=True)
class Picture:
    """A visual that can be seen.

    Attributes:
        label: What it is in its sample, as ``source 1``.
        pixels: ``[3, T, H, W]`` uint8, small enough to be shown.
        fps: Frames per second.
    """

    label: str
    pixels: Tensor
    fps: float


@dataclass(frozen=True)
class Sight:
    """What is shown of a sample.

    Attributes:
        title: Task and key.
        prompt: Its prompt.
        pictures: Visuals with pixels, or whose latents were decoded.
        facts: What is stored -> its size, or dtype and shape.
    """

    title: str
    prompt: str
    pictures: list[Picture]
    facts: dict[str, str]


def preview(
    folder: str,
    out: str | Path,
    count: int = 8,
    keys: Sequence[str] = (),
    vae: str | None = None,
    device: str = "cpu",
    max_edge: int = 320,
    storage: StorageConfig | None = None,
) -> tuple[Path, Path]:
    """Write ``sheet.png`` and ``preview.html``.

    The sheet has a row for each sample, with the first, middle and last frame of each visual. The page needs no other
    file. Features are told by dtype and shape, latents also shown if there is a VAE.

    Args:
        folder: Folder of shards.
        out: Folder for both files.
        count: How many samples to show, as evenly over the tasks as can be.
        keys: Samples to show in place of these.
        vae: Folder of the Wan VAE that made the latents; without it they are not decoded.
        device: Device that decodes latents.
        max_edge: Longest edge of what is shown in pixels.
        storage: How the folder is reached.

    Returns:
        Paths of the sheet and of the page.

    Raises:
        BadSample: A sample is damaged.
        CheckpointError: The VAE cannot be read.
        ConfigError: A key is not there, or a number is too small.
        DataError: The page would be too large.
    """
    if count < 1 or max_edge < 16:
        raise ConfigError(f"count is {count}, max_edge {max_edge}", fix="show one sample or more, at 16 pixels or more")
    shards, known = Shards(folder, storage), Folder(folder, storage)
    decoder: LatentCodec | None = None
    if vae:
        from bernini.vae import codec

        decoder = codec.LatentCodec.from_pretrained(vae).to(device)
    numbers = _named(shards.entries, keys) if keys else choose(shards.entries, count)
    sights = [_see(shards, known, number, decoder, max_edge) for number in numbers]
    lead = f"{len(sights)} of {len(shards)} samples, fingerprint {shards.fingerprint}"
    with replacing(Path(out) / SHEET) as temporary:
        draw(sights).save(temporary)
    return Path(out) / SHEET, _page(sights, folder, lead, Path(out) / PAGE)


def choose(entries: Sequence[Entry], count: int) -> list[int]:
    """Numbers of ``count`` samples: of each task in turn, each task's evenly spaced from first to last."""
    by_task: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        by_task.setdefault(entry.task, []).append(number)
    shares = dict.fromkeys(by_task, 0)
    for _ in range(min(count, len(entries))):
        task = min((t for t in shares if shares[t] < len(by_task[t])), key=lambda t: shares[t])
        shares[task] += 1
    spaced = ((by_task[t], n, share) for t, share in shares.items() for n in range(share))
    return sorted(numbers[n * len(numbers) // share] for numbers, n, share in spaced)


def _named(entries: Sequence[Entry], keys: Sequence[str]) -> list[int]:
    numbers = {entry.key: number for number, entry in enumerate(entries)}
    for key in keys:
        if key not in numbers:
            raise ConfigError(f"no sample has the key {key!r}", fix=closest(key, numbers))
    return [numbers[key] for key in keys]


def _see(shards: Shards, known: Folder, number: int, codec: "LatentCodec | None", max_edge: int) -> Sight:
    sample, record = shards.read(number), known.record(shards.entries[number])
    pictures: list[Picture] = []
    facts: dict[str, str] = {}
    roles = {True: 0, False: 0}
    for message, visual in zip(sample.visual, record.visuals, strict=True):
        roles[message.is_target] += 1
        label = "target" if message.is_target else f"source {roles[False]}"
        media = message.media
        assert media is not None
        pixels = media.pixels
        if pixels is None and media.posterior is not None and codec is not None:
            pixels = codec.decode(codec.normalize(media.posterior.to(codec.mean.device))).cpu()
            label += ", decoded"
        if pixels is not None:
            pictures.append(Picture(label, _fitted(pixels, max_edge), media.fps))
        if visual.pixels:
            rate = f", {visual.frames} frames, {visual.fps:g} fps" if message.is_video else ""
            facts[visual.pixels] = f"{visual.width}x{visual.height}{rate}"
        facts |= _told(visual.features)
    facts |= _told(record.texts)
    return Sight(f"{sample.task} · {sample.key}", sample.prompt, pictures, facts)


def _told(features: dict[str, Feature]) -> dict[str, str]:
    return {name: str(feature) for name, feature in features.items()}


def _fitted(pixels: Tensor, max_edge: int) -> Tensor:
    """Pixels within ``max_edge``, with the even edges that every player shows."""
    height, width = pixels.shape[2:]
    return resize(pixels, *fit_size(height, width, max_edge=max_edge, multiple=2))


def _page(sights: Sequence[Sight], folder: str, lead: str, path: Path) -> Path:
    with TemporaryDirectory() as temporary:
        cases = []
        for number, sight in enumerate(sights):
            clips = []
            for place, picture in enumerate(sight.pictures):
                file = Path(temporary) / f"{number}-{place}.{'mp4' if picture.fps else 'png'}"
                if picture.fps:
                    write_video(file, picture.pixels, picture.fps)
                else:
                    write_image(file, picture.pixels[:, :1])
                clips.append((picture.label, file))
            cases.append(Case(sight.title, sight.prompt, clips, sight.facts))
        return write_report(Report(title=folder, lead=lead, cases=cases), path)


def draw(sights: Sequence[Sight]) -> "Image":
    """The contact sheet: words to the left, then the first, middle and last frame of each visual."""
    from PIL import Image, ImageDraw, ImageFont

    strips = [[(picture.label, _strip(picture.pixels)) for picture in sight.pictures] for sight in sights]
    words = [_words(sight) for sight in sights]
    tallest = max(len(lines) for lines in words) * _LINE
    row = max(THUMB + _LINE, tallest) + 2 * GAP
    width = max(TEXT + sum(strip.width + 2 * GAP for _, strip in line) for line in strips) + GAP
    sheet = Image.new("RGB", (width, row * len(sights)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_SIZE)
    for number, (lines, line) in enumerate(zip(words, strips, strict=True)):
        top, left = number * row + GAP, TEXT
        for place, text in enumerate(lines):
            pen.text((GAP, top + place * _LINE), text, "black" if place == 0 else "#444", font)
        for label, strip in line:
            pen.text((left, top), label, "#444", font)
            sheet.paste(strip, (left, top + _LINE))
            left += strip.width + 2 * GAP
        pen.line((0, number * row, width, number * row), "#ddd")
    return sheet


def _words(sight: Sight) -> list[str]:
    """Lines beside the frames of a sample: a few of the prompt, and of what is stored."""
    prompt = textwrap.wrap(sight.prompt, _COLUMNS, max_lines=3, placeholder=" ...")
    facts = (textwrap.wrap(f"{name}  {fact}", _COLUMNS) for name, fact in sight.facts.items())
    return [*textwrap.wrap(sight.title, _COLUMNS), *prompt, *chain.from_iterable(facts)]


def _strip(pixels: Tensor) -> "Image":
    """First, middle and last frame of ``[3, T, H, W]`` side by side."""
    from PIL import Image

    frames, height, width = pixels.shape[1:]
    taken = list(dict.fromkeys((0, frames // 2, frames - 1)))
    small = resize(pixels[:, taken], THUMB, max(1, round(width * THUMB / height)))
    strip = Image.new("RGB", (small.shape[3] * len(taken) + 2 * (len(taken) - 1), THUMB), "white")
    for place in range(len(taken)):
        frame = Image.fromarray(small[:, place].permute(1, 2, 0).contiguous().numpy())
        strip.paste(frame, (place * (small.shape[3] + 2), 0))
    return strip
