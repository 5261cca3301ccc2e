"""Bad input of the training command: one message that says what, where and why, no traceback, a code that is not 0."""

import copy
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import ARCHITECTURE, fit, keep_checkpoints, make_config, make_shards, write_config
from safetensors.torch import load_file, save_file

from bernini.cli import main

CONFIG, DATA, WEIGHTS = 78, 77, 65
INIT = "model/init_args/"


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    return make_config(wan, shards, tmp_path / "run")


@pytest.fixture
def fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a configuration, with some of its keys changed, that has to fail; gives the message."""

    def run(config: dict[str, Any], code: int, *more: str, verb: str = "fit", **changes: Any) -> str:
        config = copy.deepcopy(config)
        for path, value in changes.items():
            *parents, last = path.split("/")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value
        capfd.readouterr()
        assert main([verb, "-c", write_config(tmp_path / "bad.yaml", config), *more]) == code
        shown = capfd.readouterr().err
        assert "Traceback" not in shown
        assert shown.count("bernini: error: ") == 1
        return shown.split("bernini: error: ")[1]

    return run


@pytest.mark.parametrize(
    ("changes", "name", "hint"),
    [
        ({"modle": {"a": 1}}, "modle", "model"),
        ({"trainer/max_stpes": 3}, "trainer.max_stpes", "max_steps"),
        ({INIT + "expret": "high"}, "model.expret", "expert"),
        ({INIT + "sampling/stesp": 3}, "model.sampling.stesp", "steps"),
        ({INIT + "sampling/omegas": {"text": 3}}, "model.sampling.omegas.text", "txt"),
        ({INIT + "lora": {"rnak": 3}}, "model.lora.rnak", "rank"),
        ({INIT + "optimizer/init_args/weight_dacay": 3}, "model.optimizer.weight_dacay", "weight_decay"),
        ({"data/init_args/batchsize": 3}, "data.batchsize", "batch_size"),
        ({"trainer/callbacks": [{"class_path": "callbacks.EMA", "init_args": {"decy": 1}}]}, "decy", "decay"),
    ],
)
def test_typo_in_a_file(
    config: dict[str, Any], fails: Callable[..., str], changes: dict[str, Any], name: str, hint: str
) -> None:
    message = fails(config, CONFIG, **changes)
    assert f"{name}'" in message and "bad.yaml:" in message
    assert f"did you mean '{hint}'?" in message


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--modle.seed=3", "model"),
        ("--trainer.max_stpes=3", "max_steps"),
        ("--model.expret=high", "expert"),
        ("--model.lora.rnak=3", "rank"),
        ("--model.optimizer.init_args.weight_dacay=3", "weight_decay"),
        ("--data.batchsize=3", "batch_size"),
        ("--ckptpath=x", "ckpt_path"),
    ],
)
def test_typo_on_the_command_line(config: dict[str, Any], fails: Callable[..., str], argument: str, hint: str) -> None:
    message = fails(config, CONFIG, argument)
    assert argument.split("=")[0] in message
    assert f"did you mean '{hint}'?" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--trainer.max_steps=many"], ["trainer.max_steps", "'many'", "int"]),
        (["--data.batch_size=two"], ["data.batch_size", "'two'", "int"]),
        (["--model.optimizer.init_args.lr=fast"], ["model.optimizer.lr", "'fast'", "float"]),
        (["--model.expert=hihg"], ["model.expert", "'hihg'", "one of high, low, single, both", "'high'?"]),
        (["--trainer.precision=bf61"], ["trainer.precision", "'bf61'", "'bf16'?"]),
        (["--model.noise.boundary=3"], ["noise.boundary is 3.0", "between 0 and 1"]),
        (["--model.sampling.mode=v2w"], ["unknown guidance mode 'v2w'", "'v2v'?"]),
        (["--model.lora.rank=0"], ["lora.rank is 0"]),
        (["--model.lora.targets=[nowhere]"], ["lora.targets", "nowhere"]),
        (["--model.optimizer.init_args.lr=-1"], ["the optimizer cannot be built", "Invalid learning rate: -1.0"]),
        (["--data.tasks=[v2w]"], ["unknown task 'v2w'", "'v2v'?"]),
        (["--data.batch_size=100"], ["8 training samples, but a global batch takes 100"]),
        (["--data.train=nowhere"], ["no shards here", "nowhere", "bernini prepare"]),
        (["--trainer.strategy=dpp"], ["trainer", "invalid strategy name"]),
        (["--model.architecture.num_layers=2"], ["either weights or a shape", "init_from", "architecture"]),
        (["--ckpt_path=nowhere.ckpt"], ["the checkpoint does not exist", "nowhere.ckpt"]),
        (["--ckpt_path=auto"], ["does not know where to look", "save_last"]),
    ],
)
def test_wrong_value(config: dict[str, Any], fails: Callable[..., str], arguments: list[str], parts: list[str]) -> None:
    message = fails(config, CONFIG, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(config: dict[str, Any], fails: Callable[..., str]) -> None:
    assert "No supported gpu backend found" in fails(config, CONFIG, "--trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model/class_path": "bernini.renderer.module.RenderModule"}, ["RenderModule", "RendererModule'?"]),
        ({"model/class_path": "bernini.rendrer.RendererModule"}, ["No module named 'bernini.rendrer'"]),
        ({"model/class_path": "bernini.renderer.experts.Experts"}, ["not", "a subclass of LightningModule"]),
        ({INIT + "optimizer/class_path": "torch.optim.AdmW"}, ["model.optimizer", "'torch.optim.AdamW'?"]),
        ({"trainer/callbacks": [{"class_path": "callbacks.EMMA"}]}, ["callbacks.EMMA", "'callbacks.EMA'?"]),
    ],
)
def test_wrong_class(
    config: dict[str, Any], fails: Callable[..., str], changes: dict[str, Any], parts: list[str]
) -> None:
    message = fails(config, CONFIG, **changes)
    assert "bad.yaml:" in message
    assert all(part in message for part in parts), message


def test_missing_keys_are_named(config: dict[str, Any], fails: Callable[..., str]) -> None:
    del config["model"]["init_args"]["vae"]
    assert "model.vae must be set" in fails(config, CONFIG)
    del config["model"]
    assert "model must be set" in fails(config, CONFIG)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: [1, 2\ntrainer: {", "is not YAML"),
        (b"- 1\n- 2\n", "holds no keys"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"model: {class_path: '${trainer.nothing}'}", "trainer.nothing"),
        (b"model: {class_path: '${oc.env:BERNINI_TEST_UNSET}'}", "BERNINI_TEST_UNSET"),
    ],
)
def test_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, part: str) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    assert main(["fit", "-c", str(tmp_path / "broken.yaml")]) == CONFIG
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("args", [["fit", "-c", "nowhere.yaml"], ["fit", "-c", "."], ["fit", "-c"], ["fit"]])
def test_no_file(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == CONFIG
    assert "bernini: error: " in capsys.readouterr().err


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == CONFIG
    assert "did you mean 'fit'?" in capsys.readouterr().err


# -- data ---------------------------------------------------------------------------------------------------------


def replace_member(shards: Path, suffix: str, data: bytes | None) -> None:
    """Write the shard of a folder anew with one member replaced or left out, as if it had come that way."""
    (tar,) = shards.glob("*.tar")
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old if m.isfile()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for name, content in members:
            content = content if not name.endswith(suffix) else data
            if content is not None:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                new.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("data", [None, b"this is no clip", b""], ids=["missing", "corrupt", "empty"])
def test_missing_or_corrupt_clip(
    config: dict[str, Any], tmp_path: Path, fails: Callable[..., str], data: bytes | None
) -> None:
    one = make_shards(tmp_path / "one", 1)
    replace_member(one, "v1.mp4", data)
    for workers in (0, 1):
        arguments = (f"--data.train={one}", f"--data.workers={workers}")
        message = fails(config, DATA, *arguments)
        assert "v2v-0000" in message and "v1.mp4" in message and "shard-000000.tar" in message


def test_unknown_task_in_the_data(config: dict[str, Any], tmp_path: Path, fails: Callable[..., str]) -> None:
    one = make_shards(tmp_path / "one", 1)
    (tar,) = one.glob("*.tar")
    with tarfile.open(tar) as file:
        row = file.extractfile("v2v-0000.json").read()  # type: ignore[union-attr]
    replace_member(one, "json", row.replace(b'"v2v"', b'"v2w"'))
    (one / "index.jsonl").unlink()
    assert main(["data", "index", str(one)]) == 0
    assert "unknown task 'v2w'" in fails(config, CONFIG, f"--data.train={one}")


def test_latents_of_another_vae(config: dict[str, Any], tmp_path: Path, fails: Callable[..., str]) -> None:
    from factories import make_conversation

    from datamodules.shards import write_shards

    sample = make_conversation(0, "t2v")
    (target,) = sample.media()
    target.pixels, target.posterior = None, torch.zeros(32, 2, 4, 4)
    write_shards([sample], tmp_path / "prepared")
    message = fails(config, DATA, f"--data.train={tmp_path / 'prepared'}")
    assert "[32, 2, 4, 4]" in message and "[8, frames, height, width]" in message


# -- weights and checkpoints --------------------------------------------------------------------------------------


def test_checkpoint_of_another_shape(config: dict[str, Any], tmp_path: Path, fails: Callable[..., str]) -> None:
    keep_checkpoints(config, tmp_path)
    fit(config, "--trainer.max_steps=1")
    config["model"]["init_args"] |= {"init_from": None, "architecture": {**vars(ARCHITECTURE), "num_layers": 1}}
    for verb in ("fit", "validate"):
        message = fails(config, WEIGHTS, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--data.max_samples=1", verb=verb)
        assert "the checkpoint does not fit the model" in message and "last.ckpt" in message and "blocks.1" in message


@pytest.mark.parametrize("kind", ["text", "cut short", "other", "folder"])
def test_file_that_is_no_checkpoint(
    config: dict[str, Any], tmp_path: Path, fails: Callable[..., str], kind: str
) -> None:
    path = tmp_path / "x.ckpt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no checkpoint")
    else:
        torch.save({"weights": torch.zeros(1000)}, path)
        if kind == "cut short":
            path.write_bytes(path.read_bytes()[:-300])
    message = fails(config, WEIGHTS, f"--ckpt_path={path}")
    assert str(path) in message and "init_from" in message


def test_weights_that_do_not_fit(config: dict[str, Any], wan: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "transformer" in fails(config, WEIGHTS, "--model.init_from=nowhere")
    assert "VAE" in fails(config, WEIGHTS, "--model.vae=nowhere")
    other = tmp_path / "other" / "transformer"
    other.mkdir(parents=True)
    (other / "config.json").write_text((wan / "transformer" / "config.json").read_text())
    tensors = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["proj_out.bias"] = torch.zeros(7)
    save_file(tensors, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    message = fails(config, WEIGHTS, f"--model.init_from={other.parent}")
    assert "expert" in message and str(other) in message and "proj_out.bias" in message


# -- the process --------------------------------------------------------------------------------------------------


def bernini(*args: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
    command = [sys.executable, "-m", "bernini", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bernini.cli import main; main(['--help']); print({'torch', 'lightning'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {verb} " in shown for verb in ("fit", "validate", "test", "predict", "prepare", "demo"))
    assert shown.endswith("set()\n")


def test_exit_code_and_debug_of_the_process(config: dict[str, Any], tmp_path: Path) -> None:
    assert bernini("fti").returncode == CONFIG
    config["trainer"]["max_stpes"] = 3
    shown = bernini("fit", "-c", write_config(tmp_path / "c.yaml", config), "--debug")
    assert shown.returncode == CONFIG
    assert "Traceback" in shown.stderr and "did you mean 'max_steps'?" in shown.stderr


def test_sigterm_is_not_success(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"] = [{"class_path": "factories.Terminate"}]
    assert bernini("fit", "-c", write_config(tmp_path / "c.yaml", config)).returncode == 143
