"""How large a visual may be when it is read, and how many tokens it then is."""

from dataclasses import dataclass, field

from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.media import fit_size, frame_rule

STRIDE, FRAMES = 16, 4  # pixels of a token's edge, frames of all but a clip's first: the Wan VAE's stride and the patch

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Bounds:
    """Most that is taken of a raw image or clip; features that were prepared stay as they are.

    Attributes:
        max_frames: Most frames of a clip; null for no limit.
        max_edge: Longest edge in pixels; null for no limit.
        max_area: Most pixels of a frame; null for no limit.
        limits: What a file may cost before it is resized.

    Raises:
        ConfigError: A number is out of range.
    """

    max_frames: int | None = None
    max_edge: int | None = None
    max_area: int | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"max_frames is {self.max_frames}", where="data.init_args", fix="give at least 1")
        fit_size(STRIDE, STRIDE, max_edge=self.max_edge, max_area=self.max_area)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width within the bounds.

        What exceeds none is left as it is; all else keeps its aspect ratio, with edges that are multiples of 16.
        """
        edge, area = self.max_edge or max(height, width), self.max_area or height * width
        if max(height, width) <= edge and height * width <= area:
            return height, width
        return fit_size(height, width, max_edge=self.max_edge, max_area=self.max_area)

    def bucket(self, frames: int, height: int, width: int) -> Size:
        """Size of what is read from a visual of that size: 1 or ``4k + 1`` frames, height, width."""
        return len(frame_rule(frames, 1.0, max_frames=self.max_frames).indices), *self.resized(height, width)


def tokens(frames: int, height: int, width: int) -> int:
    """Tokens of a visual in the renderer.

    The VAE makes one latent of the first frame and of every further four, each with an eighth of the edges; a token is
    two by two of its pixels.
    """
    return (1 + (frames - 1) // FRAMES) * -(-height // STRIDE) * -(-width // STRIDE)
