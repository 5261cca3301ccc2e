"""Packing: patches, segment tables and attention that keeps samples apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bernini.attention import Lengths, packed_attention, resolve_backend
from bernini.errors import ConfigError, DataError
from bernini.renderer.packing import (
    PackedSample,
    Segment,
    grid_of,
    interpolate_ids,
    pack,
    pad_context,
    patchify,
    target_patches,
    unpatchify,
)

PATCH = (1, 2, 2)
CHANNELS, TEXT = 4, 12
shapes = st.tuples(st.integers(1, 2), st.sampled_from([2, 4]), st.sampled_from([2, 4, 6]))
conditions = st.lists(st.tuples(shapes, st.sampled_from([1.0, 2.0, 1 + 4 / 7])), max_size=2)
samples = st.fixed_dictionaries(
    {"conditions": conditions, "target": shapes, "rows": st.integers(1, 5), "timestep": st.floats(0, 1000)}
)
few = settings(max_examples=12)


def build(spec: dict, draw) -> PackedSample:
    """A sample from its drawn sizes; the target comes last."""
    segments = [Segment(draw(CHANNELS, *shape), source_id) for shape, source_id in spec["conditions"]]
    segments.append(Segment(draw(CHANNELS, *spec["target"]), 0))
    return PackedSample(segments, draw(spec["rows"], TEXT), spec["timestep"])


def run(model, *parts: PackedSample):
    """Target rows and the gradient of every parameter of a fixed function of them."""
    packed = pack(parts, model.patch)
    rows = model(packed)[packed.target_index]
    loss = (rows * torch.linspace(-1, 1, rows.shape[-1])).square().sum()
    return rows.detach(), torch.autograd.grad(loss, list(model.parameters()))


def assert_same_gradients(model, found, expected, relative_error, tolerance=1e-5):
    total = torch.cat([g.flatten() for g in expected]).norm()
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        # Some gradients vanish (of the keys' bias: softmax ignores it), so the size of them all is the yardstick.
        assert (a - b).norm() < tolerance * max(b.norm(), 1e-2 * total), name


@few
@given(lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1), seed=st.integers(0, 99))
def test_keys_that_are_not_seen_might_as_well_not_be_there(lengths, seed, randn):
    draw, generator = randn(seed), torch.Generator().manual_seed(seed)
    keys = [k for _, k in lengths]
    q, k, v = (draw(sum(n), 2, 8) for n in ([n for n, _ in lengths], keys, keys))
    seen = torch.rand(sum(keys), generator=generator) < 0.5
    seen[torch.tensor([0, *keys[:-1]]).cumsum(0)] = True  # one of each sample
    whole = Lengths.of(lengths, "cpu")
    whole.seen = seen
    kept = Lengths.of([(n, int(own.sum())) for (n, _), own in zip(lengths, seen.split(keys), strict=True)], "cpu")
    expected = packed_attention(q, k[seen], v[seen], kept, "native")
    torch.testing.assert_close(packed_attention(q, k, v, whole, "native"), expected, rtol=1e-5, atol=1e-6)


@few
@given(first=samples, second=samples)
def test_packed_samples_do_not_see_each_other(first, second, tiny_model, randn, relative_error):
    model, draw = tiny_model(), randn(0)
    a, b = build(first, draw), build(second, draw)
    rows, gradients = run(model, a, b)
    alone = [run(model, one) for one in (a, b)]
    assert relative_error(rows, torch.cat([out for out, _ in alone])) < 1e-5
    assert_same_gradients(
        model, gradients, [x + y for x, y in zip(alone[0][1], alone[1][1], strict=True)], relative_error
    )


@few
@given(spec=samples.filter(lambda s: s["conditions"]), data=st.data())
def test_order_of_segments_means_nothing(spec, data, tiny_model, randn, relative_error):
    model, sample = tiny_model(), build(spec, randn(0))
    shuffled = data.draw(st.permutations(sample.segments))
    rows, gradients = run(model, sample)
    other, other_gradients = run(model, PackedSample(shuffled, sample.context, sample.timestep))
    assert relative_error(other, rows) < 1e-5
    assert_same_gradients(model, other_gradients, gradients, relative_error)


def test_two_targets_of_a_sample_keep_their_order(tiny_model, randn):
    draw = randn(0)
    latents = [draw(CHANNELS, 1, 2, 2), draw(CHANNELS, 2, 4, 2), draw(CHANNELS, 1, 2, 4)]
    segments = [Segment(latents[0], 0), Segment(latents[1], 1), Segment(latents[2], 0)]
    packed = pack([PackedSample(segments, draw(3, TEXT), 10)], PATCH)
    assert packed.target_lengths == (1, 2) and packed.target_grids == ((1, 1, 1), (1, 1, 2))
    assert packed.target_index.tolist() == [0, 5, 6]


def test_source_id_and_timestep_reach_the_output(tiny_model, randn, relative_error):
    model, draw = tiny_model(), randn(0)
    condition, target, context = draw(CHANNELS, 1, 4, 4), draw(CHANNELS, 1, 4, 4), draw(3, TEXT)

    def rows(source_id, timestep):
        return run(model, PackedSample([Segment(condition, source_id), Segment(target, 0)], context, timestep))[0]

    base = rows(1, 500)
    assert relative_error(rows(2, 500), base) > 1e-4
    assert relative_error(rows(1, 600), base) > 1e-4
    assert torch.equal(rows(1, torch.tensor(500.0)), base)


@pytest.mark.parametrize(
    "lengths",
    [
        ((4, 4),),
        ((3, 5), (3, 5), (3, 5)),
        ((4, 2), (1, 7), (1, 7), (6, 2), (4, 2)),
    ],
)
def test_grouped_attention_is_attention_per_sample(lengths, randn):
    draw = randn(0)
    queries, keys = (sum(n) for n in zip(*lengths, strict=True))
    q, k, v = draw(queries, 2, 8), draw(keys, 2, 8), draw(keys, 2, 8)
    expected, q_start, k_start = [], 0, 0
    for q_length, k_length in lengths:
        scores = torch.einsum("qhd,khd->hqk", q[q_start : q_start + q_length], k[k_start : k_start + k_length]) / 8**0.5
        expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k_start : k_start + k_length]))
        q_start, k_start = q_start + q_length, k_start + k_length
    for backend in ("native", "math"):
        torch.testing.assert_close(packed_attention(q, k, v, Lengths.of(lengths, "cpu"), backend), torch.cat(expected))
        if len(lengths) == 1:
            torch.testing.assert_close(packed_attention(q, k, v, None, backend), expected[0])


def test_backend_is_resolved_or_refused():
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, torch.float32, 128) == "native"
    assert resolve_backend("math", cpu, torch.float32, 128) == "math"
    assert resolve_backend("auto", torch.device("cuda"), torch.float32, 128) == "math"
    with pytest.raises(ConfigError, match="unknown attention backend 'flsh'"):
        resolve_backend("flsh", cpu, torch.float32, 128)
    with pytest.raises(ConfigError, match="cuDNN attention needs CUDA"):
        resolve_backend("cudnn", cpu, torch.bfloat16, 128)
    with pytest.raises(ConfigError, match="varlen attention needs CUDA"):
        resolve_backend("varlen", torch.device("cuda"), torch.float32, 128)


def test_checkpointing_changes_no_gradient(tiny_model, randn):
    model, draw = tiny_model().train(), randn(0)
    spec = {"conditions": [((1, 4, 4), 1.0)], "target": (2, 4, 4), "rows": 3, "timestep": 321.0}
    parts = [build(spec, draw), build({**spec, "conditions": []}, draw)]
    rows, gradients = run(model, *parts)
    model.gradient_checkpointing = True
    other, other_gradients = run(model, *parts)
    assert torch.equal(other, rows)
    assert all(torch.equal(a, b) for a, b in zip(other_gradients, gradients, strict=True))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of norms under autocast
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_forward_is_near_the_fp32_one(autocast, tiny_model, randn, relative_error):
    model, draw = tiny_model(), randn(0)
    parts = [build({"conditions": [((1, 4, 4), 1.0)], "target": (2, 4, 4), "rows": 3, "timestep": 321.0}, draw)]
    expected = run(model, *parts)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows, gradients = run(model if autocast else model.bfloat16(), *parts)
    assert rows.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in gradients)
    assert relative_error(rows.float(), expected) < 0.05


latents = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
patches = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))


@given(grid=latents, patch=patches)
def test_patches_go_back_to_the_latent(grid, patch):
    channels, *cells = grid
    shape = (channels, *(n * p for n, p in zip(cells, patch, strict=True)))
    latent = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    rows = target_patches(latent, patch)
    assert torch.equal(unpatchify(rows, tuple(cells), patch), latent)
    pt, ph, pw = patch
    assert rows[0].tolist() == latent[:, :pt, :ph, :pw].permute(1, 2, 3, 0).flatten().tolist()
    cut = patchify(latent, patch)
    assert grid_of(latent, patch) == tuple(cells) and len(cut) == math.prod(cells)
    assert torch.equal(patchify(torch.stack([latent, -latent]), patch), torch.stack([cut, -cut]))
    assert cut[0].tolist() == latent[:, :pt, :ph, :pw].flatten().tolist()


def test_patchify_is_the_convolution_of_the_patch_embedding(tiny_model, randn):
    model, latent = tiny_model(), randn(0)(CHANNELS, 2, 4, 6)
    rows = patchify(latent, PATCH)
    embedding = model.patch_embedding
    expected = embedding(latent[None])[0].flatten(1).T
    torch.testing.assert_close(F.linear(rows, embedding.weight.flatten(1), embedding.bias), expected)


def test_pack_lays_segments_end_to_end(randn):
    draw = randn(0)
    first = PackedSample([Segment(draw(4, 2, 4, 4), 11 / 7), Segment(draw(4, 1, 2, 6), 0)], draw(3, TEXT), 873)
    second = PackedSample([Segment(draw(4, 1, 2, 2), 0)], draw(5, TEXT), 12.5)
    packed = pack([first, second], PATCH)
    table = [[0, 2, 2, 2, 11 / 7], [8, 1, 1, 3, 0], [11, 1, 1, 1, 0]]
    torch.testing.assert_close(packed.segments, torch.tensor(table), atol=0, rtol=1e-7)
    assert packed.tokens == 12 and packed.patches.shape == (12, 16)
    assert packed.sample_index.tolist() == [0] * 11 + [1]
    assert packed.target_index.tolist() == [8, 9, 10, 11]
    assert packed.timesteps.tolist() == [873, 12.5]
    assert packed.token_lengths == (11, 1) and packed.context_lengths == (3, 5)
    assert packed.target_lengths == (3, 1) and packed.target_grids == ((1, 1, 3), (1, 1, 1))
    assert torch.equal(packed.context, torch.cat([first.context, second.context]))


@pytest.mark.parametrize("shape", [(4, 2, 4), (4, 1, 3, 4), (4, 1, 4, 5), (4, 0, 4, 4)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError) as caught:
        patchify(torch.zeros(shape), PATCH)
    assert str(list(shape)) in caught.value.what and caught.value.why and caught.value.fix


def test_nothing_to_pack_is_refused():
    for nothing in ([], [PackedSample([], torch.zeros(1, TEXT), 0)]):
        with pytest.raises(DataError, match="nothing to pack"):
            pack(nothing, PATCH)


def test_context_is_padded_with_zeros_and_cut(randn):
    features = randn(0)(3, TEXT)
    padded = pad_context(features, 5)
    assert torch.equal(padded[:3], features) and not padded[3:].any() and padded.shape == (5, TEXT)
    assert torch.equal(pad_context(features, 2), features[:2])


def test_more_sources_than_trained_share_the_trained_range():
    assert interpolate_ids(0) == []
    assert interpolate_ids(5) == [1, 2, 3, 4, 5]
    expected = [1, 1.5714, 2.1429, 2.7143, 3.2857, 3.8571, 4.4286, 5]
    assert interpolate_ids(8) == pytest.approx(expected, abs=5e-5)
    assert interpolate_ids(4, trained=3) == pytest.approx([1, 5 / 3, 7 / 3, 3])
