"""The planner's attention mask in its forms, and the draw of hidden target tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bernini.errors import ConfigError
from bernini.planner.masking import (
    MASK_RATIOS,
    SOURCE,
    TARGET,
    TEXT,
    UNIFORM,
    MaskRatio,
    block_mask,
    draw_masked,
    mask_rule,
    visible,
)
from bernini.tasks import TASKS


def layout(*samples: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token types, segment ids and samples of runs like ``t5 s9 t3 x24``: text, source, target and their lengths."""
    kinds = {"t": TEXT, "s": SOURCE, "x": TARGET}
    types, segments, ids = [], [], []
    for n, sample in enumerate(samples):
        start, visuals = len(types), 0
        for run in sample.split():
            kind, length = kinds[run[0]], int(run[1:])
            visuals += kind != TEXT
            here = len(types) - start
            segments += range(here, here + length) if kind == TEXT else [visuals] * length
            types += [kind] * length
        ids += [n] * (len(types) - start)
    return torch.tensor(types), torch.tensor(segments), torch.tensor(ids)


runs = st.tuples(st.sampled_from("tsx"), st.integers(1, 7)).map(lambda run: f"{run[0]}{run[1]}")
layouts = st.lists(st.lists(runs, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=3)
attentions = st.sampled_from(["causal", "bidirectional"])


def test_mask_golden(goldens):
    golden = load_file(goldens / "planner_mask.safetensors")
    assert torch.equal(visible(golden["token_type"], golden["segment_id"]), golden["visible"])


def test_mask_of_a_small_sequence():
    types, segments, _ = layout("t1 s2 t1 x2")
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
        ]
    )
    assert torch.equal(visible(types, segments), expected.bool())
    expected[1, 2] = 1  # the figure's source block is bidirectional, and nothing else differs
    assert torch.equal(visible(types, segments, sources="bidirectional"), expected.bool())


@settings(max_examples=50)
@given(layouts, attentions)
def test_who_sees_whom(samples, attention):
    types, segments, sample = layout(*samples)
    seen = visible(types, segments, sample, attention)
    target = types == TARGET
    assert not seen[~target][:, target].any(), "text and sources never see a target"
    assert seen.diagonal().all(), "every token sees itself, so that no row of the softmax is empty"
    assert not seen[sample[:, None] != sample[None]].any(), "packed samples never see each other"
    for n in range(len(samples)):
        alone = visible(*layout(samples[n])[:2], sources=attention)
        assert torch.equal(seen[sample == n][:, sample == n], alone), "packing changes nothing inside a sample"


@settings(max_examples=20)
@given(layouts, attentions)
def test_block_mask_is_the_same_rule(samples, attention):
    types, segments, sample = layout(*samples)
    rule, n = mask_rule(types, segments, sample, attention), len(types)
    assert torch.equal(create_mask(rule, 1, 1, n, n, "cpu")[0, 0], visible(types, segments, sample, attention))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("size", [5, 128, 300, 1500])
def test_blocks_are_those_that_torch_finds(size, attention):
    generator = torch.Generator().manual_seed(size)
    kinds = torch.tensor([TEXT, SOURCE, TARGET])[torch.randint(3, (size // 40 + 1,), generator=generator)]
    types = kinds.repeat_interleave(40)[:size]
    segments, sample = torch.arange(size) // 40, torch.arange(size) // 200
    ours = block_mask(types, segments, sample, attention)
    torchs = create_block_mask(mask_rule(types, segments, sample, attention), None, None, size, size, device="cpu")
    assert ours.shape == torchs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):  # those of queries serve the backward pass
        counts, numbers = (getattr(ours, f"{kind}_{name}")[0, 0] for name in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(torchs, f"{kind}_num_blocks")[0, 0])
        for own, wanted, count in zip(numbers, getattr(torchs, f"{kind}_indices")[0, 0], counts, strict=True):
            assert torch.equal(own[:count], wanted[:count])


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_block_mask_and_table_attend_alike(attention, randn, relative_error):
    types, segments, sample = layout("t20 s140 t10 x130", "t30 x200")
    blocks = block_mask(types, segments, sample, attention)
    table = visible(types, segments, sample, attention)
    padded = torch.zeros(5 * 128, 5 * 128, dtype=torch.bool)
    padded[: len(types), : len(types)] = table
    assert torch.equal(blocks.to_dense()[0, 0].bool(), padded.view(5, 128, 5, 128).any(3).any(1)), "blocks that are run"
    assert blocks.to_dense().sum() < 20, "half of the blocks are skipped"
    q, k, v = randn(0)(3, 1, 2, len(types), 16)
    # Eager FlexAttention takes its mask from the block mask, which on CUDA also says which blocks to run.
    assert (
        relative_error(flex_attention(q, k, v, block_mask=blocks), scaled_dot_product_attention(q, k, v, table)) < 1e-6
    )


def test_unknown_attention_among_sources():
    with pytest.raises(ConfigError, match="full"):
        visible(*layout("t2 x2")[:2], sources="full")


def test_mask_ratios_of_the_paper():
    means = {"t2i": 0.820, "t2v": 0.884, "i2i": 0.884, "i2v": 0.909, "v2v": 0.930, "rv2v": 0.930}
    assert {task: round(MASK_RATIOS[task].mean, 3) for task in means} == means
    assert MASK_RATIOS.keys() == TASKS.keys()


@pytest.mark.parametrize("ratio", [MASK_RATIOS["t2i"], MASK_RATIOS["v2v"], UNIFORM])
def test_hidden_tokens_follow_the_distribution(ratio):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_masked(50, ratio, generator) for _ in range(4000)]).double()
    shares = drawn.mean(1)
    assert shares.min() > 0
    grid = torch.arange(1, 51) / 50
    expected = torch.distributions.Beta(torch.tensor(ratio.alpha).double(), torch.tensor(ratio.beta).double())
    draws = torch.ceil(expected.sample((200_000,)) * 50) / 50
    cdf, true = ((x[:, None] <= grid + 1e-9).double().mean(0) for x in (shares, draws))
    assert (cdf - true).abs().max() < 0.03, "ceil(n r) with r of the Beta distribution"
    per_token = drawn.mean(0)
    assert (per_token - per_token.mean()).abs().max() < 4 * math.sqrt(0.25 / 4000), "anywhere alike"


def test_hidden_tokens_depend_on_the_generator_alone():
    def draw(seed: int) -> torch.Tensor:
        return draw_masked(40, MaskRatio(2.0, 2.0), torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)


@given(st.integers(1, 60), st.integers(0, 99))
def test_at_least_one_token_is_hidden(count, seed):
    hidden = draw_masked(count, MaskRatio(0.05, 5.0), torch.Generator().manual_seed(seed))
    assert hidden.shape == (count,) and 1 <= hidden.sum() <= count
