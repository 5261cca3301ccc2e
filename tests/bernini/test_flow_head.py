"""The flow head: the released numbers, names and sizes; guidance, sampling and the loss."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bernini.errors import ConfigError, DataError
from bernini.planner.flow_head import FlowHead, FlowHeadConfig, guidance_weights

SIZES = {"target_dim": 24, "condition_dim": 32, "width": 64, "depth": 3}
STREAMS = ("cond", "uncond", "imgcond")


@pytest.fixture(scope="module")
def golden(goldens):
    return load_file(goldens / "flow_head.safetensors")


@pytest.fixture(scope="module")
def build(golden):
    """Builds the golden's head, with other settings."""

    def build(kind: type[FlowHead] = FlowHead, **settings) -> FlowHead:
        head = kind(FlowHeadConfig(**SIZES, **settings))
        head.load_state_dict({name: x for name, x in golden.items() if name.startswith("net.")})
        return head

    return build


@pytest.fixture(scope="module")
def head(build):
    return build()


@pytest.fixture
def tokens(randn):
    """Conditions and true embeddings of five tokens."""
    draw = randn(3)
    return draw(5, 32), draw(5, 24)


class Oracle(FlowHead):
    """Knows the true embedding: it is the condition."""

    def forward(self, x, t, c):
        return (x - c) / (t / 1000).unsqueeze(-1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_golden_forward(golden, head, relative_error):
    with torch.no_grad():
        assert relative_error(head(golden["x"], golden["t"], golden["c"]), golden["out"]) < 1e-5
    norms = [module for module in head.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}, "another epsilon hardly shows in the golden"


def test_golden_guidance(golden, head, relative_error):
    """The golden's thirds are the streams, with timesteps of their own and the first third's noised embeddings."""
    t, c = (dict(zip(STREAMS, golden[name].chunk(3), strict=True)) for name in ("t", "c"))
    with torch.no_grad():
        velocities = [w * head(golden["x"][:4], t[s], c[s]) for s, w in guidance_weights(txt=1.2, img=1.0).items()]
    assert len(velocities) == 2
    assert relative_error(torch.stack(velocities).sum(0), golden["out_cfg_txt1.2_img1.0"][:4]) < 1e-5


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_golden_sigmas(golden, head, relative_error, steps):
    assert relative_error(head.sigmas(steps), golden[f"sigmas_n{steps}"]) < 1e-6


def test_released_names_and_shapes():
    with torch.device("meta"):
        head = FlowHead(FlowHeadConfig())
    width, dim = 4096, 3584
    expected = {
        "time_embed.mlp.0": (width, 256),
        "time_embed.mlp.2": (width, width),
        "cond_embed": (width, dim),
        "input_proj": (width, dim),
        "final_layer.linear": (dim, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(16):
        expected |= {
            f"res_blocks.{i}.in_ln": (width,),
            f"res_blocks.{i}.mlp.0": (width, width),
            f"res_blocks.{i}.mlp.2": (width, width),
            f"res_blocks.{i}.adaLN_modulation.1": (3 * width, width),
        }
    shapes = {name: tuple(p.shape) for name, p in head.state_dict().items()}
    assert shapes == {f"net.{name}.weight": shape for name, shape in expected.items()} | {
        f"net.{name}.bias": shape[:1] for name, shape in expected.items()
    }
    assert len(shapes) == 140
    assert round(sum(p.numel() for p in head.parameters()) / 1e6) == 1438


def test_a_new_head_predicts_no_velocity_and_learns_from_its_last_layer(tokens):
    head = FlowHead(FlowHeadConfig(**SIZES))
    c, target = tokens
    assert not head(target, torch.full((5,), 500.0), c).any()
    head.loss(c, target, head.draw(5, generator())).mean().backward()
    assert head.net.final_layer.linear.weight.grad.any()
    bound = math.sqrt(6 / (32 + 64))
    assert 0.9 * bound < head.net.cond_embed.weight.abs().max() <= bound
    assert head.net.time_embed["mlp"][2].weight.std().item() == pytest.approx(0.02, rel=0.05)


@settings(max_examples=30)
@given(
    txt=st.floats(-2, 6),
    img=st.floats(-2, 6),
    values=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    same=st.booleans(),
)
def test_weights_are_the_released_formula_and_keep_no_zero(txt, img, values, same):
    img = txt if same else img
    cond, uncond, imgcond = values
    streams = dict(zip(STREAMS, values, strict=True))
    weights = guidance_weights(txt, img)
    guided = sum(w * streams[s] for s, w in weights.items())
    assert guided == pytest.approx(uncond + img * (imgcond - uncond) + txt * (cond - imgcond), abs=1e-9)
    assert all(weights.values()) and ("imgcond" in weights) == (txt != img)


@pytest.mark.parametrize(
    ("txt", "img", "run"),
    [
        (1.2, 1.0, {"cond", "imgcond"}),
        (1.4, 1.2, {"cond", "uncond", "imgcond"}),
        (1.3, 1.3, {"cond", "uncond"}),
        (1.0, 1.0, {"cond"}),
        (0.0, 1.0, {"imgcond"}),
        (0.0, 0.0, {"uncond"}),
    ],
)
def test_sampling_is_guided_euler_and_runs_the_streams_it_needs_in_one_call(
    build, randn, relative_error, txt, img, run
):
    head, draw = build(), randn(1)
    c, noise = {stream: draw(4, 32) for stream in STREAMS}, draw(4, 24)
    sigmas, x = [*head.sigmas(3).tolist(), 0.0], noise
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            v = {s: head(x, torch.full((4,), 1000 * sigma), z) for s, z in c.items()}
            guided = v["uncond"] + img * (v["imgcond"] - v["uncond"]) + txt * (v["cond"] - v["imgcond"])
            x = x + (following - sigma) * guided

    calls, modulations = [], []
    head.net.final_layer.linear.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    head.net.res_blocks[1].adaLN_modulation.register_forward_hook(lambda *args: modulations.append(args[2].shape))
    needed = {stream: z for stream, z in c.items() if stream in run}
    assert relative_error(head.sample(needed, noise, 3, txt, img), x) < 1e-5
    assert calls == [(len(run), 4, 24)] * 3
    assert modulations == [(3, len(run), 4, 3 * 64)], "of all steps at once"
    for stream in run:
        with pytest.raises(ConfigError, match=f"lacks the stream {stream}"):
            head.sample({s: z for s, z in needed.items() if s != stream}, noise, 3, txt, img)


def test_many_tokens_are_sampled_as_few(build, randn, relative_error):
    head, draw = build(), randn(2)
    c, noise, rows = {s: draw(300, 32) for s in STREAMS}, draw(300, 24), []
    head.net.final_layer.linear.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    together = head.sample(c, noise, 2, 1.4, 1.2)
    assert rows == [128, 128, 128, 128, 44, 44], "the memory of modulations is bounded"
    few = [head.sample({s: x[i : i + 60] for s, x in c.items()}, noise[i : i + 60], 2, 1.4, 1.2) for i in (0, 240)]
    assert relative_error(torch.cat([together[:60], together[240:]]), torch.cat(few)) < 1e-5


def test_sampling_needs_a_step(head, tokens):
    with pytest.raises(ConfigError, match="0 flow steps"):
        head.sample({"cond": tokens[0]}, tokens[1], 0)


def test_timesteps_reach_bf16_weights_unrounded(build, golden, relative_error):
    head = build().bfloat16()
    x, c = golden["x"], golden["c"]
    with torch.no_grad():
        a, b = (head(x, torch.full((12,), t), c) for t in (501.0, 500.0))  # bf16 has no 501: it makes it 500
        assert a.dtype == torch.bfloat16 and relative_error(head(x, golden["t"], c).float(), golden["out"]) < 0.03
        near = build()(x, torch.full((12,), 501.0), c)
    assert relative_error(a.float(), near) < relative_error(b.float(), near)


@pytest.mark.parametrize("weighting", ["gaussian", "uniform"])
def test_the_loss_is_the_mean_over_draws_one_by_one(build, tokens, relative_error, weighting):
    head = build(weighting=weighting, batch_mul=6)
    c, x0 = tokens
    source = generator(5)
    index = torch.randint(1000, (6, 5), generator=source)
    noise = torch.randn(6, 5, 24, generator=source)
    sigmas = head.sigmas(1000)
    bell = torch.tensor([math.exp(-2 * ((t - 500) / 1000) ** 2) for t in (1000 * sigmas).tolist()])
    weights = (bell - bell.min()) / (bell - bell.min()).mean() if weighting == "gaussian" else torch.ones(1000)
    rows = []
    for i, eps in zip(index, noise, strict=True):
        s = sigmas[i]
        velocity = head((1 - s)[:, None] * x0 + s[:, None] * eps, 1000 * s, c)
        rows.append(weights[i] * (velocity - (eps - x0)).square().mean(1))
    loss = head.loss(c, x0, head.draw(5, generator(5)))
    assert loss.shape == (5,) and loss.dtype == torch.float32
    assert relative_error(loss, torch.stack(rows).mean(0)) < 1e-5


def test_training_sigmas_are_the_shifted_table(head):
    table = head.sigmas(1000)
    u = [1 - (1 - 0.003 / 1.002) * i / 1000 for i in range(1000)]
    assert table.tolist() == pytest.approx([2 * s / (1 + s) for s in u], abs=1e-6)


def test_a_perfect_predictor_has_no_loss(build, randn):
    oracle, truth = Oracle(FlowHeadConfig(**SIZES)), randn(0)(7, 24)
    assert oracle.loss(truth, truth, oracle.draw(7, generator())).max() < 1e-8
    assert build().loss(randn(1)(7, 32), truth, oracle.draw(7, generator())).min() > 0.1


@pytest.mark.parametrize("steps", [1, 5])
def test_sampling_goes_all_the_way_from_noise(randn, relative_error, steps):
    head, noise = FlowHead(FlowHeadConfig(**SIZES)), randn(2)(7, 24)
    velocity = head.net.final_layer.linear.bias.data.copy_(randn(3)(24))  # the only one of a new head
    assert relative_error(head.sample({"cond": randn(4)(7, 32)}, noise, steps), noise - velocity) < 1e-6


def test_tokens_do_not_see_each_other(head, tokens, randn):
    c, target = tokens
    other_c, other_target = randn(8)(5, 32), randn(9)(5, 24)
    other_c[2], other_target[2] = c[2], target[2]
    draws = head.draw(5, generator())
    loss, other = head.loss(c, target, draws), head.loss(other_c, other_target, draws)
    differ = (loss - other).abs() > 1e-5 * loss
    assert differ.tolist() == [True, True, False, True, True]


def test_leading_dimensions_broadcast(golden, head, relative_error):
    x, c = golden["x"], golden["c"]
    with torch.no_grad():
        rows = [[head(x[i : i + 1], torch.tensor([t]), c[i : i + 1]) for i in range(12)] for t in (900.0, 100.0)]
        together = head(x, torch.tensor([[900.0], [100.0]]), c)
        alone = head(x, torch.tensor(100.0), c)
    expected = torch.stack([torch.cat(row) for row in rows])
    assert relative_error(together, expected) < 1e-5 and relative_error(alone, expected[1]) < 1e-5


def test_the_condition_is_embedded_once_per_token(build, tokens):
    head, rows = build(batch_mul=16), {}
    for name in ("cond_embed", "input_proj"):
        module = head.net.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: rows.update({name: out[..., 0].numel()}))
    head.loss(*tokens, head.draw(5))
    assert rows == {"cond_embed": 5, "input_proj": 80}


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(build, tokens):
    runs, gradients = [], []
    for recompute in (False, True):
        head, c, calls = build(gradient_checkpointing=recompute), tokens[0].clone().requires_grad_(), []
        head.net.res_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        head.loss(c, tokens[1], head.draw(5, generator())).sum().backward()
        gradients.append([c.grad, *(p.grad for p in head.parameters())])
        runs.append(len(calls))
    assert runs == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any() and torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-7)


def gradients(head, c, target, seed=0, reduce=torch.sum, autocast=False):
    """The loss of each token, and gradients of all, as a module in training gets them."""
    head.zero_grad()
    c = c.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = head.loss(2 * c, target, head.draw(len(c), generator(seed)))
    (0.7 * reduce(loss)).backward()
    assert c.grad.any()
    return [loss.detach(), c.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
@pytest.mark.parametrize(("chunk", "calls"), [(5, 16), (12, 8), (15, 6), (79, 1), (10**6, 1)])
def test_chunks_change_no_gradient(build, tokens, relative_error, chunk, calls, reduce):
    plain = gradients(build(batch_mul=16), *tokens, reduce=reduce)
    head, rows = build(batch_mul=16, chunk=chunk), []
    head.net.res_blocks[0].register_forward_hook(lambda module, args, out: rows.append(out.shape[:2].numel()))
    chunked = gradients(head, *tokens, reduce=reduce)
    assert len(rows) == calls and sum(rows) == 80, "no row runs twice"
    assert max(map(relative_error, chunked, plain)) < 1e-6


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_chunks_in_mixed_precision(build, tokens, relative_error, weights):
    """Either way of adding the draws up rounds to bf16; what it rounds is in fp32."""
    exact = gradients(build(batch_mul=16), *tokens)
    for chunk in (None, 5):
        found = gradients(build(batch_mul=16, chunk=chunk).to(weights), *tokens, autocast=True)
        assert {x.dtype for x in found[2:]} == {weights} and found[1].dtype == torch.float32
        assert max(map(relative_error, (x.float() for x in found), exact)) < 0.03


def test_chunks_keep_nothing_for_the_backward_pass(build, tokens):
    class Saved:
        def __init__(self, x):
            self.x = x
            alive.add(self)

    def kept(**settings):
        head, c = build(**settings), tokens[0].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            loss = head.loss(c, tokens[1], head.draw(5, generator()))
        return loss.requires_grad and sum(saved.x.numel() for saved in alive)

    alive = weakref.WeakSet()
    assert kept(batch_mul=16) > 100_000
    assert kept(batch_mul=16, chunk=20) == 0


def test_chunks_of_which_parts_are_frozen(build, tokens, relative_error):
    whole = gradients(build(), *tokens)
    head = build(chunk=5)
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    c = tokens[0].clone().requires_grad_()
    head.loss(2 * c, tokens[1], head.draw(5, generator())).sum().mul(0.7).backward()
    assert relative_error(c.grad, whole[1]) < 1e-6
    assert not head.loss(tokens[0], tokens[1], head.draw(5, generator())).requires_grad
    head.net.input_proj.weight.requires_grad_(True)
    head.loss(2 * tokens[0], tokens[1], head.draw(5, generator())).sum().mul(0.7).backward()
    number = [name for name, _ in head.named_parameters()].index("net.input_proj.weight")
    assert relative_error(head.net.input_proj.weight.grad, whole[2 + number]) < 1e-6


def test_a_chunked_loss_weighs_all_tokens_alike(build, tokens):
    head = build(chunk=5)
    loss = head.loss(*tokens, head.draw(5, generator()))
    with pytest.raises(ConfigError, match="different weights"):
        (loss * torch.arange(5)).sum().backward()


def test_without_gradients_chunks_bound_the_memory(build, tokens, relative_error):
    head, rows = build(chunk=20, batch_mul=16), []
    head.net.res_blocks[0].register_forward_hook(lambda module, args, out: rows.append(out.shape[:2].numel()))
    with torch.no_grad():
        loss = head.loss(*tokens, head.draw(5, generator()))
    assert rows == [20] * 4
    assert relative_error(loss, build(batch_mul=16).loss(*tokens, head.draw(5, generator()))) < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_compile_without_a_break(build, tokens, relative_error, autocast):
    draws = build().draw(5, generator())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = build().loss(*tokens, draws)
        head = build()
        for block in head.net.res_blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        assert relative_error(head.loss(*tokens, draws), expected) < (1e-2 if autocast else 1e-5)


def test_no_token_has_no_loss(head):
    loss = head.loss(torch.zeros(0, 32, requires_grad=True), torch.zeros(0, 24), head.draw(0))
    assert loss.shape == (0,)
    loss.sum().backward()


def test_embeddings_of_another_width_are_refused(head):
    with pytest.raises(DataError, match="have 20 channels"):
        head.loss(torch.zeros(5, 32), torch.zeros(5, 20), head.draw(5))


@pytest.mark.parametrize("name", ["width", "shift", "batch_mul", "chunk"])
def test_sizes_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} of the flow head is 0"):
        FlowHeadConfig(**{name: 0})


def test_training_teaches_it_to_draw_what_the_condition_says(randn, relative_error):
    draw, source = randn(4), generator(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = FlowHead(FlowHeadConfig(target_dim=6, condition_dim=4, width=64, depth=2))
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    mixing = draw(4, 6)
    for _ in range(250):
        c = draw(32, 4)
        loss = head.loss(c, c @ mixing, head.draw(32, source)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    c, noise = draw(64, 4), draw(64, 6)
    assert relative_error(noise, c @ mixing) > 1
    assert relative_error(head.sample({"cond": c}, noise, 5), c @ mixing) < 0.2
