"""What is put into a page stays text; charts keep what matters of any curve."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from cogtune.report.charts import Series, bars, ceiling_of, distribution, line_chart, short, thin, ticks
from cogtune.report.page import Html, join, section, table, tag, text, write_page
from cogtune.system.console import printable
from cogtune.system.errors import CogtuneError
from tests.support.html_pages import parse

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></script></title><h1>",
    "<!-- --> &lt; &amp; ]]>",
    "nul \x00 bell \x07 half \ud800 of a pair",
    "a \u202egpj.exe\u2066 name \x9b turned \u200f round\u2028",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_text_is_never_markup(tmp_path: Path, words: str) -> None:
    path = tmp_path / "page.html"
    body = section(words, tag("p", words, title=words), table([words], [[words]], label=words))
    write_page(path, words, [body, line_chart(words, [Series(words, [(0, 1), (1, 2)])]), bars(words, [(words, 1)])])
    page = parse(path)
    shown = printable(words)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    (paragraph,) = (found for found in page.all("p") if found.children and "title" in found.attributes)
    assert paragraph.text == shown
    assert paragraph.attributes == {"title": shown}
    assert page.all("title")[0].text == shown
    assert page.all("h1") == []
    assert page.all("td")[0].text == shown
    assert not any(name.startswith("on") for element in page.all("svg") for name in element.attributes)


def test_markup_stays_and_nothing_else_does() -> None:
    assert text(Html("<b>")) == "<b>"
    assert text("<b>") == "&lt;b&gt;"
    assert join("a<", None, [Html("<i>"), 3, ["&"]]) == "a&lt;<i>3&amp;"
    assert tag("input", hidden=True, value=None, data_a=0) == '<input hidden data-a="0">'
    assert tag("td", "x", class_="wide") == '<td class="wide">x</td>'


def test_a_table_has_headings_above_or_in_front() -> None:
    above = table(["a", "b"], [["1", "2"]], label="t", wide=[1])
    assert above.count('<th scope="col">') == 2
    assert '<tr><td>1</td><td class="wide">2</td></tr>' in above
    front = table([], [["a", "1"]], label="t")
    assert "<thead>" not in front
    assert '<tr><th scope="row">a</th><td>1</td></tr>' in front


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, "old", [])

    def parts() -> object:
        yield section("new")
        raise CogtuneError("no more")

    with pytest.raises(CogtuneError, match="no more"):
        write_page(path, "new", parts())  # type: ignore[arg-type]
    assert parse(path).all("title")[0].text == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


def test_thinning_keeps_every_extreme_and_the_ends() -> None:
    points = [(float(step), math.sin(step / 5000)) for step in range(100_000)]
    points[31_337] = (31_337.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thin(points)
    assert len(kept) <= 1000
    assert {points[0], points[31_337], points[77_777], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:1000]) == points[:1000]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.03, 0.09, [0.02, 0.04, 0.06, 0.08, 0.1]),
        (0, 5000, [0, 2000, 4000, 6000]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (7, 7, [6, 8, 10, 12, 14]),
    ],
)
def test_axes_have_round_marks_that_enclose_the_values(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == marks


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1e-4, "1e-4"), (2.5e-05, "2.5e-5"), (0.25, "0.25"), (1234.5, "1234"), (20_000, "20k"), (3.2e6, "3.2M")],
)
def test_numbers_are_short(value: float, words: str) -> None:
    assert short(value) == words


def chart(tmp_path: Path, *series: Series, ceiling: float | None = None) -> str:
    drawn = line_chart("Loss", series, ceiling=ceiling)
    write_page(tmp_path / "chart.html", "chart", [drawn])
    parse(tmp_path / "chart.html")
    return drawn


def test_charts_of_nothing_of_one_point_and_of_a_level_line(tmp_path: Path) -> None:
    assert "nothing measured yet" in chart(tmp_path, Series("loss", []))
    one = chart(tmp_path, Series("loss", [(7, 0.5)]))
    assert 'aria-label="Loss: loss 0.5 at step 7"' in one
    assert one.count("h0") == 1
    for level in (0.0, 0.5, -2.0, 1e-300):
        assert "nan" not in chart(tmp_path, Series("loss", [(step, level) for step in range(5)]))
    assert "nan" not in chart(tmp_path, Series("loss", [(1, 0.3), (2, 0.1 + 0.2)]))


def test_a_curve_is_told_in_words(tmp_path: Path) -> None:
    drawn = chart(
        tmp_path, Series("raw", [(1, 0.5), (2, 4.0), (3, 0.25)], "faint"), Series("smooth", [(1, 0.5), (3, 0.4)])
    )
    assert "raw from 0.5 to 0.25 over steps 1 to 3, lowest 0.25, highest 4" in drawn
    assert 'class="faint">raw</span>' in drawn


def test_spikes_are_cut_off_and_told(tmp_path: Path) -> None:
    usual = [(float(step), 1.0 + step / 100) for step in range(100)]
    assert ceiling_of(usual) is None
    spiky = [*usual, (100.0, 50.0)]
    ceiling = ceiling_of(spiky)
    assert ceiling == pytest.approx(1.2 * 1.98)
    drawn = chart(tmp_path, Series("norm", spiky), ceiling=ceiling)
    assert "up to 50 (step 100)" in drawn
    assert "1000.0 0.0" in drawn  # at the upper edge, not above it
    assert ceiling_of([]) is None
    assert ceiling_of([(1, 0.0), (2, 0.0)]) is None


def test_few_values_are_listed_and_many_are_binned() -> None:
    few = distribution("fps", [30.0, 30.0, 8.0], unit="fps")
    assert few.index(">8<") < few.index(">30<")
    assert "<rect" not in few
    many = distribution("seconds", [step / 10 for step in range(100)], unit="s")
    counts = [int(found.rpartition(": ")[2]) for found in many.split("</title>")[:-1]]
    assert sum(counts) == 100
    assert "100 from 0 to 9.9 s, median 5" in many
