"""What a step takes: reckoned from shapes, and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import build, fit, make_config
from torch.autograd.graph import saved_tensors_hooks

from bernini.attention import Lengths
from bernini.check import main
from bernini.errors import ConfigError
from bernini.memory import GIB, ROOM, Activations, States, choose, needs
from bernini.renderer.experts import SHAPES, Architecture
from bernini.renderer.recompute import Recompute
from bernini.renderer.transformer import PackedBlock, Ways
from bernini.rope.op import prepare_segments

TOKENS, ROWS, HEAD = 96, 8, 64
SHAPE = Architecture(
    num_layers=1, num_attention_heads=2, attention_head_dim=HEAD, ffn_dim=384, text_dim=12, freq_dim=16
)


def kept(way: Recompute, backend: str | None) -> float:
    """Bytes of distinct memory that a bf16 block keeps of each token, besides what all blocks share."""
    torch.compiler.reset()
    block = SHAPE.build().blocks[0]
    assert isinstance(block, PackedBlock)
    for name, parameter in block.named_parameters():
        if "norm" not in name and name != "scale_shift_table":
            parameter.data = parameter.data.bfloat16()
    if backend:
        block.compile(backend=backend)
    x = torch.randn(TOKENS, 128, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(ROWS, 128, dtype=torch.bfloat16)
    modulation = torch.randn(1, 6, 128, requires_grad=True)
    segments = prepare_segments(torch.tensor([[0.0, 1, 1, TOKENS, 0]]), TOKENS, HEAD, kernel="reference")
    lengths, cross = Lengths.of([(TOKENS, TOKENS)], "cpu"), Lengths.of([(TOKENS, ROWS)], "cpu")
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), text, modulation, *segments.constants)}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim > 1 and tensor.shape[0] in (TOKENS, 2):  # rows, and sums of the two heads' rows
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        ways = Ways("native", "inputs", way)
        out = block(x, text, modulation, None, segments, lengths, cross, ways)
    assert out.requires_grad
    return sum(s.nbytes() for pointer, s in found.items() if pointer not in shared) / TOKENS


def test_pointwise_keeps_what_is_reckoned() -> None:
    reckoned = Activations.of(SHAPE, 1, compiled=True).kept
    # The compiler's partitioner heeds the same policy that keeps them eagerly, and drops what no gradient needs.
    for way in ("pointwise", "attention"):
        assert kept(way, "aot_eager_decomp_partition") == reckoned[way]
    # The reference kernel of the rotation has intermediate results of its own, which the fused one has not.
    assert 0.95 < kept("none", "aot_eager_decomp_partition") / reckoned["none"] < 1.25
    assert 1 < kept("none", None) / Activations.of(SHAPE, 1).kept["none"] < 1.5


def test_a_step_of_the_released_sizes() -> None:
    with torch.device("meta"):
        model = SHAPES["1.3b"].build()
    states = States.of([model], mixed=True)
    assert states.weights == states.gradients == states.optimizer / 2 and 1.3e9 < states.weights / 4 < 1.5e9
    activations = Activations.of(SHAPES["1.3b"], 32_760)
    assert activations.kept["pointwise"] == pytest.approx(47.9e9, rel=1e-2)
    need = needs(states, activations, accumulates=False)
    assert need["none"] > need["pointwise"] > need["attention"] > need["full"] > need["offload"]
    assert needs(states, activations, accumulates=True)["full"] > need["full"]
    way, told = choose(need, 32_760, 79 * GIB)
    assert way == "pointwise" and told.startswith("recompute: pointwise, at 32,760 tokens a pack")
    assert choose(need, 32_760, 200 * GIB)[0] == "none" and choose(need, 32_760, 40 * GIB)[0] == "attention"
    assert choose(need, 32_760, int(need["offload"] / ROOM) + 1)[0] == "offload"
    assert "NONE FITS" in choose(need, 32_760, 9 * GIB)[1]


def test_auto_chooses_at_the_start_of_a_run(wan: Path, shards: Path, tmp_path: Path, caplog: Any) -> None:
    config = make_config(wan, shards, tmp_path, recompute="auto")
    config["data"]["init_args"] |= {"pack": {"tokens": 24}, "max_samples": None}
    with caplog.at_level("INFO"):
        losses = fit(config)[0]["losses"]
    assert len(losses) == 2 and "recompute: none, at 24 tokens a pack" in caplog.text
    module = build(config, tmp_path)
    assert {model.recompute for model in module.renderer.models.values()} == {"full"}  # until the run begins


def test_auto_needs_a_budget_of_tokens(wan: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    config = make_config(wan, shards, tmp_path, recompute="auto")
    with pytest.raises(AssertionError):
        fit(config)
    assert "the data have no budget of them" in capsys.readouterr().err


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    def check(*arguments: str) -> dict[str, str]:
        assert main(["--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return check


ROOT = Path(__file__).parents[2] / "configs"
BIG = str(ROOT / "renderer" / "wan21_1.3b.yaml")
LORA = str(ROOT / "renderer" / "wan22_a14b_lora_high.yaml")


def test_the_command_reckons_before_anything_is_loaded(told: Any) -> None:
    facts = told("-c", BIG, "--shape", "1.3b", "-c", str(ROOT / "data" / "packs.yaml"), "--memory", "79.2")
    assert facts["tokens"] == "72,000" and facts["weights"] == "5.3 GiB" and facts["optimizer"] == "10.6 GiB"
    assert facts["fastest"] == "attention, on a device of 79.2 GiB"
    small = told("-c", BIG, "--shape", "1.3b", "--tokens", "32760", "--memory", "79.2")
    assert small["fastest"] == "pointwise, on a device of 79.2 GiB"
    lora = told("-c", LORA, "--shape", "14b", "--tokens", "32760", "--memory", "16")
    assert float(lora["gradients"].split()[0]) < 1 and lora["fastest"] == "none fits a device of 16 GiB"
    assert told("-c", str(ROOT / "toy" / "lora.yaml"), "--tokens", "64")["weights"] == "0.0 GiB"


def test_what_gpus_share_is_reckoned_for_each_of_them(told: Any) -> None:
    def facts(trainer: str) -> tuple[float, float]:
        found = told("-c", BIG, "--shape", "1.3b", "--tokens", "32760", "-c", str(ROOT / "trainer" / f"{trainer}.yaml"))
        return float(found["optimizer"].split()[0]), float(found["recompute: pointwise"].split()[-3])

    alone = facts("ddp_8")
    assert alone[0] == 10.6 and facts("hsdp_2x8") == facts("fsdp2_8") == (pytest.approx(10.6 / 8, abs=0.1), alone[1])
    assert facts("ulysses_2") == (pytest.approx(10.6 / 8, abs=0.1), pytest.approx(alone[1] / 2, abs=0.1))


@pytest.mark.parametrize(
    ("base", "small", "shape", "tokens", "gib"),
    [(LORA, "14b_24gb", "14b", 40560, 24), (BIG.replace(".yaml", "_lora.yaml"), "1.3b_8gb", "1.3b", 32760, 8)],
)
def test_small_gpus_have_room_under_their_settings(
    told: Any, base: str, small: str, shape: str, tokens: int, gib: int
) -> None:
    arguments = ["-c", base, "--shape", shape, "--tokens", str(tokens), "--memory", str(gib)]
    assert told(*arguments)["fastest"] == f"none fits a device of {gib} GiB"
    overlay = ROOT / "renderer" / "small" / f"{small}.yaml"
    way = yaml.safe_load(overlay.read_text())["model"]["init_args"]["recompute"]
    assert told(*arguments, "-c", str(overlay))["fastest"] == f"{way}, on a device of {gib} GiB"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["-c", BIG, "--shape", "1.3b"], "how many tokens"),
        (["-c", LORA, "--tokens", "64"], "the renderer's shape is not known"),
        (["-c", str(ROOT / "toy" / "planner.yaml"), "--tokens", "64"], "only the memory of a renderer's"),
        (["-c", "nowhere.yaml", "--tokens", "64"], "the configuration cannot be read"),
    ],
)
def test_what_cannot_be_reckoned_is_refused(arguments: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        main(arguments)
