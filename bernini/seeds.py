"""Seeds that are functions of what they are for."""

import hashlib


def draw_seed(*key: str | int) -> int:
    """A seed that is a function of a key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
