"""A judge during training: its scores reach summary and loggers, and whatever it does, training is as without it."""

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import FRAMES, callback, fit, make_config, write_config
from judges import MODEL, Replies
from local_judges import write_local_judge
from official_files import WRITERS
from servers import Server, chat_server, send
from test_benchmark import same, summary, trained

from bernini.cli import main

SCORES = {"OS": 1.0, "IF": 2.0, "VC": 3.0, "IC": 4.0, "GQ": 5.0}
ANSWER = "Overall: 1\nInstruction following: 2\nConsistency: 3\nIdentity: 4\nQuality: 5"


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    WRITERS["bernini_bench"](root)
    return root


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Two steps, averaged, with a LoRA's dropout."""
    config = make_config(wan, shards, tmp_path / "run", lora={"rank": 2, "dropout": 0.3})
    config["trainer"] |= {"max_steps": 2}
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.5)]
    return config


def bench(folder: Path, files: Path, url: str, limit: int = 3, **more: Any) -> dict[str, Any]:
    """The callback as a configuration names it, with a judge: two steps apart, three of 23 items."""
    sizes = {"frames": FRAMES, "max_edge": 64, "min_edge": 32}
    name = "benchmarks.quality.official.bernini_bench.BerniniBench"
    endpoint = {"url": url, "model": MODEL, "retries": 0, "wait": 0.01}
    return callback(
        "callbacks.BenchmarkCallback",
        benchmark={"class_path": name, "init_args": {"root": str(files), **sizes}},
        folder=str(folder),
        every_n_steps=2,
        limit=limit,
        batch_size=1,
        **{"judge": {"endpoint": endpoint}, **more},
    )


@pytest.mark.parametrize("judge", ["answers", "refuses", "is ill", "talks"])
def test_a_run_is_to_the_bit_what_it_is_without(
    judge: str, config: dict[str, Any], files: Path, server: Server, tmp_path: Path
) -> None:
    replies = Replies(server, lambda text: ANSWER if judge == "answers" else "It is nice.")
    if judge in ("refuses", "is ill"):
        server.replies = [send("no", {"refuses": 401, "is ill": 500}[judge])]
    losses, draws, state = trained(config, tmp_path / "plain")
    again, drawn, found = trained(config, tmp_path / "judged", bench(tmp_path / "bench", files, server.url))
    assert again == losses and drawn == draws and len(server.asked) > 0
    assert same(found["state_dict"], state["state_dict"])
    assert same(found["optimizer_states"], state["optimizer_states"])
    assert same(found["callbacks"]["EMA"], state["callbacks"]["EMA"])
    told = summary(tmp_path / "bench" / "step-000002")
    if judge == "answers":
        assert told["coverage"] == 1 and told["failures"] == [] and told["missing"] == []
        assert {(c["metric"], c["value"]) for c in told["cells"]} == set(SCORES.items())
        assert set(replies.times.values()) == {1} and len(replies.times) == 6
    else:
        assert told["coverage"] == 0 and len(told["failures"]) == 3
        whys = {"refuses": "status 401", "is ill": "status 500", "talks": "unparsed"}
        assert whys[judge] in told["failures"][0]["why"]
    assert told["comparable"] is False and told["judge"]["column"].startswith(f"{MODEL} #")


def test_a_judge_that_is_loaded_beside_the_model_leaves_the_run_alone(
    config: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    local = {"local": str(write_local_judge(tmp_path / "judge"))}
    losses, draws, state = trained(config, tmp_path / "plain")
    again, drawn, found = trained(config, tmp_path / "judged", bench(tmp_path / "bench", files, "", 1, judge=local))
    assert again == losses and drawn == draws and same(found["state_dict"], state["state_dict"])
    told = summary(tmp_path / "bench" / "step-000002")
    assert told["coverage"] == 0 and "unparsed" in told["failures"][0]["why"], "of a model that is random"


def test_scores_and_coverage_reach_the_loggers(
    config: dict[str, Any], files: Path, server: Server, tmp_path: Path
) -> None:
    Replies(server, lambda text: ANSWER)
    config["trainer"]["logger"] = callback("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path))
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", files, server.url))
    fit(config)
    short = summary(tmp_path / "bench" / "step-000002")["judge"]["column"].rpartition("#")[2]
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v and k.startswith("bench/")} for row in csv.DictReader(file)]
    (row,) = [row for row in rows if row]
    assert row == {
        **{f"bench/bernini_bench/v2v/{name}/judge-{short}": v for name, v in SCORES.items() if name != "IC"},
        **{f"bench/bernini_bench/rv2v/{name}/judge-{short}": v for name, v in SCORES.items()},
        "bench/bernini_bench/coverage": 1,
        "bench/bernini_bench/comparable": 0,
    }
    assert main(["bench", "report", str(tmp_path / "bench" / "step-000002")]) == 0


def test_a_run_that_is_trained_again_asks_for_nothing_that_it_has(
    config: dict[str, Any], files: Path, server: Server, tmp_path: Path
) -> None:
    replies = Replies(server, lambda text: ANSWER)
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", files, server.url))
    fit(config)
    first, asked = summary(tmp_path / "bench" / "step-000002"), len(server.asked)
    fit(config)
    assert len(server.asked) == asked == sum(replies.times.values())
    assert summary(tmp_path / "bench" / "step-000002") == first
    config["trainer"]["callbacks"][-1]["init_args"]["judge"]["repeats"] = 2  # another column, in the same folder
    fit(config)
    assert summary(tmp_path / "bench" / "step-000002")["judge"]["column"] != first["judge"]["column"]
    assert len(server.asked) == 2 * asked
    assert [p.name for p in (tmp_path / "bench").iterdir()] == ["step-000002"]


