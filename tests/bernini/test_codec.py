"""The VAE codec: shapes, normalisation, files and refusals, on a tiny Wan VAE."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from bernini.errors import CheckpointError, DataError
from bernini.vae.codec import LatentCodec, latent_statistics, to_uint8, to_unit

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 3.0]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLWan(
            base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=4, latents_mean=MEAN, latents_std=STD
        )


@pytest.fixture(scope="module")
def codec(vae) -> LatentCodec:
    return LatentCodec(vae)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_survive_the_unit_range():
    every = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(every)
    assert unit.min() == -1 and unit.max() == 1
    assert torch.equal(to_uint8(unit), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 24), (5, 16, 24), (9, 8, 16)])
def test_shapes_go_there_and_back(codec, frames, height, width):
    clip = pixels(3, frames, height, width)
    posterior = codec.posterior(clip)
    shape = codec.latent_shape(frames, height, width)
    assert shape == (4, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert posterior.shape == (8, *shape[1:]) and posterior.dtype == torch.float32
    decoded = codec.decode(codec.normalize(posterior))
    assert decoded.shape == clip.shape and decoded.dtype == torch.uint8


def test_a_batch_is_encoded_as_its_clips(codec):
    clips = pixels(2, 3, 5, 16, 16)
    together = codec.posterior(clips)
    alone = torch.stack([codec.posterior(clip) for clip in clips])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_batch_is_decoded_as_its_latents(codec):
    latents = torch.randn(3, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    together = codec.decode(latents)
    assert together.shape == (3, 3, 5, 16, 24) and together.dtype == torch.uint8
    alone = torch.stack([codec.decode(latent) for latent in latents])
    assert (together.int() - alone.int()).abs().max() <= 1


def test_posterior_is_the_vaes(codec, vae):
    clip = pixels(3, 5, 16, 16)
    expected = vae.encode(clip[None].float() / 127.5 - 1).latent_dist.parameters[0]
    torch.testing.assert_close(codec.posterior(clip), expected)


def test_latents_are_normalised_per_channel(codec):
    draw = torch.Generator().manual_seed(0)
    posterior, noise = torch.randn(8, 2, 2, 3, generator=draw), torch.randn(4, 2, 2, 3, generator=draw)
    mode, sample = codec.normalize(posterior), codec.normalize(posterior, noise)
    for c in range(4):
        torch.testing.assert_close(mode[c], (posterior[c] - MEAN[c]) / STD[c])
        spread = torch.exp(0.5 * posterior[4 + c]) * noise[c]
        torch.testing.assert_close(sample[c] - mode[c], spread / STD[c])
    assert codec.normalize(torch.full((8, 1, 1, 1), 1000.0), noise[:, :1, :1, :1]).isfinite().all()


def test_decode_undoes_the_normalisation(codec, vae):
    raw = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        expected = to_uint8(vae.decode(raw[None]).sample[0])
    difference = codec.decode((raw - mean) / std).int() - expected.int()
    assert difference.abs().max() <= 1


def test_statistics_standardise_the_latents_they_come_from():
    draw = torch.Generator().manual_seed(0)
    posteriors = [torch.randn(8, t, 2, 2, generator=draw) * 3 + 1 for t in (1, 4)]
    mean, std = latent_statistics(posteriors)
    modes = torch.cat([p[:4].flatten(1) for p in posteriors], 1)
    scaled = (modes - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    assert scaled.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(scaled.std(1), torch.ones(4))


def test_the_vae_is_frozen(codec):
    assert not codec.vae.training and not any(p.requires_grad for p in codec.parameters())
    assert not {"mean", "std"} & set(codec.state_dict())


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (3, 5, 20, 16), (3, 5, 16, 20)])
def test_sizes_that_do_not_fit_are_refused(codec, shape):
    with pytest.raises(DataError, match=f"{shape[1]} frames of {shape[3]}x{shape[2]} pixels") as caught:
        codec.posterior(pixels(*shape))
    assert "4k + 1" in caught.value.why and caught.value.fix
    with pytest.raises(DataError, match=f"{shape[1]} frames"):
        codec.latent_shape(*shape[1:])


@pytest.mark.parametrize("sub", [".", "vae"])
def test_folders_are_read(sub, codec, vae, tmp_path):
    vae.save_pretrained(tmp_path / sub)
    loaded = LatentCodec.from_pretrained(tmp_path)
    clip = pixels(3, 1, 8, 8)
    torch.testing.assert_close(loaded.posterior(clip), codec.posterior(clip))
    assert loaded.mean.flatten().tolist() == pytest.approx(MEAN) and loaded.std.flatten().tolist() == pytest.approx(STD)


def test_folders_without_a_vae_are_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        LatentCodec.from_pretrained(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json") and "vae" in caught.value.fix


def test_a_vae_with_missing_tensors_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "conv_in" not in k}, weights)
    with pytest.raises(CheckpointError, match=r"missing, e\.g\. decoder\.conv_in\.bias"):
        LatentCodec.from_pretrained(tmp_path)
