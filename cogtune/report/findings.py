"""Findings of a dataset as lists, counts and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from cogtune.data.findings import FINDINGS, SEVERITIES, Finding
from cogtune.report.page import Html, section, table, tag

MOST_FINDINGS = 2000
"""Most findings in the table; the rest are counted."""


def finding_list(findings: Iterable[Finding], *, named: bool = False) -> Html:
    """Return findings as a list; with ``named``, each has its place."""
    lines = [
        tag(
            "li",
            tag("span", found.severity, class_=f"severity {found.severity}"),
            " ",
            [tag("code", found.where), " "] if named else None,
            cut(found.message, 400),
            [" ", tag("span", f"– {cut(found.hint, 300)}", class_="hint")] if found.hint else None,
            class_=found.severity,
        )
        for found in findings
    ]
    return tag("ul", lines, class_="findings")


def cut(words: str, most: int) -> str:
    """Return the first ``most`` characters, with an ellipsis if there are more."""
    return words if len(words) <= most else f"{words[:most].rstrip()}…"


def kinds(findings: Sequence[Finding]) -> Iterator[Html]:
    """Yield the number of findings of each kind, if there are many."""
    counted = Counter(found.code for found in findings)
    if len(findings) < 4:
        return
    worst_first = sorted(counted.items(), key=lambda item: (SEVERITIES.index(FINDINGS[item[0]].severity), -item[1]))
    rows = [
        (_severity(FINDINGS[code].severity), tag("code", code), f"{count:,}", FINDINGS[code].meaning)
        for code, count in worst_first
    ]
    yield section(
        "Findings",
        table(("severity", "kind", "times", "what it means"), rows, label="Kinds of findings", wide=(3,)),
    )


def _severity(severity: str) -> Html:
    return tag("span", severity, class_=f"severity {severity}")


def findings_table(findings: Sequence[Finding], shown: dict[str, int]) -> Iterator[Html]:
    """Yield up to :data:`MOST_FINDINGS` findings; ``shown`` has the positions of samples that can be linked to."""
    if not findings:
        return
    rows = []
    for found in findings[:MOST_FINDINGS]:
        where = tag("code", cut(found.where, 120))
        if found.where in shown:
            where = tag("a", where, href=f"#clip-{shown[found.where]}")
        cells = [
            tag("td", _severity(found.severity), data_key=SEVERITIES.index(found.severity)),
            tag("td", where),
            tag("td", tag("code", found.code)),
            tag("td", cut(found.message, 400), class_="wide"),
            tag("td", cut(found.hint, 300), class_="wide"),
        ]
        rows.append(tag("tr", cells, data_kinds=found.severity))
    left = len(findings) - len(rows)
    remark = (
        tag("p", f"The first {len(rows):,} of {len(findings):,}: use --json to print all.", class_="remark")
        if left
        else None
    )
    whole = table(("severity", "where", "kind", "what", "what to do"), rows, label="All findings", sortable=True)
    yield section("All findings", remark, filter_form("#findings tbody tr", SEVERITIES), whole, id="findings")


def filter_form(items: str, kinds: Iterable[str]) -> Html:
    """Return controls that hide some of the elements of the selector ``items``, by the page's script."""
    options = [tag("option", "all", value=""), *(tag("option", kind, value=kind) for kind in kinds)]
    return tag(
        "form",
        tag("select", options, aria_label="Show which"),
        tag("input", type="search", placeholder="filter by words", aria_label="Filter by words"),
        tag("output"),
        class_="filter",
        data_items=items,
        hidden=True,
    )
