"""`bernini bench`: make, score and tabulate the outputs of a model on a benchmark."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.judges import judge_of
from benchmarks.measuring import places_of
from benchmarks.options import (
    add_device,
    add_examples,
    add_judge,
    add_model,
    add_out,
    add_settings,
    add_shard,
    add_weights,
    add_workers,
)
from benchmarks.quality.environment import environment
from benchmarks.quality.folder import ITEMS, MANIFEST, RunFolder, Shard, describe
from benchmarks.quality.generating import generate
from benchmarks.quality.inquiries.registry import INQUIRIES
from benchmarks.quality.interface import Benchmark, Item, subset
from benchmarks.quality.judge_config import JudgeConfig
from benchmarks.quality.judging.question import Judge
from benchmarks.quality.model_scoring import groups, score_by_model
from benchmarks.quality.models.registry import MEASURES
from benchmarks.quality.official.base import OfficialBenchmark
from benchmarks.quality.official.needs import Places
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.page import write_page
from benchmarks.quality.preparing import prepare
from benchmarks.quality.published.check import main as check_rows
from benchmarks.quality.sampler import (
    Ceiling,
    Sampler,
    is_edit,
    load_sampler,
    model_facts,
    sampling_facts,
    unedited,
)
from benchmarks.quality.scoring import score
from benchmarks.quality.summary import aggregate
from benchmarks.quality.toy import ToyBenchmark
from bernini.errors import BerniniError, ConfigError
from bernini.flow.guidance import Omegas
from bernini.planner.model import FOLDER as PLANNER
from bernini.renderer.sampling import SamplingConfig
from bernini.suggest import closest
from bernini.text.encoder import context_rows
from bernini.vae.codec import LatentCodec

BENCHMARKS: dict[str, type[Benchmark]] = {ToyBenchmark.name: ToyBenchmark, **OFFICIAL}


class Incomplete(BerniniError):
    """A run that lacks scores."""


def main(argv: Sequence[str]) -> int:
    """Run `bernini bench`."""
    options = parser().parse_args(argv)
    disable_progress_bar()  # of loading models
    try:
        options.run(options)
    except OSError as error:  # such as a full disk, or a file where a folder was to be
        raise BerniniError(
            "a file cannot be read or written", where=str(error.filename or ""), why=str(error)
        ) from error
    return 0


def list_benchmarks(options: Namespace) -> None:
    """Print what there is."""
    for title, official in (("Own", False), ("Official, over files of their authors", True)):
        print(f"{title}:\n")
        for kind in BENCHMARKS.values():
            if issubclass(kind, OfficialBenchmark) == official:
                _tell(kind)


def _tell(kind: type[Benchmark]) -> None:
    print(f"{kind.name} {kind.version}: {kind.notes}")
    if issubclass(kind, OfficialBenchmark):
        terms = " (--accept-licence once you have read it)" * kind.source.restricted
        print(f"  licence: {kind.source.licence}{terms}\n  get: {kind.source.download}")
    width = max(map(len, kind.metrics)) + 2
    for metric, text in kind.metrics.items():
        print(f"  {metric:<{width}}{text}")
    print()


def check(options: Namespace) -> None:
    """What a run of a benchmark has and lacks; without a name, whether printed totals follow from their parts."""
    if options.benchmark is None:
        check_rows(["--rows", options.rows] if options.rows else [])
        return
    if options.rows is not None:
        raise ConfigError("--rows checks printed tables, and a name a benchmark", fix="give one of the two")
    benchmark = _benchmark(options)
    assert isinstance(benchmark, OfficialBenchmark)
    places = places_of(options, benchmark)
    for line in benchmark.inventory(places.has):
        print(line)
    _tell_scorers(benchmark, places)


def ready(options: Namespace) -> None:
    """The stage `prepare`."""
    benchmark = _benchmark(options)
    places = places_of(options, benchmark)
    items = _items(benchmark)
    path = options.list or options.out / ITEMS
    fixed = path == options.out / ITEMS and (options.out / MANIFEST).is_file()
    with _bar(f"reading {benchmark.name}", Shard(), items) as progress:
        found = prepare(benchmark, items, path, check=True, fixed=fixed, progress=progress)
    print(f"there: {found.items} items, {found.files} source files, sha256 {found.sha256}: {path}")
    if isinstance(benchmark, OfficialBenchmark):
        scores = {metric for item in items for metric in item.metrics}
        for line in benchmark.wanted(scores, places.has):
            print(line)
        _tell_scorers(benchmark, places)


def _tell_scorers(benchmark: Benchmark, places: Places) -> None:
    print(f"scored from pixels: {', '.join(benchmark.measured()) or 'nothing'}")
    by_models = [name for group in groups(benchmark, places) for name in group.measures]
    print(f"scored by models whose weights are there: {', '.join(by_models) or 'nothing'}")
    asked = INQUIRIES[benchmark.name].scores if benchmark.name in INQUIRIES else ()
    print(f"scored by a judge that is named: {', '.join(asked) or 'nothing'}")


def run(options: Namespace) -> None:
    """All stages; one shard of several leaves the table to `bernini bench aggregate`."""
    if options.benchmark in INQUIRIES and (named := judge_of(options)):
        named.check(_benchmark(options))  # before anything is made
    if options.benchmark in MEASURES:
        places_of(options, _benchmark(options))
    make(options)
    judge(options)
    if options.shard.count == 1:
        tabulate(options)


def make(options: Namespace) -> None:
    """The stage `generate`, after `prepare` where that was not done."""
    benchmark = _benchmark(options)
    items = _items(benchmark)
    folder = RunFolder(options.out, options.shard)
    planned = (options.model / PLANNER).is_dir() and not options.no_plan
    config = _sampling(options, planned)
    device = _device(options)
    paths = {
        "lora": options.lora,
        "vae": options.vae or options.model,
        "text": options.text or options.model,
    }
    tasks = list(dict.fromkeys(item.task for item in items))
    rows = options.text_rows or context_rows(paths["text"])
    identity = {
        "model": model_facts(options.model, **paths, planned=planned),
        "sampling": sampling_facts(config, tasks, planned)
        | {"text_rows": rows, "dtype": options.dtype, "autocast": device.type == "cuda"},
    }
    if not (folder.root / MANIFEST).is_file():
        with _bar(f"reading {benchmark.name}", Shard(), items) as progress:
            prepare(benchmark, items, folder.root / ITEMS, progress=progress)
    sampler = load_sampler(
        options.model, **paths, rows=rows, config=config, dtype=options.dtype, device=device, planned=planned
    )
    if planned:
        identity["sampling"]["planning"] = asdict(sampler.planning)
    folder.start({**describe(benchmark, items, len(items)), **identity}, environment(), benchmark.located())
    _generate(benchmark, items, sampler, folder, config.seed, options.batch_size)
    if options.bounds:
        # References need no weights of the transformers, so that their runs compare over all models of one VAE.
        codec = LatentCodec.from_pretrained(paths["vae"]).to(device)
        bounds: dict[str, tuple[Sampler, Sequence[Item], dict[str, Any]]] = {
            "source": (unedited, [item for item in items if is_edit(item)], {"model": {}}),
            "ceiling": (
                Ceiling(codec),
                [] if benchmark.blank_targets else items,
                {"model": {"vae": identity["model"]["vae"]}},
            ),
        }
        for name, (reference, chosen, facts) in bounds.items():
            if chosen:
                beside = RunFolder(folder.root / "bounds" / name, options.shard)
                about = {**describe(benchmark, chosen, len(items)), **facts}
                beside.start(about, environment(), benchmark.located())
                _generate(benchmark, chosen, reference, beside, config.seed, options.batch_size)


def judge(options: Namespace) -> None:
    """The stage `score`."""
    runs = [*_runs(options)]
    named = judge_of(options) if "judge_url" in options else None
    if named:
        for benchmark, _, _ in runs:
            named.check(benchmark)
    for benchmark, items, folder in runs:
        with _bar(f"scoring {folder.root.name}", folder.shard, items) as progress:
            score(benchmark, items, folder, workers=options.workers, progress=progress)
        if "weights" in options:
            for group in groups(benchmark, places_of(options, benchmark)):
                with _bar(f"measuring {', '.join(group.measures)}", folder.shard, items) as progress:
                    score_by_model(benchmark, items, folder, group, device=_device(options), progress=progress)
    if named:
        asked = named.judge()
        for benchmark, items, folder in runs:
            _ask(benchmark, items, folder, named, asked)


def _ask(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder, named: JudgeConfig, asked: Judge) -> None:
    own = folder.shard.of(items)
    with _bar(f"judging {folder.root.name}", folder.shard, items) as progress:
        judged = named.score(benchmark, own, folder, asked, progress=progress)
    n, of = judged.coverage()
    print(f"{judged.column}: {n} of {of} scores; answered by {', '.join(judged.served()) or 'nobody'}")
    for name, count in judged.violations().items():
        print(f"{count} answers have {name} above what caps it; the rule is {named.cap or 'off'}")


def tabulate(options: Namespace) -> None:
    """The stages `aggregate` and `report`.

    Raises:
        Incomplete: Scores are missing; the table is written all the same.
    """
    for benchmark, items, folder in reversed([*_runs(options)]):  # the bounds first: the table shows them
        summary = aggregate(benchmark, items, folder)
    page(options)
    print((folder.root / "table.md").read_text())
    print(f"report: {folder.root / 'report.html'}")
    if failed := summary["failures"]:
        raise Incomplete(
            f"{len(failed)} of {summary['items']} items lack scores",
            where=str(folder.root / "summary.json"),
            why=f"{failed[0]['id']}, {failed[0]['stage']}: {failed[0]['why']}",
            fix="run the command again: it tries what is missing",
        )


def page(options: Namespace) -> None:
    """The stage `report`."""
    benchmark, items, folder = next(_runs(options))
    write_page(benchmark, items, folder, options.examples)


def _benchmark(options: Namespace) -> Benchmark:
    kind = BENCHMARKS[options.benchmark]
    settings: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(kind)}
    return kind(**settings)


@cache
def _items(benchmark: Benchmark) -> Sequence[Item]:
    return benchmark.items()


def _device(options: Namespace) -> torch.device:
    name = options.device
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        why = str(error).splitlines()[0]
        raise ConfigError(f"there is no device {name!r}", where="--device", why=why, fix="auto, cpu, cuda:0") from error
    return device


def _sampling(options: Namespace, planned: bool) -> SamplingConfig:
    usual, weights = options.guidance[planned]
    mode, omega = options.mode or usual, weights if options.omega is None else options.omega
    known = asdict(Omegas())
    if unknown := omega.keys() - known.keys():
        name = min(unknown)
        raise ConfigError(
            f"unknown weight {name!r}", where="--omega", why=f"there are {', '.join(known)}", fix=closest(name, known)
        )
    return SamplingConfig(
        steps=options.steps,
        shift=options.shift,
        mode=None if mode == "task" else mode,
        omegas=Omegas(**omega),
        seed=options.sampling_seed,
    )


def _generate(
    benchmark: Benchmark, items: Sequence[Item], sampler: Sampler, folder: RunFolder, seed: int, batch_size: int
) -> None:
    with _bar(f"making {folder.root.name}", folder.shard, items) as progress:
        generate(benchmark, items, sampler, folder, seed=seed, batch_size=batch_size, progress=progress)


def _runs(options: Namespace) -> Iterator[tuple[Benchmark, Sequence[Item], RunFolder]]:
    """The run and the references beside it, as their manifests tell.

    Raises:
        ConfigError: A manifest is of a benchmark that is not here as it was.
    """
    root = Path(options.out)
    for path in (root, *sorted(p for p in (root / "bounds").glob("*") if p.is_dir())):
        folder = RunFolder(path, getattr(options, "shard", Shard()))
        manifest = folder.manifest()
        told = manifest["run"]
        name, version = told["benchmark"]["name"], told["benchmark"]["version"]
        kind = BENCHMARKS.get(name)
        if kind is None:
            raise ConfigError(f"unknown benchmark {name!r}", where=str(path), why=f"there are {', '.join(BENCHMARKS)}")
        settings = {**told["benchmark"]["settings"], **manifest["located"]}
        if unknown := settings.keys() - {setting.name for setting in fields(kind)}:
            raise ConfigError(
                f"{name} has no setting {min(unknown)!r}",
                where=str(path),
                why=f"the run is of version {version}, and this is {kind.version}",
                fix="score it with the release that made it, or make it again",
            )
        benchmark = kind(**settings)
        every = _items(benchmark)
        # All items, those of the unedited sources, or those of a callback with a limit.
        possible = (every, [item for item in every if is_edit(item)], subset(every, told["items"]["count"]))
        known = {key: told[key] for key in ("benchmark", "items")}
        items = next((some for some in possible if describe(benchmark, some, len(every)) == known), None)
        if items is None:
            raise ConfigError(
                f"the run is of {name} {version} with other items",
                where=str(path),
                why=f"this is {kind.name} {kind.version}",
                fix="score it with the release that made it, or make it again",
            )
        yield benchmark, items, folder


@contextmanager
def _bar(text: str, shard: Shard, items: Sequence[Item]) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(text, total=len(shard.of(items)))
        yield lambda done: progress.update(bar, completed=done)


def parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="bernini bench", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="STAGE")
    verbs.add_parser("list", help="the benchmarks and what they measure").set_defaults(run=list_benchmarks)
    add_check(verbs.add_parser("check", help="what a benchmark's run would lack, or whether printed totals add up"))
    preparing = verbs.add_parser("prepare", help="read and hash what a benchmark is made from, and list its items")
    names = preparing.add_subparsers(required=True, metavar="NAME", dest="benchmark")
    for name, kind in BENCHMARKS.items():
        one = names.add_parser(name, help=kind.notes)
        add_settings(one, kind)
        add_out(one, kind)
        one.add_argument("--list", type=Path, metavar="FILE", help="write the list there, not into the folder")
        add_weights(one, fetched=False)
        one.set_defaults(run=ready)
    for verb, stage, text in (
        ("run", run, "all stages, one after the other"),
        ("generate", make, "make what is not there yet"),
    ):
        names = verbs.add_parser(verb, help=text).add_subparsers(required=True, metavar="NAME", dest="benchmark")
        for name, kind in BENCHMARKS.items():
            one = names.add_parser(name, help=kind.notes)
            add_settings(one, kind)
            add_model(one, kind)
            if verb == "run":
                add_workers(one)
                add_examples(one)
                if name in MEASURES:
                    add_weights(one)
                if name in INQUIRIES:
                    add_judge(one)
            one.set_defaults(run=stage)
    scoring = (add_workers, add_shard, add_device, add_weights, add_judge)
    for verb, stage, text, *more in (
        ("score", judge, "score what is made and has no scores yet", *scoring),
        ("aggregate", tabulate, "make table and report from all scores", add_examples),
        ("report", page, "write the HTML report again", add_examples),
    ):
        one = verbs.add_parser(verb, help=text)
        one.add_argument("out", type=Path, metavar="FOLDER", help="folder of a run")
        for add in more:
            add(one)
        one.set_defaults(run=stage)
    return parser


def add_check(parser: ArgumentParser) -> None:
    """Options of `bernini bench check`."""
    text = "recompute the totals of printed tables (default: those that come with the package)"
    parser.add_argument("--rows", metavar="FILE", nargs="?", const="", help=text)
    parser.set_defaults(run=check, benchmark=None)
    names = parser.add_subparsers(metavar="NAME", dest="benchmark")
    for name, kind in OFFICIAL.items():
        one = names.add_parser(name, help=kind.notes)
        add_settings(one, kind)
        add_weights(one, fetched=False)
