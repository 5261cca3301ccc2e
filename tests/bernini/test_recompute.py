"""Every way to recompute gives the same gradients, and does no more than it says."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from bernini.attention import Lengths
from bernini.grouped import attend
from bernini.lora import AdapterConfig, add_lora
from bernini.renderer.packing import Pack, PackedSample, Segment, pack
from bernini.renderer.recompute import Recompute
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.sharding import shard

WAYS = get_args(Recompute)
CLIP, EDIT = (((3, 4, 6),), 5), (((1, 4, 4), (2, 4, 4)), 7)
PACKS = {"one": [CLIP], "several": [CLIP, EDIT, EDIT]}
PARTITIONED = "aot_eager_decomp_partition"  # as inductor divides a graph, without its code


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Operators(TorchDispatchMode):
    """Counts what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *words: str) -> int:
        """How often operators ran whose names hold one of the words."""
        return sum(count for name, count in self.counts.items() if any(word in name for word in words))


def packed(model: PackedWanTransformer3DModel, draw: Any, name: str) -> Pack:
    return pack(
        [
            PackedSample([Segment(draw(4, *size), i) for i, size in enumerate(sizes)], draw(rows, 12), 500.0)
            for sizes, rows in PACKS[name]
        ],
        model.patch,
    )


def step(model: PackedWanTransformer3DModel, given: Pack, seed: int = 0) -> tuple[Tensor, Operators]:
    """Output and gradients laid end to end, and what the backward pass ran."""
    torch.manual_seed(seed)  # of dropout
    out, operators = model(given), Operators()
    loss = out.square().mean()
    with operators:
        loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([out.detach().flatten(), *found]), operators


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", PACKS)
def test_gradients_do_not_depend_on_what_is_recomputed(
    name: str, lora: bool, tiny_model: Any, randn: Any, relative_error: Any
) -> None:
    model = tiny_model()
    if lora:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        torch.manual_seed(0)
        add_lora(model, AdapterConfig(rank=2, dropout=0.2, targets=targets))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
    model.train()
    given, made = packed(model, randn(0), name), {}
    for way in WAYS:
        one = copy.deepcopy(model)
        one.recompute = way
        made[way] = step(one, given)
        assert relative_error(made[way][0], made["none"][0]) < 1e-6, way
    products, attention = ({way: made[way][1].of(*words) for way in WAYS} for words in (["mm"], ["attend", "scaled"]))
    assert attention["pointwise"] == attention["attention"] == attention["none"]
    assert attention["none"] < attention["full"] == attention["offload"]
    assert products["none"] < products["attention"] <= products["full"] == products["offload"]
    if lora:  # second products of rank 2 are redone
        assert products["none"] < products["pointwise"] < products["full"]
        return
    assert products["pointwise"] == products["none"]
    for way in ("pointwise", "attention"):
        compiled = copy.deepcopy(model)
        compiled.recompute = way
        compiled.compile_repeated_blocks(fullgraph=True, backend=PARTITIONED)
        result, operators = step(compiled, given)
        assert relative_error(result, made["none"][0]) < 1e-5
        assert operators.of("attend", "scaled") == attention["none"]
        assert products["none"] <= operators.of("mm") <= products[way]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sharded_blocks_recompute_alike(
    compiled: bool, mesh: DeviceMesh, tiny_model: Any, randn: Any, relative_error: Any
) -> None:
    model = tiny_model()
    given, made = packed(model, randn(0), "several"), {}
    for way in WAYS:
        one = copy.deepcopy(model)
        one.recompute = way
        shard(one, one.blocks, mesh, methods=["keys_values"])
        if compiled:
            one.compile_repeated_blocks(backend="aot_eager")
        one(given).square().mean().backward()
        made[way] = torch.cat([p.grad.full_tensor().flatten() for p in one.parameters()])
        assert relative_error(made[way], made["none"]) < 1e-6, way


def test_a_way_that_is_diffusers_switch(tiny_model: Any, randn: Any) -> None:
    model = tiny_model()
    given = packed(model, randn(0), "one")
    model.enable_gradient_checkpointing()
    switched = step(model, given)[1].of("mm")
    model.disable_gradient_checkpointing()
    model.recompute = "full"
    model.zero_grad()
    assert step(model, given)[1].of("mm") == switched


@pytest.mark.parametrize("backend", ["native", "math"])
@pytest.mark.parametrize("hidden", [False, True], ids=["all keys", "some keys"])
def test_the_operator_is_differentiated_rightly(backend: str, hidden: bool, randn: Any) -> None:
    lengths = Lengths.of([(3, 4), (3, 4), (5, 2)], "cpu")
    draw = randn(0)
    seen = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 0]).bool() if hidden else None
    told = (lengths.host, lengths.q_starts, lengths.k_starts, seen, backend)
    given = [draw(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (11, 10, 10)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, *told)[0], given)
    single = [x.detach().float().requires_grad_() for x in given]
    torch.library.opcheck(attend, (*single, *told))
