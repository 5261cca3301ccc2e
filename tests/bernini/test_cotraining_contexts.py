"""What the renderer reads in co-training: the contexts of inference, for every coin and every kind of plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import EVERY, NO_DROPOUT, make_cotraining, make_planner_folder
from hypothesis import given
from hypothesis import strategies as st
from planners import SIZE
from torch import Tensor

from bernini.cotraining.conditions import ConditionDropout
from bernini.cotraining.examples import make_example
from bernini.cotraining.exposure import KINDS, PlanExposure, lay_beside
from bernini.cotraining.module import CoTrainingModule
from bernini.errors import ConfigError
from bernini.planner.masking import TARGET, visible
from bernini.planner.planning import Plan, PlanningConfig
from bernini.planner.template import pack
from bernini.seeds import draw_seed
from datamodules.toyworld import make_item

CHEAP = PlanningConfig(steps=3, flow_steps=2)
KEY = ("a", 1)
SAMPLE = make_item("rv2v", 0, **SIZE)


@pytest.fixture(scope="module")
def module(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> CoTrainingModule:
    """A module whose planner and renderer are tiny."""
    return make_cotraining(wan, make_planner_folder(tmp_path_factory.mktemp("planner")), EVERY)


def exposure(**shares: float) -> PlanExposure:
    return PlanExposure(**{"visible": 0.0, **shares}, planning=CHEAP)


def read(module: CoTrainingModule, **more: Any) -> tuple[Tensor, float, Any]:
    """Context that the renderer is given for `SAMPLE`, its visual loss, and the latents' pack."""
    packs: list[Any] = []
    hook = module.renderer.transformer.register_forward_pre_hook(lambda _, args: packs.append(args[0]))
    for name, value in {"dropout": ConditionDropout(**NO_DROPOUT), "exposure": PlanExposure(), **more}.items():
        setattr(module, name, value)
    with torch.no_grad():
        _, table = module.losses([SAMPLE], [KEY])
    hook.remove()
    return packs[0].context, table.means()["visual"].item(), packs[0]


def texts(module: CoTrainingModule) -> tuple[Tensor, Tensor]:
    """Text features of the sample, and of its task's sentence alone."""
    prompt, sentence = module.features([SAMPLE.spec.sentence + SAMPLE.prompt, SAMPLE.spec.sentence], module.device)
    return prompt, sentence


COINS = {  # what is dropped, which text is read, which rows of a plan, and how many sources are left
    "tv": ({}, "prompt", "wtxt_wvit", 2),
    "tn": ({"plan": 1.0}, "prompt", "wtxt_wovit", 2),
    "nn": ({"text": 1.0, "plan": 1.0}, "sentence", "wotxt_wovit", 2),
    "text": ({"text": 1.0}, "sentence", "wotxt_wvit", 2),
    "nn without sources": ({"text": 1.0, "plan": 1.0, "video": 1.0, "image": 1.0}, "sentence", "wotxt_wovit", 0),
    "nn with a clip": ({"text": 1.0, "plan": 1.0, "image": 1.0}, "sentence", "wotxt_wovit", 1),
}


@pytest.mark.parametrize("coin", COINS)
def test_each_coin_trains_a_context_of_inference(module: CoTrainingModule, coin: str) -> None:
    dropped, text, rows, sources = COINS[coin]
    dropout = ConditionDropout(**{**NO_DROPOUT, **dropped})
    context, _, packed = read(module, dropout=dropout, exposure=exposure(planned=1.0))
    own = dict(zip(("prompt", "sentence"), texts(module), strict=True))[text]
    plan: Plan
    (plan,) = module.plan([SAMPLE], [draw_seed(module.seed, *KEY) % 2**32], config=CHEAP)
    expected = torch.cat([own, getattr(plan, rows)])
    assert context.shape == expected.shape  # of its real length
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-5)
    assert packed.segments[:, 4].tolist() == [*range(1, sources + 1), 0]


