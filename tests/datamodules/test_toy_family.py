"""The toy family's data module and its text side."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from bernini.errors import ConfigError
from bernini.planner.template import PlannerTemplate
from bernini.renderer.experts import Architecture
from bernini.tasks import TASKS
from bernini.text.encoder import TextEncoder, context_rows
from bernini.text.prompt import renderer_text
from bernini.vae.module import VAEArchitecture
from datamodules.toyworld import held_out, items, make_question
from datamodules.toyworld.data import ToyWorld, ToyWorldDataModule
from datamodules.toyworld.family import ROWS, build_text, random_encoder
from datamodules.toyworld.scene import COLOURS, LIGHTING, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES, Scene

SMALL = {"frames": 1, "height": 32, "width": 32}


# -- data ---------------------------------------------------------------------------------------------------------


def data(rank: int = 0, world: int = 1, **arguments) -> ToyWorldDataModule:
    module = ToyWorldDataModule(**{"tasks": ["t2i", "v2v"], "batch_size": 4, "length": 22, **SMALL, **arguments})
    kwargs = {"rank": rank, "num_replicas": world}
    module.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs, accumulate_grad_batches=1)
    return module


def keys(loader) -> list[list[str]]:
    return [[sample.key for sample in batch.samples] for batch in loader]


def pixels(batch) -> list[Tensor]:
    return [media.pixels for sample in batch.samples for media in sample.media()]


def test_an_epoch_has_whole_batches_and_the_next_one_new_samples() -> None:
    module = data()
    loader = module.train_dataloader()
    first = keys(loader)
    assert [len(batch) for batch in first] == [4] * 5 == [4] * len(loader)
    module.commit(list(loader)[-1].cursor)
    second = keys(loader)
    assert len(second) == 5
    assert not {key for batch in first for key in batch} & {key for batch in second for key in batch}


def test_training_goes_on_after_the_committed_batch() -> None:
    module = data()
    batches = list(module.train_dataloader())
    resumed = data()
    module.commit(batches[1].cursor)
    resumed.load_state_dict(module.state_dict())
    assert keys(resumed.train_dataloader()) == keys(module.train_dataloader()) == keys(batches[2:])


def test_two_ranks_share_the_global_batch_of_one() -> None:
    alone = keys(data().train_dataloader())
    ranks = [keys(data(rank, 2, batch_size=2).train_dataloader()) for rank in range(2)]
    assert [left + right for left, right in zip(*ranks, strict=True)] == alone


def test_workers_draw_what_the_main_process_draws() -> None:
    here, there = (data(workers=workers, frames=5).val_dataloader() for workers in (0, 1))
    for mine, theirs in zip(here, there, strict=True):
        assert [s.info for s in mine.samples] == [s.info for s in theirs.samples]
        assert all(map(torch.equal, pixels(mine), pixels(theirs)))


def test_an_error_in_a_worker_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="unknown task 't2x'"):
        next(iter(data(tasks=["t2x"], workers=1).train_dataloader()))


def test_only_training_sees_train_samples() -> None:
    def combinations(loader) -> list[bool]:
        targets = [Scene.from_json(s.info["truth"]["target"]) for batch in loader for s in batch.samples]
        return [any(map(held_out, scene.things)) for scene in targets]

    module = data(val_length=9)
    assert not any(combinations(module.train_dataloader()))
    assert all(combinations(module.val_dataloader()))


def test_every_held_out_sample_is_seen_once_and_the_rest_is_padding() -> None:
    batches = [b for rank in range(2) for b in data(rank, 2, val_length=9).val_dataloader()]
    counted = Counter(s.key for b in batches for s in b.samples if not s.info.get("padding"))
    alone = [key for batch in keys(data(val_length=9).val_dataloader()) for key in batch]
    assert counted == Counter(alone)
    assert len(alone) == 9


@given(start=st.integers(0, 10**6))
@settings(max_examples=10)
def test_any_run_of_samples_holds_the_tasks_in_their_parts(start: int) -> None:
    world = ToyWorld({"t2i": 3.0, "r2i": 1.0, "i2i": 0.0}, **SMALL)
    found = Counter(world[start + i].task for i in range(40))
    assert found["t2i"] == pytest.approx(30, abs=3)
    assert found["i2i"] == 0
    assert world[start].key == world[start].key


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tasks": {"t2i": -1.0}}, "no mix"),
        ({"tasks": []}, "no mix"),
        ({"batch_size": 0}, "1 or more"),
        ({"length": 3}, "3 training samples, but a global batch takes 4"),
    ],
)
def test_impossible_numbers_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data(**wrong).train_dataloader()


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    build_text(root)
    return root


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


def test_the_text_side_is_made_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    build_text(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file
    assert sum((folder / file).stat().st_size for file in files) < 600_000


def test_every_word_of_the_toy_world_is_one_token(encoder: TextEncoder) -> None:
    words = [*COLOURS, *SHAPES, *TEXTURES[1:], *SIZES, *MOTIONS, *PLACES, *LIGHTING, "black", "background"]
    for word in words:
        tokens = encoder.tokenizer(f"make it {word}").input_ids
        assert encoder.tokenizer.convert_ids_to_tokens(tokens)[-2:] == [f"Ġ{word}", "</s>"]
    for verb in ("make", "remove", "add", "replace", "insert"):  # these come right after the task's sentence
        tokens = encoder.tokenizer(renderer_text("v2v", verb)).input_ids
        words = ["You", "are", "a", "helpful", "assistant", "specialized", "in", "video", "editing"]
        spelled = [*(f"Ġ{word}" for word in words), ".", verb, "</s>"]
        assert encoder.tokenizer.convert_ids_to_tokens(tokens) == spelled


@given(text=st.text(max_size=40))
def test_any_text_can_be_spelled(encoder: TextEncoder, text: str) -> None:
    tokenizer = encoder.tokenizer
    for special in ("<pad>", "</s>", "<unk>"):
        text = text.replace(special, "")
    tokens = tokenizer(text).input_ids
    assert tokens[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(" ") == text.removeprefix(" ")


def test_every_text_fits_the_context(encoder: TextEncoder) -> None:
    samples = items(list(TASKS), 600, seed=9, frames=1, height=32, width=32)
    texts = [renderer_text(sample.task, sample.prompt) for sample in samples]
    assert max(map(len, encoder.tokenizer(texts).input_ids)) <= ROWS


def test_texts_are_padded_on_the_right_with_token_zero(encoder: TextEncoder, folder: Path) -> None:
    short, long = encoder.tokenizer(["red", "a red circle on the left"], padding=True).input_ids
    assert len(short) == len(long)
    assert short[short.index(1) + 1 :] == [0] * (len(short) - short.index(1) - 1)
    assert encoder.tokenizer.model_max_length == ROWS == context_rows(folder)
    alone, together = encoder.encode(["red"])[0], encoder.encode(["red", "a red circle on the left"])[0]
    assert torch.allclose(alone, together, atol=1e-5)


def test_features_tell_words_apart(encoder: TextEncoder) -> None:
    texts = [renderer_text("v2v", f"make the circle {colour}") for colour in COLOURS]
    ends = torch.stack([rows[-2] for rows in encoder.encode(texts)])
    similarity = torch.nn.functional.cosine_similarity(ends[:, None], ends[None], dim=-1)
    assert similarity.fill_diagonal_(-1).max() < 0.8


def test_a_shapes_features_hold_its_own_colour_and_motion(encoder: TextEncoder) -> None:
    """A linear probe reads them off the shape's token, though many scenes have a second thing."""
    samples = list(items(["t2v"], 900, **SMALL))
    features, colours, motions = [], [], []
    for first in range(0, len(samples), 100):
        chunk = samples[first : first + 100]
        texts = [renderer_text(s.task, s.prompt) for s in chunk]
        for sample, text, rows in zip(chunk, texts, encoder.encode(texts), strict=True):
            tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text).input_ids)
            places = [i for i, token in enumerate(tokens) if token.removeprefix("Ġ") in SHAPES]
            for place, thing in zip(places, sample.info["truth"]["target"]["things"], strict=True):
                features.append(rows[place])
                colours.append(list(COLOURS).index(thing["colour"]))
                motions.append(list(MOTIONS).index(thing["motion"]))
    x = torch.nn.functional.pad(torch.stack(features), (0, 1), value=1.0)
    half = len(x) // 2
    for labels, least in ((colours, 0.9), (motions, 0.8)):
        y = torch.tensor(labels)
        gram = x[:half].T @ x[:half] + 0.01 * torch.eye(x.shape[1])
        probe = torch.linalg.solve(gram, x[:half].T @ torch.nn.functional.one_hot(y[:half]).float())
        assert ((x[half:] @ probe).argmax(1) == y[half:]).float().mean() > least


