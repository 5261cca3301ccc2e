"""Training on several GPUs beside one of them: `torchrun --nproc-per-node 2 -m benchmarks.speed.scaling`.

For each way to divide the work, DDP, FSDP2 and Ulysses, a renderer in training is first compared with the same on one
GPU, over the same samples, loss by loss. Then steps are timed. DDP and FSDP2 give every GPU a clip of its own: scaling
is the time of one GPU with one clip over theirs. Ulysses divides one long clip: scaling is that ratio over the number
of GPUs. Every block is recomputed in the backward pass, the optimizer is AdamW, fused on GPUs. The defaults are the 1.3B
shape at 32,760 tokens and, for Ulysses, 131,040.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.quality.environment import environment
from benchmarks.speed.command import open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.renderer import MODELS
from bernini.errors import ConfigError
from bernini.flow.noise import velocity_losses
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import Pack, PackedSample, Segment, pack, target_patches
from bernini.sharding import shard
from bernini.ulysses import Axis

WAYS = ("ddp", "fsdp2", "ulysses")
TOLERANCE = 1e-3  # relative, of each loss; bf16 computes
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Clips:
    """Random clips to learn from, the same on every rank.

    Attributes:
        architecture: Shape of the model that learns.
        rows: Rows of text of each clip.
        device: Where they are made.
    """

    architecture: Architecture
    rows: int
    device: torch.device

    def pack(self, step: int, numbers: Sequence[int], grid: Grid) -> tuple[Pack, Tensor]:
        """Some clips of a step under noise, and the velocity ``[tokens, channels]`` that is asked for."""
        samples, velocities = [], []
        for number in numbers:
            clip, noised = (torch.Generator(self.device).manual_seed(seed) for seed in (number, 1000 * step + number))
            shape = (self.architecture.in_channels, grid[0], 2 * grid[1], 2 * grid[2])
            latent = torch.randn(shape, generator=clip, device=self.device)
            context = torch.randn((self.rows, self.architecture.text_dim), generator=clip, device=self.device)
            noise = torch.randn(shape, generator=noised, device=self.device)
            sigma = torch.rand((), generator=noised, device=self.device).item()
            segment = Segment(torch.lerp(latent, noise, sigma), 0)
            samples.append(PackedSample([segment], context, 1000 * sigma))
            velocities.append(target_patches(noise - latent, (1, 2, 2)))
        return pack(samples, (1, 2, 2)), torch.cat(velocities)


class Trainee:
    """A model in training.

    Args:
        architecture: Its shape; the weights are the same in all of them.
        way: ``ddp`` computes under autocast, the others with sharded weights.
        ranks: The ranks that train together: this one alone, or all.
        device: Where it computes.
    """

    def __init__(self, architecture: Architecture, way: str, ranks: DeviceMesh, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            model = architecture.build()
        model.gradient_checkpointing = True
        self.module: nn.Module = model
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=way == "ddp")
        if way == "ddp":
            if ranks.size() > 1:
                self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            shard(model, model.blocks, ranks)
            if way == "ulysses" and ranks.size() > 1:
                names = ("data_parallel", "tensor_parallel")
                mesh = init_device_mesh(device.type, (1, ranks.size()), mesh_dim_names=names)
                model.axis = Axis.of(mesh, architecture.num_attention_heads)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(self, packed: Pack, velocity: Tensor) -> Tensor:
        """One training step; the mean loss of the clips."""
        with self.autocast:
            predicted = self.module(packed)[packed.target_index]
        loss = velocity_losses(predicted, velocity, packed.target_lengths).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@dataclass
class Measured:
    """What a trainee has shown.

    Attributes:
        losses: Mean loss of all clips of each step.
        seconds: Median time of a step on the slowest rank.
        peak_gib: Memory of this rank while it was timed; 0 on a CPU.
    """

    losses: list[float]
    seconds: float
    peak_gib: float


def measure(trainee: Trainee, clips: Clips, numbers: Sequence[int], grid: Grid, args: argparse.Namespace) -> Measured:
    """Train for a while on small clips, then time steps of larger ones.

    Args:
        trainee: Who learns.
        clips: From what.
        numbers: Clips of this rank.
        grid: Patches of the clip that is timed.
        args: The command line.
    """
    losses = torch.stack(
        [trainee.step(*clips.pack(step, numbers, tuple(args.check_grid))) for step in range(args.check_steps)]
    )
    dist.all_reduce(losses)
    large = clips.pack(0, numbers[:1], grid)
    cuda = clips.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def timed() -> float:
        dist.barrier()
        began = time.perf_counter()
        trainee.step(*large).item()  # waits for the loss, and the next line for the optimizer
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    taken = [timed() for _ in range(args.warmup + args.steps)][args.warmup :]
    median = torch.tensor(statistics.median(taken), device=clips.device)
    dist.all_reduce(median, dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return Measured((losses / dist.get_world_size()).tolist(), median.item(), peak)


def compare(way: str, args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """All ranks together beside one of them.

    Returns:
        Figures of the way, ready for JSON.

    Raises:
        RuntimeError: A loss is not that of one GPU.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    shape = MODELS[args.model]
    architecture = replace(shape, num_layers=args.layers or shape.num_layers)
    clips = Clips(architecture, args.text_rows, device)
    grid = tuple(args.long_grid if way == "ulysses" else args.grid)
    meshes = init_device_mesh(device.type, (world, 1), mesh_dim_names=("ranks", "alone"))
    every = list(range(world))
    found = []
    for ranks, numbers in ((meshes["alone"], every), (meshes["ranks"], every if way == "ulysses" else [rank])):
        trainee = Trainee(architecture, way, ranks, device)
        found.append(measure(trainee, clips, numbers, grid, args))
        del trainee
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{way} on {ranks.size()}: {found[-1].seconds:.3f} s a step")
    alone, together = found
    difference = max(abs(a / b - 1) for a, b in zip(together.losses, alone.losses, strict=True))
    if not difference < TOLERANCE:
        raise RuntimeError(f"{way}: a loss is off by {difference:.1e} from that of one GPU")
    work = 1 if way == "ulysses" else world
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "tokens": tokens * work,
        "alone_s": alone.seconds,
        "together_s": together.seconds,
        "tokens_per_s": tokens * work / together.seconds,
        "scaling": alone.seconds * work / world / together.seconds,
        "difference": difference,
        "alone_gib": alone.peak_gib,
        "together_gib": together.peak_gib,
        "losses": together.losses,
    }


