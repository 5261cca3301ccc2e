"""The fused SA-3D RoPE op: accuracy against float64, and what may be asked of an op."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bernini.errors import DataError
from bernini.rope.op import Kernel, Segments, choose_kernel, prepare_segments, sa3d_qk_norm_rope
from bernini.rope.reference import rotate, sa3d_angles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EPS = 1e-6
# Far positions on every axis, fractional ids, single tokens.
ROWS = [(1, 1, 1023, 1.0), (1000, 1, 1, 2.5), (1, 1017, 1, 63.0), (3, 5, 7, 1 + 4 / 7), (1, 1, 1, 5.0), (4, 6, 9, 0.0)]


def table(rows: Sequence[tuple[int, int, int, float]]) -> Tensor:
    out, start = [], 0
    for t, h, w, source_id in rows:
        out.append((start, t, h, w, source_id))
        start += t * h * w
    return torch.tensor(out, dtype=torch.float32, device="cuda")


def tokens_of(rows: Sequence[tuple[int, int, int, float]]) -> int:
    return sum(math.prod(row[:3]) for row in rows)


def exact(x: Tensor, weight: Tensor | None, rows: Tensor, offset: int = 0) -> Tensor:
    """The op in float64."""
    angles = sa3d_angles(rows.double(), len(x), x.shape[2], offset)
    if weight is not None:
        flat = x.flatten(1)
        x = (flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS) * weight).view_as(x)
    return rotate(x, angles.cos(), angles.sin())


def run(
    kernel: Kernel | None, inputs: Sequence[Tensor], grads: Sequence[Tensor], rows: Tensor, save_outputs: bool = False
) -> list[Tensor]:
    """Outputs and gradients of q, k and their weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if kernel is None:
        out = [exact(leaves[0], leaves[2], rows), exact(leaves[1], leaves[3], rows)]
    else:
        segments = prepare_segments(rows, len(inputs[0]), inputs[0].shape[2], kernel=kernel, checked=True)
        out = list(sa3d_qk_norm_rope(*leaves, segments, EPS, save_outputs))
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, list(grads))]


def make(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, weights: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator("cuda").manual_seed(heads * head_dim + tokens)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(of)

    shape = (tokens, heads, head_dim)
    width = heads * head_dim
    gain = [(1 + 0.3 * draw(width, of=torch.float32)).to(weights) for _ in range(2)]
    return [3 * draw(*shape), draw(*shape), *gain], [draw(*shape), draw(*shape)]


@pytest.fixture(scope="module", autouse=True)
def fused() -> None:
    assert choose_kernel(torch.device("cuda", 0), 128) == "fused"  # and not something slower, quietly


@pytest.mark.parametrize("save_outputs", [False, True], ids=["saves inputs", "saves outputs"])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [(12, 128), (24, 128), (40, 128), (64, 128), (1, 128), (7, 64), (128, 64), (5, 32), (3, 16)]
)
def test_float32_is_right_to_a_millionth(heads, head_dim, save_outputs, relative_error):
    rows = table(ROWS)
    inputs, grads = make(tokens_of(ROWS), heads, head_dim, torch.float32, torch.float32)
    found = run("fused", inputs, grads, rows, save_outputs)
    truth = run(None, [x.double() for x in inputs], [x.double() for x in grads], rows)
    for name, mine, right in zip(("q", "k", "dq", "dk", "dwq", "dwk"), found, truth, strict=True):
        assert relative_error(mine.double(), right) < 1e-6, name


