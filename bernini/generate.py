"""`bernini generate`: make and edit images and clips, one or many."""

import json
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
from bernini.reasoning import check_reasoning, instruction
from bernini.rewriting import Rewriter, RewriterConfig
from bernini.tasks import TASKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUPS = {
    "sampling": ("mode", "steps", "shift", "solver", "seed", "negative_prompt"),
    "weights of guidance": (
        *("omega_vid", "omega_img", "omega_txt", "omega_tgt", "omega_scale"),
        *("apg_eta", "apg_threshold", "apg_momentum"),
    ),
    "size and length": ("frames", "height", "width", "fps", "max_edge", "min_edge"),
    "planning": ("planning_steps", "planning_flow_steps", "planning_txt", "planning_img", "planning_order"),
    "reasoning": ("reasoning", "reasoning_tokens", "reasoning_temperature"),
}
"""Settings as `--help` shows them."""
METAVARS = {int: "N", float: "X", str: "TEXT"}


def main(argv: Sequence[str]) -> int:
    """Run `bernini generate`."""
    options = parser().parse_args(argv)
    disable_progress_bar()  # of loading models
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cases = _cases(options)
    planned = not options.no_plan and (options.planner is not None or (options.model / PLANNER).is_dir())
    rewriter = _rewriter(options)
    _check(cases, Defaults.of(options.model), planned, rewriter)
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
            _make(pipeline, batch, planned, rewriter if batch[0].rewrite else None, options)
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
                rewrite=options.rewrite is not None,
                settings=settings,
            )
        ]
    if given := [f"--{name}" for name, value in single.items() if value]:
        raise ConfigError(f"{given[0]} beside --cases", fix="write it into the list")
    return read_cases(options.cases, options.out, settings, options.preset, options.rewrite is not None)


def _rewriter(options: Namespace) -> Rewriter | None:
    given = {name: getattr(options, name) for name in ("rewrite", "rewrite_model")}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if len(missing) == 2 and options.rewrite_key is None:
        return None
    if missing:
        raise ConfigError(
            f"a rewriter without {missing[0]}", why="it is found by its url and the name of its model", fix="give both"
        )
    return Rewriter(RewriterConfig(options.rewrite, options.rewrite_model, options.rewrite_key))


def _check(cases: Sequence[Case], defaults: Defaults, planned: bool, rewriter: Rewriter | None) -> None:
    """Find what is wrong with any case before the model is read."""
    for case in cases:
        try:
            request = case.request()
            settings = defaults.settle(case.task, planned, case.preset, case.settings)
            check_reasoning(request, settings.reasoning, case.rewrite)
            if case.rewrite:
                instruction(request)
        except BerniniError as error:
            if error.where or not case.where:
                raise
            raise type(error)(error.what, where=case.where, why=error.why, fix=error.fix) from error
        if case.plan and not planned:
            raise ConfigError("a plan without a planner", where=case.where, fix="give --planner, without --no-plan")
        if case.rewrite and rewriter is None:
            raise ConfigError(
                "nobody to rewrite the prompt", where=case.where, fix="--rewrite URL --rewrite-model NAME"
            )


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


