"""FSDP2, and which rank sees which data."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

if TYPE_CHECKING:  # sampling needs no Lightning
    import lightning as L


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute: torch.dtype | None = None,
    methods: Sequence[str] = (),
) -> None:
    """Shard every block, then the rest, over a mesh; the shards stay in fp32, and gradients are means over the mesh.

    Args:
        model: A model with its weights, all of which serve inside its forward or ``methods``.
        blocks: Its parts that are gathered one at a time.
        mesh: One axis of ranks that share the weights, or two: of replicas, and of the ranks that share each of them.
        compute: Dtype in which gathered weights compute; if null bf16 on CUDA, else the weights' own.
        methods: What else than forward uses weights, in the model and in each of the blocks.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute or (torch.bfloat16 if mesh.device_type == "cuda" else None),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would round timesteps, positions and noise, too
    )
    blocks = list(blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Without this the outermost weights stay whole after a forward without backward, where an average that is
    # swapped in or out would miss them.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in (model, *blocks):
        for method in methods:
            register_fsdp_forward_method(module, method)


def weights_mesh(module: "L.LightningModule") -> DeviceMesh:
    """The mesh over which a module's weights are sharded, which has all ranks, those of the second axis too."""
    mesh, own = module.device_mesh, getattr(module.trainer.strategy, "weights_mesh", None)
    assert mesh is not None
    if own is not None:
        return own
    if mesh["tensor_parallel"].size() == 1:
        return mesh["data_parallel"]
    return init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("ranks",))


def most_of_ranks(count: int, model: nn.Module) -> int:
    """The largest of the counts of all ranks if they share a sharded model, else the count itself.

    So often each of them has to call the model: weights are gathered from all ranks or from none.
    """
    if not isinstance(model, FSDPModule):
        return count
    most = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a model, sharded or not, on the CPU of rank zero. Every rank has to call it."""
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


def data_rank(module: "L.LightningModule") -> tuple[int, int]:
    """Rank among those that see different data, and how many do; peers on the second mesh axis share their draws."""
    if module.device_mesh is None:
        return module.global_rank, module.trainer.world_size
    mesh = module.device_mesh["data_parallel"]
    return mesh.get_local_rank(), mesh.size()


def leads(module: "L.LightningModule") -> bool:
    """Whether this is the first of the ranks that see the same data, which writes what all of them have made."""
    return module.device_mesh is None or module.device_mesh["tensor_parallel"].get_local_rank() == 0
