"""Sharded weights that compute in bf16: what a model in bf16 computes, with exact timesteps and positions."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.sharding import shard


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def test_a_sharded_renderer_computes_what_one_in_bf16_does(mesh, tiny_model, randn):
    model, draw = tiny_model(), randn(0)
    samples = [
        PackedSample([Segment(draw(4, 3, 8, 8), 1.5), Segment(draw(4, 3, 8, 8), 0)], draw(7, 12), 873.3),
        PackedSample([Segment(draw(4, 1, 8, 8), 0)], draw(5, 12), 31.7),
    ]
    packed = pack(samples, model.patch)
    expected = copy.deepcopy(model).to(torch.bfloat16)(packed)
    shard(model, model.blocks, mesh["data_parallel"], torch.bfloat16)
    found = model(packed)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
