"""A training step of the renderer beside diffusers' stock model, in one process: `python -m benchmarks.speed.renderer`.

Both hold the same fp32 weights under autocast to bf16 and see the same latent, text and timestep; every block is
recomputed in the backward pass unless `--also` says otherwise, and the optimizer is fused AdamW, within the step.
Results are compared before anything is timed; what does not fit the device is named and left out. The defaults are the
1.3B shape at 81 frames of 480 x 832 pixels.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import diffusers
import torch

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_shared, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.contestants import VARIANTS, Contestant, Problem, contestants, stock_reference
from benchmarks.speed.protocol import (
    PEAK_TFLOPS,
    Timing,
    ceilings,
    clocks,
    interleave,
    noise,
    rates,
    relative_error,
)
from bernini.renderer.experts import SHAPES, Architecture

MODELS = {
    **SHAPES,
    "tiny": Architecture(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32, freq_dim=32
    ),
}

# Roundings to bf16 fall differently in every implementation: ours may be this much further from fp32 than stock is.
BF16_SLACK = 1.25
FP32_TOLERANCE = 1e-5


def forward_flop(architecture: Architecture, tokens: int, text_rows: int) -> float:
    """Floating-point operations of one forward pass over one sample, a multiply-add counted as two.

    Linear maps of the tokens, keys and values of the text, self-attention and cross-attention; embeddings, norms and
    the output head are left out. A training step is three times this; what is recomputed is not counted.
    """
    layers, ffn = architecture.num_layers, architecture.ffn_dim
    dim = architecture.num_attention_heads * architecture.attention_head_dim
    per_layer = (
        2 * tokens * (6 * dim**2 + 2 * dim * ffn)
        + 2 * text_rows * 2 * dim**2
        + 4 * dim * tokens**2
        + 4 * dim * tokens * text_rows
    )
    return float(layers * per_layer)


def check_fp32(problem: Problem) -> tuple[float, float]:
    """Compare ours with stock in fp32, uncompiled, on a cut of the problem: two layers, a small grid.

    Returns:
        Relative L2 error of the output and of all gradients together.

    Raises:
        RuntimeError: Either is above 1e-5.
    """
    small = replace(
        problem,
        architecture=replace(problem.architecture, num_layers=min(2, problem.architecture.num_layers)),
        grid=(min(problem.grid[0], 5), min(problem.grid[1], 6), min(problem.grid[2], 8)),
        dtype=torch.float32,
        weights=None,
    )
    # Convolutions, which embed stock's patches, use TensorFloat-32 unless told not to.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        stock, ours, _ = contestants(small, compiler=None)
        (stock_out, stock_grads), (ours_out, ours_grads) = stock.gradients(), ours.gradients()
    errors = relative_error(ours_out, stock_out), relative_error(ours_grads, stock_grads)
    if not max(errors) < FP32_TOLERANCE:
        raise RuntimeError(f"ours is not stock in fp32: output off by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
    return errors


def check_bf16(problem: Problem, rivals: Sequence[Contestant]) -> dict[str, float]:
    """Compare the output of every contestant, compiled ones included, with stock's in fp32 on the same weights.

    Returns:
        Relative L2 error by name.

    Raises:
        RuntimeError: Ours is further from fp32 than stock eager is, by more than rounding explains.
    """
    reference = stock_reference(problem, rivals[0].model.state_dict())
    errors = {rival.name: relative_error(rival.infer(), reference) for rival in rivals}
    allowed = BF16_SLACK * errors[rivals[0].name]
    for rival in rivals:
        if rival.ours and not errors[rival.name] <= allowed:
            raise RuntimeError(f"{rival.name} is off by {errors[rival.name]:.2e}, more than {allowed:.2e}")
    return errors


def warm(rival: Contestant, steps: int) -> bool:
    """Take untimed steps; whether they fit the device."""
    try:
        for _ in range(steps):
            rival.step()
    except torch.OutOfMemoryError:
        return False
    return True


def verdict(steps: dict[str, float], spread: float) -> tuple[str, float]:
    """The fastest of ours compiled against the fastest of stock, in words and as a ratio of times.

    Args:
        steps: Milliseconds of a step by contestant.
        spread: Relative difference up to which two contestants are level.
    """
    ours = min((name for name in steps if name.startswith("ours compiled")), key=steps.__getitem__)
    stock = min((name for name in steps if name.startswith("stock")), key=steps.__getitem__)
    ratio = steps[ours] / steps[stock]
    word = "level with" if abs(ratio - 1) <= spread else "faster than" if ratio < 1 else "SLOWER than"
    text = f"{ours} is {word} {stock}: {ratio:.3f} of its time; rounds of one contestant differ by {spread:.1%}"
    if (default := steps.get("stock default attention")) is not None:
        text += f"; {default / steps[ours]:.2f} times as fast as stock with torch's default attention"
    return text, ratio


def run(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time. Prints as it goes; a table last.

    Args:
        problem: What is computed.
        args: The command line.

    Returns:
        All figures, ready for JSON.
    """
    diffusers.utils.logging.set_verbosity_error()  # it calls choosing a backend of attention experimental, each time
    device, say = problem.device, stopwatch()
    facts = environment()
    say(
        f"{facts['gpu'] if device.type == 'cuda' else facts['processor']}; torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}; {clocks(device)}"
    )
    limits = ceilings(device)
    say(f"ceilings: {limits}")
    say(f"problem: {problem}")
    output, gradients = check_fp32(problem)
    say(f"fp32, ours against stock, eager, 2 layers: output {output:.1e}, gradients {gradients:.1e}")

    rivals = contestants(problem, args.backend, args.also)
    errors = check_bf16(problem, rivals)
    fitting = []
    for rival in rivals:
        fits = warm(rival, args.warmup)
        fitting += [rival] if fits else []
        more = "" if fits else "; OUT OF MEMORY, not timed"
        say(f"{rival.name}: output off by {errors[rival.name]:.2e} from stock in fp32{more}")
        if not fits:
            gc.collect()
            torch.cuda.empty_cache()
    left_out, rivals = [rival.name for rival in rivals if rival not in fitting], fitting
    say("warm; timing")
    step_samples = interleave({r.name: r.step for r in rivals}, args.steps, device)
    forward_samples = interleave({r.name: r.infer for r in rivals}, args.forwards, device)
    say(f"done; {clocks(device)}")

    flop = forward_flop(problem.architecture, problem.tokens, problem.text_rows)
    table = {
        rival.name: {
            "step": rates(step_samples[rival.name], 3 * flop, args.peak_tflops),
            "forward": rates(forward_samples[rival.name], flop, args.peak_tflops),
            "peak_gib": (rival.resident + max(s.memory for s in step_samples[rival.name])) / 2**30,
            "error": errors[rival.name],
        }
        for rival in rivals
    }
    spread = noise(step_samples)
    text, ratio = verdict(
        {name: Timing.of(s.ms for s in rounds).median for name, rounds in step_samples.items()}, spread
    )
    _print_table(table, args.peak_tflops)
    print(text)
    return {
        "environment": facts,
        "problem": problem.facts(),
        "ceilings": asdict(limits),
        "peak_tflops": args.peak_tflops,
        "fp32": {"output": output, "gradients": gradients},
        "contestants": table,
        "out_of_memory": left_out,
        "noise": spread,
        "ratio": ratio,
        "verdict": text,
    }