def test_the_encoders_width_is_whole_heads() -> None:
    with pytest.raises(ConfigError, match="width 40"):
        random_encoder(64, dim=40)


def test_with_a_vae_and_transformers_it_is_a_wan_pipeline(tmp_path: Path) -> None:
    build_text(tmp_path, dim=32, layers=1)
    vae = VAEArchitecture(4, None, [1, 1, 1], 1, [True, True], 16, 2)
    vae.build().save_pretrained(tmp_path / "vae")
    shape = Architecture(
        num_layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=16, text_dim=32, freq_dim=16
    )
    for name in ("transformer", "transformer_2"):
        shape.build().save_pretrained(tmp_path / name)
    pipeline = WanPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.scheduler.config.flow_shift == 5.0
    result = pipeline("a red circle", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt")
    assert result.frames.shape == (1, 5, 3, 32, 32)


def test_the_planners_words_are_single_tokens_and_qwens_tokens_are_special(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "mllm", local_files_only=True)
    PlannerTemplate(tokenizer)  # looks for all of Qwen's tokens
    words = [*COLOURS, *SHAPES, *SIZES, *MOTIONS, "smaller", "other", "above", "thing"]
    for word in words:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"the {word}"))[-1] == f"Ġ{word}"
    for index in range(20):
        sample = make_question("und_vid", index, **SMALL)
        texts = [message.text for message in sample.messages if message.text]
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_all_task_sentences_can_be_encoded(encoder: TextEncoder) -> None:
    rows = encoder.encode([renderer_text(task, "") for task in TASKS])
    assert all(r.shape[1] == 64 and r.isfinite().all() for r in rows)
    assert len({tuple(r[-2].tolist()) for r in rows}) >= 10
