"""Training from a bank of prepared samples, for renderers whose kernels take longer to be launched than to run."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bernini.bank import Bank, Rows
from bernini.errors import ConfigError
from bernini.flow.noise import Expert, add_noise, velocity_losses
from bernini.renderer.bank import Stack
from bernini.renderer.experts import experts_of
from bernini.renderer.module import RendererModule
from bernini.renderer.packing import Pack, PackedSample, Segment, pack, patchify, target_patches
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.seeds import draw_seed
from bernini.tasks import get_task
from bernini.vae.codec import LatentCodec

SIGMAS = 8192  # noise levels drawn ahead for each task, of which a step takes its own


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


class StackedPass(nn.Module):
    """From rows of a bank to the loss of every sample, in calls whose shapes never change.

    Args:
        model: One expert.
        bank: The samples.
        codec: The frozen VAE, whose statistics normalise latents.
        sigmas: ``[stacks, SIGMAS]`` noise levels as the expert's window and each stack's task have them.
        text_dropout: Rate at which a sample loses its text.
    """

    def __init__(
        self,
        model: PackedWanTransformer3DModel,
        bank: Bank[Stack],
        codec: LatentCodec,
        sigmas: Tensor,
        text_dropout: float,
    ) -> None:
        super().__init__()
        self.model = model
        self._bank, self._sigmas, self._text_dropout = bank, sigmas, text_dropout
        self._normalize = codec.normalize
        # Samples of equal lengths lie side by side: most backends of attention take them in one call.
        self._order = sorted(range(len(bank.stacks)), key=lambda n: self._tokens(bank.stacks[n]))
        self._template = self._lay_out()
        device = bank.stacks[0].target.device
        rows = bank.split(torch.arange(bank.batch_size, device=device))
        self._unsorted = torch.cat([rows[number] for number in self._order]).argsort()
        self._stack = torch.cat([torch.full_like(rows[number], number) for number in self._order])
        self._groups, self._place = self._arrange(device)

    def forward(self, rows: Tensor) -> Tensor:
        """The velocity loss of every sample.

        Args:
            rows: ``[batch_size]`` rows of the stacks.

        Returns:
            ``[batch_size]`` fp32, in the order of ``rows``.
        """
        with torch.autocast(rows.device.type, enabled=False):
            packed, velocity = self._pack(rows)
        predicted = self.model(packed).index_select(0, packed.target_index)
        return velocity_losses(predicted, velocity, packed.target_lengths)[self._unsorted]

    def _pack(self, rows: Tensor) -> tuple[Pack, Tensor]:
        """The samples, noised and packed, and the velocity of every target token."""
        own, stacks, patch = self._bank.split(rows), self._bank.stacks, self.model.patch
        sigmas = self._sigmas[self._stack, torch.randint(SIGMAS, rows.shape, device=rows.device)]
        patches, velocities = [], []
        for group in self._groups:
            x0 = self._latent(torch.cat([posteriors[own[number]] for number, posteriors in group.slots]))
            noise = torch.randn_like(x0)
            sigma = sigmas[group.sample] * group.is_target
            patches.append(patchify(add_noise(x0, noise, sigma.view(-1, 1, 1, 1, 1)), patch).flatten(0, 1))
            velocities.append(target_patches(noise - x0, patch).flatten(0, 1))

        dropped = torch.stack([stack.dropped for stack in stacks])[self._stack]
        kept = torch.rand(rows.shape, device=rows.device) >= self._text_dropout
        texts = torch.cat([stacks[number].text[own[number]] for number in self._order])
        packed = replace(
            self._template,
            patches=torch.cat(patches)[self._place],
            timesteps=1000 * sigmas,
            context=torch.where(kept[:, None, None], texts, dropped).flatten(0, 1).float(),
        )
        return packed, torch.cat(velocities)[self._place[packed.target_index]]

    def _latent(self, posterior: Tensor) -> Tensor:
        channels = posterior.shape[1] // 2
        return self._normalize(posterior, torch.randn_like(posterior[:, :channels], dtype=torch.float32))

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

    def _lay_out(self) -> Pack:
        """A pack with the segments of every batch."""
        samples = []
        for number in self._order:
            stack = self._bank.stacks[number]
            latents = [x[0].chunk(2)[0].float() for x in (*stack.sources, stack.target)]
            ids = [*range(1, len(stack.sources) + 1), 0]
            sample = PackedSample([Segment(x, i) for x, i in zip(latents, ids, strict=True)], stack.text[0], 0.0)
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
        cuda = self.device.type == "cuda"
        if cuda and torch.is_autocast_enabled("cuda") and model.attention == "auto":
            model.attention = "varlen"  # one call for all of many short samples
        one = StackedPass(model, bank, self.codec, self._sigmas(bank, expert), self.dropout.text)
        if not (cuda and self.cuda_graphs):
            return one
        rows = torch.zeros(bank.batch_size, dtype=torch.long, device=self.device)
        # A cache of cast weights would outlive the graph that made it.
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return cast(Callable[[Tensor], Tensor], torch.cuda.make_graphed_callables(one, (rows,)))

    def _sigmas(self, bank: Bank[Stack], expert: Expert) -> Tensor:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, "sigmas", expert))
        drawn = {
            task: self.noise.draw_sigmas([get_task(task)] * SIGMAS, expert, [generator] * SIGMAS)
            for task in dict.fromkeys(stack.task for stack in bank.stacks)
        }
        return torch.tensor([drawn[stack.task] for stack in bank.stacks], device=self.device)
