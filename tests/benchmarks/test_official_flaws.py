"""Official files with something wrong: one error each, which names file, entry, field and remedy."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from official_files import WRITERS, dump, dump_csv, dump_lines
from PIL import Image

from benchmarks.quality.official.drafts import Draft, check_drafts
from benchmarks.quality.official.reading import Schema, checked, read_csv, read_json, read_lines
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.official.sizing import upright_size
from benchmarks.quality.official.source import Source
from bernini.errors import DataError
from bernini.media import read_image, write_image

SOURCE = Source(home="home", download="it there", licence="free")


def change_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        content = json.loads((root / name).read_text())
        replaced = change(content)
        dump(root / name, content if replaced is None else replaced)

    return apply


def change_lines(name: str, change: Callable[[list], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        rows = [json.loads(line) for line in (root / name).read_text().splitlines()]
        change(rows)
        dump_lines(root / name, rows)

    return apply


def change_csv(name: str, change: Callable[[list], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with (root / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        change(rows)
        dump_csv(root / name, rows)

    return apply


VBENCH, I2V, OPEN = "VBench_full_info.json", "vbench2_i2v_full_info.json", "Open-Domain_Eval.json"
VBENCH2, OPENVE = "vbench2/VBench2_full_info.json", "benchmark_videos.csv"
FIVE, RISE = "edit_prompt/edit2_FiVE.json", "datav2_total_w_subtask.json"
DPG, WISE = "dpg_bench/dpg_bench.csv", "data_verified/natural_science_verified.json"
FLAWS = {
    "vbench, a field is missing": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[7].__delitem__("prompt_en")),
        "the field 'prompt_en' is missing",
        f"{VBENCH}, entry 7, field prompt_en",
    ),
    "vbench, an unknown field": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[7].update(auxilary_info={})),
        "unknown field 'auxilary_info'",
        f"{VBENCH}, entry 7, field auxilary_info",
    ),
    "vbench, an entry is gone": (
        "vbench",
        change_json(VBENCH, lambda rows: rows.__delitem__(-1)),
        "945 entries instead of 946",
        VBENCH,
    ),
    "vbench, an unknown dimension": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[0].update(dimension=["subject_constancy"])),
        "unknown dimension 'subject_constancy'",
        VBENCH,
    ),
    "vbench, a dimension too often": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[0]["dimension"].append("scene")),
        "87 entries of dimension 'scene' instead of 86",
        VBENCH,
    ),
    "vbench, dimensions are no list": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[3].update(dimension="scene")),
        "'scene' is not a list of texts",
        f"{VBENCH}, entry 3, field dimension",
    ),
    "vbench, an empty prompt": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[3].update(prompt_en=" ")),
        "is not a text",
        f"{VBENCH}, entry 3, field prompt_en",
    ),
    "vbench, a prompt that is no file name": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[3].update(prompt_en="../above")),
        "an output cannot be called '../above-0.mp4'",
        "entry 0003-0",
    ),
    "vbench, a prompt too long for a file name": (
        "vbench",
        change_json(VBENCH, lambda rows: rows[3].update(prompt_en="ö" * 126)),
        "an output cannot be called",
        "entry 0003-0",
    ),
    "vbench, not a list": ("vbench", change_json(VBENCH, lambda rows: {"rows": rows}), "does not hold a list", VBENCH),
    "vbench, an entry is a text": (
        "vbench",
        change_json(VBENCH, lambda rows: rows.__setitem__(5, "scene")),
        "an entry is 'scene'",
        f"{VBENCH}, entry 5",
    ),
    "vbench, cut short": (
        "vbench",
        lambda root: (root / VBENCH).write_text((root / VBENCH).read_text()[:-9]),
        "the file is not JSON",
        VBENCH,
    ),
    "i2v, one prompt for two images": (
        "vbench_i2v",
        change_json(I2V, lambda rows: rows[1].update(prompt_en=rows[0]["prompt_en"], image_name="a view, 1.jpg")),
        "two entries have the output file 'a view, 0-0.mp4'",
        "",
    ),
    "i2v, an older list without images": (
        "vbench_i2v",
        change_json(I2V, lambda rows: rows[1].__delitem__("image_name")),
        "the field 'image_name' is missing",
        f"{I2V}, entry 1",
    ),
    "vbench2, two dimensions": (
        "vbench2",
        change_json(VBENCH2, lambda rows: rows[1]["dimension"].append("Material")),
        "2 dimensions",
        f"{VBENCH2}, entry 1, field dimension",
    ),
    "opens2v, a key of no kind": (
        "opens2v",
        change_json(OPEN, lambda rows: {("single-1" if k == "singleobj_1" else k): v for k, v in rows.items()}),
        "the key 'single-1' is not KIND_NUMBER",
        f"{OPEN}, entry single-1, field key",
    ),
    "opens2v, four images": (
        "opens2v",
        change_json(OPEN, lambda rows: rows["singleobj_1"].update(img_paths=["a.jpg"] * 4)),
        "4 images",
        f"{OPEN}, entry singleobj_1, field img_paths",
    ),
    "opens2v, a key twice": (
        "opens2v",
        lambda root: (root / OPEN).write_text('{"singleobj_1": {}, "singleobj_1": {}}'),
        "the name 'singleobj_1' comes twice",
        f"{OPEN}, entry singleobj_1",
    ),
    "openve, an unknown type": (
        "openve",
        change_csv(OPENVE, lambda rows: rows[2].update(edited_type="weather")),
        "unknown type 'weather'",
        f"{OPENVE}, entry 2, field edited_type",
    ),
    "openve, a file of another kind": (
        "openve",
        change_csv(OPENVE, lambda rows: rows[2].update(original_video="videos/a.mov")),
        "videos/a.mov is no MP4",
        f"{OPENVE}, entry 2, field original_video",
    ),
    "openve, a clip twice": (
        "openve",
        change_csv(OPENVE, lambda rows: rows[2].update(original_video=rows[1]["original_video"])),
        "two entries have the id '0001_global_style_It_s'",
        "",
    ),
    "openve, a ragged row": (
        "openve",
        lambda root: (root / OPENVE).write_text((root / OPENVE).read_text() + "global_style,make it old\n"),
        "a row has not as many cells as the header",
        f"{OPENVE}, entry 431",
    ),
    "editverse, a tag without a source": (
        "editverse",
        change_json("test.json", lambda rows: rows["0"].update({"<text>": "Put <image1> in <video1>"})),
        "the text names <image1>",
        "test.json, entry 0, field <text>",
    ),
    "editverse, a direction": (
        "editverse",
        change_json("test.json", lambda rows: rows["1"].update(direction="diagonal")),
        "unknown direction 'diagonal'",
        "test.json, entry 1, field direction",
    ),
    "editverse, three clips": (
        "editverse",
        change_json("test.json", lambda rows: rows["2"].update({"<video3>": "videos/1.mp4"})),
        "3 clips",
        "test.json, entry 2, field <video3>",
    ),
    "five, another file's entry": (
        "five",
        change_json(FIVE, lambda rows: rows[4].update(editing_type_id="3")),
        "an edit of type 3",
        f"{FIVE}, entry 4, field editing_type_id",
    ),
    "five, too few": ("five", change_json(FIVE, lambda rows: rows.__delitem__(-1)), "99 entries instead of 100", FIVE),
    "five, no masks": (
        "five",
        change_json(FIVE, lambda rows: rows[4].update(video_name="0999_cat")),
        "the folder images/0999_cat is missing",
        f"{FIVE}, entry 4, field video_name",
    ),
    "ivebench, two lists": (
        "ivebench",
        lambda root: dump(root / "more.json", []),
        "2 JSON files instead of one",
        "",
    ),
    "bernini_bench, an unknown category": (
        "bernini_bench",
        change_lines("prompts.jsonl", lambda rows: rows[0].update(category="dance")),
        "unknown category 'dance'",
        "prompts.jsonl, entry 0, field category",
    ),
    "bernini_bench, an id that is no file name": (
        "bernini_bench",
        change_lines("prompts.jsonl", lambda rows: rows[2].update(id="a/b")),
        "the id 'a/b' is no word",
        "prompts.jsonl, entry 2, field id",
    ),
    "bernini_bench, a broken line": (
        "bernini_bench",
        lambda root: (root / "prompts.jsonl").write_text('{"id": "a"\n'),
        "a line is not JSON",
        "prompts.jsonl, line 1",
    ),
    "imgedit, an unknown type": (
        "imgedit",
        change_json("basic_edit.json", lambda rows: rows["1000"].update(edit_type="hybrid")),
        "unknown edit_type 'hybrid'",
        "basic_edit.json",
    ),
    "geneval, a tag too few": (
        "geneval",
        change_lines("prompts/evaluation_metadata.jsonl", lambda rows: rows.__delitem__(-1)),
        "99 entries of tag 'color_attr' instead of 100",
        "evaluation_metadata.jsonl",
    ),
    "dpg, a parent that is not there": (
        "dpg",
        change_csv(DPG, lambda rows: rows[3].update(dependency="7")),
        "question 7 does not exist",
        f"{DPG}, entry 3, field dependency",
    ),
    "dpg, a dependency that is no number": (
        "dpg",
        change_csv(DPG, lambda rows: rows[3].update(dependency="one")),
        "'one'",
        f"{DPG}, entry 3, field dependency",
    ),
    "dpg, two texts": (
        "dpg",
        change_csv(DPG, lambda rows: rows[3].update(text="another")),
        "another text",
        f"{DPG}, entry 3, field text",
    ),
    "wise, a number twice": (
        "wise",
        change_json(WISE, lambda rows: rows[1].update(prompt_id=1)),
        "the number 1",
        f"{WISE}, entry 1, field prompt_id",
    ),
    "wise, a number as text": (
        "wise",
        change_json(WISE, lambda rows: rows[1].update(prompt_id="642")),
        "'642' is not an integer",
        f"{WISE}, entry 1, field prompt_id",
    ),
    "wise, one too few": (
        "wise",
        change_json(WISE, lambda rows: rows.__delitem__(-1)),
        "999 prompts instead of 1000",
        "",
    ),
    "rise, another set": (
        "rise",
        change_json(RISE, lambda rows: rows[:64]),
        "64 entries of category 'temporal_reasoning' instead of 85",
        RISE,
    ),
}


@pytest.mark.parametrize(("name", "spoil", "what", "where"), FLAWS.values(), ids=FLAWS)
def test_a_flaw_is_told_with_its_place_and_remedy(
    name: str, spoil: Callable[[Path], Any], what: str, where: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        OFFICIAL[name](root=str(tmp_path), accept_licence=True).items()
    assert what in caught.value.what
    assert where in caught.value.where and str(tmp_path) in caught.value.where
    remedies = {"get " + OFFICIAL[name].source.download} | ({"name it: prompts_file"} if name == "ivebench" else set())
    assert caught.value.fix in remedies


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.write_bytes(b"PAR1"), "the file is not the official one"),
        (
            lambda path: pq.write_table(pq.read_table(path).drop_columns(["input_image_raw"]), path),
            "the column 'input_image_raw' is missing",
        ),
        (
            lambda path: pq.write_table(pq.read_table(path).set_column(0, "task_type", pa.array(["dance"] * 15)), path),
            "unknown task_type 'dance'",
        ),
    ],
)
def test_a_parquet_file_with_a_flaw(spoil: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    WRITERS["gedit"](tmp_path)
    file = tmp_path / "data" / "train-00000-of-00002.parquet"
    spoil(file)
    with pytest.raises(DataError) as caught:
        OFFICIAL["gedit"](root=str(tmp_path)).items()
    assert what in caught.value.what and str(file) in caught.value.where and "hf download" in caught.value.fix


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    WRITERS["imgedit"](tmp_path)
    damaged = tmp_path / "animal" / "000000003.jpg"
    damaged.unlink()
    damaged.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        OFFICIAL["imgedit"](root=str(tmp_path), accept_licence=True).items()
    assert str(damaged) in caught.value.where


def test_fields_of_an_open_schema_may_be_more(tmp_path: Path) -> None:
    row = {"a": "x", "more": 1, "b": None}
    kept = Schema(required={"a": str}, optional={"b": str}, closed=False)
    assert list(checked([row], kept, tmp_path, SOURCE)) == [{"a": "x", "more": 1}]


def test_a_csv_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('﻿a,b\n1,"x\ny"\n', encoding="utf-8")
    assert read_csv(tmp_path / "a.csv", SOURCE) == [{"a": "1", "b": "x\ny"}]


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"a,b\n1,\xff\n"), ("a.json", b'["\xff"]')])
def test_a_file_in_another_encoding_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="not UTF-8"):
        read_csv(tmp_path / name, SOURCE) if name.endswith("csv") else read_json(tmp_path / name, SOURCE, list)


def test_a_field_that_is_too_long_for_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000 + "\n")
    with pytest.raises(DataError, match="not CSV"):
        read_csv(tmp_path / "a.csv", SOURCE)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "one\u2028line"}\r\n{"a": "two"}\n', encoding="utf-8", newline="")
    assert read_lines(tmp_path / "a.jsonl", SOURCE) == [{"a": "one\u2028line"}, {"a": "two"}]


def test_a_missing_file_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / "no.json", SOURCE, list)
    assert (caught.value.where, caught.value.fix) == (str(tmp_path / "no.json"), "get it there")


@pytest.mark.parametrize(
    "name", ["/tmp/a.mp4", "a/../../b.mp4", "a//b.mp4", "a/./b.mp4", "a\0.mp4", "a" * 252 + ".mp4"]
)
def test_names_that_leave_the_folder_or_do_not_exist_are_refused(name: str, tmp_path: Path) -> None:
    check_drafts([Draft("x", "t2v", "a", "a/b.mp4", ())], tmp_path, SOURCE)
    with pytest.raises(DataError, match="cannot be called"):
        check_drafts([Draft("x", "t2v", "a", name, ())], tmp_path, SOURCE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_counts_upright(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_image(path, torch.zeros(3, 1, 32, 48, dtype=torch.uint8))
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
    assert upright_size(path.read_bytes(), "") == tuple(read_image(path).pixels.shape[2:])
