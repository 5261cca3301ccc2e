"""How near plans come to the true ViT embeddings of their targets, told without a renderer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bernini.errors import DataError
from bernini.planner.vision import Grid
from bernini.stacking import group


def check_pair(planned: Tensor, true: Tensor) -> None:
    """Raise a `DataError` unless plans and true embeddings are of one shape."""
    if planned.shape != true.shape:
        raise DataError(
            f"plans of shape {tuple(planned.shape)} cannot be compared with true embeddings {tuple(true.shape)}",
            fix="give both for the same tokens, from the same vision tower",
        )


def cosines(planned: Tensor, true: Tensor) -> Tensor:
    """Cosines ``[n]`` fp32 of planned and true embeddings ``[n, D]``: ``<p_i, x_i> / (|p_i| |x_i|)``.

    Raises:
        DataError: The shapes differ.
    """
    check_pair(planned, true)
    return cosine_similarity(planned.float(), true.float(), dim=1)


class PlanCosine(Metric):
    """Mean cosine of a planned and a true embedding, over all tokens; see `cosines`."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        # By name, since Lightning's true-bfloat16 precision makes bfloat16 the default.
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, planned: Tensor, true: Tensor) -> None:
        """Add tokens.

        Args:
            planned: ``[n, D]`` planned embeddings, of any number of plans.
            true: ``[n, D]`` embeddings of the same tokens.

        Raises:
            DataError: The shapes differ.
        """
        self.total += cosines(planned, true).sum()
        self.tokens += len(planned)

    def compute(self) -> Tensor:
        """The mean, in [-1, 1]; NaN without tokens."""
        return self.total / self.tokens


class PlanExplainedVariance(Metric):
    """Share of the true embeddings' variance that plans explain: ``1 - sum_i |p_i - x_i|^2 / sum_i |x_i - m|^2``.

    ``m`` is the mean of all n true tokens. 1 is a perfect plan, 0 as good as planning m everywhere. It is torchmetrics'
    variance-weighted R2 score, but a rank may be without tokens, and float32 is enough: batches and ranks are merged by
    their means and the squares around them (Chan, Golub and LeVeque 1979), not by sums of squares, which cancel.

    Args:
        dim: Width D of the embeddings.
    """

    higher_is_better = True
    full_state_update = True  # the states of two updates cannot be added
    tokens: Tensor
    mean: Tensor
    spread: Tensor
    error: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        for name, size in (("tokens", 1), ("mean", dim), ("spread", 1), ("error", 1)):
            self.add_state(name, torch.zeros(1, size, dtype=torch.float32), dist_reduce_fx=None)

    def update(self, planned: Tensor, true: Tensor) -> None:
        """Add tokens.

        Args:
            planned: ``[n, D]`` planned embeddings, of any number of plans.
            true: ``[n, D]`` embeddings of the same tokens.

        Raises:
            DataError: The shapes differ, or are of another width.
        """
        check_pair(planned, true)
        if true.shape[1:] != (self.dim,):
            raise DataError(f"embeddings of shape {tuple(true.shape)} where [n, {self.dim}] is expected")
        if not len(true):
            return
        planned, true = planned.float(), true.float()
        mean = true.mean(0, keepdim=True)
        batch = (self.tokens.new_full((1, 1), len(true)), mean, (true - mean).square().sum().view(1, 1))
        states = (self.tokens, self.mean, self.spread)
        self.tokens, self.mean, self.spread = _merge(*map(torch.cat, zip(states, batch, strict=True)))
        self.error = self.error + (planned - true).square().sum()

    def compute(self) -> Tensor:
        """The share, at most 1; NaN without tokens or if all true ones are equal."""
        # After a gathering the states of all ranks are stacked.
        states = (self.tokens, self.mean, self.spread)
        spread = _merge(*(state.view(-1, state.shape[-1]) for state in states))[2].squeeze()
        return (1 - self.error.sum() / spread).where(spread > 0, torch.nan)


