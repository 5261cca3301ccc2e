"""MUSIQ, NIQE and LPIPS with random weights, where the packages are installed that they come with."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from benchmarks.quality.interface import Expectation, Item
from benchmarks.quality.metrics.packaged import SQUEEZENET, Lpips, Musiq, Niqe
from benchmarks.quality.metrics.preparing import CLIP, IMAGENET, pictures
from benchmarks.quality.models import base, five, ivebench, vbench
from benchmarks.quality.official.registry import OFFICIAL
from bernini.errors import CheckpointError, ConfigError
from bernini.media import write_image

CPU = torch.device("cpu")
NOISE = torch.randint(256, (3, 9, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def item(**extra: Any) -> Item:
    return Item("one", "v2v", "", Expectation(9, 40, 64, 8.0), (), extra=extra)


@pytest.fixture
def squeezenet(tmp_path: Path) -> Path:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / SQUEEZENET)
    return tmp_path / SQUEEZENET


@pytest.fixture
def spaq(tmp_path: Path) -> Path:
    arch = pytest.importorskip("pyiqa.archs.musiq_arch")
    torch.manual_seed(0)
    torch.save(arch.MUSIQ(pretrained=False).state_dict(), tmp_path / "musiq.pth")
    return tmp_path / "musiq.pth"


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [(Musiq, "pyiqa", "pyiqa"), (Niqe, "pyiqa", "pyiqa"), (Lpips, "torchvision", "torchvision")],
)
def test_a_package_that_is_not_there_is_named(
    kind: type, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=f"needs {package}") as caught:
        kind(tmp_path / "weights.pth", CPU)
    assert caught.value.fix == f"pip install {package}"


@pytest.mark.parametrize("size", [(480, 848), (848, 480), (483, 721), (100, 333), (227, 224)])
def test_frames_are_prepared_as_by_torchvision(size: tuple[int, int]) -> None:
    """The official scripts' own transforms, written out."""
    by = pytest.importorskip("torchvision.transforms")
    bicubic, noise = by.InterpolationMode.BICUBIC, torch.randint(256, (3, 1, *size), dtype=torch.uint8)
    to_clip, to_imagenet, share = by.Normalize(*CLIP), by.Normalize(*IMAGENET), by.Lambda(lambda x: x.float().div(255))
    shrunk, cut = by.Resize(224, bicubic, antialias=False), by.CenterCrop(224)
    floats = {
        vbench.FOR_CLIP: [shrunk, cut, share, to_clip],
        vbench.FOR_DINO: [by.Resize(224, antialias=False), share, to_imagenet],
        vbench.FOLLOWING: [by.Resize(256, bicubic), cut, share, to_imagenet],
        five.FOR_DINO: [by.Resize(224, max_size=480), to_imagenet],
    }
    images = {
        base.PILLOW_CLIP: [by.Resize(224, bicubic), cut, by.ToTensor(), to_clip],
        vbench.GIVEN: [by.Resize(256, bicubic), cut, by.ToTensor(), to_imagenet],
        ivebench.FOR_DINO: [by.Resize(224), by.ToTensor(), to_imagenet],
    }
    (image,) = pictures(noise)
    for frame, ways in ((noise[:, 0].float(), floats), (image, images)):
        for own, theirs in ways.items():
            expected = by.Compose(theirs)(frame)
            assert torch.allclose(own(noise)[0], expected, atol=1e-5), own


def test_musiq_rates_frames_of_at_most_512_pixels(spaq: Path, tmp_path: Path) -> None:
    model, benchmark = Musiq(spaq, CPU), OFFICIAL["vbench"](root=str(tmp_path))
    with torch.no_grad():
        small = [model.model(NOISE[:, t][None].float() / 255).item() for t in range(3)]
    found = vbench.quality(model, benchmark, item(), NOISE[:, :3])
    assert found == pytest.approx(np.mean(small) / 100, abs=1e-6)
    large = NOISE[:, :1].repeat_interleave(13, 3)  # 40 x 832: 512 / 832 of it is 24 x 512
    with torch.no_grad():
        expected = model.model(interpolate(large[:, 0][None].float(), (24, 512), mode="bilinear") / 255).item()
    assert vbench.quality(model, benchmark, item(), large) == pytest.approx(expected / 100, abs=1e-6)


def test_niqe_is_of_frames_in_their_own_size(tmp_path: Path) -> None:
    arch = pytest.importorskip("pyiqa.archs.niqe_arch")
    io = pytest.importorskip("scipy.io")
    rows = np.random.default_rng(0).normal(size=(72, 36))
    parameters = {"mu_prisparam": rows.mean(0)[None], "cov_prisparam": np.cov(rows.T)}
    io.savemat(tmp_path / "niqe.mat", parameters)
    model = Niqe(tmp_path / "niqe.mat", CPU)
    clip = torch.randint(256, (3, 17, 192, 200), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for t in range(9):  # the source is shorter, and smaller
        write_image(tmp_path / "images" / f"{t}.png", clip[:, t, None, :64, :64])
    found = five.naturalness(
        model, OFFICIAL["five"](root=str(tmp_path), accept_licence=True), item(frames="images"), clip
    )
    theirs = arch.NIQE(pretrained_model_path=str(tmp_path / "niqe.mat"))
    expected = [theirs(clip[:, t][None].float() / 255).item() for t in (0, 8)]
    assert found == pytest.approx(np.mean(expected), rel=1e-6) and found > 0
    (tmp_path / "niqe.mat").write_bytes(b"nothing of Matlab")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Niqe(tmp_path / "niqe.mat", CPU)


def test_lpips_is_torchmetrics_over_the_given_backbone(squeezenet: Path, tmp_path: Path) -> None:
    before = torch.hub.get_dir()
    model = Lpips(squeezenet, CPU)
    assert torch.hub.get_dir() == before
    stored = torch.load(squeezenet)
    kept = {name: value for name, value in model.metric.net.state_dict().items() if name.startswith("net.")}
    assert sum(any(torch.equal(value, own) for own in stored.values()) for value in kept.values()) == len(kept) > 20
    a, b = (NOISE[:, t].float() / 127.5 - 1 for t in (0, 1))
    assert model.distance(a, a) == 0 and model.distance(a, b) > 0
    for t in range(9):
        write_image(tmp_path / "images" / f"{t}.png", NOISE[:, t, None])
        mask = torch.zeros(3, 1, 40, 64, dtype=torch.uint8)
        mask[..., :20] = 255
        write_image(tmp_path / "masks" / f"{t}.png", mask if t else mask + 255 - mask)
    benchmark = OFFICIAL["five"](root=str(tmp_path), accept_licence=True)
    one = item(frames="images", masks="masks")
    assert five.background(model, benchmark, one, NOISE) == 0
    other = NOISE.flip(3)
    pair = [clip[:, 8].float() / 255 for clip in (other, NOISE)]  # frame 0 is all mask
    for image in pair:
        image[..., :20] = 0
    expected = model.distance(*(image * 2 - 1 for image in pair))
    assert five.background(model, benchmark, one, other) == pytest.approx(expected, abs=1e-6) and expected > 0
    for file in (tmp_path / "masks").iterdir():
        write_image(file, torch.full((3, 1, 40, 64), 255, dtype=torch.uint8))
    assert five.background(model, benchmark, one, other) is None


def test_other_weights_are_refused(squeezenet: Path, spaq: Path) -> None:
    for kind, file in ((Musiq, squeezenet), (Lpips, spaq)):
        with pytest.raises(CheckpointError, match="the weights are not those of"):
            kind(file, CPU)
    spaq.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Musiq(spaq, CPU)
