"""Errors a user can act on: what is wrong, where, why, and what to do about it."""

from functools import partial
from typing import Any


class BerniniError(Exception):
    """Base of every error that is the input's fault rather than ours.

    Args:
        what: What is wrong, in one sentence.
        where: File and key, shard and member, or option that it was found in.
        why: Why that cannot work.
        fix: The command or key that mends it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        rows = [what, where and f"  where: {where}", why and f"  why:   {why}", fix and f"  fix:   {fix}"]
        super().__init__("\n".join(row for row in rows if row))

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the parts apart on the way out of a worker process."""
        return partial(type(self), where=self.where, why=self.why, fix=self.fix), (self.what,)


class ConfigError(BerniniError):
    """A configuration that cannot be used."""

    exit_code = 78


class DataError(BerniniError):
    """Data that is missing, damaged or not what it claims to be."""

    exit_code = 77


class BadSample(DataError):
    """One sample that cannot be served, while others can.

    Args:
        what: What is wrong, in one sentence.
        shard: Path or URL of the sample's shard.
        key: Key of the sample.
        member: Suffix of the member at fault; empty where that is not known.
        offset: Byte of the shard at which that member begins.
        why: Why that cannot work.
        fix: The command or key that mends it.
    """

    def __init__(
        self, what: str, *, shard: str, key: str, member: str = "", offset: int = 0, why: str = "", fix: str = ""
    ) -> None:
        self.shard, self.key, self.member, self.offset = shard, key, member, offset
        super().__init__(what, where=f"{shard}:{key}" + (f".{member}" if member else ""), why=why, fix=fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the parts apart on the way out of a worker process."""
        place = partial(type(self), shard=self.shard, key=self.key, member=self.member, offset=self.offset)
        return partial(place, why=self.why, fix=self.fix), (self.what,)


class CheckpointError(BerniniError):
    """Weights or a checkpoint that do not fit the model."""

    exit_code = 65


class ServiceError(BerniniError):
    """A service elsewhere that does not answer, or not as it should."""

    exit_code = 69
