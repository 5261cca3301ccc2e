"""`bernini data`: what can be done with a folder of shards."""

import json as json_format
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.suggest import closest
from datamodules.index import Index
from datamodules.storage import StorageConfig

FLAGS: dict[str | int, str] = {"json": "print JSON", "csv": "print comma-separated values"}


def index(
    folder: str, require: list[str] | None = None, limits: Limits | None = None, allow_links: bool = False
) -> Index:
    """Write the index of a folder of WebDataset tars, and check them on the way.

    Args:
        folder: Local folder with shards, of `bernini prepare` or of any other writer.
        require: Suffixes that every sample must have, as [mp4,txt].
        limits: What a clip may cost; null takes the defaults.
        allow_links: Whether shards may be symbolic links.

    Returns:
        The index.

    Raises:
        ConfigError: The folder is not local, has no shards, or has an index.
        DataError: A shard is damaged, or holds what is not allowed.
    """
    from datamodules.scanning import index_folder

    made = index_folder(folder, require or (), limits=limits, allow_links=allow_links)
    entries = [entry for shard in made.shards for entry in shard.entries]
    size = sum(shard.bytes for shard in made.shards) / 1e6
    print(f"{len(entries)} samples in {len(made.shards)} shards, {size:.1f} MB, fingerprint {made.fingerprint}")
    for members, count in Counter(" ".join(sorted(entry.members)) for entry in entries).most_common():
        print(f"{count:>8} x {members}")
    return made


def info(folders: list[str], json: bool = False, storage: StorageConfig | None = None) -> None:
    """Tell what folders of shards are: samples, tasks, columns, fingerprint.

    Args:
        folders: Local folders, or URLs, with an index.
        json: Whether to print JSON.
        storage: How they are reached.

    Raises:
        ConfigError: A folder holds no index.
        DataError: An index or a sample is damaged.
    """
    from datamodules.tools.folder import Folder
    from datamodules.tools.info import describe, lines

    found = [describe(Folder(folder, storage)) for folder in folders]
    if json:
        print(json_format.dumps(found, indent=2))
    else:
        print("\n\n".join("\n".join(lines(one)) for one in found))


def lint(
    folder: str,
    workers: int = 0,
    ignore: list[str] | None = None,
    json: bool = False,
    storage: StorageConfig | None = None,
) -> None:
    """Read a folder of shards once, and name all that is wrong with it.

    Args:
        folder: Local folder, or URL, with an index.
        workers: Processes that read, a shard at a time each; 0 reads in this one.
        ignore: Rules to leave out, as [prompt,frames].
        json: Whether to print JSON.
        storage: How the folder is reached.

    Raises:
        ConfigError: The folder holds no index, or a rule is unknown.
        DataError: The index is damaged.
        Findings: Something is wrong; the exit code is 1.
    """
    from datamodules.tools.folder import Folder
    from datamodules.tools.lint import lint, summary

    known, found = Folder(folder, storage), []
    with _bar("reading", len(known.entries)) as progress:
        for finding in lint(known, storage, workers, ignore or (), progress):
            found.append(finding)
            if not json:
                print(finding)
    if json:
        print(json_format.dumps([finding.row() for finding in found], indent=2))
    elif not found:
        print(f"{len(known.entries)} samples in {len(known.index.shards)} shards, nothing is wrong")
    if found:
        raise summary(found, known)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, beside which standard output has what is printed and nothing else."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden, same = not console.is_terminal, sys.stdout.isatty()
    with Progress(console=console, transient=True, disable=hidden, redirect_stdout=same) as progress:
        bar = progress.add_task(text, total=total)
        yield lambda done: progress.update(bar, completed=done)


def stats(folders: list[str], json: bool = False, csv: bool = False, storage: StorageConfig | None = None) -> None:
    """Count samples, lengths, sizes and rates of each task, for each folder by itself.

    Args:
        folders: Local folders, or URLs, with shards of `bernini prepare`.
        json: Whether to print JSON.
        csv: Whether to print comma-separated values.
        storage: How they are reached.

    Raises:
        ConfigError: A folder holds no index, or both formats are asked for.
        DataError: An index or a sample is damaged, or not of `bernini prepare`.
    """
    from datamodules.tools import stats as tool
    from datamodules.tools.folder import Folder

    if json and csv:
        raise ConfigError("both --json and --csv are given", fix="choose one")
    found = tool.measure([Folder(folder, storage) for folder in folders])
    print(tool.as_json(found) if json else tool.as_csv(found) if csv else "\n".join(tool.lines(found)))


def preview(
    folder: str,
    out: str = "preview",
    count: int = 8,
    samples: list[str] | None = None,
    vae: str | None = None,
    device: str = "cpu",
    max_edge: int = 320,
    storage: StorageConfig | None = None,
) -> None:
    """Show some samples as a contact sheet, and as a page whose clips play.

    Args:
        folder: Local folder, or URL, with shards of `bernini prepare`.
        out: Folder for sheet.png and preview.html.
        count: How many samples to show, as evenly over the tasks as can be.
        samples: Keys of those to show in place of these, as [a,b].
        vae: Folder of the Wan VAE that made the latents, to show them decoded.
        device: Device that decodes latents.
        max_edge: Longest edge of what is shown in pixels.
        storage: How the folder is reached.

    Raises:
        ConfigError: The folder holds no index, a key is not there, or a number is too small.
        DataError: A sample is damaged, or the page would be too large.
        CheckpointError: The VAE cannot be read.
    """
    from datamodules.tools.preview import preview

    sheet, page = preview(folder, out, count, samples or (), vae, device, max_edge, storage)
    print(f"sheet: {sheet}\npage:  {page}")


VERBS: dict[str, Callable[..., Any]] = {"index": index, "info": info, "lint": lint, "stats": stats, "preview": preview}


def main(argv: Sequence[str]) -> int:
    """Run one verb of `bernini data`; options may be written with dashes."""
    from jsonargparse import ArgumentParser

    texts = {verb: (function.__doc__ or "").partition("\n")[0] for verb, function in VERBS.items()}
    if not argv or argv[0] in ("-h", "--help"):
        verbs = "\n".join(f"  {verb:<10}{text}" for verb, text in texts.items())
        print(f"usage: bernini data VERB [options]\n\n{verbs}\n\n`bernini data VERB --help` lists a verb's options.")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb!r}", why=f"`bernini data` knows {', '.join(VERBS)}", fix=closest(verb, VERBS)
        )
    parser = ArgumentParser(prog=f"bernini data {verb}", exit_on_error=False, description=texts[verb])
    named = set(signature(VERBS[verb]).parameters)
    parser.add_function_arguments(VERBS[verb], as_positional=True, skip={*FLAGS, "folders"} & named)
    if "folders" in named:
        parser.add_argument("folders", nargs="+", help="local folders, or URLs, with an index")
    for flag in (flag for flag in FLAGS if flag in named):
        parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    try:
        options = parser.instantiate(parser.parse_args([underscored(arg) for arg in rest]))
    except ArgumentError as error:
        raise ConfigError(str(error), fix=f"`bernini data {verb} --help` lists the options") from error
    VERBS[verb](**vars(options))
    return 0


def underscored(arg: str) -> str:
    """An option's name as the function has it."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if arg.startswith("--") else arg
