"""FSDP2 of the renderer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bernini.renderer.experts import Experts


def shard(experts: Experts, mesh: DeviceMesh) -> None:
    """Shard every block, then the rest, over the data axis; fp32 shards, bf16 compute on CUDA.

    Args:
        experts: The transformers, with their weights.
        mesh: Lightning's mesh of ``data_parallel`` and ``tensor_parallel``.
    """
    data = mesh["data_parallel"]
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if data.device_type == "cuda" else None, reduce_dtype=torch.float32
    )
    for model in experts.models.values():
        for block in model.blocks:
            fully_shard(block, mesh=data, mp_policy=policy)
        # Without this the outermost weights stay whole after a forward without backward, where an average that is
        # swapped in or out would miss them.
        fully_shard(model, mesh=data, mp_policy=policy, reshard_after_forward=True)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a model, sharded or not, on the CPU of rank zero. Every rank has to call it."""
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole
