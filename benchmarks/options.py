"""Options of `bernini bench` that several of its stages share."""

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from docstring_parser import parse

from benchmarks.quality.folder import Shard
from benchmarks.quality.interface import Benchmark
from bernini.renderer.sampling import SamplingConfig


def add_settings(parser: ArgumentParser, kind: type[Benchmark]) -> None:
    """An option for each field of a benchmark, with what its docstring says of it."""
    group = parser.add_argument_group("items")
    documented = [parse(base.__doc__ or "").params for base in reversed(kind.__mro__) if issubclass(base, Benchmark)]
    told = {p.arg_name: p.description or "" for params in documented for p in params}
    for setting in fields(kind):
        default = setting.default
        how: dict[str, Any] = {"action": BooleanOptionalAction}
        if not isinstance(default, bool):
            how = {"type": type(default) if isinstance(default, int | str) else _names}
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = f"{told.get(setting.name, '')} (default: {shown})".replace("%", "%%")
        group.add_argument(f"--{setting.name.replace('_', '-')}", default=default, help=text, **how)


def add_model(parser: ArgumentParser, kind: type[Benchmark]) -> None:
    """Options of model, sampling and folder."""
    add = parser.add_argument_group("model and sampling").add_argument
    folder = "diffusers folder with transformer/, maybe transformer_2/, and maybe a planner's bernini/ and mllm/"
    add("--model", type=Path, required="model" not in kind.defaults, help=f"{folder} (default: %(default)s)")
    add("--no-plan", action="store_true", help="render from the text alone, although the model has a planner")
    add("--lora", type=Path, help="LoRA to merge: a folder, a run or a file")
    add("--vae", type=Path, help="folder of the VAE (default: the model's)")
    add("--text", type=Path, help="folder with text_encoder/ and tokenizer/ (default: the model's)")
    add(
        "--text-rows",
        type=_counted(1),
        help="context rows, as in training (default: the longest text of the tokenizer)",
    )
    config = SamplingConfig()
    add("--steps", type=int, default=config.steps, help="solver steps (default: %(default)s)")
    add("--shift", type=float, default=config.shift, help="flow shift (default: %(default)s)")
    guidance = kind.defaults.get("guidance", dict.fromkeys((False, True), ("task", {})))
    shown = "{}, with a plan {}".format(*(f"{mode} {_told(omega)}".strip() for mode, omega in guidance.values()))
    add("--mode", help=f"guidance mode of all tasks; `task` is each task's own (default of both: {shown})")
    add("--omega", type=_weights, metavar="txt=4,img=4.5", help="guidance weights: vid, img, txt, tgt, scale")
    add("--sampling-seed", type=int, default=config.seed, help="seed of the noise (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add_device(parser)
    add(
        "--batch-size",
        type=_counted(1),
        default=32,
        help="items of a task that are sampled together (default: %(default)s)",
    )
    add("--bounds", action="store_true", help="also the unedited sources and the true targets through the VAE")
    add_out(parser, kind)
    add_shard(parser)
    parser.set_defaults(guidance=guidance, **{k: v for k, v in kind.defaults.items() if k != "guidance"})


def add_out(parser: ArgumentParser, kind: type[Benchmark]) -> None:
    """The option of a run's folder."""
    text = "folder of the run; a run that is there is gone on with (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / kind.name, help=text)


def add_shard(parser: ArgumentParser) -> None:
    """The option that says which part is done."""
    parser.add_argument("--shard", type=_shard, default=Shard(), metavar="I/N", help="do part I of N, from 0")


def add_workers(parser: ArgumentParser) -> None:
    """The option of processes that score."""
    parser.add_argument("--workers", type=_counted(0), default=0, help="processes that score (default: this one)")


def add_weights(parser: ArgumentParser, fetched: bool = True) -> None:
    """Options of where weights lie that measure, and whether they may be fetched."""
    add = parser.add_argument_group("models that measure").add_argument
    text = "a file or folder of weights by their name, or a folder of many; the hub's cache is looked through, too"
    add("--weights", type=_place, action="append", default=[], metavar="NAME=PATH", help=text)
    if fetched:
        text = "fetch what is missing of them from the hub into its cache"
        add("--download-weights", action="store_true", help=text)


def add_device(parser: ArgumentParser) -> None:
    """The option that says where models compute."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")


def add_judge(parser: ArgumentParser) -> None:
    """Options of who judges outputs, and how."""
    add = parser.add_argument_group("judge").add_argument
    add("--judge-url", help="root of an OpenAI-compatible interface, e.g. http://localhost:8000/v1")
    add("--judge-model", help="name of the model there, with its date")
    add("--judge-revision", default="", help="what pins a model whose name has no date")
    add("--judge-key-env", metavar="NAME", help="environment variable that holds the key (default: no key is sent)")
    add("--judge-local", type=Path, metavar="FOLDER", help="a Qwen2.5-VL on this machine instead")
    add(
        "--repeats",
        type=_counted(1),
        help="how often each question is asked (default: as the benchmark's protocol has it)",
    )
    text = "whether scores above the one that caps them are lowered, where the rubric has such a rule (default: off)"
    add("--cap", choices=("off", "enforce"), help=text)
    add("--rubric", type=Path, metavar="FILE", help="JSON of other texts for the judge (default: our own)")


def add_examples(parser: ArgumentParser) -> None:
    """The option of items that the report shows."""
    parser.add_argument(
        "--examples", type=_counted(0), default=24, help="items that the report shows (default: %(default)s)"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _place(text: str) -> tuple[str, Path]:
    name, named, path = text.rpartition("=")
    return name if named else "", Path(path)


def _weights(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(value) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not of the form txt=4,img=4.5") from error


def _counted(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return int(text)

    return read


def _told(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in weights.items())


def _shard(text: str) -> Shard:
    try:
        index, count = map(int, text.split("/"))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not of the form 0/4") from error
    return Shard(index, count)
