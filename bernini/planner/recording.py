"""CUDA graphs of functions: their kernels are launched together, where one by one takes longer than they run."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


class Recorded:
    """A function whose first call runs it, whose second records it, and whose later ones replay what was recorded.

    The first call sets up what cannot be set up while recording. Tensors of later calls have the shapes of the second
    one's. What a call returns is overwritten by the next, and what the function reads besides its arguments has to stay
    where it is in memory.

    Args:
        call: A function of CUDA tensors that never waits for the device.
    """

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ready = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run, record or replay."""
        if not self._ready:
            self._ready = True
            return self._call(*inputs)
        if self._graph is None:
            self._record(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.clone() for x in inputs]
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(inputs[0].device)
        enabled, precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with (
            torch.autocast("cuda", precision, enabled=enabled, cache_enabled=False),  # cast weights would not last
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),  # loaders may use the device
        ):
            self._output = self._call(*self._inputs)
        self._graph = graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it meets."""
    return torch.cuda.Stream(device)
