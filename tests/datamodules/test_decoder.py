import os
import resource
import signal
import threading
import time
from io import BytesIO

import av
import hostile
import numpy as np
import pytest
import torch

from bernini.decoding import Limits, decode_video, open_video
from bernini.errors import DataError
from bernini.media import read_video
from datamodules.decoder import Decoder, decoder

KINDS = ("bit", "bytes", "zeros", "header", "cut")


@pytest.fixture(scope="module")
def child():
    decoder = Decoder(Limits(timeout=10))
    yield decoder
    decoder.close()


def memory(process: int, name: str) -> int:
    """Bytes of a line of the process's status."""
    with open(f"/proc/{process}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))


def mutated(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    at = int(rng.integers(8, len(data) - 8))
    if kind == "cut":
        return data[:at]
    if kind == "zeros":
        changed[at : at + 4096] = bytes(len(changed[at : at + 4096]))
    elif kind == "header":
        start = data.index(b"moov")
        changed[start + int(rng.integers(4, min(600, len(data) - start)))] ^= int(rng.integers(1, 256))
    else:
        for place in [at] if kind == "bit" else rng.integers(8, len(data), 20).tolist():
            changed[place] ^= 1 << int(rng.integers(8)) if kind == "bit" else int(rng.integers(1, 256))
    return bytes(changed)


def test_mutated_clips_neither_crash_nor_hang_and_are_named(child):
    """500 clips: header last, header first, in fragments. What only a hash can find is served here; nothing else is."""
    layouts = [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}]
    clips = [hostile.clip(frames=17, **options) for options in layouts]
    whole = [read_video(clip, decode=child).pixels for clip in clips]
    rng, base = np.random.default_rng(7), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = altered = 0
    for number in range(500):
        layout, kind, name = number % 3, KINDS[number % 5], f"shard-000000.tar:{number:08d}.v0.mp4"
        began = time.monotonic()
        try:
            pixels = read_video(mutated(clips[layout], kind, rng), decode=child, where=name).pixels
        except DataError as error:
            refused += 1
            assert error.where == name and error.what
            assert "longer than" not in error.why and "broke off" not in error.why
        else:
            altered += not torch.equal(pixels, whole[layout])
        assert time.monotonic() - began < 10
    assert torch.equal(read_video(clips[0], decode=child).pixels, whole[0]), "good clips are served as before"
    assert refused > 250 and altered > 0, (refused, altered)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base < 1 << 20, "KiB"
    assert child.process is not None and memory(child.process.pid, "VmHWM") < 1 << 30


def test_hostile_files_are_refused_before_anything_is_decoded(child):
    read_video(hostile.clip(), decode=child)
    count, started = 0, child.started
    for name, data in hostile.files():
        count += 1
        with pytest.raises(DataError) as error:  # noqa: SIM117
            with open_video(BytesIO(data), ".mp4", name, child.limits) as video:
                video.decode(range(video.probed.frames), pytest.fail)
        with pytest.raises(DataError) as theirs:
            read_video(data, decode=child, where=name)
        assert error.value.where == theirs.value.where == name
        assert error.value.what == theirs.value.what and error.value.fix, name
    assert count >= 100
    assert child.process is not None and memory(child.process.pid, "VmHWM") < 1 << 30
    assert child.started == started, "none of them has harmed the process"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile.clip("magicyuv", "mov"), "the codec magicyuv is not allowed"),
        (hostile.clip("h264", "matroska"), "does not begin as an MP4 does"),
        (hostile.TEXTS["hls"].encode(), "does not begin as an MP4 does"),
        (hostile.repeated(101, (16, 16)), "over 100 frames"),
        (hostile.repeated(3, (16, 16), gap=1000), "lasts 125 seconds"),
        (hostile.repeated(50, (208, 208)), "50 frames of 208x208 pixels are 6489600 bytes"),
        (hostile.repeated(1, (256, 256)), "a frame of 256x256 pixels"),
    ],
)
def test_each_refusal_says_its_rule(data, message):
    limits = Limits(pixels=50_000, frames=100, seconds=20, decoded=6_000_000)
    with pytest.raises(DataError, match=message):
        decode_video(data, lambda probed: range(probed.frames), "a.mp4", limits)


def test_a_frame_that_is_larger_than_its_header_says_is_not_allocated():
    small, large = hostile.clip(size=(64, 64)), hostile.clip(size=(1024, 1024))
    avcc = slice(small.index(b"avcC") + 4, small.index(b"avcC") + 4 + 40)
    theirs = slice(large.index(b"avcC") + 4, large.index(b"avcC") + 4 + 40)
    lying = bytearray(large)
    lying[theirs] = small[avcc]
    with pytest.raises(DataError):
        decode_video(bytes(lying), lambda probed: range(probed.frames), "a.mp4", Limits(pixels=10_000))


def test_a_process_that_hangs_or_dies_is_replaced_and_the_file_named():
    clip, long = hostile.clip(), hostile.repeated(201, (1024, 1024))
    child = Decoder(Limits(timeout=1))
    whole = read_video(clip, decode=child).pixels
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DataError, match="it took longer than 1 seconds") as error:
        read_video(clip, decode=child, where="one.tar:key.v0.mp4")
    assert error.value.where == "one.tar:key.v0.mp4" and 1 <= time.monotonic() - began < 5
    assert torch.equal(read_video(clip, decode=child).pixels, whole) and child.started == 2
    killer = threading.Timer(0.1, os.kill, (child.process.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(DataError, match="its process ended by SIGKILL") as error:
        read_video(long, decode=child, where="two.tar:key.v0.mp4")
    assert error.value.where == "two.tar:key.v0.mp4"
    assert torch.equal(read_video(clip, decode=child).pixels, whole) and child.started == 3
    child.close()


def test_memory_is_capped():
    child = Decoder(Limits(memory=96 << 20))
    with pytest.raises(DataError, match="cannot be decoded: out of memory"):
        read_video(hostile.repeated(9, (5120, 5120)), decode=child, where="a.mp4")
    assert read_video(hostile.clip(), decode=child).pixels.shape == (3, 5, 48, 64)
    child.close()


def test_the_process_knows_no_secrets_and_a_fork_has_its_own(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    child = Decoder(Limits())
    read_video(hostile.clip(), decode=child)
    assert child.process is not None
    with open(f"/proc/{child.process.pid}/environ") as environment:
        assert "s3cret" not in environment.read()
    child.close()
    mine = decoder(Limits())
    assert decoder(Limits()) is mine
    if (fork := os.fork()) == 0:
        os._exit(int(decoder(Limits()) is mine))
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0


def test_frames_at_changing_rates_are_taken_by_their_time(tmp_path):
    """Five frames whose times are 0, 1, 2, 6 and 7 sixteenths: numbers 3 and 4 of eight are nearest to the third."""
    shades = [20, 60, 100, 140, 180]
    path = tmp_path / "changing.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264rgb", rate=16, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
        for shade, at in zip(shades, [0, 1, 2, 6, 7], strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), shade, np.uint8), format="rgb24")
            frame.pts = at
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    read = read_video(path, fps=16)
    assert read.source["sampled"] == 8
    assert read.pixels[0, :8, 0, 0].tolist() == [20, 60, 100, 100, 140, 140, 140, 180]


def test_a_clip_that_is_turned_by_half_a_right_angle_is_refused(tmp_path):
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.set_display_rotation(45)
        output.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(stream.encode(None))
    with pytest.raises(DataError, match="the clip is turned by 45 degrees"):
        read_video(path)
