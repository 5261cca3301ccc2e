"""Data: the toy world, shards, order, preparation and the Lightning data module."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.video import VideoDataModule

__all__ = ["VideoDataModule"]


def __getattr__(name: str) -> Any:
    """Import Lightning with the data module alone, so that worker processes start without it."""
    if name == "VideoDataModule":
        from datamodules.video import VideoDataModule

        return VideoDataModule
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
