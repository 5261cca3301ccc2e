"""Shards behind http, S3 and Google storage: ranged reads through fsspec that survive bad days."""

import ipaddress
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import aiohttp
import fsspec

from bernini.errors import ConfigError, DataError, ServiceError
from datamodules.storage import StorageConfig, check_location, refuse

PIECE = 16 << 20  # bytes of one request
MAX_TEXT = 4 << 30  # bytes of an index
MAX_WAIT = 16.0  # seconds between two tries
SURE = 3  # times that a server has to give another size than the index before it is believed
_COPY = "copy the whole folder with its index, which `bernini data index` makes"
_PASSING = {408, 425, 429}  # of the 4xx replies, those that may pass; 5xx all may
_FAULTS = (OSError, aiohttp.ClientError)


class Remote:
    """A folder behind a URL.

    A read that fails goes on where it broke off, after a pause that doubles; nothing received is asked for again. The
    first use of a file notes its size and ETag, so that one that is replaced meanwhile can be told from a bad line.

    Args:
        url: ``http(s)://HOST/FOLDER``, ``s3://BUCKET/FOLDER`` or ``gs://BUCKET/FOLDER``.
        config: Tries, pauses, and which addresses that are not public may be reached.

    Attributes:
        retried: Reads that this process has tried again.

    Raises:
        ConfigError: The URL is not allowed, or its driver is not installed.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.scheme, self.url, self.config = check_location(url), url.rstrip("/"), config
        self.retried = 0
        self._opened: tuple[int, Any] | None = None  # process, file system
        self._tags: dict[str, str] = {}
        self._refused: list[str] = []
        self._fs()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connections, which belong to one process."""
        return {**self.__dict__, "_opened": None}

    def where(self, name: str) -> str:
        """URL of a file."""
        return f"{self.url}/{name}"

    def text(self, name: str) -> str:
        """A whole small file; see `datamodules.storage.Store.text`."""
        size, _ = self._describe(name)
        if size > MAX_TEXT:
            raise DataError(f"{size} bytes of index", where=self.where(name), why=f"at most {MAX_TEXT} are read")
        return self._read(name, 0, size).decode(errors="replace")

    def read(self, name: str, total: int, at: int, size: int) -> bytes:
        """Bytes of a file; see `datamodules.storage.Store.read`."""
        if name not in self._tags:
            self.check(name, total)
        return self._read(name, at, size, total)

    def check(self, name: str, total: int) -> None:
        """Compare size and ETag of a file; see `datamodules.storage.Store.check`."""
        for _ in range(SURE):
            size, tag = self._describe(name)
            if size == total:
                break
        else:
            self._changed(name, f"it has {size} bytes, the index says {total}")
        if self._tags.setdefault(name, tag) != tag:
            self._changed(name, f"its tag was {self._tags[name]} and is {tag}")

    def _changed(self, name: str, why: str) -> NoReturn:
        raise DataError(
            "the shard is not the one that was indexed", where=self.where(name), why=why,
            fix="put the shard back, or index the data again and start a new run",
        )  # fmt: skip

    def _describe(self, name: str) -> tuple[int, str]:
        """Size in bytes and tag."""
        fs, url = self._fs(), self.where(name)
        info = self._tried(url, lambda: fs.info(url, timeout=self.config.timeout))
        if not isinstance(info.get("size"), int):
            raise ServiceError("the server does not say how large the file is", where=url, fix="use another server")
        return info["size"], str(info.get("ETag") or info.get("etag") or info.get("Last-Modified") or "")

    def _read(self, name: str, at: int, size: int, total: int | None = None) -> bytes:
        fs, url, data = self._fs(), self.where(name), bytearray()

        def go_on() -> None:
            while len(data) < size:
                start = at + len(data)
                end = min(at + size, start + PIECE)
                part = fs.cat_file(url, start=start, end=end, timeout=self.config.timeout)
                if not part:
                    raise ConnectionError(f"nothing came of bytes {start} to {end}")
                data.extend(part[: end - start])

        try:
            self._tried(url, go_on)
        except ServiceError:
            if total is not None:
                self.check(name, total)  # a file that was replaced by a shorter one says so
            raise
        return bytes(data)

    def _tried(self, url: str, action: Callable[[], Any]) -> Any:
        fault: Exception = OSError()
        for number in range(self.config.retries + 1):
            if number:
                self.retried += 1
                time.sleep(min(MAX_WAIT, self.config.backoff * 2 ** (number - 1)))
            self._refused.clear()  # a host may have other addresses that can be reached
            try:
                return action()
            except _FAULTS as error:
                fault = error
            if self._refused:
                fix = "add the address or its network to `storage.allow_addresses` if it is yours"
                refuse(url, "public addresses only", f"it leads to {self._refused.pop()}", fix)
            if isinstance(fault.__cause__ or fault, aiohttp.InvalidURL):
                refuse(url, "whole URLs only", f"{fault.__cause__ or fault}", "write host names and addresses in full")
            if _status(fault) in (404, 410):
                raise DataError("there is no such file", where=url, fix=_COPY) from fault
            if _lasting(fault):
                break
        cause = fault.__cause__ or fault
        raise ServiceError(
            "the service refuses the file" if _lasting(fault) else f"no answer in {self.config.retries + 1} tries",
            where=url, why=f"{type(cause).__name__}: {cause}",
            fix="check credentials and rights, and go on with `--ckpt_path auto`; `storage.retries` allows more tries",
        ) from fault  # fmt: skip

    def _fs(self) -> Any:
        """The file system of this process: connections cannot be shared with a forked one."""
        if self._opened is None or self._opened[0] != os.getpid():
            options = {"get_client": self._client} if self.scheme in ("http", "https") else {}
            try:
                fs = fsspec.filesystem(self.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
            except ImportError as error:
                raise ConfigError(
                    f"the driver of {self.scheme}:// is not installed", where=self.url, why=str(error),
                    fix=f"pip install 'bernini[{self.scheme}]'",
                ) from error  # fmt: skip
            self._opened = os.getpid(), fs
        return self._opened[1]

    async def _client(self, loop: Any, **_: Any) -> aiohttp.ClientSession:
        """A client that reaches public addresses alone, whatever names, redirects and proxies say."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=partial(_guarded, self.config.networks(), self._refused)),
            response_class=_Bounded,
            timeout=aiohttp.ClientTimeout(None, sock_connect=self.config.timeout, sock_read=self.config.timeout),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )


class _Bounded(aiohttp.ClientResponse):
    """A reply of which no more is read than was asked for, and what came before the line broke is kept."""

    async def read(self) -> bytes:
        first, last = self.request_info.headers["Range"].removeprefix("bytes=").split("-")
        limit, body = int(last) - int(first) + 1, bytearray()
        if self.status == 200 and int(first) > 0:
            raise aiohttp.ClientPayloadError("the server sends whole files where a range was asked for")
        try:
            async for block in self.content.iter_chunked(1 << 20):
                body += block
                if len(body) >= limit:
                    break
        except (aiohttp.ClientPayloadError, OSError):
            if not body:
                raise
        if len(body) > limit or not self.content.at_eof():
            self.close()
        return bytes(body[:limit])


def _guarded(networks: list[Any], refused: list[str], info: tuple[Any, ...]) -> socket.socket:
    """A socket for an address that was resolved just now, unless it is private."""
    family, kind, protocol, _, address = info
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind NAT64
        inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    ip = inner or ip
    if (not ip.is_global or ip.is_multicast) and not any(ip in network for network in networks):
        refused.append(str(ip))
        raise OSError(f"{ip} is not a public address")
    return socket.socket(family, kind, protocol)


def _status(error: BaseException) -> int | None:
    """HTTP status of an error, or the one that its type stands for."""
    for one in (error, error.__cause__):
        if isinstance(status := getattr(one, "status", None), int):
            return status
    if isinstance(error.__cause__, _FAULTS):  # fsspec calls a file missing whose server did not answer
        return None
    return 404 if isinstance(error, FileNotFoundError) else 403 if isinstance(error, PermissionError) else None


def _lasting(error: BaseException) -> bool:
    """Whether trying again is in vain."""
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _PASSING
