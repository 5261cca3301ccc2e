"""Training steps as CUDA graphs: the losses of the same steps without graphs, of every step and seed."""

from pathlib import Path

import lightning as L
import pytest
import torch
from factories import Recorder, make_stack
from torch.utils.data import DataLoader

from bernini.attention import AttentionBackend
from bernini.bank import Bank, Rows
from bernini.conversation import Batch
from bernini.dropout import DropoutConfig
from bernini.renderer.banked import BankedRendererModule
from bernini.renderer.experts import Architecture
from bernini.vae.module import VAEArchitecture, VAELoss, VAEModule
from datamodules.toyworld import make_item

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
VAE = Path(__file__).parents[2] / "assets" / "toy" / "vae"
SHAPE = Architecture(num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=64, text_dim=6, freq_dim=16)
TINY_VAE = VAEArchitecture(
    base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], z_dim=4, patch_size=2
)
STEPS = 4


def descent(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: Adam would make large ones of differences in rounding."""
    return torch.optim.SGD(parameters, lr=0.02)


def losses(
    module: L.LightningModule, data: L.LightningDataModule | DataLoader, folder: Path, precision: str
) -> list[float]:
    """Losses of some steps from the module's own weights on."""
    recorder = Recorder(str(folder / "record"))
    trainer = L.Trainer(
        accelerator=DEVICE,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return recorder.losses


class Banked(L.LightningDataModule):
    """A bank of two kinds, and a few batches of its rows."""

    def __init__(self) -> None:
        super().__init__()
        stacks = (make_stack("v2v", [3], 0, device=DEVICE), make_stack("r2v", [1, 1], 1, device=DEVICE))
        self.bank = Bank(stacks, (4, 3))

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        rows = [Rows(torch.randint(7, (7,), generator=generator), {}) for _ in range(STEPS)]
        return DataLoader(rows, batch_size=None)


@pytest.mark.parametrize(
    ("precision", "attention", "tolerance"), [("bf16-mixed", "auto", 1e-3), ("32-true", "math", 1e-5)]
)
def test_a_banked_renderer_learns_the_same_with_and_without_graphs(
    tmp_path: Path, recorded: list[torch.nn.Module], precision: str, attention: AttentionBackend, tolerance: float
) -> None:
    def train(cuda_graphs: bool, seed: int = 0) -> list[float]:
        torch.manual_seed(0)
        module = BankedRendererModule(
            vae=str(VAE),
            expert="both",
            architecture=SHAPE,
            dropout=DropoutConfig(0.3, image=0.0, video=0.0),
            optimizer=descent,
            attention=attention,
            recompute="none",
            seed=seed,
            cuda_graphs=cuda_graphs,
        )
        return losses(module, Banked(), tmp_path, precision)

    plain = train(cuda_graphs=False)
    assert len(plain) == STEPS and not recorded
    assert train(cuda_graphs=True) == pytest.approx(plain, rel=tolerance)
    assert len(recorded) == 2  # one of each expert
    assert train(cuda_graphs=True, seed=1) != pytest.approx(plain, rel=0.01)  # the noise is drawn within the graphs


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_autoencoder_learns_the_same_with_and_without_graphs(
    tmp_path: Path, recorded: list[torch.nn.Module], channels_last: bool
) -> None:
    batches = [
        Batch([make_item("i2v", 4 * step + i, frames=5, height=32, width=32) for i in range(4)])
        for step in range(STEPS)
    ]

    def train(cuda_graphs: bool) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        loss = VAELoss(contrast=2.0, squared=2.0, kl=1e-4)
        module = VAEModule(TINY_VAE, loss=loss, optimizer=descent, channels_last=channels_last, cuda_graphs=cuda_graphs)
        found = losses(module, DataLoader(batches, batch_size=None), tmp_path, "32-true")
        return found, torch.cat([posterior.flatten().cpu() for posterior in module._posteriors])

    with torch.backends.cudnn.flags(allow_tf32=False):
        (plain, posteriors), (graphed, of_graphs) = train(False), train(True)
    assert len(recorded) == 2  # one of images, one of clips
    assert graphed == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(of_graphs, posteriors, rtol=1e-3, atol=1e-4)  # each step's own, not the last one's
