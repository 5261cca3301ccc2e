"""`bernini prepare --from-parquet`: rows of the released trainer's files, and what is refused in them."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import fit, make_config, make_conversation
from planners import VISION, make_planner

from bernini.cli import main
from bernini.conversation import Conversation
from bernini.media import write_image, write_video
from bernini.planner.features import ViTEncoder
from bernini.planner.model import save_planner
from bernini.planner.settings import PlannerSettings
from bernini.planner.vision import VisionConfig
from bernini.vae.codec import LatentCodec
from datamodules.prepare import BAD_SAMPLES
from datamodules.shards import Shards

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def blob(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny planner, for its vision tower."""
    folder = tmp_path_factory.mktemp("planner")
    save_planner(make_planner().planner, folder)
    PlannerSettings(vision=VisionConfig(**VISION)).save(folder)
    return folder


@pytest.fixture(scope="module")
def samples(wan: Path, planner: Path) -> list[Conversation]:
    """Samples with pixels and all features."""
    codec = LatentCodec.from_pretrained(wan)
    made = [make_conversation(seed, task) for seed, task in enumerate(("rv2v", "v2v", "t2i", "rv2v"))]
    ViTEncoder.from_pretrained(str(planner), None, torch.device("cpu")).add_features(made, torch.float32)
    for sample in made:
        for media in sample.media():
            assert media.pixels is not None
            media.posterior = codec.posterior(media.pixels)
    return made


def to_rows(samples: list[Conversation], features: bool = True) -> list[dict[str, Any]]:
    """Rows as the released preprocessing writes them."""
    rows = []
    for number, sample in enumerate(samples):
        row = {**sample.to_row(), "source_name": f"{sample.task}$toy"}
        del row["task"]
        row["images"] = [f"{number}.{i}.png" for i in range(len(row["images"]))]
        row["videos"] = [{"video_path": f"{number}.{i}.mp4", "crop_method": "left"} for i in range(len(row["videos"]))]
        for kind in ("image", "video") if features else ():
            seen = [m.media for m in sample.visual if m.type.startswith(kind) and m.media]
            row[f"{kind}_vae_latents"] = [blob(media.posterior[None]) for media in seen]
            row[f"{kind}_embeds"] = [blob(media.visual.features) for media in seen]
            row[f"{kind}_grid_thw"] = [list(media.visual.grid) for media in seen]
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def convert(given: Path, out: Path, *more: str) -> Shards:
    assert main(["prepare", "--from-parquet", str(given), str(out), *more]) == 0
    return Shards(out)


