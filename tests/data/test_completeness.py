"""Files that are not one clip: several joined end to end, incomplete ones, and several streams in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogtune.data.frames import FrameSettings
from cogtune.data.validation.clips import check_clip
from cogtune.data.video.clips import CutShort, DamagedVideo, probe
from cogtune.models.geometry import Size
from tests.support.containers import clip

CONTAINERS = ["a.mp4", "fragments.mp4", "a.mov", "a.3gp", "a.avi", "a.wmv", "a.flv", "a.mkv", "live.mkv", "a.webm"]
CONTAINERS += ["a.nut", "a.apng", "a.ivf", "a.rm"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_files_joined_end_to_end_are_counted(tmp_path: Path, name: str) -> None:
    one = clip(tmp_path / name)
    assert probe(one).files == 1
    three = tmp_path / f"three{one.suffix}"
    three.write_bytes(one.read_bytes() * 3)
    assert probe(three).files == 3


@pytest.mark.parametrize("name", ["a.ogv", "a.y4m"])
def test_joined_files_that_cannot_be_decoded_as_one_are_called_so(tmp_path: Path, name: str) -> None:
    one = clip(tmp_path / name)
    assert probe(one).files == 1
    (tmp_path / "two").write_bytes(one.read_bytes() * 2)
    with pytest.raises(DamagedVideo, match="two is 2 files joined end to end, and cannot be") as caught:
        probe(tmp_path / "two")
    assert "ffmpeg -f concat" in caught.value.hint


@pytest.mark.parametrize("name", ["a.mp4", "fragments.mp4", "a.mkv", "a.webm", "a.avi"])
def test_a_file_that_lacks_its_end_is_incomplete(tmp_path: Path, name: str) -> None:
    path = clip(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(CutShort, match=r"is incomplete: [1-9][\d,]* of [\d,]* bytes are missing"):
        probe(path)
    path.write_bytes(data + bytes(1000))
    assert probe(path).num_frames == 12


def test_a_stream_that_is_not_read_is_told(tmp_path: Path) -> None:
    settings = FrameSettings(size=Size(9, 64, 96), fps=8)
    for streams in (1, 2):
        info = probe(clip(tmp_path / "a.mkv", streams=streams))
        assert (info.streams, info.num_frames) == (streams, 12)
        codes = [found.code for found in check_clip("a", info, settings)]
        assert ("several-streams" in codes) == (streams == 2)