@pytest.mark.parametrize("save_outputs", [False, True], ids=["saves inputs", "saves outputs"])
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["fp32 weights", "half weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (40, 128), (9, 64)])
def test_half_precision_is_no_worse_than_the_reference(heads, head_dim, dtype, weights, save_outputs, relative_error):
    rows = table(ROWS)
    inputs, grads = make(tokens_of(ROWS), heads, head_dim, dtype, weights or dtype)
    truth = run(None, [x.double() for x in inputs], [x.double() for x in grads], rows)
    found, eager = (run(kernel, inputs, grads, rows, save_outputs) for kernel in ("fused", "reference"))
    for name, mine, theirs, right in zip(("q", "k", "dq", "dk", "dwq", "dwk"), found, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        # Inputs that are found again from rounded outputs are as far off as these.
        slack = 1.7 if save_outputs and name.startswith("d") else 1.02
        assert relative_error(mine.double(), right) <= slack * relative_error(theirs.double(), right), name


def test_views_of_one_projection_and_gradients_of_any_strides(relative_error):
    rows = table([(2, 5, 6, 1.0), (2, 5, 6, 0.0)])
    heads, head_dim, tokens = 4, 128, 120
    packed = torch.randn(tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    odd = torch.randn(tokens, 3 * heads * head_dim + 1, device="cuda", dtype=torch.bfloat16)[:, 1:]
    (_, _, *weights), _ = make(tokens, heads, head_dim, torch.bfloat16, torch.float32)
    segments = prepare_segments(rows, tokens, head_dim, kernel="fused")
    for q, k in (packed.unbind(1)[:2], odd.unflatten(1, (3, heads, head_dim)).unbind(1)[1:]):
        mine = sa3d_qk_norm_rope(q, k, *weights, segments, EPS)
        plain = sa3d_qk_norm_rope(q.contiguous(), k.contiguous(), *weights, segments, EPS)
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
    q = packed[:, 0].detach().requires_grad_()
    strided = torch.randn(heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    out = sa3d_qk_norm_rope(q, q, *weights, segments, EPS)
    one = torch.autograd.grad(out, q, [strided, strided], retain_graph=True)[0]
    other = torch.autograd.grad(out, q, [strided.contiguous(), strided.contiguous()])[0]
    assert torch.equal(one, other)


def test_rotation_alone_and_its_gradient(relative_error):
    rows = table(ROWS)
    inputs, grads = make(tokens_of(ROWS), 3, 128, torch.float32, torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    segments = prepare_segments(rows, len(leaves[0]), 128, kernel="fused")
    out = sa3d_qk_norm_rope(*leaves, None, None, segments, EPS)
    for x, made, grad, found in zip(leaves, out, grads, torch.autograd.grad(out, leaves, grads), strict=True):
        double = x.detach().double().requires_grad_()
        right = exact(double, None, rows)
        assert relative_error(made.double(), right) < 1e-6
        assert relative_error(found.double(), torch.autograd.grad(right, double, grad.double())[0]) < 1e-6


def test_slices_of_the_sequence_make_up_the_whole():
    rows = table(ROWS)
    (q, k, *weights), _ = make(tokens_of(ROWS), 4, 128, torch.bfloat16, torch.float32)
    whole = sa3d_qk_norm_rope(q, k, *weights, prepare_segments(rows, len(q), 128), EPS)
    for start, end in ((0, 1000), (1000, 1500), (1500, len(q))):
        segments = prepare_segments(rows, end - start, 128, offset=start)
        part = sa3d_qk_norm_rope(q[start:end], k[start:end], *weights, segments, EPS)
        assert all(torch.equal(a, b[start:end]) for a, b in zip(part, whole, strict=True))


def test_no_tokens_and_one_token():
    rows = table([(1, 1, 1, 3.0)])
    for tokens in (0, 1):
        inputs, grads = make(tokens, 2, 128, torch.bfloat16, torch.float32)
        found = run("fused", inputs, grads, rows)
        assert [x.shape for x in found] == [x.shape for x in (*inputs[:2], *inputs)]
        assert all(torch.isfinite(x).all() for x in found)
        assert tokens or not found[-1].any()


def _problem(tokens: tuple[int, int, int] = (2, 8, 8)) -> tuple[list[Tensor], list[Tensor], Segments]:
    rows = table([(*tokens, 1.0), (*tokens, 0.0)])
    inputs, grads = make(2 * math.prod(tokens), 12, 128, torch.bfloat16, torch.float32)
    return inputs, grads, prepare_segments(rows, len(inputs[0]), 128, kernel="fused")


def test_runs_repeat_to_the_bit():
    inputs, grads, segments = _problem((4, 30, 52))
    first, *others = (run("fused", inputs, grads, segments.table) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_torch_accepts_the_op():
    (q, k, *weights), _, segments = _problem()
    leaves = [x.requires_grad_() for x in (q, k, *weights)]
    for save_outputs in (False, True):
        args = (*leaves, segments.table, *segments.constants, EPS, 0, False, save_outputs)
        torch.library.opcheck(torch.ops.bernini.sa3d_qk_norm_rope.default, args, atol=1e-2, rtol=1e-2)


def test_it_compiles_without_a_break():
    inputs, grads, segments = _problem()
    leaves = [x.requires_grad_() for x in inputs]

    def block(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = sa3d_qk_norm_rope(q * 2, k + 1, weight_q, weight_k, segments, EPS)
        return q * 3, k - 1

    plain = block(*leaves)
    compiled = torch.compile(block, fullgraph=True)(*leaves)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(plain, leaves, grads), torch.autograd.grad(compiled, leaves, grads), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_it_is_recorded_in_cuda_graphs():
    inputs, grads, segments = _problem()
    plain = run("fused", inputs, grads, segments.table)
    leaves = [x.detach().requires_grad_() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(sa3d_qk_norm_rope(*leaves, segments, EPS), leaves, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa3d_qk_norm_rope(*leaves, segments, EPS)
        found = [*out, *torch.autograd.grad(out, leaves, grads)]
    for x in found:
        x.detach().zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_it_never_waits_for_the_device():
    inputs, grads, segments = _problem()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("fused", inputs, grads, segments.table)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_would_read_beyond_is_refused_before_a_launch():
    (q, k, *weights), _, segments = _problem()
    with pytest.raises(DataError, match="do not cover the tokens"):
        prepare_segments(segments.table[:1], len(q), 128)
    with pytest.raises(DataError, match="below 0"):
        prepare_segments(segments.table * torch.tensor([1, 1, 1, 1, -1], device="cuda"), len(q), 128)
    with pytest.raises(DataError, match="on cpu do not fit"):
        sa3d_qk_norm_rope(q.cpu(), k.cpu(), *weights, segments, EPS)
    with pytest.raises(DataError, match="do not fit"):
        sa3d_qk_norm_rope(torch.cat([q, q]), torch.cat([k, k]), *weights, segments, EPS)
    torch.cuda.synchronize()  # the device is well


def test_backward_keeps_eight_bytes_a_token_beside_the_outputs():
    (q, k, *weights), _, segments = _problem((8, 16, 32))  # outputs of 24 MiB: the allocator rounds up to 2
    for x in (q, k, *weights):
        x.requires_grad_()
    before = torch.cuda.memory_allocated()
    out = sa3d_qk_norm_rope(2 * q, 2 * k, *weights, segments, EPS, save_outputs=True)
    kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in out)
    assert kept <= 8 * len(q) + 4096
