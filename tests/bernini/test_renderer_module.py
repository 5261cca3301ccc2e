import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from factories import (
    Recorder,
    build,
    callback,
    fit,
    keep_checkpoints,
    log_to_csv,
    logged_rows,
    make_clip,
    make_config,
    make_conversation,
    make_shards,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from bernini.conversation import Batch, Conversation, Media, Message
from bernini.errors import CheckpointError, DataError
from bernini.flow.noise import NoiseConfig
from bernini.media import read_video
from bernini.tasks import get_task
from datamodules.shards import write_shards

NO_DROPOUT = {"text": 0.0, "image": 0.0, "video": 0.0}


def seen_by(model: torch.nn.Module) -> list[Any]:
    """The packs that a transformer is given from now on."""
    packs: list[Any] = []
    model.register_forward_pre_hook(lambda _, args: packs.append(args[0]))
    return packs


def test_loss_falls_when_one_clip_is_trained_on(wan: Path, tmp_path: Path) -> None:
    one = make_shards(tmp_path / "one", 1, ("t2v",))
    config = make_config(wan, one, tmp_path / "run", dropout=NO_DROPOUT)
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.01
    config["trainer"] |= {"max_steps": 60, "val_check_interval": 60, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    before, after = fit(config)[0]["metrics"]
    assert after["val/loss"] < 0.8 * before["val/loss"]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.3}], ids=["full", "lora"])
def test_run_resumed_at_every_step_is_the_unbroken_run(
    wan: Path, shards: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    def config(name: str) -> dict[str, Any]:
        dropout = {"text": 0.3, "image": 0.3, "video": 0.3}
        config = make_config(wan, shards, tmp_path / name, lora=lora, dropout=dropout)
        config["model"]["init_args"]["lr_scheduler"] = {
            "class_path": "torch.optim.lr_scheduler.LinearLR",
            "init_args": {"start_factor": 0.1, "total_iters": 4},
        }
        config["trainer"] |= {"max_steps": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.9)]
        keep_checkpoints(config, tmp_path / name)
        return config

    whole = fit(config("whole"))[0]["losses"]  # ten batches of eight samples: the second epoch has begun
    broken: list[float] = []
    for step in range(1, 6):
        broken += fit(config("broken"), "--ckpt_path", "auto", "--trainer.max_steps", str(step))[0]["losses"]
    assert len(whole) == 10
    assert broken == whole
    first, second = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)
    torch.testing.assert_close(second["callbacks"]["EMA"], first["callbacks"]["EMA"], rtol=0, atol=0)


def test_checkpoint_holds_the_renderer_and_no_frozen_helper(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    keep_checkpoints(config, tmp_path)
    fit(config)
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert names and all(name.startswith("renderer.transformer.") for name in names)


def test_lora_trains_and_keeps_its_adapters_only(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path, lora={"rank": 2})
    keep_checkpoints(config, tmp_path)
    module = build(config, tmp_path)
    before = {n: p.clone() for n, p in module.named_parameters()}
    fit(config)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in stored)
    assert any(not torch.equal(stored[name], before[name]) for name in stored)


def test_lora_refuses_the_checkpoint_of_other_layers(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path, lora={"rank": 2, "targets": ["to_q"]})
    module = build(config, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the LoRA"):
        module.on_load_checkpoint({"state_dict": {"renderer.transformer.blocks.0.attn1.to_k.lora_A.default.weight": 0}})


def test_batch_of_two_is_the_mean_of_the_two_alone(wan: Path, shards: Path, tmp_path: Path) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    samples, keys = [make_conversation(0, "rv2v"), make_conversation(1, "t2i")], [("a", 1), ("a", 2)]

    def grads(loss: Tensor) -> list[Tensor]:
        return torch.autograd.grad(loss, module.trainable())

    together, _ = module.losses(samples, keys)
    alone = [module.losses([s], [k])[0] for s, k in zip(samples, keys, strict=True)]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads(together), grads((alone[0] + alone[1]) / 2), rtol=1e-3, atol=1e-6)


