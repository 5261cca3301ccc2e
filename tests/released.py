"""A full model of the released size without its values: real names and shapes in sparse files, random at both ends."""

import json
import shutil
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, UMT5Config, UMT5EncoderModel

from bernini.checkpoints.stored import StoredTensor
from bernini.planner.model import PlannerConfig, build, released_name
from bernini.renderer.experts import Architecture

ENDS = 64  # random bytes at each end of a tensor
QWEN = {  # in the form of the published file, with the text model's numbers at the top
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
    },
}
UMT5 = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


def make_released(folder: Path, wan: Path, shards: int = 38) -> None:
    """Write the full model in the released layout, in fp32; tokenizer, scheduler and VAE are those of ``wan``."""
    with torch.device("meta"):
        expert, text = Architecture().build(), UMT5EncoderModel(UMT5)
        planner = build(PlannerConfig(), Qwen2_5_VLConfig(**QWEN))
    shapes = {released_name(name): tensor.shape for name, tensor in planner.state_dict().items()}
    for prefix, model in (
        ("diff_dec.transformer.", expert),
        ("diff_dec_low.transformer_2.", expert),
        ("t5_text_encoder.", text),
    ):
        assert isinstance(model, nn.Module)
        shapes |= {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    _write(folder / "bernini", shapes, shards)
    for name in ("transformer_config.json", "transformer_2_config.json"):
        (folder / name).write_text(expert.to_json_string())
    (folder / "mllm").mkdir()
    (folder / "mllm" / "config.json").write_text(json.dumps(QWEN))
    UMT5.save_pretrained(folder / "t5_text_encoder")
    for name, copied in (("tokenizer", "t5_tokenizer"), ("scheduler", "scheduler"), ("vae", "vae")):
        shutil.copytree(wan / name, folder / copied)
    (folder / "config.json").write_text(json.dumps({"model_type": "bernini", "switch_dit_boundary": 0.875, "own": 1}))


def _write(folder: Path, shapes: dict[str, torch.Size], shards: int) -> None:
    """Tensors in so many files, each with about the same number of bytes."""
    folder.mkdir(parents=True)
    total = sum(shape.numel() for shape in shapes.values())
    ends = accumulate(shape.numel() for shape in shapes.values())
    number = {name: (end - 1) * shards // total for name, end in zip(shapes, ends, strict=True)}
    number = {name: sorted({*number.values()}).index(n) for name, n in number.items()}  # where one spans two
    count, files = max(number.values()) + 1, {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        own = [name for name in shapes if number[name] == shard]
        files |= dict.fromkeys(own, file)
        write_sparse(folder / file, {name: shapes[name] for name in own}, seed=shard)
    index = {"metadata": {"total_size": 4 * total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(file: Path, shapes: dict[str, torch.Size], seed: int) -> None:
    """A safetensors file of fp32 tensors, of which only both ends are written."""
    random, end, header = Random(seed), 0, {}
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [end, end + 4 * shape.numel()]}
        end += 4 * shape.numel()
    told = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(told).to_bytes(8, "little") + told)
        for entry in header.values():
            first, last = (8 + len(told) + offset for offset in entry["data_offsets"])
            for at in (first, max(first, last - ENDS)):
                opened.seek(at)
                opened.write(random.randbytes(min(ENDS, last - first)))


def both_ends(tensor: StoredTensor) -> tuple[str, tuple[int, ...], bytes, bytes]:
    """What can be told of a tensor: dtype, shape, first and last bytes."""
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.start)
        first = opened.read(min(ENDS, tensor.size))
        opened.seek(tensor.start + max(0, tensor.size - ENDS))
        return tensor.dtype, tensor.shape, first, opened.read(min(ENDS, tensor.size))
