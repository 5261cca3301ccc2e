"""`bernini export`: models and trained weights in the layouts of other tools."""

import shutil
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from bernini.checkpoints.gathering import gather
from bernini.checkpoints.layouts import Layout, export_model
from bernini.checkpoints.lora import EXPERTS, FILES, Form, LoRA, fold, lora_files, read_lora, write_lora
from bernini.checkpoints.names import original_name
from bernini.checkpoints.stored import DTYPES, StoredTensor, read_folder
from bernini.checkpoints.streaming import write
from bernini.errors import CheckpointError
from bernini.files import appearing
from bernini.flow.noise import Expert
from bernini.renderer.experts import FOLDERS, load_transformer

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENDINGS: dict[Expert, str] = {"single": "", "high": "_high_noise", "low": "_low_noise"}


def gather_loras(sources: Sequence[Path], expert: Expert | None = None) -> dict[Expert, LoRA]:
    """LoRAs by the expert that they are for.

    Args:
        sources: Files that :func:`read_lora` knows, folders with diffusers' files, or runs that wrote them.
        expert: What a LoRA is for whose file does not say; ``single`` if not given.

    Raises:
        CheckpointError: A source holds no LoRA, or they are not one for a single transformer or one for each expert.
    """
    found: dict[Expert, LoRA] = {}
    for source in sources:
        files = {"transformer": source} if source.is_file() else lora_files(source)
        for name, file in files.items():
            lora = read_lora(file)
            place: Expert = lora.expert or expert or "single"
            if name == FOLDERS["low"] or len(files) > 1:
                place = EXPERTS[name]
            if place in found or (found and "single" in {place, *found}):
                raise CheckpointError(
                    "these LoRAs are not one for each expert",
                    where=", ".join([*(other.where for other in found.values()), str(file)]),
                    why=f"the last one is for {place}, those before for {' and '.join(found)}",
                    fix="export them one at a time, and say what a file is for with --expert high or --expert low",
                )
            found[place] = replace(lora, expert=place)
    return found


def export_lora(sources: Sequence[Path], to: Form, out: Path, expert: Expert | None, dtype: torch.dtype | None) -> None:
    """Write LoRAs in diffusers' form, into the folder ``out``, or in ComfyUI's, into files that begin with ``out``."""
    for place, lora in gather_loras(sources, expert).items():
        path = out / FILES[FOLDERS[place]] if to == "diffusers" else _file(out, place)
        write_lora(path, lora, to, dtype)
        print(path)


def export_merged(
    model: Path, sources: Sequence[Path], out: Path, expert: Expert | None, dtype: torch.dtype | None
) -> None:
    """Write a diffusers folder with LoRAs folded into its transformers; all else is copied. It appears when complete.

    Args:
        model: Wan or Bernini-R diffusers folder.
        sources: LoRAs, as for :func:`gather_loras`.
        out: The new folder.
        expert: What a LoRA is for whose file does not say.
        dtype: Dtype of the merged transformers; as stored if not given.

    Raises:
        ConfigError: ``out`` exists.
        CheckpointError: Model and LoRAs do not fit.
    """
    loras = gather_loras(sources, expert)
    experts = _experts(model)
    if missing := loras.keys() - experts:
        lora = loras[missing.pop()]
        raise CheckpointError(
            "the LoRA is for no transformer of the model",
            where=lora.where,
            why=f"it is for {lora.expert}, and {model} has {' and '.join(experts)}",
            fix="give the LoRA's own model, or say what the LoRA is for with --expert high or --expert low",
        )
    with appearing(out) as temporary:
        for place, lora in loras.items():
            transformer = load_transformer(model, place, dtype or _stored_dtype(model / FOLDERS[place]))
            fold(transformer, lora)
            transformer.save_pretrained(temporary / FOLDERS[place])
        done = {FOLDERS[place] for place in loras}
        for part in model.iterdir():
            if part.name not in done and not part.name.startswith("."):  # such as the cache of a download
                (shutil.copytree if part.is_dir() else shutil.copy2)(part, temporary / part.name)
    print(out)


