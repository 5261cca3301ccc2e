"""How every speed figure here is taken: device events, rivals in interleaved rounds, the device's ceilings beside."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

# Dense bf16 peak of an H100 SXM or H200 in TFLOP/s, the denominator of MFU unless another is given.
PEAK_TFLOPS = 989.0


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        ms: Milliseconds.
        memory: Bytes allocated on the device at the worst moment, beyond those before the call; 0 on a CPU.
    """

    ms: float
    memory: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds: median, fastest, slowest."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, milliseconds: Iterable[float]) -> "Timing":
        """Summarise at least one time."""
        rounds = list(milliseconds)
        return cls(statistics.median(rounds), min(rounds), max(rounds))


QUEUE_CYCLES = 20_000_000  # about ten milliseconds, in which the host launches ahead


def sample(call: Call, device: torch.device, repeats: int = 1) -> Sample:
    """Time a call, from an idle device to an idle device.

    Args:
        call: What to time.
        device: Where it runs.
        repeats: How often it is called for one time. More than once is for calls that are shorter than their launches:
            the device is kept busy until some are queued, and goes from one to the next.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return Sample(1e3 * (time.perf_counter() - began) / repeats, 0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if repeats > 1:
        torch.cuda._sleep(QUEUE_CYCLES)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / repeats, torch.cuda.max_memory_allocated(device) - resident)


def interleave(
    calls: Mapping[str, Call], rounds: int, device: torch.device, repeats: int = 1
) -> dict[str, list[Sample]]:
    """Time every call once a round, in turn, so that heat and clocks weigh on all alike.

    Every other round runs backwards: none always follows the same neighbour. Warm the calls up before. ``repeats`` is
    that of `sample`.

    Returns:
        Samples by name, in the order of the rounds.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            samples[name].append(sample(calls[name], device, repeats))
    return samples


def noise(samples: Mapping[str, list[Sample]]) -> float:
    """Largest relative difference between one call's medians in even and in odd rounds; 0 if there is one round.

    Two calls that differ by less than that have not been told apart.
    """
    differences = []
    for rounds in samples.values():
        even, odd = [s.ms for s in rounds[::2]], [s.ms for s in rounds[1::2]]
        if odd:
            differences.append(abs(statistics.median(even) / statistics.median(odd) - 1))
    return max(differences, default=0.0)


def rates(samples: Sequence[Sample], flop: float, peak: float) -> dict[str, Any]:
    """Times of one call and what they come to, ready for JSON.

    Args:
        samples: At least one.
        flop: Floating-point operations of a call.
        peak: TFLOP/s that are 100 % MFU.
    """
    timing = Timing.of(s.ms for s in samples)
    tflops = flop / timing.median / 1e9
    return {"ms": asdict(timing), "tflops": tflops, "mfu": tflops / peak}


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Relative L2 error; NaN if either holds one."""
    output, reference = output.double(), reference.double()
    return ((output - reference).norm() / reference.norm()).item()


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured in the same run.

    Attributes:
        copy: Device-to-device copy in TB/s, bytes read plus bytes written.
        matmul: Square bf16 matrix product in TFLOP/s.
        matmul_size: Rows of its matrices.
    """

    copy: float
    matmul: float
    matmul_size: int

    def __str__(self) -> str:
        return f"copy {self.copy:.2f} TB/s, {self.matmul_size}^3 bf16 matrix product {self.matmul:.3g} TFLOP/s"


def ceilings(device: torch.device, repeats: int = 20) -> Ceilings:
    """Measure copy and matrix product on random data, too large for the caches of a GPU (1 GiB, 8192^3)."""
    cuda = device.type == "cuda"
    size, elements = (8192, 2**29) if cuda else (256, 2**22)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def median_ms(call: Call) -> float:
        for _ in range(3):
            call()
        return Timing.of(sample(call, device).ms for _ in range(repeats)).median

    source = random(elements)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    a, b = random(size, size), random(size, size)
    product = torch.empty_like(a)
    matmul_ms = median_ms(lambda: torch.mm(a, b, out=product))
    return Ceilings(2 * source.nbytes / copy_ms / 1e9, 2 * size**3 / matmul_ms / 1e9, size)


def clocks(device: torch.device) -> str:
    """Clocks, power and temperature of the device as they are now; nothing is changed."""
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return "clocks unknown"
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [tool, f"--id={name}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        sm, memory, power, heat = (value.strip() for value in run.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return "clocks unknown"
    return f"SM {sm} MHz, memory {memory} MHz, {power} W, {heat} C"
