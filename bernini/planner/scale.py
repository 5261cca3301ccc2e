"""Embeddings of another scale, with a language model that reads them as before."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bernini.planner.model import PlannerModel


@torch.no_grad()
def scale_embeddings(model: PlannerModel, factor: float) -> None:
    """Multiply all embeddings, those of the vision tower included, and so every hidden state, by a factor.

    What is multiplied are the last weights in front of the hidden states. Whatever reads these does so through an
    RMSNorm or, in the connector, through a linear layer that is divided: outputs stay what they are, as far as the
    norms' epsilon allows. Only the flow head has to learn its targets anew.

    Args:
        model: A planner whose word embeddings are not those of ``lm_head``.
        factor: Above 0.
    """
    for tensor in _written(model):
        tensor.mul_(factor)
    reader: Any
    for reader in (model.connector.proj_gen, model.connector.pred_vit):
        reader[0].weight.div_(factor)


def _written(model: PlannerModel) -> Iterator[Tensor]:
    """Weights to which hidden states are in proportion."""
    yield model.embedding.weight
    yield model.mask_tokens
    merger: Any = model.tower.merger
    yield from merger.mlp[-1].parameters()
    layer: Any
    for layer in model.text.layers:
        yield layer.self_attn.o_proj.weight
        yield layer.mlp.down_proj.weight
