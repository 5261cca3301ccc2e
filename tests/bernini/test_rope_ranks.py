"""The rotation under Ulysses: each rank norms and rotates its own slice of the tokens, before heads go for tokens."""

import multiprocessing
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from bernini.attention import Lengths, packed_attention
from bernini.rope.op import prepare_segments, sa3d_qk_norm_rope

RANKS, HEADS, HEAD_DIM = 2, 4, 16
# A clip with its source and an image: two samples, whose border is not that of the ranks.
TABLE = torch.tensor([(0, 2, 3, 4, 1.5), (24, 2, 2, 4, 0.0), (40, 1, 4, 7, 0.0)], dtype=torch.float64)
SAMPLES, TOKENS = (40, 28), 68


def inputs() -> tuple[list[Tensor], Tensor]:
    """q, k, v and the weights of the norms; and the gradient of what attention gives."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HEADS, HEAD_DIM)] * 3 + [(HEADS * HEAD_DIM,)] * 2 + [(TOKENS, HEADS, HEAD_DIM)]
    *leaves, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return leaves, grad


def exchange(x: Tensor, gather: int, split: int) -> Tensor:
    """Gather one dimension of ``[tokens, heads, head_dim]`` from all ranks, and keep a share of another."""
    parts = torch.stack(x.chunk(RANKS, split))
    return torch.cat(all_to_all_single(torch.empty_like(parts), parts).unbind(), gather)


def attend(rank: int, ranks: int) -> dict[str, Tensor]:
    """Output of a rank's tokens and all gradients of them."""
    leaves, grad = inputs()
    own = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    q, k, v, *weights = leaves = [x[own].requires_grad_() if x.ndim == 3 else x.requires_grad_() for x in leaves]
    segments = prepare_segments(TABLE, len(q), HEAD_DIM, offset=own.start)
    q, k = sa3d_qk_norm_rope(q, k, *weights, segments, 1e-6)
    if ranks > 1:
        q, k, v = (exchange(x, gather=0, split=1) for x in (q, k, v))
    out = packed_attention(q, k, v, Lengths.of([(n, n) for n in SAMPLES], "cpu"), "math")
    if ranks > 1:
        out = exchange(out, gather=1, split=0)
    names = ("dq", "dk", "dv", "dweight_q", "dweight_k")
    found = dict(zip(names, torch.autograd.grad(out, leaves, grad[own]), strict=True))
    return {"out": out.detach(), **found}


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    save_file({name: x.contiguous() for name, x in attend(rank, RANKS).items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_attend_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(RANKS)]
    for name, alone in attend(0, 1).items():
        own = [part[name] for part in parts]
        together = sum(own) if name.startswith("dweight") else torch.cat(own)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12, msg=name)
