"""`bernini export model`, and models read from every layout: the same weights, the same outputs, or a clear refusal."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from planners import ADDED, TEXT, TOKENIZER, TOWER, VISION, make_planner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from bernini.checkpoints import streaming
from bernini.cli import main
from bernini.errors import CheckpointError, ConfigError
from bernini.planner.model import PlannerConfig, build, load_planner, load_tower, save_planner
from bernini.planner.settings import PlannerSettings
from bernini.planner.vision import VisionConfig
from bernini.renderer.experts import Experts, load_transformer
from bernini.text.encoder import TextEncoder, context_rows
from bernini.vae.codec import LatentCodec

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def renderer(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with two experts, as Bernini-R has it."""
    folder = shutil.copytree(wan, tmp_path_factory.mktemp("renderer") / "folder")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner for it."""
    folder = tmp_path_factory.mktemp("planner")
    torch.manual_seed(0)
    save_planner(
        build(PlannerConfig(**{**ADDED, "gen_dim": 12}), Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER)),
        folder,
    )
    PlannerSettings(3.0, VisionConfig(**VISION)).save(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "mllm")
    return folder


@pytest.fixture(scope="module")
def full(renderer: Path, planner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both in the released layout, in many shards."""
    folder = tmp_path_factory.mktemp("full") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SHARD", 30_000)
        export(planner, renderer, "--to", "released", "--out", folder)
    return folder


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an export that has to fail; gives the message."""

    def export(code: int, *arguments: Any) -> str:
        capfd.readouterr()
        assert main(["export", "model", *map(str, arguments)]) == code
        return capfd.readouterr().err

    return export


def export(*arguments: Any) -> None:
    assert main(["export", "model", *map(str, arguments)]) == 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: x for file in sorted(folder.glob("*.safetensors")) for key, x in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def copy_in_one_file(source: Path, target: Path, change: Callable[[dict], dict] = dict) -> Path:
    """A copy of a model in the released layout whose weights are one file, changed."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model-*", INDEX))
    save_file(change(weights(source / "bernini")), target / "bernini" / "model.safetensors")
    return target


def test_the_released_layout_has_the_released_names(full: Path, renderer: Path, planner: Path) -> None:
    found = weights(full / "bernini")
    assert len(list((full / "bernini").glob("model-*-of-*.safetensors"))) > 10
    for prefix, name in (("diff_dec.transformer.", "transformer"), ("diff_dec_low.transformer_2.", "transformer_2")):
        same({k.removeprefix(prefix): x for k, x in found.items() if k.startswith(prefix)}, weights(renderer / name))
    own = ("mllm.", "vit_decoder.", "connector.", "mask_tokens")
    same({k: x for k, x in found.items() if k.startswith(own)}, weights(planner / "bernini"))
    text = {k.removeprefix("t5_text_encoder."): x for k, x in found.items() if k.startswith("t5_text_encoder.")}
    assert torch.equal(text["shared.weight"], text["encoder.embed_tokens.weight"])  # tied, and there under both names
    assert text.keys() == UMT5EncoderModel.from_pretrained(renderer / "text_encoder").state_dict().keys()
    folders = ["bernini", "mllm", "scheduler", "t5_text_encoder", "t5_tokenizer", "vae"]
    assert names(full) == sorted([*folders, "config.json", "transformer_config.json", "transformer_2_config.json"])
    config = json.loads((full / "config.json").read_text())
    assert config["clip_diff_cfg"]["shift"] == 3.0 and config["clip_diff_cfg"]["width"] == ADDED["flow_width"]
    assert (config["num_mask_token"], config["connector_cfg"]["out_dim_for_gen"]) == (ADDED["mask_tokens"], 12)


def test_the_released_layout_goes_to_folders_and_back(
    full: Path, renderer: Path, planner: Path, tmp_path: Path
) -> None:
    for to in ("diffusers", "renderer", "planner"):
        export(full, "--to", to, "--out", tmp_path / to)
    halves = [*names(tmp_path / "renderer"), *names(tmp_path / "planner")]
    assert names(tmp_path / "diffusers") == sorted(halves)
    same(weights(tmp_path / "diffusers" / "bernini"), weights(planner / "bernini"))
    for name in ("transformer", "transformer_2", "vae"):
        same(weights(tmp_path / "diffusers" / name), weights(renderer / name))
    assert PlannerSettings.of(tmp_path / "planner") == PlannerSettings.of(planner)
    export(tmp_path / "renderer", tmp_path / "planner", "--to", "released", "--out", tmp_path / "again")
    same(weights(tmp_path / "again" / "bernini"), weights(full / "bernini"))
    assert names(tmp_path / "again") == names(full)


