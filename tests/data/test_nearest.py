"""What is almost as documented is read, with a note of how; what is not plain is named as the nearest thing."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from cogtune.config.run_config import RunConfig
from cogtune.data.findings import Finding
from cogtune.data.frames import FrameSettings
from cogtune.data.prompts import choose_prompts
from cogtune.data.sources import Dataset, LayoutOptions, Sample, read_dataset
from cogtune.data.validation.checks import check_dataset
from cogtune.data.validation.quarantine import without_quarantined
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError, UsageError

COMPOSED = unicodedata.normalize("NFC", "videos/Zürich é.mp4")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def pairs(dataset: Dataset) -> list[tuple[str, str]]:
    return [(sample.video.relative_to(dataset.root).as_posix(), sample.caption) for sample in dataset.samples]


def notes(dataset: Dataset) -> list[tuple[str, str]]:
    assert all(found.code == "read-as" for found in dataset.findings), dataset.findings
    return [(found.where, found.message) for found in dataset.findings]


ROOT = "ROOT"

ALMOST: dict[str, tuple[dict[str, str], str, str, str]] = {
    "prompt.txt": (
        {"prompt.txt": "one\n", "videos.txt": "a.mp4\n", "a.mp4": ""},
        "a.mp4", "prompt.txt", "read as prompts.txt",
    ),
    "captions.txt and video.txt": (
        {"captions.txt": "one\n", "Videos.TXT": "a.mp4\n", "a.mp4": ""},
        "a.mp4", "captions.txt", "read as prompts.txt",
    ),
    "a.caption": (
        {"a.mp4": "", "a.caption": "one"},
        "a.mp4", ROOT, "captions read from .caption files, not .txt: a.caption",
    ),
    "a.TXT": (
        {"a.mp4": "", "a.TXT": "one"},
        "a.mp4", ROOT, "captions read from .TXT files, not .txt: a.TXT",
    ),
    "a.mp4.txt": (
        {"a.mp4": "", "a.mp4.txt": "one"},
        "a.mp4", ROOT, "captions read from the full names of their clips, such as a.mp4.txt: a.mp4.txt",
    ),
    "labels": (
        {"videos/x/a.mp4": "", "labels/x/a.txt": "one"},
        "videos/x/a.mp4", ROOT, "captions read from labels/, not from next to their clips: labels/x/a.txt",
    ),
    "captions below": (
        {"a.mp4": "", "captions/a.txt": "one"},
        "a.mp4", ROOT, "captions read from captions/, not from next to their clips: captions/a.txt",
    ),
    "array": (
        {"metadata.json": json.dumps([{"video": "a.mp4", "text": "one"}], indent=2), "a.mp4": ""},
        "a.mp4", "metadata.json", "JSON array read as a table with an item for each sample",
    ),
    "array in jsonl": (
        {"x.jsonl": json.dumps([{"video": "a.mp4", "text": "one"}]), "a.mp4": ""},
        "a.mp4", "x.jsonl", "JSON array read as a table with an item for each sample",
    ),
    "object of captions": (
        {"captions.json": '{"a.mp4": "one"}', "a.mp4": ""},
        "a.mp4", "captions.json", "JSON object read as a table with an entry for each clip",
    ),
    "object of objects": (
        {"x.json": '{"videos/a": {"caption": "one", "fps": 8}}', "videos/a.mp4": ""},
        "videos/a.mp4", "x.json", "JSON object read as a table with an entry for each clip",
    ),
    "JSON beside": (
        {"a.mp4": "", "a.json": '{"caption": " one", "width": 96}'},
        "a.mp4", ROOT, "captions read from .json files, not .txt: a.json",
    ),
    "no suffix": (
        {"metadata.csv": "video,text\nvideos/a.b,one\n", "videos/a.b.mp4": "", "videos/a.b.png": ""},
        "videos/a.b.mp4", "metadata.csv", "names found with a suffix, such as a.mp4 for a: videos/a.b.mp4",
    ),
    "sub-folder": (
        {"train/metadata.jsonl": '{"file_name": "a.mp4", "text": "one"}', "train/a.mp4": ""},
        "train/a.mp4", "train/metadata.jsonl", "table read from the folder train/, which its paths are relative to",
    ),
    "sub-folder, paths from above": (
        {"meta/metadata.csv": "file_name,text\nclips/a.mp4,one\n", "clips/a.mp4": ""},
        "clips/a.mp4", "meta/metadata.csv", "table read from the folder meta/, which its paths are relative to",
    ),
    "two splits": (
        {
            "train/metadata.csv": "file_name,text\na.mp4,one\n", "train/a.mp4": "",
            "test/metadata.csv": "file_name,text\nb.mp4,two\n",
        },
        "train/a.mp4", "train/metadata.csv",
        "table read from the folder train/, which its paths are relative to; test/metadata.csv is not read",
    ),
    "quotes": (
        {"prompts.txt": "one\n", "videos.txt": '"a b.mp4"\n', "a b.mp4": ""},
        "a b.mp4", "videos.txt", "paths read without the quotes around them: a b.mp4",
    ),
    "quotes in a table": (
        {"metadata.tsv": "file_name\ttext\n'a.mp4'\tone\n", "a.mp4": ""},
        "a.mp4", "metadata.tsv", "paths read without the quotes around them: a.mp4",
    ),
    "backslash": (
        {"prompts.txt": "one\n", "videos.txt": "videos\\a.mp4\n", "videos/a.mp4": ""},
        "videos/a.mp4", "videos.txt", "paths read with / in place of \\: videos/a.mp4",
    ),
    "case": (
        {"prompts.txt": "one\n", "videos.txt": "Videos/A.MP4\n", "videos/a.mp4": ""},
        "videos/a.mp4", "videos.txt", "paths found in different upper and lower case: videos/a.mp4",
    ),
    "blank before a quote": (
        {"metadata.csv": 'video, caption\na.mp4, "one"\n', "a.mp4": ""},
        "a.mp4", "metadata.csv", "read without the spaces before its quotes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALMOST)
def test_what_is_plainly_meant_is_read_and_told(tmp_path: Path, case: str) -> None:
    files, video, where, message = ALMOST[case]
    dataset = read_dataset(lay_out(tmp_path, files))
    assert pairs(dataset) == [(video, "one")]
    assert (where.replace(ROOT, str(tmp_path)), message) in notes(dataset)


def test_a_blank_before_a_quote_does_not_split_the_caption(tmp_path: Path) -> None:
    text = 'video, caption\na.mp4, "a red bar, moving left"\nb.mp4, a circle\n'
    dataset = read_dataset(lay_out(tmp_path, {"metadata.csv": text, "a.mp4": "", "b.mp4": ""}))
    assert pairs(dataset) == [("a.mp4", "a red bar, moving left"), ("b.mp4", "a circle")]


def test_quotes_behind_a_blank_stay_where_they_are_text(tmp_path: Path) -> None:
    text = 'video,caption\na.mp4, "hello" she said\nb.mp4,"one, ""two"" three"\n'
    dataset = read_dataset(lay_out(tmp_path, {"metadata.csv": text, "a.mp4": "", "b.mp4": ""}))
    assert pairs(dataset) == [("a.mp4", '"hello" she said'), ("b.mp4", 'one, "two" three')]
    assert dataset.findings == ()


def test_what_is_documented_comes_before_what_is_almost_so(tmp_path: Path) -> None:
    files = {"a.mp4": "", "a.txt": "beside", "sub/metadata.csv": "file_name,text\nx.mp4,no\n", "x.json": "[{}]"}
    dataset = read_dataset(lay_out(tmp_path, files))
    assert (dataset.layout, pairs(dataset), dataset.findings) == (
        "sidecar captions",
        [("a.mp4", "beside")],
        (),
    )


def test_a_second_caption_of_a_clip_is_named(tmp_path: Path) -> None:
    dataset = read_dataset(lay_out(tmp_path, {"a.mp4": "", "a.txt": "read", "a.caption": "not read"}))
    assert pairs(dataset) == [("a.mp4", "read")]
    assert [(found.code, found.message) for found in dataset.findings] == [
        ("left-out", "a.caption not read, since its clip has another caption")
    ]


# --------------------------------------------------------------------------------------------- Unicode forms


@pytest.mark.parametrize(("written", "there"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("layout", ["lists", "csv", "jsonl"])
def test_names_in_another_unicode_form_are_found(tmp_path: Path, layout: str, written: str, there: str) -> None:
    files = {
        "lists": {"prompts.txt": "one\n", "videos.txt": f"{written}\n"},
        "csv": {"metadata.csv": f"file_name,text\n{written},one\n"},
        "jsonl": {"metadata.jsonl": json.dumps({"file_name": written, "text": "one"}, ensure_ascii=False)},
    }[layout]
    dataset = read_dataset(lay_out(tmp_path, {**files, there: ""}))
    assert pairs(dataset) == [(there, "one")]
    assert dataset.samples[0].video.is_file()
    assert dataset.samples[0].id == COMPOSED.removesuffix(".mp4")
    ((_, message),) = notes(dataset)
    assert message.startswith("paths found in another Unicode form (NFC or NFD): ")


@pytest.mark.parametrize(("clip", "caption"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_captions_beside_clips_may_have_another_unicode_form(tmp_path: Path, clip: str, caption: str) -> None:
    dataset = read_dataset(lay_out(tmp_path, {clip: "", caption.replace(".mp4", ".txt"): "one"}))
    assert pairs(dataset) == [(clip, "one")]
    assert dataset.findings == ()


def test_a_quarantine_file_may_have_another_unicode_form(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path / "data", {DECOMPOSED: "", DECOMPOSED.replace(".mp4", ".txt"): "a", "b.mp4": "", "b.txt": "b"}
    )
    file = tmp_path / "q.txt"
    file.write_text(DECOMPOSED.removesuffix(".mp4") + "\n", encoding="utf-8")
    remaining = without_quarantined(read_dataset(root), file)
    assert [sample.id for sample in remaining.dataset.samples] == ["b"]
    assert (remaining.left_out, remaining.unknown) == (1, ())


# ------------------------------------------------------------------------------------------ every kind of media


@pytest.mark.parametrize("suffix", [".gif", ".mpeg", ".wmv", ".mts", ".ts", ".flv", ".3gp", ".ogv", ".webp", ".MXF"])
def test_a_caption_finds_any_kind_of_clip(tmp_path: Path, suffix: str) -> None:
    dataset = read_dataset(lay_out(tmp_path, {f"a{suffix}": "", "a.txt": "one"}))
    assert pairs(dataset) == [(f"a{suffix}", "one")]
    assert dataset.findings == ()


def test_a_caption_in_another_case_is_found_where_it_is_plain_whose_it_is(tmp_path: Path) -> None:
    dataset = read_dataset(
        lay_out(tmp_path / "plain", {"Clip.MP4": "", "clip.txt": "one", "b.mp4": "", "b.txt": "two"})
    )
    assert pairs(dataset) == [("Clip.MP4", "one"), ("b.mp4", "two")]
    assert [(found.severity, found.code) for found in dataset.findings] == [("note", "read-as")]
    assert "captions found in other upper and lower case: clip.txt" in dataset.findings[0].message
    two = {"Clip.mp4": "", "clip.mp4": "", "CLIP.txt": "one", "b.mp4": "", "b.txt": "two"}
    told = [(found.code, found.where) for found in read_dataset(lay_out(tmp_path / "two", two)).findings]
    assert told == [("missing-caption", "Clip"), ("missing-caption", "clip"), ("stray-caption", "CLIP.txt")]


def test_what_is_left_out_beside_clips_is_named(tmp_path: Path) -> None:
    files = {
        "a.mp4": "", "a.txt": "one", "still.png": "", "teaser.gif": "", "code.ts": "",
        "b.dat": "", "b.txt": "two", "c.wmv": "", "c.json": "{}",
    }  # fmt: skip
    dataset = read_dataset(lay_out(tmp_path, files))
    told = {(found.code, found.message) for found in dataset.findings}
    assert told == {
        ("stray-caption", "b.txt has no clip next to it; b.dat is not a known video format"),
        ("missing-caption", "c.wmv has no caption: c.txt does not exist; c.json exists, but is not read as a caption"),
        ("left-out", "1 image not read: still.png"),
        ("left-out", "2 possible clips without a caption, not read: code.ts and teaser.gif"),
    }


@pytest.mark.parametrize("layout", ["lists", "table"])
def test_clips_that_nothing_lists_are_named(tmp_path: Path, layout: str) -> None:
    listing = (
        {"prompts.txt": "one\n", "videos.txt": "a.mp4\n"}
        if layout == "lists"
        else {"metadata.csv": "file_name,text\na.mp4,one\n"}
    )
    dataset = read_dataset(lay_out(tmp_path, {**listing, "a.mp4": "", "b.mkv": "", "x/c.mp4": ""}))
    (found,) = dataset.findings
    assert found.code == "left-out"
    assert found.message == f"2 clips in the folder not named in {dataset.layout}: b.mkv and x/c.mp4"


# ---------------------------------------------------------------------------------------------- one text format

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c"


def test_prompts_and_lists_have_the_same_lines(tmp_path: Path) -> None:
    lines = [f"one{mark}half" for mark in SEPARATORS]
    text = "\ufeff" + "\r\n".join([*lines, "", " "])
    root = lay_out(tmp_path, {"prompts.txt": text, "videos.txt": "a.mp4\n" * len(lines), "a.mp4": ""})
    samples = read_dataset(root).samples
    assert [sample.caption for sample in samples] == lines
    config = RunConfig(validation_prompts=str(root / "prompts.txt"), sample_every=1)
    assert [prompt.text for prompt in choose_prompts(config, samples, with_image=False)] == lines


def test_all_that_is_wrong_with_prompts_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\n\ncaf\xe9\n\nfour\n")
    (tmp_path / "i.txt").write_text("First.png\n")
    (tmp_path / "first.png").touch()
    config = RunConfig(
        validation_prompts=str(tmp_path / "p.txt"), validation_images=str(tmp_path / "i.txt"), sample_every=1
    )
    with pytest.raises(UsageError) as caught:
        choose_prompts(config, [Sample("a", tmp_path / "a.mp4", "A.")], with_image=True)
    assert caught.value.details == (
        f"validation_prompts: {tmp_path}/p.txt is not UTF-8 in line 3",
        f"validation_prompts: {tmp_path}/p.txt is blank in lines 2 and 4",
        "validation_images: 1 image for 5 prompts",
        f"validation_images: no such file: {tmp_path}/First.png; did you mean {tmp_path}/first.png?",
    )


def test_a_caption_may_be_long(tmp_path: Path) -> None:
    caption = "word " * 40_000 + "end"
    made = io.StringIO()
    csv.writer(made).writerows([["file_name", "text"], ["a.mp4", caption]])
    assert len(caption) > 131_072
    assert pairs(read_dataset(lay_out(tmp_path, {"x.csv": made.getvalue(), "a.mp4": ""}))) == [("a.mp4", caption)]


def test_an_absolute_path_into_the_dataset_is_not_outside(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (tmp_path / "link").symlink_to(root)
    paths = [root / "a.mp4", root / "x/../a.mp4"]
    rows = "".join(f"{path},one\n" for path in paths)
    lay_out(root, {"metadata.csv": f"file_name,text\n{rows}", "a.mp4": ""})
    for reading in (LayoutOptions(), LayoutOptions(allow_outside=True)):
        for folder in (root, tmp_path / "link"):
            dataset = read_dataset(folder, reading)
            assert [sample.id for sample in dataset.samples] == ["a", "a#2"]
            assert dataset.findings == ()


# ------------------------------------------------------------------------------------------ all of it at once


def test_a_blank_line_hides_nothing_else(tmp_path: Path) -> None:
    files = {
        "prompts.txt": "one\n\nthree\nfour\n",
        "videos.txt": "gone.mp4\n../out.mp4\na.mp4\n.\n",
        "images.txt": "gone.png\na.png\n",
        "a.mp4": "", "a.png": "",
    }  # fmt: skip
    dataset = read_dataset(lay_out(tmp_path, files))
    assert dataset.samples == ()
    assert [(found.code, found.where) for found in dataset.findings] == [
        ("blank-line", "prompts.txt:2"),
        ("line-counts", "prompts.txt:3"),
        ("outside-folder", "videos.txt:2"),
        ("bad-path", "videos.txt:4"),
        ("missing-video", "gone"),
        ("missing-image", "images.txt:1"),
    ]
    assert [sample.video.name for sample in dataset.unpaired.clips] == ["gone.mp4", "a.mp4"]
    assert [(sample.id, sample.caption) for sample in dataset.unpaired.captions] == [
        ("prompts.txt:1", "one"),
        ("prompts.txt:3", "three"),
        ("prompts.txt:4", "four"),
    ]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"train/videos.txt": "a.mp4\n", "train/prompts.txt": "a\n"},
            "its folder train contains lists: pass that folder",
        ),
        ({"clips.xlsx": ""}, "it contains clips.xlsx: save it as CSV"),
        ({"captions.json": '{"info": 1}', "a.mp4": ""}, "it contains captions.json, but not an array of objects"),
        ({"captions.json": '{"c": "one"}', "a.mp4": ""}, "it contains captions.json, but not an array of objects"),
        ({"list.txt": "a.mp4|one", "a.mp4": ""}, "it contains list.txt, which is in no known format"),
        ({"a.mp4": "", "a.srt": "1", "b/a.md": "one"}, "it contains a.srt and b/a.md, which are in no known format"),
        (
            {"a/0001.png": "", "a/0002.png": "", "a.txt": "one"},
            "it contains a/0001.png and a/0002.png, but clips are",
        ),
        ({"clips.zip": ""}, "it contains clips.zip: unpack it first"),
        ({"train-000.tar": ""}, "use --format datasets if the datasets library can load it"),
    ],
)
def test_a_folder_without_a_dataset_says_what_is_there(tmp_path: Path, files: dict[str, str], told: str) -> None:
    with pytest.raises(CogtuneError) as caught:
        read_dataset(lay_out(tmp_path, files))
    assert told in caught.value.message


def test_an_image_is_found_by_its_name_without_suffix(tmp_path: Path) -> None:
    files = {"metadata.csv": "video,text,image\na,one,a\n", "a.mp4": "", "a.png": ""}
    (sample,) = read_dataset(lay_out(tmp_path, files)).samples
    assert (sample.video.name, sample.image and sample.image.name) == ("a.mp4", "a.png")


def test_a_name_without_suffix_that_several_clips_have_is_not_guessed(tmp_path: Path) -> None:
    files = {"metadata.csv": "video,text\na,one\n", "a.mp4": "", "a.webm": ""}
    (found,) = read_dataset(lay_out(tmp_path, files)).findings
    assert found.code == "missing-video"


def test_a_clip_that_an_object_has_twice_is_told(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match=r"x\.json cannot be read: duplicate key 'a\.mp4'"):
        read_dataset(lay_out(tmp_path, {"x.json": '{"a.mp4": "one", "a.mp4": "two"}', "a.mp4": ""}))


def test_a_name_that_an_object_has_twice_is_told(tmp_path: Path) -> None:
    line = '{"file_name": "a.mp4", "text": "one", "text": "two"}\n'
    (found,) = read_dataset(lay_out(tmp_path, {"metadata.jsonl": line, "a.mp4": ""})).findings
    assert isinstance(found, Finding)
    assert (found.code, found.message) == ("bad-row", "line 1 cannot be read: duplicate key 'text'")


VALUES = ["7", "true", "[1]", "{}", "null", '"half \\ud83d"', '"a\\u0000b"', '""', '" "', "1e999", "NaN", "{}" * 3]


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("column", ["file_name", "text", "image"])
def test_no_value_of_a_table_is_unforeseen(tmp_path: Path, column: str, array: bool) -> None:
    rows = []
    for value in VALUES:
        row = {"file_name": '"a.mp4"', "text": '"one"', "image": '"a.png"', column: value}
        rows.append("{" + ", ".join(f'"{name}": {text}' for name, text in row.items()) + "}")
    rows.append('{"\\ud83d": "a", "file_name": "a.mp4", "text": "fine"}')
    text = "[" + ",".join(rows[:-2] + rows[-1:]) + "]" if array else "\n".join(rows)
    name = "x.json" if array else "x.jsonl"
    dataset = read_dataset(lay_out(tmp_path, {name: text, "a.mp4": "", "a.png": ""}))
    assert dataset.samples[-1].caption == "fine"
    wrong = {found.where for found in dataset.findings if found.severity == "error"}
    assert len(wrong) >= 6
    for found in dataset.findings:
        f"{found.where} {found.message} {found.hint}".encode()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("clips.zip", "unpack it and pass the folder"),
        ("data/metadata.csv", "pass the folder that contains it: ROOT/data"),
        ("data/00000.tar", "pass the folder that contains it: ROOT/data, with --format datasets"),
        ("'data'", "did you mean data?"),
        ("data ", "did you mean data?"),
        (".\\data", "did you mean data?"),
        ("Data", "did you mean data?"),
        ("https://example.org/data.zip", "download it and pass the folder"),
    ],
)
def test_what_is_given_in_place_of_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, hint: str
) -> None:
    lay_out(tmp_path, {"data/metadata.csv": "", "data/00000.tar": "", "clips.zip": ""})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CogtuneError) as caught:
        read_dataset(Path(given))
    assert caught.value.hint == hint.replace("ROOT", str(tmp_path))


@pytest.mark.parametrize(
    ("listed", "said", "pattern"),
    [
        ("a/frame_%05d.png", "does not exist", "-i a/frame_%05d.png a.mp4"),
        ("a/%d.png", "does not exist", "-i a/%d.png a.mp4"),
        ("a/*.png", "does not exist", "-pattern_type glob -i 'a/*.png' a.mp4"),
        ("a", "is a folder, not a file", "-i a/frame_%05d.png a.mp4"),
        ("a/frame_00001.png", "is an image, not a clip", "-i frame_%05d.png OUT.mp4"),
        ("a/first.jpg", "is an image, not a clip", "-i %04d.png OUT.mp4"),
    ],
)
def test_numbered_images_in_place_of_a_clip_are_told(tmp_path: Path, listed: str, said: str, pattern: str) -> None:
    (tmp_path / "a").mkdir()
    for name in ("frame_00001.png", "frame_00002.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / "a" / name)
    if listed.endswith(".jpg"):
        Image.new("RGB", (96, 64)).save(tmp_path / listed)
    (tmp_path / "videos.txt").write_text(f"{listed}\n")
    (tmp_path / "prompts.txt").write_text("A boat on a river.\n")
    (found,) = [
        found
        for found in check_dataset(read_dataset(tmp_path), FrameSettings(size=Size(9, 64, 96), fps=8), None).findings
        if found.severity == "error"
    ]
    assert said in found.message
    assert found.hint.endswith(pattern)


def test_a_pattern_in_place_of_an_image_gets_no_advice_on_clips(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text,image\na.mp4,A boat on a river.,a/%d.png\n")
    (found,) = [found for found in read_dataset(tmp_path).findings if found.code == "missing-image"]
    assert "ffmpeg" not in found.hint


def test_a_table_in_a_subfolder_is_named(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "OpenVid-1M.csv").write_text("video,caption\na.mp4,A boat on a river.\n")
    with pytest.raises(CogtuneError, match=r"data/train/OpenVid-1M.csv: move the table to the folder itself"):
        read_dataset(tmp_path)
