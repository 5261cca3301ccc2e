"""Scores by models with tiny random weights, against torchmetrics, Pillow and the formulas written out."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import WIDTH, write_clip, write_dino, write_dinov2, write_head
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, ViTModel

from benchmarks.quality.interface import Expectation, Item
from benchmarks.quality.metrics import likeness
from benchmarks.quality.metrics.encoders import Clip, Dino, Dinov2, Rated
from benchmarks.quality.metrics.preparing import CLIP, IMAGENET, Preparation
from benchmarks.quality.models import five
from benchmarks.quality.models.base import PILLOW_CLIP
from benchmarks.quality.models.registry import MEASURES
from benchmarks.quality.models.vbench import FOR_CLIP, FOR_DINO
from benchmarks.quality.official.needs import Weights
from benchmarks.quality.official.registry import OFFICIAL
from bernini.errors import CheckpointError, DataError
from bernini.media import write_image

CPU = torch.device("cpu")
NOISE = torch.randint(256, (3, 6, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TEXT = "a cat, red."


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_clip(root / "clip")
    write_dino(root / "dino")
    write_dino(root / "dino8", patch=8)
    write_dinov2(root / "dinov2")
    write_head(root / "head.pth")
    return root


def asked(length: int = 6, **extra: object) -> Item:
    return Item("one", "v2v", TEXT, Expectation(length, 40, 64, 8.0), (), extra={"target_prompt": TEXT, **extra})


class Plain(CLIPModel):
    """A CLIP that gives features as tensors, which is what torchmetrics knows."""

    def get_image_features(self, *args: Any, **more: Any) -> Tensor:
        return tensor(super().get_image_features(*args, **more))

    def get_text_features(self, *args: Any, **more: Any) -> Tensor:
        return tensor(super().get_text_features(*args, **more))


def tensor(features: Any) -> Tensor:
    return getattr(features, "pooler_output", features)


def frames(clip: Tensor) -> list[np.ndarray]:
    return [frame.numpy() for frame in clip.permute(1, 2, 3, 0)]


# -- what a model is shown -------------------------------------------------------------------------------------------


def test_pixels_are_resized_as_images_and_cut_from_the_middle() -> None:
    expected = []
    for frame in frames(NOISE):
        image = Image.fromarray(frame).resize((358, 224), Image.Resampling.BICUBIC)
        expected.append(np.asarray(image.crop((67, 0, 291, 224))).transpose(2, 0, 1) / 255)
    mean, deviation = (np.array(values)[:, None, None] for values in CLIP)
    np.testing.assert_allclose(PILLOW_CLIP(NOISE).numpy(), (np.array(expected) - mean) / deviation, atol=1e-5)


def test_floats_are_resized_without_rounding_and_keep_their_shape_where_nothing_is_cut() -> None:
    found = FOR_DINO(NOISE)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    small = interpolate(NOISE.permute(1, 0, 2, 3).double(), (224, 358), mode="bilinear") / 255
    assert torch.allclose(found.double(), (small - mean) / deviation, atol=1e-4)  # places are float32
    upright = FOR_DINO(NOISE.transpose(2, 3))
    assert upright.shape == (6, 3, 358, 224) and torch.allclose(upright, found.transpose(2, 3), atol=1e-5)


@pytest.mark.parametrize(("size", "shape"), [((40, 64), (224, 358)), ((10, 50), (96, 480)), ((50, 10), (480, 96))])
def test_a_longest_edge_shortens_the_other(size: tuple[int, int], shape: tuple[int, int]) -> None:
    shown = Preparation(224, "bilinear", "torch_antialias", longest=480, scale=1.0)(NOISE[:, :1].new_zeros(3, 1, *size))
    assert shown.shape[2:] == shape
    with pytest.raises(DataError, match="uint8"):
        FOR_CLIP(NOISE.float())


# -- formulas --------------------------------------------------------------------------------------------------------


def test_consistency_is_the_formula_frame_by_frame() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(max(0.0, unit[i] @ unit[i - 1]), max(0.0, unit[i] @ unit[0])) for i in range(1, 7)]
    rows = torch.from_numpy(features)
    assert likeness.consistency(rows) == pytest.approx(np.mean([(a + b) / 2 for a, b in pairs]), abs=1e-6)
    assert likeness.adjacent(rows) == pytest.approx(np.mean([a for a, _ in pairs]), abs=1e-6)
    image = unit[3] + 0.3
    to_image = [max(0.0, row @ image / np.linalg.norm(image)) for row in unit]
    between = [a for a, _ in pairs]
    expected = 0.4 * max(to_image) + 0.3 * np.mean(between) + 0.3 * min(between)
    assert likeness.conformity(torch.from_numpy(image)[None], rows) == pytest.approx(expected, abs=1e-6)
    for figure in (likeness.consistency, likeness.adjacent):
        with pytest.raises(DataError, match="at least 2"):
            figure(rows[:1])


def test_equal_frames_are_perfectly_consistent(weights: Path) -> None:
    still = NOISE[:, :1].expand(3, 6, 40, 64)
    dino, clip = Dino(weights / "dino", CPU), Clip(weights / "clip", CPU)
    assert likeness.consistency(dino.features(FOR_DINO(still))) == pytest.approx(1, abs=1e-6)
    assert likeness.consistency(clip.images(FOR_CLIP(still))) == pytest.approx(1, abs=1e-6)
    assert likeness.adjacent(Dinov2(weights / "dinov2", CPU).features(still)) == pytest.approx(1, abs=1e-6)
    assert likeness.consistency(dino.features(FOR_DINO(NOISE))) < 0.999, "other frames are told apart"
    (keys,) = dino.keys(FOR_DINO(NOISE[:, :1]))
    assert likeness.structure_distance(keys, keys) == 0


# -- CLIP ------------------------------------------------------------------------------------------------------------


def test_text_and_images_score_as_by_torchmetrics(weights: Path) -> None:
    clip = Clip(weights / "clip", CPU)

    def built() -> tuple[CLIPModel, CLIPProcessor]:
        folder = weights / "clip"
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        return Plain.from_pretrained(folder), CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), tokenizer)

    for text in (TEXT, "a." * 60):  # the second has more tokens than places
        features = clip.images(clip.shown([Image.fromarray(frame) for frame in frames(NOISE)]))
        own = 100 * likeness.cosines(features, clip.text(text, ends=False))[:, 0]
        for t, value in enumerate(own.clamp(min=0).tolist()):
            assert value == pytest.approx(clip_score(NOISE[:, t], text, built).item(), abs=1e-4)
    pair = 100 * likeness.cosines(features[:1], features[1:2]).item()
    assert pair == pytest.approx(clip_score(NOISE[:, 0], NOISE[:, 1], built).item(), abs=1e-4)


def test_a_text_that_is_cut_keeps_its_end(weights: Path) -> None:
    clip, long = Clip(weights / "clip", CPU), "a." * 60
    whole = clip.tokenizer([long], truncation=True, max_length=77, return_tensors="pt")
    assert whole.input_ids[0, -1] == clip.model.config.text_config.eos_token_id
    with torch.no_grad():
        expected = tensor(clip.model.get_text_features(**whole))
    assert torch.equal(clip.text(long), expected) and not torch.equal(clip.text(long, ends=False), expected)


@pytest.mark.parametrize("widths", [(WIDTH, 1), (WIDTH, 8, 4, 1)])
def test_a_head_rates_features_of_length_one(weights: Path, tmp_path: Path, widths: tuple[int, ...]) -> None:
    file = write_head(tmp_path / "head.pth", widths)
    rated = Rated(weights / "clip", file, CPU)
    with torch.no_grad():
        rows = tensor(rated.model.get_image_features(FOR_CLIP(NOISE))).numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    stored = list(torch.load(file).values())
    for weight, bias in zip(stored[::2], stored[1::2], strict=True):
        rows = rows @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(rated.ratings(FOR_CLIP(NOISE)).numpy(), rows[:, 0], atol=1e-4)
    assert rated.ratings(FOR_CLIP(NOISE)).mean().item() == pytest.approx(5, abs=3)


def test_batches_make_no_difference(weights: Path) -> None:
    clip, many = Clip(weights / "clip", CPU), NOISE.repeat(1, 6, 1, 1)
    features = clip.images(FOR_CLIP(many))
    assert len(features) == 36 and torch.allclose(features[30:], features[:6], atol=1e-5)


# -- DINO ------------------------------------------------------------------------------------------------------------


def test_dino_sees_a_square_as_transformers_does_and_other_shapes_as_its_authors(weights: Path) -> None:
    dino, model = Dino(weights / "dino", CPU), ViTModel.from_pretrained(weights / "dino", add_pooling_layer=False)
    square = FOR_DINO(NOISE[:, :, :, :40])
    with torch.no_grad():
        assert torch.allclose(dino.features(square), model(pixel_values=square).last_hidden_state[:, 0], atol=1e-5)
    wide = FOR_DINO(NOISE)
    stored = model.embeddings.position_embeddings[:, 1:].detach()
    # The authors' formula: scales are (14 + 0.1) / 14 and (22 + 0.1) / 14.
    grid = stored.reshape(1, 14, 14, 16).permute(0, 3, 1, 2)
    places = interpolate(grid, scale_factor=(14.1 / 14, 22.1 / 14), mode="bicubic").permute(0, 2, 3, 1).reshape(308, 16)
    with torch.no_grad():
        bare = model.embeddings.patch_embeddings.projection(wide).flatten(2).transpose(1, 2)
        expected = bare + places
        found = dino.model.embeddings(wide, interpolate_pos_encoding=True)[:, 1:]
        theirs = model.embeddings(wide, interpolate_pos_encoding=True)[:, 1:]
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, theirs, atol=1e-3)


def test_structure_distance_is_of_keys_of_the_last_layer(weights: Path, tmp_path: Path) -> None:
    """FiVE's figure written out: cosines among all places of each image, and their squared difference."""
    dino, image = Dino(weights / "dino8", CPU), five.FOR_DINO(NOISE[:, :2, :32, :32])
    layer = dino.model.layers[-1]
    inputs: list[Tensor] = []
    layer.attention.register_forward_pre_hook(lambda module, args, kwargs: inputs.extend(args), with_kwargs=True)
    keys = dino.keys(image)
    weight = layer.attention.k_proj
    expected = (inputs[0] @ weight.weight.T + weight.bias).detach()
    assert keys.shape == (2, 1 + 28 * 28, 16) and torch.allclose(keys, expected, atol=1e-5)
    rows = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in keys.double().numpy()]
    by_hand = np.mean((rows[0] @ rows[0].T - rows[1] @ rows[1].T) ** 2)
    assert likeness.structure_distance(*keys) == pytest.approx(by_hand, rel=1e-6) and by_hand > 0


