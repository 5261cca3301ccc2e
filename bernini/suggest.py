"""Did you mean: the nearest name to one that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, or nothing if none is near."""
    near = get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else ""
