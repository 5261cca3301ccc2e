"""Guidance modes: which arms run, how often, and how a batch of requests is rendered."""

from itertools import pairwise

import pytest
import torch

from bernini.errors import ConfigError
from bernini.flow.guidance import APG, MODES, PLANNED_MODES, Arm, Context, Guide, Omegas, decompose, get_mode
from bernini.flow.solvers import SOLVERS, UniPC
from bernini.renderer.experts import Experts
from bernini.renderer.packing import PackedSample, Segment, pack, unpatchify
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render

SHAPE = (4, 1, 4, 4)


def request(
    mode: str, draw, videos: int = 0, images: int = 0, seed: int = 0, planned: bool = False, **values
) -> RenderRequest:
    sources = [Source(draw(4, 2, 4, 4), True) for _ in range(videos)]
    sources += [Source(draw(4, 1, 2, 4), False) for _ in range(images)]
    contexts = {Context("positive", False): draw(3, 12), Context("negative", False): draw(2, 12)}
    if planned:
        contexts[Context("positive", True)] = draw(5, 12)
    return RenderRequest(SHAPE, sources, contexts, mode, seed, **values)


@pytest.fixture
def watch():
    """Records the pack of every forward of a model."""

    def attach(model):
        calls = []
        model.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
        return calls

    return attach


ARMS = {
    # mode, with a plan: (with a video and an image, without sources)
    ("t2v", False): (2, 2),
    ("t2v_apg", False): (2, 2),
    ("v2v", False): (2, 2),
    ("v2v_apg", False): (2, 2),
    ("v2v_chain", False): (3, 2),
    ("r2v_apg", False): (3, 2),
    ("rv2v", False): (4, 2),
    ("vae_txt_vit", True): (4, 3),
    ("vae_txt_vit_wapg", True): (4, 3),
    ("rv2v_wapg", True): (5, 3),  # the released sampler runs six
    ("rv2v_projected", True): (5, 3),
    ("v2v_apg", True): (2, 2),
}


def test_every_mode_is_counted_below():
    assert set(ARMS) == {(name, False) for name in MODES} | {(name, True) for name in PLANNED_MODES}


@pytest.mark.parametrize(("mode", "planned"), ARMS)
@pytest.mark.parametrize("sourced", [True, False])
def test_every_step_runs_the_distinct_arms_in_one_forward(mode, planned, sourced, tiny_model, randn, watch):
    model = tiny_model()
    calls = watch(model)
    sources = {"videos": 1, "images": 1} if sourced else {}
    one = request(mode, randn(0), planned=planned, **sources)
    render(Experts(model, boundary=0.0), [one], SamplingConfig(steps=3))
    assert [len(pack.token_lengths) for pack in calls] == [ARMS[mode, planned][not sourced]] * 3
    assert [set(pack.timesteps.tolist()) for pack in calls] == [{t} for t in UniPC(3, 5.0).timesteps]


def test_arms_that_see_the_same_run_once(tiny_model, randn, watch):
    model = tiny_model()
    calls = watch(model)
    one = request("rv2v", randn(0), videos=1)  # without images, "all" is "first_video"
    render(Experts(model, boundary=0.0), [one], SamplingConfig(steps=1))
    assert len(calls[0].token_lengths) == 3


@pytest.mark.parametrize(("vid", "arms"), [(1.5, 2), (1.0, 1)])
def test_arms_without_influence_are_not_run(vid, arms, tiny_model, randn, watch):
    model = tiny_model()
    calls = watch(model)
    config = SamplingConfig(steps=1, omegas=Omegas(vid=vid, img=0.0, txt=0.0))
    render(Experts(model, boundary=0.0), [request("rv2v", randn(0), 1, 1)], config)
    assert len(calls[0].token_lengths) == arms
    assert get_mode("rv2v", planned=False).arms(Omegas(0, 0, 0, 0)) == [Arm("none", "negative")]


