"""Training an autoencoder: what it learns from, what it starts from, and what it leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from bernini.conversation import Batch, Conversation, Media, Message
from bernini.errors import ConfigError, DataError
from bernini.lightning_cli import run_lightning
from bernini.vae.codec import LatentCodec, to_unit
from bernini.vae.module import VAEArchitecture, VAELoss, VAEModule, psnr, stack_media
from datamodules.toyworld import make_item

ROOT = Path(__file__).parents[2]
TINY = VAEArchitecture(
    base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], z_dim=4, patch_size=2
)


def batch(count: int = 4, task: str = "i2v", frames: int = 5) -> Batch:
    """Toy samples of one image and one clip each, by default."""
    return Batch([make_item(task, i, frames=frames, height=32, width=32) for i in range(count)])


def trainer(folder: Path, **arguments) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        **{**quiet, "accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, **arguments}
    )


def loader(*batches: Batch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[VAEModule, Path]:
    """A module after a short fit on one batch of images and clips, and the folder of the run."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    module = VAEModule(
        TINY,
        output=str(folder / "vae"),
        loss=VAELoss(squared=2.0, kl=1e-4),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
        dtype="float16",
    )
    data = loader(batch())
    steps = trainer(folder, max_steps=3, logger=CSVLogger(folder, name="", version="log"), log_every_n_steps=1)
    steps.fit(module, data, data)
    return module, folder


# -- architecture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "factor"),
    [
        (TINY, 8),
        (replace(TINY, patch_size=None), 4),
        (replace(TINY, dim_mult=[1, 1, 1, 1], temperal_downsample=[False, True, True], patch_size=None), 8),
    ],
)
def test_latents_have_the_size_that_the_configuration_says(architecture: VAEArchitecture, factor: int) -> None:
    codec = LatentCodec(architecture.build())
    posterior = codec.posterior(torch.zeros(3, 9, 32, 48, dtype=torch.uint8))
    assert (codec.spatial, codec.temporal) == (factor, 4)
    assert posterior.shape == (8, 3, 32 // factor, 48 // factor)
    assert codec.decode(codec.normalize(posterior)).shape == (3, 9, 32, 48)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"dim_mult": [1, 2]}, "dim_mult has 2 entries"), ({"temperal_downsample": [False, True]}, "1 times")],
)
def test_impossible_shapes_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **wrong)


def test_a_new_autoencoder_sees_where_things_are() -> None:
    """Under PyTorch's own initial weights, latents of different places are nearly the same and nothing is learned."""
    torch.manual_seed(0)
    clips = to_unit(torch.stack([m.pixels for s in batch(8, "t2v").samples for m in s.media()]))
    latents = TINY.build().encode(clips).latent_dist.mean
    assert latents.std((-1, -2)).mean() > 0.5 * latents.std()


def test_a_new_autoencoder_takes_a_clip_for_a_row_of_images() -> None:
    vae = TINY.build()
    clip = to_unit(make_item("t2v", 3, frames=5, height=32, width=32).targets[0].media.pixels)[None]
    clip[:, :, 4] = clip[:, :, 0]  # a latent's frame is the newest of its four
    first, last = vae.encode(clip).latent_dist.mean.unbind(2)
    still = vae.encode(clip[:, :, :1].expand(-1, -1, 5, -1, -1)).latent_dist.mean
    assert torch.allclose(still[:, :, 1], last, atol=1e-5)
    assert torch.allclose(still[:, :, 0], first, atol=1e-5)


# -- loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    clips, posterior = (
        torch.rand(2, 3, 5, 32, 32) * 2 - 1,
        TINY.build().encode(torch.zeros(2, 3, 5, 32, 32)).latent_dist,
    )
    parts = VAELoss(squared=3.0, kl=0.25)(clips, clips + 0.5, posterior)
    assert parts["l1"].item() == pytest.approx(0.5)
    assert parts["squared"].item() == pytest.approx(0.25)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert parts["kl"].item() == pytest.approx(divergence.item(), rel=1e-4)
    assert parts["loss"].item() == pytest.approx(0.5 + 3 * 0.25 + 0.25 * divergence.item(), rel=1e-4)


def test_psnr_of_a_known_error() -> None:
    clips = torch.zeros(2, 3, 1, 4, 4)
    assert psnr(clips, clips + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)).tolist() == pytest.approx([20.0, 40.0])


# -- batches ------------------------------------------------------------------------------------------------------


def test_every_image_and_clip_is_used_and_padding_is_not() -> None:
    given = batch(3)
    given.samples[2].info["padding"] = True
    assert sorted(tuple(stack.shape) for stack in stack_media(given)) == [(2, 3, 1, 32, 32), (2, 3, 5, 32, 32)]


def test_prepared_latents_are_refused(tmp_path: Path) -> None:
    prepared = Conversation("t2v", [Message("video_gen", media=Media(posterior=torch.zeros(8, 2, 4, 4)))], key="clip-7")
    with pytest.raises(DataError, match=r"no pixels[\s\S]*clip-7[\s\S]*raw shards"):
        trainer(tmp_path, max_steps=1).fit(VAEModule(TINY), loader(Batch([prepared])))


