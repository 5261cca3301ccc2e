"""The `bernini` command: training verbs through LightningCLI, the others through their own modules."""

import importlib
import sys
import traceback
from collections.abc import Sequence

from bernini.errors import BerniniError, ConfigError

LIGHTNING_VERBS = {
    "fit": "train a model",
    "validate": "measure the loss of a model on validation data",
    "test": "measure the loss of a model on test data",
    "predict": "sample clips with a model and write them",
}
OTHER_VERBS = {
    "generate": ("bernini.generate", "make and edit images and clips"),
    "prepare": ("datamodules.prepare", "turn clips into shards"),
    "data": ("datamodules.commands", "index folders of shards, check them and look at them"),
    "export": ("bernini.checkpoints.export", "write models and LoRAs in the layouts of Bernini, diffusers and ComfyUI"),
    "check": ("bernini.check", "say what this machine has, and which kernels run on it"),
    "bench": ("benchmarks.bench", "score a model on a benchmark"),
    "demo": ("benchmarks.demo", "train, edit and score a tiny renderer on the CPU"),
}


def usage() -> str:
    """What the command can do."""
    rows = {**LIGHTNING_VERBS, **{verb: text for verb, (_, text) in OTHER_VERBS.items()}}
    verbs = "\n".join(f"  {verb:<10}{text}" for verb, text in rows.items())
    more = "`bernini VERB --help` lists a verb's options; --debug shows tracebacks."
    return f"usage: bernini VERB [options]\n\n{verbs}\n\n{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; the process's own if not given.

    Returns:
        The exit code: 0 on success, 78 for a bad configuration, 77 for bad data, 65 for bad weights, 69 for a service
        that fails, 130 and 143 after SIGINT and SIGTERM, else 1.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        return run(args)
    except BerniniError as error:
        if debug:
            print(_shown(traceback.format_exc()), file=sys.stderr)
        print(f"bernini: error: {_shown(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bernini: interrupted", file=sys.stderr)
        return 130


def run(args: Sequence[str]) -> int:
    """Dispatch a verb; errors are raised."""
    verb, rest = args[0], list(args[1:])
    if verb in LIGHTNING_VERBS:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from bernini.lightning_cli import run_lightning

        try:
            run_lightning([verb, *rest])
        except SIGTERMException:  # a SystemExit with code 0, which a scheduler would take for success
            return 143
        return 0
    if verb in OTHER_VERBS:
        return importlib.import_module(OTHER_VERBS[verb][0]).main(rest) or 0
    from bernini.suggest import closest

    verbs = [*LIGHTNING_VERBS, *OTHER_VERBS]
    raise ConfigError(f"unknown verb {verb!r}", why=f"the verbs are {', '.join(verbs)}", fix=closest(verb, verbs))


def _shown(message: str) -> str:
    """A message without values from the environment, which only configurations read, once they are imported."""
    environment = sys.modules.get("bernini.environment")
    return environment.hide(message) if environment else message