@pytest.mark.parametrize(
    ("sources", "omegas", "arms"),
    [
        (1, Omegas(img=1.5, txt=4.0, tgt=0.5), 4),
        (1, Omegas(img=1.5, txt=4.0, tgt=0.0), 3),  # no plan
        (1, Omegas(img=1.5, txt=0.5, tgt=0.5), 3),  # the arm of text without plan cancels out
        (1, Omegas(img=1.0, txt=1.0, tgt=1.0), 1),
        (0, Omegas(img=1.5, txt=1.0, tgt=0.5), 2),  # without sources, what the two negative arms count cancels out
    ],
)
def test_arms_of_the_full_model_that_cancel_out_are_not_run(sources, omegas, arms, tiny_model, randn, watch):
    model = tiny_model()
    calls = watch(model)
    one = request("vae_txt_vit", randn(0), sources, planned=True)
    render(Experts(model, boundary=0.0), [one], SamplingConfig(steps=1, omegas=omegas))
    assert len(calls[0].token_lengths) == arms


def test_projected_rv2v_damps_every_difference_over_the_whole_sample(randn):
    draw, mode = randn(0), get_mode("rv2v_projected", planned=True)
    guide = Guide(mode, Omegas(vid=4.0, img=3.0, txt=5.0, tgt=2.0), APG(eta=0.9))
    start, video, every, text, plan = arms = guide.arms(low=False)
    v = {arm: draw(SHAPE) for arm in arms}
    expected = v[start]
    for weight, arm, base in ((4, video, start), (3, every, video), (5, text, every), (2, plan, text)):
        difference, toward = v[arm] - v[base], v[arm] / v[arm].norm()
        expected = expected + weight * (difference - 0.8 * (difference * toward).sum() * toward)
    torch.testing.assert_close(guide.combine(v, draw(SHAPE), 0.7, low=False), expected)


def test_weights_are_scaled_after_the_switch():
    mode, draw = get_mode("rv2v", planned=False), torch.Generator().manual_seed(0)
    guide = Guide(mode, Omegas(vid=4.0, img=3.0, txt=5.0, scale=0.5), APG())
    arms = guide.arms(low=False)
    assert len(arms) == 4 and guide.arms(low=True) == arms
    start, video, both, text = (torch.randn(SHAPE, generator=draw) for _ in arms)
    velocities = dict(zip(arms, (start, video, both, text), strict=True))
    for low, factor in ((False, 1.0), (True, 0.5)):
        expected = start + factor * (4 * (video - start) + 3 * (both - video) + 5 * (text - both))
        torch.testing.assert_close(guide.combine(velocities, torch.zeros(SHAPE), 0.9, low), expected)
    silent = Guide(mode, Omegas(scale=0.0), APG())
    assert silent.arms(low=True) == [Arm("none", "negative")]


def test_projection_clips_per_frame_and_damps_the_parallel_part(randn):
    draw = randn(0)
    difference, reference = draw(4, 3, 2, 2), draw(4, 3, 2, 2)
    difference[:, 1] *= 100
    clipped = APG(eta=1.0, threshold=20.0).project(difference, reference)
    norms = torch.linalg.vector_norm(clipped, dim=(0, 2, 3))
    assert norms[1].item() == pytest.approx(20, rel=1e-5)
    torch.testing.assert_close(clipped[:, [0, 2]], difference[:, [0, 2]])
    orthogonal = APG(eta=0.0, threshold=1e9).project(difference, reference)
    along = (orthogonal * reference).sum((0, 2, 3)) / (reference**2).sum((0, 2, 3)).sqrt()
    assert along.abs().max() < 1e-4
    half = decompose(difference, reference, (0, 2, 3), parallel=0.5, orthogonal=0.0)
    rest = decompose(difference, reference, (0, 2, 3), parallel=0.5)
    torch.testing.assert_close(orthogonal + half, rest)


