"""A tiny random Qwen2.5-VL for tests of local judges."""

import json
from pathlib import Path

import torch
from planners import TEXT, TOKENIZER, TOWER
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

LIMITS = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}


def write_local_judge(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2.5-VL in its published layout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(LIMITS))
    return folder
