"""What GPU tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Each test compiles anew: torch gives up after so many shapes, those of other tests included."""
    yield
    torch.compiler.reset()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """What graphs were made of."""
    made: list[torch.nn.Module] = []
    record: Callable[..., object] = torch.cuda.make_graphed_callables

    def recorder(one: torch.nn.Module, *args: Any, **options: Any) -> object:
        made.append(one)
        return record(one, *args, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    return made
