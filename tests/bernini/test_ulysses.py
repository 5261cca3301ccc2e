"""Ulysses: ranks that hold slices of a pack compute, learn and sample what one rank does."""

import socket
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factories import (
    build,
    callback,
    fit,
    keep_checkpoints,
    make_config,
    make_shards,
    run_ranks,
    write_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bernini.cli import main
from bernini.errors import ConfigError
from bernini.media import read_image
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.recompute import Recompute
from bernini.renderer.segments import SegmentEncoding
from bernini.renderer.stage import Stage
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.ulysses import Axis

RANKS = 3
# Latents of each sample, the last one its target: tokens that three ranks cannot divide, fewer than ranks, one sample.
PACKS = {
    "mixed": [[(3, 4, 4), (1, 4, 6)], [(1, 2, 2)], [(2, 6, 4)], [(1, 4, 2), (1, 2, 2)]],
    "short": [[(1, 2, 2)]],
    "long": [[(2, 6, 4), (2, 6, 4), (1, 2, 2)]],
}


def make_samples(sizes: list[list[tuple[int, int, int]]], draw: Any) -> list[PackedSample]:
    return [
        PackedSample(
            [Segment(draw(4, *size), (number + 1) % len(own) * 1.5) for number, size in enumerate(own)],
            draw(2 + place, 12).requires_grad_(),
            100.0 * place + 50,
        )
        for place, own in enumerate(sizes)
    ]


def compute(axis: Axis, encoding: SegmentEncoding, recompute: Recompute) -> dict[str, Tensor]:
    """Outputs, gradients, and samplers' predictions with and without what a stage keeps."""
    torch.manual_seed(0)
    model = PackedWanTransformer3DModel(
        **(Architecture(2, 3, 16, 32, 12, 16, 4, "embedding").arguments() | {"segment_encoding": encoding})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.axis, model.recompute = axis, recompute
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {}
    for name, sizes in PACKS.items():
        samples = make_samples(sizes, draw)
        out = model(pack(samples, model.patch))
        leaves = dict(model.named_parameters()) | {f"context {n}": s.context for n, s in enumerate(samples)}
        grads = torch.autograd.grad((out * draw(*out.shape)).sum(), list(leaves.values()))
        found[f"{name} out"] = out.detach()
        found |= {f"{name} d {leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}
        targets = [replace(s, segments=[*s.segments[:-1], Segment(s.segments[-1].latent, 0)]) for s in samples]
        for cache in (True, False):
            with torch.no_grad():
                stage = Stage(model, targets, max_pack=3, max_tokens=99, cache=cache)
                velocities = stage.predict([s.segments[-1].latent for s in targets], 500.0)
            found |= {f"{name} velocity {n} {cache}": x for n, x in enumerate(velocities)}
    return found


CASES: list[tuple[SegmentEncoding, Recompute]] = [("sa3d", "pointwise"), ("embedding", "full"), ("plain", "attention")]


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(ConfigError, match="4 heads cannot be divided between 3 ranks"):
        Axis.of(mesh, 4)
    for case in CASES:
        found = compute(Axis.of(mesh, 3), *case)
        save_file({name: x.contiguous() for name, x in found.items()}, f"{folder}/{case[0]}-{rank}.safetensors")
    dist.destroy_process_group()


def test_slices_compute_what_the_whole_pack_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    for case in CASES:
        parts = [load_file(tmp_path / f"{case[0]}-{rank}.safetensors") for rank in range(RANKS)]
        for name, alone in compute(Axis(), *case).items():
            own = [part[name] for part in parts]
            together = sum(own) / RANKS if " d " in name else own[0]  # gradients are means over ranks
            scale = max(1.0, alone.abs().max().item())  # a lone token's scores have gradients of rounding alone
            torch.testing.assert_close(together, alone, rtol=0, atol=2e-6 * scale, msg=name)
            if " d " not in name or " d context" in name:
                assert all(torch.equal(part, own[0]) for part in own), name


# -- runs -------------------------------------------------------------------------------------------------------------


def make_run(wan: Path, shards: Path, root: Path, batch_size: int) -> dict[str, Any]:
    plain = callback("torch.optim.SGD", lr=0.05, momentum=0.9)  # Adam would hide the scale of gradients
    config = make_config(wan, shards, root, expert="both", optimizer=plain, recompute="full")
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 3, "limit_val_batches": 8}
    config["data"]["init_args"] |= {"batch_size": batch_size, "max_samples": 3}
    config["trainer"]["callbacks"] = [
        callback("callbacks.EMA", decay=0.5),
        callback("callbacks.SaveRenderer", folder=str(root / "out")),
        callback("callbacks.SampleVideos", folder=str(root / "samples"), count=2, every_n_steps=3),
        callback("callbacks.PredictionWriter", folder=str(root / "made")),
    ]
    keep_checkpoints(config, root)
    return config


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of three tasks."""
    return make_shards(tmp_path_factory.mktemp("uneven"), 6, ("v2v", "t2i", "rv2v"))


@pytest.fixture(scope="module")
def one_rank(wan: Path, uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Record and folder of four steps on one rank."""
    root = tmp_path_factory.mktemp("one_rank")
    config = make_run(wan, uneven, root, 2)
    record = fit(config)[0]
    return record, root


def weights(config: dict[str, Any], root: Path) -> dict[str, Tensor]:
    """What a run has saved."""
    config = {**config, "trainer": {**config["trainer"], "strategy": "auto", "devices": 1}}
    config["model"]["init_args"]["init_from"] = str(root / "out")
    return dict(build(config, root).named_parameters())


@pytest.mark.parametrize("data", [1, 2])
def test_a_run_on_slices_is_the_run_on_one_rank(
    wan: Path, uneven: Path, tmp_path: Path, one_rank: tuple[dict[str, Any], Path], data: int
) -> None:
    """With one pack, and with two that have a replica of the weights each; these end on another number of ranks."""

    def configure(ranks: int, batch_size: int, name: str, **sizes: int) -> dict[str, Any]:
        config = make_run(wan, uneven, tmp_path, batch_size)
        config["trainer"] |= {"devices": ranks, "strategy": callback(name, **sizes, process_group_backend="gloo")}
        return config

    if data == 1:
        lightnings = "lightning.pytorch.strategies.ModelParallelStrategy"
        config = configure(2, 2, lightnings, data_parallel_size=1, tensor_parallel_size=2)
        found = fit(config, ranks=2)
    else:
        config = configure(4, 1, "bernini.strategy.ShardedStrategy", tensor_parallel_size=2, replicas=2)
        found = fit(config, "--trainer.max_steps=3", ranks=4)
        alone = write_config(tmp_path / "alone.yaml", configure(1, 2, "bernini.strategy.ShardedStrategy"))
        assert run_ranks(1, ["fit", "-c", alone, "--ckpt_path=auto"]) == [0]
    record, root = one_rank
    for first in range(2):
        own = zip(*(rank["losses"] for rank in found[first::2]), strict=True)
        losses = [sum(parts) / data for parts in own]
        assert len(losses) >= 3 and losses == pytest.approx(record["losses"][: len(losses)], abs=1e-5)
    metrics = [pytest.approx(row, abs=1e-5) for row in record["metrics"]]
    assert [rank["metrics"] for rank in found] == [metrics] * len(found)
    saved = weights(config, tmp_path)
    for name, value in weights(make_run(wan, uneven, root, 2), root).items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-6, msg=name)
    shown = [{path.name for path in (run / "samples").rglob("*.*")} for run in (tmp_path, root)]
    assert shown[0] == shown[1] == {"v2v-0000.mp4", "t2i-0001.png"}
    if data == 1:
        for own, ranks in ((config, 2), (make_run(wan, uneven, root, 2), 1)):
            fit(own, "--ckpt_path=auto", verb="predict", ranks=ranks)
        made = [tmp_path / "made", root / "made"]
        assert [len((folder / "predictions.jsonl").read_text().splitlines()) for folder in made] == [3, 3]
        pixels, expected = (read_image(folder / "t2i-0001.png").pixels for folder in made)
        assert pixels is not None and expected is not None and (pixels.int() - expected.int()).abs().max() <= 1


def test_gpus_that_cannot_be_divided_are_told(
    wan: Path, uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(wan, uneven, tmp_path, 2)
    config["trainer"]["strategy"] = callback("bernini.strategy.ShardedStrategy", replicas=2)
    assert main(["fit", "-c", write_config(tmp_path / "c.yaml", config)]) == 78
    assert "1 GPUs cannot be divided by replicas 2" in capsys.readouterr().err
