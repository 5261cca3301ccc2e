"""What the tests of training share: a Wan folder, shards and command lines small enough for a CPU."""

import csv
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bernini.cli import main
from bernini.conversation import Conversation, Media, Message
from bernini.renderer.bank import Stack
from bernini.renderer.experts import Architecture
from bernini.vae.module import VAEArchitecture
from datamodules.shards import write_shards

FRAMES, EDGE = 5, 32  # pixels of every clip; its latent is [4, 2, 4, 4], eight tokens
ARCHITECTURE = Architecture(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=32, text_dim=12, freq_dim=16, in_channels=4
)


def make_wan_folder(folder: Path) -> Path:
    """A folder in the layout of a Wan checkpoint, with two experts of `ARCHITECTURE`, random and seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAEArchitecture(
            base_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], z_dim=4, patch_size=2
        )
        vae.build().save_pretrained(folder / "vae")
        for name in ("transformer", "transformer_2"):
            ARCHITECTURE.build().save_pretrained(folder / name)
        text = UMT5Config(vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    words = ["<pad>", "</s>", "<unk>", "You", "are", "a", "assistant", "make", "it", "red", "green", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    return folder


def make_clip(seed: int, frames: int = FRAMES, height: int = EDGE, width: int = EDGE) -> Media:
    """A clip of one random colour with a brighter column that moves."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 128, (3, 1, 1, 1), generator=generator).expand(3, frames, height, width).clone()
    for t in range(frames):
        pixels[:, t, :, (seed + 4 * t) % width] += 100
    source = {"height": height, "width": width, "frames": frames, "fps": 8.0, "sampled": frames}
    return Media(pixels=pixels.to(torch.uint8), fps=8.0 if frames > 1 else 0.0, source=source)


def make_conversation(seed: int, task: str = "v2v") -> Conversation:
    """One sample of ``t2v``, ``t2i``, ``v2v`` or ``rv2v``; the target is a clip, or an image for ``t2i``."""
    messages = [Message("video", media=make_clip(seed))] if task in ("v2v", "rv2v") else []
    if task == "rv2v":
        messages.append(Message("image", media=make_clip(seed + 2000, 1)))
    messages.append(Message("text", text=f"make it {('red', 'green', 'blue')[seed % 3]}"))
    target = Message("image_gen", media=make_clip(seed + 1000, 1)) if task == "t2i" else None
    messages.append(target or Message("video_gen", media=make_clip(seed + 1000)))
    return Conversation(task, messages, key=f"{task}-{seed:04d}").check()


def make_shards(folder: Path, count: int = 8, tasks: tuple[str, ...] = ("v2v", "t2v")) -> Path:
    """A folder of shards with ``count`` samples, the tasks in turn."""
    write_shards((make_conversation(i, tasks[i % len(tasks)]) for i in range(count)), folder)
    return folder


def make_stack(task: str, sources: list[int], seed: int, count: int = 7, device: torch.device | str = "cpu") -> Stack:
    """Random samples of a bank: posteriors without noise, of sources of so many frames each and a target of three."""
    generator = torch.Generator().manual_seed(seed)

    def posterior(frames: int) -> torch.Tensor:
        drawn = torch.randn(count, 32, frames, 4, 4, generator=generator)
        drawn[:, 16:] = -30
        return drawn.to(device)

    texts = torch.randn(count + 1, 3, 6, generator=generator).to(device)
    return Stack(task, tuple(map(posterior, sources)), posterior(3), texts[:-1], texts[-1])


def make_config(wan: Path, shards: Path, run: Path, **model: Any) -> dict[str, Any]:
    """Configuration of a run of two steps over `make_shards`; ``model`` goes over the renderer's ``init_args``."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "bernini.renderer.module.RendererModule",
            "init_args": {
                "vae": str(wan),
                "init_from": str(wan),
                "text": {"encoder": str(wan), "rows": 16},
                "recompute": "none",
                "sampling": {"steps": 2, "frames": FRAMES, "height": EDGE, "width": EDGE, "mode": "t2v"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
                **model,
            },
        },
        "data": {
            "class_path": "datamodules.video.VideoDataModule",
            "init_args": {"train": str(shards), "val": str(shards), "predict": str(shards), "max_samples": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 2,
            "use_distributed_sampler": False,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(run),
            "callbacks": [],
        },
    }


def write_config(path: Path, config: dict[str, Any]) -> str:
    """Write a configuration; gives the path as the command line wants it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


