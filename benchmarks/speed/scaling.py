"""Training on several GPUs beside one of them: `torchrun --nproc-per-node 2 -m benchmarks.speed.scaling`.

For each way to divide the work, DDP, FSDP2 and Ulysses, a model in training is first compared with the same on one
GPU, over the same samples, loss by loss. Then steps are timed. DDP and FSDP2 give every GPU a pack of its own: scaling
is the time of one GPU with one pack over theirs. Ulysses divides one pack: scaling is that over the number of GPUs.
`--together` leaves one GPU out, for what does not fit into it. Blocks are recomputed in the backward pass, the
optimizer is AdamW, fused on GPUs. The defaults are the 1.3B renderer at 32,760 tokens and, for Ulysses, 131,040.
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
from benchmarks.speed.planner_shapes import SHAPES
from benchmarks.speed.planner_train import TrainProblem
from benchmarks.speed.renderer import MODELS
from benchmarks.speed.scaling_systems import PlannerSystem, RendererSystem, System
from bernini.errors import ConfigError
from bernini.sharding import shard
from bernini.ulysses import Axis

WAYS = ("ddp", "fsdp2", "ulysses")
TOLERANCE = 1e-3  # relative, of each loss; bf16 computes


class Trainee:
    """A model in training.

    Args:
        system: What model.
        way: ``ddp`` computes under autocast, the others with sharded weights.
        ranks: The ranks that train together: this one alone, or all.
    """

    def __init__(self, system: System, way: str, ranks: DeviceMesh) -> None:
        model, blocks = system.build()
        self.system, cuda = system, system.device.type == "cuda"
        self.module: nn.Module = model
        self.autocast = torch.autocast(system.device.type, torch.bfloat16, enabled=way == "ddp")
        if way == "ddp":
            if ranks.size() > 1:
                self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            shard(model, blocks, ranks)
            if way == "ulysses" and ranks.size() > 1:
                names = ("data_parallel", "tensor_parallel")
                mesh = init_device_mesh(system.device.type, (1, ranks.size()), mesh_dim_names=names)
                model.axis = Axis.of(mesh, system.heads)  # type: ignore[assignment]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=cuda)

    def step(self, batch: Any) -> Tensor:
        """One training step; the mean loss of the batch."""
        with self.autocast:
            loss = self.system.loss(self.module, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@dataclass
class Measured:
    """What a trainee has shown.

    Attributes:
        losses: Mean loss over all ranks of each step.
        tokens: Tokens of a rank's pack that was timed.
        seconds: Median time of a step on the slowest rank.
        peak_gib: Memory of this rank while it was timed; 0 on a CPU.
    """

    losses: list[float]
    tokens: int
    seconds: float
    peak_gib: float


def measure(trainee: Trainee, numbers: Sequence[int], args: argparse.Namespace) -> Measured:
    """Train for a while on small samples, then time steps of large ones.

    Args:
        trainee: Who learns.
        numbers: Samples of this rank.
        args: The command line.
    """
    system = trainee.system
    steps = range(args.check_steps)
    losses = torch.stack([trainee.step(system.batch(step, numbers, timed=False)[1]) for step in steps])
    dist.all_reduce(losses)
    tokens, large = system.batch(0, numbers[:1], timed=True)
    cuda = system.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def timed() -> float:
        dist.barrier()
        began = time.perf_counter()
        trainee.step(large)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    taken = [timed() for _ in range(args.warmup + args.steps)][args.warmup :]
    median = torch.tensor(statistics.median(taken), device=system.device)
    dist.all_reduce(median, dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return Measured((losses / dist.get_world_size()).tolist(), tokens, median.item(), peak)


def compare(way: str, system: System, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All ranks together and, unless it is left out, one of them.

    Returns:
        Figures of the way, ready for JSON.

    Raises:
        RuntimeError: A loss is not that of one GPU, or not finite.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    every, divided = list(range(world)), way == "ulysses"
    meshes = init_device_mesh(system.device.type, (world, 1), mesh_dim_names=("ranks", "alone"))
    asked = {"ranks": every if divided else [rank]} | ({} if args.together else {"alone": every})
    found = {}
    for name, numbers in asked.items():
        trainee = Trainee(system, way, meshes[name])
        found[name] = measure(trainee, numbers, args)
        say(f"{way}, {meshes[name].size()} together: {found[name].seconds:.3f} s a step")
        del trainee
        if system.device.type == "cuda":
            torch.cuda.empty_cache()
    together, alone = found["ranks"], found.get("alone")
    packs = 1 if divided else world
    row: dict[str, Any] = {
        "tokens": packs * together.tokens,
        "together_s": together.seconds,
        "tokens_per_s": packs * together.tokens / together.seconds,
        "together_gib": together.peak_gib,
        "losses": together.losses,
    }
    if not all(abs(loss) < float("inf") for loss in together.losses):
        raise RuntimeError(f"{way}: losses are not finite: {together.losses}")
    if alone is None:
        return row
    difference = max(abs(a / b - 1) for a, b in zip(together.losses, alone.losses, strict=True))
    if not difference < TOLERANCE:
        raise RuntimeError(f"{way}: a loss is off by {difference:.1e} from that of one GPU")
    scaling = alone.seconds * packs / world / together.seconds
    return row | {
        "alone_s": alone.seconds,
        "alone_gib": alone.peak_gib,
        "scaling": scaling,
        "difference": difference,
    }


def _print_table(table: dict[str, dict[str, Any]], world: int) -> None:
    print(f"\n{'':10}{'tokens':>9}{f'{world} GPUs s':>10}{'tokens/s':>10}{'GiB':>7}", end="")
    print(f"{'1 GPU s':>9}{'scaling':>9}{'losses off by':>15}{'first and last':>17}")
    for way, row in table.items():
        alone = f"{'':33}"
        if "scaling" in row:
            alone = f"{row['alone_s']:9.3f}{row['scaling']:9.1%}{row['difference']:15.1e}"
        print(
            f"{way:10}{row['tokens']:9,}{row['together_s']:10.3f}{row['tokens_per_s']:10,.0f}{row['together_gib']:7.1f}"
            f"{alone}{row['losses'][0]:9.3f}{row['losses'][-1]:8.3f}"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m benchmarks.speed.scaling",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    models = (*MODELS, *(f"planner-{name}" for name in SHAPES))
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="some of ddp, fsdp2 and ulysses")
    add("--model", choices=models, default="1.3b", help=f"one of {', '.join(models)} (default: 1.3b)")
    add("--layers", type=int, help="number of blocks or text layers, if not all of the model's")
    add("--together", action="store_true", help="nothing on one GPU: no scaling, and no losses to compare with")
    for name, default, what in (
        ("grid", (21, 30, 52), "of a GPU's clip under DDP and FSDP2"),
        ("long-grid", (84, 30, 52), "of the clip that Ulysses divides"),
        ("check-grid", (3, 30, 52), "of the clips whose losses are compared"),
    ):
        shown = " ".join(map(str, default))
        add(f"--{name}", type=int, nargs=3, default=default, metavar=("T", "H", "W"), help=f"patches {what} ({shown})")
    add("--text-rows", type=int, default=512, help="rows of text of a clip (default: 512)")
    add("--samples", type=int, default=8, help="samples in a planner's pack, of 1,000 tokens each (default: 8)")
    add("--check-steps", type=int, default=20, help="steps whose losses are compared (default: 20)")
    add("--steps", type=int, default=3, help="timed steps of each (default: 3)")
    add("--warmup", type=int, default=1, help="untimed steps of each before (default: 1)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def _system(way: str, args: argparse.Namespace, device: torch.device) -> System:
    if args.model in MODELS:
        shape = MODELS[args.model]
        architecture = replace(shape, num_layers=args.layers or shape.num_layers)
        large = args.long_grid if way == "ulysses" else args.grid
        return RendererSystem(architecture, args.text_rows, tuple(args.check_grid), tuple(large), device)
    planner = SHAPES[args.model.removeprefix("planner-")].cut(args.layers)
    problem = TrainProblem(
        planner, args.samples, text=100, sources=600, target=300, labels=16, weights=torch.float32, device=device
    )
    return PlannerSystem(problem, device)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments, on every rank, and return this rank's figures.

    Raises:
        ConfigError: Nobody has started ranks, a device that is not there, or a number below 1.
        RuntimeError: A loss is not that of one GPU, or not finite.
    """
    args = _parse(arguments)
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("there are no ranks", fix="torchrun --nproc-per-node 2 -m benchmarks.speed.scaling")
    counts = {"steps": args.steps, "check-steps": args.check_steps, "text-rows": args.text_rows}
    counts |= {"layers": args.layers if args.layers is not None else 1, "warmup": args.warmup, "samples": args.samples}
    counts |= {"grid": min(args.grid), "long-grid": min(args.long_grid), "check-grid": min(args.check_grid)}
    refuse_below_one(counts)
    device = open_device(args.device, "--device cpu --model tiny --grid 2 4 4 --long-grid 4 4 4 --check-grid 1 4 4")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        first, world = dist.get_rank() == 0, dist.get_world_size()
        say = stopwatch() if first else (lambda text: None)
        table = {way: compare(way, _system(way, args, device), args, say) for way in args.ways}
        figures = {"environment": environment(), "model": args.model, "gpus": world, "ways": table}
        if first:
            _print_table(table, world)
            write_json(figures, args.json)
    finally:
        dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    run_command(main)
