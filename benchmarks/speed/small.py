"""A LoRA's training step on small GPUs: `python -m benchmarks.speed.small`.

Memory and time of one step with the frozen weights as they are, in eight bits, in host memory, and both. Weights are
random; one after another is built, run and freed. `--cap` has a large GPU refuse what a small one could not give:
`--model 14b --cap 24`, `--model 1.3b --cap 8`. The defaults, one expert of the 14B shape and a clip of 49 frames of
480 x 832 pixels with its source, need 64 GB of host memory.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_shared, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.contestants import PATCH
from benchmarks.speed.protocol import Timing, clocks, sample
from benchmarks.speed.renderer import MODELS
from bernini.errors import ConfigError
from bernini.lora import add_lora, trainable
from bernini.quantizing import Quantization, quantize
from bernini.renderer.experts import Architecture
from bernini.renderer.lora import LoRAConfig
from bernini.renderer.packing import Pack, PackedSample, Segment, pack
from bernini.swapping import BlockSwapping

GIB = 2**30
CLIPS = {"14b": ((13, 30, 52), 1), "1.3b": ((21, 30, 52), 0), "tiny": ((2, 4, 4), 1)}
"""Patches (T, H, W) of a clip, and how many such sources it has."""
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Variant:
    """Where and how frozen weights are kept: in how many bits, and whether on the host."""

    kind: Quantization | None = None
    swap: bool = False


VARIANTS = {
    "bf16": Variant(),
    "fp8": Variant("fp8"),
    "int8": Variant("int8"),
    "swap": Variant(swap=True),
    "fp8-swap": Variant("fp8", swap=True),
    "int8-swap": Variant("int8", swap=True),
}


class Step:
    """A training step of a LoRA.

    Args:
        variant: What becomes of the frozen weights.
        args: The command line.
        device: Where it runs.
    """

    def __init__(self, variant: Variant, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        architecture = MODELS[args.model]
        model = self.model = build(architecture, device)
        add_lora(model, LoRAConfig(rank=args.rank))
        for parameter in trainable(model):
            torch.nn.init.normal_(parameter, std=0.01)  # both matrices, so that both have gradients
        self._packed, self._target = make_problem(architecture, args, device)
        if variant.kind:
            quantize(model.blocks, variant.kind)
        if variant.swap:
            BlockSwapping(model, args.swap or len(model.blocks))
        model.enable_gradient_checkpointing()
        model.recompute = args.recompute
        if args.compile:
            model.compile_repeated_blocks(backend=args.backend)
        self._optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, fused=True)
        self._device = device
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        """One step."""
        with torch.autocast(self._device.type, torch.bfloat16):
            predicted = self.model(self._packed)[self._packed.target_index]
        loss = F.mse_loss(predicted.float(), self._target)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()


def build(architecture: Architecture, device: torch.device) -> Any:
    """A transformer as a LoRA's base is read: in bfloat16, but for the modules that Wan keeps in fp32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = architecture.build()
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return model


def make_problem(architecture: Architecture, args: argparse.Namespace, device: torch.device) -> tuple[Pack, Tensor]:
    """A packed clip with its sources, and the velocity ``[tokens, channels]`` of its target."""
    grid, sources = clip_of(args)
    size = [n * p for n, p in zip(grid, PATCH, strict=True)]
    latents = [torch.randn(architecture.in_channels, *size, device=device) for _ in range(sources + 1)]
    segments = [Segment(x, (n + 1) % (sources + 1)) for n, x in enumerate(latents)]  # the target, 0, is last
    text = torch.randn(args.text_rows, architecture.text_dim, device=device)
    packed = pack([PackedSample(segments, text, 500.0)], PATCH)
    width = architecture.in_channels * PATCH[0] * PATCH[1] * PATCH[2]
    return packed, torch.randn(len(packed.target_index), width, device=device)


def clip_of(args: argparse.Namespace) -> tuple[tuple[int, ...], int]:
    """Patches of the clip, and how many sources it has."""
    grid, sources = CLIPS[args.model]
    return tuple(args.grid or grid), sources if args.sources is None else args.sources