def test_diffusers_own_pipeline_loads_the_renderer(full: Path, renderer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SHARD", 30_000)
    export(full, "--to", "renderer", "--out", tmp_path / "renderer")
    made = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(renderer / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(renderer / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(renderer / "vae"),
        scheduler=UniPCMultistepScheduler.from_pretrained(renderer / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(renderer / "transformer"),
        transformer_2=WanTransformer3DModel.from_pretrained(renderer / "transformer_2"),
        boundary_ratio=0.875,
    )
    clips = []
    for pipeline in (made, WanPipeline.from_pretrained(tmp_path / "renderer")):
        pipeline.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 16}
        clips.append(pipeline("make it red", generator=draw, output_type="pt", **options).frames)
    assert clips[0].std() > 0.01
    torch.testing.assert_close(clips[1], clips[0], rtol=0, atol=1e-5)


def test_each_half_of_the_released_layout_is_read_without_the_other(
    full: Path, renderer: Path, planner: Path, tmp_path: Path
) -> None:
    files = json.loads((full / "bernini" / INDEX).read_text())["weight_map"]
    own = ("mllm.", "vit_decoder.", "connector.", "mask_tokens")
    for begin, read in (
        (own, lambda folder: same(load_planner(folder).state_dict(), load_planner(planner).state_dict())),
        (own, lambda folder: same(load_tower(folder).state_dict(), load_tower(planner).state_dict())),
        (
            ("diff_dec_low.",),
            lambda folder: same(
                load_transformer(folder, "low").state_dict(), load_transformer(renderer, "low").state_dict()
            ),
        ),
    ):
        shutil.copytree(full, tmp_path / "half")
        needed = {file for name, file in files.items() if name.startswith(begin)}
        for file in {*files.values()} - needed:
            (tmp_path / "half" / "bernini" / file).unlink()
        read(tmp_path / "half")
        shutil.rmtree(tmp_path / "half")


def test_everything_reads_the_released_layout(full: Path, renderer: Path, planner: Path) -> None:
    experts, expected = (Experts.from_pretrained(folder, torch.bfloat16) for folder in (full, renderer))
    assert experts.boundary == 0.875 and experts.models.keys() == expected.models.keys()
    same(experts.state_dict(), expected.state_dict())
    assert {x.dtype for x in experts.state_dict().values()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(
        dict(experts.transformer.named_buffers()), dict(expected.transformer.named_buffers()), rtol=0, atol=0
    )
    texts = [TextEncoder.from_pretrained(folder).encode(["make it red"])[0] for folder in (full, renderer)]
    assert torch.equal(*texts) and context_rows(full) == context_rows(renderer)
    same(LatentCodec.from_pretrained(full).state_dict(), LatentCodec.from_pretrained(renderer).state_dict())
    module = make_planner(init_from=str(full), tokenizer=str(full / "mllm"))
    same(module.planner.state_dict(), load_planner(planner).state_dict())


def test_averages_are_what_is_read(full: Path, planner: Path, tmp_path: Path) -> None:
    def average(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        trained = ("diff_dec.", "connector.")
        return tensors | {f"ema.{name}": x + 1 for name, x in tensors.items() if name.startswith(trained)}

    folder = copy_in_one_file(full, tmp_path / "averaged", average)
    expected = {name: x + name.startswith("connector.") for name, x in load_planner(planner).state_dict().items()}
    same(load_planner(folder).state_dict(), expected)
    export(folder, "--to", "renderer", "--out", tmp_path / "renderer")
    before = weights(full / "bernini")
    for name, added in (("transformer", 1), ("transformer_2", 0)):
        prefix = "diff_dec.transformer." if added else "diff_dec_low.transformer_2."
        for key, x in weights(tmp_path / "renderer" / name).items():
            assert torch.equal(x, before[prefix + key] + added)


@pytest.mark.parametrize("prefix", ["ema.diff_dec.", "diff_dec.", ""])
@pytest.mark.parametrize("apart", [False, True])
def test_separate_experts_take_the_rest_from_their_base(
    prefix: str, apart: bool, renderer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for level, name in (("high", "transformer"), ("low", "transformer_2")):
        folders.append(tmp_path / "R" / f"bernini_renderer_{level}")
        folders[-1].mkdir(parents=True)
        given = {f"{prefix}{name}.{key}": x + 1 for key, x in weights(renderer / name).items()}
        save_file(given, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text('{"model_type": "bernini_renderer"}')
    sources = folders if apart else [tmp_path / "R"]
    export(*sources, renderer, "--to", "renderer", "--out", tmp_path / "out")
    for name in ("transformer", "transformer_2"):
        same(weights(tmp_path / "out" / name), {key: x + 1 for key, x in weights(renderer / name).items()})
    same(weights(tmp_path / "out" / "text_encoder"), weights(renderer / "text_encoder"))


def test_each_part_comes_from_the_first_folder_that_has_it(full: Path, planner: Path, tmp_path: Path) -> None:
    trained = load_transformer(full, "low")
    with torch.no_grad():
        trained.proj_out.bias.add_(1)
    trained.save_pretrained(tmp_path / "run" / "transformer_2")
    shutil.copytree(TOKENIZER, tmp_path / "run" / "mllm")  # a tokenizer alone, as a family without a planner has it
    export(tmp_path / "run", full, "--to", "released", "--out", tmp_path / "out")
    expected = weights(full / "bernini")
    expected["diff_dec_low.transformer_2.proj_out.bias"] += 1
    same(weights(tmp_path / "out" / "bernini"), expected)
    same(load_planner(tmp_path / "out").state_dict(), load_planner(planner).state_dict())


def test_a_model_of_one_expert_stays_one(renderer: Path, tmp_path: Path) -> None:
    shutil.copytree(renderer, tmp_path / "single", ignore=shutil.ignore_patterns("transformer_2"))
    export(tmp_path / "single", "--to", "renderer", "--out", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    assert WanPipeline.from_pretrained(tmp_path / "out").transformer_2 is None


def test_dtypes_are_changed_but_the_vaes(full: Path, renderer: Path, tmp_path: Path) -> None:
    export(full, "--to", "diffusers", "--out", tmp_path / "out", "--dtype", "bfloat16")
    for part in ("transformer", "text_encoder", "bernini"):
        assert {x.dtype for x in weights(tmp_path / "out" / part).values()} == {torch.bfloat16}
    same(weights(tmp_path / "out" / "vae"), weights(renderer / "vae"))
    expected = {key: x.bfloat16() for key, x in weights(renderer / "transformer").items()}
    same(weights(tmp_path / "out" / "transformer"), expected)


def test_a_stock_language_model_becomes_a_planner(planner: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER))
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path)
    made = load_planner(tmp_path, torch.bfloat16, PlannerConfig(**ADDED))
    same(made.mllm.state_dict(), stock.bfloat16().state_dict())
    assert made.config == PlannerConfig(**ADDED)
    assert {x.dtype for x in made.state_dict().values()} == {torch.bfloat16}
    assert made.mask_tokens.shape == (1, 3, 32) and made.mask_tokens.float().std() > 0.005
    assert not made.connector.proj_gen[-1].weight.any() and made.connector.pred_vit[-1].weight.float().std() > 0.05
    same(load_tower(tmp_path).state_dict(), load_planner(tmp_path, config=made.config).tower.state_dict())
    module = make_planner(init_from=str(tmp_path), tokenizer=str(tmp_path), planner=PlannerConfig(**ADDED))
    assert module.planner.config.flow_width == ADDED["flow_width"]
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="planner does not have the tensors"):
        load_planner(tmp_path)


NAME = "diff_dec_low.transformer_2.blocks.1.attn1.to_q.weight"
CONNECTOR = "connector.pred_vit.2.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: {k: x for k, x in t.items() if k != NAME},
            ("low expert", "1 missing", "blocks.1.attn1.to_q.weight"),
        ),
        (lambda t: t | {f"{NAME}s": t[NAME]}, ("low expert", "1 unknown", "blocks.1.attn1.to_q.weights")),
        (lambda t: t | {NAME: t[NAME][:5]}, ("low expert", "1 misshapen", "[5, 32]", "[32, 32]")),
        (lambda t: {k: x for k, x in t.items() if k != CONNECTOR}, ("planner", "1 missing", CONNECTOR)),
        (lambda t: t | {CONNECTOR: t[CONNECTOR].T[:3]}, ("planner", "1 misshapen", CONNECTOR)),
        (
            lambda t: {k: x for k, x in t.items() if not k.startswith("diff_dec.")},
            ("no high expert", "bernini", "name one more folder"),
        ),
        (
            lambda t: {k: x for k, x in t.items() if k != "t5_text_encoder.encoder.final_layer_norm.weight"},
            ("text encoder", "1 missing", "encoder.final_layer_norm.weight"),
        ),
    ],
    ids=["missing", "unknown", "misshapen", "planner missing", "planner misshapen", "part", "text"],
)
def test_tensors_that_do_not_fit_are_named(change, told, full: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x.clone().contiguous() for name, x in change(tensors).items()}

    folder = copy_in_one_file(full, tmp_path / "full", contiguous)
    message = fails(CheckpointError.exit_code, folder, "--to", "diffusers", "--out", tmp_path / "out")
    assert all(part in message for part in told), message
    assert names(tmp_path) == ["full"]


def test_loaders_refuse_tensors_that_do_not_fit(full: Path, tmp_path: Path) -> None:
    folder = copy_in_one_file(full, tmp_path / "full", lambda t: {**t, NAME: t[NAME][:5], CONNECTOR: t[CONNECTOR][:3]})
    load_transformer(folder, "high")
    with pytest.raises(
        CheckpointError, match=r"low expert does not have (.|\n)*1 misshapen, e\.g\. blocks\.1\.attn1\.to_q"
    ):
        load_transformer(folder, "low")
    with pytest.raises(
        CheckpointError, match=r"planner does not have (.|\n)*1 misshapen, e\.g\. connector\.pred_vit\.2"
    ):
        load_planner(folder)


def edit(**more: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return change


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("transformer_config.json", edit(ffn_dim=40), ("high expert", "misshapen", "ffn", "transformer_config.json")),
        ("transformer_config.json", edit(num_layers=3), ("high expert", "missing", "blocks.2.")),
        ("transformer_config.json", edit(num_layers="x"), ("cannot be used", "transformer_config.json")),
        ("transformer_2_config.json", Path.unlink, ("no configuration of the low expert", "transformer_2_config.json")),
        (
            "transformer_2_config.json",
            lambda path: path.write_text("[]"),
            ("cannot be read", "transformer_2_config.json"),
        ),
        ("vae/config.json", edit(base_dim=8), ("VAE", "misshapen")),
        ("t5_text_encoder/config.json", edit(d_ff=17), ("text encoder", "misshapen")),
        ("mllm/config.json", lambda path: path.write_text("{"), ("planner's configuration cannot be used", "mllm")),
        ("t5_tokenizer", shutil.rmtree, ("no tokenizer here", "t5_tokenizer")),
        ("scheduler/scheduler_config.json", edit(_class_name=None), ("does not say what it is for", "scheduler")),
    ],
)
def test_configurations_that_do_not_fit_are_named(
    file: str, change: Callable[[Path], None], told, full: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    folder = shutil.copytree(full, tmp_path / "full")
    change(folder / file)
    message = fails(CheckpointError.exit_code, folder, "--to", "diffusers", "--out", tmp_path / "out")
    assert all(part in message for part in told), message
    assert names(tmp_path) == ["full"]


def test_a_full_disk_leaves_nothing(full: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk does that has no room for more
    try:
        message = fails(CheckpointError.exit_code, full, "--to", "renderer", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in message and "make room" in message
    assert names(tmp_path) == []


def test_parts_of_different_models_are_refused(
    full: Path, renderer: Path, planner: Path, fails: Callable[..., str], tiny_model, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    wide = build(PlannerConfig(**ADDED), Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER))
    save_planner(wide, tmp_path / "wide")
    arguments = ("--to", "diffusers", "--out", tmp_path / "out")
    message = fails(CheckpointError.exit_code, tmp_path / "wide", full, *arguments)
    assert "do not fit each other" in message and "planner 20" in message and "transformer 12" in message
    tiny_model().save_pretrained(tmp_path / "other" / "transformer")
    message = fails(CheckpointError.exit_code, tmp_path / "other", full, *arguments)
    assert "different models" in message and str(tmp_path / "other") in message
    (tmp_path / "out").mkdir()
    assert "the folder exists" in fails(ConfigError.exit_code, full, *arguments)
