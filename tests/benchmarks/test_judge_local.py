"""A local judge: a tiny random Qwen2.5-VL end to end, and the toy planner's, which answers rightly what it sees."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from local_judges import LIMITS, write_local_judge
from planners import TOKENIZER
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.asking import ask
from benchmarks.quality.judging.forms import Integers, YesNo
from benchmarks.quality.judging.local import LocalJudge
from benchmarks.quality.judging.question import Prompt, Question, Turn
from benchmarks.quality.judging.showing import Shown
from bernini.errors import CheckpointError, ConfigError
from bernini.planner.model import load_planner
from datamodules.toyworld import make_item, make_question

ROOT = Path(__file__).parents[2]
CLIP = make_item("t2v", 0, frames=5, height=32, width=48).targets[0].media.pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def judge(folder: Path) -> LocalJudge:
    return LocalJudge(folder, dtype=torch.float32, max_tokens=6)


def prompt_of(*content: str | Shown, system: str = "") -> Prompt:
    return Prompt(system, (Turn("user", tuple(p if isinstance(p, str) else p.see() for p in content)),))


def test_a_random_judge_runs_end_to_end_and_is_asked_once(judge: LocalJudge, tmp_path: Path) -> None:
    form = Integers(("quality",), 1, 5)
    shown = Shown(CLIP, (0, 2, 4), 8.0)
    questions = [Question(f"q{n}", f"i{n}", (f"number {n}", shown, Shown(CLIP)), form, "1") for n in range(2)]
    judged = ask(judge, questions, Answers(tmp_path / "a.jsonl"))
    assert [record.status for record in judged.records()] == ["unparsed"] * 2  # it says nothing that makes sense
    assert all(len(verdict.texts) == 2 for verdict in judged.raw)
    assert judged.bounds("quality") == (None, 1, 5, 0, 2)
    kept = (tmp_path / "a.jsonl").read_bytes()
    again = ask(judge, questions, Answers(tmp_path / "a.jsonl"))
    assert again.records() == judged.records() and (tmp_path / "a.jsonl").read_bytes() == kept


def test_an_answer_is_the_argmax_of_whole_forwards_over_the_model_s_own_inputs(judge: LocalJudge) -> None:
    """Pictures as transformers' own image processor cuts them, and no cache."""
    picture = CLIP[:, :1]
    said = judge.answer(prompt_of("what is it?", Shown(picture), system="Look."), 0, "")
    processor = Qwen2VLImageProcessorPil(**LIMITS)
    seen = processor(picture[:, 0].numpy(), return_tensors="pt", input_data_format="channels_first")
    pads = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
    text = (
        "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\nwhat is it?"
        f"<|vision_start|>{pads}<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = judge.tokenizer(text, return_tensors="pt").input_ids
    made: list[int] = []
    with torch.no_grad():
        for _ in range(judge.max_tokens):
            kinds = (ids == judge.special["image_pad"]).long()
            logits = judge.model(input_ids=ids, mm_token_type_ids=kinds, **seen).logits[0, -1]
            made.append(int(logits.argmax()))
            if made[-1] in judge.stops:
                break
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert said.text == judge.tokenizer.decode(made, skip_special_tokens=True)
    assert said.usage["completion_tokens"] == len(made)
    assert said.finish == ("stop" if made[-1] in judge.stops else "length")


def test_clips_are_shown_as_videos_at_their_rate(judge: LocalJudge) -> None:
    sheet = judge._write(prompt_of(Shown(CLIP, (0, 1, 2), 4.0), "and", Shown(CLIP, (0, 4)), Shown(CLIP, (0, 4), 0.3)))
    inputs = sheet.inputs(torch.device("cpu"), torch.float32)
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6], [1, 4, 6]]  # the odd frame is paired with itself
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([0.5, 2 / 0.3])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    ids, kinds = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    counts = [int((ids == judge.special[f"{kind}_pad"]).sum()) for kind in ("video", "image")]
    assert counts == [(2 + 1) * 6, 2 * 6]
    assert torch.equal(kinds == 2, ids == judge.special["video_pad"])
    assert torch.equal(kinds == 1, ids == judge.special["image_pad"])
    repeated = judge._write(prompt_of(Shown(CLIP, (0, 1, 2, 2), 4.0))).inputs(torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["pixel_values_videos"][:48], repeated["pixel_values_videos"])


def test_text_that_spells_a_special_token_stays_text(judge: LocalJudge) -> None:
    sheet = judge._write(prompt_of("<|im_end|><|image_pad|>"))
    assert sheet.ids.count(judge.special["im_end"]) == 2 and judge.special["image_pad"] not in sheet.ids


def test_its_identity_is_what_its_files_hold(folder: Path, judge: LocalJudge, tmp_path: Path) -> None:
    same, other = tmp_path / "same", write_local_judge(tmp_path / "other", seed=1)
    shutil.copytree(folder, same)
    assert LocalJudge(same, dtype=torch.float32, max_tokens=6).identity() == judge.identity()
    assert LocalJudge(other, dtype=torch.float32, max_tokens=6).identity() != judge.identity()
    assert LocalJudge(same, dtype=torch.float32, max_tokens=7).identity() != judge.identity()
    assert judge.name.startswith(f"{folder.name}@")


def test_what_is_no_judge_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no judge here"):
        LocalJudge(tmp_path / "nowhere")
    for lost in ("model.safetensors", "tokenizer.json"):
        broken = tmp_path / lost
        shutil.copytree(folder, broken)
        (broken / lost).unlink()
        with pytest.raises((CheckpointError, ConfigError), match="judge"):
            LocalJudge(broken)


@pytest.mark.parametrize("task", ["und_img", "und_vid"])
def test_a_judge_that_can_see_is_mostly_right_and_a_blindfolded_one_is_not(
    task: str, toy_judge: LocalJudge, tmp_path: Path
) -> None:
    """The toy planner's language model answers whether things are so, in combinations that it was never shown."""
    samples = [make_question(task, n, seed=5, split="held_out", kinds=["whether"]) for n in range(40)]
    shown = [sample.sources[0].media for sample in samples]
    indices, fps = ((0,), 0.0) if task == "und_img" else (tuple(range(0, 16, 2)), 8.0)

    def share(turn: int) -> float:
        questions = [
            Question(
                key=sample.key,
                item=sample.key,
                content=(Shown(shown[n - turn].pixels, indices, fps), sample.messages[1].text),
                form=YesNo("right", right=sample.info["question"]["answer"]),
                version="1",
            )
            for n, sample in enumerate(samples)
        ]
        judged = ask(toy_judge, questions, Answers(tmp_path / "a.jsonl"))
        judged.require()
        return judged.bounds("right").mean

    assert share(0) >= 0.75 and share(1) <= 0.65


@pytest.fixture(scope="module")
def toy_judge(tmp_path_factory: pytest.TempPathFactory) -> LocalJudge:
    """The language model of the toy planner, in Qwen's layout."""
    folder = tmp_path_factory.mktemp("toy")
    load_planner(ROOT / "assets/toy/planner").mllm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 4096, "max_pixels": 4096}))
    return LocalJudge(folder, dtype=torch.float32, max_tokens=12)
