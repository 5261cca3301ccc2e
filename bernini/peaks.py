"""Peak speed of GPUs in bfloat16, the denominator of model FLOPs utilisation (MFU).

Lightning has such a table too (`lightning.fabric.utilities.throughput.get_available_flops`). It is not used: it counts
zeros that sparsity skips (H100 NVL, H200), has the speed of vector units for tensor cores (RTX 4090, A40), takes an
L40S for an L4, and lacks others, such as those that torch calls ``NVIDIA H200`` and ``NVIDIA B200``.
"""

PEAKS = {
    # Dense bf16 with fp32 accumulation, TFLOP/s: NVIDIA's and AMD's data sheets, half of what they give with sparsity.
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H800 PCIe": 756.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.2,
    "MI300X": 1307.4,
}


def peak_tflops(name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of a whole GPU, or null where it is not known.

    Args:
        name: As ``torch.cuda.get_device_name`` gives it, e.g. ``NVIDIA H100 80GB HBM3``. A slice of a GPU (MIG) has no
            known peak.
    """
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    return next((peak for known, peak in PEAKS.items() if _holds(words, known.split())), None)


def _holds(words: list[str], wanted: list[str]) -> bool:
    """Whether some words stand in a row in others: an ``L40S`` is no ``L40``."""
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))
