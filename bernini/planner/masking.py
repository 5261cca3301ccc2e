"""Who sees whom inside the multimodal LLM, and which target tokens training hides.

Text and sources see what precedes them and never the target; target tokens see the text and sources before them and
each other. The hidden states of text and sources thus do not depend on the plan, which `bernini.planner.planning` uses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from bernini.errors import ConfigError

TEXT, SOURCE, TARGET = 0, 2, 3
"""Token types, numbered as released; the released template never uses its type 1."""

BLOCK = 128  # tokens of a block of FlexAttention, queries and keys
ROWS = 8 * BLOCK  # queries whose table is made at once

SourceAttention = Literal["causal", "bidirectional"]
MaskRule = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]


def mask_rule(
    token_type: Tensor, segment_id: Tensor, sample: Tensor | None = None, sources: SourceAttention = "causal"
) -> MaskRule:
    """The mask as a function of batch, head, query and key index, in the form that FlexAttention takes.

    Args:
        token_type: ``[n]`` text, source or target.
        segment_id: ``[n]``; tokens of one visual share it.
        sample: ``[n]`` which packed sample a token belongs to; one sample if left out. Padding is a sample of its own,
            so that it sees at least itself.
        sources: ``causal`` is what the released model computes. ``bidirectional`` lets tokens of one source see each
            other as well, as figure 3 of the paper draws it.

    Raises:
        ConfigError: There is no such kind of source attention.
    """
    if sources not in ("causal", "bidirectional"):
        raise ConfigError(f"unknown attention among source tokens {sources!r}", fix="causal (released), bidirectional")
    whole = (TARGET,) if sources == "causal" else (TARGET, SOURCE)

    def rule(batch: Tensor | None, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        alike = (token_type[query] == token_type[key]) & (segment_id[query] == segment_id[key])
        seen = (key <= query) & (token_type[key] != TARGET)
        for kind in whole:
            seen = seen | (alike & (token_type[key] == kind))
        return seen if sample is None else seen & (sample[query] == sample[key])

    return rule


def visible(
    token_type: Tensor, segment_id: Tensor, sample: Tensor | None = None, sources: SourceAttention = "causal"
) -> Tensor:
    """The mask as a table: bool ``[n, n]``, true where a query (row) sees a key (column). See `mask_rule`."""
    index = torch.arange(len(token_type), device=token_type.device)
    return mask_rule(token_type, segment_id, sample, sources)(None, None, index[:, None], index[None])


def block_mask(
    token_type: Tensor, segment_id: Tensor, sample: Tensor | None = None, sources: SourceAttention = "causal"
) -> BlockMask:
    """The mask for FlexAttention, which skips blocks that nobody sees. See `mask_rule`."""
    rule, n = mask_rule(token_type, segment_id, sample, sources), len(token_type)
    index = torch.arange(n, device=token_type.device)
    some, every = [], []
    # One row of blocks after the other: the whole table is gigabytes for long packs. torch's own way around it is to
    # compile the rule, which takes minutes for this one.
    for queries in index.split(ROWS):
        table = pad(rule(None, None, queries[:, None], index[None]), (0, -n % BLOCK, 0, -len(queries) % BLOCK))
        blocks = table.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        some.append(blocks.any(3).any(1))
        every.append(blocks.all(3).all(1))
    seen, whole = torch.cat(some), torch.cat(every)
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(n, n)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers in front of all others'."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


@dataclass(frozen=True)
class MaskRatio:
    """Beta distribution of the share of target tokens that a training sample hides.

    Attributes:
        alpha: First parameter, positive.
        beta: Second parameter, positive.
    """

    alpha: float
    beta: float

    @property
    def mean(self) -> float:
        """Expected share."""
        return self.alpha / (self.alpha + self.beta)


UNIFORM = MaskRatio(1.0, 1.0)
"""Every share alike, whatever the task."""

_T2I, _T2V, _I2I = MaskRatio(5.0, 1.1), MaskRatio(8.0, 1.05), MaskRatio(8.0, 1.05)
_I2V, _V2V, _IV2V = MaskRatio(10.0, 1.0), MaskRatio(12.0, 0.9), MaskRatio(12.0, 0.9)

MASK_RATIOS: dict[str, MaskRatio] = {
    "t2i": _T2I,
    "t2v": _T2V,
    "i2i": _I2I,
    "i2v": _I2V,
    "v2v": _V2V,
    "r2i": _I2I,
    "r2v": _I2V,
    "rv2v": _IV2V,
    "vi2v": _IV2V,
    "ads2v": _V2V,
    "mv2v": _V2V,
    "vrc2v": _V2V,
}
"""Mask ratio of each task (paper, table 3). The table has T2I, T2V, I2I, I2V, V2V and IV2V; a task that it lacks takes
the row with the same kinds of source and target: r2i I2I, r2v I2V, rv2v and vi2v IV2V, other edits of clips V2V."""


def draw_shares(count: int, ratio: MaskRatio, generator: torch.Generator) -> Tensor:
    """Draw ``[count]`` shares r in fp64, on the CPU."""
    parameters = torch.tensor([ratio.alpha, ratio.beta], dtype=torch.float64)
    # torch.distributions.Beta takes no generator; this is the sampler beneath it.
    return torch._sample_dirichlet(parameters.expand(count, 2), generator)[:, 0]


def draw_masked(count: int, ratio: MaskRatio, generator: torch.Generator) -> Tensor:
    """Draw which target tokens to hide: ``ceil(count r)`` of them, r from ``ratio``, anywhere.

    Args:
        count: Target tokens.
        ratio: Distribution of r.
        generator: On the CPU; it is drawn from twice, whatever comes out.

    Returns:
        Bool ``[count]`` on the CPU, true where hidden. At least one is.
    """
    hidden = max(1, math.ceil(count * draw_shares(1, ratio, generator).item()))
    return torch.randperm(count, generator=generator) < hidden