def _make(
    pipeline: BerniniPipeline, batch: Sequence[Case], planned: bool, rewriter: Rewriter | None, options: Namespace
) -> None:
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
        rewrite=rewriter.rewrite if rewriter else None,
        **batch[0].settings,
    )
    assert isinstance(made, BerniniPipelineOutput)
    seconds = time.monotonic() - started
    for number, (case, settings) in enumerate(zip(batch, own, strict=True)):
        video: Tensor = made.videos[number]
        rendered, thought = made.conversations[number], made.thoughts[number]
        frame = thought.frame if thought else None
        told = {
            "model": str(options.model),
            "planner": str(options.planner or options.model) if planned else None,
            "task": case.task,
            "prompt": case.prompt,
            "rewriter": {"url": rewriter.config.url, "model": rewriter.config.model} if rewriter else None,
            "thought": thought.text if thought else None,
            "explicit_prompt": thought.explicit if thought else None,
            "edited_frame": None if frame is None else str(case.kept_frame),
            "rendered_task": rendered.task,
            "rendered_prompt": rendered.prompt,
            "videos": case.videos,
            "images": case.images,
            "plan": case.plan,
            "settings": asdict(replace(made.settings[number], seed=settings.seed)),
            "frames": video.shape[1],
            "height": video.shape[2],
            "width": video.shape[3],
            "seconds": round(seconds, 3),
            "made_together": len(batch),
        }
        if options.save_plan and made.plans is not None:
            write_plan(case.kept_plan, made.plans[number])
        if frame is not None:
            write_image(case.kept_frame, frame)
        with replacing(case.manifest) as temporary:
            temporary.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        if case.out.suffix == ".png":
            write_image(case.out, video)
        else:
            write_video(case.out, video, settings.fps)
        print(case.out)


def parser() -> ArgumentParser:
    """The command's options."""
    usage = [
        "bernini generate --model FOLDER --task TASK --prompt TEXT [--video FILE ...] [--image FILE ...] --out FILE",
        "bernini generate --model FOLDER --cases FILE --out FOLDER",
    ]
    made = ArgumentParser(
        prog="bernini generate",
        usage="\n       ".join(f"{line} [options]" for line in usage),
        description="Make and edit images and clips, one or many; docs/generate.md is the guide.",
    )
    add = made.add_argument_group("what to make").add_argument
    add("--task", help=", ".join(TASKS))
    add("--prompt", metavar="TEXT", help="what to make, or to do")
    add("--video", nargs="+", action="extend", default=[], metavar="FILE", help="source clips")
    add("--image", nargs="+", action="extend", default=[], metavar="FILE", help="source images, or reference images")
    add("--plan", metavar="FILE", help="render this plan, which --save-plan wrote, in place of planning")
    add("--cases", type=Path, metavar="FILE", help="JSON list of cases, in place of all of the above")
    add("--out", type=Path, required=True, metavar="PATH", help="file to write, or the folder of all cases")
    add("--overwrite", action="store_true", help="make again what exists")
    add("--save-plan", action="store_true", help="write plans beside the outputs")
    add("--batch-size", type=_positive, default=1, metavar="N", help="most cases made together (default: %(default)s)")
    add = made.add_argument_group("model").add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a Wan, Bernini-R or Bernini model")
    add("--planner", type=Path, metavar="FOLDER", help="the planner (default: the model's, if it has one)")
    add("--no-plan", action="store_true", help="render without a plan")
    add("--device", default="auto", help="where to compute (default: the GPU, if there is one)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of weights (default: bfloat16, float32 on the CPU)")
    add("--offload", action="store_true", help="keep parts in main memory until they are needed")
    add = made.add_argument_group(
        "rewriter", "Another model makes prompts explicit, in place of --reasoning."
    ).add_argument
    add("--rewrite", metavar="URL", help="root of an OpenAI-compatible interface, such as http://localhost:8000/v1")
    add("--rewrite-model", metavar="NAME", help="name of the model there")
    add("--rewrite-key", metavar="VARIABLE", help="environment variable that holds the key, if one is wanted")
    add = made.add_argument_group(
        "settings", "What is not set comes from the model's folder, then from the preset."
    ).add_argument
    add("--preset", metavar=_choice(PRESETS), help="of the released models (default: v2 with a planner, r without)")
    texts = {one.arg_name: one.description for one in parse(Settings.__doc__ or "").params}
    kinds = get_type_hints(Settings)
    for title, names in GROUPS.items():
        group = made.add_argument_group(title)
        for name in names:
            kind = TYPES[name]
            metavar = _choice(get_args(kinds[name])) if get_args(kinds[name]) else METAVARS[kind]
            help = (texts[name] or "").replace("%", "%%").replace("``", "").rstrip(".")
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    return made


def _choice(names: Iterable[str]) -> str:
    return f"{{{','.join(names)}}}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("at least 1")
    return value
