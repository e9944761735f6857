"""Draw the pictures of the documentation from the masks themselves: `python docs/pictures.py`.

`python docs/pictures.py --check` exits 1 if a committed picture differs from what would be drawn.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from score_mods import all_of, causal, dense_mask, document, sliding_window

IMAGES = Path(__file__).resolve().parent / "img"

WINDOW = 6
DOCUMENTS = (10, 14)
TOLD_QUERY = 21

# Pixels: pitch of the cells, the coloured square in each, corner of the grid.
PITCH, SQUARE, LEFT, TOP = 20, 15, 92, 84
WIDTH, HEIGHT = 920, 604

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 19px; font-weight: 600 } .head { font-weight: 600 }
  .quiet { fill: #59636e } .small { font-size: 12px }
  .softmax { fill: #1f6fb4; stroke: #1f6fb4 } .linear { fill: #ee9b33; stroke: #ee9b33 }
  .neither { fill: #e8ecf0; stroke: #e8ecf0 }
  .softmax, .linear, .neither { stroke-width: 3; stroke-linejoin: round }
  .plate { fill: #ffffff }
  .line { stroke: #59636e; fill: none } .border { stroke: #59636e; fill: none; stroke-dasharray: 5 4 }
  .told { stroke: #1f2328; fill: none; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d }
    text { fill: #e6edf3 } .quiet { fill: #9198a1 }
    .softmax { fill: #4a9be8; stroke: #4a9be8 } .linear { fill: #f0a94a; stroke: #f0a94a }
    .neither { fill: #21262d; stroke: #21262d }
    .plate { fill: #0d1117 }
    .line, .border { stroke: #9198a1 } .told { stroke: #e6edf3 }
  }
"""


def branches() -> dict[str, Tensor]:
    """Which pairs (query, key) each branch reads, (T, T) each: the three share out all pairs."""
    length = sum(DOCUMENTS)
    ids = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))[None]

    def dense(mask) -> Tensor:
        return dense_mask(mask, batch=1, q_len=length, kv_len=length, device="cpu")[0, 0]

    readable = dense(all_of(causal(), document(ids)))
    softmax = dense(all_of(sliding_window(WINDOW), document(ids)))
    return {"softmax": softmax, "linear": readable & ~softmax, "neither": ~readable}


def draw_branches() -> str:
    """Rows are queries, columns are keys; blue is read by the softmax branch, orange by the linear one."""
    read = branches()
    length = sum(DOCUMENTS)
    right, bottom = LEFT + length * PITCH, TOP + length * PITCH
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Which keys each query reads in a RAttention layer: the window and itself by softmax, every '
        "older key of its document by the linear branch, no other</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
    ]
    for branch, pairs in read.items():
        lines.append(f'<path class="{branch}" d="{"".join(_square(t, j) for t, j in pairs.nonzero().tolist())}"/>')
    lines += _axes(right, bottom)
    lines += _told_row(read, right)
    lines += _legend(read, right + 36)
    return "\n".join([*lines, "</svg>", ""])


def _square(row: float, column: float) -> str:
    # Half of the stroke lies outside the path, which rounds the corners.
    inset, side = (PITCH - SQUARE) / 2 + 0.5, SQUARE - 1
    return f"M{LEFT + column * PITCH + inset:g} {TOP + row * PITCH + inset:g}h{side}v{side}h-{side}z"


