"""Writing a model in the released layout and in that of diffusers, from the parts that were gathered for it."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from bernini.checkpoints.gathering import MODELS, Gathered, gather
from bernini.checkpoints.parts import BERNINI, EXPERTS, RELEASED, expert_boundary, read_json
from bernini.checkpoints.streaming import write_sharded
from bernini.errors import CheckpointError
from bernini.files import appearing
from bernini.planner.model import PlannerConfig, shaped
from bernini.planner.settings import FILE as SETTINGS
from bernini.planner.settings import PlannerSettings

Layout = Literal["released", "diffusers", "renderer", "planner"]
RENDERER = ("transformer", "transformer_2", "text_encoder", "vae", "tokenizer", "scheduler")
PARTS: dict[Layout, tuple[str, ...]] = {
    "released": (*RENDERER, "planner"),
    "diffusers": (*RENDERER, "planner"),
    "renderer": RENDERER,
    "planner": ("planner",),
}
"""What each layout is made of: the whole model as released, the whole one with a folder for each part, or one half."""


def export_model(sources: list[Path], to: Layout, out: Path, dtype: torch.dtype | None) -> None:
    """Write a model in another layout, tensor by tensor; the folder appears when it is complete.

    Args:
        sources: Folders of models in any layout; each part comes from the first that has it.
        to: The layout.
        out: The new folder.
        dtype: Dtype of the weights, but for the VAE's, which stay as they are; all as stored if not given.

    Raises:
        ConfigError: ``out`` exists.
        CheckpointError: A part is missing or damaged, or does not fit its configuration or the others; or the disk
            does not take the folder.
    """
    model = gather(sources, PARTS[to], optional=() if to == "released" else ("transformer_2",))
    try:
        with appearing(out) as folder:
            (_write_released if to == "released" else _write_folders)(model, folder, dtype)
    except OSError as error:
        fix = "make room, or give another --out; nothing of it was left behind"
        raise CheckpointError("the model cannot be written", where=str(out), why=str(error), fix=fix) from error
    print(out)


def _write_released(model: Gathered, out: Path, dtype: torch.dtype | None) -> None:
    parts = {name: model.models[name].whole for name in RELEASED}
    tensors = {RELEASED[part] + name: tensor for part, own in parts.items() for name, tensor in own.items()}
    write_sharded(out / BERNINI, "model", tensors, dtype)
    for name in EXPERTS:
        shutil.copyfile(model.models[name].config, out / f"{name}_config.json")
    _write_part(model, "text_encoder", out / "t5_text_encoder", dtype)
    _write_part(model, "vae", out / "vae", dtype)
    _copy_folder(model.folders["tokenizer"], out / "t5_tokenizer")
    _copy_folder(model.folders["scheduler"], out / "scheduler")
    _copy_planner_files(model, out)
    if not (out / "config.json").exists():
        _write_json(out / "config.json", _bernini_config(model))


def _write_folders(model: Gathered, out: Path, dtype: torch.dtype | None) -> None:
    for name in model.models.keys() - {"planner"}:
        _write_part(model, name, out / name, dtype)
    for name, folder in model.folders.items():
        _copy_folder(folder, out / name)
    if "transformer" in model.models:
        _write_json(out / "model_index.json", _model_index(model))
    if "planner" in model.models:
        write_sharded(out / BERNINI, "model", model.models["planner"].tensors, dtype)
        _copy_planner_files(model, out)


def _write_part(model: Gathered, name: str, folder: Path, dtype: torch.dtype | None) -> None:
    found = model.models[name]
    write_sharded(folder, MODELS[name].stem, found.tensors, None if name == "vae" else dtype)
    shutil.copyfile(found.config, folder / "config.json")


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder without weights, which the released ``mllm/`` may have to no purpose, and caches of downloads."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", ".*"))


def _copy_planner_files(model: Gathered, out: Path) -> None:
    """What belongs to a planner besides weights: the multimodal LLM's files, its settings and the full model's own."""
    root = model.models["planner"].source
    _copy_folder(model.models["planner"].config.parent, out / "mllm")
    if (settings := root / BERNINI / SETTINGS).is_file():
        shutil.copyfile(settings, out / BERNINI / SETTINGS)
    if (config := root / "config.json").is_file() and read_json(config).get("model_type") == "bernini":
        shutil.copyfile(config, out / "config.json")


def _write_json(path: Path, told: dict[str, Any]) -> None:
    path.write_text(json.dumps(told, indent=2) + "\n")


def _model_index(model: Gathered) -> dict[str, Any]:
    """What diffusers' ``WanPipeline`` reads: the class of each part, and where the experts meet."""
    both = "transformer_2" in model.models
    return {
        "_class_name": "WanPipeline",
        "boundary_ratio": expert_boundary(*model.sources) if both else None,
        "scheduler": ["diffusers", _class_name(model.folders["scheduler"] / "scheduler_config.json", "_class_name")],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [
            "transformers",
            _class_name(model.folders["tokenizer"] / "tokenizer_config.json", "tokenizer_class"),
        ],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if both else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _class_name(config: Path, key: str) -> str:
    name = read_json(config).get(key)
    if not isinstance(name, str):
        raise CheckpointError("a configuration does not say what it is for", where=f"{config}, {key}")
    return name


def _bernini_config(model: Gathered) -> dict[str, Any]:
    """The full model's own configuration under the released keys, for one that was not trained from a released one."""
    planner = model.models["planner"]
    shape = shaped(PlannerConfig(), planner.tensors)
    hidden = planner.tensors["mask_tokens"].shape[2]
    return {
        "model_type": "bernini",
        "architectures": ["BerniniModel"],
        "mllm_attn_implementation": "sdpa",
        "mllm_subfolder": "mllm",
        "processor_subfolder": "mllm",
        "vae_subfolder": "vae",
        "t5_text_encoder_subfolder": "t5_text_encoder",
        "t5_tokenizer_subfolder": "t5_tokenizer",
        "bernini_ckpt_subfolder": BERNINI,
        "scratch": True,
        "scratch_mllm": True,
        "cotrain": True,
        "switch_dit_boundary": expert_boundary(*model.sources),
        "shift": 3.0,
        "use_src_id_rotary_emb": True,
        "feature_type_from_stage_one": "masked_tgt_embed_with_qwen_txt_vit_tokens",
        "num_mask_token": shape.mask_tokens,
        "max_sequence_length": 512,
        "clip_diff_cfg": {
            "model_type": "flow_match",
            "z_channels": hidden,
            "target_channels": hidden,
            "width": shape.flow_width,
            "depth": shape.flow_depth,
            "diffusion_batch_mul": shape.batch_mul,
            "shift": PlannerSettings.of(planner.source).flow_shift,
        },
        "connector_cfg": {
            "out_dim_for_gen": shape.gen_dim,
            "out_dim_for_vit": hidden,
            "enable_gen_branch": True,
            "enable_vit_branch": True,
            "gen_head_type": "zerolinear",
        },
        "mask_ratio_infer_cfg": {"generator_type": "default"},
        "t5_max_sequence_length": 512,
        "t5_combine_type": "concat_with_zero_init",
        "target_fps": 16,
    }