def _print_table(table: dict[str, dict[str, Any]], world: int, steps: int) -> None:
    print(f"\n{'':10}{'tokens':>9}{'1 GPU s':>9}{f'{world} GPUs s':>10}", end="")
    print(f"{'tokens/s':>10}{'scaling':>9}{'GiB':>7}{'losses off by':>15}")
    for way, row in table.items():
        print(
            f"{way:10}{row['tokens']:9,}{row['alone_s']:9.3f}{row['together_s']:10.3f}{row['tokens_per_s']:10,.0f}"
            f"{row['scaling']:9.1%}{row['together_gib']:7.1f}{row['difference']:15.1e}"
        )
    print(f"losses are the means of {steps} steps' clips, beside one GPU's")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m benchmarks.speed.scaling",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="some of ddp, fsdp2 and ulysses")
    add("--model", choices=MODELS, default="1.3b", help="shape of the transformer (default: 1.3b)")
    add("--layers", type=int, help="number of blocks, if not all of the model's")
    for name, default, what in (
        ("grid", (21, 30, 52), "of a GPU's clip under DDP and FSDP2"),
        ("long-grid", (84, 30, 52), "of the clip that Ulysses divides"),
        ("check-grid", (3, 30, 52), "of the clips whose losses are compared"),
    ):
        shown = " ".join(map(str, default))
        add(f"--{name}", type=int, nargs=3, default=default, metavar=("T", "H", "W"), help=f"patches {what} ({shown})")
    add("--text-rows", type=int, default=512, help="rows of text (default: 512)")
    add("--check-steps", type=int, default=20, help="steps whose losses are compared (default: 20)")
    add("--steps", type=int, default=3, help="timed steps of each (default: 3)")
    add("--warmup", type=int, default=1, help="untimed steps of each before (default: 1)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments, on every rank, and return this rank's figures.

    Raises:
        ConfigError: Nobody has started ranks, a device that is not there, or a number below 1.
        RuntimeError: A loss is not that of one GPU.
    """
    args = _parse(arguments)
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("there are no ranks", fix="torchrun --nproc-per-node 2 -m benchmarks.speed.scaling")
    counts = {"steps": args.steps, "check-steps": args.check_steps, "text-rows": args.text_rows}
    counts |= {"layers": args.layers if args.layers is not None else 1, "warmup": args.warmup}
    counts |= {"grid": min(args.grid), "long-grid": min(args.long_grid), "check-grid": min(args.check_grid)}
    refuse_below_one(counts)
    device = open_device(args.device, "--device cpu --model tiny --grid 2 4 4 --long-grid 4 4 4 --check-grid 1 4 4")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        first = dist.get_rank() == 0
        say = stopwatch() if first else (lambda text: None)
        facts, world = environment(), dist.get_world_size()
        table = {way: compare(way, args, device, say) for way in args.ways}
        figures = {"environment": facts, "model": args.model, "gpus": world, "ways": table}
        if first:
            _print_table(table, world, args.check_steps)
            write_json(figures, args.json)
    finally:
        dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    run_command(main)