# -- scores of items ---------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten().numpy(), b.double().flatten().numpy()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_editverse_compares_frames_with_neighbours_and_the_target_prompt(weights: Path, tmp_path: Path) -> None:
    benchmark, item = OFFICIAL["editverse"](root=str(tmp_path), accept_licence=True), asked()
    clip, measures = Clip(weights / "clip", CPU), MEASURES["editverse"]
    model, processor = clip.model, CLIPImageProcessorPil.from_pretrained(weights / "clip")

    def features(images: list[Image.Image]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [processor(images=image, return_tensors="pt").pixel_values for image in images]
        with torch.no_grad():
            pooled = [model.vision_model(pixel_values=one).pooler_output for one in inputs]
            return pooled, [tensor(model.get_image_features(pixel_values=one)) for one in inputs]

    pooled, projected = features([Image.fromarray(frame) for frame in frames(NOISE)])
    scale, text = float(model.logit_scale.exp().item()), clip.text(TEXT)
    found = {name: measures[name].score(clip, benchmark, item, NOISE) for name in ("clip_tc", "frame_text", "pick")}
    assert found["clip_tc"] == pytest.approx(np.mean([cosine(a, b) for a, b in pairwise(pooled)]), abs=1e-6)
    assert found["frame_text"] == pytest.approx(scale * np.mean([cosine(f, text) for f in projected]), abs=1e-4)
    assert found["pick"] == pytest.approx(found["frame_text"], abs=1e-9), "small frames are not shrunk"
    large = NOISE[:, :1].repeat_interleave(13, 3)  # 40 x 832: 672 / 832 of it is 32 x 672
    _, (small,) = features([Image.fromarray(frames(large)[0]).resize((672, 32), Image.Resampling.BICUBIC)])
    score = measures["pick"].score(clip, benchmark, item, large)
    assert score == pytest.approx(scale * cosine(small, text), abs=1e-4)


def test_vbench_i2v_compares_frames_with_the_given_image(weights: Path, tmp_path: Path) -> None:
    benchmark, dino = OFFICIAL["vbench_i2v"](root=str(tmp_path)), Dino(weights / "dino", CPU)
    write_image(tmp_path / "crop" / "a.png", NOISE[:, :1])
    item, measure = asked(images=["crop/a.png"]), MEASURES["vbench_i2v"]["i2v_subject"]
    shown = Preparation(256, "bicubic", "torch_antialias", crop=224)(NOISE)
    image = Preparation(256, "bicubic", "pillow", crop=224)(NOISE[:, :1])
    assert image.shape == (1, 3, 224, 224) and not torch.equal(image, shown[:1]), "Pillow rounds, torch does not"
    rows, given = dino.features(shown), dino.features(image)
    best = max(cosine(row, given) for row in rows)
    between = [cosine(a, b) for a, b in pairwise(rows)]
    expected = 0.4 * best + 0.3 * np.mean(between) + 0.3 * min(between)
    assert measure.score(dino, benchmark, item, NOISE) == pytest.approx(expected, abs=1e-6)


def test_style_and_ratings_are_means_over_frames(weights: Path, tmp_path: Path) -> None:
    clip, rated = Clip(weights / "clip", CPU), Rated(weights / "clip", weights / "head.pth", CPU)
    vbench, opens2v = OFFICIAL["vbench"](root=str(tmp_path)), OFFICIAL["opens2v"](root=str(tmp_path))
    item = asked(auxiliary_info={"appearance_style": {"appearance_style": "oil, red"}})
    style = [cosine(row, clip.text("oil, red")) for row in clip.images(PILLOW_CLIP(NOISE))]
    found = MEASURES["vbench"]["appearance_style"].score(clip, vbench, item, NOISE)
    assert found == pytest.approx(clip.scale / 100 * np.mean(style), abs=1e-6)
    found = MEASURES["vbench"]["aesthetic_quality"].score(rated, vbench, item, NOISE)
    assert found == pytest.approx(rated.ratings(FOR_CLIP(NOISE)).mean().item() / 10, abs=1e-6)
    images = [Image.fromarray(frame) for frame in frames(NOISE)]
    ratings = rated.ratings(rated.shown([images[int(t)] for t in np.linspace(0, 5, 32, dtype=int)]))
    found = MEASURES["opens2v"]["aesthetics"].score(rated, opens2v, item, NOISE)
    assert found == pytest.approx(ratings.mean().item(), abs=1e-6)


# -- FiVE ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seventeen frames of a source with masks, of which the second that is compared is empty."""
    for t in range(17):
        write_image(tmp_path / "images" / f"{t:05d}.png", NOISE[:, t % 6, None])
        mask = torch.zeros(3, 1, 40, 64, dtype=torch.uint8)
        mask[..., :20] = 255 * (t != 8)
        write_image(tmp_path / "masks" / f"{t:05d}.png", mask)
    return tmp_path


def test_frames_are_compared_with_the_sources_own(weights: Path, source: Path) -> None:
    (source / "none").mkdir()
    benchmark = OFFICIAL["five"](root=str(source), accept_licence=True)
    item = asked(17, frames="images", masks="masks")
    dino, clip = Dino(weights / "dino8", CPU), Clip(weights / "clip", CPU)
    same = torch.stack([NOISE[:, t % 6] for t in range(17)], 1)
    assert five.structure(dino, benchmark, item, same) == pytest.approx(0, abs=1e-9)
    other = same.flip(3)
    assert five.structure(dino, benchmark, item, other) > 1e-6
    shown = [Image.fromarray(frame) for frame in frames(other[:, ::8])]
    scores = 100 * likeness.cosines(clip.images(clip.shown(shown)), clip.text(TEXT)).clamp(min=0)
    assert five.whole(clip, benchmark, item, other) == pytest.approx(scores.mean().item(), abs=1e-4)
    black = []
    for frame in frames(other[:, [0, 16]]):  # the mask of frame 8 is empty
        frame = frame.copy()
        frame[:, 20:] = 0
        black.append(Image.fromarray(frame))
    scores = 100 * likeness.cosines(clip.images(clip.shown(black)), clip.text(TEXT)).clamp(min=0)
    assert five.edited(clip, benchmark, item, other) == pytest.approx(scores.mean().item(), abs=1e-4)
    for mask in (source / "masks").iterdir():
        write_image(mask, torch.zeros(3, 1, 40, 64, dtype=torch.uint8))
    assert five.edited(clip, benchmark, item, other) is None
    with pytest.raises(DataError, match="there are no frames of the source"):
        five.whole(clip, benchmark, asked(frames="none", masks="masks"), other)


# -- files -----------------------------------------------------------------------------------------------------------


def test_each_score_that_models_give_says_what_weights_it_takes() -> None:
    for name, measures in MEASURES.items():
        kind = OFFICIAL[name]
        assert measures.keys() <= kind.metrics.keys()
        for score in measures:
            assert kind.needs[score] and all(isinstance(need, Weights) for need in kind.needs[score])


@pytest.mark.parametrize(
    ("kind", "folder", "why"),
    [
        (Clip, "dino", "of 'vit', not 'clip'"),
        (Dino, "clip", "of 'clip', not 'vit'"),
        (Dinov2, "none", "no config.json"),
    ],
)
def test_a_folder_of_other_weights_is_refused(weights: Path, kind: type, folder: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        kind(weights / folder, CPU)
    assert str(weights / folder) in str(caught.value) and "fix:" in str(caught.value)


def test_damaged_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = write_dino(tmp_path / "dino")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Dino(folder, CPU)
    config = json.loads((weights / "dino" / "config.json").read_text())
    half = write_dino(tmp_path / "half")
    (half / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="tensors are missing"):
        Dino(half, CPU)
    mute = write_clip(tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="the tokenizer has 2 tokens, the model 58"):
        Clip(mute, CPU)
    clip = write_clip(tmp_path / "clip")
    (clip / "preprocessor_config.json").unlink(missing_ok=True)
    (clip / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Clip(clip, CPU)


@pytest.mark.parametrize("widths", [(WIDTH + 1, 1), (WIDTH, 2), (WIDTH, 8, 1, 1, 2)])
def test_a_head_that_does_not_fit_is_refused(weights: Path, tmp_path: Path, widths: tuple[int, ...]) -> None:
    file = write_head(tmp_path / "head.pth", widths)
    with pytest.raises(CheckpointError, match=f"one rating of {WIDTH} features"):
        Rated(weights / "clip", file, CPU)
    file.write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Rated(weights / "clip", file, CPU)
    assert math.isfinite(Rated(weights / "clip", weights / "head.pth", CPU).ratings(FOR_CLIP(NOISE)).sum())