def _print_table(table: dict[str, Any], peak: float) -> None:
    print(f"\n{'':26}{'step ms':>9}{'min':>9}{'max':>9}{'MFU':>7}{'forward ms':>12}{'MFU':>7}{'peak GiB':>10}")
    for name, row in table.items():
        step, forward = row["step"], row["forward"]
        print(
            f"{name:26}{step['ms']['median']:9.1f}{step['ms']['fastest']:9.1f}{step['ms']['slowest']:9.1f}"
            f"{step['mfu']:7.1%}{forward['ms']['median']:12.1f}{forward['mfu']:7.1%}{row['peak_gib']:10.1f}"
        )
    print(f"MFU of {peak:.0f} TFLOP/s; a step counts three forward passes, recomputation is not counted")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.renderer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="1.3b", help="shape of the transformer (default: 1.3b)")
    parser.add_argument("--layers", type=int, help="number of blocks, if not all of the model's")
    parser.add_argument(
        "--grid", type=int, nargs=3, default=(21, 30, 52), metavar=("T", "H", "W"),
        help="patches of the clip (default: 21 30 52, which is 32,760 tokens)",
    )  # fmt: skip
    parser.add_argument("--text-rows", type=int, default=512, help="rows of text (default: 512)")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps of each (default: 10)")
    parser.add_argument("--forwards", type=int, default=5, help="timed forward passes of each (default: 5)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps of each (default: 3)")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16"), default="fp32", help="bf16 has no master weights (default: fp32)"
    )
    parser.add_argument(
        "--also", nargs="+", choices=VARIANTS, default=(), metavar="VARIANT",
        help=f"ours with rotation by another kernel, or keeping more than a block's input: {', '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, help="100 %% MFU (default: 989, an H100)")
    add_shared(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, or a number below 1.
    """
    args = _parse(arguments)
    device = open_device(args.device, "--device cpu --model tiny --grid 2 4 4")
    counts = {"steps": args.steps, "forwards": args.forwards, "warmup": args.warmup, "text-rows": args.text_rows}
    counts |= {"layers": args.layers if args.layers is not None else 1, "grid": min(args.grid)}
    refuse_below_one(counts)
    shape = MODELS[args.model]
    problem = Problem(
        architecture=replace(shape, num_layers=args.layers or shape.num_layers),
        grid=tuple(args.grid),
        text_rows=args.text_rows,
        dtype=torch.bfloat16,
        device=device,
        weights=torch.float32 if args.weights == "fp32" else torch.bfloat16,
    )
    figures = run(problem, args)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)
