"""Files that call themselves MP4 and are not, or are one that must not be decoded."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from tempfile import NamedTemporaryFile

import av
import numpy as np

RATE = 16
FOREIGN = {"avi": "h264", "matroska": "h264", "webm": "vp8", "flv": "h264", "mpegts": "h264", "nut": "h264",
           "gif": "gif", "h264": "h264", "mpeg": "mpeg1video", "ivf": "vp8", "ogg": "vp8", "asf": "mpeg4",
           "mjpeg": "mjpeg", "yuv4mpegpipe": "rawvideo", "apng": "apng"}  # fmt: skip
CODECS = {"mpeg1video": "mp4", "mpeg2video": "mp4", "mjpeg": "mp4", "png": "mp4", "ffv1": "mp4", "jpeg2000": "mov",
          "prores_ks": "mov", "qtrle": "mov", "rawvideo": "mov", "magicyuv": "mov", "cinepak": "mov", "dvvideo": "mov",
          "h263": "mov", "tiff": "mov", "targa": "mov", "svq1": "mov", "r210": "mov", "v210": "mov", "cfhd": "mov",
          "gif": "mov", "rpza": "mov"}  # fmt: skip
TEXTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "hls-http": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret\n",
    "hls-concat": "#EXTM3U\n#EXTINF:1,\nconcat:/etc/passwd|/etc/hosts\n",
    "concat": "ffconcat version 1.0\nfile /etc/passwd\n",
    "dash": '<?xml version="1.0"?><MPD><Period><BaseURL>file:///etc/</BaseURL></Period></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": "<html><video src='file:///etc/passwd'></html>",
    "script": "#!/bin/sh\ntouch /tmp/run\n",
    "empty": "",
    "short": "ftyp",
    "zeros": "\0" * 4096,
}  # fmt: skip


def clip(
    codec: str = "h264", container: str = "mp4", frames: int = 5, size: tuple[int, int] = (48, 64), **options: str
) -> bytes:
    """A clip of noise that changes, by the encoder of that name."""
    file = NamedTemporaryFile(suffix=f".{container}")  # noqa: SIM115  (one layout is written in two passes)
    encoder = {"h264": "libx264", "vp8": "libvpx"}.get(codec, codec)
    noise = np.random.default_rng(0)
    with file, av.open(file.name, "w", format=container, options=options) as output:
        known = av.Codec(encoder, "w").video_formats
        stream = output.add_stream(encoder, rate=25 if codec in ("mpeg1video", "mpeg2video", "dvvideo") else RATE)
        stream.height, stream.width = size
        plain = not known or (codec != "mjpeg" and any(f.name == "yuv420p" for f in known))
        stream.pix_fmt = "yuv420p" if plain else known[0].name
        for number in range(frames):
            array = noise.integers(0, 60, (size[0] // 4, size[1] // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            frame = av.VideoFrame.from_ndarray(array + np.uint8(5 * number % 190), format="rgb24")
            output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        output.mux(stream.encode(None))
        output.close()
        return file.read()


def repeated(frames: int, size: tuple[int, int], gap: int = 1) -> bytes:
    """A small file that claims many frames, or frames that are far apart: one packet, muxed again and again."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "tune": "zerolatency"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        black = av.VideoFrame(size[1], size[0], "yuv420p")
        for plane in black.planes:
            plane.update(bytes(plane.buffer_size))
        (packet,) = stream.encode(black)
        data, base = bytes(packet), Fraction(1, RATE)
        for number in range(frames):
            again = av.Packet(data)
            again.stream, again.time_base, again.is_keyframe = stream, base, True
            again.pts = again.dts = number * gap
            output.mux(again)
    return file.getvalue()


def sound() -> bytes:
    """A clip without a picture."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def files() -> Iterator[tuple[str, bytes]]:
    """Hostile files by name, none of which may be decoded."""
    begin = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 512, b"isom")
    foreign = {name: clip(codec, name) for name, codec in FOREIGN.items()}
    foreign |= {name: text.encode() for name, text in TEXTS.items()}
    for name, data in foreign.items():
        yield f"{name} as it is", data
        yield f"{name} behind the first box of an MP4", begin + data
        yield f"{name} in the second box of an MP4", begin + struct.pack(">I4s", 8 + len(data), b"mdat") + data
    for codec, container in CODECS.items():
        yield f"codec {codec}", clip(codec, container, size=(576, 720) if codec == "dvvideo" else (288, 352))
    yield "frames", repeated(100_001, (16, 16))
    yield "seconds", repeated(2, (16, 16), gap=10 * 3600 * RATE)
    for edge in (1024, 2048, 4096):
        yield f"bytes, {edge} pixels", repeated(5 + 4 * ((1 << 28) // (3 * edge * edge)), (edge, edge))
    yield "pixels", repeated(1, (8192, 8192))
    yield "edge", repeated(1, (16, 8208))
    yield "no frames", clip(frames=0)
    yield "no picture", sound()
