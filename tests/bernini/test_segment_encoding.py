"""Other segment encodings than SA-3D RoPE: what they see of source ids, how they learn, how they are kept."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from bernini.errors import ConfigError
from bernini.renderer.experts import Experts, load_transformer
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.segments import ROWS
from bernini.renderer.transformer import PackedWanTransformer3DModel

TOKENS = 12  # of the target


@pytest.fixture
def build(tiny_architecture, tiny_model):
    """Builds a model of an encoding; what encodings have in common has the same weights."""

    def make(encoding: str) -> PackedWanTransformer3DModel:
        model = replace(tiny_architecture, segment_encoding=encoding).build()
        model.load_state_dict(tiny_model(0).state_dict(), strict=False)
        return model

    return make


@pytest.fixture
def output(randn):
    """Velocity of a target beside two sources with the given ids."""

    def run(model: PackedWanTransformer3DModel, *ids: float) -> torch.Tensor:
        draw = randn(1)
        target, sources, context = draw(4, 2, 4, 6), [draw(4, 1, 4, 4) for _ in ids], draw(5, 12)
        segments = [*(Segment(x, i) for x, i in zip(sources, ids, strict=True)), Segment(target, 0)]
        # A second sample of another size, so that the vectors must find their tokens.
        samples = [PackedSample([Segment(draw(4, 1, 4, 2), 0)], context, 300), PackedSample(segments, context, 700)]
        packed = pack(samples, model.patch)
        return model(packed)[packed.target_index]

    return run


def test_sa3d_sees_ids_and_plain_does_not(build, output):
    plain, sa3d = build("plain"), build("sa3d")
    assert torch.equal(output(plain, 1, 2), output(plain, 2, 1))
    assert torch.equal(output(plain, 1, 2)[-TOKENS:], output(sa3d, 0, 0)[-TOKENS:])
    assert not torch.allclose(output(sa3d, 1, 2), output(sa3d, 2, 1), atol=1e-4)


def test_an_embedding_starts_as_plain_rope_and_learns_ids(build, output):
    model = build("embedding")
    assert torch.equal(output(model, 1, 2), output(build("plain"), 1, 2))
    output(model, 1, 3.5).square().mean().backward()
    used = model.segment_embedding.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [0, 1, 3, 4]
    torch.nn.init.normal_(model.segment_embedding.weight)
    assert not torch.allclose(output(model, 1, 2), output(model, 2, 1), atol=1e-4)


def test_vectors_find_their_tokens_and_fractional_ids_lie_between_rows(build):
    embedding = build("embedding").segment_embedding
    weight = torch.nn.init.normal_(embedding.weight).detach()
    table = torch.tensor([[0, 1, 2, 1, 2.25], [2, 2, 1, 2, 0], [6, 1, 1, 1, 5], [7, 1, 1, 1, ROWS]])
    vectors = embedding(table, 8).detach()
    torch.testing.assert_close(vectors[0], 0.75 * weight[2] + 0.25 * weight[3])
    assert torch.equal(vectors[1], vectors[0])
    assert torch.equal(vectors[2:6], weight[:1].expand(4, -1)) and torch.equal(vectors[6], weight[5])
    assert not vectors[7].any()


@pytest.mark.parametrize("encoding", ["plain", "embedding"])
def test_an_encoding_survives_saving_and_loading(encoding, build, output, tmp_path):
    model = build(encoding)
    if encoding == "embedding":
        torch.nn.init.normal_(model.segment_embedding.weight)
    Experts(model, boundary=0.0).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["segment_encoding"] == encoding
    loaded = load_transformer(tmp_path, "single")
    assert loaded.segment_encoding == encoding
    assert torch.equal(output(loaded, 1, 2), output(model, 1, 2))


def test_released_models_do_not_name_it(build, tmp_path):
    model = build("sa3d")
    model.save_pretrained(tmp_path)
    assert "segment_encoding" not in json.loads((tmp_path / "config.json").read_text())
    assert model.state_dict().keys() == WanTransformer3DModel.from_pretrained(tmp_path).state_dict().keys()
    assert PackedWanTransformer3DModel.from_pretrained(tmp_path).segment_encoding == "sa3d"


def test_an_unknown_encoding_is_refused(tiny_architecture):
    with pytest.raises(ConfigError, match=r"'rope' *\n.*sa3d, plain, embedding"):
        replace(tiny_architecture, segment_encoding="rope").build()