def test_momentum_adds_earlier_differences(randn):
    draw, x = randn(0), torch.zeros(SHAPE)
    mode = get_mode("t2v_apg", planned=False)
    guide = Guide(mode, Omegas(txt=1.0), APG(eta=1.0, threshold=1e9, momentum=0.5))
    start, better = guide.arms(low=False)
    steps = [{start: draw(SHAPE), better: draw(SHAPE)} for _ in range(2)]
    found = [guide.combine(v, x, 1.0, low=False) for v in steps]
    first, second = (v[better] - v[start] for v in steps)
    torch.testing.assert_close(found[0], steps[0][start] + first)
    torch.testing.assert_close(found[1], steps[1][start] + second + 0.5 * first)


@pytest.mark.parametrize("max_pack", [2, 64])
def test_requests_of_a_batch_come_out_as_alone(max_pack, tiny_model, randn, relative_error):
    experts, draw = Experts(tiny_model(0), tiny_model(1)), randn(0)
    requests = [
        request("rv2v", draw, 1, 2, seed=1),
        request("t2v_apg", draw, seed=2),
        request("r2v_apg", draw, images=2, seed=3),
        request("v2v_chain", draw, videos=2, seed=4),
        request("v2v_apg", draw, 1, planned=True, seed=5),
        request("rv2v_projected", draw, 1, 1, planned=True, seed=6),
    ]
    negative = Context("negative", False)
    for one in requests[1:]:
        one.contexts[negative] = requests[0].contexts[negative]
    together = render(experts, requests, SamplingConfig(steps=4, max_pack=max_pack))
    for one, latent in zip(requests, together, strict=True):
        (alone,) = render(experts, [one], SamplingConfig(steps=4))
        assert latent.shape == SHAPE and latent.dtype == torch.float32
        assert relative_error(latent, alone) < 1e-4


def test_max_pack_bounds_every_forward(tiny_model, randn, watch):
    model = tiny_model()
    calls = watch(model)
    requests = [request("rv2v", randn(i), 1, 1) for i in range(2)]
    render(Experts(model, boundary=0.0), requests, SamplingConfig(steps=1, max_pack=3))
    assert [len(pack.token_lengths) for pack in calls] == [3, 3, 2]


def test_seed_alone_decides_the_noise(randn):
    one = request("t2v", randn(0), seed=7)
    expected = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))[0]
    assert torch.equal(one.noise(), expected)
    assert not torch.equal(request("t2v", randn(0), seed=8).noise(), expected)


def test_source_ids_follow_the_arm(randn):
    one = request("rv2v", randn(0), videos=2, images=2)
    one.sources = [one.sources[i] for i in (2, 0, 3, 1)]  # clips are numbered first, whatever the order given
    videos = [s.latent for s in one.sources if s.is_video]
    images = [s.latent for s in one.sources if not s.is_video]

    def seen(arm):
        return [(id(s.latent), s.source_id) for s in one.segments(arm)]

    everything = [(id(x), float(i)) for i, x in enumerate([*videos, *images], 1)]
    assert seen("all") == everything
    assert seen("first_video") == everything[:1]
    assert seen("images") == [(id(x), float(i)) for i, x in enumerate(images, 1)]
    assert seen("none") == []
    many = request("rv2v", randn(0), videos=1, images=6)
    assert [s.source_id for s in many.segments("all")] == pytest.approx([1 + 4 * i / 6 for i in range(7)])
    assert [s.source_id for s in many.segments("first_video")] == [1]


def test_each_expert_runs_its_own_steps(tiny_model, randn, watch):
    high, low = tiny_model(0), tiny_model(1)
    seen_high, seen_low, made = watch(high), watch(low), []
    render(Experts(high, low), [request("t2v", randn(0))], SamplingConfig(steps=8), made.append)
    timesteps = UniPC(8, 5.0).timesteps
    assert [int(p.timesteps[0]) for p in seen_high] == [t for t in timesteps if t >= 875]
    assert [int(p.timesteps[0]) for p in seen_low] == [t for t in timesteps if t < 875]
    assert [(step.done, step.total, step.timestep) for step in made] == [(i, 8, timesteps[i - 1]) for i in range(1, 9)]