# -- fit ----------------------------------------------------------------------------------------------------------


def test_training_learns_more_than_the_background(tmp_path: Path) -> None:
    """Under PyTorch's own initial weights this stays at the background."""
    torch.manual_seed(0)
    loss = VAELoss(squared=2.0, kl=1e-4)
    module = VAEModule(TINY, loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), statistics=1)
    data = batch(8, "t2i")
    trainer(tmp_path, max_epochs=-1, max_steps=180, gradient_clip_val=1.0).fit(module, loader(data))
    clips = to_unit(stack_media(data)[0])
    with torch.no_grad():
        decoded = module.vae.decode(module.vae.encode(clips).latent_dist.mode()).sample
    background = clips.median(dim=-1, keepdim=True).values.expand_as(clips)
    assert psnr(clips, decoded).mean() > psnr(clips, background).mean() + 1


def test_a_fit_leaves_a_diffusers_folder_with_the_statistics_of_its_latents(fitted) -> None:
    module, folder = fitted
    codec = LatentCodec.from_pretrained(folder / "vae")
    assert {t.dtype for t in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    for name, weights in codec.vae.state_dict().items():
        assert torch.allclose(weights, module.vae.state_dict()[name], atol=1e-3, rtol=1e-3), name
    # Statistics are of the latents that were trained on: three steps of four images and four clips.
    posteriors = list(module._posteriors)
    assert len(posteriors) == 24
    latents = torch.cat([codec.normalize(p).flatten(1) for p in posteriors], dim=1)
    assert torch.allclose(latents.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std(1), torch.ones(4), atol=1e-4)
    assert module.vae.config["latents_std"] == [1.0] * 4  # the one in training is not touched


def test_a_fit_logs_its_losses_and_psnr(fitted) -> None:
    header = (fitted[1] / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/l1", "train/squared", "train/kl", "train/psnr", "val/psnr"} <= set(header)


def test_training_goes_on_from_weights(fitted, tmp_path: Path) -> None:
    start = LatentCodec.from_pretrained(fitted[1] / "vae").vae.state_dict()
    module = VAEModule(init_from=str(fitted[1] / "vae"), output=str(tmp_path / "vae"))
    assert all(torch.equal(weights, start[name]) for name, weights in module.vae.state_dict().items())
    trainer(tmp_path, max_steps=1).fit(module, loader(batch(1)))
    after = LatentCodec.from_pretrained(tmp_path).vae.state_dict()
    assert any(not torch.equal(weights, start[name]) for name, weights in after.items())


@pytest.mark.parametrize("both", [True, False])
def test_either_weights_or_a_shape_are_needed(both: bool) -> None:
    with pytest.raises(ConfigError, match="either weights or a shape"):
        VAEModule(TINY, init_from="somewhere") if both else VAEModule()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True).fit(VAEModule(TINY, output=str(tmp_path / "vae")), loader(batch(1)))
    assert not (tmp_path / "vae").exists()


def test_the_same_seeds_give_the_same_weights(tmp_path: Path) -> None:
    def train(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        module = VAEModule(TINY, seed=seed)
        torch.manual_seed(torch.seed())  # the latents' noise does not come from the global generator
        trainer(tmp_path, max_steps=2).fit(module, loader(batch(1)))
        return torch.cat([p.detach().flatten() for p in module.vae.parameters()])

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_memory_layout_and_cuda_graphs_do_not_change_what_is_learned(tmp_path: Path) -> None:
    """On the CPU there are no graphs to record, and the layout is a matter of speed."""

    def train(**flags: bool) -> VAEModule:
        torch.manual_seed(0)
        module = VAEModule(TINY, **flags)
        trainer(tmp_path, max_steps=2).fit(module, loader(batch(1)))
        return module

    plain, fast = train(), train(channels_last=True, cuda_graphs=True)
    for (name, expected), found in zip(plain.vae.named_parameters(), fast.vae.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)
    kernels = [p for p in fast.vae.parameters() if p.ndim == 5 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


def test_the_toy_configuration_trains_and_writes_the_toy_vae(tmp_path: Path) -> None:
    def train(output: str, *more: str) -> None:
        short = (
            "--data.batch_size=1 --data.workers=0 --data.height=32 --data.width=32 --data.val_length=1 "
            "--trainer.max_steps=2 --model.lr_scheduler.init_args.total_steps=2 --trainer.val_check_interval=2 "
            f"--trainer.accelerator=cpu --trainer.enable_progress_bar=false --trainer.default_root_dir={tmp_path}"
        )
        given = ["fit", "-c", str(ROOT / "configs/toy/vae.yaml"), *short.split(), f"--model.output={tmp_path / output}"]
        run_lightning([*given, *more])

    train("images", "--data.frames=1")
    train("vae", "--data.frames=5", "--model.architecture=null", f"--model.init_from={tmp_path / 'images'}")
    written = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert (written["z_dim"], written["scale_factor_spatial"], written["scale_factor_temporal"]) == (16, 8, 4)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size < 2.5e6
