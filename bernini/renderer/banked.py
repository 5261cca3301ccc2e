"""Training from a bank of prepared samples, for renderers whose kernels take longer to be launched than to run."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bernini.bank import Bank, Rows
from bernini.errors import ConfigError
from bernini.flow.noise import Expert, NoiseConfig, add_noise, velocity_losses
from bernini.renderer.bank import Stack
from bernini.renderer.experts import experts_of
from bernini.renderer.module import RendererModule
from bernini.renderer.packing import Pack, PackedSample, Segment, pack, patchify, target_patches
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.seeds import draw_seed
from bernini.tasks import get_task
from bernini.vae.codec import LatentCodec

SIGMAS = 8192  # noise levels drawn ahead for each task, of which a step takes its own
IMAGE, CLIP, RENDERED = 0, 1, 2  # what a segment is: a source that dropout may take, or the target


@dataclass(frozen=True)
class Group:
    """Latents of one size, which go through everything together: few large kernels instead of many small ones.

    Attributes:
        slots: Number of the stack, and its posteriors of one source or of the target.
        sample: ``[n]`` sample, in the pack's order, that each latent belongs to.
        is_target: ``[n]`` 1 for targets; sources, 0, are noised with sigma 0.
    """

    slots: list[tuple[int, Tensor]]
    sample: Tensor
    is_target: Tensor


class Noises(NamedTuple):
    """What is drawn for the latents of a batch, samples in the pack's order.

    Attributes:
        sigmas: ``[batch_size]``.
        sampled: Standard normal ``[n, C, t, h, w]`` for each group of latents: which of its posterior a latent is.
        noise: The same: what targets are noised with.
    """

    sigmas: Tensor
    sampled: list[Tensor]
    noise: list[Tensor]


class StackedPass(nn.Module):
    """From rows of a bank to the loss of every sample, in calls whose shapes never change.

    Args:
        model: One expert.
        bank: The samples.
        codec: The frozen VAE, whose statistics normalise latents.
        sigmas: ``[stacks, SIGMAS]`` noise levels as the expert's window and each stack's task have them.
        text_dropout: Rate at which a sample loses its text.
        context_rows: Rows of the context of each stack's samples; those of its text if null.
    """

    def __init__(
        self,
        model: PackedWanTransformer3DModel,
        bank: Bank[Stack],
        codec: LatentCodec,
        sigmas: Tensor,
        text_dropout: float = 0.0,
        context_rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        device = bank.stacks[0].target.device
        if device.type == "cuda" and torch.is_autocast_enabled("cuda") and model.attention == "auto":
            model.attention = "varlen"  # one call for all of many short samples
        self._bank, self._sigmas, self._text_dropout = bank, sigmas, text_dropout
        self._normalize = codec.normalize
        # Samples of equal lengths lie side by side: most backends of attention take them in one call.
        self._order = sorted(range(len(bank.stacks)), key=lambda n: self._tokens(bank.stacks[n]))
        self._template = self._lay_out(context_rows or [stack.text.shape[1] for stack in bank.stacks])
        rows = bank.split(torch.arange(bank.batch_size, device=device))
        self._sorted = torch.cat([rows[number] for number in self._order])
        self._unsorted = self._sorted.argsort()
        self._stack = torch.cat([torch.full_like(rows[number], number) for number in self._order])
        self._groups, self._place = self._arrange(device)
        self._kind, self._owner, self._first, self._segment = self._describe(device)

    def forward(self, rows: Tensor) -> Tensor:
        """The velocity loss of every sample.

        Args:
            rows: ``[batch_size]`` rows of the stacks.

        Returns:
            ``[batch_size]`` fp32, in the order of ``rows``.
        """
        noises = self.draw(rows)
        lost = torch.rand(rows.shape, device=rows.device) < self._text_dropout
        return self.measure(rows, noises, self.texts(rows, lost))

    def draw(self, rows: Tensor) -> Noises:
        """Draw noise levels and noises."""
        sigmas = self._sigmas[self._stack, torch.randint(SIGMAS, rows.shape, device=rows.device)]
        sampled, noise = [], []
        for group in self._groups:
            shape = len(group.sample), group.slots[0][1].shape[1] // 2, *group.slots[0][1].shape[2:]
            sampled.append(torch.randn(shape, device=rows.device))
            noise.append(torch.randn(shape, device=rows.device))
        return Noises(sigmas, sampled, noise)

    def texts(self, rows: Tensor, lost: Tensor) -> list[Tensor]:
        """Text ``[n, rows, dim]`` fp32 of the samples of each stack, where ``lost [batch_size]`` the dropped one."""
        parts = zip(self._bank.stacks, self._bank.split(rows), self._bank.split(lost), strict=True)
        return [torch.where(gone[:, None, None], stack.dropped, stack.text[own]).float() for stack, own, gone in parts]

    def measure(
        self,
        rows: Tensor,
        noises: Noises,
        contexts: Sequence[Tensor],
        seen: Sequence[Tensor] | None = None,
        lost: Tensor | None = None,
    ) -> Tensor:
        """The velocity loss of every sample under given noise and conditions.

        Args:
            rows: ``[batch_size]`` rows of the stacks.
            noises: Noise levels and noises.
            contexts: ``[n, rows, text_dim]`` of the samples of each stack.
            seen: Bool ``[n, rows]``, rows of these that are attended; all if null.
            lost: Bool ``[batch_size, 2]``, samples that lose their source images, and their source clips: what is left
                is numbered, and attends, as if they were not there. None does if null.

        Returns:
            ``[batch_size]`` fp32, in the order of ``rows``.
        """
        with torch.autocast(rows.device.type, enabled=False):
            packed, velocity = self._pack(rows, noises)
            packed = replace(packed, context=torch.cat([contexts[number].flatten(0, 1) for number in self._order]))
            if seen is not None:
                packed = replace(packed, context_seen=torch.cat([seen[number].flatten() for number in self._order]))
            if lost is not None:
                packed = self._leave_out(packed, lost[self._sorted])
        predicted = self.model(packed).index_select(0, packed.target_index)
        return velocity_losses(predicted, velocity, packed.target_lengths)[self._unsorted]

    def _pack(self, rows: Tensor, noises: Noises) -> tuple[Pack, Tensor]:
        """The samples, noised and packed, without a context, and the velocity of every target token."""
        own, patch = self._bank.split(rows), self.model.patch
        patches, velocities = [], []
        for group, sampled, noise in zip(self._groups, noises.sampled, noises.noise, strict=True):
            posteriors = torch.cat([posteriors[own[number]] for number, posteriors in group.slots])
            x0 = self._normalize(posteriors, sampled)
            sigma = noises.sigmas[group.sample] * group.is_target
            patches.append(patchify(add_noise(x0, noise, sigma.view(-1, 1, 1, 1, 1)), patch).flatten(0, 1))
            velocities.append(target_patches(noise - x0, patch).flatten(0, 1))
        timesteps = 1000 * noises.sigmas
        packed = replace(self._template, patches=torch.cat(patches)[self._place], timesteps=timesteps)
        return packed, torch.cat(velocities)[self._place[packed.target_index]]

    def _leave_out(self, packed: Pack, lost: Tensor) -> Pack:
        """The pack without sources that ``lost [batch_size, 2]``, in its order, says: nobody sees their tokens."""
        kept = ~pad(lost, (0, 1))[self._owner, self._kind]
        source = kept & (self._kind != RENDERED)
        before = source.cumsum(0) - source.long()
        ids = (before + 1 - before[self._first]) * source
        segments = torch.cat([packed.segments[:, :4], ids[:, None].to(packed.segments)], dim=1)
        return replace(packed, segments=segments, token_seen=kept[self._segment])

    def _tokens(self, stack: Stack) -> int:
        return sum(x[0, 0].numel() for x in (*stack.sources, stack.target))

    def _arrange(self, device: torch.device) -> tuple[list[Group], Tensor]:
        """Latents grouped by size, and the place of each of the pack's tokens among the groups' tokens."""
        slots: dict[torch.Size, list[tuple[int, int, Tensor]]] = defaultdict(list)
        for number in self._order:
            stack = self._bank.stacks[number]
            for position, posteriors in enumerate((*stack.sources, stack.target)):
                slots[posteriors.shape[1:]].append((number, position, posteriors))
        groups, places, start = [], {}, 0
        for own in slots.values():
            samples, is_target = [], []
            for number, position, posteriors in own:
                samples.append(torch.nonzero(self._stack == number).squeeze(1))
                is_target.append(torch.full_like(samples[-1], posteriors is self._bank.stacks[number].target))
                end = start + len(samples[-1]) * posteriors[0, 0].numel() // math.prod(self.model.patch)
                places[number, position] = torch.arange(start, end, device=device).view(len(samples[-1]), -1)
                start = end
            groups.append(Group([(number, x) for number, _, x in own], torch.cat(samples), torch.cat(is_target)))
        rows = (
            torch.cat([places[number, n] for n in range(len(self._bank.stacks[number].sources) + 1)], dim=1).flatten()
            for number in self._order
        )
        return groups, torch.cat(list(rows))

    def _describe(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each of the pack's segments what it is, its sample and that one's first segment; each token's segment."""
        kinds: list[int] = []
        owners: list[int] = []
        firsts: list[int] = []
        for number in self._order:
            stack = self._bank.stacks[number]
            own = [*(CLIP if x.shape[2] > 1 else IMAGE for x in stack.sources), RENDERED]
            for _ in range(self._bank.counts[number]):
                owners += [owners[-1] + 1 if owners else 0] * len(own)
                firsts += [len(kinds)] * len(own)
                kinds += own
        kind, owner, first = torch.tensor([kinds, owners, firsts], device=device)
        lengths = self._template.segments[:, 1:4].prod(dim=1).long()
        return kind, owner, first, torch.arange(len(kinds), device=device).repeat_interleave(lengths)

    def _lay_out(self, context_rows: Sequence[int]) -> Pack:
        """A pack with the segments of every batch."""
        samples = []
        for number in self._order:
            stack = self._bank.stacks[number]
            latents = [x[0].chunk(2)[0].float() for x in (*stack.sources, stack.target)]
            ids = [*range(1, len(stack.sources) + 1), 0]
            context = stack.text.new_zeros(context_rows[number], stack.text.shape[-1])
            sample = PackedSample([Segment(x, i) for x, i in zip(latents, ids, strict=True)], context, 0.0)
            samples += [sample] * self._bank.counts[number]
        return pack(samples, self.model.patch)


