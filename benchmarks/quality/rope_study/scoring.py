"""Sampling held-out items and reading them with the verifier, one record per item and numbering of its sources."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.environment import environment
from benchmarks.quality.rope_study.batches import Layout, attention, predict
from benchmarks.quality.rope_study.data import BEYOND, COMPARED, Clips, Examples, Map, Pixels
from bernini.conversation import Conversation
from bernini.flow.solvers import SOLVERS
from bernini.renderer.experts import Experts
from bernini.renderer.sampling import BeyondTrained, SamplingConfig, source_ids
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.vae.codec import LatentCodec
from datamodules.toyworld import Scene, Thing, judge, read

NUMBERINGS: dict[str, BeyondTrained] = {"integer": "extend", "fractional": "interpolate"}
SEED = 42

Record = dict[str, Any]


def settings(encoding: str) -> list[tuple[int, str]]:
    """Numbers of references, each with the numberings that make a difference to the encoding."""
    beyond = ["integer"] if encoding == "plain" else list(NUMBERINGS)
    return [*((k, "integer") for k in COMPARED), *((k, numbering) for k in BEYOND for numbering in beyond)]


def _looks(thing: Thing) -> tuple[str, str, str]:
    return thing.shape, thing.colour, thing.texture


def _agreement(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the wanted looks that were found."""
    return sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


def read_output(item: Conversation, output: Tensor) -> Record:
    """Score one output.

    Args:
        item: A subject-to-video item of the toy world.
        output: ``[3, T, H, W]`` uint8.

    Returns:
        ``in_place``, the share right of shape, colour and texture of what is seen at the place of each thing that an
        image shows: the verifier's own ``identity`` lets two things swap places. ``chance``, what ``in_place`` would be
        on average if each thing came from any of the images alike. ``copied``, the share of things that look like one
        of the images, whichever. ``named``, the numbers of the images in the text. The verifier's ``identity``,
        ``attributes`` and ``motion``.
    """
    truth = item.info["truth"]
    wanted = Scene.from_json(truth["target"]).things
    shown = [_looks(Scene.from_json(row).things[0]) for row in truth["sources"]]
    seen = read(output).scene.things[: len(wanted)]
    at_place = {thing.place: _looks(thing) for thing in seen}
    right = [_agreement(at_place.get(thing.place, ()), _looks(thing)) for thing in wanted]
    by_chance = [_agreement(look, _looks(thing)) for thing in wanted for look in shown]
    scores = judge(item, output)
    return {
        "key": item.key,
        "named": [int(number) for number in re.findall(r"image(\d+)", truth["instruction"])],
        "in_place": sum(right) / len(right),
        "chance": sum(by_chance) / len(by_chance),
        "copied": sum(_looks(thing) in shown for thing in seen) / len(wanted),
        **{name: scores[name] for name in ("identity", "attributes", "motion")},
    }


def _read_held_out(clips: Clips, references: int, numbered: tuple[int, Pixels]) -> Record:
    index, output = numbered
    return read_output(clips.item("held_out", references, index), torch.from_numpy(output))


@torch.no_grad()
def sample(
    model: PackedWanTransformer3DModel, examples: Examples, ids: Sequence[float], steps: int, batch: int
) -> Tensor:
    """Latents for all items, without guidance; the noise depends on the item's number alone.

    Args:
        model: The transformer.
        examples: Items with one number of sources.
        ids: Ids of the sources.
        steps: Solver steps.
        batch: Items at once.

    Returns:
        ``[N, C, t, h, w]`` fp32.
    """
    config = SamplingConfig(steps=steps)
    device = examples.targets.device
    noise = torch.randn(examples.targets.shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    made = []
    for items in torch.arange(len(examples), device=device).split(batch):
        given, x = examples.batch(items), noise[items]
        layout = Layout.of(given, ids, model.patch)
        solver = SOLVERS[config.solver](config.steps, config.shift)
        for index, timestep in enumerate(solver.timesteps):
            timesteps = torch.full((len(items),), float(timestep), device=device)
            rows = predict(model, layout.fill(given, x, timesteps))
            x = solver.step(index, layout.latents(rows), x)
        made.append(x)
    return torch.cat(made)


def decode(codec: LatentCodec, latents: Tensor, batch: int) -> Iterator[Pixels]:
    """Pixels ``[3, T, H, W]`` uint8 of latents ``[N, C, t, h, w]``."""
    for part in latents.split(batch):
        yield from codec.decode(part).cpu().numpy()


class Scorer:
    """Scores held-out items.

    Args:
        examples: Held-out items by number of references.
        clips: Size of their clips.
        codec: The VAE, on the examples' device.
        batch: Items that are sampled and decoded at once.
        mapped: Maps over outputs to be read, see `workers`.
    """

    def __init__(
        self, examples: dict[int, Examples], clips: Clips, codec: LatentCodec, batch: int, mapped: Map
    ) -> None:
        self.examples, self.clips, self.codec, self.batch, self.mapped = examples, clips, codec, batch, mapped

    def ceiling(self) -> list[Record]:
        """Records of the true targets, which went through the VAE alone."""
        runs = [(count, "integer") for count in self.examples]
        return self._records(runs, lambda count, _: self.examples[count].targets)

    def model(self, folder: Path, steps: int) -> list[Record]:
        """Records of a trained renderer.

        Args:
            folder: Folder of its run.
            steps: Solver steps.
        """
        device = self.codec.mean.device
        model = Experts.from_pretrained(folder).to(device).eval().at(0)
        model.attention = attention(device)

        def make(count: int, numbering: str) -> Tensor:
            return sample(model, self.examples[count], source_ids(count, NUMBERINGS[numbering]), steps, self.batch)

        return self._records(settings(model.segment_encoding), make)

    def _records(self, runs: list[tuple[int, str]], make: Callable[[int, str], Tensor]) -> list[Record]:
        records: list[Record] = []
        for count, numbering in runs:
            outputs = decode(self.codec, make(count, numbering), self.batch)
            found = self.mapped(partial(_read_held_out, self.clips, count), enumerate(outputs))
            records += [{"references": count, "numbering": numbering, **record} for record in found]
        return records


def write_scores(path: Path, records: list[Record], **facts: Any) -> None:
    """Write records beside what they are records of."""
    path.write_text(json.dumps({**facts, "environment": environment(), "records": records}) + "\n")