def test_a_lone_high_expert_estimates_the_clean_latent_at_the_boundary(tiny_model, randn, watch):
    high = tiny_model(0)
    calls = watch(high)
    one, config = request("t2v", randn(0)), SamplingConfig(steps=8, solver="euler", omegas=Omegas(txt=0.0))
    (latent,) = render(Experts(high), [one], config)
    grid = UniPC(8, 5.0)
    high_steps = [i for i, t in enumerate(grid.timesteps) if t >= 875]
    assert len(calls) == len(high_steps) < 8
    x = one.noise()
    for index, after in pairwise(high_steps):
        x = x + (grid.sigmas[after] - grid.sigmas[index]) * unguided(high, one, x, grid.timesteps[index])
    last = high_steps[-1]
    torch.testing.assert_close(latent, x - grid.sigmas[last] * unguided(high, one, x, grid.timesteps[last]))


def unguided(model, one: RenderRequest, x, timestep):
    """Velocity of the negative text without sources."""
    packed = pack([PackedSample([Segment(x, 0)], one.contexts[Context("negative", False)], timestep)], model.patch)
    with torch.no_grad():
        return unpatchify(model(packed), packed.target_grids[0], model.patch)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lone_low_expert_starts_from_the_noised_truth(solver, tiny_model, randn, watch):
    low = tiny_model(1)
    calls = watch(low)
    truth = randn(5)(SHAPE)
    one = request("t2v", randn(0), truth=truth)
    config = SamplingConfig(steps=8, solver=solver, omegas=Omegas(txt=0.0))
    (latent,) = render(Experts(None, low), [one], config)
    low_steps = [i for i, t in enumerate(UniPC(8, 5.0).timesteps) if t < 875]
    assert len(calls) == len(low_steps) < 8
    grid = SOLVERS[solver](8, 5.0, begin=low_steps[0])
    sigma = grid.sigmas[low_steps[0]]
    x = (1 - sigma) * truth + sigma * one.noise()
    for index in low_steps:
        x = grid.step(index, unguided(low, one, x, grid.timesteps[index]), x)
    torch.testing.assert_close(latent, x)


def test_a_lone_low_expert_needs_the_truth(tiny_model, randn):
    with pytest.raises(ConfigError, match="cannot start from pure noise"):
        render(Experts(None, tiny_model()), [request("t2v", randn(0))], SamplingConfig(steps=8))


def test_an_expert_without_steps_is_refused(tiny_model, randn):
    with pytest.raises(ConfigError, match=r"none of the 1 steps .* sigma 0.875"):
        render(Experts(None, tiny_model()), [request("t2v", randn(0))], SamplingConfig(steps=1))


def test_bad_sampling_settings_are_refused():
    with pytest.raises(ConfigError, match="unknown guidance mode 'v2v_agp'") as caught:
        SamplingConfig(mode="v2v_agp")
    assert caught.value.fix == "did you mean 'v2v_apg'?"
    assert SamplingConfig(mode="vae_txt_vit").mode  # of the full model: whether there is a plan shows later
    for values in ({"steps": 0}, {"max_pack": 0}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            SamplingConfig(**values)


@pytest.mark.parametrize(
    ("mode", "planned", "said"),
    [
        ("vae_txt_vit_wapg", False, "'vae_txt_vit_wapg' needs a plan"),
        ("rv2v", True, "'rv2v' has no use for a plan"),
        ("rv2v_wagp", True, "unknown guidance mode 'rv2v_wagp'"),
    ],
)
def test_modes_and_plans_have_to_fit(mode, planned, said, tiny_model, randn):
    with pytest.raises(ConfigError, match=said):
        render(Experts(tiny_model(), boundary=0.0), [request(mode, randn(0), planned=planned)], SamplingConfig(steps=1))
