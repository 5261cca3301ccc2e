"""The pipeline as users of diffusers call it, on models small enough for a CPU."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from factories import build, make_clip, make_config, make_conversation
from PIL import Image
from planners import write_planner_folder

from bernini.conversation import Conversation
from bernini.errors import CheckpointError, ConfigError, DataError
from bernini.pipeline import BerniniPipeline, BerniniPipelineOutput
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.planning import Plan

SMALL = {"steps": 2, "frames": 5, "height": 32, "width": 32, "max_edge": 32, "min_edge": 16}
PLANNING = {"planning_steps": 2, "planning_flow_steps": 1}
MODES = ("vae_txt_vit", "vae_txt_vit_wapg", "rv2v_wapg", "rv2v_projected", "v2v_apg")


@pytest.fixture(scope="module")
def full(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full model: the Wan folder with a planner in it."""
    folder = tmp_path_factory.mktemp("full") / "model"
    shutil.copytree(wan, folder)
    return write_planner_folder(folder, gen_dim=12)


@pytest.fixture(scope="module")
def pipe(full: Path) -> BerniniPipeline:
    pipeline = BerniniPipeline.from_pretrained(full)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def make(pipe: BerniniPipeline) -> Callable[..., BerniniPipelineOutput]:
    """Calls the pipeline with settings that take no time."""

    def call(*args: Any, **kwargs: Any) -> BerniniPipelineOutput:
        planning = {} if kwargs.get("plan") is False else PLANNING
        made = pipe(*args, **{**SMALL, **planning, **kwargs})
        assert isinstance(made, BerniniPipelineOutput)
        return made

    return call


def asked(seed: int, task: str = "v2v") -> Conversation:
    """A request: sources and text, no target."""
    whole = make_conversation(seed, task)
    return replace(whole, messages=[m for m in whole.messages if not m.is_target])


def test_without_a_planner_it_is_the_renderer(
    pipe: BerniniPipeline, make: Callable[..., BerniniPipelineOutput], wan: Path, shards: Path, tmp_path: Path
) -> None:
    sampling = {"steps": 2, "frames": 5, "height": 32, "width": 32}
    text = {"encoder": str(wan), "rows": 512}
    module = build(make_config(wan, shards, tmp_path, expert="both", sampling=sampling, text=text), tmp_path).eval()
    for task in ("v2v", "t2v", "rv2v"):
        conversation = asked(0, task)
        (made,) = make(conversation, plan=False, seeds=[5]).videos
        assert torch.equal(made, module.sample([conversation], [5])[0].pixels)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_full_model(make: Callable[..., BerniniPipelineOutput], mode: str) -> None:
    first, again, other = (make(asked(0, "rv2v"), mode=mode, seed=seed) for seed in (1, 1, 2))
    assert first.videos[0].shape == (3, 5, 32, 32) and first.videos[0].dtype == torch.uint8
    assert torch.equal(first.videos[0], again.videos[0])
    assert not torch.equal(first.videos[0], other.videos[0])


def test_outputs_do_not_depend_on_their_company(make: Callable[..., BerniniPipelineOutput]) -> None:
    conversations = [asked(0, "v2v"), asked(1, "rv2v"), asked(2, "t2i"), asked(3, "v2v")]
    together = make(conversations, seeds=[3, 4, 5, 6])
    assert together.plans is not None
    for conversation, seed, video, plan in zip(
        conversations, (3, 4, 5, 6), together.videos, together.plans, strict=True
    ):
        alone = make([conversation], seeds=[seed])
        assert (alone.videos[0].int() - video.int()).abs().max() <= 1
        torch.testing.assert_close(alone.plans[0].embeds, plan.embeds, rtol=1e-4, atol=1e-4)


def test_parts_of_a_request_in_every_form(make: Callable[..., BerniniPipelineOutput], tmp_path: Path) -> None:
    clip, image = make_clip(0, 6, 40, 56).pixels, make_clip(1, 1, 40, 40).pixels
    assert clip is not None and image is not None
    picture = Image.fromarray(image[:, 0].permute(1, 2, 0).numpy())
    picture.save(tmp_path / "image.png")
    made = [
        make(task="rv2v", prompt="make it red", video=clip, images=form, frames=9).videos[0]
        for form in (image, picture, [tmp_path / "image.png"], str(tmp_path / "image.png"))
    ]
    assert made[0].shape == (3, 6, 16, 32)  # as long as the source, which is padded to 9 frames
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert make(task="t2i", prompt="red", height=16, width=48).videos[0].shape == (3, 1, 16, 48)
    assert make(task="i2i", prompt="red", images=image).videos[0].shape == (3, 1, 32, 32)
    assert make(task="t2v", prompt="red", height=16, width=48).videos[0].shape == (3, 5, 16, 48)


