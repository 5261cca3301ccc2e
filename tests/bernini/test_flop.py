"""Model FLOPs against those that torch counts while it computes the same, and the peaks that they are compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import EVERY, make_cotraining, make_planner_folder
from factories import build, make_config, make_conversation
from planners import make_planner, make_planner_samples
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.renderer import MODELS, forward_flop
from bernini.attention import Lengths
from bernini.flop import Meter, Work, visible_pairs, work
from bernini.peaks import peak_tflops
from bernini.planner.lora import LoRAConfig
from bernini.planner.masking import TARGET, visible
from bernini.planner.template import PlannerPack, pack
from bernini.renderer.packing import PackedSample, Segment
from bernini.renderer.packing import pack as packed_samples

KEYS = [("test", number) for number in range(3)]
MIXED = [make_conversation(n, task) for n, task in enumerate(("t2i", "v2v", "rv2v"))]
EXPERTS = {"high": ["high"], "both": ["high", "low"]}
Counts = dict[str, dict[str, int]]
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def counted(module: Any, samples: list[Any]) -> tuple[list[Work], Counts]:
    """Our count of a step, and torch's by module and operator; the planner's attention as matrix products too."""
    meter = Meter(module)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.losses(samples, KEYS[: len(samples)], train=False)[0].backward()  # so that no condition is dropped
    meter.remove()
    counts = {name: {str(op): flop for op, flop in own.items()} for name, own in counter.get_flop_counts().items()}
    return meter.done, counts


@pytest.fixture(autouse=True)
def spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention within samples as the matrix products that it is: torch can count no more than those."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, backend: str) -> Tensor:
        pairs = [(len(q), len(k))] if lengths is None else lengths.pairs
        queries, keys = zip(*pairs, strict=True)
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        heads = ([x.transpose(0, 1) for x in own] for own in parts)
        return torch.cat([((q @ k.mT).softmax(-1) @ v).transpose(0, 1) for q, k, v in heads])

    for module in ("renderer.transformer", "planner.tower"):
        monkeypatch.setattr(f"bernini.{module}.packed_attention", attend)


@pytest.fixture
def renderer(wan: Path, shards: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda **more: build(make_config(wan, shards, tmp_path, **more), tmp_path)


@pytest.mark.parametrize("expert", ["high", "both"])
@pytest.mark.parametrize("lora", [None, {"rank": 3}])
def test_a_renderers_step_takes_what_torch_counts(renderer: Any, expert: str, lora: Any) -> None:
    module = renderer(expert=expert, lora=lora)
    done, counts = counted(module, MIXED)
    assert sum(one.flop for one in done) == pytest.approx(sum(counts["PackedWanTransformer3DModel"].values()), rel=1e-9)
    tokens = 4 + 2 * 8 + 2 * 8 + 4  # of a clip 8, of an image 4
    assert [(one.part, one.tokens, one.targets) for one in done] == [("renderer", tokens, 20)] * len(EXPERTS[expert])


def test_a_lora_has_no_gradients_of_the_base(renderer: Any) -> None:
    (full, *_), (lora, *_) = (counted(renderer(expert="high", lora=own), MIXED)[0] for own in (None, {"rank": 1}))
    assert 0.5 * full.flop < lora.flop < 0.85 * full.flop


@pytest.mark.parametrize(("model", "published"), [("1.3b", 8.49e14), ("14b", 5.04e15)])
def test_real_sizes_take_what_is_published(model: str, published: float) -> None:
    with torch.device("meta"):
        transformer, latent, context = MODELS[model].build(), torch.empty(16, 21, 60, 104), torch.empty(512, 4096)
        packed = packed_samples([PackedSample([Segment(latent, 0)], context, 500.0)], (1, 2, 2))
    done = work(transformer, context, packed)
    assert done is not None and done.tokens == 32_760
    assert done.flop == pytest.approx(published, rel=5e-3)
    assert done.flop == pytest.approx(3 * forward_flop(MODELS[model], 32_760, 512), rel=5e-3)


@pytest.mark.parametrize(
    "trained", [{}, {"train_vit": True}, {"lora": LoRAConfig(rank=2)}, {"sources": "bidirectional"}], ids=str
)
def test_a_planners_step_takes_what_torch_counts(trained: Any) -> None:
    module, samples = make_planner(**trained), make_planner_samples()
    module.planner.mllm.gradient_checkpointing_disable()
    (done,), counts = counted(module, samples)
    packed = pack([module.template(sample) for sample in samples])
    seen = visible(packed.token_type, packed.segment_id, packed.sample, trained.get("sources", "causal"))
    assert visible_pairs(packed, trained.get("sources", "causal")) == seen.sum()
    # On a CPU the text model computes scores of all pairs, also of those that it then masks.
    masked = 4 * 32 * int((~seen).sum()) * 3 * 3  # three layers, forward and twice that backward
    assert float(done.flop) == pytest.approx(sum(counts["Global"].values()) - masked, rel=1e-9)
    assert done.tokens == len(packed.ids) and 0 < done.targets <= int((packed.token_type == TARGET).sum())


def test_cotraining_is_both_and_follows_its_stages(wan: Path, tmp_path: Path) -> None:
    planner, samples, packs = make_planner_folder(tmp_path), make_planner_samples(), list[PlannerPack]()
    found = []
    for train, passes in ((EVERY, 3), (["connector_gen"], 1)):
        module = make_cotraining(wan, planner, train)
        module.planner.mllm.gradient_checkpointing_disable()
        module.planner.register_forward_pre_hook(lambda _, given: packs.append(given[0]))
        done, counts = counted(module, samples)
        assert [one.part for one in done] == ["planner", "renderer", "renderer"]
        seen = visible(packs[-1].token_type, packs[-1].segment_id, packs[-1].sample)
        masked = 4 * 32 * int((~seen).sum()) * 3 * passes
        frozen = sum(sum(counts[name].values()) for name in ("WanEncoder3d", "WanCausalConv3d", "UMT5EncoderModel"))
        expected = sum(counts["Global"].values()) - masked - frozen
        # Attention counts gradients of queries before which nothing learns, too: fused kernels make them anyway.
        assert sum(float(one.flop) for one in done) == pytest.approx(expected, rel=1e-2 if passes == 1 else 1e-9)
        found.append([float(one.flop) for one in done])
    (planned, *rendered), (warm, *through) = found
    assert warm < 0.4 * planned, "a frozen language model has no backward pass"
    assert all(0.5 * full < own < 0.9 * full for full, own in zip(rendered, through, strict=True)), "gradients pass"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU", None),
    ],
)
def test_peaks_are_those_of_dense_bf16(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
