"""Small files in the formats of official benchmarks: as many entries as there have to be, of no meaning."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.quality.official import dpg, five, gedit, geneval, imgedit, opens2v, openve, rise, wise
from benchmarks.quality.official.bernini_bench import CATEGORIES
from bernini.media import encode_image, write_image, write_video

Rows = list[dict[str, Any]]
CLIP_SIZE, CLIP_FRAMES, CLIP_FPS = (40, 64), 14, 24.0
PICTURE_SIZE = (48, 80)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def dump_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dump_csv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def place(root: Path, names: Iterable[str]) -> None:
    """The same clip, or the same picture, under many names."""
    for name in dict.fromkeys(names):
        path = root / name
        first = root / f"any{path.suffix}"
        if not first.exists():
            root.mkdir(parents=True, exist_ok=True)
            noise = torch.Generator().manual_seed(0)
            if path.suffix == ".mp4":
                pixels = torch.randint(256, (3, CLIP_FRAMES, *CLIP_SIZE), generator=noise, dtype=torch.uint8)
                write_video(first, pixels, CLIP_FPS)
            else:
                write_image(first, torch.randint(256, (3, 1, *PICTURE_SIZE), generator=noise, dtype=torch.uint8))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            os.link(first, path)


def kinds(counts: dict[str, int]) -> list[str]:
    return [kind for kind, number in counts.items() for _ in range(number)]


def vbench(root: Path) -> None:
    numbers = count()
    shared: list[tuple[int, Sequence[str]]] = [
        (72, ("subject_consistency", "dynamic_degree", "motion_smoothness")),
        (86, ("scene", "background_consistency")),
        (93, ("overall_consistency", "aesthetic_quality", "imaging_quality")),
        (75, ("temporal_flickering",)),
        *((79, (d,)) for d in ("object_class",)),
        (82, ("multiple_objects",)),
        (85, ("color",)),
        (84, ("spatial_relationship",)),
        (90, ("appearance_style",)),
        *((100, (d,)) for d in ("human_action", "temporal_style")),
    ]
    rows: Rows = [
        {"prompt_en": f"a thing, {next(numbers)}", "dimension": [*dimensions]}
        for number, dimensions in shared
        for _ in range(number)
    ]
    styled = next(row for row in rows if row["dimension"] == ["appearance_style"])
    styled["auxiliary_info"] = {"appearance_style": {"appearance_style": "oil painting"}}
    overall = next(row for row in rows if "overall_consistency" in row["dimension"])
    overall["prompt_en"] = styled["prompt_en"]  # as two prompts do that come twice
    dump(root / "VBench_full_info.json", rows)


def vbench_i2v(root: Path) -> None:
    quality = ["aesthetic_quality", "imaging_quality", "temporal_flickering"]
    moving = ["i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree", *quality]
    still = ["i2v_background", "background_consistency", *quality]
    rows: Rows = []
    for number in range(246 + 109):
        name, dimensions = f"a view, {number}", still if number < 109 else moving
        about = {"image_type": "scenery" if number < 109 else "animal", "image_name": f"{name}.jpg"}
        rows.append({"prompt_en": name, "dimension": dimensions, **about})
        turns = ("pans left", "pans right", "tilts up", "tilts down", "zooms in", "zooms out", "static")
        for turn in turns if number < 109 else ():
            rows.append({"prompt_en": f"{name}, camera {turn}", "dimension": ["camera_motion"], **about})
    dump(root / "vbench2_i2v_full_info.json", rows)
    place(root, (f"crop/16-9/{row['image_name']}" for row in rows))


def vbench2(root: Path) -> None:
    from benchmarks.quality.official.vbench2 import PER_DIMENSION

    rows: Rows = [
        {"prompt_en": f"a thing, {number}" + " and on" * 40, "dimension": [dimension]}
        for number, dimension in enumerate(kinds(PER_DIMENSION))
    ]
    rows[-1]["prompt_en"] = rows[-2]["prompt_en"]
    rows[0]["auxiliary_info"] = {"question": ["A lion"], "judge": [True]}
    dump(root / "vbench2" / "VBench2_full_info.json", rows)


def opens2v_files(root: Path) -> None:
    for domain, (name, number) in opens2v.FILES.items():
        named = kinds(opens2v.KINDS) if domain == "open" else ["singleface", "singlehuman"] * (number // 2)
        content = {
            f"{kind}_{i + 1}": {
                "img_paths": [f"Images/{kind}/{n}.jpg" for n in range(1 + i % 3)],
                "prompt": f"{kind} {i} moves",
                "synthesis_flag": "False",
                "class_label": ["man"] * (1 + i % 3),
            }
            for i, kind in enumerate(named)
        }
        dump(root / name, content)
        place(root, (path for row in content.values() for path in row["img_paths"]))


def openve_files(root: Path) -> None:
    each = {kind: 54 for kind in openve.TYPES} | {"global_style": 53}
    rows: Rows = [
        {
            "edited_type": kind,
            "prompt": f"change it, {i}",
            "original_video": f"OpenVE-Bench/videos/{i:04d}_{kind}_It's.mp4",
        }
        for i, kind in enumerate(kinds(each))
    ]
    dump_csv(root / "benchmark_videos.csv", rows)
    place(root, (row["original_video"].removeprefix("OpenVE-Bench/") for row in rows))


def editverse(root: Path) -> None:
    told = {
        "direction": "horizontal",
        "target_prompt": "a woman with a crown",
        "source_prompt": "a woman",
        "<video1> link": "https://pixabay.com/videos/1/",
    }
    content = {
        "0": {"<text>": "<video1> Add a golden crown.", "<video1>": "videos/1.mp4", "type": "add object", **told},
        "1": {
            "<text>": "<video1><image1> Put the hat of <image1> on the woman in <video1>.",
            "<video1>": "videos/1.mp4",
            "<image1>": "images/hat.png",
            "type": "reference insertion",
            **told,
        },
        "2": {
            "<text>": "Fill <video1> where <video2> is white.",
            "<video1>": "inpaint_video_and_masks/1.mp4",
            "<video2>": "inpaint_video_and_masks/1_mask.mp4",
            "type": "inpainting",
            **told,
        },
    }
    dump(root / "test.json", content)
    place(root, (path for row in content.values() for tag, path in row.items() if path.endswith((".mp4", ".png"))))


def five_files(root: Path) -> None:
    for kind, (_, number) in enumerate(five.ENTRIES, 1):
        rows: Rows = []
        for i in range(number):
            video, target = f"{i:04d}_bus", f"a [red] bus on the road, number {i} of many"
            questions = dict.fromkeys(five.QUESTIONS, "Is the bus red?") if kind < 6 or i else {}
            rows.append(
                {
                    "video_name": video,
                    "editing_type_id": str(kind),
                    "source_prompt": f"a [blue] bus, number {i}",
                    "target_prompt": target,
                    "save_dir": f"{kind}_{'x' * 30}",
                    **questions,
                }
            )
            place(root, (f"images/{video}/00001.jpg", f"bmasks/{video}/00001.jpg", f"videos/{video}.mp4"))
        dump(root / "edit_prompt" / f"edit{kind}_FiVE.json", rows)


def ivebench(root: Path) -> None:
    rows: Rows = [
        {
            "id": i,
            "src_video_name": f"clip {i}.mp4",
            "category": "style_editing",
            "subcategory": "quantity change" if i % 2 else "cartoon",
            "source_prompt": "a dog",
            "edit_prompt": f"make it {i} dogs",
            "target_prompt": "dogs",
            "target_phrase": "dogs",
            "target_span": None,
        }
        for i in range(4)
    ]
    dump(root / "prompts.json", rows)
    place(root, (f"videos/{row['src_video_name']}" for row in rows))


def bernini_bench(root: Path) -> None:
    rows: Rows = [
        {"id": f"v-{i}", "category": category, "instruction": f"do {i}", "video": "clips/a.mp4"}
        for i, category in enumerate(CATEGORIES)
    ]
    rows.insert(1, {**rows[0], "id": "rv-0", "images": ["refs/a.png", "refs/b.png"]})
    dump_lines(root / "prompts.jsonl", rows)
    place(root, ("clips/a.mp4", "refs/a.png", "refs/b.png"))


def gedit_files(root: Path) -> None:
    noise = torch.randint(256, (3, 1, *PICTURE_SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [
        {
            "task_type": group,
            "key": f"{n:032x}",
            "instruction": f"{language} edit {n}",
            "instruction_language": language,
            "Intersection_exist": n % 2 == 0,
            "input_image": {"bytes": b"small", "path": None},
            # The picture of row n is n pixels narrower, so that rows cannot be mistaken for one another.
            "input_image_raw": {"bytes": encode_image(noise[..., : PICTURE_SIZE[1] - n]), "path": None},
        }
        for n, group in enumerate(gedit.GROUPS)
        for language in ("en", "cn")
    ]
    (root / "data").mkdir(parents=True, exist_ok=True)
    for part, own in enumerate((rows[:15], rows[15:])):
        path = root / "data" / f"train-{part:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(own), path, row_group_size=4)


def imgedit_files(root: Path) -> None:
    content = {
        str(1000 + i): {"id": f"animal/{i:09d}.jpg", "prompt": f"edit {i}", "edit_type": kind}
        for i, kind in enumerate(kinds(imgedit.PER_TYPE))
    }
    dump(root / "basic_edit.json", content)
    hard = {str(i + 1): {"id": f"{i:09d}.jpg", "prompt": f"edit {i}"} for i in range(imgedit.UGE)}
    dump(root / "UGE" / "UGE_edit.json", hard)
    place(root, (*(row["id"] for row in content.values()), *(f"UGE/{row['id']}" for row in hard.values())))


def geneval_files(root: Path) -> None:
    rows: Rows = [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of a bench {i}"}
        for i, tag in enumerate(kinds(geneval.PER_TAG))
    ]
    rows[-1]["exclude"] = [{"class": "bench", "count": 2}]
    dump_lines(root / "prompts" / "evaluation_metadata.jsonl", rows)


def dpg_files(root: Path) -> None:
    rows: Rows = []
    for i in range(dpg.ITEMS):
        for question in (1, 2):
            row = {"item_id": f"item{i}", "text": f"a long text, {i}", "keywords": "", "proposition_id": question}
            row |= {
                "dependency": "0" if question == 1 else "1",
                "category_broad": "entity",
                "category_detailed": "whole",
            }
            rows.append(row | {"tuple": f"entity - whole (a{question})", "question_natural_language": "Is it there?"})
    dump_csv(root / "dpg_bench" / "dpg_bench.csv", rows)


def wise_files(root: Path) -> None:
    bounds = {"data_verified/{}_verified.json": (0, 400, 640, 1000), "WISE_legacy/data/{}.json": (0, 400, 700, 1000)}
    for pattern, ends in bounds.items():
        for stem, first, last in zip(wise.STEMS, ends[:-1], ends[1:], strict=True):
            rows = [
                {
                    "prompt_id": n,
                    "Prompt": f"something, {n}",
                    "Explanation": "known",
                    "Category": stem,
                    "Subcategory": "any",
                }
                for n in range(first + 1, last + 1)
            ]
            dump(root / pattern.format(stem), rows)


def rise_files(root: Path) -> None:
    rows: Rows = []
    for i, category in enumerate(kinds(rise.PER_CATEGORY)):
        image = f"{category}_images/{i}.png"
        row: dict[str, Any] = {"index": f"{category}_{i}", "category": category, "instruction": "what follows?"}
        rows.append({**row, "image": image, "reference": "this", "subtask": "any", "consistency_free": None})
    rows[0]["consistency_free"] = True
    dump(root / rise.FILE, rows)
    place(root, (f"data/{row['image']}" for row in rows))


WRITERS: dict[str, Callable[[Path], None]] = {
    "vbench": vbench,
    "vbench_i2v": vbench_i2v,
    "vbench2": vbench2,
    "opens2v": opens2v_files,
    "openve": openve_files,
    "editverse": editverse,
    "five": five_files,
    "ivebench": ivebench,
    "bernini_bench": bernini_bench,
    "gedit": gedit_files,
    "imgedit": imgedit_files,
    "geneval": geneval_files,
    "dpg": dpg_files,
    "wise": wise_files,
    "wise_legacy": wise_files,
    "rise": rise_files,
}
