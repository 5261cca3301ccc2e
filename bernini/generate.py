"""`bernini generate`: make and edit images and clips, one or many."""

import json
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from docstring_parser import parse
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bernini.cases import Case, batches, read_cases
from bernini.errors import BerniniError, ConfigError
from bernini.files import replacing
from bernini.inputs import read
from bernini.media import write_image, write_video
from bernini.pipeline import BerniniPipeline, BerniniPipelineOutput
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.model import FOLDER as PLANNER
from bernini.planner.plan_files import read_plan, write_plan
from bernini.presets import PRESETS, TYPES, Defaults, Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str]) -> int:
    """Run `bernini generate`."""
    options = parser().parse_args(argv)
    disable_progress_bar()  # of loading models
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cases = _cases(options)
    planned = not options.no_plan and (options.planner is not None or (options.model / PLANNER).is_dir())
    _check(cases, Defaults.of(options.model), planned)
    todo = []
    for case in cases[rank::ranks]:
        if case.out.exists() and not options.overwrite:
            print(f"{case.out} exists")
        else:
            todo.append(case)
    if todo:
        pipeline = _load(options, planned)
        pipeline.set_progress_bar_config(disable=None if rank == 0 else True)  # None: on terminals alone
        for batch in batches(todo, options.batch_size):
            _make(pipeline, batch, planned, options)
    return 0


def _cases(options: Namespace) -> list[Case]:
    settings = {name: value for name in TYPES if (value := getattr(options, name)) is not None}
    single = {name: getattr(options, name) for name in ("task", "prompt", "video", "image", "plan")}
    if options.cases is None:
        if options.task is None:
            raise ConfigError("nothing to make", fix="give --task, and --prompt; or --cases FILE")
        return [
            Case(
                out=options.out,
                task=options.task,
                prompt=options.prompt or "",
                videos=tuple(options.video),
                images=tuple(options.image),
                plan=options.plan,
                preset=options.preset,
                settings=settings,
            )
        ]
    if given := [f"--{name}" for name, value in single.items() if value]:
        raise ConfigError(f"{given[0]} beside --cases", fix="write it into the list")
    return read_cases(options.cases, options.out, settings, options.preset)


def _check(cases: Sequence[Case], defaults: Defaults, planned: bool) -> None:
    """Find what is wrong with any case before the model is read."""
    for case in cases:
        try:
            case.request()
            defaults.settle(case.task, planned, case.preset, case.settings)
        except BerniniError as error:
            if error.where or not case.where:
                raise
            raise type(error)(error.what, where=case.where, why=error.why, fix=error.fix) from error
        if case.plan and not planned:
            raise ConfigError("a plan without a planner", where=case.where, fix="give --planner, without --no-plan")


def _load(options: Namespace, planned: bool) -> BerniniPipeline:
    device = options.device
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    cpu = torch.device(device).type == "cpu"
    dtype = DTYPES["float32" if cpu else "bfloat16"] if options.dtype == "auto" else DTYPES[options.dtype]
    if cpu and options.offload:
        raise ConfigError("--offload has nowhere to move weights from", where="--device cpu", fix="leave it out")
    parts: dict[str, Any] = {}
    if not planned:
        parts["planner"] = None
    elif options.planner is not None:
        parts["planner"] = ConversationPlanner.from_pretrained(options.planner, dtype)
    pipeline = BerniniPipeline.from_pretrained(options.model, dtype, **parts)
    if options.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def _make(pipeline: BerniniPipeline, batch: Sequence[Case], planned: bool, options: Namespace) -> None:
    """Make the outputs of cases that have their settings, but for the seed, in common."""
    started = time.monotonic()
    own = [pipeline.defaults.settle(case.task, planned, case.preset, case.settings) for case in batch]
    requests = [case.request() for case in batch]
    for request, settings in zip(requests, own, strict=True):
        read(request, settings)
    made = pipeline(
        requests,
        preset=batch[0].preset,
        plan=planned,
        plans=[read_plan(case.plan) for case in batch if case.plan] or None,
        seeds=[settings.seed for settings in own],
        **batch[0].settings,
    )
    assert isinstance(made, BerniniPipelineOutput)
    seconds = time.monotonic() - started
    for number, (case, settings) in enumerate(zip(batch, own, strict=True)):
        video: Tensor = made.videos[number]
        told = {
            "model": str(options.model),
            "planner": str(options.planner or options.model) if planned else None,
            "task": case.task,
            "prompt": case.prompt,
            "rendered_prompt": made.conversations[number].prompt,
            "videos": case.videos,
            "images": case.images,
            "plan": case.plan,
            "settings": asdict(settings),
            "frames": video.shape[1],
            "height": video.shape[2],
            "width": video.shape[3],
            "seconds": round(seconds, 3),
            "made_together": len(batch),
        }
        if options.save_plan and made.plans is not None:
            write_plan(case.kept_plan, made.plans[number])
        with replacing(case.manifest) as temporary:
            temporary.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        if case.out.suffix == ".png":
            write_image(case.out, video)
        else:
            write_video(case.out, video, settings.fps)
        print(case.out)


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(prog="bernini generate", description=__doc__)
    add = made.add_argument_group("what to make").add_argument
    add("--task", help="task, such as t2v, v2v, r2v (see docs/generate.md)")
    add("--prompt", help="what to make, or to do")
    add("--video", nargs="+", action="extend", default=[], metavar="FILE", help="source clips")
    add("--image", nargs="+", action="extend", default=[], metavar="FILE", help="source images, or reference images")
    add("--plan", metavar="FILE", help="render this plan, which --save-plan wrote, in place of planning")
    add("--cases", type=Path, metavar="FILE", help="JSON list of cases, in place of all of the above")
    add("--out", type=Path, required=True, help="file to write, or the folder of all cases")
    add("--overwrite", action="store_true", help="make again what exists")
    add("--save-plan", action="store_true", help="write plans beside the outputs")
    add("--batch-size", type=_positive, default=1, help="most cases to make together (default: %(default)s)")
    add = made.add_argument_group("model").add_argument
    add("--model", type=Path, required=True, help="folder of a Wan, Bernini-R or Bernini model")
    add("--planner", type=Path, help="folder of the planner (default: the model's, if it has one)")
    add("--no-plan", action="store_true", help="render without a plan")
    add("--device", default="auto", help="where to compute (default: the GPU, if there is one)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of weights (default: bfloat16, float32 on the CPU)")
    add("--offload", action="store_true", help="keep parts in main memory until they are needed")
    group = made.add_argument_group("settings", "What is not set comes from the model's folder, then from the preset.")
    group.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: v2 with a planner, r without)")
    texts = {one.arg_name: one.description for one in parse(Settings.__doc__ or "").params}
    for name, kind in TYPES.items():
        help = (texts[name] or "").replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=help)
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("at least 1")
    return value
