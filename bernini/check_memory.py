"""`bernini check -c CONFIG`: how much memory training by a configuration takes, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bernini.checkpoints.parts import EXPERTS, read_json
from bernini.errors import ConfigError
from bernini.lora import add_lora
from bernini.memory import FP32, GIB, HALF, ROOM, Activations, States, fastest, needs
from bernini.quantizing import Quantization, quantize
from bernini.renderer.experts import FOLDERS, SHAPES, Architecture, experts_of
from bernini.renderer.lora import LoRAConfig
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.swapping import saved


def memory(configs: Sequence[str], tokens: int | None, shape: str | None, gib: float | None) -> dict[str, str]:
    """What a training step of a renderer takes, without its VAE and text encoder.

    Args:
        configs: Configuration files, later ones over earlier ones.
        tokens: Tokens of a pack; those of the data's ``pack`` if not given.
        shape: A name of `SHAPES`, where the weights to start from are not there yet.
        gib: Memory of the device, if it is to be said what fits.

    Returns:
        Facts by name.

    Raises:
        ConfigError: The configuration trains no renderer, or its shape or tokens are unknown.
    """
    config = _read(configs)
    model = config.get("model", DictConfig({}))
    path, given = str(model.get("class_path", "")), model.get("init_args", DictConfig({}))
    if not path.endswith("RendererModule"):
        raise ConfigError(
            f"{path or 'no model'}: only the memory of a renderer's training is known", where=", ".join(configs)
        )
    tokens = tokens or OmegaConf.select(config, "data.init_args.pack.tokens")
    if tokens is None:
        raise ConfigError(
            "how many tokens a pack has is not known",
            where="data.init_args.pack.tokens",
            fix="give --tokens: a clip of 81 frames at 480 x 832 has 32760",
        )
    architecture = _shape(given, shape)
    compiled, mixed = bool(given.get("compile", False)), "mixed" in str(_trainer(config, "precision"))
    lora, (shards, peers) = given.get("lora"), _ranks(config)
    models = [
        _meta(architecture, lora, given.get("frozen_dtype", "float32"), given.get("quantize"))
        for _ in experts_of(given.get("expert", "single"))
    ]
    states = States.of(
        models,
        mixed and not compiled,
        average=_averages(config),
        shards=shards,
    )
    states = replace(states, weights=states.weights - sum(saved(m, given.get("swap_blocks", 0)) for m in models))
    half = mixed or shards > 1  # sharded weights compute in half precision
    activations = Activations.of(architecture, -(-tokens // peers), compiled, HALF if half else FP32)
    need = needs(states, activations, (_trainer(config, "accumulate_grad_batches") or 1) > 1)
    facts = {name: _told(size) for name, size in vars(states).items() if size}
    facts["one block"] = f"{_told(activations.working)}, in its backward pass"
    facts |= {
        f"recompute: {way}": f"{_told(size)} in all, {_told(activations.kept[way])} kept" for way, size in need.items()
    }
    if gib is not None:
        way = fastest(need, ROOM * gib * GIB)
        fits = need[way] <= ROOM * gib * GIB
        facts["fastest"] = f"{way}, on a device of {gib:g} GiB" if fits else f"none fits a device of {gib:g} GiB"
    return {"tokens": f"{tokens:,}"} | facts


def _read(configs: Sequence[str]) -> DictConfig:
    try:
        merged = OmegaConf.merge(*(OmegaConf.load(path) for path in configs))
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError("the configuration cannot be read", where=", ".join(configs), why=str(error)) from error
    assert isinstance(merged, DictConfig)
    return merged


def _trainer(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, f"trainer.{key}")


def _ranks(config: DictConfig) -> tuple[int, int]:
    """How many GPUs share the weights, and how many a pack."""
    strategy = _trainer(config, "strategy")
    if not isinstance(strategy, DictConfig):
        return 1, 1
    given = strategy.get("init_args") or DictConfig({})
    peers = int(given.get("tensor_parallel_size", 1))
    if "data_parallel_size" in given:
        return int(given.data_parallel_size) * peers, peers
    return int(config.trainer.devices) * int(_trainer(config, "num_nodes") or 1) // int(given.get("replicas", 1)), peers


def _averages(config: DictConfig) -> bool:
    callbacks = OmegaConf.select(config, "trainer.callbacks") or []
    return any(str(callback.get("class_path")).endswith("EMA") for callback in callbacks)


def _shape(given: DictConfig, shape: str | None) -> Architecture:
    """Of the configuration, of the weights' folder or by name."""
    if shape:
        return SHAPES[shape]
    if (own := given.get("architecture")) is not None:
        return Architecture.of(dict(own))
    expert = next(iter(experts_of(given.get("expert", "single")).values()))
    found = EXPERTS[FOLDERS[expert]].config(Path(str(given.get("init_from"))))
    if found is None:
        raise ConfigError(
            "the renderer's shape is not known",
            where="model.init_args.init_from",
            why=f"{given.get('init_from')} is not there",
            fix=f"give --shape {' or '.join(SHAPES)}",
        )
    return Architecture.of(read_json(found))


def _meta(
    architecture: Architecture, lora: DictConfig | None, frozen: str, kind: Quantization | None
) -> PackedWanTransformer3DModel:
    """The transformer without memory, trained as the configuration says."""
    with torch.device("meta"):
        model = architecture.build()
        if lora is not None:
            model = model.to(getattr(torch, frozen))
            given: dict[str, Any] = {str(name): value for name, value in lora.items() if name != "init_from"}
            add_lora(model, LoRAConfig(**given))
        if kind:
            quantize(model.blocks, kind)
    return model


def _told(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
