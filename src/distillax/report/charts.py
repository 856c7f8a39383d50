"""Line charts as plain geometry: numbers in, coordinates and labels out. The template draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
MAX_POINTS = 240  # drawn for each line: more than that cannot be told apart

Point = tuple[float, float | None]  # (x, y); None interrupts the line


@dataclass(frozen=True)
class Series:
    """One curve. `colour` numbers the page's colours; `dashed` marks a second kind of curve."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A place on a line that tells its value."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    label: str
    colour: int
    dashed: bool
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """A chart in a box of WIDTH x HEIGHT user units, y pointing down as in SVG."""

    title: str
    summary: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, series: Sequence[Series], unit: str = "") -> Chart | None:
    """A chart of all series that have a value, over one pair of axes; None if none has."""
    drawn = [s for s in series if any(y is not None for _, y in s.points)]
    if not drawn:
        return None
    xs = [x for s in drawn for x, y in s.points if y is not None]
    ys = [y for s in drawn for _, y in s.points if y is not None]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    # Zero belongs on the axis unless the curve would be a flat line far above it.
    y_values = ticks(0.0 if 0 <= min(ys) <= max(ys) / 2 else min(ys), max(ys), 5)
    y_low, y_high = y_values[0], y_values[-1]

    def place_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def draw(s: Series) -> Line:
        path, dots, begun = [], [], False
        for x, y in thin_out(s.points):
            if y is None:
                begun = False
                continue
            at = place_x(x), place_y(y)
            path.append(f"{'L' if begun else 'M'}{at[0]:g} {at[1]:g}")
            dots.append(Dot(*at, f"step {x:,.0f}: {number(y)}{unit}"))
            begun = True
        return Line(s.label, s.colour, s.dashed, "".join(path), dots)

    return Chart(
        title,
        "; ".join(f"{s.label} from {_end(s.points, 0)} to {_end(s.points, -1)}{unit}" for s in drawn),
        [Tick(place_x(x), number(x)) for x in ticks(x_low, x_high, 6, whole=True) if x_low <= x <= x_high],
        [Tick(place_y(y), number(y)) for y in y_values],
        [draw(s) for s in drawn],
    )


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """About so many round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` of the points: the lowest and the highest of each stretch, so that no
    spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [i for i in range(len(part)) if part[i][1] is not None]
        if len(known) < len(part):
            kept.append((part[0][0], None))
        if known:
            heights = {i: part[i][1] or 0.0 for i in known}
            ends = {min(known, key=heights.__getitem__), max(known, key=heights.__getitem__)}
            kept += [part[i] for i in sorted(ends)]
    return kept


def number(value: float) -> str:
    """A number as short as it can be read: 12,345, 2.41, 5e-4."""
    if value and not 1e-3 <= abs(value) < 1e7:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _end(points: Sequence[Point], which: int) -> str:
    return number([y for _, y in points if y is not None][which])