def set_cap(cap: float | None, device: torch.device) -> None:
    """Have the allocator give no more than a GPU of so many GiB could, whose driver takes its part, too."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((cap * GIB - taken) / total if cap else 1.0, device)


def measure(variant: Variant, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and memory of a variant; ``fits`` is all there is if it does not."""
    set_cap(None, device)  # building is not what is measured: a run reads weights on the host
    step = Step(variant, args, device)
    try:
        set_cap(args.cap, device)
        step()
        loss = step.loss.item()
        for _ in range(args.warmup - 1):
            step()
        resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        samples = [sample(step, device) for _ in range(args.steps)]
    except torch.OutOfMemoryError:
        return {"fits": False}
    timing = Timing.of(s.ms for s in samples)
    return {
        "fits": True,
        "loss": loss,
        "ms": {"median": timing.median, "fastest": timing.fastest, "slowest": timing.slowest},
        "peak_gib": (resident + max(s.memory for s in samples)) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0,
    }


def check_losses(rows: dict[str, dict[str, Any]]) -> None:
    """Compare each swapped variant's first loss with that of its weights on the device.

    Raises:
        RuntimeError: They differ.
    """
    for name, row in rows.items():
        plain = rows.get(name.removesuffix("-swap") if name != "swap" else "bf16", row)
        if row["fits"] and plain["fits"] and not abs(row["loss"] / plain["loss"] - 1) <= LOSS_TOLERANCE:
            raise RuntimeError(
                f"{name} begins at loss {row['loss']:.6f}, its weights on the device at {plain['loss']:.6f}"
            )


def _print_table(rows: dict[str, dict[str, Any]], cap: float | None) -> None:
    print(f"\n{'':12}{'step ms':>10}{'min':>10}{'max':>10}{'peak GiB':>10}{'reserved':>10}{'loss':>12}")
    for name, row in rows.items():
        if not row["fits"]:
            print(f"{name:12}   does not fit {f'{cap:g} GiB' if cap else ''}")
            continue
        times = "".join(f"{row['ms'][key]:10.1f}" for key in ("median", "fastest", "slowest"))
        print(f"{name:12}{times}{row['peak_gib']:10.2f}{row['reserved_gib']:10.2f}{row['loss']:12.6f}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.small", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="14b", help="shape of the transformer (default: 14b)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to measure (default: all)"
    )
    parser.add_argument("--swap", type=int, help="blocks whose weights are on the host under `swap` (default: all)")
    parser.add_argument("--recompute", choices=("full", "offload"), default="full", help="(default: full)")
    parser.add_argument("--cap", type=float, metavar="GIB", help="memory of the GPU that is imitated")
    parser.add_argument(
        "--grid", type=int, nargs=3, metavar=("T", "H", "W"),
        help="patches of the clip (default: 13 30 52, for 1.3b 21 30 52)",
    )  # fmt: skip
    parser.add_argument("--sources", type=int, help="sources of the clip's size (default: 1, for 1.3b 0)")
    parser.add_argument("--text-rows", type=int, default=512, help="rows of text (default: 512)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA (default: 32)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (default: 3)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each (default: 2)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    add_shared(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, or a number that is too small.
    """
    args = _parse(arguments)
    device = open_device(args.device, "--device cpu --model tiny")
    grid, sources = clip_of(args)
    counts = {"steps": args.steps, "warmup": args.warmup, "text-rows": args.text_rows, "rank": args.rank}
    refuse_below_one(counts | {"swap": 1 if args.swap is None else args.swap, "grid": min(grid)})
    if sources < 0 or (args.cap is not None and args.cap <= 0):
        raise ConfigError("--sources cannot be negative, nor --cap 0")
    say, facts = stopwatch(), environment()
    tokens = (sources + 1) * grid[0] * grid[1] * grid[2]
    say(f"{facts['gpu'] if device.type == 'cuda' else facts['processor']}; torch {torch.__version__}; {clocks(device)}")
    say(f"{args.model}, LoRA of rank {args.rank}, {tokens:,} tokens, {args.recompute} recomputation")
    rows: dict[str, dict[str, Any]] = {}
    for name in args.variants:
        rows[name] = measure(VARIANTS[name], args, device)
        gc.collect()  # hooks and blocks refer to each other
        say(f"{name}: {rows[name]}")
    set_cap(None, device)
    _print_table(rows, args.cap)
    check_losses(rows)
    asked = {key: value for key, value in vars(args).items() if key != "json"}
    figures = {"environment": facts, "arguments": asked, "tokens": tokens, "variants": rows}
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)
