"""Environment values in configurations: read through ``${oc.env:NAME}``, never written or shown."""

import os
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

_read: dict[str, str] = {}
_SHORTEST = 4  # characters; a shorter value is hidden where it is all there is, but not inside a longer text


def remember_environment() -> None:
    """From now on, let every value that a configuration takes from the environment be known to :func:`hide`."""
    _read.clear()

    def env(name: str, *default: Any) -> str | None:
        value = oc.env(name, *default)
        if value and name in os.environ:
            _read[value] = f"${{oc.env:{','.join([name, *map(str, default)])}}}"
        return value

    OmegaConf.register_resolver("oc.env", env, replace=True)


def hide(value: Any) -> Any:
    """A copy in which values from the environment are the expressions that name them.

    Args:
        value: A text, or a nest of dictionaries and lists as YAML gives it.
    """
    if isinstance(value, dict):
        return {k: hide(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hide(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    if str(value) in _read:
        return _read[str(value)]
    if isinstance(value, str):
        for secret in sorted((s for s in _read if len(s) >= _SHORTEST), key=len, reverse=True):
            value = value.replace(secret, _read[secret])
    return value