def test_targets_weigh_alike_whatever_their_size(wan: Path, shards: Path, tmp_path: Path) -> None:
    module = build(make_config(wan, shards, tmp_path, dropout=NO_DROPOUT), tmp_path)
    clip, image = make_clip(0), make_clip(1, 1)
    sample = Conversation("t2v", [Message("video_gen", media=clip), Message("image_gen", media=image)], key="two")
    far_off = torch.cat([torch.zeros(8, 1), torch.full((4, 1), 1000.0)])  # the clip has 8 tokens, the image 4
    module.renderer.transformer.register_forward_hook(lambda _, __, output: output * 0 + far_off)
    loss, table = module.losses([sample], [("a",)])
    assert loss.item() == pytest.approx(1000**2 / 2, rel=0.01)
    assert table.counts[0] == 2
    assert table.means()["loss"] == pytest.approx(loss.item())


def test_losses_are_logged_by_task_and_noise_level(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    config["data"]["init_args"] |= {"batch_size": 8, "max_samples": 8}
    config["trainer"] |= {"max_steps": 1, "val_check_interval": 1, "limit_val_batches": 8}
    log_to_csv(config, tmp_path)
    fit(config)
    names = {"loss", "loss_v2v", "loss_t2v"}
    for stage in ("train", "val"):
        (row,) = logged_rows(tmp_path, stage)
        buckets = {name for name in row if "sigma" in name}
        assert set(row) - buckets == {"step", *(f"{stage}/{name}" for name in names)}
        assert buckets and buckets <= {f"{stage}/loss_sigma_{b}" for b in ("0.00", "0.25", "0.50", "0.75")}


def test_loggers_get_means_since_the_last_time_of_the_tasks_that_came_up(
    wan: Path, shards: Path, tmp_path: Path
) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    tasks = ["v2v", "t2v", "t2v", "v2v", "v2v", "v2v", "v2v", "v2v", "t2v", "v2v"]  # four batches a row, two a step
    batches = [Batch([make_conversation(i, task)]) for i, task in enumerate(tasks)]
    recorder = Recorder(str(tmp_path / "record"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        logger=CSVLogger(tmp_path, name="logs"),
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    rows = logged_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    for row, start in zip(rows, (0, 4), strict=True):
        found = list(zip(tasks, recorder.losses, strict=True))[start : start + 4]
        own = {f"train/loss_{task}": [loss for t, loss in found if t == task] for task in dict(found)}
        expected = {"train/loss": [loss for _, loss in found], **own}
        without_noise_levels = {k: v for k, v in row.items() if "sigma" not in k and k != "step"}
        assert without_noise_levels == {name: pytest.approx(sum(v) / len(v)) for name, v in expected.items()}
    assert "train/loss_t2v" in rows[0] and "train/loss_t2v" not in rows[1]
    assert trainer.progress_bar_metrics["train/loss"] == pytest.approx(recorder.losses[-1])


@pytest.mark.parametrize("noise", [NoiseConfig(shift=1.0), NoiseConfig(density="uniform"), NoiseConfig(mode_scale=0.5)])
def test_validation_does_not_depend_on_the_noise_of_training(
    wan: Path, shards: Path, tmp_path: Path, noise: NoiseConfig
) -> None:
    module = build(make_config(wan, shards, tmp_path, dropout=NO_DROPOUT), tmp_path)
    samples, keys = [make_conversation(i, "v2v") for i in range(4)], [("a", i) for i in range(4)]
    before = [module.losses(samples, keys, train=train)[0].item() for train in (False, True)]
    module.noise = noise
    after = [module.losses(samples, keys, train=train)[0].item() for train in (False, True)]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("expert", ["high", "low"])
def test_validation_keeps_to_the_boundary(wan: Path, shards: Path, tmp_path: Path, expert: str) -> None:
    noise = {"boundary": 0.5, "shift": 3.0}
    module = build(make_config(wan, shards, tmp_path, expert=expert, noise=noise), tmp_path)
    (model,) = module.renderer.models.values()
    packs = seen_by(model)
    module.losses([make_conversation(i, "t2v") for i in range(16)], [("a", i) for i in range(16)], train=False)
    timesteps = packs[0].timesteps
    assert (timesteps >= 500).all() if expert == "high" else (timesteps < 500).all()
    assert ((timesteps >= 500) & (timesteps < 875)).any() or expert == "low"


def test_frozen_helpers_follow_the_module_and_stay_when_it_does(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "_apply", lambda self, *_, **__: moved.append(self) or self)
    helpers = {module.codec, module.features}
    assert not moved
    module._device = torch.device("meta")
    assert {module.codec, module.features} == helpers
    assert len(moved) == 2 and set(moved) == helpers


@pytest.mark.parametrize("expert", ["high", "low", "both", "single"])
def test_experts_see_their_noise_levels_only(wan: Path, shards: Path, tmp_path: Path, expert: str) -> None:
    module = build(make_config(wan, shards, tmp_path, expert=expert), tmp_path)
    packs = {name: seen_by(model) for name, model in module.renderer.models.items()}
    for step in range(12):
        module.losses([make_conversation(step, "t2v")], [(step,)])
    seen = {name: torch.cat([p.timesteps for p in found]) for name, found in packs.items()}
    if expert == "single":
        assert seen["transformer"].min() < 875 < seen["transformer"].max()
    else:
        both = {"transformer": expert != "low", "transformer_2": expert != "high"}
        assert seen.keys() == {name for name, there in both.items() if there}
        assert all(t >= 875 for t in seen.get("transformer", []))
        assert all(t < 875 for t in seen.get("transformer_2", []))


@pytest.mark.parametrize(
    ("rates", "ids"),
    [
        (NO_DROPOUT, [1, 2, 0]),
        ({**NO_DROPOUT, "video": 1.0}, [1, 0]),
        ({**NO_DROPOUT, "image": 1.0}, [1, 0]),
        ({"text": 1.0, "image": 1.0, "video": 1.0}, [0]),
    ],
)
def test_dropout_numbers_the_rest_anew_and_keeps_the_sentence(
    wan: Path, shards: Path, tmp_path: Path, rates: dict[str, float], ids: list[int]
) -> None:
    module = build(make_config(wan, shards, tmp_path, dropout=rates), tmp_path)
    packs = seen_by(module.renderer.transformer)
    sample = make_conversation(0, "rv2v")
    module.losses([sample], [("a",)])
    assert packs[0].segments[:, 4].tolist() == ids
    text = get_task("rv2v").sentence + ("" if rates["text"] else "make it red")
    (features,) = module.features([text], module.device)
    torch.testing.assert_close(packs[0].context[: len(features)], features)


def test_validation_is_the_same_each_time_and_counts_samples_once(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    config["model"]["init_args"]["optimizer"]["init_args"] |= {"lr": 0.0, "weight_decay": 0.0}
    config["trainer"] |= {"max_steps": 4, "limit_val_batches": 8}
    config["data"]["init_args"]["max_samples"] = 5
    first, second = fit(config)[0]["metrics"]
    assert first == second
    module = build(config, tmp_path)
    samples = [make_conversation(i, ("v2v", "t2v")[i % 2]) for i in range(5)]
    alone = [module.losses([sample], [("validate", sample.key)], False) for sample in samples]
    mean = sum(loss.item() for loss, _ in alone) / 5
    assert first["val/loss"] == pytest.approx(mean, rel=0.02)  # the shards' clips went through lossy H.264


def test_testing_is_validation_under_another_name(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    config["trainer"] |= {"limit_val_batches": 2}
    (validated,) = fit(config, verb="validate")[0]["metrics"]
    (tested,) = fit(config, f"--data.test={shards}", verb="test")[0]["metrics"]
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == validated
    assert "test/loss" in tested


@pytest.mark.parametrize("expert", ["single", "low", "both"])
def test_prediction_is_a_clip_of_the_sources_size_rate_and_length(wan: Path, tmp_path: Path, expert: str) -> None:
    clip = make_clip(3)
    clip.source = {"height": 50, "width": 38, "frames": 4, "fps": 12.0, "sampled": 4}  # stored as 5 frames of 32 x 32
    sample = Conversation("v2v", [Message("video", media=clip), Message("text", text="make it red")], key="edit")
    if expert == "low":
        sample.messages.append(Message("video_gen", media=make_clip(4)))
    write_shards([sample], tmp_path / "shards", lossless=True)
    config = make_config(wan, tmp_path / "shards", tmp_path, expert=expert)
    config["trainer"]["callbacks"] = [callback("callbacks.PredictionWriter", folder=str(tmp_path / "out"))]
    fit(config, verb="predict")
    made = read_video(tmp_path / "out" / "edit.mp4")
    assert made.source == {"height": 50, "width": 38, "frames": 4, "fps": 12.0, "sampled": 4}
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert row == {"key": "edit", "task": "v2v", "prompt": "make it red", "file": "edit.mp4"}


@pytest.mark.parametrize("expert", ["single", "low"])
def test_sampled_clips_are_those_of_their_seeds_whatever_is_in_the_batch(
    wan: Path, shards: Path, tmp_path: Path, expert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(make_config(wan, shards, tmp_path, expert=expert), tmp_path)
    module.sampling.steps = 4
    samples = [make_conversation(i, task) for i, task in enumerate(["v2v", "t2i", "v2v", "rv2v", "v2v"])]
    decoded = []
    monkeypatch.setattr(
        module.codec, "decode", lambda x: decoded.append(len(x)) or type(module.codec).decode(module.codec, x)
    )
    together = module.sample(samples, [5, 6, 7, 8, 5])
    assert decoded == [4, 1]  # the clips of one size, then the image
    for prediction, sample, seed in zip(together, samples, [5, 6, 7, 8, 5], strict=True):
        (alone,) = module.sample([sample], [seed])
        assert prediction.conversation is sample and prediction.pixels.dtype == torch.uint8
        assert prediction.pixels.shape == sample.targets[0].media.pixels.shape
        assert (prediction.pixels.int() - alone.pixels.int()).abs().max() <= 1
    (other,) = module.sample(samples[:1], [6])
    assert not torch.equal(other.pixels, together[0].pixels)
    first, second = module.sample([samples[0], samples[0]])
    (from_first,), (from_second,) = (module.sample(samples[:1], [module.sampling.seed + i]) for i in (0, 1))
    assert (first.pixels.int() - from_first.pixels.int()).abs().max() <= 1
    assert (second.pixels.int() - from_second.pixels.int()).abs().max() <= 1


def test_sizes_are_those_of_the_target_the_source_or_the_configuration(wan: Path, shards: Path, tmp_path: Path) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    clip, small = make_clip(0), make_clip(1, 1, 16, 48)
    text = Message("text", text="make it red")
    asked = [
        Conversation("v2v", [Message("video", media=clip), text, Message("video_gen", media=make_clip(1, 1))]),
        Conversation("v2v", [Message("video", media=clip), text]),
        Conversation("i2i", [Message("image", media=small), text]),
        Conversation("i2v", [Message("image", media=small), text]),
        Conversation("t2i", [text]),
    ]
    made = [tuple(p.pixels.shape[1:]) for p in module.sample(asked)]
    assert made == [(1, 32, 32), (5, 32, 32), (1, 16, 48), (5, 32, 32), (1, 32, 32)]
    prepared = replace(clip, pixels=None, posterior=module.codec.posterior(clip.pixels))
    (raw,) = module.sample([asked[1]])
    (latent,) = module.sample([Conversation("v2v", [Message("video", media=prepared), text])])
    assert torch.equal(raw.pixels, latent.pixels)


def test_targets_that_only_give_the_size_are_not_encoded(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    monkeypatch.setattr(module.codec, "posterior", lambda _: pytest.fail("a target was encoded"))
    assert module.sample([make_conversation(0, "t2v")])[0].pixels.shape == (3, 5, 32, 32)


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        (Conversation("v2v", [Message("video")]), "neither pixels nor a latent"),
        (Conversation("t2v", [Message("video_gen", media=Media(path="a.mp4"))]), "neither pixels nor a latent"),
        (Conversation("t2v", [Message("video_gen", media=make_clip(0, 4))]), "does not fit the VAE"),
        (Conversation("v2v", [Message("text", text="make it red")]), "takes 1 source video"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    wan: Path, shards: Path, tmp_path: Path, sample: Conversation, what: str
) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    with pytest.raises(DataError, match=what):
        module.sample([sample])


def test_predictions_do_not_depend_on_batches_or_ranks(wan: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", count=5)
    made = []
    for batch_size, ranks in ((1, 1), (3, 1), (2, 2)):
        run = tmp_path / f"{batch_size}x{ranks}"
        config = make_config(wan, shards, run)
        config["data"]["init_args"] |= {"max_samples": 5, "eval_batch_size": batch_size}
        config["trainer"] |= {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
        config["trainer"]["callbacks"] = [callback("callbacks.PredictionWriter", folder=str(run / "out"))]
        run.mkdir()
        fit(config, verb="predict", ranks=ranks)
        files = sorted((run / "out").glob("*.mp4"))
        assert len(files) == 5
        made.append(torch.stack([read_video(file).pixels.float() for file in files]))
    for other in made[1:]:
        assert (other - made[0]).abs().mean() < 1  # of 255; another seed would be another picture
    assert (made[0][0] - made[0][1]).abs().mean() > 10
