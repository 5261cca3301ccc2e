"""Environment values in configurations, and secrets that a shell put there: never written or shown."""

import os
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

_read: dict[str, str] = {}
_SHORTEST = 4  # characters; a shorter value is hidden where it is all there is, but not inside a longer text
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # in a variable's name
_SHORTEST_SECRET = 12  # characters; a shorter value is no key, and may well be an everyday word


def remember_environment() -> None:
    """Let `hide` know every value that a configuration takes from the environment from now on, and every secret.

    A secret is a value of 12 or more characters whose variable has KEY, TOKEN, SECRET or PASSWORD in its name; a shell
    can fill it in, as in ``--key $TOKEN``, before anybody here sees where it came from.
    """
    _read.clear()
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and any(word in name.upper() for word in _SECRET):
            _read[value] = f"${{oc.env:{name}}}"

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
