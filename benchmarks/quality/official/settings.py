"""Checks of a benchmark's settings."""

from collections.abc import Sequence

from bernini.errors import ConfigError
from bernini.suggest import closest


def check_choice(setting: str, value: str, known: Sequence[str]) -> None:
    """See that a setting has one of its values.

    Raises:
        ConfigError: It has another.
    """
    if value not in known:
        raise ConfigError(
            f"unknown {setting} {value!r}",
            where=setting,
            why=f"there are {', '.join(known)}",
            fix=closest(value, known),
        )


def check_names(setting: str, names: Sequence[str], known: Sequence[str]) -> None:
    """See that a setting names one or more of its values, each of them once.

    Raises:
        ConfigError: It does not.
    """
    for name in names:
        check_choice(setting, name, known)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{setting} are {', '.join(names) or 'missing'}", where=setting, fix="name each one once")
