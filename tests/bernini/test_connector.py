"""The connector: the released numbers, names and sizes, and how it starts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bernini.errors import ConfigError
from bernini.planner.connector import Connector, ConnectorConfig
from bernini.planner.flow_head import FlowHead, FlowHeadConfig

TARGET = 3  # token type


@pytest.fixture(scope="module")
def golden(goldens):
    return load_file(goldens / "planner_sample.safetensors")


def weights(golden, prefix):
    return {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def connector(golden):
    connector = Connector(ConnectorConfig(hidden=64, vit_dim=64, gen_dim=48))
    connector.load_state_dict(weights(golden, "connector."))
    return connector


@pytest.mark.parametrize(("stream", "context"), [("cond", "wtxt_wovit"), ("uncond", "wotxt_wovit")])
def test_golden_contexts_without_the_plan(golden, connector, relative_error, stream, context):
    """Text and sources never see the target, so that their rows do not wait for the plan."""
    rows = golden[f"{stream}.hidden_penultimate_before"][golden[f"{stream}.token_type"] != TARGET]
    with torch.no_grad():
        ours = connector.for_gen(rows)
    for run in ("k6", "k40"):
        assert relative_error(ours, golden[f"out.{run}.cond_embeds_{context}"]) < 1e-5


@pytest.mark.parametrize("run", ["k6", "k40"])
def test_golden_first_token_of_a_plan(goldens, golden, connector, relative_error, run):
    """The first token to be revealed, the last of the order, is drawn while all others are masked."""
    spec = json.loads((goldens / "planner_sample.json").read_text())
    settings, token = spec["runs"][run], golden["order"][-1]
    head = FlowHead(FlowHeadConfig(target_dim=64, condition_dim=64, width=96, depth=2))
    head.load_state_dict(weights(golden, "flow_head."))
    states = {
        stream: golden[f"{stream}.hidden_penultimate_before"][golden[f"{stream}.token_type"] == TARGET][token][None]
        for stream in ("cond", "uncond", "imgcond")
    }
    noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(spec["seed"]))
    with torch.no_grad():
        conditions = {stream: connector.for_vit(state) for stream, state in states.items()}
    drawn = head.sample(conditions, noise, settings["flow_steps"], settings["vit_txt_cfg"], settings["vit_img_cfg"])
    assert relative_error(drawn[0], golden[f"out.{run}.pred_vit_embed"][token]) < 1e-5


def test_released_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Connector(ConnectorConfig()).state_dict().items()}
    assert shapes == {
        "proj_gen.0.weight": (4096, 3584),
        "proj_gen.0.bias": (4096,),
        "proj_gen.2.weight": (4096,),
        "proj_gen.3.weight": (4096, 4096),
        "proj_gen.3.bias": (4096,),
        "pred_vit.0.weight": (3584, 3584),
        "pred_vit.0.bias": (3584,),
        "pred_vit.2.weight": (3584, 3584),
        "pred_vit.2.bias": (3584,),
        "pred_vit.3.weight": (3584,),
        "pred_vit.4.weight": (3584, 3584),
        "pred_vit.4.bias": (3584,),
    }


def test_a_new_connector_says_nothing_to_the_renderer_unless_asked_to(randn):
    hidden = randn(0)(5, 16)
    for zero in (True, False):
        connector = Connector(ConnectorConfig(hidden=16, vit_dim=8, gen_dim=12, zero_init_gen=zero))
        rows, conditions = connector.for_gen(hidden), connector.for_vit(hidden)
        assert rows.shape == (5, 12) and rows.any().item() != zero
        assert conditions.shape == (5, 8) and conditions.any()
        rows.sum().backward()
        assert connector.proj_gen[3].weight.grad.any(), "zero weights still learn"


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_are_computed_in_fp32(connector, randn, relative_error, autocast, recwarn):
    """Large states, whose squares bf16 would lose digits of, with weights in either dtype."""
    hidden = 300 * randn(0)(7, 64)
    half = Connector(connector.config)
    half.load_state_dict(connector.state_dict())
    if not autocast:
        half.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = {"gen": half.for_gen(hidden), "vit": half.for_vit(hidden)}
    with torch.no_grad():
        exact = {"gen": connector.for_gen(hidden), "vit": connector.for_vit(hidden)}
    for name, rows in mixed.items():
        assert rows.dtype == torch.bfloat16 and relative_error(rows.float(), exact[name]) < 0.02
    assert not [w for w in recwarn if "fused" in str(w.message)]


def test_sizes_are_positive():
    with pytest.raises(ConfigError, match="gen_dim of the connector is 0"):
        ConnectorConfig(gen_dim=0)
