"""What is learned of a step does not depend on how its samples are shared out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import fit, keep_checkpoints, make_config, make_conversation
from recording import attach

from datamodules.packed_order import PackConfig
from datamodules.shards import write_shards
from datamodules.video import VideoDataModule

PACK = {"tokens": 24, "window": 4}
TASKS = ("t2i", "v2v", "t2v", "t2i", "t2i")  # of 4, 16 and 8 tokens


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several sizes, of which packs hold two to six."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards((make_conversation(i, TASKS[i % len(TASKS)]) for i in range(40)), folder)
    return folder


def trained(wan: Path, mixed: Path, run: Path, batches: int, ranks: int = 1, **data: Any) -> dict[str, torch.Tensor]:
    """Weights after two steps of plain gradient descent on so many batches each."""
    config = make_config(wan, mixed, run, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    config["model"]["init_args"]["dropout"] = {"text": 0.3, "video": 0.3}
    config["data"]["init_args"] |= {"max_samples": None, **data}
    config["trainer"] |= {"accumulate_grad_batches": batches // ranks, "devices": ranks}
    config["trainer"] |= {"strategy": "ddp"} if ranks > 1 else {}
    keep_checkpoints(config, run, every=2)
    fit(config, ranks=ranks)
    weights: dict[str, torch.Tensor] = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return weights


def test_a_step_is_the_same_on_one_rank_and_on_two(wan: Path, mixed: Path, tmp_path: Path, relative_error) -> None:
    one, two = (trained(wan, mixed, tmp_path / str(ranks), 4, ranks, pack=PACK) for ranks in (1, 2))
    other = trained(wan, mixed, tmp_path / "other", 2, pack=PACK)
    check_alike(one, two)
    assert max(relative_error(other[name], weight) for name, weight in one.items()) > 0.01, "gradients are seen"


def test_a_step_is_the_same_in_one_batch_and_in_several(wan: Path, mixed: Path, tmp_path: Path) -> None:
    one = trained(wan, mixed, tmp_path / "one", 1, batch_size=4)
    check_alike(one, trained(wan, mixed, tmp_path / "several", 4, batch_size=1))


def check_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.allclose(other[name], weight, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_places_and_weights_of_a_step(mixed: Path, ranks: int) -> None:
    """Places count through, and every sample of a step has the same share of it."""
    data, loaders = VideoDataModule(train=str(mixed), seed=3, pack=PackConfig(**PACK)), []
    for rank in range(ranks):
        loaders.append(list(attach(data, rank, ranks, 4 // ranks).train_dataloader()))
    for start in range(0, len(loaders[0]), 4 // ranks):
        batches = list(zip(*(loader[start : start + 4 // ranks] for loader in loaders), strict=True))
        sizes = [len(batch) for shared in batches for batch in shared]
        assert [batch.place for shared in batches for batch in shared] == [sum(sizes[:n]) for n in range(4)]
        for shared in batches:
            share = sum(map(len, shared)) / sum(sizes)
            assert [batch.weight for batch in shared] == pytest.approx([share * 4 / ranks] * ranks)
