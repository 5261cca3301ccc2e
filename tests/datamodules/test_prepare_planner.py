"""What a planner sees, made ahead of training: by the workers of a loader, or once and for all by `bernini prepare`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import fit, make_shards, write_config
from planners import SIZE, VISION, make_planner, make_planner_config, make_planner_samples
from real_clips import write_pair

from bernini.cli import main
from bernini.conversation import Batch, Conversation
from bernini.errors import BerniniError, ConfigError, DataError
from bernini.lightning_cli import run_lightning
from bernini.planner.model import save_planner
from bernini.planner.settings import PlannerSettings
from bernini.planner.vision import VisionConfig, add_visuals, prepare
from datamodules.shards import Shards
from datamodules.toyworld.data import ToyWorldDataModule
from datamodules.video import VideoDataModule

CONFIG = VisionConfig(**VISION)


def check_seen(batch: Batch) -> None:
    """What came from the loader is what the pixels beside it give here."""
    seen = [m for sample in batch.samples for m in sample.visual]
    assert seen
    for message in seen:
        media = message.media
        assert media is not None and media.pixels is not None and media.visual is not None
        made = prepare(media.pixels, message.is_video, media.fps, CONFIG)
        assert torch.equal(media.visual.patches, made.patches)
        assert (media.visual.grid, media.visual.is_video) == (made.grid, made.is_video)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_make_what_the_process_would(tmp_path: Path, workers: int) -> None:
    common: dict[str, Any] = {"batch_size": 4, "workers": workers, "vision": CONFIG}
    toy = ToyWorldDataModule(["v2v", "r2v", "und_img"], **SIZE, length=8, val_length=4, **common)
    clips = VideoDataModule(train=str(make_shards(tmp_path, 4)), max_edge=16, **common)
    for data in (toy, clips):
        data.setup("fit")
        check_seen(next(iter(data.train_dataloader())))


def test_nothing_is_made_unasked() -> None:
    batch = next(iter(ToyWorldDataModule(["v2v"], **SIZE, batch_size=2, length=2).train_dataloader()))
    assert all(media.visual is None for sample in batch.samples for media in sample.media())


def test_the_losses_are_the_same_bits() -> None:
    module, samples = make_planner(), make_planner_samples()
    keys = [("test", number) for number in range(3)]
    made, _ = module.losses(samples, keys)
    for sample in samples:
        add_visuals(sample, CONFIG)
        for media in sample.media():
            media.pixels = None  # nothing looks at them any more
    assert torch.equal(module.losses(samples, keys)[0], made)


def test_a_fit_gives_workers_the_planners_numbers(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", make_planner_config(tmp_path, 2))
    cli = run_lightning(["-c", file, "--model.init_args.vision.fps=4"], run=False)
    assert cli.datamodule.vision == cli.model.template.vision == VisionConfig(**{**VISION, "fps": 4.0})
    with pytest.raises(ConfigError, match="would be ignored") as told:
        run_lightning(["-c", file, "--data.init_args.vision.fps=4"], run=False)
    assert "it follows model.init_args.vision" in str(told.value)


def test_what_was_made_for_another_planner_is_refused() -> None:
    module, (sample, *_) = make_planner(), make_planner_samples()
    add_visuals(sample, VisionConfig(**{**VISION, "fps": 4.0, "tokens_per_second": 5.0}))
    with pytest.raises(ConfigError, match=r"made with fps 4\.0, not 8\.0"):
        module.template(sample)


# -- features -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny planner, as training leaves it but for the tokenizer."""
    folder = tmp_path_factory.mktemp("planner")
    save_planner(make_planner().planner, folder)
    PlannerSettings(vision=CONFIG).save(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real clips, before and after."""
    folder = tmp_path_factory.mktemp("clips")
    write_pair(folder)
    return folder


def prepared(clips: Path, out: Path, *more: str) -> Path:
    args = ["prepare", str(clips), str(out), "--max-edge", "64", "--max-frames", "17", "--lossless", *more]
    assert main(args) == 0
    return out


@pytest.fixture(scope="module")
def features(clips: Path, planner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with features in bf16."""
    return prepared(clips, tmp_path_factory.mktemp("out") / "features", "--planner", str(planner))


@pytest.fixture(scope="module")
def raw(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every pixel."""
    return prepared(clips, tmp_path_factory.mktemp("out") / "raw")


def test_features_are_what_the_tower_makes(planner: Path, features: Path, raw: Path) -> None:
    module = make_planner(init_from=str(planner))
    for stored, pixels in zip(Shards(features).read(0).visual, Shards(raw).read(0).visual, strict=True):
        assert stored.media is not None and pixels.media is not None and pixels.media.pixels is not None
        seen = stored.media.visual
        made = prepare(pixels.media.pixels, True, pixels.media.fps, CONFIG)
        assert seen is not None and seen.features is not None and stored.media.pixels is None
        assert (seen.grid, seen.is_video, seen.config) == (made.grid, True, CONFIG)
        assert seen.features.dtype == torch.bfloat16 and seen.features.shape == (made.tokens, 32)
        torch.testing.assert_close(seen.features.float(), module.planner.see([made]), rtol=0.01, atol=1e-4)


def configured(run: Path, planner: Path, *shards: Path) -> dict[str, Any]:
    config = make_planner_config(run, 3, init_from=str(planner), mllm=None)
    arguments = {"train": [str(folder) for folder in shards]}
    config["data"] = {"class_path": "datamodules.video.VideoDataModule", "init_args": arguments}
    return config


def losses_of(run: Path, planner: Path, shards: Path) -> list[float]:
    (record,) = fit(configured(run, planner, shards))
    return record["losses"]


def test_a_fit_from_features_is_the_fit_from_pixels(
    planner: Path, clips: Path, features: Path, raw: Path, tmp_path: Path
) -> None:
    exact = prepared(clips, tmp_path / "exact", "--planner", str(planner), "--dtype", "fp32")
    expected = losses_of(tmp_path / "raw", planner, raw)
    assert len(set(expected)) == 3
    assert losses_of(tmp_path / "fp32", planner, exact) == pytest.approx(expected, rel=1e-5)
    assert losses_of(tmp_path / "bf16", planner, features) == pytest.approx(expected, rel=0.01)


def test_ranks_with_and_without_features_stay_in_step(planner: Path, features: Path, raw: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "two", planner, raw, features)
    strategy = {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"}
    name = "lightning.pytorch.strategies.ModelParallelStrategy"
    config["trainer"] |= {"devices": 2, "strategy": {"class_path": name, "init_args": strategy}}
    both = fit(config, ranks=2)
    alone = configured(tmp_path / "one", planner, raw, features)
    alone["data"]["init_args"]["batch_size"] = 2
    mean = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in both), strict=True)]
    assert mean == pytest.approx(fit(alone)[0]["losses"], rel=1e-4)


def read(shards: Path) -> Conversation:
    return Shards(shards).read(0)


def test_features_of_another_tower_are_refused(planner: Path, features: Path) -> None:
    def losses(sample: Conversation, **more: Any) -> None:
        make_planner(init_from=str(planner), **more).losses([sample], [("test", 0)])

    def refused(sample: Conversation, kind: type[BerniniError], match: str, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            losses(sample, **more)

    losses(read(features))
    refused(read(features), ConfigError, "cannot train the vision tower", train_vit=True)
    refused(read(features), ConfigError, "made with fps", vision=VisionConfig(**{**VISION, "fps": 4.0}))
    other = read(features)
    for media in other.media():
        assert media.visual is not None and media.visual.features is not None
        media.visual.features = media.visual.features[:, :-1]
    refused(other, DataError, r"their shape is \[\d+, 31\], expected \[\d+, 32\]")
    with pytest.raises(DataError, match=r"fingerprint .* random weights"):
        make_planner().losses([read(features)], [("test", 0)])


def test_features_and_pixels_may_be_mixed(planner: Path, features: Path, raw: Path) -> None:
    module = make_planner(init_from=str(planner))
    samples = [read(raw), read(features), read(raw)]
    seen = [module.template(sample).visuals for sample in samples]
    mixed = module.planner.see([visual for visuals in seen for visual in visuals])
    alone = torch.cat([module.planner.see(visuals) for visuals in seen])
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-6)


def test_a_tower_of_other_patches_is_told(clips: Path, planner: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["prepare", str(clips), str(tmp_path / "out"), "--planner", str(planner), "--vision.patch", "14"]
    assert main(args) == 78
    assert "vision.patch is 14, the planner's tower has 8" in capsys.readouterr().err
    assert main(["prepare", str(clips), str(tmp_path / "out"), "--planner", str(tmp_path)]) == 65
    assert "the planner cannot be read" in capsys.readouterr().err
