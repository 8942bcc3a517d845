"""The terminal pictures of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from tools.record_terminal import IMAGES, RECORDINGS, Recording, Screen, as_svg, record


def screen(text: str, width: int = 20) -> str:
    shown = Screen(width)
    shown.write(text)
    return shown.text()


def test_a_screen_shows_what_a_terminal_does() -> None:
    assert screen("one\r\ntwo") == "one\ntwo"
    assert screen("loss 1.5\rloss") == "loss 1.5"
    assert (
        screen("a bar\r\n3 of 4\r\x1b[1A\x1b[2Kdone") == "done\n3 of 4"
    )  # as a live display is erased and drawn again
    assert screen("12345678", width=5) == "12345\n678"
    assert screen("\x1b[?25l\x1b]8;;file:///x\x1b\\link\x1b]8;;\x1b\\\x1b[1;31m!\x1b[0m") == "link!"


def test_colours_are_kept_and_no_font_is_loaded() -> None:
    shown = Screen()
    shown.write("\x1b[31mred\x1b[0m plain\r\n\r\n")
    (line,) = shown.lines()
    assert line.plain == "red plain"
    assert [str(span.style) for span in line.spans if span.end == 3] != []
    svg = as_svg("cogtune --help", [line], "picture")
    assert "font-face" not in svg
    assert "cogtune" in svg


def test_a_command_is_recorded_as_on_a_terminal(tmp_path: Path) -> None:
    lines = [line.plain for line in record(Recording("presets --help"), tmp_path)]
    assert any("Usage: cogtune presets" in line for line in lines)
    assert any("╭" in line for line in lines)  # which is drawn on a terminal only


def test_every_picture_is_there_and_shows_its_command() -> None:
    for name, recording in RECORDINGS.items():
        text = re.sub(r"<[^>]*>", "", (IMAGES / f"{name}.svg").read_text()).replace("&#160;", " ")
        assert f"$ cogtune {recording.words}" in text
        assert str(Path.home()) not in text
        assert "/tmp/" not in text