def _merge(tokens: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ``[k, 1]``, means ``[k, D]`` and squares around them ``[k, 1]`` of k sets, as those of their union."""
    share = tokens / tokens.sum().clamp(min=1)
    middle = (share * mean).sum(0, keepdim=True)
    between = tokens * (mean - middle).square().sum(1, keepdim=True)
    return tokens.sum(0, keepdim=True), middle, (spread + between).sum(0, keepdim=True)


class PlanRetrieval(Metric):
    """How often a plan is nearer to its true target than to the other true targets of a gallery.

    The score of plan p for target x is the cosine of p - m and x - m, where p and x are embeddings of all their tokens
    end to end (the mean of the tokens would forget where things are, and how they move) and m is the mean of the true
    targets. Only targets of the plan's grid are compared with it. With r of the M - 1 other targets scoring as well as
    the true one or better, the true one is among the first k of a random gallery of G with probability ::

        sum_{j < k} C(r, j) C(M - 1 - r, G - 1 - j) / C(M - 1, G - 1)

    whose mean over all plans is the result: the expectation over galleries, whatever the order of the samples. Chance
    is k / G. With M < G the gallery is all M targets. Equal targets cannot be told apart, and all of them are missed.

    All plans and targets are kept in float32, and in the end on every rank: 256 of 300 tokens with 3584 values take
    2.2 GB.

    Args:
        gallery: Size G of a gallery, the true target included.
        ranks: Values of k.
    """

    higher_is_better = True
    full_state_update = False
    planned: list[Tensor]
    true: list[Tensor]
    grids: list[Tensor]

    def __init__(self, gallery: int = 256, ranks: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.gallery, self.ranks = gallery, tuple(ranks)
        # A rank without samples gathers an empty vector of the metric's type: every state is one-dimensional float32.
        self.set_dtype(torch.float32)
        for name in ("planned", "true", "grids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, planned: Tensor, true: Tensor, grids: Sequence[Grid]) -> None:
        """Add plans.

        Args:
            planned: ``[n, D]`` planned embeddings, plan after plan.
            true: ``[n, D]`` embeddings of the same tokens.
            grids: ``(t, h, w)`` of every plan, in tokens.

        Raises:
            DataError: The shapes differ, or the grids do not add up to n tokens.
        """
        check_pair(planned, true)
        if (expected := sum(map(math.prod, grids))) != len(true):
            raise DataError(f"{len(true)} tokens for grids of {expected} in all", where=str(list(grids)))
        self.planned.append(planned.float().flatten())
        self.true.append(true.float().flatten())
        self.grids.append(torch.tensor(grids, dtype=torch.float32, device=true.device).flatten())

    def compute(self) -> dict[str, Tensor]:
        """``retrieval@k`` in [0, 1] for every k, and ``gallery``: the mean size of the galleries; NaN without plans."""
        rows = [retrieved(*pair, self.gallery, self.ranks) for pair in self._by_grid()]
        means = torch.cat(rows, 1).mean(1) if rows else torch.full((len(self.ranks) + 1,), torch.nan)
        return dict(zip([*(f"retrieval@{k}" for k in self.ranks), "gallery"], means.to(self.device), strict=True))

    def _by_grid(self) -> list[tuple[Tensor, Tensor]]:
        """Plans and true targets ``[M, N * D]`` of each grid."""
        if not len(self.grids):
            return []
        grids = dim_zero_cat(self.grids).view(-1, 3).tolist()
        planned, true = dim_zero_cat(self.planned), dim_zero_cat(self.true)
        tokens = [int(math.prod(grid)) for grid in grids]
        values = [len(true) // max(sum(tokens), 1) * count for count in tokens]
        both = list(zip(planned.split(values), true.split(values), strict=True))
        alike = group(map(tuple, grids))
        return [(torch.stack([both[i][0] for i in rows]), torch.stack([both[i][1] for i in rows])) for rows in alike]


def retrieved(planned: Tensor, true: Tensor, gallery: int, ranks: Sequence[int]) -> Tensor:
    """Chance of every plan to find its target; see `PlanRetrieval`, which takes their means.

    Args:
        planned: ``[M, C]`` fp32 plans of one grid, the embeddings of all tokens end to end.
        true: ``[M, C]`` fp32 true targets.
        gallery: Size of a gallery.
        ranks: Values of k.

    Returns:
        ``[k + 1, M]`` fp32: for each value of k the chance to be among the first, and the size of the gallery.
    """
    return _recall(_ahead(planned, true), gallery, ranks)


def _ahead(planned: Tensor, true: Tensor) -> Tensor:
    """For each plan ``[M, C]`` the number of other targets ``[M, C]`` that score as well as its own or better."""
    middle = true.mean(0)
    with torch.autocast(true.device.type, enabled=False):
        scores = normalize(planned - middle, dim=1) @ normalize(true - middle, dim=1).T
    behind = scores < scores.diagonal()[:, None]  # never true of a plan that is not finite
    return len(true) - 1 - behind.sum(1)


def _recall(ahead: Tensor, gallery: int, ranks: Sequence[int]) -> Tensor:
    """Chances ``[k, M]`` of being among the first, see `PlanRetrieval`, and the size of the gallery in a last row."""
    ahead = ahead.cpu().double()  # Metal has no float64
    others = torch.tensor(len(ahead) - 1.0, dtype=torch.float64)
    drawn = others.clamp(max=gallery - 1)
    j = torch.arange(max(ranks), dtype=torch.float64)[:, None]
    chance = _log_comb(ahead, j) + _log_comb(others - ahead, drawn - j) - _log_comb(others, drawn)
    upto = chance.exp().cumsum(0)[[k - 1 for k in ranks]]
    return torch.cat([upto, (drawn + 1).expand(1, len(ahead))]).float()


def _log_comb(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of n over k, float64; of 0 for k outside 0..n, where lgamma is infinite."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
