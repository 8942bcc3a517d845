"""Captions and clips are paired by line or by name, and never shift: what cannot be paired is told, all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cogtune.data.findings import FINDINGS, Finding
from cogtune.data.layouts.base import LayoutOptions
from cogtune.data.sources import LAYOUTS, Dataset, Sample, read_dataset
from cogtune.system.errors import CogtuneError


def lay_out(root: Path, **files: str | bytes) -> Path:
    """A folder with these files; ``__`` stands for ``/`` and the last ``_`` for the dot of the suffix."""
    for name, content in files.items():
        path = root / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def told(dataset: Dataset) -> list[tuple[str, str]]:
    return [(found.code, found.where) for found in dataset.findings]


def only(dataset: Dataset) -> Finding:
    assert len(dataset.findings) == 1, dataset.findings
    return dataset.findings[0]


# --------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"], ids=["no-newline", "newline", "blank-lines"])
def test_lists_are_paired_by_line(tmp_path: Path, mark: bytes, newline: bytes, end: str) -> None:
    def text(*lines: str) -> bytes:
        return mark + ("\n".join(lines) + end).encode().replace(b"\n", newline)

    root = lay_out(
        tmp_path,
        prompts_txt=text("  A cat, “très” café.  ", "A dog\u2028barks."),
        videos_txt=text("videos/cat.mp4", "videos/sub/dog.MOV"),
        videos__cat_mp4="",
        videos__sub__dog_MOV="",
    )
    dataset = read_dataset(root)
    assert dataset == Dataset(
        root,
        "lists",
        (
            Sample("videos/cat", root / "videos/cat.mp4", "A cat, “très” café."),
            Sample("videos/sub/dog", root / "videos/sub/dog.MOV", "A dog\u2028barks."),
        ),
        (),
    )


def test_images_belong_to_their_lines(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        prompts_txt="a\nb\n",
        videos_txt="a.mp4\nb.mp4\n",
        images_txt="b.png\na.png\n",
        a_mp4="",
        b_mp4="",
        a_png="",
    )
    dataset = read_dataset(root)
    assert [sample.image for sample in dataset.samples] == [root / "b.png", root / "a.png"]
    assert told(dataset) == [("missing-image", "a")]


def test_unequal_counts_pair_nothing(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\nb\n", videos_txt="a.mp4\nb.mp4\nc.mp4\n", images_txt="a.png\n")
    dataset = read_dataset(root)
    assert dataset.samples == ()
    assert told(dataset) == [
        ("line-counts", "videos.txt:2"),
        *(("missing-video", name) for name in "abc"),
        ("missing-image", "images.txt:1"),
    ]
    assert dataset.findings[0].message == (
        "prompts.txt has 2 lines, videos.txt has 3 lines and images.txt has 1 line: "
        "line 2 of videos.txt has no partner, so nothing is paired"
    )


def test_blank_lines_inside_pair_nothing_even_when_counts_agree(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\n\nc\n \ne\n", videos_txt="a.mp4\nb.mp4\n\nc.mp4\nd.mp4\n")
    dataset = read_dataset(root)
    assert dataset.samples == ()
    assert [(found.code, found.where, found.message) for found in dataset.findings[:2]] == [
        (
            "blank-line",
            "prompts.txt:2",
            "lines 2 and 4 are blank in prompts.txt: lines may be shifted, so nothing is paired",
        ),
        (
            "blank-line",
            "videos.txt:3",
            "line 3 is blank in videos.txt: lines may be shifted, so nothing is paired",
        ),
    ]


def test_a_blank_line_and_unequal_counts_are_both_told(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\n\nc\n", videos_txt="a.mp4\nc.mp4\n")
    assert told(read_dataset(root))[:2] == [("blank-line", "prompts.txt:2"), ("line-counts", "prompts.txt:3")]


def test_many_blank_lines_are_one_finding(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\n\n" * 20, videos_txt="a.mp4\n" * 39)
    (found,) = [found for found in read_dataset(root).findings if found.code == "blank-line"]
    assert found.message.startswith("lines 2, 4, 6, 8, 10, 12, 14, 16 and 11 more are blank")


def test_bytes_that_are_not_utf8_are_found_by_line_and_byte(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        prompts_txt=b"\xef\xbb\xbfone\ncaf\xe9 two\nthree\n\xff\n",
        videos_txt="1.mp4\n2.mp4\n3.mp4\n4.mp4\n",
        **{f"{number}_mp4": "" for number in (1, 2, 3, 4)},
    )
    dataset = read_dataset(root)
    assert [sample.caption for sample in dataset.samples] == ["one", "three"]
    assert told(dataset) == [("not-utf8", "prompts.txt:2"), ("not-utf8", "prompts.txt:4")]
    assert dataset.findings[0].message == "byte 4 of line 2, 0xe9, is not UTF-8"


def test_utf16_without_its_mark_is_named(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\nb\n".encode("utf-16-le"), videos_txt="a.mp4\nb.mp4\n")
    dataset = read_dataset(root)
    assert dataset.samples == ()
    assert told(dataset) == [("not-utf8", "prompts.txt"), ("missing-video", "a"), ("missing-video", "b")]
    assert dataset.findings[0].message == "prompts.txt looks like UTF-16 without a byte order mark"


def test_what_only_begins_as_utf16_is_named(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt=b"\xff\xfeab\n", videos_txt="a.mp4\n", a_mp4="")
    assert told(read_dataset(root)) == [("not-utf8", "prompts.txt")]
    root = lay_out(tmp_path / "beside", a_mp4="", a_txt="dürr".encode("utf-16")[:-1])
    (found,) = read_dataset(root).findings
    assert (found.code, found.where) == ("not-utf8", "a")
    assert found.message.startswith("a.txt has a UTF-16 byte order mark, but is not UTF-16: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_decides_the_encoding_of_every_text_file(tmp_path: Path, encoding: str) -> None:
    def text(value: str) -> bytes:
        return ("\ufeff" * (encoding == "utf-16-be") + value).encode(encoding)

    caption = "日落 — dürr\u2028 end"
    row = f'{{"file_name": "a.mp4", "text": "{caption}"}}'
    folders = [
        lay_out(tmp_path / "lists", prompts_txt=text(f"{caption}\r\nb\r\n"), videos_txt=text("a.mp4\r\nb.mp4\r\n")),
        lay_out(tmp_path / "csv", metadata_csv=text(f"file_name,text\na.mp4,{caption}\n")),
        lay_out(tmp_path / "jsonl", metadata_jsonl=text(row)),
        lay_out(tmp_path / "array", metadata_json=text(f"[{row}]")),
        lay_out(tmp_path / "beside", a_txt=text(caption)),
    ]
    names = ["prompts.txt and videos.txt", "metadata.csv", "metadata.jsonl", "metadata.json", "a.txt"]
    for root, name in zip(folders, names, strict=True):
        lay_out(root, a_mp4="", b_mp4="")
        if name == "a.txt":
            (root / "b.mp4").unlink()
        dataset = read_dataset(root)
        assert dataset.samples[0].caption == caption
        notes = [found.message for found in dataset.findings if " not UTF-8" in found.message]
        said = encoding[:6].upper()
        assert notes == ([] if encoding == "utf-8-sig" else [f"read as {said}, not UTF-8: {name}"])


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("/etc/hosts", "outside-folder"),
        ("../other/a.mp4", "outside-folder"),
        ("videos/../../a.mp4", "outside-folder"),
        ("link.mp4", "outside-folder"),
        ("linked/a.mp4", "outside-folder"),
        ("a\0b.mp4", "bad-path"),
        (".", "bad-path"),
        ("x" * 300 + ".mp4", "bad-path"),
        ("http://example.org/a.mp4", "missing-video"),
    ],
)
def test_a_path_must_be_a_file_inside(tmp_path: Path, line: str, code: str) -> None:
    outside = lay_out(tmp_path / "outside", a_mp4="")
    root = lay_out(tmp_path / "data", prompts_txt="a\nb\n", videos_txt=f"good.mp4\n{line}\n", good_mp4="")
    (root / "link.mp4").symlink_to(outside / "a.mp4")
    (root / "linked").symlink_to(outside)
    dataset = read_dataset(root)
    assert only(dataset).code == code
    assert dataset.samples[0].id == "good"
    if code != "missing-video":
        assert only(dataset).where == "videos.txt:2"
        assert len(dataset.samples) == 1


def test_links_and_dots_that_stay_inside_are_fine(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="a\nb\n", videos_txt="./videos/../videos/a.mp4\nb.mp4\n", videos__a_mp4="")
    (root / "b.mp4").symlink_to("videos/a.mp4")
    dataset = read_dataset(root)
    assert [sample.id for sample in dataset.samples] == ["videos/a", "b"]
    assert dataset.findings == ()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("a.mp4", "paths are relative to the dataset's folder; use videos/a.mp4"),
        ("train/a.mp4", "paths are relative to the dataset's folder; use videos/a.mp4"),
        ("/home/me/videos/a.mp4", "use videos/a.mp4, which is in the dataset's folder, or use --allow-outside"),
        ("videos/a.avi", "did you mean videos/a.mp4?"),
        ("videos/steamboot.mp4", "did you mean videos/steamboat.mp4?"),
        ("https://example.org/b.mp4", "download it to the dataset's folder, and use its path there"),
    ],
)
def test_a_missing_clip_comes_with_the_likely_cause(tmp_path: Path, line: str, hint: str) -> None:
    root = lay_out(tmp_path, prompts_txt="a\n", videos_txt=f"{line}\n", videos__a_mp4="", videos__steamboat_mp4="")
    dataset = read_dataset(root)
    assert only(dataset).code in ("missing-video", "outside-folder")
    assert only(dataset).hint == hint
    assert only(dataset).where == (dataset.samples[0].id if dataset.samples else "videos.txt:1")


def test_ids_are_unique_and_tell_suffixes_apart(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        prompts_txt="1\n2\n3\n4\n5\n6\n",
        videos_txt="a.mp4\nb.mp4\na.webm\nb.mp4\nb.mp4\nb#2.mp4\n",
        a_mp4="",
        a_webm="",
        b_mp4="",
    )
    (root / "b#2.mp4").write_bytes(b"")
    dataset = read_dataset(root)
    assert [sample.id for sample in dataset.samples] == ["a.mp4", "b", "a.webm", "b#2", "b#3", "b#2#2"]
    assert [sample.caption for sample in dataset.samples] == list("123456")


def test_a_list_without_its_partner_is_told(tmp_path: Path) -> None:
    dataset = read_dataset(lay_out(tmp_path, prompts_txt="a\n"))
    assert told(dataset) == [("missing-list", "videos.txt")]
    assert only(dataset).message == "prompts.txt exists, but videos.txt does not"


def test_empty_lists_are_an_error(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="\n\n", videos_txt="")
    assert told(read_dataset(root)) == [("no-samples", str(root))]


# --------------------------------------------------------------------------------- captions beside the clips


def test_captions_beside_clips(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        b_mp4="",
        b_txt="  Two lines,\none caption.\n",
        a__c_MKV="",
        a__c_txt=b"\xef\xbb\xbfcaf\xc3\xa9",
        notes_md="not a clip",
    )
    lay_out(root / ".cogtune", x_mp4="", x_txt="hidden")
    (root / "._b.mp4").write_bytes(b"what a Mac leaves")
    dataset = read_dataset(root)
    assert dataset.layout == "sidecar captions"
    assert [(sample.id, sample.caption) for sample in dataset.samples] == [
        ("a/c", "café"),
        ("b", "Two lines,\none caption."),
    ]
    assert dataset.findings == ()


def test_what_is_wrong_beside_clips_is_all_told(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path / "data",
        a_mp4="",
        a_txt="fine",
        b_mp4="",
        c_txt="no clip",
        d_mp4="",
        d_txt=b"line\nna\xefve",
        outside_txt="x",
    )
    (root / "outside.mp4").symlink_to(lay_out(tmp_path / "other", x_mp4="") / "x.mp4")
    dataset = read_dataset(root)
    assert [sample.id for sample in dataset.samples] == ["a", "b", "d"]
    assert told(dataset) == [
        ("outside-folder", "outside.mp4"),
        ("missing-caption", "b"),
        ("not-utf8", "d"),
        ("stray-caption", "c.txt"),
    ]
    assert dataset.findings[2].message == "byte 3 of line 2 of d.txt, 0xef, is not UTF-8"


def test_only_a_plain_file_inside_is_read_as_a_caption(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "data", a_mp4="", b_mp4="", c_mp4="", c_txt="fine")
    os.mkfifo(root / "a.txt")  # reading it would wait for ever
    secret = lay_out(tmp_path / "other", b_txt="not of this dataset") / "b.txt"
    (root / "b.txt").symlink_to(secret)
    dataset = read_dataset(root)
    assert told(dataset) == [("missing-caption", "a"), ("outside-folder", "b")]
    assert [sample.caption for sample in dataset.samples] == ["", "", "fine"]
    assert read_dataset(root, LayoutOptions(allow_outside=True)).samples[1].caption == "not of this dataset"


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay_out(tmp_path, a_mp4="", a_txt="a")
    (root / "locked").mkdir()
    scan = os.scandir

    def locked(folder: str) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr("os.scandir", locked)  # a mode would not stop root
    dataset = read_dataset(root)
    assert told(dataset) == [("bad-path", "locked")]
    assert dataset.findings[0].message == "cannot read the folder locked: Permission denied"


def test_a_file_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    root = lay_out(tmp_path, a_mp4="", a_txt="a")
    Path(str(root) + "/\udce9.mp4").write_bytes(b"")
    Path(str(root) + "/\udce9.txt").write_text("its own")
    dataset = read_dataset(root)
    assert [sample.id for sample in dataset.samples] == ["a"]
    assert told(dataset) == [("bad-path", "\\udce9.mp4")]


def test_lists_come_before_captions_beside_clips(tmp_path: Path) -> None:
    root = lay_out(tmp_path, prompts_txt="from the list\n", videos_txt="a.mp4\n", a_mp4="", a_txt="from beside")
    assert [sample.caption for sample in read_dataset(root).samples] == ["from the list"]


# ------------------------------------------------------------------------------------------- no dataset at all


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match=r"the dataset folder .*nowhere does not exist") as caught:
        read_dataset(tmp_path / "nowhere")
    for layout in LAYOUTS:
        assert layout.expects in caught.value.hint
    with pytest.raises(CogtuneError, match="is a file, not a folder"):
        read_dataset(lay_out(tmp_path, a_mp4="") / "a.mp4")


def test_a_folder_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="is not a dataset: it has no lists, table or captioned clips"):
        read_dataset(lay_out(tmp_path, readme_md=""))


def test_loose_clips_are_told(tmp_path: Path) -> None:
    root = lay_out(tmp_path, **{f"clips__{number}_mp4": "" for number in range(5)})
    with pytest.raises(CogtuneError) as caught:
        read_dataset(root)
    assert caught.value.message == (
        f"{root} contains 5 clips (clips/0.mp4, clips/1.mp4, clips/2.mp4 and 2 more), but no captions"
    )


def test_every_severity_is_one_of_the_three() -> None:
    assert {kind.severity for kind in FINDINGS.values()} == {"error", "warning", "note"}
    assert all(kind.meaning.endswith(".") for kind in FINDINGS.values())
