"""Training from a bank: whole batches without work per sample, the same numbers as sample by sample."""

import json
from pathlib import Path

import pytest
import torch
from factories import logged_rows, make_stack
from safetensors.torch import load_file

from bernini.bank import Bank
from bernini.cli import main
from bernini.conversation import Conversation, Media, Message
from bernini.dropout import DropoutConfig
from bernini.errors import ConfigError, DataError
from bernini.renderer.bank import load_stacks, save_stacks
from bernini.renderer.banked import SIGMAS, BankedRendererModule, StackedPass
from bernini.renderer.experts import Architecture
from bernini.renderer.latents import noise_samples
from bernini.renderer.lora import LoRAConfig
from bernini.renderer.packing import pack
from bernini.vae.codec import LatentCodec
from datamodules.toyworld.bank import RowsOfBank, shares

ROOT = Path(__file__).parents[2]
TINY = Architecture(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=16, text_dim=6, freq_dim=8)


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec.from_pretrained(ROOT / "assets" / "toy" / "vae")


@pytest.mark.parametrize("first", [[], [1]], ids=["clips come first", "images come first"])
def test_a_stacked_batch_is_the_pack_of_its_samples(codec, first):
    stacks = (make_stack("vrc2v", [3, 1], 0), make_stack("r2v", first, 1), make_stack("r2v", [1, 1, 1], 2))
    bank = Bank(stacks, (2, 3, 1))
    model = TINY.build()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clean = torch.zeros(len(stacks), SIGMAS)
    rows = torch.tensor([4, 0, 6, 2, 2, 5])
    losses = StackedPass(model, bank, codec, clean, text_dropout=0.0)(rows)
    assert losses.shape == (6,)

    samples, latents, contexts = [], [], []
    for number in (1, 2, 0):  # shorter ones first
        one = stacks[number]
        for row in bank.split(rows)[number].tolist():
            media = [Media(posterior=x[row]) for x in (*one.sources, one.target)]
            kinds = ["video" if m.posterior.shape[1] > 1 else "image" for m in media[:-1]] + ["video_gen"]
            messages = [Message(kind, media=m) for kind, m in zip(kinds, media, strict=True)]
            samples.append(Conversation(one.task, messages))
            latents.append([codec.normalize(m.posterior) for m in media])
            contexts.append(one.text[row])
    generators = [torch.Generator().manual_seed(0) for _ in samples]
    noised = noise_samples(samples, latents, contexts, [0.0] * len(samples), model.patch, generators)
    expected = pack([n.packed for n in noised], model.patch)
    torch.testing.assert_close(seen[0].patches, expected.patches, atol=1e-5, rtol=0)
    assert torch.equal(seen[0].context, expected.context)
    for name in ("segments", "sample_index", "target_index", "timesteps"):
        assert torch.equal(getattr(seen[0], name), getattr(expected, name)), name
    assert (seen[0].token_lengths, seen[0].target_lengths) == (expected.token_lengths, expected.target_lengths)


