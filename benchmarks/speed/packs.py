"""A mix of tasks in packs, beside padding each batch to its longest sample: `python -m benchmarks.speed.packs`.

Images, clips, edits and references of many sizes train a renderer of random weights: in the packs that training makes
of them, and in batches of samples as they come, as many as the same budget of tokens holds when all of them are as long
as the longest. Both use one model, whose attention is not told of padding, and fused AdamW under bf16 autocast. Useful
tokens per second are given of one device, and of several ranks that wait for the slowest one in each step; ranks are
run one after the other on one device, without what they would have to tell each other.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from torch._dynamo.utils import counters

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_shared, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.mixed import Group, Maker, draw_mix, packs, padded, take
from benchmarks.speed.protocol import Sample, Timing, clocks, relative_error, sample
from benchmarks.speed.renderer import MODELS
from bernini.attention import AttentionBackend
from bernini.flow.noise import velocity_losses
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import Pack, pack
from datamodules.buckets import Bounds
from datamodules.packed_order import PackConfig

ALONE_TOLERANCE = 2e-2  # relative L2, in bf16
SLOWER = 1.3  # a first run takes this much longer than the second if something was built in it


class Trainee:
    """A renderer in training.

    Args:
        architecture: Its shape.
        attention: Its attention backend.
        compiler: What its blocks are compiled with; null for not at all.
        device: Where it trains.
    """

    def __init__(
        self, architecture: Architecture, attention: AttentionBackend, compiler: str | None, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        with device:
            self.model = architecture.build()
        for name, parameter in self.model.named_parameters():  # so that what attention does shows in the output
            if name.endswith("scale_shift_table"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif name.endswith(("norm_q.weight", "norm_k.weight")):
                torch.nn.init.constant_(parameter, 2.0)
        self.model.attention = attention
        if compiler is not None:
            self.model.compile_repeated_blocks(backend=compiler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        text = torch.randn(512, architecture.text_dim, device=device)
        self.maker = Maker(architecture.in_channels, text, seed=1)

    def forward(self, packed: Pack) -> torch.Tensor:
        """``[tokens, channels]``."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(packed)

    def step(self, packed: Pack) -> None:
        """One training step."""
        predicted = self.forward(packed)[packed.target_index]
        velocity_losses(predicted, torch.zeros_like(predicted), packed.target_lengths).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, group: Group) -> Sample:
        """A timed step on new latents, which are there before."""
        packed = pack(self.maker.samples(group), self.model.patch)
        return sample(lambda: self.step(packed), self.device)

    @torch.no_grad()
    def check(self, group: Group) -> float:
        """Compare a sample in a pack with the sample alone.

        Returns:
            Relative L2 error.

        Raises:
            RuntimeError: It is more than bf16 explains.
        """
        samples = self.maker.samples(group)
        first = pack(samples[:1], self.model.patch)
        together = self.forward(pack(samples, self.model.patch))[: first.tokens]
        error = relative_error(together, self.forward(first))
        if not error < ALONE_TOLERANCE:
            raise RuntimeError(f"a sample in a pack is off by {error:.1e} from the same sample alone")
        return error