def test_the_paper_shows_the_visible_tokens_and_hides_the_others(module: CoTrainingModule) -> None:
    context, _, _ = read(module)
    host = torch.Generator().manual_seed(draw_seed(module.seed, *KEY))
    example = make_example(SAMPLE, module.template, "beta", host, module.dropout, module.exposure)
    given = int((example.written.token_type != TARGET).sum())
    shown = int((example.written.token_type == TARGET).sum() - example.masked.sum())
    assert example.masked.any() and not example.second.any()
    assert len(context) == len(texts(module)[0]) + given + shown
    packed = pack([example.written])
    with torch.no_grad():
        hidden = module.planner(packed, masked=example.masked).hidden
        rows = module.planner.connector.for_gen(hidden[~example.masked])
    torch.testing.assert_close(context, torch.cat([texts(module)[0], rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "noised"])
def test_a_whole_plan_is_what_a_sequence_of_its_own_would_say(module: CoTrainingModule, kind: str) -> None:
    context, visual, _ = read(module, exposure=replace(exposure(**{kind: 1.0}), level=1.0))
    _, paper, _ = read(module)
    assert visual == pytest.approx(paper, rel=1e-5)  # the flow head's target does not see the second one
    written = module.template(SAMPLE)
    with torch.no_grad():
        hidden = module.planner(pack([written])).hidden
        rows = module.planner.connector.for_gen(hidden)
    prompt = texts(module)[0]
    assert len(context) == len(prompt) + len(rows)
    given = torch.cat([torch.ones(len(prompt), dtype=torch.bool), written.token_type != TARGET])
    expected = torch.cat([prompt, rows])
    torch.testing.assert_close(context[given], expected[given], rtol=1e-4, atol=1e-5)
    assert torch.allclose(context[~given], expected[~given], rtol=1e-3, atol=1e-4) == (kind == "full")


def test_without_noise_a_noised_plan_is_the_true_one(module: CoTrainingModule) -> None:
    silent, _, _ = read(module, exposure=replace(exposure(noised=1.0), level=0.0))
    true, _, _ = read(module, exposure=exposure(full=1.0))
    torch.testing.assert_close(silent, true)


def test_a_second_target_sees_the_same_and_nobody_sees_it(module: CoTrainingModule) -> None:
    written = module.template(SAMPLE)
    both, second = lay_beside(written)
    first = (both.token_type == TARGET) & ~second
    seen = visible(both.token_type, both.segment_id)
    alone = visible(written.token_type, written.segment_id)
    assert torch.equal(seen[~second][:, ~second], alone)
    assert not seen[~second][:, second].any() and not seen[second][:, first].any()
    rest = ~(first | second)
    assert torch.equal(seen[second][:, rest], seen[first][:, rest]) and seen[second][:, second].all()
    assert torch.equal(both.position_ids[:, second], both.position_ids[:, first])
    assert len(both.visuals) == len(written.visuals) + 1 and both.visuals[-1] is both.visuals[-2]


@given(
    shares=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
    seed=st.integers(0, 2**32),
)
def test_kinds_are_drawn_in_their_shares(shares: list[int], seed: int) -> None:
    given = dict(zip(KINDS, (share / sum(shares) for share in shares), strict=True))
    config, generator = PlanExposure(**given, level=0.3), torch.Generator().manual_seed(seed)
    drawn = [config.draw(generator) for _ in range(400)]
    for kind, share in given.items():
        assert sum(own == kind for own, _ in drawn) / 400 == pytest.approx(share, abs=0.15 if share else 0)
    assert all(0 <= level <= 0.3 for _, level in drawn)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: PlanExposure(full=0.5), "add up to 1"),
        (lambda: PlanExposure(visible=1.5, full=-0.5), "at least 0"),
        (lambda: PlanExposure(level=2.0), "exposure.level is 2.0"),
        (lambda: ConditionDropout(plan=1.5), "dropout.plan is 1.5"),
    ],
)
def test_impossible_rates_are_refused(make: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make()
