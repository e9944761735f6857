"""Draw the pictures of the documentation from the masks themselves: `python docs/pictures.py`.

`python docs/pictures.py --check` exits 1 if a committed picture differs from what would be drawn.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from score_mods import (
    all_of,
    available_masks,
    causal,
    dense_mask,
    document,
    make_mask,
    residual_of,
    sliding_window,
)

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


# The gallery: (name, arguments, what is said below the name), 16 tokens each.
GALLERY_TOKENS = 16
GALLERY = (
    ("causal", {}, "j ≤ t"),
    ("sliding_window", {"window": 4}, "window 4"),
    ("attention_sink", {"sinks": 2, "window": 3}, "sinks 2, window 3"),
    ("stochastic_window", {"window": 6, "low": 1, "high": 6}, "a step that drew 2 of 1 to 6"),
    ("dilated_window", {"window": 3, "dilation": 3}, "window 3, dilation 3"),
    ("strided", {"stride": 4}, "stride 4"),
    ("chunked", {"chunk": 5}, "chunk 5"),
    ("document", {}, "with causal; documents of 6 and 10"),
    ("prefix_lm", {"prefix": 5}, "prefix 5"),
    ("neighborhood_2d", {"height": 4, "width": 4, "radius": 1}, "4 × 4 image, radius 1"),
    ("windows_2d", {"height": 4, "width": 4, "size": 2}, "4 × 4 image, size 2"),
)
DRAWN = 2
COLUMNS, CELL, PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 4, 11, 220, 250, 24


def gallery() -> dict[str, dict[str, Tensor]]:
    """Of each mask which pairs the softmax branch reads, and the linear branch where it can read the rest."""
    assert {name for name, _, _ in GALLERY} == set(available_masks())
    ids = torch.tensor([[0] * 6 + [1] * 10])
    read = {}
    for name, args, _ in GALLERY:
        mask = all_of(causal(), document(ids)) if name == "document" else make_mask(name, **args)
        if name == "stochastic_window":
            mask = sliding_window(DRAWN)
        size = {"batch": 1, "q_len": GALLERY_TOKENS, "kv_len": GALLERY_TOKENS, "device": "cpu"}
        branches = {"softmax": dense_mask(mask, **size)[0, 0]}
        try:
            branches["linear"] = dense_mask(residual_of(mask).mask(), **size)[0, 0]
        except ValueError:
            branches["linear"] = torch.zeros_like(branches["softmax"])
        read[name] = branches
    return read


def draw_gallery() -> str:
    """A small picture a mask: rows are queries, columns keys."""
    rows = -(-(len(GALLERY) + 1) // COLUMNS)
    width, height = COLUMNS * PANEL_WIDTH + 2 * MARGIN, rows * PANEL_HEIGHT + 2 * MARGIN - 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Which keys each query reads under every mask of the library, and what is left to a linear '
        "branch</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
    ]
    for number, ((name, _, said), read) in enumerate(zip(GALLERY, gallery().values(), strict=True)):
        left, top = _panel(number)
        lines += [
            f'<text class="head" x="{left}" y="{top - 24}">{name}</text>',
            f'<text class="quiet small" x="{left}" y="{top - 7}">{said}</text>',
        ]
        side = GALLERY_TOKENS * CELL + 1
        lines.append(f'<path class="neither" style="stroke:none" d="M{left - 1} {top - 1}h{side}v{side}h-{side}z"/>')
        for branch, pairs in read.items():
            lines.append(f'<path class="{branch}" style="stroke:none" d="{_squares(pairs, left, top)}"/>')
    left, top = _panel(len(GALLERY))
    entries = (
        ("softmax", "read by the softmax branch"),
        ("linear", "read by a linear branch"),
        ("neither", "not read"),
    )
    for i, (branch, said) in enumerate(entries):
        y = top + 26 * i
        lines.append(f'<path class="{branch}" style="stroke:none" d="M{left} {y}h12v12h-12z"/>')
        lines.append(f'<text class="small" x="{left + 20}" y="{y + 10}">{said}</text>')
    told = ("Rows are queries, columns keys.", "Where there is no orange, the mask", "goes without a linear branch.")
    lines += [
        f'<text class="quiet small" x="{left}" y="{top + 100 + 18 * i}">{text}</text>' for i, text in enumerate(told)
    ]
    return "\n".join([*lines, "</svg>", ""])


def _panel(number: int) -> tuple[int, int]:
    row, column = divmod(number, COLUMNS)
    return MARGIN + column * PANEL_WIDTH, MARGIN + 40 + row * PANEL_HEIGHT


def _squares(pairs: Tensor, left: int, top: int) -> str:
    """A square of 10 pixels for each pair, in a pitch of 11."""
    return "".join(f"M{left + j * CELL} {top + t * CELL}h10v10h-10z" for t, j in pairs.nonzero().tolist())


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


PICTURES = {"branches.svg": draw_branches, "masks.svg": draw_gallery}


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
