"""What metrics of pixels ask of the clips they are given."""

from torch import Tensor, uint8

from bernini.errors import DataError


def check_clip(clip: Tensor, frames: int = 1) -> None:
    """See that a clip is ``[3, T, H, W]`` uint8 with at least ``frames`` frames.

    Raises:
        DataError: It is not.
    """
    if clip.dtype != uint8 or clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < frames or not clip.numel():
        raise DataError(
            f"a clip is {clip.dtype} {tuple(clip.shape)}", why=f"uint8 (3, at least {frames}, height, width) is needed"
        )


def check_pair(output: Tensor, source: Tensor) -> None:
    """See that two clips are clips of the same size and length.

    Raises:
        DataError: They are not.
    """
    check_clip(output)
    check_clip(source)
    if output.shape != source.shape:
        raise DataError(
            f"an output is {tuple(output.shape)} and its source {tuple(source.shape)}",
            why="they are compared pixel by pixel",
            fix="take the same frames of both, and resize the output",
        )