class BankedRendererModule(RendererModule):
    """A `RendererModule` that trains from the bank of its data module, forward and backward as CUDA graphs.

    Every batch holds the same number of samples of each kind, so that all shapes are constant. Source images and clips
    are not dropped, since that would change the shapes. Validation and sampling are the parent's.

    Args:
        *args: As `RendererModule`.
        cuda_graphs: Record forward and backward as CUDA graphs, on CUDA.
        **kwargs: As `RendererModule`.
    """

    def __init__(self, *args: Any, cuda_graphs: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dropout.image or self.dropout.video:
            raise ConfigError(
                "sources cannot be dropped here",
                where="model.init_args.dropout",
                why="every batch has the same shapes",
                fix="set image and video to 0, or train with bernini.renderer.module.RendererModule",
            )
        if self.swap_blocks and cuda_graphs:
            raise ConfigError(
                "a CUDA graph keeps weights where they are",
                where="model.init_args.swap_blocks",
                fix="leave swap_blocks out, or set cuda_graphs: false",
            )
        self.cuda_graphs = cuda_graphs
        self._passes: dict[str, Callable[[Tensor], Tensor]] = {}

    def configure_model(self) -> None:
        """Build the transformers; the seed alone decides new weights, not what making the bank drew before."""
        torch.manual_seed(draw_seed(self.seed, "weights"))
        super().configure_model()

    def on_train_start(self) -> None:
        """Begin to gather losses."""
        super().on_train_start()
        self._losses, self._steps = torch.zeros(self._bank.batch_size, device=self.device), 0

    @property
    def _bank(self) -> Bank[Stack]:
        return self.trainer.datamodule.bank  # type: ignore[attr-defined]

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:  # type: ignore[override]
        """One pass of each expert; the loss weighs every sample alike."""
        if not self._passes:
            self._passes = {name: self._record(name, self._bank) for name in self.renderer.models}
        torch.manual_seed(draw_seed(self.seed, "train", self.global_step))
        rows = batch.rows.to(self.device, non_blocking=True)
        losses = torch.stack([one(rows) for one in self._passes.values()])  # [experts, batch_size]
        self._losses += losses.detach().mean(0)
        self._steps += 1
        return losses.mean(1).sum()

    def _trained_means(self) -> dict[str, Tensor]:
        """Mean losses since the last call: of all samples, and of those of each task."""
        means = self._losses / self._steps
        self._losses, self._steps = torch.zeros_like(means), 0
        parts: dict[str, list[Tensor]] = {}
        for stack, part in zip(self._bank.stacks, self._bank.split(means), strict=True):
            parts.setdefault(f"loss_{stack.task}", []).append(part)
        # The progress bar waits for what it shows, so that it gets no more than the loggers.
        self.log("train/loss", means.mean(), prog_bar=True, logger=False, batch_size=len(means))
        return {"loss": means.mean(), **{name: torch.cat(own).mean() for name, own in parts.items()}}

    def _record(self, name: str, bank: Bank[Stack]) -> Callable[[Tensor], Tensor]:
        model, expert = self.renderer.models[name], experts_of(self.expert)[name]
        sigmas = draw_levels(self.noise, bank.stacks, expert, self.seed).to(self.device)
        one = StackedPass(model, bank, self.codec, sigmas, self.dropout.text)
        if not (self.device.type == "cuda" and self.cuda_graphs):
            return one
        rows = torch.zeros(bank.batch_size, dtype=torch.long, device=self.device)
        # A cache of cast weights would outlive the graph that made it.
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return cast(Callable[[Tensor], Tensor], torch.cuda.make_graphed_callables(one, (rows,)))


def draw_levels(noise: NoiseConfig, stacks: Sequence[Stack], expert: Expert, seed: int) -> Tensor:
    """Noise levels ``[stacks, SIGMAS]`` of stacks' tasks in an expert's window."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "sigmas", expert))
    drawn = {
        task: noise.draw_sigmas([get_task(task)] * SIGMAS, expert, [generator] * SIGMAS)
        for task in dict.fromkeys(stack.task for stack in stacks)
    }
    return torch.tensor([drawn[stack.task] for stack in stacks])
