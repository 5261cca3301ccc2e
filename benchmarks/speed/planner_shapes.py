"""Planners of random weights at the sizes that are timed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig

from bernini.planner.model import PlannerConfig, PlannerModel, build

# The tower never runs: what it would see is drawn at random.
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "fullatt_block_indexes": [0]}


@dataclass(frozen=True)
class Shape:
    """Shape of a planner.

    Attributes:
        text: Fields of transformers' ``Qwen2_5_VLTextConfig``.
        planner: The rest.
    """

    text: dict[str, Any]
    planner: PlannerConfig = field(default_factory=PlannerConfig)

    def cut(self, layers: int | None = None, flow_depth: int | None = None) -> "Shape":
        """The same with at most so many layers of the text model, or blocks of the flow head."""
        text = self.text | {"num_hidden_layers": min(layers or 10**9, self.text["num_hidden_layers"])}
        depth = min(flow_depth or 10**9, self.planner.flow_depth)
        return Shape(text, replace(self.planner, flow_depth=depth))

    def build(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PlannerModel:
        """A planner made on the device; nothing of it is zero, so that every part shows in its outputs."""
        torch.manual_seed(seed)
        vision = TOWER | {"out_hidden_size": self.text["hidden_size"]}
        with device, _default(dtype):
            model = build(self.planner, Qwen2_5_VLConfig(text_config=self.text, vision_config=vision))
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _text(width: int, layers: int, heads: int, kv_heads: int, ffn: int, words: int, rope: list[int]) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": words,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": rope},
        "rms_norm_eps": 1e-6,
        "initializer_range": width**-0.5,  # at any width, layers are as loud as what they add to
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


SHAPES = {
    "7b": Shape(_text(3584, 28, 28, 4, 18944, 152_064, [16, 24, 24])),
    "tiny": Shape(
        _text(32, 3, 4, 2, 48, 300, [2, 1, 1]),
        PlannerConfig(flow_width=24, flow_depth=2, batch_mul=4, gen_dim=20, mask_tokens=3),
    ),
}
"""``7b`` is Qwen2.5-VL-7B with the released flow head of 1.44 billion parameters."""