def _axes(right: int, bottom: int) -> list[str]:
    middle, center = (LEFT + right) // 2, (TOP + bottom) // 2
    lines = [
        f'<text class="quiet" x="{middle}" y="28" text-anchor="middle">key j →</text>',
        f'<text class="quiet" transform="translate(26 {center}) rotate(-90)" text-anchor="middle">query t</text>',
        f'<text class="quiet" x="21" y="{center + 46}" text-anchor="middle">↓</text>',
    ]
    start = 0
    for number, tokens in enumerate(DOCUMENTS, start=1):
        low, high = start * PITCH + 3, (start + tokens) * PITCH - 3
        center = (low + high) // 2
        lines += [
            f'<path class="line" d="M{LEFT + low} {TOP - 8}v-6H{LEFT + high}v6"/>',
            f'<text class="small" x="{LEFT + center}" y="{TOP - 22}" text-anchor="middle">document {number}</text>',
            f'<path class="line" d="M{LEFT - 8} {TOP + low}h-6V{TOP + high}h6"/>',
            f'<text class="small" transform="translate({LEFT - 22} {TOP + center}) rotate(-90)" text-anchor="middle">'
            f"document {number}</text>",
        ]
        if start:
            at = start * PITCH
            lines.append(
                f'<path class="border" d="M{LEFT + at} {TOP - 4}V{bottom + 4}M{LEFT - 4} {TOP + at}H{right + 4}"/>'
            )
        start += tokens
    for position in range(0, start, 5):
        at = position * PITCH + PITCH // 2
        lines += [
            f'<text class="quiet small" x="{LEFT + at}" y="{bottom + 18}" text-anchor="middle">{position}</text>',
            f'<text class="quiet small" x="{right + 7}" y="{TOP + at + 4}">{position}</text>',
        ]
    # Words where the grid is grey, centred on whole cells.
    border = DOCUMENTS[0]
    for row, column, cells, text in (
        (border // 2, border + DOCUMENTS[1] // 2, 6, "later keys"),
        (border + DOCUMENTS[1] // 2, border // 2, 8, "another document"),
    ):
        x, y = LEFT + column * PITCH, TOP + row * PITCH
        plate = f'x="{x - cells * PITCH // 2}" y="{y}" width="{cells * PITCH}" height="{PITCH}"'
        lines += [
            f'<rect class="plate" {plate}/>',
            f'<text class="quiet" x="{x}" y="{y + 15}" text-anchor="middle">{text}</text>',
        ]
    return lines


def _told_row(read: dict[str, Tensor], right: int) -> list[str]:
    top = TOP + TOLD_QUERY * PITCH
    x = right + 36
    seen, older = (_span(read[branch][TOLD_QUERY]) for branch in ("softmax", "linear"))
    return [
        f'<rect class="told" x="{LEFT - 1}" y="{top - 1}" width="{right - LEFT + 2}" height="{PITCH + 2}" rx="4"/>',
        f'<path class="told" d="M{right + 2} {top + PITCH // 2}H{x - 10}"/>',
        f'<text class="head" x="{x}" y="{top + 1}">Query {TOLD_QUERY} reads</text>',
        f'<text x="{x}" y="{top + 21}">keys {seen} by softmax,</text>',
        f'<text x="{x}" y="{top + 41}">keys {older} by the linear state.</text>',
    ]


def _span(row: Tensor) -> str:
    keys = row.nonzero().flatten().tolist()
    return f"{keys[0]}–{keys[-1]}"


def _legend(read: dict[str, Tensor], x: int) -> list[str]:
    pairs = {branch: int(kept.sum()) for branch, kept in read.items()}
    entries = (
        ("softmax", "Softmax branch", f"itself and the w = {WINDOW} keys before", "t − w ≤ j ≤ t"),
        ("linear", "Residual linear branch", "every older key of its document", "j ≤ t − w − 1"),
        ("neither", "Neither", "later keys, and other documents", "j > t, or another document"),
    )
    lines = [
        f'<text class="title" x="{x}" y="{TOP + 4}">Every pair is read once</text>',
    ]
    told = (
        f"{pairs['softmax']} pairs by softmax and {pairs['linear']} by the",
        f"linear branch are all {pairs['softmax'] + pairs['linear']} pairs that a",
        "causal model may read here.",
    )
    for line, text in enumerate(told):
        lines.append(f'<text class="quiet" x="{x}" y="{TOP + 28 + 20 * line}">{text}</text>')
    y = TOP + 118
    for branch, head, what, law in entries:
        lines += [
            f'<path class="{branch}" d="M{x + 2} {y - 11}h{SQUARE - 1}v{SQUARE - 1}h-{SQUARE - 1}z"/>',
            f'<text class="head" x="{x + 30}" y="{y + 1}">{head}</text>',
            f'<text x="{x + 30}" y="{y + 22}">{what}</text>',
            f'<text class="quiet" x="{x + 30}" y="{y + 43}">{law}</text>',
        ]
        y += 82
    return lines


PICTURES = {"branches.svg": draw_branches}


def main(args: list[str]) -> int:
    if args not in ([], ["--check"]):
        print("usage: python docs/pictures.py [--check]", file=sys.stderr)
        return 2
    stale = []
    for name, drawn in PICTURES.items():
        path, text = IMAGES / name, drawn()
        if args:
            stale += [] if path.exists() and path.read_text(encoding="utf-8") == text else [name]
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(text.encode())} bytes")
    if stale:
        print(f"docs/img is stale, run `python docs/pictures.py`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
