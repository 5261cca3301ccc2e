"""What the rotation's backward pass keeps: from the configuration down to the op, which runs without values here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import make_cotraining, make_planner_folder
from factories import build, make_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.transformer import Kept
from bernini.rope.op import Segments


class Ops(TorchDispatchMode):
    """The last argument of every call of the fused op and of its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bernini":
            self.outputs.append((func.name().removeprefix("bernini::sa3d_qk_norm_rope"), args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def packed(randn):
    draw = randn(0)
    sample = PackedSample([Segment(draw(4, 2, 4, 8), 1), Segment(draw(4, 2, 4, 8), 0)], draw(3, 12), 500.0)
    return pack([sample], (1, 2, 2))


def test_the_option_reaches_the_transformers(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path, expert="both", rope_saves="outputs")
    alone = build(config, tmp_path)
    together = make_cotraining(wan, make_planner_folder(tmp_path / "planner"), ["renderer"], rope_saves="outputs")
    for module in (alone, together):
        assert [model.rope_saves for model in module.renderer.models.values()] == ["outputs", "outputs"]


@pytest.mark.parametrize("saves", ["inputs", "outputs"])
def test_the_fused_op_keeps_what_the_transformer_says(tiny_model, packed, saves: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Ops() as ops:
        model = tiny_model()
        model.rope_saves = saves
        segments = Segments(packed.segments, packed.tokens, 0, "fused", (torch.empty(8, 4),))
        kept = Kept(segments, model.keys_values(packed.context), None)
        model(packed, kept).sum().backward()
    outputs = saves == "outputs"
    assert ops.outputs == [("", outputs)] * 2 + [("_backward", outputs)] * 2


def test_gradients_do_not_depend_on_what_is_kept(tiny_model, packed) -> None:
    gradients = []
    for saves in ("inputs", "outputs"):
        model = tiny_model()
        model.rope_saves = saves
        model(packed).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
