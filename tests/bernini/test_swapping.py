import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import build, fit, keep_checkpoints, make_config, make_conversation
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from bernini.errors import ConfigError
from bernini.lora import add_lora, trainable
from bernini.quantizing import quantize
from bernini.renderer.experts import Architecture
from bernini.renderer.lora import LoRAConfig
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.swapping import BlockSwapping, HostWeights

CPU = torch.device("cpu")


def make_model(kind: Any = None, layers: int = 5) -> PackedWanTransformer3DModel:
    """A small transformer with a LoRA that does something, its blocks recomputed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"attention_head_dim": 16, "ffn_dim": 48, "text_dim": 12, "freq_dim": 16, "in_channels": 4}
        model = Architecture(num_layers=layers, num_attention_heads=2, **shape).build()
        add_lora(model, LoRAConfig(rank=2))
        for parameter in trainable(model):
            parameter.data = torch.randn_like(parameter) / 4
    if kind:
        quantize(model.blocks, kind)
    model.gradient_checkpointing = True
    return model


def make_pack(randn: Callable[..., Any], count: int = 2) -> Any:
    draw = randn(1)
    samples = [
        PackedSample([Segment(draw(4, 2, 4, 6), 1), Segment(draw(4, 2, 4, 6), 0)], draw(5, 12), 700.0),
        PackedSample([Segment(draw(4, 1, 4, 4), 0)], draw(7, 12), 30.0),
    ]
    return pack(samples[:count], (1, 2, 2))


def steps(model: PackedWanTransformer3DModel, packed: Any, count: int = 2) -> list[torch.Tensor]:
    """Outputs and gradients of some steps; a forward without backward lies between them."""
    found = []
    for _ in range(count):
        output = model(packed)
        output.square().mean().backward()
        found += [output.detach(), *(p.grad.clone() for p in trainable(model) if p.grad is not None)]
        model.zero_grad()
        with torch.inference_mode():
            found.append(model(packed).clone())
    return found


class Moves:
    """What `HostWeights` load, by their order in the model, and how many buffers of weights there are at most."""

    def __init__(self, swapping: BlockSwapping, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        self.most = 0
        buffers: list[StorageWeakRef] = []
        places = {id(weights): place for place, weights in enumerate(swapping._weights)}
        load = HostWeights.load

        def loaded(weights: HostWeights, *args: Any) -> None:
            new = not weights.loaded
            load(weights, *args)
            if new:
                self.made.append(places[id(weights)])
                buffers.append(StorageWeakRef(weights._tensors[0].untyped_storage()))
            self.most = max(self.most, sum(not buffer.expired() for buffer in buffers))

        monkeypatch.setattr(HostWeights, "load", loaded)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_swapped_blocks_compute_the_same_to_the_bit(randn: Any, kind: Any, count: int) -> None:
    packed, plain = make_pack(randn), make_model(kind)
    swapped = copy.deepcopy(plain)
    BlockSwapping(swapped, count)
    expected, found = steps(plain, packed), steps(swapped, packed)
    assert len(expected) == 2 * (2 + 5 * 20)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["none", "attention", "pointwise", "offload"])
def test_swapping_is_right_whatever_is_recomputed(randn: Any, way: Any) -> None:
    packed, plain = make_pack(randn), make_model(layers=3)
    plain.disable_gradient_checkpointing()
    plain.recompute = way
    swapped = copy.deepcopy(plain)
    BlockSwapping(swapped, 3)
    for one, other in zip(steps(plain, packed), steps(swapped, packed), strict=True):
        assert torch.equal(one, other)


def test_two_blocks_at_most_are_there_and_the_next_one_is_on_its_way(
    randn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, model = make_pack(randn), make_model(layers=6)
    swapping = BlockSwapping(model, 3)  # the first, the third and the fifth
    moves = Moves(swapping, monkeypatch)
    there: list[tuple[int, list[int]]] = []
    for place, number in enumerate((0, 2, 4)):
        feed = model.blocks[number].ffn
        feed.register_forward_hook(lambda *_, place=place: there.append((place, swapping.loaded)))
    for _ in range(2):
        model(packed).square().mean().backward()
    # In forward the next one, in backward, where blocks are computed again, the one before.
    assert there == [(0, [0, 1]), (1, [1, 2]), (2, [2]), (2, [1, 2]), (1, [0, 1]), (0, [0])] * 2
    assert moves.made == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert moves.most == 2


def test_only_what_is_trained_goes_along(randn: Any) -> None:
    model = make_model()
    BlockSwapping(model, 5)
    held = [p for block in model.blocks for p in block.parameters() if not p.requires_grad]
    before = [p.data_ptr() for p in held]
    model(make_pack(randn))
    assert [p.data_ptr() for p in held] != before
    model.to("meta")
    assert [p.data_ptr() for p in held] == before
    assert all(p.device.type == "meta" for p in model.parameters() if not any(p is q for q in held))


def test_keys_and_values_ahead_of_forwards_find_their_weights(randn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model()
    swapped = copy.deepcopy(plain)
    moves = Moves(BlockSwapping(swapped, 5), monkeypatch)
    context = randn(2)(7, 12)
    with torch.no_grad():
        for one, other in zip(plain.keys_values(context), swapped.keys_values(context), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert moves.made == [0, 1, 2, 3, 4] and moves.most == 2


def test_compiled_blocks_are_swapped_and_stay_compiled(randn: Any) -> None:
    torch.compiler.reset()
    packed, plain = make_pack(randn, 1), make_model("int8", layers=3)
    swapped = copy.deepcopy(plain)
    BlockSwapping(swapped, 2)
    counter = CompileCounterWithBackend("aot_eager")
    swapped.compile_repeated_blocks(backend=counter)
    for model in (plain, swapped):
        model(packed).square().mean().backward()
    for one, other in zip(trainable(plain), trainable(swapped), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 2 and counter.op_count > 200  # a block whole, with hooks and without
    torch.compiler.reset()


def settings(**more: Any) -> dict[str, Any]:
    return {"lora": {"rank": 2}, "recompute": "full", **more}


def test_run_with_everything_on_the_host_is_the_run_without(wan: Path, shards: Path, tmp_path: Path) -> None:
    losses = []
    for name, more in (("plain", {}), ("small", {"swap_blocks": 2, "offload_frozen": True})):
        config = make_config(wan, shards, tmp_path / name, **settings(**more))
        config["trainer"] |= {"limit_val_batches": 1, "max_steps": 4}
        keep_checkpoints(config, tmp_path / name)
        losses.append(fit(config))
    assert losses[0] == losses[1]
    first, second = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("plain", "small")
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_vae_and_text_encoder_are_there_while_they_work(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(make_config(wan, shards, tmp_path, offload_frozen=True), tmp_path)
    parts = {"vae": module.codec.vae, "text": module.features.encoder}
    weights = {name: next(part.parameters()) for name, part in parts.items()}
    home = {name: weight.data_ptr() for name, weight in weights.items()}
    away: dict[str, bool] = {}
    for name, inner in (("vae", parts["vae"].encoder), ("text", parts["text"].model)):
        inner.register_forward_hook(lambda *_, name=name: away.update({name: weights[name].data_ptr() != home[name]}))
    sample = make_conversation(0, "v2v")
    module.losses([sample], [("a",)])
    assert away == {"vae": True, "text": True}
    assert {name: weight.data_ptr() for name, weight in weights.items()} == home

    prepared = make_conversation(1, "v2v")
    for media in prepared.media():
        media.posterior = module.codec.posterior(media.pixels)
    prepared.text_features["text"] = torch.randn(3, 12)
    monkeypatch.setattr(HostWeights, "load", lambda *_: pytest.fail("a frozen helper came to the device"))
    module.losses([prepared], [("b",)])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"lora": None, "swap_blocks": 1}, "only frozen weights"),
        ({"lora": None, "quantize": "int8"}, "only frozen weights"),
        ({"swap_blocks": 1, "recompute": "none"}, "unless blocks are recomputed"),
        ({"swap_blocks": 3}, "the transformer has 2 blocks"),
    ],
)
def test_what_cannot_be_swapped_is_refused(
    wan: Path, shards: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(make_config(wan, shards, tmp_path, **settings(**more)), tmp_path)
