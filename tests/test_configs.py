"""Every file under ``configs/`` is parsed, built and, where it is a whole run, run for a step on something tiny."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cotrainings import make_planner_folder
from factories import logged_rows
from planners import TOKENIZER, VISION, make_planner
from safetensors.torch import save_file

from bernini.checkpoints.names import original_name
from bernini.cli import main
from bernini.lightning_cli import run_lightning
from bernini.lora import add_lora
from bernini.planner.model import save_planner
from bernini.renderer.experts import FOLDERS, Architecture
from bernini.renderer.lora import LoRAConfig

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name != "sweeps"
)  # see test_sweeps.py
CONTENTS: dict[Path, dict[str, Any]] = {file: yaml.safe_load(file.read_text()) for file in FILES}
RUNS = [file for file, content in CONTENTS.items() if "seed_everything" in content]
BANKED, COBANKED = (ROOT / "configs" / "toy" / f"{stem}.yaml" for stem in ("banked", "cobanked"))
PLANNERS = [ROOT / "configs" / "toy" / f"{stem}.yaml" for stem in ("sight", "planner")]
COTRAININGS = [ROOT / "configs" / "toy" / f"{stem}.yaml" for stem in ("warmup", "cotrain", "cot")]
MIXES = [file for file in FILES if file.stem.startswith("mix_")]
SMALL = [file for file in FILES if file.parent.name == "small"]
OVERLAYS = [file for file in FILES if file not in (*RUNS, BANKED, COBANKED)]
BASE = ROOT / "configs" / "renderer" / "wan21_1.3b.yaml"
LORA = ROOT / "configs" / "renderer" / "wan21_1.3b_lora.yaml"


def name(file: Path) -> str:
    return str(file.relative_to(ROOT / "configs"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where relative paths of configurations end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of-nobody")  # a judge's, who is not asked here
    return tmp_path


def tiny(file: Path, wan: Path, shards: Path) -> list[str]:
    """Arguments that put something tiny in the place of a configuration's weights, data and device."""
    model = CONTENTS[file]["model"]["init_args"]
    arguments = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data.workers=0"]
    if "ToyBank" in CONTENTS[file]["data"]["class_path"]:
        toy = ROOT / "assets" / "toy"
        arguments += [f"--data.vae={toy / 'vae'}", f"--data.text={toy}", f"--model.vae={toy / 'vae'}"]
        arguments += [f"--model.text.encoder={toy}", "--model.architecture.num_layers=1", "--data.length=300"]
        arguments += ["--model.lr_scheduler.init_args.total_steps=3", "--data.val_length=2"]
        return [*arguments, "--data.height=32", "--data.width=32"]
    arguments += ["--data.batch_size=2"]
    if "OneCycleLR" in str(model.get("lr_scheduler")):
        arguments += ["--model.lr_scheduler.init_args.total_steps=3"]
    if "CoTraining" in CONTENTS[file]["model"]["class_path"]:
        planner = make_planner_folder(Path.cwd() / "tiny")
        arguments += [f"--model.tokenizer={TOKENIZER}", f"--model.init_from.planner={planner}"]
        arguments += [f"--model.init_from.renderer={wan}", f"--model.vae={wan}", f"--model.text.encoder={wan}"]
        arguments += ["--model.text.rows=16", *(f"--model.vision.{name}={value}" for name, value in VISION.items())]
        if "Video" in CONTENTS[file]["data"]["class_path"]:
            return [*arguments, f"--data.train={shards}", f"--data.val={shards}", "--data.max_samples=1"]
        arguments += ["--data.frames=5", "--data.height=32", "--data.width=32", "--data.length=32"]
        return [*arguments, "--data.val_length=2", "--model.sampling.steps=2", "--model.planning.steps=2"]
    if file in PLANNERS:
        arguments += [f"--model.tokenizer={TOKENIZER}", "--data.length=8", "--data.val_length=2"]
        if "init_from" in model:
            save_planner(make_planner().planner, Path.cwd() / "tiny")
            arguments += ["--model.init_from=tiny"]
        return arguments
    if "VAEModule" in CONTENTS[file]["model"]["class_path"]:
        return [*arguments, "--model.architecture.base_dim=4", "--data.length=2", "--data.val_length=2"]
    arguments += [f"--model.vae={wan}", f"--model.text.encoder={wan}", "--model.text.rows=16"]
    arguments += [f"--data.train={shards}", f"--data.val={shards}", "--data.max_samples=1", "--model.sampling.steps=9"]
    if "architecture" in model:
        return [*arguments, "--model.architecture.in_channels=4", "--model.architecture.text_dim=12"]
    return [*arguments, f"--model.init_from={wan}"]


