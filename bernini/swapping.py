"""Frozen weights that wait in host memory and come to the device just before they are used."""

import mmap
import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from bernini.errors import ConfigError

ALIGNMENT = 256  # bytes; kernels read fastest from where a tensor of its own would begin


def _pages(size: int) -> Tensor:
    """Bytes of host memory, at least ``size``, that share no page with others: pages are locked once, and whole."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


class HostWeights:
    """A module's frozen weights, in a buffer of the host and, while they are needed, in one of the device.

    Its tensors lie in one or the other. ``module.to`` leaves them in the host; trained weights go along.

    Args:
        module: The module; its frozen weights must be on the host or a device, and stay the same from now on.

    Attributes:
        loaded: Whether the weights are on the device, or on their way.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors: list[Tensor] = [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in self._tensors]
        self._starts = list(accumulate(sizes, initial=0))
        self._host = _pages(self._starts[-1])
        self._places = self._lay_out(self._host)
        for tensor, place in zip(self._tensors, self._places, strict=True):
            place.copy_(tensor)
            tensor.data = place
        self.loaded = self._locked = False
        self._copied: torch.cuda.Event | None = None
        self._keep_from_moving(module)

    def _lay_out(self, buffer: Tensor) -> list[Tensor]:
        starts = zip(self._tensors, self._starts, strict=False)
        return [buffer[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in starts]

    def _keep_from_moving(self, module: nn.Module) -> None:
        own, move = {id(t) for t in self._tensors}, module._apply

        def others(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            self.drop()
            return move(lambda t: t if id(t) in own else fn(t), recurse)

        module._apply = others  # type: ignore[method-assign]

    @torch.inference_mode(False)  # a validation's weights may still be there when training goes on
    def load(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring the weights to the device, unless they are there.

        Memory comes from the current stream's pool. The copy waits for what is in that stream now, and `wait` makes it
        wait for the copy, so that memory which goes back to the pool is never in use elsewhere.

        Args:
            device: Where to.
            stream: Stream of the copy; the current one if not given.
        """
        if self.loaded:
            return
        there = torch.empty_like(self._host, device=device)
        if device.type == "cuda":
            self._lock()
            stream = stream or torch.cuda.current_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                there.copy_(self._host, non_blocking=True)
                self._copied = stream.record_event()
        else:
            there.copy_(self._host)
        for tensor, place in zip(self._tensors, self._lay_out(there), strict=True):
            tensor.data = place
        self.loaded = True

    def wait(self) -> None:
        """Have the current stream wait until the weights are there."""
        if self._copied is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_event(self._copied)
            self._copied = None

    @torch.inference_mode(False)
    def drop(self) -> None:
        """Free the device's copy; what was launched with it so far may still run."""
        if self.loaded:
            self.wait()
            for tensor, place in zip(self._tensors, self._places, strict=True):
                tensor.data = place
            self.loaded = False

    def _lock(self) -> None:
        """Lock the buffer's pages, without which copies would hold up the host; torch's own would round up its size."""
        if not self._locked and self._host.nbytes:
            cuda, address = torch.cuda.cudart(), self._host.data_ptr()
            torch.cuda.check_error(cuda.cudaHostRegister(address, self._host.nbytes, 0))
            weakref.finalize(self._host, cuda.cudaHostUnregister, address)
            self._locked = True


class BlockSwapping:
    """Keeps the frozen weights of some of a model's blocks on the host; two blocks' at a time are on the device.

    When a block begins, the next one's weights are on their way, in forward and in backward, where it begins anew if it
    is recomputed. Activations that are kept hold on to weights: memory is saved only where blocks are recomputed.

    Args:
        model: A model that calls its ``blocks`` one after another, and outside of that their ``keys_values``.
        count: How many blocks; they are spread evenly, so that there is most to compute while one is copied.

    Raises:
        ConfigError: The model has not so many blocks.
    """

    def __init__(self, model: Any, count: int) -> None:
        blocks = list(model.blocks)
        if not 1 <= count <= len(blocks):
            raise ConfigError(
                f"swap_blocks is {count}", where="model.init_args", why=f"the transformer has {len(blocks)} blocks"
            )
        chosen: list[Any] = [blocks[n * len(blocks) // count] for n in range(count)]
        self._weights = [HostWeights(block) for block in chosen]
        self._stream: torch.cuda.Stream | None = None
        self._step = 1
        model.register_forward_pre_hook(self._begin)
        for place, block in enumerate(chosen):
            block.register_forward_pre_hook(partial(_before, self, place))
            block.register_forward_hook(partial(_after, self, place))
            block.keys_values = self._ahead(place, block.keys_values)

    @property
    def loaded(self) -> list[int]:
        """Places, among the swapped blocks, of those whose weights are on the device."""
        return [place for place, weights in enumerate(self._weights) if weights.loaded]

    def _begin(self, *_: Any) -> None:
        self._step = 1

    def use(self, place: int, device: torch.device, backward: bool = False) -> None:
        """Have a block's weights on the device, and those of the next one on their way.

        Args:
            place: Place of the block among the swapped ones.
            device: Where it computes.
            backward: Whether it begins its backward pass; the next one is then the one before it.
        """
        if backward:
            self._step = -1
        following = min(max(place + self._step, 0), len(self._weights) - 1)
        for other in {*self.loaded} - {place, following}:
            self._weights[other].drop()
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._weights[place].load(device, self._stream)
        self._weights[place].wait()
        self._weights[following].load(device, self._stream)

    def _ahead(self, place: int, keys_values: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def loaded(context: Tensor) -> Any:
            self._begin()
            self.use(place, context.device)
            return keys_values(context)

        return loaded


def saved(model: Any, count: int) -> int:
    """Bytes of a device that a model's weights do not take while so many of its blocks are swapped."""
    frozen = sum(p.nbytes for p in model.blocks[0].parameters() if not p.requires_grad)
    return max(count - 2, 0) * frozen


@torch.compiler.disable  # the compiler takes the block as it is between the hooks
def _before(swapping: BlockSwapping, place: int, block: nn.Module, args: tuple[Any, ...]) -> None:
    swapping.use(place, args[0].device)


@torch.compiler.disable
def _after(swapping: BlockSwapping, place: int, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: swapping.use(place, gradient.device, backward=True))


def bring_for_calls(module: Any, methods: Sequence[str], device: Callable[[], torch.device]) -> HostWeights:
    """Keep a module's frozen weights on the host but for the length of calls of some of its methods.

    Args:
        module: The module.
        methods: Names of all its methods that use weights; none calls another one.
        device: Tells where they compute.
    """
    weights = HostWeights(module)

    def brought(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            weights.load(device())
            weights.wait()
            try:
                return method(*args, **kwargs)
            finally:
                weights.drop()

        return call

    for name in methods:
        setattr(module, name, brought(getattr(module, name)))
    return weights
