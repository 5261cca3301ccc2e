"""A judge on this machine: a Qwen2.5-VL from a local folder, through transformers.

Frames of clips are shown as one video at their rate, pictures as pictures. Pixels become patches by
`bernini.planner.vision`, whose numbers are those of Qwen's own image processor; transformers' processor of videos would
need torchvision.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from benchmarks.quality.judging.question import Prompt
from benchmarks.quality.judging.showing import Seen
from bernini.chat import Completion
from bernini.checkpoints.parts import read_json
from bernini.errors import CheckpointError, ConfigError, ServiceError
from bernini.files import hash_files
from bernini.media import read_image
from bernini.planner.vision import VisionConfig, Visual, prepare
from bernini.tasks import DEFAULT_SENTENCE

PROCESSOR = "preprocessor_config.json"
MAX_PIXELS = 28 * 28 * 16384  # of an image, unless the folder says otherwise
SPECIAL = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
TEXT, IMAGE, VIDEO = 0, 1, 2


class LocalJudge:
    """Asks a Qwen2.5-VL, greedily, one question after the other.

    Args:
        folder: Its files as they are published: configuration, weights as safetensors, tokenizer and, for its limits of
            pixels, ``preprocessor_config.json``.
        device: Where it runs.
        dtype: Dtype of the weights.
        max_tokens: Most tokens of an answer.

    Raises:
        CheckpointError: The folder holds no Qwen2.5-VL that can be read.
        ConfigError: The tokenizer lacks one of Qwen's special tokens.
    """

    workers = 1

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = 512,
    ) -> None:
        self.folder, self.device, self.dtype, self.max_tokens = Path(folder), torch.device(device), dtype, max_tokens
        if not (self.folder / "config.json").is_file():  # transformers would take the folder for a name on the hub
            raise CheckpointError("there is no judge here", where=str(folder), why="there is no config.json")
        self.weights = hash_files(
            sorted(p for p in self.folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt", ".jinja"))
        )
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                "the judge cannot be read",
                where=str(folder),
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                fix="download a Qwen2.5-VL, whole, as safetensors",
            ) from error
        self.model = model.to(self.device).eval()
        self.special = {name: self._special(name) for name in SPECIAL}
        self.stops = {self.special["im_end"], self.tokenizer.eos_token_id} - {None}
        self.model.config.image_token_id = self.special["image_pad"]
        self.model.config.video_token_id = self.special["video_pad"]
        self.vision = _vision(self.folder, self.model.config.vision_config)

    @property
    def name(self) -> str:
        """The folder's name, and the beginning of the hash of what is in it."""
        return f"{self.folder.resolve().name}@{self.weights[:8]}"

    def identity(self) -> dict[str, Any]:
        """Hash of its files, dtype and longest answer; not where it lies, nor what it runs on."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kind": "local", "weights": self.weights, "dtype": dtype, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def answer(self, prompt: Prompt, repeat: int, where: str) -> Completion:
        """See `Judge`. Repeats are all the same."""
        start = time.monotonic()
        sheet = self._write(prompt)
        try:
            said: Tensor = self.model.generate(
                **sheet.inputs(self.device, self.dtype),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(self.stops),
                pad_token_id=self.special["im_end"],
            )
        except torch.OutOfMemoryError as error:
            raise ServiceError(
                "the judge ran out of memory", where=where, fix="show fewer or smaller frames"
            ) from error
        ids = said[0, len(sheet.ids) :].tolist()
        ended = not self.stops.isdisjoint(ids)
        usage = {"prompt_tokens": len(sheet.ids), "completion_tokens": len(ids)}
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        seconds = round(time.monotonic() - start, 3)
        return Completion(str(text), "stop" if ended else "length", self.name, "", usage, seconds)

    def _write(self, prompt: Prompt) -> "_Sheet":
        """A prompt in Qwen's chat form; text that spells a special token stays text."""
        sheet = _Sheet()
        turns = [
            ("system", (prompt.system or DEFAULT_SENTENCE,)),
            *((turn.role, turn.content) for turn in prompt.turns),
        ]
        for role, content in turns:
            self._begin(sheet, role)
            for part in content:
                if isinstance(part, str):
                    sheet.write(self._encode(part))
                    continue
                for visual, fps in _visuals(part, self.vision):
                    kind = VIDEO if visual.is_video else IMAGE
                    pad = self.special["video_pad" if visual.is_video else "image_pad"]
                    sheet.write([self.special["vision_start"]])
                    sheet.write([pad] * visual.tokens, kind)
                    sheet.write([self.special["vision_end"]])
                    sheet.shown.append((visual, fps))
            sheet.write([self.special["im_end"], *self._encode("\n")])
        self._begin(sheet, "assistant")
        return sheet

    def _begin(self, sheet: "_Sheet", role: str) -> None:
        sheet.write([self.special["im_start"], *self._encode(f"{role}\n")])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _special(self, name: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id:
            raise ConfigError(f"the judge's tokenizer has no <|{name}|>", fix="use the tokenizer of Qwen2.5-VL")
        return found


@dataclass
class _Sheet:
    """A prompt in tokens: their ids, what each is part of, and what is shown with its rate."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    shown: list[tuple[Visual, float]] = field(default_factory=list)

    def write(self, ids: list[int], kind: int = TEXT) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What transformers' model takes."""
        ids = torch.tensor([self.ids], device=device)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found["mm_token_type_ids"] = torch.tensor([self.kinds], device=device)
        for is_video, pixels, grid in ((False, "pixel_values", "image"), (True, "pixel_values_videos", "video")):
            own = [(visual, fps) for visual, fps in self.shown if visual.is_video == is_video]
            if own:
                found[pixels] = torch.cat([visual.patches for visual, _ in own]).to(device, dtype)
                found[f"{grid}_grid_thw"] = torch.tensor([visual.grid for visual, _ in own], device=device)
            if own and is_video:
                seconds = [visual.config.temporal_patch / fps for visual, fps in own]
                found["second_per_grid_ts"] = torch.tensor(seconds, device=device)
        return found


def _visuals(seen: Seen, config: VisionConfig) -> Iterator[tuple[Visual, float]]:
    """What is shown, in patches: one video with its rate, or pictures."""
    frames = []
    for data in seen.frames:
        pixels = read_image(data).pixels
        assert pixels is not None
        frames.append(pixels)
    if not seen.fps:
        yield from ((prepare(frame, False, 0.0, config), 0.0) for frame in frames)
        return
    frames += frames[-1:] * (-len(frames) % config.temporal_patch)  # a frame without a partner is paired with itself
    every = replace(config, fps=1.0, max_frames=len(frames))
    yield prepare(torch.cat(frames, dim=1), True, 1.0, every), seen.fps


def _vision(folder: Path, tower: Any) -> VisionConfig:
    """Numbers of the tower, and what the folder says of the sizes and colours that it is shown."""
    told = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    size = told.get("size") or {}
    usual = VisionConfig()
    return VisionConfig(
        patch=tower.patch_size,
        temporal_patch=tower.temporal_patch_size,
        merge=tower.spatial_merge_size,
        min_pixels=told.get("min_pixels") or size.get("shortest_edge") or usual.min_pixels,
        max_pixels=told.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS,
        mean=tuple(told.get("image_mean", usual.mean)),
        std=tuple(told.get("image_std", usual.std)),
    )
