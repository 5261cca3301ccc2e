"""Tiny random CLIP, DINO and DINOv2 in folders as they are published, and heads that rate CLIP's features."""

from itertools import pairwise
from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

WIDTH = 12  # of features that CLIP projects to
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz,."


def write_clip(folder: Path, seed: int = 0, patch: int = 32) -> Path:
    """A CLIP with its processor and a tokenizer of single letters."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS), *ends])}
    start, end = (vocabulary[token] for token in ends)
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": len(vocabulary), "bos_token_id": start, "eos_token_id": end},
        vision_config={**SMALL, "image_size": 224, "patch_size": patch},
        projection_dim=WIDTH,
    )
    _save(CLIPModel, config, folder, seed)
    CLIPImageProcessorPil().save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def write_dino(folder: Path, seed: int = 0, patch: int = 16) -> Path:
    """A DINO."""
    _save(ViTModel, ViTConfig(**SMALL, image_size=224, patch_size=patch), folder, seed, add_pooling_layer=False)
    return folder


def write_dinov2(folder: Path, seed: int = 0) -> Path:
    """A DINOv2 with its processor."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    _save(Dinov2Model, config, folder, seed)
    shown = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessorPil(**shown, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
        folder
    )
    return folder


def write_head(path: Path, widths: tuple[int, ...] = (WIDTH, 1), seed: int = 0) -> Path:
    """Linear layers that rate features about 5; one as LAION's, several as OpenS2V-Eval's."""
    noise = torch.Generator().manual_seed(seed)
    layers = list(pairwise(widths))
    stored = {}
    for number, (before, after) in enumerate(layers):
        prefix = "" if len(layers) == 1 else f"layers.{2 * number}."
        stored[f"{prefix}weight"] = torch.randn(after, before, generator=noise) / before**0.5
        stored[f"{prefix}bias"] = torch.full((after,), 5.0 if number + 1 == len(layers) else 0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, path)
    return path


def _save(kind: type[PreTrainedModel], config: object, folder: Path, seed: int, **more: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config, **more)
        with torch.no_grad():  # as they are drawn, all images would give nearly the same features
            for weight in model.parameters():
                weight.add_(0.3 * torch.randn_like(weight) * (weight.ndim > 0))
    model.save_pretrained(folder)
