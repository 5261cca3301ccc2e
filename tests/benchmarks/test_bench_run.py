"""`bernini bench` from end to end, on a tiny random renderer."""

import csv
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any, ClassVar

import pytest
import torch
from factories import FRAMES, build, make_config
from planners import write_planner_folder
from torch import Tensor

from benchmarks import bench
from benchmarks.quality.interface import Item
from benchmarks.quality.sampler import Trained
from benchmarks.quality.toy import ToyBenchmark
from bernini.cli import main
from bernini.conversation import Conversation
from bernini.lora import add_lora, trainable
from bernini.renderer.experts import Experts
from bernini.renderer.lora import LoRAConfig, save_lora

ROOT = Path(__file__).parents[2]
SMALL = ["--frames", str(FRAMES), "--size", "32", "--steps", "2", "--text-rows", "16"]
SMALL += ["--mode", "task", "--omega", "txt=4,scale=0.8"]  # as a model that is not the toy family
TASKS = ["--tasks", "t2i,v2v,rv2v", "--per-task", "3"]


def run(wan: Path, out: Path, *more: str, verb: str = "run", name: str = "toy") -> int:
    return main(["bench", verb, name, "--model", str(wan), "--out", str(out), *SMALL, *TASKS, *more])


def contents(folder: Path, pattern: str = "videos/*/*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """How many threads share a product, which a busy machine may change, decides its rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go, with its bounds."""
    out = tmp_path_factory.mktemp("bench") / "whole"
    assert run(wan, out, "--bounds", "--batch-size", "1", "--examples", "3") == 0
    return out


def test_a_run_leaves_clips_scores_tables_and_a_report(whole: Path) -> None:
    names = {
        "items.jsonl",
        "manifest.json",
        "videos",
        "gen.jsonl",
        "scores",
        "summary.json",
        "table.md",
        "table.csv",
        "report.html",
    }
    assert {p.name for p in whole.iterdir()} == names | {"examples", "bounds"}
    found = summary(whole)
    assert (found["items"], found["of"], found["coverage"], found["failures"]) == (9, 9, 1, [])
    assert found["comparable"] is True
    cells = {(c["task"], c["metric"]): c for c in found["cells"]}
    assert {metric for task, metric in cells if task == "t2i"} == {"attributes"}
    assert {metric for task, metric in cells if task == "rv2v"} == set(ToyBenchmark.metrics)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["run"]["benchmark"]["settings"]["per_task"] == 3
    assert manifest["run"]["model"].keys() == {"transformer", "transformer_2", "vae", "text_encoder", "tokenizer"}
    assert manifest["run"]["sampling"]["guidance"] == {"t2i": "t2v_apg", "v2v": "v2v_apg", "rv2v": "rv2v"}
    assert manifest["run"]["sampling"]["seed"] == 42 and manifest["environment"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (whole / "gen.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == contents(whole).keys() and len({row["seed"] for row in rows}) == 9
    page = (whole / "report.html").read_text()
    assert page.count("<article") == 3 and page.count("<video") == 6 and page.count("<img") == 3
    assert "v2v, unedited source" in page


def test_the_bounds_bound(whole: Path) -> None:
    rows = {(row["row"], row["metric"]): row for row in csv.DictReader((whole / "table.csv").open())}
    source, ceiling = (f"v2v, {text}" for text in ("unedited source", "true target through the VAE"))
    assert (rows[source, "edit_done"]["value"], rows[source, "rest_unchanged"]["value"]) == ("0.0", "1.0")
    assert (ceiling, "edit_done") in rows and ("t2i, unedited source", "attributes") not in rows
    assert {int(row["n"]) for row in rows.values()} <= {3}
    table = (whole / "table.md").read_text()
    assert re.search(
        r"^\| v2v, unedited source \|  \| 3 \| 0\.0 \[0\.0, 56\.1\] \| 100\.0 \[43\.9, 100\.0\] \|", table, re.M
    )


def test_shards_make_the_whole_to_the_bit(wan: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    for shard in ("1/2", "0/2"):
        assert run(wan, out, "--bounds", "--batch-size", "1", "--shard", shard) == 0
    assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
    assert contents(out) == contents(whole)
    for file in ("summary.json", "table.md", "table.csv"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def test_a_broken_run_is_gone_on_with(wan: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(wan, out, "--batch-size", "1", verb="generate") == 0
    assert not (out / "scores").exists()
    made = {path: path.stat().st_mtime_ns for path in out.glob("videos/*/*")}
    damaged, gone, *kept = sorted(made)
    damaged.write_bytes(damaged.read_bytes()[:400])
    gone.unlink()
    assert run(wan, out, "--batch-size", "1", verb="generate") == 0
    assert contents(out) == contents(whole)
    assert all(path.stat().st_mtime_ns == made[path] for path in kept)
    assert len((out / "gen.jsonl").read_text().splitlines()) == 9 + 2
    assert main(["bench", "score", str(out), "--workers", "2"]) == 0
    scores = contents(out, "scores/*")
    assert main(["bench", "score", str(out)]) == 0
    assert contents(out, "scores/*") == scores  # nothing was left to be scored
    assert main(["bench", "aggregate", str(out), "--examples", "1"]) == 0
    assert summary(out) == summary(whole)
    (out / "report.html").unlink()
    assert main(["bench", "report", str(out), "--examples", "1"]) == 0
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--steps", "3"], "sampling.steps is 2 there and 3 here"),
        (["--mode", "t2v"], "sampling.guidance.rv2v is rv2v there and t2v here"),
        (["--omega", "txt=2"], "sampling.omegas.txt is 4.0 there and 2.0 here"),
        (["--per-task", "4"], "benchmark.settings.per_task is 3 there and 4 here"),
    ],
)
def test_another_run_is_not_mixed_in(
    wan: Path, whole: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    before = contents(whole, "**/*.json*")
    assert run(wan, whole, *more) == 78
    error = capsys.readouterr().err
    assert told in error and "another --out" in error
    assert contents(whole, "**/*.json*") == before


def test_other_weights_are_not_mixed_in(
    wan: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = Experts.from_pretrained(wan)
    with torch.no_grad():
        experts.transformer.proj_out.bias += 0.1
    experts.save_pretrained(tmp_path)
    assert run(tmp_path, whole, "--vae", str(wan), "--text", str(wan)) == 78
    assert "model.transformer is" in capsys.readouterr().err


def test_a_lora_is_merged_and_told_apart(wan: Path, whole: Path, tmp_path: Path) -> None:
    experts = Experts.from_pretrained(wan)
    for model in experts.models.values():
        add_lora(model, LoRAConfig(rank=2, alpha=4))
        for parameter in trainable(model):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_lora(experts, tmp_path / "lora")
    assert run(wan, whole, "--lora", str(tmp_path / "lora")) == 78
    assert run(wan, tmp_path / "out", "--lora", str(tmp_path / "lora"), verb="generate") == 0
    assert run(wan, tmp_path / "other", "--lora", str(tmp_path / "nothing"), verb="generate") == 65
    tuned, plain = contents(tmp_path / "out"), contents(whole)
    assert tuned.keys() == plain.keys() and all(tuned[name] != plain[name] for name in plain)


def test_a_model_with_a_planner_plans_unless_told_not_to(
    wan: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_planner_folder(copytree(wan, tmp_path / "full"), gen_dim=12)
    assert run(model, tmp_path / "without", "--no-plan", "--batch-size", "1") == 0
    assert contents(tmp_path / "without") == contents(whole)
    assert run(model, tmp_path / "with", "--tasks", "v2v", "--per-task", "1") == 0
    told = json.loads((tmp_path / "with" / "manifest.json").read_text())["run"]
    assert told["sampling"]["planning"]["steps"] == 25 and {"bernini", "mllm", "transformer"} <= told["model"].keys()
    ((name, clip),) = contents(tmp_path / "with").items()
    assert clip != contents(whole)[name]
    assert run(model, tmp_path / "without") == 78  # it was made without a plan
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("expert", ["both", "high", "low"])
def test_clips_are_those_that_the_module_samples_one_by_one(wan: Path, tmp_path: Path, expert: str) -> None:
    config = make_config(wan, tmp_path, tmp_path, expert=expert)
    config["model"]["init_args"]["sampling"] |= {"steps": 8, "mode": None}
    module = build(config, tmp_path)
    benchmark = ToyBenchmark(tasks=("t2v", "i2i", "vi2v"), per_task=1, frames=FRAMES, size=32)
    samples = [benchmark.conversation(item) for item in benchmark.items()]
    seeds = [item.seed(7) for item in benchmark.items()]
    alone = [module.sample([sample], [seed])[0].pixels for sample, seed in zip(samples, seeds, strict=True)]
    for made, expected in zip(Trained(module)(samples, seeds), alone, strict=True):
        assert made.shape == expected.shape and (made.int() - expected.int()).abs().max() <= 1


@dataclass(frozen=True)
class Flaky(ToyBenchmark):
    """The toy benchmark on a bad day: one item cannot be made, another one cannot be scored, a third one is NaN."""

    name: ClassVar[str] = "flaky"

    def conversation(self, item: Item) -> Conversation:
        if item.id == "v2v-000000":
            raise OSError("the disk is gone")
        return super().conversation(item)

    def score(self, item: Item, pixels: Tensor) -> dict[str, float]:
        if item.id == "v2v-000001":
            raise RuntimeError("the judge is ill")
        return super().score(item, pixels) | ({"attributes": float("nan")} if item.id == "t2i-000002" else {})


def test_failures_are_told_and_no_item_is_dropped_or_guessed(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.BENCHMARKS, "flaky", Flaky)
    assert run(wan, tmp_path / "run", name="flaky") == 1
    error = capsys.readouterr().err
    assert "3 of 9 items lack scores" in error and "run the command again" in error
    found = summary(tmp_path / "run")
    whys = {row["id"]: (row["stage"], row["why"]) for row in found["failures"]}
    assert whys == {
        "t2i-000002": ("score", "DataError: attributes lies in [0, 1], not nan"),
        "v2v-000000": ("generate", "OSError: the disk is gone"),
        "v2v-000001": ("score", "RuntimeError: the judge is ill"),
    }
    assert not found["comparable"] and found["coverage"] == pytest.approx(21 / 30)
    assert {(c["n"], c["of"]) for c in found["cells"] if c["task"] == "v2v"} == {(1, 3)}
    table = (tmp_path / "run" / "table.md").read_text()
    assert "not comparable with full runs" in table and "| v2v | v2v_apg | 1 of 3 |" in table
    assert "the judge is ill" in (tmp_path / "run" / "report.html").read_text()
    monkeypatch.setitem(bench.BENCHMARKS, "flaky", type("Mended", (ToyBenchmark,), {"name": "flaky"}))
    assert run(wan, tmp_path / "run", name="flaky") == 0  # tries what is missing
    assert summary(tmp_path / "run")["comparable"]


def test_mistakes_on_the_command_line_are_told(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(wan, tmp_path / "a", "--omega", "text=2") == 78
    assert "unknown weight 'text'" in capsys.readouterr().err
    assert run(wan, tmp_path / "a", "--mode", "v3v") == 78
    assert run(tmp_path / "none", tmp_path / "b") == 65
    assert main(["bench", "score", str(tmp_path)]) == 78
    assert not (tmp_path / "a").exists()
    with pytest.raises(SystemExit):
        run(wan, tmp_path / "a", "--shard", "2")


def test_the_list_names_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list"]) == 0
    told = capsys.readouterr().out
    assert "\ntoy 2: " in told and all(f"  {metric} " in told for metric in ToyBenchmark.metrics)


def test_commands_of_the_guide_are_understood() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "benchmarks.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("bernini bench ")]
    assert {command[0] for command in commands} == {
        "list",
        "check",
        "prepare",
        "run",
        "generate",
        "score",
        "aggregate",
        "report",
    }
    for command in commands:
        bench.parser().parse_args(command)