def test_output_types(make: Callable[..., BerniniPipelineOutput], pipe: BerniniPipeline) -> None:
    tensor, array, frames = (
        make(task="t2v", prompt="red", plan=False, output_type=kind).videos[0] for kind in ("pt", "np", "pil")
    )
    assert array.shape == (5, 32, 32, 3) and 0 <= array.min() <= array.max() <= 1
    assert torch.equal(torch.from_numpy(array * 255).round().to(torch.uint8).permute(3, 0, 1, 2), tensor)
    assert [frame.size for frame in frames] == [(32, 32)] * 5
    assert frames[0].getpixel((3, 7)) == tuple(tensor[:, 0, 7, 3].tolist())
    (videos,) = pipe(task="t2v", prompt="red", plan=False, return_dict=False, **SMALL)
    assert torch.equal(videos[0], tensor)
    with pytest.raises(ConfigError, match="unknown output_type"):
        make(task="t2v", plan=False, output_type="gif")


def test_callbacks_see_change_and_stop(make: Callable[..., BerniniPipelineOutput]) -> None:
    seen: list[tuple[int, int]] = []

    def look(pipe: BerniniPipeline, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        assert [x.shape for x in given["latents"]] == [(4, 2, 4, 4)]
        seen.append((step, timestep))
        return {}

    def blank(pipe: BerniniPipeline, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": [torch.zeros_like(x) for x in given["latents"]]}

    def stop(pipe: BerniniPipeline, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep))
        pipe._interrupt = True
        return {}

    plain = make(task="t2v", prompt="red", steps=3).videos[0]
    looked = make(task="t2v", prompt="red", steps=3, callback_on_step_end=look).videos[0]
    assert torch.equal(plain, looked)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1] > 0
    first, second = (make(task="t2v", prompt="red", seed=s, callback_on_step_end=blank).videos[0] for s in (1, 2))
    assert torch.equal(first, second)  # whatever the noise was
    seen.clear()
    stopped = make(task="t2v", prompt="red", steps=3, callback_on_step_end=stop).videos[0]
    assert [step for step, _ in seen] == [0] and not torch.equal(stopped, plain)
    with pytest.raises(ConfigError, match="callbacks are given no 'prompt_embeds'"):
        make(task="t2v", callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_progress_counts_the_steps_of_all_settings(pipe: BerniniPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(desc="making")
    pipe([asked(0, "v2v"), asked(1, "t2i")], plan=False, **SMALL)
    pipe.set_progress_bar_config(disable=True)
    assert "making" in (told := capfd.readouterr().err) and "4/4" in told  # two tasks, two guidance modes


def test_what_is_rewritten_is_planned_and_rendered(make: Callable[..., BerniniPipelineOutput]) -> None:
    def rewrite(conversations: list[Conversation]) -> list[Conversation]:
        texts = [[replace(m, text="make it blue") if m.text else m for m in c.messages] for c in conversations]
        return [replace(c, messages=own) for c, own in zip(conversations, texts, strict=True)]

    rewritten = make(asked(0), rewrite=rewrite)
    direct = make(rewrite([asked(0)]))
    assert [c.prompt for c in rewritten.conversations] == ["make it blue"]
    assert torch.equal(rewritten.videos[0], direct.videos[0])
    assert not torch.equal(rewritten.videos[0], make(asked(0)).videos[0])


def test_plans_are_used_again(make: Callable[..., BerniniPipelineOutput]) -> None:
    first = make(asked(0))
    assert first.plans is not None
    again = make(asked(0), plans=first.plans)
    assert torch.equal(first.videos[0], again.videos[0])
    plan = replace(first.plans[0], wtxt_wvit=-first.plans[0].wtxt_wvit)
    assert not torch.equal(first.videos[0], make(asked(0), plans=[plan]).videos[0])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"plans": ["itself"], "plan": False}, "a plan without a planner"),
        ({"plans": ["itself", "itself"]}, "2 plans for 1 conversations"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 1 conversations"),
        ({"task": "v2v"}, "give either conversations, or a task"),
        ({"prompt": "make it red"}, "give either conversations, or a task"),
        ({"mode": "v2v"}, "has no use for a plan"),
        ({"mode": "vae_txt_vit", "plan": False}, "needs a plan"),
        ({"mode": "vae"}, "unknown guidance mode"),
        ({"preset": "r"}, "is for models without a planner"),
        ({"preset": "v1", "plan": False}, "is for models with a planner"),
        ({"preset": "v3"}, "unknown preset"),
        ({"num_inference_steps": 4}, "unknown setting"),
        ({"steps": 2.5}, "steps has the value 2.5"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make: Callable[..., BerniniPipelineOutput], arguments: dict[str, Any], what: str
) -> None:
    if "plans" in arguments:
        plan = make(asked(0)).plans[0]
        arguments = {**arguments, "plans": [plan] * len(arguments["plans"])}
    with pytest.raises(ConfigError, match=what):
        make(asked(0), **arguments)


def test_plan_for_another_target_is_refused(make: Callable[..., BerniniPipelineOutput]) -> None:
    plans = make(task="t2v", prompt="red").plans
    with pytest.raises(DataError, match="for another target: its grid is 1 x 2 x 2, here 1 x 1 x 3 is wanted"):
        make(task="t2v", prompt="red", plans=plans, height=16, width=48)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"task": "v2v"}, "takes 1 source video"),
        ({"task": "v2v", "video": torch.zeros(3, 5, 32, 32)}, "pixels are .* uint8"),
        ({"task": "r2v", "images": torch.zeros(3, 2, 32, 32, dtype=torch.uint8)}, "an image of"),
        ({"task": "v2v", "video": "nowhere.mp4"}, "the clip does not exist"),
    ],
)
def test_bad_media_are_refused(
    make: Callable[..., BerniniPipelineOutput], arguments: dict[str, Any], what: str
) -> None:
    with pytest.raises(DataError, match=what):
        make(prompt="red", **arguments)


