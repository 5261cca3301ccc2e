"""A configuration's faults in four lines: what, where, why, and the name that was probably meant."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_warn

from bernini.errors import ConfigError
from bernini.suggest import closest

_UNKNOWN = re.compile(r"(?:Group '([\w.]+)' does not accept o|O|Subcommand '\w+' does not accept o)ption '([\w.]+)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: --()([\w.]+)")
_NO_CLASS = re.compile(r"(No module named '[\w.]+'|module '[\w.]+' has no attribute '\w+'|\w+ not .*a subclass of .*)")
_CLASS_PATH = re.compile(r"(?:class_path '|class_path='|Import path )([\w.]+)")
_REQUIRED = re.compile(r"arguments? (?:is|are) required: (.*)")
_EXPECTED = re.compile(r"Expected an? (<class '[\w.]+'>|[\w.]+\[.*\])")


def config_files(args: Sequence[str]) -> list[Path]:
    """Configuration files of a command line, in order."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [
        Path(after if arg in ("-c", "--config") else arg.split("=", 1)[1])
        for arg, after in pairs
        if arg in ("-c", "--config") or arg.startswith(("-c=", "--config="))
    ]


def check_files(args: Sequence[str], linked: Mapping[str, str]) -> None:
    """Look at the files of a command line before they are merged.

    Args:
        args: The command line.
        linked: Keys that follow another key, which is given; setting one would have no effect.

    Raises:
        ConfigError: A file is missing or no YAML mapping, or it or the command line sets a linked key.
    """
    targets = {_short(target): source for target, source in linked.items()}
    files = [(str(file), dict(_leaves(_read(file)))) for file in config_files(args)]
    sources = [*files, *((arg, {arg.split("=")[0].removeprefix("--"): ""}) for arg in args if arg.startswith("--"))]
    for where, values in sources:
        for key in values:
            for target, source in targets.items():
                if f"{_short(key)}.".startswith(f"{target}."):
                    why = f"it follows {source}"
                    raise ConfigError(f"{key} would be ignored", where=where, why=why, fix="set that one")
    for number, (file, values) in enumerate(files, 1):
        _warn_of_copies(file, values, {_short(key): where for where, later in sources[number:] for key in later})


def _warn_of_copies(file: str, values: dict[str, Any], later: dict[str, str]) -> None:
    """Interpolations are resolved within their file, so a later value does not reach them."""
    for key, value in values.items():
        for name in re.findall(r"\$\{([\w.]+)\}", str(value)):
            if _short(name) in later and _short(key) not in later:
                rank_zero_warn(f"{key} keeps the {name} of {file}, although {later[_short(name)]} sets another one")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError("the configuration file cannot be read", where=str(file), why=str(error.strerror)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError("the configuration file is not YAML", where=str(file), why=why) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "the configuration file holds no keys", where=str(file), fix="write `model:`, `data:`, `trainer:`"
        )
    return content


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(key: str) -> str:
    """A key as it may also be written: ``model.lr`` for ``model.init_args.lr``."""
    return key.replace(".init_args", "")


def explain(error: Exception, args: Sequence[str]) -> ConfigError:
    """Turn a parser's error into one that a user can act on.

    Args:
        error: What the parser raised, possibly a nest of alternatives that it tried.
        args: The command line, which names the configuration files.
    """
    message = str(error)
    inner = re.split(r"Given value( type)?:", message)[0]  # what follows repeats the value, level by level
    path = ".".join(re.findall(r'Parser key "([\w.]+)"', inner))
    classes = _CLASS_PATH.findall(inner)
    if found := _UNKNOWN.search(inner) or _UNRECOGNIZED.search(inner):
        return _unknown(path, ".".join(filter(None, [found[1], found[2]])), classes, args)
    if found := _NO_CLASS.search(inner):
        return _no_class(path, classes[-1], found[1], args)
    if found := _REQUIRED.search(inner):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in found[1].split(", ")]
        missing = [f"{path}.{name}" if path else name for name in names]
        where = ", ".join(map(str, config_files(args)))
        fix = f"add it to a file, or pass --{missing[0]}"
        return ConfigError(f"{', '.join(missing)} must be set", where=where, fix=fix)
    if expected := [e for e in dict.fromkeys(_EXPECTED.findall(inner)) if "NoneType" not in e]:
        return _wrong_value(path, message, expected, args)
    first, *more = [line.strip() for line in message.strip().splitlines()]
    return ConfigError(first, why=" ".join(more[:3]))


def _unknown(path: str, key: str, classes: list[str], args: Sequence[str]) -> ConfigError:
    """An error for ``key``, dotted if it lies in groups, of the last class that was tried at ``path``."""
    *groups, name = key.split(".")
    if classes:
        cls = _load(classes[-1])
        for group in groups:
            hint = inspect.signature(cls, eval_str=True).parameters[group].annotation
            cls = next(t for t in (hint, *get_args(hint)) if inspect.isclass(t) and t is not type(None))
        owner, known = cls.__name__, _parameters(cls)
    elif groups[:1] == ["trainer"]:
        owner, known = "the trainer", _parameters(L.Trainer)
    else:
        owner, known = "the configuration", ["model", "data", "trainer", "seed_everything", "ckpt_path"]
        key = name = key.split(".")[0]
    return ConfigError(
        f"unknown key {'.'.join(filter(None, [path, key]))!r}",
        where=_place(name, args),
        why=f"{owner} has no {name!r}",
        fix=closest(name, known) or f"its keys are {', '.join(known)}",
    )


def _no_class(path: str, class_path: str, why: str, args: Sequence[str]) -> ConfigError:
    module, _, name = class_path.rpartition(".")
    try:
        known = [f"{module}.{n}" for n, _ in inspect.getmembers(importlib.import_module(module), inspect.isclass)]
    except ImportError as error:  # perhaps of something that the module needs
        known, why = [], str(error)
    hint = "" if class_path in known else closest(class_path, known)
    return ConfigError(f"{path} cannot be a {class_path}", where=_place(name, args), why=why, fix=hint)


def _wrong_value(path: str, message: str, expected: list[str], args: Sequence[str]) -> ConfigError:
    found = re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value.*)?$", message, re.MULTILINE)
    value = found[1].strip() if found else ""
    options = [o for e in expected for o in re.findall(r"'([\w-]+)'", e if "Literal" in e else "")]
    kinds = [re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", e) for e in expected if "Literal" not in e]
    wanted = [*kinds, *([f"one of {', '.join(options)}"] if options else [])]
    return ConfigError(
        f"{path} has the value {value!r}",
        where=_place(path.split(".")[-1], args),
        why=f"it must be {' or '.join(wanted)}",
        fix=closest(value, options),
    )


def _load(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parameters(cls: type) -> list[str]:
    return [
        name
        for name in inspect.signature(cls).parameters
        if name not in ("self", "args", "kwargs", "params", "optimizer")
    ]


def _place(name: str, args: Sequence[str]) -> str:
    """The argument, or file and line, in which a name stands; the last file wins, as it does when files are merged."""
    for arg in args:
        if arg.startswith("--") and name in arg.split("=")[0].removeprefix("--").split("."):
            return arg
    for pattern in (rf"^[\s-]*([\w.]+\.)?{re.escape(name)}\s*:", rf"\b{re.escape(name)}\b"):
        for file in reversed(config_files(args)):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if re.search(pattern, line):
                    return f"{file}:{number}"
    return ""
