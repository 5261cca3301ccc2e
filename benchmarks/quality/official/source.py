"""Where a benchmark comes from, and on what terms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Origin and licence of a benchmark's data.

    Attributes:
        home: Its official home.
        download: What a user fetches, from where.
        licence: Licence of the data.
        restricted: Whether a user has to accept the licence first, since it forbids some uses or grants none.
    """

    home: str
    download: str
    licence: str
    restricted: bool = False
