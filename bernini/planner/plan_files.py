"""Plans in files, so that one plan serves many renderings."""

from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bernini.errors import DataError
from bernini.files import replacing
from bernini.planner.planning import Plan

TENSORS = tuple(field.name for field in fields(Plan) if field.name != "grid")


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write a plan as safetensors, its grid among the metadata; the file appears whole or not at all."""
    tensors = {name: getattr(plan, name).contiguous().cpu() for name in TENSORS}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "grid": ",".join(map(str, plan.grid or ()))})


def read_plan(path: str | Path) -> Plan:
    """Read what `write_plan` wrote.

    Raises:
        DataError: The file is missing, damaged, or no plan.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in TENSORS}
            t, h, w = (int(edge) for edge in (file.metadata() or {})["grid"].split(","))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            "the plan cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="give a file that `bernini generate --save-plan` wrote",
        ) from error
    return Plan(**tensors, grid=(t, h, w))


def move_plan(plan: Plan, device: torch.device) -> Plan:
    """A plan with its tensors on a device."""
    return Plan(**{name: getattr(plan, name).to(device) for name in TENSORS}, grid=plan.grid)


def check_grid(plan: Plan, grid: tuple[int, int, int] | None, where: str) -> None:
    """Compare a plan with the target that it is to be used for.

    Raises:
        DataError: They have different grids.
    """
    if plan.grid != grid:
        raise DataError(
            f"the plan is for another target: its grid is {_shown(plan.grid)}, here {_shown(grid)} is wanted",
            where=where,
            why="a plan says what is in each token of one size and length",
            fix="ask for the size, length and sources that it was made for, or plan anew",
        )


def _shown(grid: tuple[int, int, int] | None) -> str:
    return " x ".join(map(str, grid or ("unknown",)))
