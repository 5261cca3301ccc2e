"""Training one encoding from one seed; runs of one seed see the same weights at first, samples and noise throughout."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.quality.environment import environment
from benchmarks.quality.rope_study.batches import Layout, attention, predict
from benchmarks.quality.rope_study.data import TASK, Batch, Examples
from bernini.flow.noise import TRAIN_STEPS, NoiseConfig, add_noise, sigma_table, velocity_losses
from bernini.renderer.experts import Architecture, Experts
from bernini.renderer.packing import target_patches
from bernini.renderer.sampling import source_ids
from bernini.renderer.segments import SegmentEncoding
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.tasks import get_task

ARCHITECTURE = Architecture(
    num_layers=4, num_attention_heads=4, attention_head_dim=32, ffn_dim=512, text_dim=64, freq_dim=64
)
EMA_EVERY, EMA_DECAY = 10, 0.95  # in steps: each update waits for the device
CURVE_POINTS = 200


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        encoding: How sources are told apart.
        seed: Of weights, samples and noise.
        steps: Optimizer steps.
        batch: Samples of a step; all have the same number of sources, which is drawn anew each step.
        lr: Peak learning rate of AdamW under OneCycleLR.
    """

    encoding: SegmentEncoding
    seed: int = 0
    steps: int = 4000
    batch: int = 128
    lr: float = 2e-3


def draw_sigmas(recipe: Recipe) -> Tensor:
    """Noise levels ``[steps, batch]`` of a run, as `NoiseConfig` draws them for a model without experts."""
    noise, task = NoiseConfig(), get_task(TASK)
    generator = torch.Generator().manual_seed(recipe.seed)
    u = noise.draw_position(task.density, recipe.steps * recipe.batch, generator)
    sigmas = sigma_table(task.shift)[(u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)]
    return sigmas.view(recipe.steps, recipe.batch)


class Pass(nn.Module):
    """From a batch and its noise to the loss, in calls whose shapes never change.

    Args:
        model: The transformer.
        layout: Of batches with this number of sources.
    """

    def __init__(self, model: PackedWanTransformer3DModel, layout: Layout) -> None:
        super().__init__()
        self.model, self._layout = model, layout

    def forward(self, sources: Tensor, targets: Tensor, contexts: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Velocity loss, mean over the targets; the first three as in `Batch`, ``noise`` as targets, ``[B]`` sigmas."""
        noised = add_noise(targets, noise, sigmas.view(-1, 1, 1, 1, 1))
        packed = self._layout.fill(Batch(sources, targets, contexts), noised, 1000 * sigmas)
        velocity = target_patches(noise - targets, self.model.patch).flatten(0, 1)
        return velocity_losses(predict(self.model, packed), velocity, packed.target_lengths).mean()


class Losses:
    """The velocity loss of batches with any number of sources; on CUDA each number has graphs of its own.

    Args:
        model: The transformer.
        examples: Samples by number of sources, on the model's device.
        recipe: The run.
    """

    def __init__(self, model: PackedWanTransformer3DModel, examples: dict[int, Examples], recipe: Recipe) -> None:
        self.model, self.examples = model, examples
        self.device = next(iter(examples.values())).targets.device
        self._generator = torch.Generator(self.device).manual_seed(recipe.seed)
        self._passes: dict[int, Callable[..., Tensor]] = {}

    def __call__(self, count: int, sigmas: Tensor) -> Tensor:
        """Velocity loss of a batch, mean over its targets.

        Args:
            count: Number of sources.
            sigmas: ``[B]`` noise levels.
        """
        pool = self.examples[count]
        batch = pool.batch(torch.randint(len(pool), sigmas.shape, generator=self._generator, device=self.device))
        noise = torch.randn(batch.targets.shape, generator=self._generator, device=self.device)
        inputs = (batch.sources, batch.targets, batch.contexts, noise, sigmas)
        if count not in self._passes:
            one = Pass(self.model, Layout.of(batch, source_ids(count, "extend"), self.model.patch))
            made = torch.cuda.make_graphed_callables(one, inputs) if self.device.type == "cuda" else one
            self._passes[count] = cast(Callable[..., Tensor], made)
        return self._passes[count](*inputs)


def train(recipe: Recipe, examples: dict[int, Examples], folder: Path) -> dict[str, Any]:
    """Train a renderer and keep the moving average of its weights.

    Args:
        recipe: What to train.
        examples: Training samples by number of sources.
        folder: Gets ``transformer/`` and ``run.json``.

    Returns:
        What ``run.json`` holds: the recipe, the loss curve, seconds, and the machine.
    """
    device = next(iter(examples.values())).targets.device
    torch.manual_seed(recipe.seed)
    built = replace(ARCHITECTURE, segment_encoding=recipe.encoding).build()
    renderer = Experts(built, boundary=0.0).to(device)
    model = renderer.at(0)
    model.attention = attention(device)
    losses = Losses(model, examples, recipe)
    averaged = AveragedModel(renderer, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.05)
    sigmas = draw_sigmas(recipe).to(device)
    choice = torch.randint(len(examples), (recipe.steps,), generator=torch.Generator().manual_seed(recipe.seed))
    counts = [list(examples)[i] for i in choice.tolist()]

    started, curve = time.monotonic(), []
    for step, count in enumerate(counts):
        loss = losses(count, sigmas[step])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % EMA_EVERY == 0 or step + 1 == recipe.steps:
            averaged.update_parameters(renderer)
        curve.append(loss.detach().clone())  # a graph will write over it
    values = torch.stack(curve).cpu()
    seconds = time.monotonic() - started
    kept = averaged.module
    assert isinstance(kept, Experts)
    kept.save_pretrained(folder)
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "loss": [round(part.mean().item(), 5) for part in values.chunk(CURVE_POINTS)],
        "environment": environment(),
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts
