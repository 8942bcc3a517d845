"""Tables give the samples that other layouts give; what is wrong in one is told by line, and the rest is kept."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from cogtune.commands import train, validate
from cogtune.config.choices import DataFormat
from cogtune.config.resolving import resolve
from cogtune.data.cache.index import CacheKeySettings, make_index
from cogtune.data.cache.store import Store
from cogtune.data.findings import FINDINGS
from cogtune.data.frames import FrameSettings
from cogtune.data.layouts.base import Layout
from cogtune.data.layouts.datasets_library import DATASETS
from cogtune.data.sources import LAYOUTS, Dataset, LayoutOptions, locate_dataset, read_dataset
from cogtune.encoding.jobs import prepare
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError
from tests.conftest import Cogtune

CAPTIONS = (
    "A cat, asleep.",
    'He says "hello, you", and goes.',
    "Two lines,\nof one caption.",
    "“Très” café — 猫 🐈\u2028 naïve",
    "back\\slash and a, comma",
)
ROWS = [{"file_name": f"clips/{number}.mp4", "prompt": caption} for number, caption in enumerate(CAPTIONS)]


def with_clips(root: Path, count: int = len(CAPTIONS)) -> Path:
    (root / "clips").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / "clips" / f"{number}.mp4").write_bytes(b"")
    return root


def delimited(rows: Sequence[Mapping[str, Any]], delimiter: str = ",", newline: str = "\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().replace("\n", newline).encode()


def json_lines(rows: Sequence[Mapping[str, Any]], newline: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


MAKERS: dict[str, Callable[[Sequence[Mapping[str, Any]]], bytes]] = {
    "csv": delimited,
    "tsv": lambda rows: delimited(rows, "\t"),
    "jsonl": json_lines,
    "parquet": parquet,
}


def table(root: Path, content: str | bytes, name: str = "metadata.csv") -> Path:
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def told(dataset: Dataset) -> list[tuple[str, str]]:
    return [(found.code, found.where) for found in dataset.findings]


# ------------------------------------------------------------------------------------------------ every format

MARK = b"\xef\xbb\xbf"

FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "csv": ("metadata.csv", lambda: delimited(ROWS)),
    "csv-mark-crlf": ("metadata.csv", lambda: MARK + delimited(ROWS, newline="\r\n")),
    "csv-other-name": ("clips.CSV", lambda: delimited(ROWS)),
    "tsv": ("metadata.tsv", lambda: delimited(ROWS, "\t")),
    "jsonl": ("metadata.jsonl", lambda: json_lines(ROWS)),
    "jsonl-mark-crlf": ("metadata.jsonl", lambda: MARK + json_lines(ROWS, newline="\r\n")),
    "parquet": ("metadata.parquet", lambda: parquet(ROWS)),
}


@pytest.mark.parametrize("case", FILES)
def test_a_table_gives_its_samples(tmp_path: Path, case: str) -> None:
    name, make = FILES[case]
    dataset = read_dataset(table(with_clips(tmp_path), make(), name))
    assert dataset.layout == f"{name}: file_name, prompt"
    assert dataset.findings == ()
    assert [(sample.id, sample.video, sample.caption, sample.image) for sample in dataset.samples] == [
        (f"clips/{number}", tmp_path / f"clips/{number}.mp4", caption, None) for number, caption in enumerate(CAPTIONS)
    ]


@pytest.mark.parametrize("suffix", MAKERS)
def test_images_are_a_column_that_may_have_gaps(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "Image Path": image} for row, image in zip(ROWS[:2], ("a.png", None), strict=True)]
    dataset = read_dataset(table(with_clips(tmp_path), MAKERS[suffix](rows), f"metadata.{suffix}"))
    assert dataset.layout == f"metadata.{suffix}: file_name, prompt, Image Path"
    assert [sample.image for sample in dataset.samples] == [tmp_path / "a.png", None]
    assert told(dataset) == [("missing-image", "clips/0")]


def test_a_text_in_parquet_may_be_a_dictionary(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"file_name": ["clips/0.mp4", "clips/1.mp4"], "prompt": pyarrow.array(["a b", None]).dictionary_encode()}
    pyarrow.parquet.write_table(pyarrow.table(columns), with_clips(tmp_path) / "x.parquet")
    dataset = read_dataset(tmp_path)
    assert [sample.caption for sample in dataset.samples] == ["a b"]
    assert told(dataset) == [("missing-value", "x.parquet:2")]
    assert dataset.findings[0].message == "row 2 has no caption: its 'prompt' is missing"


STEAMBOAT = Path(__file__).parents[3] / "shared" / "data" / "steamboat"
"""Five real clips that may lie beside the project; it contains none itself."""


@pytest.mark.skipif(not STEAMBOAT.is_dir(), reason="the folder of real clips, ../shared/data/steamboat, is not here")
def test_real_clips_have_the_same_keys_in_three_layouts(tmp_path: Path) -> None:
    videos = (STEAMBOAT / "videos.txt").read_text().splitlines()
    captions = (STEAMBOAT / "prompts.txt").read_text().splitlines()
    rows = [{"file_name": video, "prompt": caption} for video, caption in zip(videos, captions, strict=True)]
    for name in ("jsonl", "sidecar"):
        shutil.copytree(STEAMBOAT / "videos", tmp_path / name / "videos")
    table(tmp_path / "jsonl", json_lines(rows), "metadata.jsonl")
    for row in rows:
        (tmp_path / "sidecar" / row["file_name"]).with_suffix(".txt").write_text(row["prompt"])
    recipe = CacheKeySettings(
        frames=FrameSettings(size=Size(49, 480, 720), fps=8),
        vae="vae",
        text="text",
        max_tokens=226,
        dtype="bf16",
        id_token="",
        with_image=True,
    )
    made = []
    for root in (STEAMBOAT, tmp_path / "jsonl", tmp_path / "sidecar"):
        dataset = read_dataset(root)
        assert [found for found in dataset.findings if found.severity == "error"] == []
        made.append(make_index(Store(tmp_path / "cache"), dataset.samples, recipe))
    assert len({row.latents for row in made[0].rows}) == len({row.text for row in made[0].rows}) == 5
    assert {index.null_text for index in made} == {made[0].null_text}
    by_id = [{row.id: row for row in index.rows} for index in made]  # sidecar is sorted by name, lists are by line
    assert by_id[0] == by_id[1] == by_id[2]


def test_the_same_clips_have_the_same_keys_in_every_layout(
    tmp_path: Path, clips: Path, tiny: Callable[[str], Path]
) -> None:
    videos = (clips / "videos.txt").read_text().splitlines()[:3]
    captions = (clips / "prompts.txt").read_text().splitlines()[:3]
    rows = [{"path": video, "caption": caption} for video, caption in zip(videos, captions, strict=True)]
    lists = {"prompts.txt": "\n".join(captions).encode(), "videos.txt": "\n".join(videos).encode()}
    sidecar = {Path(row["path"]).with_suffix(".txt").as_posix(): row["caption"].encode() for row in rows}
    model = tiny("2b")
    keys = {}
    for name, files in {
        "lists": lists,
        "csv": {"metadata.csv": delimited(rows, newline="\r\n")},
        "jsonl": {"metadata.jsonl": json_lines(rows)},
        "parquet": {"metadata.parquet": parquet(rows)},
        "sidecar": sidecar,
    }.items():
        root = tmp_path / name
        for video in videos:
            (root / video).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clips / video, root / video)
        for path, content in files.items():
            (root / path).write_bytes(content)
        config = resolve(preset_name="cpu-lora-tiny", flags={"data": root}).config.with_absolute_paths()
        dataset = read_dataset(root)
        assert dataset.findings == ()
        keys[name] = prepare(config, read_spec(model), model, dataset).index
    assert len({row.latents for row in keys["lists"].rows}) == 3
    assert len(set(keys.values())) == 1


# ------------------------------------------------------------------------------------------------- columns


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    rows = [{"text": "no", "file": "no.mp4", "alt": "yes", "clip path": "clips/0.mp4", "still": "clips/1.mp4"}]
    reading = LayoutOptions(caption_column="alt", video_column="clip path", image_column="still")
    dataset = read_dataset(table(with_clips(tmp_path), delimited(rows)), reading)
    assert dataset.layout == "metadata.csv: clip path, alt, still"
    (sample,) = dataset.samples
    assert (sample.id, sample.caption, sample.image) == ("clips/0", "yes", tmp_path / "clips/1.mp4")


def test_the_first_of_the_usual_names_wins(tmp_path: Path) -> None:
    rows = [{"Text": "no", "Caption": "yes", "path": "no.mp4", "File-Name": "clips/0.mp4"}]
    dataset = read_dataset(table(with_clips(tmp_path), delimited(rows)))
    assert dataset.layout == "metadata.csv: File-Name, Caption"
    assert [sample.caption for sample in dataset.samples] == ["yes"]


@pytest.mark.parametrize(
    ("header", "reading", "problems"),
    [
        (
            "file_name,promt",
            LayoutOptions(),
            ["no column is named like a caption column (prompt, caption, text, description); did you mean 'promt'?"],
        ),
        (
            "file_name,prompt",
            LayoutOptions(caption_column="Promt", image_column="picture"),
            ["no such column: 'Promt'; did you mean 'prompt'?", "no such column: 'picture'"],
        ),
        ("file_name,text,text", LayoutOptions(), ["there are 2 columns 'text'"]),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(
    tmp_path: Path, header: str, reading: LayoutOptions, problems: list[str]
) -> None:
    with pytest.raises(CogtuneError, match=r"^cannot choose columns of metadata\.csv: 'file_name'") as caught:
        read_dataset(table(tmp_path, f"{header}\n"), reading)
    assert list(caught.value.details) == problems
    assert "--caption-column" in caught.value.hint


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_delimiters_are_recognised(tmp_path: Path, mark: str, name: str) -> None:
    content = f'file_name{mark}text\nclips/0.mp4{mark}"a, b{mark} c"\n'
    dataset = read_dataset(table(with_clips(tmp_path, 1), content))
    assert [sample.caption for sample in dataset.samples] == [f"a, b{mark} c"]
    assert [found.message for found in dataset.findings] == [f"read as delimited by {name}, not by commas"]


def test_a_table_without_names_of_columns_is_told(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match=r"cannot choose columns of .*: 'clips/0.mp4'") as caught:
        read_dataset(table(with_clips(tmp_path, 1), "clips/0.mp4,A caption.\n"))
    assert caught.value.details[-1] == "its first row is a sample: add a row with the names of the columns above it"


def test_a_column_flag_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(CogtuneError, match=r"--video-column requires a table, but .* is read as lists"):
        read_dataset(tmp_path, LayoutOptions(video_column="x"))


def test_clips_inside_a_parquet_file_are_told(tmp_path: Path) -> None:
    rows = [{"video": {"bytes": b"", "path": "a.mp4"}, "text": "a"}]
    with pytest.raises(CogtuneError, match="does not contain paths and captions as text") as caught:
        read_dataset(table(tmp_path, parquet(rows), "train.parquet"))
    assert caught.value.details == ("'video' contains struct<bytes: binary, path: string>",)


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    data = parquet(ROWS)
    for damaged in (b"", b"PAR1", data[:-20], data[20:], data[:200] + b"\xff" * 50 + data[250:]):
        with pytest.raises(CogtuneError, match=r"cannot read .*metadata\.parquet"):
            read_dataset(table(tmp_path, damaged, "metadata.parquet"))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CogtuneError, match="requires pyarrow, which is not installed") as caught:
        read_dataset(table(tmp_path, b"", "metadata.parquet"))
    assert caught.value.hint == "run `pip install 'cogtune[parquet]'`"


# ------------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_of_csv_are_told_and_the_others_stay(tmp_path: Path) -> None:
    content = (
        b"file_name,text\n"
        b'clips/0.mp4,"two\nlines"\n'
        b"clips/1.mp4,one,two\n"
        b"\n"
        b" ,no path\n"
        b"clips/1.mp4,caf\xe9\n"
        b'clips/2.mp4,"quoted" and more\n'
        b"clips/3.mp4,\n"
        b'clips/4.mp4,"never closed\n'
        b"clips/1.mp4,after it\n"
    )
    dataset = read_dataset(table(with_clips(tmp_path), content))
    assert [(sample.id, sample.caption) for sample in dataset.samples] == [
        ("clips/0", "two\nlines"),
        ("clips/3", ""),
        ("clips/1", "after it"),
    ]
    assert sorted(told(dataset)) == [
        ("bad-row", "metadata.csv:10"),
        ("bad-row", "metadata.csv:4"),
        ("bad-row", "metadata.csv:8"),
        ("missing-value", "metadata.csv:6"),
        ("not-utf8", "metadata.csv:7"),
    ]
    messages = {found.where: found.message for found in dataset.findings}
    assert messages["metadata.csv:4"] == "line 4 has 3 values, but there are 2 columns"
    assert messages["metadata.csv:6"] == "line 6 has no video: its 'file_name' is empty"
    assert messages["metadata.csv:7"] == "byte 16 of line 7, 0xe9, is not UTF-8"
    assert messages["metadata.csv:10"] == "line 10 cannot be read: unexpected end of data"


def test_bad_rows_of_json_lines_are_told_and_the_others_stay(tmp_path: Path) -> None:
    rows: list[str | bytes] = [
        '{"file_name": "clips/0.mp4", "text": "fine", "more": [1, 2]}',
        '{"file_name": "clips/1.mp4", "text": ',
        "",
        "[1, 2]",
        '{"file_name": "clips/1.mp4", "text": null}',
        '{"text": "no path"}',
        '{"file_name": "clips/1.mp4", "text": 7}',
        '{"file_name": "clips/1.mp4", "text": "half \\ud83d"}',
        b'{"file_name": "clips/1.mp4", "text": "caf\xe9"}',
        "[" * 100_000,
        '{"file_name": ["clips/1.mp4"], "text": {"en": "a"}}',
        '{"file_name": "clips/4.mp4", "text": "fine too"}',
    ]
    content = b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows)
    dataset = read_dataset(table(with_clips(tmp_path), content, "metadata.jsonl"))
    assert [(sample.id, sample.caption) for sample in dataset.samples] == [("clips/0", "fine"), ("clips/4", "fine too")]
    assert sorted(told(dataset), key=lambda item: int(item[1].split(":")[1])) == [
        ("bad-row", "metadata.jsonl:2"),
        ("bad-row", "metadata.jsonl:4"),
        ("missing-value", "metadata.jsonl:5"),
        ("missing-value", "metadata.jsonl:6"),
        ("bad-row", "metadata.jsonl:7"),
        ("not-utf8", "metadata.jsonl:8"),
        ("not-utf8", "metadata.jsonl:9"),
        ("bad-row", "metadata.jsonl:10"),
        ("bad-row", "metadata.jsonl:11"),
        ("bad-row", "metadata.jsonl:11"),
    ]
    messages = [found.message for found in dataset.findings]
    assert "the 'text' of line 7 is a number, not a string" in messages
    assert "the 'file_name' of line 11 is a list, not a string" in messages


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_empty_tables_are_told(tmp_path: Path, name: str) -> None:
    assert told(read_dataset(table(tmp_path, "\n \n", name))) == [("no-samples", str(tmp_path))]


def test_a_header_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert told(read_dataset(table(tmp_path, b"file_name,caf\xe9\na,b\n"))) == [("not-utf8", "metadata.csv:1")]
    assert told(read_dataset(table(tmp_path, b'"file_name"x,text\na,b\n'))) == [("bad-row", "metadata.csv:1")]


def test_ten_thousand_broken_quotes_are_read_in_no_time(tmp_path: Path) -> None:
    content = "file_name,text\n" + 'clips/0.mp4,"open and\n' * 10_000
    dataset = read_dataset(table(with_clips(tmp_path), content))
    assert {code for code, _ in told(dataset)} == {"bad-row"}
    assert 5_000 <= len(dataset.findings) <= 10_000


# ------------------------------------------------------------------------------------------- which one is read


def test_several_tables_have_to_be_chosen_from(tmp_path: Path) -> None:
    with_clips(tmp_path)
    table(tmp_path, delimited(ROWS[:1]), "a.csv")
    table(tmp_path, delimited(ROWS[:2]), "b.csv")
    table(tmp_path, json_lines(ROWS[:3]), "c.jsonl")
    with pytest.raises(CogtuneError, match=r"contains several tables: a\.csv, b\.csv and c\.jsonl") as caught:
        read_dataset(tmp_path)
    assert "use --format csv or jsonl" in caught.value.hint
    assert "metadata.csv" in caught.value.hint
    with pytest.raises(CogtuneError, match=r"several tables: a\.csv and b\.csv"):
        read_dataset(tmp_path, LayoutOptions(format="csv"))
    assert len(read_dataset(tmp_path, LayoutOptions(format="jsonl")).samples) == 3
    table(tmp_path, delimited(ROWS[:4]), "metadata.csv")
    assert len(read_dataset(tmp_path).samples) == 4
    assert len(read_dataset(tmp_path, LayoutOptions(format="jsonl")).samples) == 3
    with pytest.raises(CogtuneError, match=r"no \.tsv file in"):
        read_dataset(tmp_path, LayoutOptions(format="tsv"))


@pytest.fixture
def every_layout(tmp_path: Path) -> Path:
    """A folder in all layouts at once; captions say which was read."""
    root = with_clips(tmp_path, 1)
    (root / "clips/0.txt").write_text("sidecar")
    (root / "prompts.txt").write_text("lists")
    (root / "videos.txt").write_text("clips/0.mp4")
    for name, make in MAKERS.items():
        table(root, make([{"file_name": "clips/0.mp4", "text": name}]), f"metadata.{name}")
    return root


@pytest.mark.parametrize("name", [name for layout in LAYOUTS if layout is not DATASETS for name in layout.formats])
def test_the_user_chooses_the_layout(every_layout: Path, name: DataFormat) -> None:
    dataset = read_dataset(every_layout, LayoutOptions(format=name))
    assert [sample.caption for sample in dataset.samples] == [name]
    strays = ["prompts.txt", "videos.txt"] if name == "sidecar" else []
    assert told(dataset) == [("stray-caption", stray) for stray in strays]


def test_lists_then_tables_then_captions_beside_clips(every_layout: Path) -> None:
    def captions() -> list[str]:
        return [sample.caption for sample in read_dataset(every_layout).samples]

    assert captions() == ["lists"]
    assert [found.message for found in read_dataset(every_layout).findings] == [
        "read as lists; it could also be read as table",
        "read as lists; it could also be read as sidecar captions",
    ]
    for name in ("prompts.txt", "videos.txt", "metadata.tsv", "metadata.jsonl", "metadata.parquet"):
        (every_layout / name).unlink()
    assert captions() == ["csv"]
    assert [found.hint for found in read_dataset(every_layout).findings] == ["use --format sidecar for that"]
    (every_layout / "metadata.csv").unlink()
    assert captions() == ["sidecar"]
    assert read_dataset(every_layout).findings == ()


def test_lists_that_are_asked_for_and_not_there(tmp_path: Path) -> None:
    dataset = read_dataset(table(tmp_path, delimited(ROWS)), LayoutOptions(format="lists"))
    assert told(dataset) == [("missing-list", "prompts.txt"), ("missing-list", "videos.txt")]
    assert dataset.findings[0].message == "prompts.txt does not exist"


def test_every_format_has_one_layout() -> None:
    formats = [name for layout in LAYOUTS for name in layout.formats]
    assert sorted(formats) == sorted(get_args(DataFormat))
    assert all(isinstance(layout, Layout) for layout in LAYOUTS)


# ------------------------------------------------------------------------------------------ outside the folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return with_clips(tmp_path / "outside", 2)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "videos.txt"])
def test_paths_that_leave_are_refused_unless_allowed(tmp_path: Path, outside: Path, name: str) -> None:
    root = with_clips(tmp_path / "data", 1)
    (root / "link.mp4").symlink_to(outside / "clips/1.mp4")
    paths = ["clips/0.mp4", str(outside / "clips/0.mp4"), "../outside/clips/1.mp4", "link.mp4", "/", ".."]
    rows = [{"file_name": path, "text": "a b"} for path in paths]
    if name == "videos.txt":
        (root / "prompts.txt").write_text("a b\n" * len(paths))
        table(root, "\n".join(paths), name)
    else:
        table(root, MAKERS[name.split(".")[1]](rows), name)
    first = 2 if name == "metadata.csv" else 1
    refused = read_dataset(root)
    assert [sample.id for sample in refused.samples] == ["clips/0"]
    assert told(refused) == [
        *(("outside-folder", f"{name}:{first + index}") for index in (1, 2, 3)),
        *(("bad-path", f"{name}:{first + index}") for index in (4, 5)),
    ]
    assert all("--allow-outside" in found.hint for found in refused.findings[:3])
    allowed = read_dataset(root, LayoutOptions(allow_outside=True))
    assert told(allowed) == [("bad-path", f"{name}:{first + index}") for index in (4, 5)]
    assert [sample.video.resolve() for sample in allowed.samples] == [
        root / "clips/0.mp4",
        *(outside / f"clips/{number}.mp4" for number in (0, 1, 1)),
    ]
    assert allowed.samples[1].id == str(outside / "clips/0")


def test_links_beside_captions_are_followed_when_allowed(tmp_path: Path, outside: Path) -> None:
    for number in (0, 1):
        (outside / f"clips/{number}.txt").write_text(f"number {number}")
    root = tmp_path / "data"
    root.mkdir()
    (root / "linked").symlink_to(outside)
    (outside / "loop").symlink_to(root)
    (outside / "clips" / "again").symlink_to(outside)
    with pytest.raises(CogtuneError, match="is not a dataset"):
        read_dataset(root)
    dataset = read_dataset(root, LayoutOptions(allow_outside=True))
    assert [(sample.id, sample.caption) for sample in dataset.samples] == [
        ("linked/clips/0", "number 0"),
        ("linked/clips/1", "number 1"),
    ]
    (root / "a.mp4").symlink_to(outside / "clips/0.mp4")
    (root / "a.txt").write_text("linked itself")
    assert told(read_dataset(root)) == [("outside-folder", "a.mp4")]
    assert len(read_dataset(root, LayoutOptions(allow_outside=True)).samples) == 3


# ------------------------------------------------------------------------------------------------- damaged files


def damaged(data: bytes, chance: random.Random) -> bytes:
    """``data`` with bytes flipped, cut out or copied to another place."""
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(data) + 1)
        end = min(len(data), begin + chance.randint(1, 40))
        kind = chance.choice(("flip", "cut", "splice", "end"))
        if kind == "flip":
            flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in data[begin:end])
            data = data[:begin] + flipped + data[end:]
        elif kind == "cut":
            data = data[:begin] + data[end:]
        elif kind == "splice":
            place = chance.randrange(len(data) + 1)
            data = data[:place] + data[begin:end] + data[place:]
        else:
            data = data[:begin] if chance.random() < 0.3 else data
    return data


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "metadata.jsonl", "prompts.txt", "videos.txt"])
def test_damaged_files_give_findings_and_never_a_crash(tmp_path: Path, name: str) -> None:
    whole = {
        "metadata.csv": delimited(ROWS),
        "metadata.tsv": delimited(ROWS, "\t", "\r\n"),
        "metadata.jsonl": json_lines(ROWS),
        "prompts.txt": "\n".join(caption.replace("\n", " ") for caption in CAPTIONS).encode(),
        "videos.txt": "\n".join(row["file_name"] for row in ROWS).encode(),
    }
    root = with_clips(tmp_path)
    if name.endswith(".txt"):
        for other in ("prompts.txt", "videos.txt"):
            table(root, whole[other], other)
    noticed = 0
    for seed in range(100):
        table(root, damaged(whole[name], random.Random(f"{name} {seed}")), name)
        try:
            dataset = read_dataset(root, LayoutOptions(allow_outside=seed % 2 == 0))
        except CogtuneError as error:
            noticed += 1
            str(error).encode()
            continue
        noticed += bool(dataset.findings)
        for found in dataset.findings:
            assert found.code in FINDINGS
            f"{found.where} {found.message} {found.hint}".encode()
        for sample in dataset.samples:
            f"{sample.id} {sample.caption}".encode()
    assert noticed >= (25 if name == "prompts.txt" else 60)


def test_damaged_captions_beside_clips_never_crash(tmp_path: Path) -> None:
    root = with_clips(tmp_path)
    codes = set()
    for seed in range(40):
        (root / "clips/0.txt").write_bytes(damaged("\n".join(CAPTIONS).encode(), random.Random(seed)))
        dataset = read_dataset(root)
        dataset.samples[0].caption.encode()
        codes |= {code for code, where in told(dataset) if where == "clips/0"}
    assert codes == {"not-utf8"}


# ------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads that only make the folder, each with its name; in an empty folder with an empty cache."""
    asked: list[str] = []

    def download(name: str, *, repo_type: str, local_dir: Path, allow_patterns: None) -> str:
        assert (repo_type, allow_patterns) == ("dataset", None)
        asked.append(name)
        table(with_clips(local_dir), delimited(ROWS))
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_dataset_on_the_hub_becomes_a_folder(tmp_path: Path, downloads: list[str]) -> None:
    folder = locate_dataset("user/name")
    assert downloads == ["user/name"]
    assert folder == tmp_path / "home/datasets/user--name"
    assert len(read_dataset(folder).samples) == len(CAPTIONS)
    assert locate_dataset("user/name", download=False) == folder
    assert downloads == ["user/name"]


@pytest.mark.parametrize("reference", ["data", "./user/name", "../user/name", "/a/b", "~/data", "a/b/c", "here/clips"])
def test_a_path_is_not_looked_for_on_the_hub(tmp_path: Path, downloads: list[str], reference: str) -> None:
    (tmp_path / "here").mkdir()
    assert locate_dataset(reference) == Path(reference).expanduser()
    assert downloads == []


def test_a_folder_comes_before_the_hub(tmp_path: Path, downloads: list[str]) -> None:
    (tmp_path / "user/name").mkdir(parents=True)
    assert locate_dataset("user/name") == Path("user/name")
    assert downloads == []


def test_a_dry_run_downloads_no_dataset(downloads: list[str]) -> None:
    with pytest.raises(CogtuneError, match="user/name is not on this machine"):
        train.prepare_run(resolve(flags={"data": "user/name"}), resume=None, overwrite=False, dry_run=True)
    assert downloads == []


def test_validate_downloads_what_it_is_asked_for(downloads: list[str]) -> None:
    report = validate.validate(resolve(flags={"data": "user/name"}).config)
    assert downloads == ["user/name"]
    assert report.counts["samples"] == len(CAPTIONS)


def test_without_the_hub_the_reference_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CogtuneError, match=r"no such folder: nobody/none; cannot download the dataset"):
        locate_dataset("nobody/none")
    with pytest.raises(CogtuneError, match=r"no such folder: a--b/c\.\.d; dataset"):
        locate_dataset("a--b/c..d")


# ---------------------------------------------------------------------------------------------------- the flags


@pytest.mark.e2e
def test_the_flags_reach_the_reader(tmp_path: Path, clips: Path, command: Cogtune) -> None:
    root = tmp_path / "data"
    root.mkdir()
    videos = [clips / line for line in (clips / "videos.txt").read_text().splitlines()[:2]]
    table(root, delimited([{"where": str(video), "says": "a clip of a disc"} for video in videos]), "x.csv")
    table(root, json_lines(ROWS), "x.jsonl")
    flags = ["--size", "9x64x96", "--fps", "8", "--json"]
    columns = ["--format", "csv", "--video-column", "where", "--caption-column", "says"]
    report = json.loads(command("dataset", "validate", root, *flags, *columns, "--allow-outside").out)
    assert (report["layout"], report["counts"]["samples"], report["ok"]) == ("x.csv: where, says", 2, True)
    refused = json.loads(command("dataset", "validate", root, *flags, *columns, status=1).out)
    assert [found["code"] for found in refused["findings"] if found["severity"] == "error"] == ["outside-folder"] * 2