def measure(groups: Sequence[Group], first: Sequence[Sample], second: Sequence[Sample], budget: int, ranks: int) -> Any:
    """Figures of one way to train.

    Args:
        groups: What it was given, step by step and rank by rank.
        first: Their first runs.
        second: Their second runs, in which nothing has to be built.
        budget: Tokens that a device could be given.
        ranks: Groups of a step.
    """
    real = sum(group.real for group in groups)
    times = [one.ms for one in second]
    steps = [times[at : at + ranks] for at in range(0, len(times), ranks)]
    waited = sum(max(step) for step in steps)
    return {
        "tokens_per_s": 1e3 * real / sum(times),
        "tokens_per_s_of_ranks": 1e3 * real / waited,
        "filled": real / (budget * len(groups)),
        "real": real / sum(group.length * len(group.samples) or group.real for group in groups),
        "samples": sum(len(group.samples) for group in groups),
        "ms": asdict(Timing.of(times)),
        "spread": statistics.mean(statistics.pstdev(step) / statistics.mean(step) for step in steps),
        "slower_at_first": sum(a.ms > SLOWER * b.ms for a, b in zip(first, second, strict=True)),
        "peak_gib": max(one.memory for one in second) / 2**30,
    }


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check, then time. Prints as it goes; a table last."""
    say, facts = stopwatch(), environment()
    shape = MODELS[args.model]
    architecture = replace(shape, num_layers=min(args.layers, shape.num_layers))
    width = architecture.num_attention_heads * architecture.attention_head_dim
    crossover = 3 * width + architecture.ffn_dim
    mix = draw_mix(args.samples, Bounds(max_frames=args.max_frames, max_area=args.max_area), seed=0)
    count, warmup = args.ranks * args.steps, args.ranks * args.warmup
    ways = {
        "packs": packs(mix, PackConfig(args.tokens, crossover=crossover), args.ranks, seed=0),
        "padded": padded(mix, args.tokens, seed=0),
    }
    groups = {name: take(found, count + warmup) for name, found in ways.items()}
    name = facts["gpu"] if device.type == "cuda" else facts["processor"]
    say(f"{name}; torch {torch.__version__}; {architecture.num_layers} layers of width {width}; {clocks(device)}")
    trainee = Trainee(architecture, args.attention, args.backend if args.compile else None, device)
    say(f"a sample in a pack against the same alone: off by {trainee.check(max(groups['packs'], key=_samples)):.1e}")
    for own in groups.values():
        for group in own[:warmup]:
            trainee.run(group)
    say(f"warm after {warmup} groups of each; timing {count} of each, twice")
    timed = {name: own[warmup:] for name, own in groups.items()}
    runs: list[dict[str, list[Sample]]] = [{name: [] for name in timed} for _ in range(2)]
    compiled = dict.fromkeys(timed, 0)
    for taken in runs:
        for number in range(count):
            for name in timed if number % 2 else [*timed][::-1]:
                before = counters["stats"]["unique_graphs"]
                taken[name].append(trainee.run(timed[name][number]))
                compiled[name] += counters["stats"]["unique_graphs"] - before
    say(f"done; {clocks(device)}")
    table = {
        name: measure(own, runs[0][name], runs[1][name], args.tokens, args.ranks) | {"compiles": compiled[name]}
        for name, own in timed.items()
    }
    ratios = {
        key: table["packs"][key] / table["padded"][key] for key in ("tokens_per_s", "tokens_per_s_of_ranks")
    }  # fmt: skip
    _print_table(table, ratios, args.ranks)
    problem = asdict(architecture) | {key: value for key, value in vars(args).items() if key != "json"}
    return {"environment": facts, "problem": problem, "contestants": table, "ratios": ratios}


def _samples(group: Group) -> int:
    return len(group.samples)


def _print_table(table: dict[str, Any], ratios: dict[str, float], ranks: int) -> None:
    print(
        f"\n{'':8}{'useful tok/s':>14}{f'of {ranks} ranks':>13}{'step ms':>9}{'filled':>8}{'real':>7}{'spread':>8}"
        f"{'compiled':>10}{'built':>7}{'peak GiB':>10}"
    )
    for name, row in table.items():
        print(
            f"{name:8}{row['tokens_per_s']:14,.0f}{row['tokens_per_s_of_ranks']:13,.0f}{row['ms']['median']:9.1f}"
            f"{row['filled']:8.1%}{row['real']:7.1%}{row['spread']:8.1%}{row['compiles']:10}"
            f"{row['slower_at_first']:7}{row['peak_gib']:10.1f}"
        )
    print(
        "filled: tokens of samples in the budget; real: the same in what was computed; spread: of a step's ranks;"
        f"\nbuilt: groups whose first run took {SLOWER} times as long as the second, or longer; peak: beside weights"
    )
    one, many = ratios.values()
    print(f"packs: {one:.2f} times the useful tokens per second of padded batches on one device, {many:.2f} on {ranks}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.packs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="1.3b", help="width of the transformer (default: 1.3b)")
    parser.add_argument("--layers", type=int, default=4, help="most blocks (default: 4)")
    parser.add_argument("--tokens", type=int, default=72_000, help="token budget of a device (default: 72000)")
    parser.add_argument("--max-frames", type=int, default=81, help="most frames of a clip (default: 81)")
    parser.add_argument("--max-area", type=int, default=399_360, help="most pixels of a frame (default: 399360, 480p)")
    parser.add_argument("--samples", type=int, default=4000, help="samples of the mix (default: 4000)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks whose steps are run (default: 4)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of all ranks (default: 8)")
    parser.add_argument("--warmup", type=int, default=6, help="untimed steps before (default: 6)")
    parser.add_argument("--attention", choices=get_args(AttentionBackend), default="auto", help="(default: auto)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the blocks as they are")
    add_shared(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, a number below 1, or a mix that is too small.
    """
    args = _parse(arguments)
    small = "--model tiny --max-frames 17 --max-area 4096 --tokens 200 --samples 200 --ranks 2 --steps 2 --warmup 1"
    device = open_device(args.device, f"--device cpu {small}")
    names = ("layers", "samples", "ranks", "steps", "warmup")
    refuse_below_one({name: getattr(args, name) for name in names})
    figures = run(args, device)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)
