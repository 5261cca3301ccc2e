"""Attention over packed samples, through one function with a choice of backend."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bernini.errors import ConfigError
from bernini.grouped import attend

AttentionBackend = Literal["auto", "cudnn", "flash", "varlen", "efficient", "math"]

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_WITHOUT_MASK = ("cudnn", "flash", "varlen")


@dataclass
class Lengths:
    """Lengths of several samples: an object, since compilers look into a tuple and compile anew for each of its sizes.

    Attributes:
        pairs: Query and key length of each sample.
        q_starts: ``[samples + 1]`` int32, where the queries of each sample start, and the end; on the queries' device.
        k_starts: The same of the keys.
        seen: Bool ``[k_tokens]``, keys that are attended, at least one of each sample; all if null.
        host: The pairs as ``[samples, 2]`` int64 on the CPU, which compilers do not look into either.
    """

    pairs: tuple[tuple[int, int], ...]
    q_starts: Tensor
    k_starts: Tensor
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        self.host = torch.tensor(self.pairs, dtype=torch.int64, device="cpu")

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that is not told by shapes."""
        return self.host, self.q_starts, self.k_starts, self.seen

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], device: torch.device | str) -> "Lengths":
        """Lengths from their pairs alone."""
        starts = (
            torch.tensor([0, *accumulate(own)], dtype=torch.int32, device=device) for own in zip(*pairs, strict=True)
        )
        return cls(tuple(pairs), *starts)


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one call can attend within samples of any lengths."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and head_dim <= 256 and head_dim % 8 == 0


def resolve_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Turn ``auto`` into the fastest backend for these tensors.

    On CUDA in half precision that is cuDNN (1.4 times as fast as FlashAttention-2, torch's own default, on an H100),
    else flash, else math; on other devices torch's only fused path, which it picks itself. ``varlen`` is
    FlashAttention-2 with one call for samples of any lengths, for packs of many short ones.

    Raises:
        ConfigError: The name is unknown, or the backend cannot run here.
    """
    if backend not in get_args(AttentionBackend):
        raise ConfigError(
            f"unknown attention backend {backend!r}", fix=f"one of {', '.join(get_args(AttentionBackend))}"
        )
    half = dtype in (torch.float16, torch.bfloat16)
    cuda = device.type == "cuda"
    cudnn = (
        cuda
        and half
        and head_dim <= 128
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
    )
    if backend != "auto":
        if backend == "cudnn" and not cudnn:
            raise ConfigError("cuDNN attention needs CUDA, half precision and head_dim <= 128", fix="attention: auto")
        if backend == "varlen" and not has_varlen(device, dtype, head_dim):
            raise ConfigError(
                "varlen attention needs CUDA, half precision and a head_dim of 8 to 256, by eights",
                fix="attention: auto",
            )
        return backend
    if not cuda:
        return "native"
    if cudnn:
        return "cudnn"
    return "flash" if half and head_dim <= 256 else "math"


def _kernel(backend: str) -> AbstractContextManager:
    return nullcontext() if backend == "native" else sdpa_kernel(_BACKENDS[backend])


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention of a single sample."""
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    with _kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, backend: str) -> Tensor:
    """Full attention within each sample, none across samples.

    Args:
        q: ``[q_tokens, heads, head_dim]``, samples one after another.
        k: ``[k_tokens, heads, head_dim]``.
        v: As ``k``.
        lengths: Query and key length of each sample, or ``None`` for a single sample.
        backend: A resolved backend name; where keys are left out, ``efficient`` stands in for those that take no mask.

    Returns:
        ``[q_tokens, heads, head_dim]``.
    """
    if lengths is None:
        return _dense(q, k, v, "flash" if backend == "varlen" else backend)
    if lengths.seen is not None and backend in _WITHOUT_MASK:
        backend = "efficient"
    q, k = q.to(v.dtype), k.to(v.dtype)  # values come as autocast has them
    return attend(q, k, v, *lengths.tensors, backend)[0]
