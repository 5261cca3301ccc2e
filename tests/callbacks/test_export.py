from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from factories import build, callback, fit, keep_checkpoints, make_config, make_conversation
from loras import predict, trained

from bernini.errors import CheckpointError
from bernini.renderer.lora import FILES, load_lora, merge_lora, save_lora
from bernini.renderer.transformer import PackedWanTransformer3DModel


@pytest.mark.parametrize("expert", ["single", "both"])
def test_folder_is_a_diffusers_checkpoint_of_the_average(wan: Path, shards: Path, tmp_path: Path, expert: str) -> None:
    config = make_config(wan, shards, tmp_path, expert=expert)
    config["trainer"]["callbacks"] = [
        callback("callbacks.EMA", decay=0.5, warmup=False),
        callback("callbacks.SaveRenderer", folder=str(tmp_path / "out")),
    ]
    keep_checkpoints(config, tmp_path)
    fit(config)
    average = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["EMA"]["average"]
    names = ["transformer"] if expert == "single" else ["transformer", "transformer_2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        loaded, report = WanTransformer3DModel.from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for key, value in loaded.named_parameters():
            assert torch.equal(value, average[f"renderer.{name}.{key}"])


@pytest.mark.parametrize("alpha", [None, 8])
def test_lora_file_does_in_diffusers_what_it_does_here(wan: Path, shards: Path, tmp_path: Path, alpha: Any) -> None:
    config = make_config(wan, shards, tmp_path, expert="both", lora={"rank": 2, "alpha": alpha})
    module = trained(build(config, tmp_path))
    save_lora(module.renderer, tmp_path)
    plain = {name: WanTransformer3DModel.from_pretrained(wan / name) for name in FILES}
    before = {name: predict(model) for name, model in plain.items()}
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = WanPipeline(**parts, **plain, boundary_ratio=0.875)
    pipeline.load_lora_weights(tmp_path, weight_name=FILES["transformer"])
    pipeline.load_lora_weights(tmp_path, weight_name=FILES["transformer_2"], load_into_transformer_2=True)
    for name, model in module.renderer.models.items():
        there, here = predict(getattr(pipeline, name)), predict(model)
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(there, before[name], atol=1e-3)


def test_merged_lora_is_the_adapter(wan: Path, shards: Path, tmp_path: Path) -> None:
    module = trained(build(make_config(wan, shards, tmp_path, lora={"rank": 2, "alpha": 6}), tmp_path))
    model = module.renderer.transformer
    with_adapter = predict(model)
    merge_lora(model)
    torch.testing.assert_close(predict(model), with_adapter, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    again = PackedWanTransformer3DModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(predict(again), with_adapter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", ["single", "low"])
def test_lora_goes_on_from_a_written_one(wan: Path, shards: Path, tmp_path: Path, expert: str) -> None:
    config = make_config(wan, shards, tmp_path, expert=expert, lora={"rank": 2})
    config["trainer"]["callbacks"] = [callback("callbacks.SaveRenderer", folder=str(tmp_path / "out"))]
    keep_checkpoints(config, tmp_path)
    fit(config)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    config["model"]["init_args"]["lora"]["init_from"] = str(tmp_path / "out")
    module = build(config, tmp_path)
    own = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    torch.testing.assert_close(own, stored, rtol=0, atol=0)
    sample = make_conversation(0, "t2v")
    assert module.losses([sample], [("a",)])[0].isfinite()


def test_lora_that_does_not_fit_is_refused(wan: Path, shards: Path, tmp_path: Path) -> None:
    save_lora(build(make_config(wan, shards, tmp_path, lora={"rank": 2}), tmp_path).renderer, tmp_path)
    for other in ({"rank": 3}, {"rank": 2, "targets": ["to_q"]}, {"rank": 2, "targets": ["to_q", "proj_out"]}):
        module = build(make_config(wan, shards, tmp_path, lora=other), tmp_path)
        with pytest.raises(CheckpointError, match="does not fit transformer"):
            load_lora(module.renderer, tmp_path)
    with pytest.raises(CheckpointError, match="no LoRA weights"):
        load_lora(module.renderer, tmp_path / "nowhere")
    (tmp_path / FILES["transformer"]).write_text("nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_lora(module.renderer, tmp_path)
