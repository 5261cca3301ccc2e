import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from factories import EDGE, FRAMES, callback, fit, make_config, make_shards
from wandb_files import fresh_wandb

from bernini.media import read_image, read_video


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    config = make_config(wan, shards, tmp_path / "run", lora={"rank": 2, "dropout": 0.3})
    config["trainer"] |= {"max_steps": 5, "accumulate_grad_batches": 2}
    return config


def test_samples_come_at_the_start_on_the_way_and_at_the_end(config: dict[str, Any], tmp_path: Path) -> None:
    plain = fit(copy.deepcopy(config))[0]["losses"]
    sampler = callback("callbacks.SampleVideos", folder=str(tmp_path / "out"), every_n_steps=2, count=2)
    config["trainer"]["callbacks"] = [callback("callbacks.EMA"), sampler]
    assert fit(config)[0]["losses"] == plain  # to the bit: sampling leaves no trace in training
    steps = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert steps == ["step-000000", "step-000002", "step-000004", "step-000005"]
    for step in steps:
        clips = sorted((tmp_path / "out" / step).iterdir())
        assert [clip.name for clip in clips] == ["t2v-0001.mp4", "v2v-0000.mp4"]
        made = read_video(clips[0])
        assert made.pixels is not None and made.pixels.shape == (3, FRAMES, EDGE, EDGE) and made.fps == 8.0
    first, last = (read_video(tmp_path / "out" / step / "t2v-0001.mp4").pixels for step in (steps[0], steps[-1]))
    assert first is not None and last is not None and not torch.equal(first, last)


def test_without_validation_data_there_is_nothing_to_sample(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["init_args"]["val"] = None
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 8}
    config["trainer"]["callbacks"] = [callback("callbacks.SampleVideos", folder=str(tmp_path / "out"))]
    fit(config)
    assert not (tmp_path / "out").exists()


def test_images_are_written_as_png(config: dict[str, Any], tmp_path: Path) -> None:
    images = make_shards(tmp_path / "images", 2, ("t2i",))
    config["data"]["init_args"] |= {"train": str(images), "val": str(images)}
    config["trainer"] |= {"max_steps": 1, "accumulate_grad_batches": 1}
    config["trainer"]["callbacks"] = [callback("callbacks.SampleVideos", folder=str(tmp_path / "out"), count=1)]
    fit(config)
    made = read_image(tmp_path / "out" / "step-000001" / "t2i-0000.png").pixels
    assert made is not None and made.shape == (3, 1, EDGE, EDGE)


def test_samples_reach_wandb(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_wandb(monkeypatch, tmp_path)
    config["trainer"] |= {"max_steps": 1}
    config["trainer"]["logger"] = callback("lightning.pytorch.loggers.WandbLogger", save_dir=str(tmp_path))
    config["trainer"]["callbacks"] = [callback("callbacks.SampleVideos", folder=str(tmp_path / "out"), count=1)]
    fit(config)
    wandb.teardown()
    media = {path.name for path in tmp_path.rglob("*/files/media/videos/*.mp4")}
    assert sorted(name.split("_")[0] for name in media) == ["samples", "samples"]