def export_comfyui(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Write whole transformers as ComfyUI's diffusion models, one file each, under the original names.

    Raises:
        CheckpointError: The folder has no transformer of a Wan text-to-video model, or a damaged one.
    """
    found = gather([model], EXPERTS, optional=EXPERTS).models
    if not found:
        raise _no_model(model)
    for name, part in found.items():
        renamed: dict[str, StoredTensor] = {}
        for key, tensor in part.tensors.items():
            original = original_name(key)
            if original is None:
                raise CheckpointError("ComfyUI's Wan knows no such tensor", where=f"{tensor.file}, {key}")
            renamed[original] = tensor
        file = _file(out, EXPERTS[name] if len(found) > 1 or name == FOLDERS["low"] else "single")
        write(file, renamed, dtype)
        print(file)


def _file(out: Path, expert: Expert) -> Path:
    """``NAME.safetensors``, or with two experts ``NAME_high_noise.safetensors`` and ``NAME_low_noise.safetensors``."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}{ENDINGS[expert]}.safetensors")


def _experts(model: Path) -> list[Expert]:
    """The experts of a diffusers folder."""
    first, second = ((model / FOLDERS[expert] / "config.json").is_file() for expert in ("high", "low"))
    if not (first or second):
        raise _no_model(model)
    return ["high", "low"] if first and second else ["low"] if second else ["single"]


def _no_model(model: Path) -> CheckpointError:
    return CheckpointError(
        "no diffusers model here",
        where=str(model),
        why="neither transformer/ nor transformer_2/ in it holds a config.json",
        fix="give the folder of a Wan or Bernini-R model, or the model/ of a run that trained all weights; "
        "`bernini export model --to renderer` makes one of other layouts",
    )


def _stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of most tensors in a folder."""
    counts = Counter(tensor.dtype for tensor in read_folder(folder).values())
    return DTYPES.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32


def main(argv: Sequence[str]) -> int:
    """Run `bernini export`."""
    parser = ArgumentParser(prog="bernini export", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="model|lora|merged|comfyui")
    model = verbs.add_parser("model", help="a whole model, or its planner or renderer, in another layout")
    lora = verbs.add_parser("lora", help="LoRA files for ComfyUI or diffusers, from either")
    merged = verbs.add_parser("merged", help="a diffusers model with LoRAs folded in")
    comfyui = verbs.add_parser("comfyui", help="whole transformers as ComfyUI's diffusion models")
    folders = "folder of a model or of parts of it, in any layout; each part comes from the first that has it"
    model.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help=folders)
    model.add_argument("--to", choices=get_args(Layout), required=True)
    source = "LoRA file, folder with diffusers' LoRA files, or run; one of each expert"
    lora.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help=source)
    lora.add_argument("--to", choices=get_args(Form), required=True)
    merged.add_argument("--lora", dest="sources", type=Path, nargs="+", required=True, metavar="SOURCE", help=source)
    for verb in (merged, comfyui):
        verb.add_argument("--model", type=Path, required=True, help="folder of the model")
    for verb in (lora, merged):
        verb.add_argument("--expert", choices=["high", "low"], help="what a LoRA is for whose file does not say")
    runs = ((model, export_model), (lora, export_lora), (merged, export_merged), (comfyui, export_comfyui))
    for verb, run in runs:
        verb.set_defaults(run=run)
        named = "folder for diffusers; for ComfyUI how the names of the files begin"
        verb.add_argument("--out", type=Path, required=True, help="new folder" if verb in (model, merged) else named)
        verb.add_argument("--dtype", choices=list(CHOICES), help="of the weights (default: as they are)")
    options = vars(parser.parse_args(argv))
    options["dtype"] = CHOICES.get(options["dtype"])
    run = options.pop("run")
    run(**options)
    return 0
