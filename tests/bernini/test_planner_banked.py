"""Planner training from a bank: the losses of the plain module, on samples that were written once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import callback, fit, logged_rows
from planners import make_planner, make_planner_config
from torch import Tensor

from bernini.bank import save_tensors
from bernini.cli import main
from bernini.conversation import Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import ConfigError, DataError
from bernini.planner.bank import COINS, NAMES, PlanStack, join, statistics, to_patches, write
from bernini.planner.banked import SUMS, BankedPlannerModule, PlanPass, draw_ratios
from bernini.planner.flow_head import Draws
from bernini.planner.learning import LossConfig, hide, weigh
from bernini.planner.masking import MASK_RATIOS, TARGET
from bernini.planner.module import PlannerModule
from bernini.planner.template import IGNORED, PlannerSample, pack
from bernini.planner.vision import prepare
from datamodules.toyworld import make_item, make_question

SIZE = {"frames": 9, "height": 32, "width": 32}  # clips of two pairs of frames
SAMPLES = (
    make_item("v2v", 0, **SIZE),
    make_item("ads2v", 1, **SIZE),
    make_question("und_vid", 2, **SIZE),
    make_item("r2v", 3, references=3, **SIZE),
    make_item("t2i", 4, **SIZE),
    make_item("rv2v", 5, **SIZE),
    make_question("und_img", 6, **SIZE),
)
CODES = torch.tensor([1, 4, 0, 2, 1, 6, 3])  # what each of them loses
RATES = (0.3, 0.2, 0.1)


def bank_of(module: PlannerModule, samples: tuple[Conversation, ...] = SAMPLES) -> PlanStack:
    return join([write(sample, module.template) for sample in samples])


def pass_of(module: PlannerModule, stack: PlanStack, size: int = len(SAMPLES)) -> PlanPass:
    vision, sources = module.template.vision, module.sources
    return PlanPass(module.planner, stack, size, draw_ratios(module.loss, 0), RATES, vision, sources)


def dropped(sample: Conversation, code: int) -> Conversation:
    """The sample without its text (1), its images (2), its clips (4)."""
    config = DropoutConfig(**{coin: float(code >> place & 1) for place, coin in enumerate(COINS)})
    return config.apply(sample, torch.Generator()) if sample.targets else sample


def in_slots(written: list[PlannerSample], masked: list[Tensor], draws: Draws, slots: int) -> tuple[Tensor, Draws]:
    """Masks and noises of a pack's hidden tokens, laid out as a bank's."""
    repeats, width = len(draws.noise), draws.noise.shape[-1]
    hidden = torch.zeros(len(written), slots, dtype=torch.bool)
    for row, sample, own in zip(hidden, written, masked, strict=True):
        mine = own[sample.token_type == TARGET]
        row[: len(mine)] = mine
    index = torch.zeros(repeats, hidden.numel(), dtype=torch.long)
    noise = torch.zeros(repeats, hidden.numel(), width)
    index[:, hidden.flatten()], noise[:, hidden.flatten()] = draws.index, draws.noise
    return hidden, Draws(index, noise)


def gradients(module: PlannerModule, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("sources", ["causal", "bidirectional"])
@pytest.mark.parametrize("train_vit", [False, True], ids=["frozen tower", "trained tower"])
def test_a_batch_has_the_loss_of_its_samples_packed(train_vit: bool, sources: Any) -> None:
    module = make_planner(train_vit=train_vit, sources=sources, loss=LossConfig(ntp=0.3, visual=2.0))
    stack = bank_of(module)
    kept = [dropped(sample, code) for sample, code in zip(SAMPLES, CODES.tolist(), strict=True)]
    written = [module.template(sample) for sample in kept]
    generator = torch.Generator().manual_seed(0)
    masked = [hide(s, w, module.loss.ratios, generator) for s, w in zip(kept, written, strict=True)]
    counts = [int(own.sum()) for own in masked]
    draws = module.planner.vit_decoder.draw(sum(counts), generator)
    output = module.planner(pack(written), masked=torch.cat(masked), draws=draws, sources=sources)
    labelled = [int((w.labels != IGNORED).sum()) for w in written]
    table = module.empty_table()
    ntp_mean, visual_mean = weigh(output, kept, counts, labelled, table)
    loss = 0.3 * ntp_mean + 2.0 * visual_mean

    rows = torch.arange(len(SAMPLES))
    hidden, drawn = in_slots(written, masked, draws, stack.targets.shape[1])
    sums = pass_of(module, stack).measure(rows, stack.variants[rows, CODES].long(), hidden, drawn)
    visual, shown, ntp, right, labels, answers, asked = sums.sum(0)
    torch.testing.assert_close(0.3 * ntp / labels + 2.0 * visual / shown, loss, rtol=1e-5, atol=1e-6)
    assert sums[:, SUMS.index("hidden")].tolist() == counts
    assert sums[:, SUMS.index("labels")].tolist() == labelled
    means = table.means()
    for name, found in (("accuracy", right / labels), ("answers", answers / asked), ("visual", visual / shown)):
        torch.testing.assert_close(found, means[name], rtol=1e-5, atol=1e-6)
    plain, banked = gradients(module, loss), gradients(module, 0.3 * ntp / labels + 2.0 * visual / shown)
    assert any("visual.blocks" in name for name in plain) == train_vit
    torch.testing.assert_close(banked, plain, rtol=1e-4, atol=1e-6)


def test_every_variant_is_what_the_template_writes() -> None:
    module = make_planner()
    stack = bank_of(module)
    for number, sample in enumerate(SAMPLES):
        for code in range(2 ** len(COINS)):
            row, expected = int(stack.variants[number, code]), module.template(dropped(sample, code))
            n = len(expected)
            for name in ("ids", "token_type", "segment_id"):
                assert torch.equal(getattr(stack, name)[row, :n].long(), getattr(expected, name)), name
            assert torch.equal(stack.position_ids[row, :n].long().T, expected.position_ids)
            assert not stack.token_type[row, n:].any()
            where = torch.nonzero(expected.token_type == TARGET).squeeze(1)
            assert torch.equal(stack.targets[row, : len(where)].long(), where)
            assert int(stack.count[number]) == len(where)
    assert len(stack.ids) == 4 + 4 + 1 + 4 + 2 + 8 + 1  # nothing twice
    assert [NAMES[number] for number in stack.task] == [sample.task for sample in SAMPLES]


@pytest.mark.parametrize("clip", [False, True])
def test_frames_are_kept_to_the_bit(clip: bool) -> None:
    module = make_planner()
    pixels = torch.randint(256, (3, 9 if clip else 1, 32, 32), generator=torch.Generator().manual_seed(0))
    sample = make_item("i2i", 0, **SIZE)
    sample.sources[0].media.pixels = pixels.to(torch.uint8)
    if clip:
        sample.sources[0].type, sample.sources[0].media.fps = "video", 16.0
    vision = module.template.vision
    expected = prepare(pixels.to(torch.uint8), clip, 16.0, vision).patches
    frames = write(sample, module.template).frames[: 2 if clip else 1]
    assert torch.equal(to_patches(frames, statistics(vision, frames.device)).flatten(0, 1), expected)


def test_what_is_hidden_and_dropped_has_the_asked_rates() -> None:
    module = make_planner()
    item = make_item("rv2v", 0, frames=9, height=64, width=64)  # 32 tokens
    stack = bank_of(module, (item, make_question("und_vid", 0, frames=9, height=64, width=64)))
    torch.manual_seed(0)
    variant, masked, draws = pass_of(module, stack, 4000).draw(torch.arange(2).repeat(2000))
    assert not masked[1::2].any() and masked[::2].any(1).all()
    assert masked[::2].float().mean().item() == pytest.approx(MASK_RATIOS["rv2v"].mean, abs=0.03)  # rounded up
    assert masked[::2].float().mean(0).std() < 0.02  # anywhere
    assert draws.noise.std().item() == pytest.approx(1, abs=0.01)
    codes = (variant[::2, None] == stack.variants[0]).int().argmax(1)
    for place, rate in enumerate(RATES):
        assert (codes >> place & 1).float().mean().item() == pytest.approx(rate, abs=0.03)
    uniform = draw_ratios(LossConfig(ratios="uniform"), 0)
    assert uniform.mean(1).tolist() == [pytest.approx(0.5, abs=0.02)] * len(NAMES)


def test_frames_of_several_sizes_and_checkpointed_gradients_are_refused() -> None:
    module = make_planner()
    large = make_item("i2i", 0, frames=9, height=64, width=64)
    with pytest.raises(DataError, match="several frame sizes"):
        bank_of(module, (SAMPLES[0], large))
    large.sources[0].media = SAMPLES[4].targets[0].media
    with pytest.raises(DataError, match="2 sizes in one sample"):
        bank_of(module, (large,))
    with pytest.raises(ConfigError, match="nothing can be recomputed here"):
        BankedPlannerModule(tokenizer=str(module.template.tokenizer.name_or_path), init_from="anywhere")


def test_without_a_visual_loss_a_bank_of_questions_teaches_the_language_model_and_the_tower() -> None:
    module = make_planner(train_vit=True, loss=LossConfig(ntp=1.0, visual=0.0))
    stack = bank_of(module, (SAMPLES[2], SAMPLES[6]))
    frozen = ("planner.vit_decoder.", "planner.connector.", "planner.mask_tokens")
    assert all(p.requires_grad != name.startswith(frozen) for name, p in module.named_parameters())
    sums = pass_of(module, stack, 2)(torch.arange(2))
    assert gradients(module, sums[:, SUMS.index("ntp")].sum()) and not sums[:, SUMS.index("hidden")].any()


def banked_config(run: Path, steps: int, **model: Any) -> dict[str, Any]:
    config = make_planner_config(run, steps, recompute="none", **model)
    config["model"]["class_path"] = "bernini.planner.banked.BankedPlannerModule"
    config["data"]["class_path"] = "datamodules.toyworld.plan_bank.ToyPlanBankDataModule"
    config["data"]["init_args"] |= {"length": 48, "val_length": 6, "frames": 9}
    config["trainer"]["callbacks"].append(callback("callbacks.SavePlanner", folder=str(run / "out")))
    return config


@pytest.mark.parametrize("train_vit", [False, True], ids=["frozen tower", "trained tower"])
def test_a_resumed_fit_ends_where_an_unbroken_one_does(tmp_path: Path, train_vit: bool) -> None:
    def run(name: str, steps: int, *more: str) -> dict[str, Tensor]:
        fit(banked_config(tmp_path / name, steps, train_vit=train_vit), *more)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    whole = run("whole", 8)
    start = run("broken", 4)
    resumed = run("broken", 8, "--ckpt_path", "auto")
    assert all(torch.equal(whole["state_dict"][name], x) for name, x in resumed["state_dict"].items())
    changed = {name for name, x in whole["state_dict"].items() if not torch.equal(x, start["state_dict"][name])}
    assert any(".visual." in name for name in changed) == train_vit
    assert "planner.mask_tokens" in changed and not any(".proj_gen." in name for name in changed)

    average, written = whole["callbacks"]["EMA"]["average"], make_planner(init_from=str(tmp_path / "whole" / "out"))
    assert all(torch.equal(written.get_parameter(name), x) for name, x in average.items())
    rows = logged_rows(tmp_path / "whole")
    names = {"loss", "visual", "visual_t2i", "visual_v2v", "ntp", "accuracy", "answers"}
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    for row in rows:
        assert {"step", "train/loss", "train/visual"} <= row.keys() <= {"step", *(f"train/{name}" for name in names)}
        assert row["train/loss"] == pytest.approx(row["train/visual"] + 0.2 * row.get("train/ntp", 0))
    assert logged_rows(tmp_path / "broken")[-1] == pytest.approx(rows[-1])
    assert [row["step"] for row in logged_rows(tmp_path / "whole", "val")] == [3, 7]


def test_kept_samples_serve_a_second_fit_unless_they_are_of_another_world(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *more: str) -> dict[str, Tensor]:
        fit(banked_config(tmp_path / name, 4), "--data.file", str(tmp_path / "bank.safetensors"), *more)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]

    first, second = run("first"), run("second")
    assert all(torch.equal(first[name], x) for name, x in second.items())
    given = str(tmp_path / "second" / "given.yaml")
    assert main(["fit", "-c", given, "--data.file", str(tmp_path / "bank.safetensors"), "--data.length", "54"]) == 77
    assert "holds other samples" in capsys.readouterr().err


def test_kept_samples_of_an_older_version_are_refused(tmp_path: Path) -> None:
    tensors, file = bank_of(make_planner()).tensors(), tmp_path / "bank.safetensors"
    del tensors["length"]
    save_tensors(file, tensors, "this world", grid="4 4")
    with pytest.raises(DataError, match=r"older version\n.*bank.safetensors\n.*no length in it"):
        PlanStack.load(file, torch.device("cpu"), "this world")


def test_a_bank_holds_both_halves_of_samples_with_reasoning(tmp_path: Path) -> None:
    config = banked_config(tmp_path, 4)
    config["data"]["init_args"]["tasks"] = {"v2v/cot": 1}
    fit(config)
    for stage in ("train", "val"):
        names = {name for row in logged_rows(tmp_path, stage) for name in row}
        assert {f"{stage}/{name}" for name in ("visual_v2v", "ntp", "accuracy", "thoughts")} <= names
        assert f"{stage}/answers" not in names