def test_rows_keep_every_bit(samples: list[Conversation], planner: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.parquet", to_rows(samples[:3]))
    write(tmp_path / "rows" / "b.parquet", to_rows(samples[3:]))
    shards = convert(tmp_path / "rows", tmp_path / "out", "--planner", str(planner))
    assert [entry.key for entry in shards.entries] == [f"{number:08d}" for number in range(4)]
    for number, sample in enumerate(samples):
        read = shards.read(number)
        assert (read.task, read.prompt) == (sample.task, sample.prompt)
        assert [m.type for m in read.messages] == [m.type for m in sample.messages]
        for given, made in zip(sample.visual, read.visual, strict=True):
            assert given.media and given.media.visual and made.media and made.media.visual
            assert torch.equal(made.media.posterior, given.media.posterior) and made.media.pixels is None
            assert torch.equal(made.media.visual.features, given.media.visual.features)
            assert made.media.visual.grid == given.media.visual.grid
            assert made.media.visual.tower == given.media.visual.tower
            assert made.media.fps == (16 if made.is_video else 0)
            assert made.media.source["frames"] == given.media.pixels.shape[1]
            assert made.media.source["sampled"] == made.media.source["frames"]


def test_a_renderer_trains_on_rows(samples: list[Conversation], wan: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", to_rows(samples))
    shards = convert(file, tmp_path / "out", "--text", str(wan))
    first = shards.read(0)
    assert first.text_features["text"].shape[1] == 12
    assert all(media.visual is None for media in first.media())  # no planner was named that could read them
    (record,) = fit(make_config(wan, tmp_path / "out", tmp_path / "run"))
    assert len(record["losses"]) == 2 and all(0 < loss < 10 for loss in record["losses"])


def test_rows_without_features_are_read_from_their_files(
    samples: list[Conversation], wan: Path, tmp_path: Path
) -> None:
    for number, sample in enumerate(samples):
        for kind, suffix, save in (("image", "png", write_image), ("video", "mp4", write_video)):
            clips = [m.media.pixels for m in sample.visual if m.type.startswith(kind) and m.media]
            for n, pixels in enumerate(clips):
                assert pixels is not None
                rate = (16,) if kind == "video" else ()
                save(tmp_path / f"{number}.{n}.{suffix}", pixels, *rate)  # type: ignore[operator]
    file = write(tmp_path / "a.parquet", to_rows(samples, features=False))
    shards = convert(file, tmp_path / "out", "--vae", str(wan))
    for number, sample in enumerate(samples):
        for given, made in zip(sample.media(), shards.read(number).media(), strict=True):
            assert given.posterior is not None and made.posterior is not None
            assert made.posterior.shape == given.posterior.shape


def test_features_of_another_vae_or_tower_are_refused(
    samples: list[Conversation], wan: Path, planner: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = to_rows(samples)
    rows[1]["video_vae_latents"] = [blob(torch.zeros(1, 32, 2, 4, 4)) for _ in range(2)]
    args = ["prepare", "--from-parquet", str(write(tmp_path / "a.parquet", rows)), str(tmp_path / "out")]
    assert main([*args, "--vae", str(wan)]) == 77
    assert "this VAE's posteriors are [8, frames" in capsys.readouterr().err
    rows[1]["video_embeds"] = [blob(torch.zeros(tokens, 31)) for tokens in (4, 4)]
    rows[1]["video_grid_thw"] = [[1, 4, 4], [1, 4, 4]]
    write(tmp_path / "a.parquet", rows)
    assert main([*args, "--planner", str(planner)]) == 77
    assert "embeddings have 31 columns, the planner's tower makes 32" in capsys.readouterr().err


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def deflated(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


LATENT = torch.zeros(1, 8, 2, 4, 4)
HOSTILE = {
    "code": (lambda run: blob(Hostile(run)), "weights only"),
    "code in a list": (lambda run: blob([LATENT, Hostile(run)]), "weights only"),
    "a pickle": (lambda run: pickle.dumps(Hostile(run)), "torch.save only"),
    "the old format": (lambda run: blob(Hostile(run), _use_new_zipfile_serialization=False), "torch.save only"),
    "a module": (lambda _: blob(torch.nn.Linear(2, 2)), "weights only"),
    "text": (lambda _: b"pipe:touch x", "torch.save only"),
    "nothing": (lambda _: b"", "torch.save only"),
    "cut short": (lambda _: blob(LATENT)[:-100], "torch.save only"),
    "another archive": (lambda _: deflated(blob({})).replace(b"data.pkl", b"data.xxx"), "no bombs"),
    "a bomb": (lambda _: deflated(blob(torch.zeros(1, 8, 16, 256, 256))), "no bombs"),
    "a bomb of views": (lambda _: blob(torch.zeros(1).expand(1, 8, 1024, 1024, 1024)), "no bombs"),
    "a meta tensor": (lambda _: blob(torch.zeros(1, 8, 2, 4, 4, device="meta")), "one tensor"),
    "a sparse tensor": (lambda _: blob(LATENT.to_sparse()), "one tensor"),
    "a parameter": (lambda _: blob(torch.nn.Parameter(LATENT)), "one tensor"),
    "a list": (lambda _: blob([LATENT]), "one tensor"),
    "a mapping": (lambda _: blob({"latent": LATENT}), "one tensor"),
    "whole numbers": (lambda _: blob(LATENT.long()), "one tensor"),
    "not finite": (lambda _: blob(LATENT / 0), "one tensor"),
    "another shape": (lambda _: blob(LATENT[0]), "the shape [8, 2, 4, 4]"),
    "odd channels": (lambda _: blob(LATENT[:, :7]), "the shape [1, 7, 2, 4, 4]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_blobs_are_refused_by_name(samples: list[Conversation], tmp_path: Path, capsys: Any, name: str) -> None:
    make, rule = HOSTILE[name]
    ran = tmp_path / "ran"
    rows = to_rows(samples[:3])
    rows[1]["video_vae_latents"][1] = make(f"touch {ran}")
    file = write(tmp_path / "a.parquet", rows)
    args = ["prepare", "--from-parquet", str(file), str(tmp_path / "out")]
    assert main(args) == 77
    error = capsys.readouterr().err
    assert rule in error and "a.parquet, row group 0, row 1, video_vae_latents[1]" in error
    assert "--skip-bad" in error and "Traceback" not in error and not ran.exists()
    assert main([*args, "--skip-bad"]) == 0
    assert [entry.key for entry in Shards(tmp_path / "out").entries] == ["00000000", "00000002"]
    (bad,) = map(json.loads, (tmp_path / "out" / BAD_SAMPLES).read_text().splitlines())
    assert bad["key"] == "00000001" and not ran.exists()


def test_embeddings_are_of_their_grid(samples: list[Conversation], planner: Path, tmp_path: Path, capsys: Any) -> None:
    for number, grid in enumerate(([2, 4], [2, 4, 5], [0, 4, 4], [-2, -4, 4])):
        rows = to_rows(samples[:2])
        rows[0]["video_grid_thw"][0] = grid
        file, out = write(tmp_path / f"{number}.parquet", rows), tmp_path / f"out{number}"
        assert main(["prepare", "--from-parquet", str(file), str(out), "--planner", str(planner)]) == 77
        error = capsys.readouterr().err
        assert f"for a grid of {grid}" in error and "row 0, video_embeds[0]" in error


def test_files_that_are_none(samples: list[Conversation], tmp_path: Path, capsys: Any) -> None:
    def refused(given: Path, message: str, code: int = 77) -> None:
        assert main(["prepare", "--from-parquet", str(given), str(tmp_path / "out")]) == code
        error = capsys.readouterr().err
        assert message in error and given.name in error and "Traceback" not in error

    refused(tmp_path / "none.parquet", "no parquet file here", 78)
    (tmp_path / "text.parquet").write_text("PAR1 is how it would begin")
    refused(tmp_path / "text.parquet", "the file cannot be read")
    refused(write(tmp_path / "other.parquet", [{"caption": "x"}]), "no column `inputs`")
    rows = to_rows(samples)
    rows[0]["video_vae_latents"] = rows[0]["video_vae_latents"][:1]
    refused(write(tmp_path / "short.parquet", rows), "1 video_vae_latents for 2 messages")
    rows = to_rows(samples)
    rows[0]["inputs"] = "{"
    refused(write(tmp_path / "json.parquet", rows), "not in the released format")
    whole = write(tmp_path / "whole.parquet", to_rows(samples)).read_bytes()
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    refused(damaged, "the rows cannot be read")
