"""The language model as the planner drives it, and masked planning with and without the prefix cache."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from bernini.errors import ConfigError, DataError
from bernini.planner import readers
from bernini.planner.connector import Connector, ConnectorConfig
from bernini.planner.flow_head import FlowHead, FlowHeadConfig
from bernini.planner.masking import SOURCE, TARGET, TEXT, block_mask, visible
from bernini.planner.mllm import ATTENTION, PrefixCache, embed_inputs, run_text
from bernini.planner.planning import Planner, PlanningConfig, PlanRequest, Stream
from bernini.planner.reveal import uncertainty

STREAMS = ("cond", "uncond", "imgcond")
CONTEXTS = ("wtxt_wvit", "wtxt_wovit", "wotxt_wvit", "wotxt_wovit")
WIDTH = 64


class Golden:
    """The golden planner, its streams and its runs."""

    def __init__(self, folder):
        self.tensors = load_file(folder / "planner_sample.safetensors")
        self.info = json.loads((folder / "planner_sample.json").read_text())

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def text_model(self, attention: str) -> Qwen2_5_VLTextModel:
        model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**self.info["text_config"], bos_token_id=1, eos_token_id=2))
        model.load_state_dict(self.part("lm."))
        model.set_attn_implementation(attention)
        return model.eval()

    def planner(self, attention: str = "eager") -> Planner:
        connector = Connector(ConnectorConfig(WIDTH, WIDTH, 48))
        connector.load_state_dict(self.part("connector."))
        head = FlowHead(FlowHeadConfig(WIDTH, WIDTH, width=96, depth=2))
        head.load_state_dict(self.part("flow_head."))
        return Planner(self.text_model(attention), connector, head)

    def request(self) -> PlanRequest:
        fields = {"embeds": "inputs_embeds"} | {name: name for name in ("position_ids", "token_type", "segment_id")}
        streams = {s: Stream(**{f: self.tensors[f"{s}.{name}"] for f, name in fields.items()}) for s in STREAMS}
        return PlanRequest(**streams, seed=self.info["seed"], grid=(1, 4, 6))

    def config(self, run: str, **values) -> PlanningConfig:
        run_values = self.info["runs"][run]
        arguments = (run_values[key] for key in ("planning_step", "flow_steps", "vit_txt_cfg", "vit_img_cfg"))
        return PlanningConfig(*arguments, **values)


@pytest.fixture(scope="module")
def golden(goldens) -> Golden:
    return Golden(goldens)


@pytest.fixture(scope="module")
def planner(golden) -> Planner:
    return golden.planner(ATTENTION)


def make_stream(seed: int, given: int, tokens: int = 24, behind: int = 0) -> Stream:
    """A stream of ``given`` text and source tokens, the last ``behind`` of them behind the target."""
    draw = torch.Generator().manual_seed(seed)
    sources = given // 2
    before = given - behind
    types = [TEXT] * (before - sources) + [SOURCE] * sources + [TARGET] * tokens + [TEXT] * behind
    embeds = torch.randn(len(types), WIDTH, generator=draw)
    embeds[before : before + tokens] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
    positions = torch.randint(0, 60, (3, len(types)), generator=draw)
    types = torch.tensor(types)
    return Stream(embeds, positions, types, torch.where(types == TEXT, torch.arange(len(types)), types))


def make_request(seed: int = 0, tokens: int = 24, sources: bool = True, behind: int = 0) -> PlanRequest:
    imgcond = make_stream(seed + 2, 9, tokens, behind) if sources else None
    cond, uncond = make_stream(seed, 20 + seed % 5, tokens, behind), make_stream(seed + 1, 5, tokens)
    return PlanRequest(cond, uncond, imgcond, seed, (2, 3, tokens // 6))


def assert_same_plans(a, b, relative_error, tolerance=1e-5):
    for name in ("embeds", *CONTEXTS):
        assert relative_error(getattr(a, name), getattr(b, name)) < tolerance, name


class Forwards:
    """Shapes ``(rows, tokens)`` of what goes through each layer of a text model."""

    def __init__(self, model: Qwen2_5_VLTextModel):
        self.layers: list[list[tuple[int, int]]] = [[] for _ in model.layers]
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape[:2])))
            for layer, seen in zip(model.layers, self.layers, strict=True)
        ]

    def __enter__(self) -> list[list[tuple[int, int]]]:
        return self.layers

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# -- the language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa", ATTENTION])
@pytest.mark.parametrize("name", STREAMS)
def test_penultimate_hidden_states_golden(golden, attention, name, relative_error):
    stream = getattr(golden.request(), name)
    model = golden.text_model(attention)
    assert torch.equal(stream.visible, golden.tensors[f"{name}.visible"])
    with torch.no_grad(), Forwards(model) as layers:
        found = run_text(model, stream.embeds[None], stream.position_ids[:, None], stream.visible)
    assert relative_error(found.penultimate[0], golden.tensors[f"{name}.hidden_penultimate_before"]) < 1e-5
    assert found.final is None and [len(seen) for seen in layers] == [1, 1, 1, 0], "the last layer does not run"


@torch.no_grad()
def test_final_hidden_states_are_those_of_transformers(planner, relative_error):
    model, stream = planner.text_model, make_stream(0, 30, tokens=0)
    found = run_text(model, stream.embeds[None], stream.position_ids[:, None], stream.visible, final=True)
    stock = model(
        inputs_embeds=stream.embeds[None], position_ids=stream.position_ids[:, None], output_hidden_states=True
    )
    assert relative_error(found.final, stock.last_hidden_state) < 1e-5
    assert relative_error(found.penultimate, stock.hidden_states[-2]) < 1e-5


def test_gradients_with_and_without_checkpointing(golden, relative_error):
    stream, gradients = make_stream(0, 12), []
    for checkpointing in (False, True):
        model = golden.text_model(ATTENTION).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        embeds = stream.embeds[None].requires_grad_()
        run_text(model, embeds, stream.position_ids[:, None], stream.visible).penultimate.square().sum().backward()
        gradients.append([embeds.grad, *(p.grad for p in model.layers[:-1].parameters())])
        assert model.layers[-1].mlp.up_proj.weight.grad is None
        stream.embeds.requires_grad_(False).grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        assert relative_error(recomputed, plain) < 1e-6


def pack(streams: list[Stream]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    sample = torch.cat([torch.full((len(s.embeds),), n) for n, s in enumerate(streams)])
    types, segments = torch.cat([s.token_type for s in streams]), torch.cat([s.segment_id for s in streams])
    embeds, positions = torch.cat([s.embeds for s in streams]), torch.cat([s.position_ids for s in streams], 1)
    return embeds[None], positions[:, None], (types, segments, sample)


@torch.no_grad()
@pytest.mark.parametrize("form", [visible, block_mask])
def test_packed_samples_are_as_alone(planner, form, relative_error):
    """As a table and as a block mask, whose FlexAttention runs without its compiler here."""
    model, streams = planner.text_model, [make_stream(0, 70), make_stream(1, 5, 100), make_stream(2, 30, 0)]
    embeds, positions, tokens = pack(streams)
    with torch.compiler.set_stance("force_eager"):
        packed = run_text(model, embeds, positions, form(*tokens), final=True)
    for n, stream in enumerate(streams):
        alone = run_text(model, stream.embeds[None], stream.position_ids[:, None], stream.visible, final=True)
        assert relative_error(packed.penultimate[:, tokens[2] == n], alone.penultimate) < 1e-5
        assert relative_error(packed.final[:, tokens[2] == n], alone.final) < 1e-5


def test_block_mask_needs_an_attention_that_takes_it(golden):
    stream = make_stream(0, 6)
    mask = block_mask(stream.token_type, stream.segment_id)
    assert isinstance(mask, BlockMask)
    with pytest.raises(ConfigError, match="'sdpa' takes no block mask"):
        run_text(golden.text_model("sdpa"), stream.embeds[None], stream.position_ids[:, None], mask)


def test_inputs_are_text_features_and_mask_tokens(planner, randn):
    embedding, ids = planner.text_model.embed_tokens, torch.tensor([3, 9, 9, 4, 9, 9])
    visual = ids == 9
    features, token = randn(0)(4, WIDTH), randn(1)(WIDTH)
    masked = torch.tensor([0, 0, 0, 0, 0, 1]).bool()
    text = embedding(ids)
    expected = torch.stack([text[0], features[0], features[1], text[3], features[2], token])
    assert torch.equal(embed_inputs(embedding, ids, visual, features, masked, token), expected)

    unknown_target = torch.tensor([0, 1, 1, 0, 0, 0]).bool()  # planning: no features where the plan will be
    masked = torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    expected[4] = token
    assert torch.equal(embed_inputs(embedding, ids, unknown_target, features[:2], masked, token), expected)


@pytest.mark.parametrize("shape", [(4, 32), (3, WIDTH), (5, WIDTH)])
def test_features_that_do_not_fit(planner, shape):
    ids = torch.tensor([3, 9, 9, 4, 9, 9])
    with pytest.raises(DataError, match=r"expected \[4, 64\]"):
        embed_inputs(planner.text_model.embed_tokens, ids, ids == 9, torch.zeros(shape))


# -- planning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("run", ["k6", "k40"])
def test_planning_golden(golden, run, cache, relative_error):
    [plan] = golden.planner().plan([golden.request()], golden.config(run, cache=cache))
    assert relative_error(plan.embeds, golden.tensors[f"out.{run}.pred_vit_embed"]) < 1e-5
    for name in CONTEXTS:
        assert relative_error(getattr(plan, name), golden.tensors[f"out.{run}.cond_embeds_{name}"]) < 1e-5, name


@pytest.mark.parametrize("order", ["random", "halton", "confidence"])
@pytest.mark.parametrize("values", [{"steps": 1}, {"steps": 5, "txt": 1.0}, {"steps": 30, "txt": 1.4, "img": 1.2}])
@pytest.mark.parametrize("sources", [True, False])
def test_the_cache_changes_nothing(planner, order, values, sources, relative_error):
    config = PlanningConfig(flow_steps=2, order=order, **values)
    requests = [make_request(sources=sources, behind=3), make_request(3, sources=sources)]
    cached = planner.plan(requests, config)
    for request, plan in zip(requests, cached, strict=True):
        [whole] = planner.plan([request], replace(config, cache=False))
        assert_same_plans(plan, whole, relative_error)


def test_requests_together_are_as_alone(planner, relative_error):
    config = PlanningConfig(4, 1, 1.3, 0.9)
    requests = [make_request(0), make_request(4, tokens=12), make_request(7), make_request(11, sources=False)]
    for request, plan in zip(requests, planner.plan(requests, config), strict=True):
        assert len(plan.wtxt_wvit) == len(request.cond.embeds) and len(plan.embeds) == len(request.cond.target)
        assert_same_plans(plan, planner.plan([request], config)[0], relative_error)


def test_short_requests_share_a_forward_and_long_ones_do_not(planner, monkeypatch, relative_error):
    requests = [make_request(seed, sources=False) for seed in range(3)]  # of 20 to 22 given tokens, and 5 without words
    with Forwards(planner.text_model) as layers:
        together = planner.plan(requests, PlanningConfig(1, 1))
    assert layers[0][0] == (1, 20 + 21 + 22 + 3 * 5)
    monkeypatch.setattr(readers, "GIVEN_AT_ONCE", 25 + 26)
    with Forwards(planner.text_model) as layers:
        apart = planner.plan(requests, PlanningConfig(1, 1))
    assert layers[0][:2] == [(1, 25 + 26), (1, 27)]
    for a, b in zip(together, apart, strict=True):
        assert_same_plans(a, b, relative_error)


def test_contexts_share_their_rows(planner):
    request = make_request(behind=3)
    [plan] = planner.plan([request], PlanningConfig(2, 1))
    assert torch.equal(plan.wtxt_wvit[request.cond.given], plan.wtxt_wovit)
    assert torch.equal(plan.wtxt_wvit[request.cond.target], plan.wotxt_wvit)
    assert len(plan.wotxt_wovit) == len(request.uncond.given)


def test_a_plan_of_given_embeddings_is_as_one_that_was_made(planner, relative_error):
    requests = [make_request(0), make_request(3, tokens=12, sources=False), make_request(8)]
    made = planner.plan(requests, PlanningConfig(steps=2, flow_steps=1))
    adopted = planner.adopt(requests, [plan.embeds.double() for plan in made])
    for a, b in zip(adopted, made, strict=True):
        assert_same_plans(a, b, relative_error)
        assert a.grid == b.grid
    other = planner.adopt(requests, [plan.embeds + 1 for plan in made])[0]
    assert relative_error(other.wotxt_wvit, made[0].wotxt_wvit) > 1e-3
    assert relative_error(other.wtxt_wovit, made[0].wtxt_wovit) < 1e-5
    with pytest.raises(DataError, match="no plan of the target"):
        planner.adopt(requests, [made[0].embeds, made[0].embeds, made[2].embeds])


def test_plans_depend_on_seed_and_conditions(planner, relative_error):
    def plan(request: PlanRequest) -> Tensor:
        return planner.plan([request], PlanningConfig(3, 2))[0].embeds

    request = make_request()
    first = plan(request)
    torch.manual_seed(5)
    assert torch.equal(plan(request), first)
    assert relative_error(plan(replace(request, seed=1)), first) > 0.1
    assert relative_error(plan(replace(request, cond=make_stream(50, 20))), first) > 1e-3


@pytest.mark.parametrize(
    ("values", "sources", "streams"),
    [
        ({"txt": 1.4, "img": 1.2}, True, 3),
        ({"txt": 1.2, "img": 1.0}, True, 2),  # as released: the empty stream cancels out
        ({"txt": 1.2, "img": 1.2}, True, 2),  # imgcond cancels out
        ({"txt": 1.0, "img": 1.0}, True, 1),  # no guidance
        ({"txt": 1.2, "img": 1.0}, False, 1),  # without sources cond and imgcond are one
        ({"txt": 1.2, "img": 1.2}, False, 2),
    ],
)
def test_what_is_forwarded(planner, values, sources, streams):
    """Given tokens once, then the targets of the streams that count in one batch, and no last layer."""
    request, steps = make_request(sources=sources), 4
    with Forwards(planner.text_model) as layers:
        planner.plan([request], PlanningConfig(steps, 1, **values))
    unguided = values.get("img", 1.0) == 1.0  # the negative prompt is read all the same, for its context
    imgcond = values["txt"] != values.get("img", 1.0) if sources else False
    read = [request.cond, request.uncond, *([request.imgcond] if imgcond else [])]
    given = (1, sum(len(stream.given) for stream in read))
    assert layers[0] == [given, *[(streams, 24)] * steps, (1, 24)], "the last one is the finished plan, for contexts"
    assert layers[0] == layers[2] and not layers[3]

    with Forwards(planner.text_model) as layers:
        planner.plan([request], PlanningConfig(steps, 1, cache=False, **values))
    assert len(layers[0]) == streams * steps + 1 + unguided


def test_steps_that_reveal_nothing_are_not_run(planner):
    with Forwards(planner.text_model) as layers:
        planner.plan([make_request(sources=False)], PlanningConfig(40, 1))
    assert layers[0].count((1, 24)) == 24 + 1


class InPlace:
    """Stands in for a CUDA graph: inputs are copied to where they always were, and outputs overwrite the last ones."""

    def __init__(self, call):
        self.call, self.inputs, self.output = call, None, None

    def __call__(self, *inputs):
        self.inputs = self.inputs or [x.clone() for x in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            assert own.shape == given.shape
            own.copy_(given)
        output = self.call(*self.inputs)
        self.output = output.clone() if self.output is None else self.output.copy_(output)
        return self.output


@pytest.fixture
def in_place(monkeypatch) -> list[InPlace]:
    """Plans as CUDA graphs make them, in memory that stays where it is; everything that was recorded."""
    made: list[InPlace] = []
    monkeypatch.setattr("bernini.planner.planning.Recorded", lambda call: made.append(InPlace(call)) or made[-1])
    monkeypatch.setattr(Planner, "_can_record", lambda self, embeds, steps: True)
    return made


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("sources", [True, False])
def test_steps_of_equal_shapes_in_fixed_memory_change_nothing(golden, in_place, order, sources, relative_error):
    planner, config = golden.planner(ATTENTION), PlanningConfig(6, 2, 1.4, 1.2, order=order)
    requests = [make_request(0, sources=sources, behind=3), make_request(1, sources=sources)]
    plans = [
        planner.plan(requests, config),
        planner.plan([make_request(5 + n, sources=sources) for n in (0, 1)], config),
    ]
    assert len(in_place) == 2, "plans of equal shapes share a recording, whatever their prompts' lengths"
    for request, plan in zip([*requests, make_request(5, sources=sources)], [*plans[0], plans[1][0]], strict=True):
        [expected] = planner.plan([request], replace(config, cuda_graphs=False))
        assert_same_plans(plan, expected, relative_error)
    assert len(in_place) == 2


def test_a_recording_serves_what_it_was_made_of(golden, in_place, relative_error):
    planner, config = golden.planner(ATTENTION), PlanningConfig(6, 2)

    def plan(config=config, **values):
        [found] = planner.plan([make_request(**values)], config)
        [expected] = planner.plan([make_request(**values)], replace(config, cuda_graphs=False))
        assert_same_plans(found, expected, relative_error)
        return len(in_place) // 2

    assert plan() == plan(seed=3) == 1
    assert plan(tokens=18) == 2, "other shapes"
    assert plan() == 3, "one recording is kept"
    assert plan(replace(config, txt=1.4)) == 4, "what it computes"
    assert plan(replace(config, txt=1.4, flow_steps=3)) == 5
    for parameter in planner.text_model.parameters():
        parameter.data = 1.1 * parameter.data
    assert plan(replace(config, txt=1.4, flow_steps=3)) == 6, "weights that are elsewhere"
    for parameter in planner.text_model.parameters():
        parameter.data *= 1.1
    assert plan(replace(config, txt=1.4, flow_steps=3)) == 6, "weights that changed where they are"
    with torch.inference_mode():
        assert plan(replace(config, txt=1.4, flow_steps=3)) == 7, "memory that cannot be written outside"


def test_nothing_is_recorded_on_the_cpu_nor_without_the_cache(golden, monkeypatch):
    monkeypatch.setattr("bernini.planner.planning.Recorded", None)
    planner = golden.planner(ATTENTION)
    planner.plan([make_request()], PlanningConfig(6, 1))
    monkeypatch.setattr(Planner, "_can_record", lambda self, embeds, steps: True)
    planner.plan([make_request()], PlanningConfig(6, 1, cache=False))


@torch.no_grad()
def test_confidence_reveals_what_the_flow_head_is_surest_of(planner, monkeypatch):
    request, revealed = make_request(), []
    sample = planner.flow_head.sample
    monkeypatch.setattr(planner.flow_head, "sample", lambda c, *args: revealed.append(c["cond"]) or sample(c, *args))
    planner.plan([request], PlanningConfig(3, 2, order="confidence"))

    cond = request.cond
    hidden = run_text(planner.text_model, cond.embeds[None], cond.position_ids[:, None], cond.visible).penultimate[0]
    conditions = planner.connector.for_vit(hidden[cond.target])
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    surest = uncertainty(planner.flow_head, conditions, noise).argsort()[: len(revealed[0])].sort().values
    torch.testing.assert_close(revealed[0], conditions[surest])


def test_the_cache_holds_keys_and_values_in_the_dtype_of_the_model(golden):
    stream, cache = make_stream(0, 15), PrefixCache()
    model = golden.text_model(ATTENTION).bfloat16()
    run_text(model, stream.embeds[None].bfloat16(), stream.position_ids[:, None], stream.visible, cache)
    held = [tensor for layer in cache.layers for tensor in layer]
    assert len(held) == 2 * 3, "of the layers that run"
    assert {(tuple(t.shape), t.dtype) for t in held} == {((1, 2, 39, 16), torch.bfloat16)}


def test_planning_in_bf16(golden, relative_error):
    planner, request = golden.planner(ATTENTION), make_request()
    [exact] = planner.plan([request], PlanningConfig(4, 2))
    for module in (planner.text_model, planner.connector, planner.flow_head):
        module.bfloat16()
    streams = {s: replace(getattr(request, s), embeds=getattr(request, s).embeds.bfloat16()) for s in STREAMS}
    [rounded] = planner.plan([replace(request, **streams)], PlanningConfig(4, 2))
    assert rounded.embeds.dtype == rounded.wtxt_wvit.dtype == torch.bfloat16
    tensors = {n: x.float() for n, x in vars(rounded).items() if isinstance(x, torch.Tensor)}
    assert_same_plans(replace(rounded, **tensors), exact, relative_error, 0.05)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_request_without_a_target(planner):
    nothing = make_stream(0, 8, tokens=0)
    with pytest.raises(DataError, match="a plan without a target"):
        planner.plan([PlanRequest(nothing, nothing, nothing)], PlanningConfig())


def test_streams_that_disagree_on_the_target(planner):
    with pytest.raises(DataError, match=r"(?s)do not agree.*'uncond': 12"):
        planner.plan([replace(make_request(), uncond=make_stream(1, 5, 12))], PlanningConfig())


def test_training_mode_is_refused(golden):
    planner = golden.planner()
    planner.text_model.train()
    with pytest.raises(ConfigError, match="training mode"):
        planner.plan([make_request()], PlanningConfig())


def test_halton_without_a_grid(planner):
    with pytest.raises(ConfigError, match="halton"):
        planner.plan([replace(make_request(), grid=None)], PlanningConfig(order="halton"))


@pytest.mark.parametrize("values", [{"steps": 0}, {"flow_steps": 0}, {"order": "raster"}])
def test_settings_that_cannot_work(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        PlanningConfig(**values)