def test_validation_is_judged(config: dict[str, Any], files: Path, server: Server, tmp_path: Path) -> None:
    Replies(server, lambda text: ANSWER)
    config["trainer"]["limit_val_batches"] = 1
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", files, server.url))
    fit(config, verb="validate")
    told = summary(tmp_path / "bench" / "validate")
    assert told["coverage"] == 1 and {(c["metric"], c["value"]) for c in told["cells"]} == set(SCORES.items())


def test_training_waits_so_long_and_no_longer(
    config: dict[str, Any], files: Path, server: Server, tmp_path: Path
) -> None:
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", files, server.url, judge_minutes=1e-9))
    assert len(fit(config)[0]["losses"]) == 2 and server.asked == []
    told = summary(tmp_path / "bench" / "step-000002")
    assert told["coverage"] == 0 and "the time for it was over" in told["failures"][0]["why"]


def test_two_ranks_give_the_summary_of_one(config: dict[str, Any], files: Path, server: Server, tmp_path: Path) -> None:
    replies = Replies(server, lambda text: ANSWER)
    config["trainer"]["max_steps"] = 2
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0  # so that both end with the same weights
    alone, both = copy.deepcopy(config), copy.deepcopy(config)
    alone["trainer"]["callbacks"].append(bench(tmp_path / "alone", files, server.url, limit=4))
    both["trainer"]["callbacks"].append(bench(tmp_path / "both", files, server.url, limit=4))
    ddp = callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo")
    both["trainer"] |= {"devices": 2, "strategy": ddp, "default_root_dir": str(tmp_path / "run2")}
    fit(alone)
    fit(both, ranks=2)
    one, two = (summary(tmp_path / name / "step-000002") for name in ("alone", "both"))
    assert one == two and one["coverage"] == 1
    assert set(replies.times.values()) == {2} and len(replies.times) == 8, "each question once by either run"


def test_a_judge_that_cannot_be_asked_is_told_before_training(
    config: dict[str, Any], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = {"url": "http://localhost:1/v1", "model": MODEL, "key_variable": "NO_KEY"}
    for judge, told in (
        ({"endpoint": endpoint}, "NO_KEY"),
        ({"local": str(tmp_path / "nowhere")}, "there is no judge in"),
        ({}, "either an endpoint or local"),
        ({"local": str(files), "cap": "enforce"}, "caps no score"),
        ({"endpoint": {**endpoint, "model": "gpt-4o"}}, "is not pinned"),
    ):
        given = copy.deepcopy(config)
        given["trainer"]["callbacks"].append(bench(tmp_path / "bench", files, "", judge=judge))
        assert main(["fit", "-c", write_config(tmp_path / "c.yaml", given)]) == 78
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error


def test_the_configuration_has_a_run_judged(
    config: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-nobody")
    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("RUN", str(tmp_path))
    WRITERS["gedit"](tmp_path / "gedit")
    text = (Path(__file__).parents[2] / "configs" / "bench" / "gedit_judged.yaml").read_text()
    (tmp_path / "judged.yaml").write_text(text.replace("data/GEdit-Bench", str(tmp_path / "gedit")))
    Replies(server, lambda text: '{"score": [7, 3]}')
    config["trainer"]["max_steps"] = 1
    fit(config, "-c", str(tmp_path / "judged.yaml"))
    told = summary(tmp_path / "bench" / "gedit" / "step-000001")
    assert told["coverage"] == 1 and told["comparable"] and len(server.asked) == 22
    (total,) = told["totals"]
    assert total["figures"][0] == {"figure": "G_SC", "value": 3, "n": 1}
    saved = (Path(config["trainer"]["default_root_dir"]) / "config.yaml").read_text()
    assert "key_variable: OPENAI_API_KEY" in saved and "of-nobody" not in saved


def test_the_guide_has_a_run_judged(
    config: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    (block,) = [b for b in guide.split("```yaml\n")[1:] if "endpoint" in b.partition("```")[0]]
    (told,) = yaml.safe_load(block.partition("```")[0])["trainer"]["callbacks"]
    given = told["init_args"]
    WRITERS["gedit"](tmp_path / "gedit")
    monkeypatch.setenv(given["judge"]["endpoint"]["key_variable"], "of-nobody")
    given["judge"]["endpoint"]["url"] = server.url
    given |= {"folder": str(tmp_path / "bench"), "limit": 2}
    given["benchmark"]["init_args"] = {"root": str(tmp_path / "gedit"), "max_edge": 64, "min_edge": 32}
    Replies(server, lambda text: '{"score": [7, 3]}')
    config["trainer"]["callbacks"].append(told)
    fit(config)
    cells = summary(tmp_path / "bench" / "step-000002")["cells"]
    assert [(c["metric"], c["value"]) for c in cells] == [
        ("success", 7),
        ("over_editing", 3),
        ("naturalness", 7),
        ("artefacts", 3),
    ]
    assert {headers["Authorization"] for headers, _ in server.asked} == {"Bearer of-nobody"} and len(server.asked) == 4
