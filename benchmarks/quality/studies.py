"""What the studies share: reading how a run was trained, and their command lines."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bernini.errors import DataError


@contextmanager
def reading_run(folder: Path, configs: str) -> Iterator[dict[str, Any]]:
    """Give what the ``config.yaml`` of a run says.

    Args:
        folder: The run's folder.
        configs: What it should have been trained with, for the error.

    Raises:
        DataError: The file is missing, or lacks what the context looks up in it.
    """
    try:
        yield yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            "this is no finished run of the study",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            fix=f"train it with {configs}, and RUN set to this folder",
        ) from error


def study_parser(
    name: str, about: str | None, verbs: Mapping[str, Callable[..., None]], out: Path, page: Path
) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """A study's command line: a verb each, all with ``--out``, and ``table`` with ``--page``.

    Args:
        name: The study's module.
        about: What it is for.
        verbs: Its verbs; their docstrings are the help.
        out: Default folder of the scores.
        page: Default file of the page.
    """
    looks = ArgumentDefaultsHelpFormatter
    parser = ArgumentParser(prog=f"python -m {name}", description=about, formatter_class=looks)
    under = parser.add_subparsers(dest="verb", required=True)
    found = {verb: under.add_parser(verb, help=act.__doc__, formatter_class=looks) for verb, act in verbs.items()}
    for one in found.values():
        one.add_argument("--out", type=Path, default=out, help="folder of the scores")
    found["table"].add_argument("--page", type=Path, default=page, help="its file")
    return parser, found
