"""Headings, tables and charts, as one HTML file that needs no network and as Markdown.

Charts are stretched to the page's width while their labels, which are HTML, keep their size: a phone shows what a monitor does.
"""

import itertools
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from measure import table

POINTS = 1000  # of a line; more do not show

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; color: #1f2933; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 12px; border-top: 2px solid #e4e7eb; }
h3 { font-size: 16px; margin: 24px 0 6px; }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere; }
p { margin: 6px 0; color: #52606d; }
.wide { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #e4e7eb; text-align: right; vertical-align: top; white-space: nowrap; }
th { color: #52606d; font-weight: 600; border-bottom: 2px solid #cbd2d9; vertical-align: bottom; white-space: normal; }
th.left, td.left { text-align: left; }
td.long { white-space: normal; min-width: 180px; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; padding-left: 0; }
td.good { color: #15803d; } td.bad { color: #b91c1c; font-weight: 600; }
figure { margin: 12px 0 0; padding-bottom: 20px; } figcaption { font-weight: 600; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: #3e4c59; margin-bottom: 6px; }
.legend span { display: flex; align-items: center; gap: 6px; } .legend svg { width: 26px; height: 8px; flex: none; }
.plot { position: relative; margin: 0 14px 26px 58px; } .plot svg { display: block; width: 100%; height: 100%; overflow: hidden; }
.plot i { position: absolute; font-style: normal; font-size: 12px; color: #52606d; white-space: nowrap; }
.plot i.y { right: calc(100% + 6px); transform: translateY(-50%); } .plot i.x { top: calc(100% + 4px); transform: translateX(-50%); }
.plot.heat { margin-left: 200px; } .plot.heat i { font-size: 11px; }
.bars { display: grid; grid-template-columns: max-content max-content 1fr; gap: 6px 12px; align-items: center;
  font-size: 14px; }
.bars .name { overflow-wrap: anywhere; max-width: 280px; } .bars .value { font-variant-numeric: tabular-nums; text-align: right; }
.track { position: relative; height: 18px; background: #f5f7fa; border-radius: 3px; }
.track b { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.track u { position: absolute; top: 8px; height: 2px; min-width: 2px; background: #111827; }
@media (max-width: 640px) { body { padding: 16px 12px 48px; font-size: 14px; } h1 { font-size: 22px; }
  table { font-size: 13px; } th, td { padding: 5px 8px; }
  th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: min(34vw, 130px); max-width: 40vw; }
  .plot { margin-left: 48px; } .plot.heat { margin-left: 150px; } .plot.heat i.y { font-size: 9px; } .plot i.x.minor { display: none; }
  .bars { grid-template-columns: 1fr max-content; gap: 2px 12px; } .bars .name { max-width: none; }
  .bars .track { grid-column: 1 / -1; margin-bottom: 8px; } }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


class Block(Protocol):
    """A part of a page."""

    def html(self) -> str: ...
    def markdown(self) -> str:
        """Empty where Markdown cannot say it."""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    def html(self) -> str:
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"


@dataclass(frozen=True)
class Text:
    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"

    def markdown(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """The first `left` columns are aligned left. Cells that begin with a mark of `MARKS` are coloured."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    MARKS = {"✓": "good", "✗": "bad"}  # noqa: RUF012

    def html(self) -> str:
        def cell(tag: str, column: int, text: str) -> str:
            classes = ["left"] * (column < self.left) + ["long"] * (len(text) > 32) + [self.MARKS.get(text[:1], "")]
            names = " ".join(filter(None, classes))
            shown = escape(text)
            if column < self.left:  # where a long name may be broken
                shown = shown.replace(".", ".<wbr>").replace("_", "_<wbr>")
            return f'<{tag} class="{names}">{shown}</{tag}>' if names else f"<{tag}>{shown}</{tag}>"

        lines = [[cell("th", i, text) for i, text in enumerate(self.header)]]
        lines += [[cell("td", i, text) for i, text in enumerate(row)] for row in self.rows]
        return '<div class="wide"><table>' + "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines) + "</table></div>"

    def markdown(self) -> str:
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows]
        return table(self.header, rows, self.left)


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    """x ascending; the line is broken where y is not finite."""
    color: str
    width: float = 1.6
    dash: str = ""

    def stroke(self) -> str:
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'fill="none" stroke="{self.color}" stroke-width="{self.width}" vector-effect="non-scaling-stroke"{dash}'


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    band: y from and to, shaded. reach: y from and to that are shown at least; without it, and beyond it, what the lines need.
    log: whether y is logarithmic.
    """

    title: str
    lines: Sequence[Line]
    height: int = 320
    band: tuple[float, float] | None = None
    reach: tuple[float, float] | None = None
    log: bool = False
    unit: str = ""

    def markdown(self) -> str:
        return ""

    def html(self) -> str:
        values = [y for line in self.lines for _, y in line.points if self._shows(y)]
        xs = [x for line in self.lines for x, _ in line.points]
        if not values:
            return ""
        low, high = min([*values, *(self.reach or ())]), max([*values, *(self.reach or ())])
        low, high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        margin = 0.04 * (high - low) or abs(high) or 1.0
        low, high = low - margin, high + margin
        left, right = min(xs), max(max(xs), min(xs) + 1)

        def at_y(value: float) -> float:
            """From the top, 0 to 1."""
            return (high - (math.log10(value) if self.log else value)) / (high - low)

        def at_x(value: float) -> float:
            return (value - left) / (right - left)

        y_ticks = log_ticks(low, high) if self.log else ticks(low, high, 5)
        x_ticks = [x for x in ticks(left, right, 8) if x == int(x)]
        parts = []
        if self.band:
            top, bottom = at_y(self.band[1]), at_y(self.band[0])
            parts.append(
                f'<rect x="0" width="1000" y="{1000 * top:.1f}" height="{1000 * (bottom - top):.1f}" fill="#eef2f6"/>'
            )
        parts += [
            f'<path d="M0 {1000 * at_y(y):.1f}H1000" stroke="#dde2e8" vector-effect="non-scaling-stroke"/>'
            for y in y_ticks
        ]
        for line in self.lines:
            path, dots = "", ""
            for is_shown, points in itertools.groupby(
                self._thinned(line.points), key=lambda point: self._shows(point[1])
            ):
                if is_shown:
                    places = [f"{1000 * at_x(x):.1f} {1000 * at_y(y):.1f}" for x, y in points]
                    if len(places) > 1:
                        path += "M" + "L".join(places)
                    else:
                        dots += f"M{places[0]}h0"
            parts.append(f'<path d="{path}" {line.stroke()} stroke-linejoin="round"/>')
            if dots:
                parts.append(
                    f'<path d="{dots}" stroke="{line.color}" stroke-width="6" stroke-linecap="round" vector-effect="non-scaling-stroke"/>'
                )
        labels = [f'<i class="y" style="top:{at_y(y):.2%}">{escape(number(y))}{self.unit}</i>' for y in y_ticks]
        labels += [
            f'<i class="x{" minor" * ((len(x_ticks) - i) % 2 == 0)}" style="left:{at_x(x):.2%}">{x:,.0f}</i>'
            for i, x in enumerate(x_ticks)
        ]
        keys = "".join(
            f'<span><svg viewBox="0 0 26 8"><path d="M0 4H26" {line.stroke()}/></svg>{escape(line.name)}</span>'
            for line in self.lines
        )
        return (
            f'<figure><figcaption>{escape(self.title)}</figcaption><div class="legend">{keys}</div>'
            f'<div class="plot" style="height:{self.height}px"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
            f'role="img" aria-label="{escape(self.title)}">{"".join(parts)}</svg>{"".join(labels)}</div></figure>'
        )

    def _thinned(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """About POINTS of them at most: of neighbours the lowest, the highest, and one that is not shown."""
        size = 2 * math.ceil(len(points) / POINTS)
        if size <= 2:
            return list(points)
        kept = []
        for i in range(0, len(points), size):
            neighbours = points[i : i + size]
            shown = [point for point in neighbours if self._shows(point[1])]
            hidden = [point for point in neighbours if not self._shows(point[1])][:1]
            ends = [choose(shown, key=lambda point: point[1]) for choose in (min, max)] if shown else []
            kept += sorted({*ends, *hidden}, key=lambda point: point[0])
        return kept

    def _shows(self, y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not self.log)


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str
    color: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """A bar for each run, from zero; a line from `low` to `high` on it."""

    title: str
    bars: Sequence[Bar]

    def markdown(self) -> str:
        return ""

    def html(self) -> str:
        if not self.bars:
            return ""
        longest = max(max(bar.value, bar.high or 0) for bar in self.bars) or 1.0
        cells = []
        for bar in self.bars:
            whisker = ""
            if bar.low is not None and bar.high is not None:
                reach = (bar.high - bar.low) / longest
                whisker = f'<u style="left:{bar.low / longest:.2%};width:{reach:.2%}"></u>'
            cells.append(
                f'<div class="name">{escape(bar.name)}</div><div class="value">{escape(bar.text)}</div>'
                f'<div class="track"><b style="width:{bar.value / longest:.2%};background:{bar.color}"></b>{whisker}</div>'
            )
        return f'<figure><figcaption>{escape(self.title)}</figcaption><div class="bars">{"".join(cells)}</div></figure>'


HEAT = ("#7f1d1d", "#c2410c", "#f59e0b", "#fcd34d", "#fef9c3", "#dcfce7", "#a7f3d0")
"""From bad to good."""
WORST = "#111827"


@dataclass(frozen=True)
class HeatMap:
    """A cell for each row and column, coloured by how high its value is. Many columns share a cell, which shows the lowest."""

    title: str
    rows: Sequence[tuple[str, Mapping[int, float]]]
    """Name, and column -> value: -inf is what is worse than all numbers; one that is NaN, +inf or missing leaves its cell grey."""
    limits: Sequence[float]
    """Ascending, one less than there are colours: the colour changes at each."""
    unit: str = ""
    worst: str = ""
    """What -inf is called."""

    def markdown(self) -> str:
        return ""

    def html(self) -> str:
        columns = sorted({column for _, values in self.rows for column in values})
        if not columns:
            return ""
        share = math.ceil(len(columns) / 120)
        bins = [columns[i : i + share] for i in range(0, len(columns), share)]
        paths = dict.fromkeys((WORST, *HEAT), "")
        for i, (_, values) in enumerate(self.rows):
            j = 0
            for color, cells in itertools.groupby(self._color(values, merged) for merged in bins):
                width = len(list(cells))
                if color:
                    paths[color] += f"M{j} {i + 0.5}h{width}"
                j += width
        drawn = "".join(f'<path d="{d}" stroke="{color}"/>' for color, d in paths.items() if d)
        stride = math.ceil(len(self.rows) / 64)
        labels = [
            f'<i class="y" style="top:{(i + 0.5) / len(self.rows):.2%}">{escape(name)}</i>'
            for i, (name, _) in enumerate(self.rows)
            if i % stride == 0
        ]
        every = math.ceil(len(bins) / 10)
        labels += [
            f'<i class="x" style="left:{(j + 0.5) / len(bins):.2%}">{merged[0]:,}</i>'
            for j, merged in enumerate(bins)
            if j % every == 0
        ]
        names = [f"below {number(self.limits[0])}", *(f"from {number(limit)}" for limit in self.limits)]
        keys = "".join(
            f'<span><svg viewBox="0 0 26 8"><rect width="26" height="8" fill="{color}"/></svg>{escape(name)}{self.unit}</span>'
            for color, name in zip(HEAT, names, strict=True)
        )
        if paths[WORST]:
            keys += f'<span><svg viewBox="0 0 26 8"><rect width="26" height="8" fill="{WORST}"/></svg>{escape(self.worst)}</span>'
        return (
            f'<figure><figcaption>{escape(self.title)}</figcaption><div class="legend">{keys}</div><div class="plot heat" '
            f'style="height:{min(16 * len(self.rows), 960)}px"><svg viewBox="0 0 {len(bins)} {len(self.rows)}" '
            f'preserveAspectRatio="none" shape-rendering="crispEdges" role="img" aria-label="{escape(self.title)}">'
            f'<rect width="{len(bins)}" height="{len(self.rows)}" fill="#e4e7eb"/>{drawn}</svg>{"".join(labels)}</div></figure>'
        )

    def _color(self, values: Mapping[int, float], columns: Sequence[int]) -> str:
        """Empty where there is nothing to show."""
        found = [value for column in columns if (value := values.get(column, math.inf)) < math.inf]
        if not found:
            return ""
        return HEAT[bisect(self.limits, min(found))] if min(found) > -math.inf else WORST


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers between 10 ** low and 10 ** high: round ones, 1, 2 and 5 times powers of ten or powers alone, as the range needs."""
    if high - low < 0.7:
        return ticks(10**low, 10**high, 4)
    factors = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [f * 10.0**power for power in powers for f in factors if low <= math.log10(f * 10.0**power) <= high]


def number(value: float) -> str:
    """Short: 0.25, 1,200."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(filter(None, (block.html() for block in blocks)))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(filter(None, (block.markdown() for block in blocks))) + "\n"
