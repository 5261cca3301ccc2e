"""FSDP2 of the renderer."""

import torch
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
    for model in experts.children():
        for block in model.blocks:
            fully_shard(block, mesh=data, mp_policy=policy)
        fully_shard(model, mesh=data, mp_policy=policy)
