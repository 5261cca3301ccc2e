"""What the steps of one expert share: nothing of it changes a number, all of it is made once and goes at the switch."""

import os
import socket
import weakref
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bernini.flow.guidance import Context, Omegas
from bernini.renderer.experts import Architecture, Experts
from bernini.renderer.packing import PackedSample, Segment, pack, unpatchify
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render
from bernini.renderer.stage import Stage
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.sharding import shard


def make_samples(draw) -> list[PackedSample]:
    """Five samples of several sizes, of which three read one context."""
    shared = draw(4, 12)
    contexts = [shared, draw(3, 12), shared, draw(6, 12), shared]
    sizes = [(1, 4, 4), (2, 4, 4), (2, 4, 4), (1, 2, 6), (1, 4, 4)]
    return [
        PackedSample([Segment(draw(4, 1, 4, 4), 1.0)] * (n % 2) + [Segment(torch.zeros(4, *size), 0)], context, 0.0)
        for n, (size, context) in enumerate(zip(sizes, contexts, strict=True))
    ]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("max_pack", "max_tokens"), [(64, 10**6), (2, 10**6), (64, 13), (64, 1)])
@torch.no_grad()
def test_steps_predict_what_forwards_of_single_samples_do(
    cache, max_pack, max_tokens, tiny_model, randn, relative_error
):
    model, draw = tiny_model(), randn(0)
    samples = make_samples(draw)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].token_lengths))
    stage = Stage(model, samples, max_pack, max_tokens, cache)
    for timestep in (900.0, 400.0):
        latents = [draw(*sample.segments[-1].latent.shape) for sample in samples]
        found = stage.predict(latents, timestep)
        assert all(len(n) <= max_pack and (sum(n) <= max_tokens or len(n) == 1) for n in sizes)
        for sample, latent, velocity in zip(samples, latents, found, strict=True):
            alone = PackedSample([*sample.segments[:-1], Segment(latent, 0)], sample.context, timestep)
            packed = pack([alone], model.patch)
            expected = unpatchify(model(packed)[packed.target_index], packed.target_grids[0], model.patch)
            assert velocity.dtype == torch.float32 and relative_error(velocity, expected) < 1e-5
        sizes.clear()


def make_requests(draw) -> list[RenderRequest]:
    """Two requests with a plan, whose negative context is one."""
    negative = draw(2, 12)
    return [
        RenderRequest(
            (4, 1, 4, 4),
            [Source(draw(4, 2, 4, 4), is_video=True)],
            {Context("negative", False): negative, Context("positive", False): draw(3, 12)}
            | {Context("positive", True): draw(7, 12)},
            "rv2v_wapg",
            seed,
        )
        for seed in range(2)
    ]


@pytest.mark.parametrize(("max_pack", "cache"), [(64, True), (3, True), (1, True), (64, False)])
def test_keys_and_values_are_made_once_per_expert_and_context(max_pack, cache, tiny_model, randn):
    experts, rows = Experts(tiny_model(0), tiny_model(1)), {}
    for name, model in experts.models.items():
        made = rows.setdefault(name, [])
        model.blocks[0].attn2.to_k.register_forward_pre_hook(lambda _, args, made=made: made.append(len(args[0])))
    config = SamplingConfig(steps=8, max_pack=max_pack, cache=cache, omegas=Omegas(vid=1.5))
    render(experts, make_requests(randn(0)), config)
    if cache:
        assert rows == {"transformer": [2 + 3 + 7 + 3 + 7], "transformer_2": [2 + 3 + 7 + 3 + 7]}
    else:  # by every arm of every step: two negative arms and two positive ones of each request
        assert sum(rows["transformer"]) + sum(rows["transformer_2"]) == 8 * 2 * (2 + 2 + 3 + 7)


def test_the_cache_of_one_expert_is_gone_before_that_of_the_other_is_made(tiny_model, randn, monkeypatch):
    made = []
    keys_values = PackedWanTransformer3DModel.keys_values

    def watched(model, context):
        assert all(kept() is None for kept in made)
        found = keys_values(model, context)
        made.extend(weakref.ref(tensor) for pair in found for tensor in pair)
        return found

    monkeypatch.setattr(PackedWanTransformer3DModel, "keys_values", watched)
    render(Experts(tiny_model(0), tiny_model(1)), make_requests(randn(0)), SamplingConfig(steps=8))
    assert len(made) == 2 * 2 * 2 and all(kept() is None for kept in made)


def _predict_sharded(rank: int, port: int, architecture: Architecture, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.manual_seed(0)
    model = architecture.build()
    shard(model, model.blocks, mesh["data_parallel"], methods=["keys_values"])
    results.put((rank, _predict(model, count=(3, 1)[rank])))
    dist.destroy_process_group()


@torch.no_grad()
def _predict(model: PackedWanTransformer3DModel, count: int) -> list[list[float]]:
    draw = torch.Generator().manual_seed(1)
    samples = [
        PackedSample([Segment(torch.zeros(4, 1, 4, 4), 0)], torch.randn(3, 12, generator=draw), 0.0)
        for _ in range(count)
    ]
    latents = [torch.randn(4, 1, 4, 4, generator=draw) for _ in samples]
    stage = Stage(model, samples, max_pack=1, max_tokens=1, cache=True)
    return [velocity.flatten().tolist() for velocity in stage.predict(latents, 500.0)]


def test_ranks_that_share_a_model_may_have_different_numbers_of_forwards(tiny_architecture):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    results = context.Queue()
    arguments = (port, tiny_architecture, results)
    ranks = [context.Process(target=_predict_sharded, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = tiny_architecture.build()
    for rank, count in enumerate((3, 1)):
        expected = _predict(whole, count)
        torch.testing.assert_close(torch.tensor(found[rank]), torch.tensor(expected))
