"""Where shards lie, local folder or URL, and which places are never opened."""

import ipaddress
import re
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import urlsplit

from bernini.errors import ConfigError, DataError

REMOTE = ("http", "https", "s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_COPY = "copy the shards to a folder or to one of " + ", ".join(f"{scheme}://" for scheme in REMOTE)


@dataclass(frozen=True)
class StorageConfig:
    """How shards are reached. Credentials are none of this: drivers take them from where they always do.

    Attributes:
        cache: Local folder that keeps what was read from URLs, for all processes of this machine; null for none.
        cache_gb: Most GB (1e9 bytes) of that folder; what was unused for longest goes first.
        retries: Times that a failed read is tried again before the run stops.
        backoff: Seconds before the first of them, doubled each time, up to 16.
        timeout: Seconds that a connection may be silent, and a request of at most 16 MiB may take.
        allow_addresses: Addresses and networks such as ``10.0.0.0/8`` that http may reach although they are not public.
        allow_links: Whether shards may be symbolic links, which may lead out of their folder.

    Raises:
        ConfigError: A number is out of range, or an address is none.
    """

    cache: str | None = None
    cache_gb: float = 100.0
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 60.0
    allow_addresses: list[str] = field(default_factory=list)
    allow_links: bool = False

    def __post_init__(self) -> None:
        if self.cache_gb <= 0 or self.retries < 0 or self.backoff < 0 or self.timeout <= 0:
            raise ConfigError("cache_gb and timeout are positive, retries and backoff 0 or more", where="storage")
        try:
            self.networks()
        except ValueError as error:
            raise ConfigError(
                str(error), where="storage.allow_addresses", fix="write 10.0.0.7 or 10.0.0.0/8"
            ) from error

    def networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """The networks of ``allow_addresses``."""
        return [ipaddress.ip_network(text) for text in self.allow_addresses]


class Store(Protocol):
    """A place with an index and shards."""

    def where(self, name: str) -> str:
        """Path or URL of a file."""

    def text(self, name: str) -> str:
        """A whole small file.

        Raises:
            ConfigError: A local one is not there.
            DataError: A remote one is not there.
        """

    def read(self, name: str, total: int, at: int, size: int) -> bytes:
        """Bytes of a file; fewer where a local file has ended.

        Args:
            name: File name.
            total: Bytes that the whole file has by the index.
            at: First byte.
            size: Number of bytes.

        Raises:
            DataError: The file is gone, or is not the one that was indexed.
            ServiceError: The service does not give it.
        """

    def check(self, name: str, total: int) -> None:
        """Look whether a remote file has been replaced while it was being read.

        Raises:
            DataError: It has.
        """


def open_store(location: str | Path, config: StorageConfig) -> Store:
    """The place that a path or URL names.

    Raises:
        ConfigError: It is one that is never opened, or its driver is not installed.
    """
    if check_location(str(location)):
        from datamodules.remote import Remote

        return Remote(str(location), config)
    return Local(location, config)


def check_location(location: str) -> str | None:
    """The scheme of a URL, or nothing for a path.

    Raises:
        ConfigError: The location is a command, a chain, a pattern, a URL of another kind, or carries secrets.
    """
    match = _SCHEME.match(location)
    scheme = match[1].lower() if match else None
    if scheme == "pipe" or "|" in location:
        refuse(location, "no commands", "a shard is never the output of a command")
    if "::" in re.sub(r"//\[[0-9A-Fa-f:.]*\]", "//", location):  # an IPv6 address is none
        refuse(location, "no chains", "`::` joins locations, and file systems that open others")
    if re.search(r"[{}\0\n\r]", location):
        refuse(location, "no patterns", "braces and line breaks are not expanded", "name each folder by itself")
    if scheme is None:
        return None
    if scheme == "file":
        refuse(location, "no file URLs", "a local folder is named by its path", "write the path without file:")
    if scheme not in REMOTE:
        refuse(location, "known schemes only", f"{scheme}: is none of {', '.join(REMOTE)}")
    try:
        parts = urlsplit(location)
    except ValueError as error:
        refuse(location, "whole URLs only", str(error), f"write {scheme}://HOST/FOLDER")
    if not parts.hostname:
        refuse(location, "known schemes only", "the URL names no host or bucket", f"write {scheme}://HOST/FOLDER")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        shown = f"{scheme}://{parts.hostname}{parts.path}"
        refuse(
            shown, "no secrets in URLs", "user, query and fragment of a URL end up in logs",
            "write it without, and give credentials as the driver takes them from the environment",
        )  # fmt: skip
    return scheme


def refuse(location: str, rule: str, why: str, fix: str = _COPY) -> NoReturn:
    """Raise the ConfigError of a location that a rule forbids."""
    raise ConfigError("the location is not allowed", where=location, why=f"rule `{rule}`: {why}", fix=fix)


class Local:
    """A local folder.

    Args:
        root: The folder.
        config: Whether links are followed.

    Raises:
        ConfigError: ``root`` is a URL or a command.
    """

    def __init__(self, root: str | Path, config: StorageConfig) -> None:
        if check_location(str(root)):
            raise ConfigError(
                "shards are written and indexed in local folders only",
                where=str(root),
                fix="use a local folder, then copy",
            )
        self.root, self.config = Path(root), config

    def names(self) -> list[str]:
        """File names of its shards, sorted.

        Raises:
            DataError: There are compressed tars, which would be left out silently.
        """
        found = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        for name in found:
            if re.search(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$", name, re.IGNORECASE):
                raise DataError(
                    "the shard is compressed", where=self.where(name), why="members cannot be read by their offset",
                    fix="unpack it to a plain .tar",
                )  # fmt: skip
        return [name for name in found if name.endswith(".tar") and not name.startswith(".")]

    def where(self, name: str) -> str:
        """Path of a file."""
        return str(self.root / name)

    def open(self, name: str) -> BufferedReader:
        """Open a regular file for reading.

        Raises:
            DataError: It is not there, or is no regular file.
            ConfigError: It is a symbolic link.
        """
        path = self.root / name
        if path.is_symlink() and not self.config.allow_links:
            raise ConfigError(
                "the shard is a symbolic link", where=str(path), why="rule `no links`: it may lead out of its folder",
                fix="set `storage.allow_links` to true if it is yours, or copy the file",
            )  # fmt: skip
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise DataError("the shard is not a regular file", where=str(path), fix="remove it")
        try:
            return path.open("rb")
        except OSError as error:
            raise DataError(
                f"the shard cannot be opened: {error.strerror}", where=str(path), fix="copy the folder again"
            ) from error

    def text(self, name: str) -> str:
        """A whole small file; see `Store.text`."""
        if not (self.root / name).exists():
            if self.names():
                raise ConfigError(f"no {name} here", where=str(self.root), fix="make it with `bernini data index`")
            raise ConfigError("no shards here", where=str(self.root), fix="write them with `bernini prepare`")
        with self.open(name) as file:
            return file.read().decode(errors="replace")

    def read(self, name: str, total: int, at: int, size: int) -> bytes:
        """Bytes of a file; see `Store.read`."""
        with self.open(name) as file:
            file.seek(at)
            return file.read(size)

    def check(self, name: str, total: int) -> None:
        """Do nothing: a local file may be damaged in one place and good in others."""
