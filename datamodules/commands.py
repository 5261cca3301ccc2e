"""`bernini data`: what can be done with a folder of shards."""

from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.suggest import closest
from datamodules.index import Index


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


VERBS: dict[str, Callable[..., Any]] = {"index": index}


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
    parser.add_function_arguments(VERBS[verb], as_positional=True)
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
