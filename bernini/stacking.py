"""Work on many tensors of few shapes at once."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor


def by_shape(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Positions of tensors of equal shapes, shapes in order of appearance."""
    return group(tuple(tensor.shape) for tensor in tensors)


def group(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, keys in order of appearance."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        groups[key].append(position)
    return list(groups.values())


def cut(sizes: Sequence[int], most: int, count: int | None = None) -> list[list[int]]:
    """Positions in their order, cut into parts.

    Args:
        sizes: Of what is at each position.
        most: Largest sum of sizes in a part; a larger one goes alone.
        count: Most positions in a part.
    """
    parts: list[list[int]] = []
    held = 0
    for position, size in enumerate(sizes):
        if not parts or held + size > most or len(parts[-1]) == count:
            parts.append([])
            held = 0
        parts[-1].append(position)
        held += size
    return parts


def map_stacked(
    function: Callable[..., Tensor], *columns: Sequence[Tensor], at_once: int | None = None
) -> list[Tensor]:
    """``[function(*row) for row in zip(*columns)]`` with one call for all rows of a shape.

    Args:
        function: Takes and gives tensors with a leading batch dimension, whose items it treats alike.
        columns: Tensors; those of the first column decide which rows share a call.
        at_once: Most values of the first column in a call, so that large rows, which gain nothing from company, do not
            take memory together; a row that is larger goes alone.
    """
    found: dict[int, Tensor] = {}
    for rows in by_shape(columns[0]):
        most = max(1, at_once // max(1, columns[0][rows[0]].numel())) if at_once else len(rows)
        for part in (rows[start : start + most] for start in range(0, len(rows), most)):
            stacked = (torch.stack([column[row] for row in part]) for column in columns)
            found.update(zip(part, function(*stacked).unbind(), strict=True))
    return [found[row] for row in range(len(columns[0]))]
