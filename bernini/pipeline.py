"""BerniniPipeline: images and clips of every task, with and without a planner, as a pipeline of diffusers."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from bernini.conversation import Conversation
from bernini.errors import CheckpointError, ConfigError
from bernini.inputs import Clip, Picture, ask, read
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.model import FOLDER as PLANNER
from bernini.planner.plan_files import check_grid, move_plan
from bernini.planner.planning import Plan
from bernini.planner.vision import TargetSize
from bernini.presets import Defaults, Settings
from bernini.reasoning import check_reasoning
from bernini.renderer.experts import FOLDERS, Experts
from bernini.renderer.rendering import Renderer, followed
from bernini.renderer.sampling import OnStep, Step
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.stacking import group
from bernini.text.encoder import MAX_TOKENS, TextEncoder
from bernini.thinking import Thought, reworded, think
from bernini.vae.codec import LatentCodec

OutputType = Literal["pt", "np", "pil"]
Rewrite = Callable[[list[Conversation]], Sequence[Conversation]]
OnStepEnd = Callable[["BerniniPipeline", int, int, dict[str, Any]], dict[str, Any]]


@dataclass
class BerniniPipelineOutput(BaseOutput):
    """What a call made, in the order of the conversations.

    Attributes:
        videos: An image is a clip of one frame. ``[3, T, H, W]`` uint8 tensors on the CPU, or as ``output_type`` says.
        conversations: What was made, as rewritten.
        settings: How.
        thoughts: What became of each prompt before drawing; null where it was not touched.
        plans: The plans; null without a planner.
    """

    videos: list[Any]
    conversations: list[Conversation]
    settings: list[Settings]
    thoughts: list[Thought | None]
    plans: list[Plan] | None = None


class BerniniPipeline(DiffusionPipeline):
    """Plans and renders what conversations ask for.

    ``to``, ``enable_model_cpu_offload``, ``set_progress_bar_config`` and so on are those of diffusers' pipelines.

    Args:
        tokenizer: UMT5's.
        text_encoder: UMT5's encoder.
        vae: Wan's VAE.
        scheduler: Kept for other pipelines that read the folder; the solver here follows the settings.
        transformer: The high-noise expert, or the only one.
        transformer_2: The low-noise expert.
        planner: The planner, if there is one.
        boundary_ratio: Noise level at which the low-noise expert takes over.

    Attributes:
        defaults: Settings that the model's folder asks for.

    Raises:
        CheckpointError: Planner and renderer differ in width.
    """

    model_cpu_offload_seq = "planner->text_encoder->transformer->transformer_2->vae"  # type: ignore[assignment]
    _optional_components = ["transformer_2", "planner"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    transformer: PackedWanTransformer3DModel
    transformer_2: PackedWanTransformer3DModel | None
    planner: ConversationPlanner | None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: UniPCMultistepScheduler,
        transformer: PackedWanTransformer3DModel,
        transformer_2: PackedWanTransformer3DModel | None = None,
        planner: ConversationPlanner | None = None,
        boundary_ratio: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            planner=planner,
        )
        self.register_to_config(boundary_ratio=boundary_ratio)
        self.defaults = Defaults()
        self._interrupt = False
        if planner is not None:
            _check_widths(planner, transformer)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **components: Any
    ) -> "BerniniPipeline":
        """Read a folder: a Wan or Bernini-R folder of diffusers, with or without the planner's ``bernini/``, ``mllm/``.

        Args:
            folder: The folder, on this machine.
            torch_dtype: Dtype of transformers, text encoder and planner. The VAE stays in fp32, as released.
            **components: Parts to take as they are; ``planner=None`` leaves the planner out.

        Raises:
            CheckpointError: A part is missing, damaged, or does not fit the others.
        """
        root = Path(folder)
        if not root.is_dir():
            raise CheckpointError("no such folder", where=str(root), fix="download the model, and give its folder")
        parts = dict(components)
        if "transformer" not in parts:
            experts = Experts.from_pretrained(root, torch_dtype)
            parts = {**{name: getattr(experts, name) for name in FOLDERS.values()}, **parts}
            parts.setdefault("boundary_ratio", experts.boundary or None)
        if "text_encoder" not in parts:
            encoder = TextEncoder.from_pretrained(root, torch_dtype)
            parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, **parts}
        if "vae" not in parts:
            parts["vae"] = LatentCodec.from_pretrained(root).vae
        if "scheduler" not in parts:
            known = (root / "scheduler" / "scheduler_config.json").is_file()
            kind = UniPCMultistepScheduler
            parts["scheduler"] = kind.from_pretrained(root / "scheduler") if known else kind()
        if "planner" not in parts and (root / PLANNER).is_dir():
            parts["planner"] = ConversationPlanner.from_pretrained(root, torch_dtype)
        pipeline = cls(**parts)
        pipeline.register_to_config(_name_or_path=str(folder))
        pipeline.defaults = Defaults.of(root)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a folder that `from_pretrained` reads, as does diffusers' ``WanPipeline``, which leaves the planner."""
        planner, self.planner = self.planner, None  # its two folders are not those of a component
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.planner = planner
        if planner is not None:
            planner.save_pretrained(save_directory)
        self.defaults.save(save_directory)

    def to_json_string(self) -> str:
        """``model_index.json`` under diffusers' class names, so that diffusers loads what it can compute."""
        index = json.loads(super().to_json_string())
        index.pop("planner", None)
        index["_class_name"] = "WanPipeline"
        for name in FOLDERS.values():
            if index.get(name, [None])[0] is not None:
                index[name] = ["diffusers", "WanTransformer3DModel"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def interrupt(self) -> bool:
        """Whether to stop behind the present step; a callback sets it as ``pipe._interrupt = True``."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        conversations: Conversation | Sequence[Conversation] | None = None,
        *,
        task: str | None = None,
        prompt: str | None = None,
        video: Clip | Sequence[Clip] | None = None,
        images: Picture | Sequence[Picture] | None = None,
        preset: str | None = None,
        plan: bool = True,
        plans: Sequence[Plan] | None = None,
        seeds: Sequence[int] | None = None,
        rewrite: Rewrite | None = None,
        output_type: OutputType = "pt",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> BerniniPipelineOutput | tuple[list[Any]]:
        """Make images and clips.

        Either conversations are given, whose media fit the model already, or the parts of one: task, prompt, video and
        images, which are resized and sampled. But for rounding, no output depends on what else is in the call. A clip
        that follows a source is as long as the source.

        Args:
            conversations: What to make; a target in one only gives the size.
            task: Name in the task table.
            prompt: What to make, or to do.
            video: A clip, or several: files, or ``[3, T, H, W]`` uint8 tensors.
            images: An image, or several: files, Pillow's images, or ``[3, 1, H, W]`` uint8 tensors.
            preset: Name in `bernini.presets.PRESETS`; the folder's own if null.
            plan: Whether to plan, if there is a planner.
            plans: Plans to render instead of planning anew, one for each conversation.
            seeds: Seed of each one's reasoning, plan and noise; ``seed`` of the settings for all if null.
            rewrite: Maps the conversations to those that are planned and rendered, as a rewriter of prompts does; it
                stands in for ``reasoning`` of the settings.
            output_type: ``pt`` for ``[3, T, H, W]`` uint8 tensors, ``np`` for ``[T, H, W, 3]`` floats in [0, 1], or
                ``pil`` for lists of frames.
            return_dict: Whether to give a `BerniniPipelineOutput`, or a tuple with the videos.
            callback_on_step_end: Called after each step with the pipeline, the step, its timestep and a dictionary; the
                latents in the one that it gives back are gone on with. Conversations with other settings, as those of
                another task, come in steps of their own, as do frames that are edited first.
            callback_on_step_end_tensor_inputs: What is in that dictionary: ``latents``, a list of ``[C, T, H, W]``.
            **settings: Any of `bernini.presets.Settings`; they go before the folder's and the preset's.

        Raises:
            ConfigError: A task, mode, preset or setting is unknown, or does not go with the others.
            DataError: Media cannot be read, are not those of the task or do not fit, a plan is for another target, or
                there is nothing to reason about.
        """
        if any(part is not None for part in (task, prompt, video, images)) == (conversations is not None):
            raise ConfigError("give either conversations, or a task with its prompt, video and images")
        planned = self.planner is not None and plan
        if plans is not None and not planned:
            raise ConfigError("a plan without a planner", fix="load a folder with a planner, and leave plan=True")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ConfigError(f"callbacks are given no {min(unknown)!r}", fix="latents is what there is")
        self._interrupt = False
        if conversations is None:
            conversations = ask(task or "", prompt or "", _several(video), _several(images))
            read(conversations, self.defaults.settle(conversations.task, planned, preset, settings))
        asked = [conversations] if isinstance(conversations, Conversation) else list(conversations)

        def settle(requests: Sequence[Conversation]) -> list[Settings]:
            return [self.defaults.settle(c.task, planned, preset, settings) for c in requests]

        def on_step(step: Step) -> None:
            if callback_on_step_end:
                told = {name: getattr(step, name) for name in callback_on_step_end_tensor_inputs}
                kept = callback_on_step_end(self, step.done - 1, step.timestep, told)
                step.latents = kept.get("latents", step.latents)
            step.stop = self._interrupt

        def edit(frames: list[Conversation], their_seeds: Sequence[int]) -> list[Tensor]:
            return self._make(frames, settle(frames), their_seeds, planned, None, on_step)[0]

        usual = settle([conversation.check(targets=False) for conversation in asked])
        for conversation, one in zip(asked, usual, strict=True):
            check_reasoning(conversation, one.reasoning, rewritten=rewrite is not None)
        seeds = [one.seed for one in usual] if seeds is None else list(seeds)
        for name, given in (("seeds", seeds), ("plans", plans)):
            if given is not None and len(given) != len(asked):
                raise ConfigError(f"{len(given)} {name} for {len(asked)} conversations", fix="give one for each")
        if rewrite:
            final, thoughts = reworded(asked, [c.check(targets=False) for c in rewrite(asked)])
        else:
            final, thoughts = think(asked, usual, seeds, self.planner, edit)
        chosen = settle(final)
        videos, plans = self._make(final, chosen, seeds, planned, plans, on_step)
        self.maybe_free_model_hooks()
        made = [_as(output_type, _unpadded(*one)) for one in zip(final, videos, strict=True)]
        if not return_dict:
            return (made,)
        return BerniniPipelineOutput(made, final, chosen, thoughts, plans)

    def _make(
        self,
        asked: list[Conversation],
        chosen: list[Settings],
        seeds: Sequence[int],
        planned: bool,
        plans: Sequence[Plan] | None,
        on_step: OnStep,
    ) -> tuple[list[Tensor], list[Plan] | None]:
        """Plan, unless there are plans, and render."""
        renderer = self._renderer()
        if planned:
            sizes = [
                renderer.target_size(conversation, settings.sampling(), settings.fps)
                for conversation, settings in zip(asked, chosen, strict=True)
            ]
            plans = self._plan(asked, chosen, sizes, seeds) if plans is None else self._fitting(plans, asked, sizes)
        with self.progress_bar(total=sum(chosen[rows[0]].steps for rows in group(chosen))) as bar:

            def count(step: Step) -> None:
                bar.update()
                on_step(step)

            videos = self._render(renderer, asked, chosen, seeds, plans, count)
        return videos, None if plans is None else list(plans)

    def _plan(
        self, asked: list[Conversation], chosen: list[Settings], sizes: list[TargetSize], seeds: Sequence[int]
    ) -> list[Plan]:
        assert self.planner is not None
        plans: dict[int, Plan] = {}
        for rows in group(chosen):
            own, size, seed = ([column[row] for row in rows] for column in (asked, sizes, seeds))
            settings = chosen[rows[0]]
            made = self.planner(own, seed, settings.planning(), size, settings.negative_prompt)
            plans.update(zip(rows, made, strict=True))
        return [plans[row] for row in range(len(asked))]

    def _fitting(self, plans: Sequence[Plan], asked: list[Conversation], sizes: list[TargetSize]) -> list[Plan]:
        """Given plans on the device, if they are for these targets."""
        assert self.planner is not None
        for plan, conversation, size in zip(plans, asked, sizes, strict=True):
            check_grid(plan, self.planner.template(conversation, size).target_grid, where=conversation.key)
        return [move_plan(plan, self._execution_device) for plan in plans]

    def _renderer(self) -> Renderer:
        """The components at work; what is offloaded comes to the device when it is called."""
        codec, device = LatentCodec(self.vae), self._execution_device
        codec.mean, codec.std = codec.mean.to(device), codec.std.to(device)
        encoder = TextEncoder(self.text_encoder, self.tokenizer)
        experts = Experts(self.transformer, self.transformer_2, self.config["boundary_ratio"] or 0.0)

        def features(texts: Iterable[str], device: torch.device) -> list[Tensor]:
            # One by one, as rounding depends on what else is in a batch.
            return [encoder.encode([text])[0].to(device) for text in texts]

        return Renderer(experts, codec, features, min(MAX_TOKENS, self.tokenizer.model_max_length))

    def _render(
        self,
        renderer: Renderer,
        asked: list[Conversation],
        chosen: list[Settings],
        seeds: Sequence[int],
        plans: Sequence[Plan] | None,
        on_step: OnStep,
    ) -> list[Tensor]:
        videos: dict[int, Tensor] = {}
        for rows in group(chosen):
            own = [asked[row].to(self._execution_device) for row in rows]
            drafts = None if plans is None else [plans[row] for row in rows]
            made = renderer(own, chosen[rows[0]].sampling(), [seeds[row] for row in rows], drafts, on_step)
            videos.update((row, video.cpu()) for row, video in zip(rows, made, strict=True))
        return [videos[row] for row in range(len(asked))]


def _check_widths(planner: ConversationPlanner, transformer: PackedWanTransformer3DModel) -> None:
    made, taken = planner.model.config.gen_dim, transformer.config["text_dim"]
    if made != taken:
        raise CheckpointError(
            "the planner and the renderer do not fit",
            why=f"the planner's contexts are {made} wide, the renderer's text features {taken}",
            fix="use a planner and a renderer that were trained together, or --no-plan",
        )


def _several(given: Any) -> Sequence[Any]:
    if given is None:
        return []
    return given if isinstance(given, list | tuple) else [given]


def _unpadded(conversation: Conversation, pixels: Tensor) -> Tensor:
    """Without the frames that only fill a source's clip up to 4k + 1."""
    media = followed(conversation)
    sampled = int(media.source.get("sampled", 0)) if media else 0
    return pixels[:, : sampled or None] if conversation.spec.target == "video" else pixels


def _as(kind: OutputType, pixels: Tensor) -> Any:
    if kind == "pt":
        return pixels
    frames = pixels.permute(1, 2, 3, 0).numpy()
    if kind == "np":
        return frames.astype("float32") / 255
    if kind == "pil":
        from PIL import Image

        return [Image.fromarray(frame) for frame in frames]
    raise ConfigError(f"unknown output_type {kind!r}", fix="pt, np or pil")