class Recorder(L.Callback):
    """Writes what a run computed into ``FILE-RANK.json``: losses of all steps, metrics of all validations."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.losses: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = trainer.callback_metrics.items()
        self.metrics.append({k: v.item() for k, v in named if k.startswith(("val/", "test/"))})

    on_test_end = on_validation_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        record = {"losses": self.losses, "metrics": self.metrics}
        Path(f"{self.file}-{trainer.global_rank}.json").write_text(json.dumps(record))


class Terminate(L.Callback):
    """Sends the process the signal with which schedulers end jobs."""

    def on_train_batch_end(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    """A callback as a configuration names it."""
    return {"class_path": name, "init_args": arguments}


def log_to_csv(config: dict[str, Any], folder: Path, every: int = 1) -> None:
    """Have a configuration log into a folder every so many steps; `logged_rows` reads it."""
    logger = callback("lightning.pytorch.loggers.CSVLogger", save_dir=str(folder))
    config["trainer"] |= {"logger": logger, "log_every_n_steps": every}


def logged_rows(folder: Path, stage: str = "train") -> list[dict[str, float]]:
    """Rows of all runs that logged below a folder, each with its step and its metrics of a stage."""
    rows = []
    for file in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(file.read_text().splitlines()):
            found = {k: float(v) for k, v in row.items() if v and (k == "step" or k.startswith(f"{stage}/"))}
            rows += [found] if len(found) > 1 else []
    return rows


def keep_checkpoints(config: dict[str, Any], folder: Path, every: int = 1) -> None:
    """Have a configuration keep ``last.ckpt`` in a folder."""
    name = "lightning.pytorch.callbacks.ModelCheckpoint"
    keep = callback(name, dirpath=str(folder), save_last=True, every_n_train_steps=every, save_top_k=0)
    config["trainer"] |= {"enable_checkpointing": True, "callbacks": [*config["trainer"]["callbacks"], keep]}


def fit(config: dict[str, Any], *more: str, verb: str = "fit", ranks: int = 1) -> list[dict[str, Any]]:
    """Run a configuration and give the record of every rank."""
    root = Path(config["trainer"]["default_root_dir"])
    record = callback("factories.Recorder", file=str(root / "record"))
    callbacks = [*config["trainer"]["callbacks"], record]
    path = write_config(root / "given.yaml", {**config, "trainer": {**config["trainer"], "callbacks": callbacks}})
    codes = [main([verb, "-c", path, *more])] if ranks == 1 else run_ranks(ranks, [verb, "-c", path, *more])
    assert codes == [0] * ranks
    return [json.loads((root / f"record-{rank}.json").read_text()) for rank in range(ranks)]


def run_ranks(ranks: int, *commands: list[str]) -> list[int]:
    """Run commands, one after another, as a launcher would: per rank, each in a process of its own.

    Gives the exit codes; what follows a command that fails is not run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The server imports once for all tests; forking the test process itself would copy its threads' locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["factories", "bernini.renderer.module", "datamodules.video", "callbacks"])
    processes = [context.Process(target=_rank, args=(rank, ranks, port, commands)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def _rank(rank: int, ranks: int, port: int, commands: Sequence[list[str]]) -> None:
    torch.set_num_threads(1)
    os.environ.pop("WANDB_SERVICE", None)  # of the process that tests, when the server that forked this one began
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise SystemExit(next(filter(None, map(main, commands)), 0))


def build(config: dict[str, Any], folder: Path) -> Any:
    """The configured renderer module, with its transformers, outside of a run."""
    from bernini.lightning_cli import run_lightning

    cli = run_lightning(["-c", write_config(folder / "build.yaml", config)], run=False)
    cli.model.trainer = cli.trainer
    cli.model.configure_model()
    return cli.model
