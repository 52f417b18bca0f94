"""A loss curve as a small SVG, so that no plotting package is needed."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 320, 48, 28, 12
Point = tuple[float, float]


def svg(training: Sequence[Point], held_out: Sequence[Point]) -> str:
    """An SVG of (step, loss) points: the training loss as a thin line, the held-out loss as a thick one with dots."""
    points = [*training, *held_out]
    right = max((x for x, _ in points), default=1) or 1
    low, high = min((y for _, y in points), default=0), max((y for _, y in points), default=1)
    span = high - low or 1

    def place(point: Point) -> Point:
        x, y = point
        across = LEFT + (WIDTH - LEFT - 12) * x / right
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / span, 1)

    def line(path: Sequence[Point], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(f"{x},{y}" for x, y in map(place, path))}"/>'

    marks = []
    for i in range(5):
        value, step = low + span * i / 4, right * i / 4
        (_, y), (x, _) = place((0, value)), place((step, low))
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
        marks.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{step:.0f}</text>')
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="#c33"/>' for x, y in map(place, held_out))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="11"><rect width="100%" height="100%" fill="#fff"/>',
            *marks,
            line(training, 'stroke="#69c" stroke-width="1"'),
            line(held_out, 'stroke="#c33" stroke-width="2"'),
            dots,
            f'<text x="{WIDTH - 14}" y="{TOP + 10}" text-anchor="end" fill="#69c">training loss, nats per token</text>',
            f'<text x="{WIDTH - 14}" y="{TOP + 25}" text-anchor="end" fill="#c33">held-out loss</text>',
            "</svg>\n",
        ]
    )