def test_losses_are_those_of_the_rows_own_task(codec):
    """Noise levels belong to the stack: at sigma 1 a stack's input holds nothing of its target."""
    bank = Bank((make_stack("t2v", [], 1), make_stack("v2v", [3], 2)), (2, 2))
    model, seen = TINY.build(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sigmas = torch.stack([torch.ones(SIGMAS), torch.zeros(SIGMAS)])
    StackedPass(model, bank, codec, sigmas, text_dropout=1.0)(torch.tensor([0, 1, 2, 3]))
    assert seen[0].timesteps.tolist() == [1000, 1000, 0, 0]
    assert torch.equal(seen[0].context.view(4, 3, 6)[0], bank.stacks[0].dropped)
    assert torch.equal(seen[0].context.view(4, 3, 6)[3], bank.stacks[1].dropped)


def test_kept_samples_are_read_back_and_other_ones_refused(tmp_path):
    file, stacks = tmp_path / "bank.safetensors", [make_stack("r2v", [1] * 12, 0), make_stack("t2v", [], 1)]
    save_stacks(file, stacks, "this world")
    for kept, given in zip(load_stacks(file, torch.device("cpu"), "this world"), stacks, strict=True):
        assert kept.task == given.task and len(kept.sources) == len(given.sources)
        pairs = [*zip(kept.sources, given.sources, strict=True), (kept.target, given.target), (kept.text, given.text)]
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(DataError, match="holds other samples"):
        load_stacks(file, torch.device("cpu"), "another world")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        load_stacks(file, torch.device("cpu"), "this world")


def test_every_sample_comes_once_before_any_comes_again():
    bank = Bank((make_stack("t2v", [], 1), make_stack("v2v", [3], 2)), (3, 2))  # seven samples each
    parts = [bank.split(RowsOfBank(bank, seed=5)[number].rows) for number in range(7)]
    for place, count in enumerate(bank.counts):
        rows = torch.cat([part[place] for part in parts]).tolist()
        assert len(rows) == 7 * count
        assert all(sorted(rows[start : start + 7]) == list(range(7)) for start in range(0, len(rows), 7))
    assert torch.equal(RowsOfBank(bank, seed=5)[4].rows, torch.cat(parts[4]))  # whatever came before


def test_a_second_fit_uses_the_kept_samples_unless_they_are_of_another_world(tmp_path, capsys):
    kept = ["--data.file", str(tmp_path / "bank.safetensors")]
    first, second = (fit(tmp_path / name, 1, *kept) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "third").mkdir()
    config = tmp_path / "third.yaml"
    config.write_text(CONFIG.format(root=ROOT, out=tmp_path / "third", steps=1))
    assert main(["fit", "-c", str(config), *kept, "--data.length", "64"]) == 77
    assert "holds other samples" in capsys.readouterr().err


def test_sources_cannot_be_dropped():
    with pytest.raises(ConfigError, match="sources cannot be dropped"):
        BankedRendererModule(
            vae=str(ROOT / "assets/toy/vae"), architecture=TINY, dropout=DropoutConfig(0.1, image=0.1, video=0.0)
        )


def test_swapped_blocks_are_not_recorded():
    with pytest.raises(ConfigError, match="CUDA graph keeps weights"):
        BankedRendererModule(
            vae=str(ROOT / "assets/toy/vae"),
            architecture=TINY,
            dropout=DropoutConfig(0.1, image=0.0, video=0.0),
            lora=LoRAConfig(rank=2),
            swap_blocks=1,
        )


def test_shares_add_up_and_leave_nobody_out():
    assert shares([10, 10, 10, 10, 10], 30) == [6, 6, 6, 6, 6]
    assert shares([8, 20, 30, 10, 12], 6) == [1, 1, 2, 1, 1]
    assert sum(shares([3, 1000, 5], 17)) == 17 and min(shares([3, 1000, 5], 17)) == 1


CONFIG = """
seed_everything: 3
model:
  class_path: bernini.renderer.banked.BankedRendererModule
  init_args:
    vae: {root}/assets/toy/vae
    expert: both
    architecture:
      {{num_layers: 1, num_attention_heads: 1, attention_head_dim: 16, ffn_dim: 16, text_dim: 64, freq_dim: 8}}
    text: {{encoder: {root}/assets/toy, rows: 48}}
    dropout: {{text: 0.1, image: 0.0, video: 0.0}}
    recompute: none
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
data:
  class_path: datamodules.toyworld.bank.ToyBankDataModule
  init_args:
    vae: {root}/assets/toy/vae
    text: {root}/assets/toy
    tasks: {{t2i: 2, r2i: 5, i2i: 2}}
    length: 48
    height: 32
    width: 32
    val_length: 3
    val_batch_size: 3
trainer:
  max_steps: {steps}
  accelerator: cpu
  devices: 1
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {out}}}}}
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  check_val_every_n_epoch: null
  val_check_interval: 3
  default_root_dir: {out}
  callbacks:
    - class_path: factories.Recorder
      init_args: {{file: {out}/record}}
    - class_path: callbacks.SaveRenderer
      init_args: {{folder: {out}/model, dtype: float16}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {out}/checkpoints, save_last: true, save_top_k: 0, every_n_train_steps: 3}}
"""


def fit(folder: Path, steps: int, *more: str) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(root=ROOT, out=folder, steps=steps))
    assert main(["fit", "-c", str(folder / "config.yaml"), *more]) == 0
    return load_file(folder / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors")


def test_a_resumed_fit_ends_where_an_unbroken_one_does(tmp_path):
    whole = fit(tmp_path / "whole", 6)
    fit(tmp_path / "broken", 3)
    resumed = fit(tmp_path / "broken", 6, "--ckpt_path", "auto")
    assert whole["proj_out.weight"].dtype == torch.float16
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    rows = logged_rows(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 3, 5]
    tasks = {"train/loss_t2i": 2, "train/loss_r2i": 5, "train/loss_i2i": 2}
    for row in rows:
        assert row.keys() == {"step", "train/loss", *tasks}
        assert row["train/loss"] == pytest.approx(sum(row[task] * count for task, count in tasks.items()) / 9)
    (last,) = (row for row in logged_rows(tmp_path / "broken") if row["step"] == 5)  # steps 4 and 5, as unbroken
    assert last == pytest.approx(rows[-1])
    losses = json.loads((tmp_path / "whole" / "record-0.json").read_text())["losses"]  # sums over the two experts
    assert [row["train/loss"] for row in rows] == pytest.approx([sum(losses[i : i + 2]) / 4 for i in (0, 2, 4)])