def test_saved_and_read_again_it_makes_the_same(
    pipe: BerniniPipeline, make: Callable[..., BerniniPipelineOutput], tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = BerniniPipeline.from_pretrained(tmp_path / "saved")
    assert again.planner is not None and pipe.planner is not None
    assert again.planner.template.vision == pipe.planner.template.vision
    made = again(asked(0, "rv2v"), **SMALL, **PLANNING)
    assert torch.equal(made.videos[0], make(asked(0, "rv2v")).videos[0])
    without = BerniniPipeline.from_pretrained(tmp_path / "saved", planner=None)
    assert without.planner is None
    made = without(asked(0), **SMALL)
    assert torch.equal(made.videos[0], make(asked(0), plan=False).videos[0])
    theirs = WanPipeline.from_pretrained(tmp_path / "saved")
    state = theirs.transformer_2.state_dict()
    torch.testing.assert_close(state, again.transformer_2.state_dict(), rtol=0, atol=0)
    assert type(theirs.transformer).__name__ == "WanTransformer3DModel"


def test_settings_of_a_folder_travel_with_it(wan: Path, tmp_path: Path) -> None:
    shutil.copytree(wan, tmp_path / "model")
    (tmp_path / "model" / "generate.json").write_text('{"without_plan": {"steps": 3, "height": 16, "width": 16}}')
    BerniniPipeline.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "saved")
    made = BerniniPipeline.from_pretrained(tmp_path / "saved")(task="t2i", prompt="red", width=32)
    assert made.videos[0].shape == (3, 1, 16, 32)
    assert (made.settings[0].steps, made.settings[0].mode) == (3, "t2v_apg")


def test_dtype_and_device_move_all_parts(full: Path) -> None:
    pipeline = BerniniPipeline.from_pretrained(full, torch.bfloat16)
    parts = (pipeline.transformer, pipeline.transformer_2, pipeline.text_encoder, pipeline.planner)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(asked(0), **SMALL, **PLANNING).videos[0].shape == (3, 5, 32, 32)
    assert {part.device.type for part in (*parts, pipeline.vae)} == {"cpu"}
    pipeline.to("meta")
    assert {part.device.type for part in (*parts, pipeline.vae)} == {"meta"}


def test_offloaded_it_makes_the_same(full: Path, make: Callable[..., BerniniPipelineOutput]) -> None:
    pipeline = BerniniPipeline.from_pretrained(full)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_model_cpu_offload(device="cpu")  # the hooks run, though there is nothing to move to
    parts = (pipeline.planner, pipeline.text_encoder, pipeline.transformer, pipeline.transformer_2, pipeline.vae)
    called = []
    for part in parts:
        hook = part._hf_hook
        before = hook.pre_forward
        hook.pre_forward = lambda module, *args, _before=before, **kwargs: (
            called.append(type(module).__name__),
            _before(module, *args, **kwargs),
        )[1]
    made = pipeline(asked(0), **SMALL, **PLANNING)
    assert torch.equal(made.videos[0], make(asked(0)).videos[0])
    assert set(called) == {type(part).__name__ for part in parts}
    assert all(hasattr(part, "_hf_hook") for part in parts)


def test_parts_that_do_not_fit_are_refused(wan: Path, full: Path, tmp_path: Path) -> None:
    planner = ConversationPlanner.from_pretrained(write_planner_folder(tmp_path / "wide"))
    with pytest.raises(CheckpointError, match="contexts are 20 wide, the renderer's text features 12"):
        BerniniPipeline.from_pretrained(wan, planner=planner)
    with pytest.raises(CheckpointError, match="no such folder"):
        BerniniPipeline.from_pretrained(tmp_path / "nowhere")
    shutil.copytree(full, tmp_path / "damaged")
    (tmp_path / "damaged" / "mllm" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer of a planner here"):
        BerniniPipeline.from_pretrained(tmp_path / "damaged")


def test_a_plan_has_the_grid_of_its_target(make: Callable[..., BerniniPipelineOutput]) -> None:
    (plan,) = make(task="t2v", prompt="red", height=16, width=48).plans or [None]
    assert isinstance(plan, Plan) and plan.grid is not None
    assert len(plan.embeds) == torch.Size(plan.grid).numel()
    assert set(asdict(plan)) == {"embeds", "wtxt_wvit", "wtxt_wovit", "wotxt_wvit", "wotxt_wovit", "grid"}