def test_there_are_files() -> None:
    assert len(RUNS) >= 8 and len(OVERLAYS) >= 4 and BASE in RUNS


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_whole_configuration_trains(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    assert main(["fit", "-c", str(file), *tiny(file, wan, shards)]) == 0
    assert list(elsewhere.rglob("config.yaml"))
    if "CoTraining" in CONTENTS[file]["model"]["class_path"]:
        (folder,) = elsewhere.glob("runs/*/model")
        both = "SaveRenderer" in file.read_text()
        assert {path.name for path in folder.iterdir()} == {"bernini", "mllm", *(FOLDERS.values() if both else ())}
    if file.parent.name == "renderer":
        folder = elsewhere / "runs" / file.stem
        assert (folder / "config.yaml").is_file()
        assert (folder / "checkpoints" / "last.ckpt").exists()
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000000", "step-000001"]
        assert list((folder / "model").rglob("*.safetensors"))


@pytest.mark.parametrize("file", PLANNERS, ids=name)
def test_planner_trains_from_a_bank(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    arguments = [*tiny(file, wan, shards), "--trainer.precision=32-true"]
    assert main(["fit", "-c", str(file), "-c", str(BANKED), *arguments]) == 0
    trained, asked = (yaml.safe_load(path.read_text()) for path in (next(elsewhere.rglob("config.yaml")), BANKED))
    for part in ("model", "data"):
        assert trained[part]["class_path"] == asked[part]["class_path"]
    assert {name.name for name in elsewhere.glob("runs/*/planner/*")} == {"bernini", "mllm"}


@pytest.mark.parametrize("file", COTRAININGS, ids=name)
def test_cotraining_trains_from_a_bank(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    arguments = [*tiny(file, wan, shards), f"--data.vae={wan}", f"--data.text={wan}", "--trainer.precision=32-true"]
    arguments = [*arguments, "--data.batch_size=32", "--data.length=64", "--model.compile=false"]
    assert main(["fit", "-c", str(file), "-c", str(COBANKED), *arguments]) == 0
    trained, asked = (yaml.safe_load(path.read_text()) for path in (next(elsewhere.rglob("config.yaml")), COBANKED))
    for part in ("model", "data"):
        assert trained[part]["class_path"] == asked[part]["class_path"]
    (folder,) = elsewhere.glob("runs/*/model")
    assert {"bernini", "mllm"} <= {path.name for path in folder.iterdir()}


def test_thinking_is_a_fifth_of_the_last_stage() -> None:
    cotrain, cot = (CONTENTS[ROOT / "configs" / "toy" / f"{stem}.yaml"] for stem in ("cotrain", "cot"))
    parts = cot["data"]["init_args"]["tasks"]
    thinking = {task: part for task, part in parts.items() if task.endswith("/cot")}
    assert sum(thinking.values()) / sum(parts.values()) == pytest.approx(0.2)
    assert parts.items() - thinking.items() == cotrain["data"]["init_args"]["tasks"].items()
    before, after = (content["model"]["init_args"] for content in (cotrain, cot))
    assert {key for key in after if after[key] != before.get(key)} == {"init_from"}


@pytest.mark.parametrize("file", OVERLAYS, ids=name)
def test_overlay_goes_over_a_whole_configuration(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    table = elsewhere / "data" / "train" / "text_features.safetensors"
    table.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, table)
    changed, data = CONTENTS[file].get("trainer", {}), CONTENTS[file].get("data", {}).get("class_path")
    left_out = r"--model\.text\.encoder" + (r"|--data\.(train|val|max_samples)" if data else "")
    left_out += r"|--data\.batch_size" if file.stem == "packs" else ""
    base = LORA if file in SMALL else BASE
    arguments = [a for a in tiny(base, wan, shards) if not re.match(left_out, a)]
    cli = run_lightning(["-c", str(base), f"--model.text.encoder={wan}", "-c", str(file), *arguments], run=False)
    built = {f"{type(x).__module__}.{type(x).__name__}" for x in (cli.datamodule, *cli.trainer.callbacks)}
    assert built >= {c["class_path"] for c in changed.get("callbacks+", [])} | ({data} if data else set())
    if "devices" in changed:
        assert cli.trainer.world_size == changed["devices"] * changed.get("num_nodes", 1)
    assert (cli.model.features.encoder is None) == ("prepared" in file.name)


@pytest.mark.parametrize("file", SMALL, ids=name)
def test_lora_trains_on_a_small_gpus_settings(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    arguments = [*tiny(LORA, wan, shards), "--model.swap_blocks=2"]
    assert main(["fit", "-c", str(LORA), "-c", str(file), *arguments]) == 0
    assert list(elsewhere.rglob("pytorch_lora_weights.safetensors"))
    blocks = Architecture().num_layers if "14b" in file.stem else 30
    assert CONTENTS[file]["model"]["init_args"]["swap_blocks"] == blocks


@pytest.mark.parametrize("file", MIXES, ids=name)
def test_mix_goes_over_a_whole_configuration_and_trains(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    sources = CONTENTS[file]["data"]["init_args"]["train"]
    for source in sources.values():
        folder = elsewhere / source["shards"]
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(shards)
    arguments = [a for a in tiny(BASE, wan, shards) if not a.startswith("--data.train")]
    arguments += ["--trainer.max_steps=3", "--data.val=null", "--trainer.log_every_n_steps=1"]
    assert main(["fit", "-c", str(BASE), "-c", str(file), *arguments]) == 0
    (saved,) = elsewhere.rglob("config.yaml")
    assert main(["fit", "-c", str(saved)]) == 0, "what a run saves is a configuration again"
    weights = [max(w.values()) if isinstance(w := source["weight"], dict) else w for source in sources.values()]
    assert sum(weights) == pytest.approx(100, abs=0.11), "in percent, as in the paper, with its rounding"
    last = logged_rows(elsewhere, "data")[-1]
    for share, source in zip(weights, sources, strict=True):
        assert last[f"data/asked/{source}"] == pytest.approx(share / sum(weights), rel=1e-3)
        assert last[f"data/share/{source}"] == pytest.approx(share / sum(weights), abs=2 / 6)


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_steps_are_counted_across_epochs(file: Path) -> None:
    trainer = CONTENTS[file]["trainer"]
    assert isinstance(trainer["max_steps"], int) and "max_epochs" not in trainer
    assert trainer["check_val_every_n_epoch"] is None and isinstance(trainer["val_check_interval"], int)
    assert trainer["val_check_interval"] % trainer.get("accumulate_grad_batches", 1) == 0  # between optimizer steps


@pytest.mark.parametrize("file", [file for file in RUNS if "Video" in CONTENTS[file]["data"]["class_path"]], ids=name)
def test_run_can_be_resumed_and_leaves_dividing_to_the_data(file: Path) -> None:
    trainer = CONTENTS[file]["trainer"]
    assert trainer["use_distributed_sampler"] is False
    kept = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]
    assert len(kept) == 1 and kept[0]["dirpath"] and kept[0]["save_last"] is True
    assert kept[0]["every_n_train_steps"] <= trainer["max_steps"]


@pytest.mark.parametrize(
    ("first", "then"), [("cotraining/bernini_warmup", "cotraining/bernini"), ("toy/warmup", "toy/cotrain")]
)
def test_cotraining_goes_on_from_its_warm_up(first: str, then: str) -> None:
    warmup, cotraining = (CONTENTS[ROOT / "configs" / f"{stem}.yaml"] for stem in (first, then))
    ((stage,), (later,)) = (content["model"]["init_args"]["stages"] for content in (warmup, cotraining))
    assert stage == {"train": ["connector_gen"]} and {*stage["train"]} < {*later["train"]}
    root = warmup["trainer"]["default_root_dir"].partition(",")[2].rstrip("}")
    given = cotraining["model"]["init_args"]
    assert given["init_from"]["planner"] == f"{root}/model"
    assert given["init_from"]["renderer"] == warmup["model"]["init_args"]["init_from"]["renderer"]
    head = (ROOT / "configs" / f"{then}.yaml").read_text().partition("seed_everything")[0]
    assert f"configs/{first}.yaml" in head


RENDERERS = {file.stem: file for file in RUNS if file.parent.name == "renderer"}
PAIRS = [
    *((f"wan22_a14b_{kind}", f"bernini_r_{kind}") for kind in ("high", "low", "lora_high", "lora_low")),
    *((f"{family}_high", f"{family}_low") for family in ("bernini_r", "bernini_r_lora")),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_renderers_differ_in_model_and_expert_alone(one: str, other: str) -> None:
    words = {one: other}
    if one.endswith("_high") and other.endswith("_low"):
        words |= {"expert: high": "expert: low"}
    else:
        words |= {"Wan2.2-T2V-A14B-Diffusers": "Bernini-R-Diffusers"}
    text = yaml.safe_dump(CONTENTS[RENDERERS[one]])
    for word, instead in words.items():
        assert word in text
        text = text.replace(word, instead)
    assert text == yaml.safe_dump(CONTENTS[RENDERERS[other]])


@pytest.mark.parametrize("stem", RENDERERS)
def test_renderer_says_how_to_run_it(stem: str) -> None:
    head = RENDERERS[stem].read_text().partition("seed_everything")[0]
    configs = re.findall(r"-c (\S+)", head)
    assert configs[0] == f"configs/renderer/{stem}.yaml" and all((ROOT / config).is_file() for config in configs)
    assert {*re.findall(r"runs/(\S+)", head), *re.findall(r"with (\S+)\.yaml", head)} <= RENDERERS.keys()


@pytest.mark.parametrize("stem", [stem for stem in RENDERERS if "lora" in stem])
def test_lora_has_a_place_in_every_block_of_the_real_model_and_a_name_in_comfyui(stem: str) -> None:
    lora = LoRAConfig(**CONTENTS[RENDERERS[stem]]["model"]["init_args"]["lora"])
    small = Architecture(num_layers=30, num_attention_heads=12, ffn_dim=8960)
    with torch.device("meta"):
        model = (small if "1.3b" in stem else Architecture()).build()
        add_lora(model, lora)
    learned = [n.removesuffix(".lora_A.default.weight") for n, p in model.named_parameters() if p.requires_grad]
    layers = [n for n in learned if not n.endswith("weight")]
    assert len(layers) == len(learned) / 2 == 10 * model.config["num_layers"]
    assert all(original_name(layer) for layer in layers)
