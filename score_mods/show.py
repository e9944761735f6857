"""Look at a mask: `python -m score_mods.show sliding_window window=512 --seq-len 4096 [--out mask.png]`.

Prints which blocks FlexAttention computes and which it skips, and how many pairs are kept; --out draws it.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from score_mods.block_masks import build_block_mask
from score_mods.dense import dense_mask
from score_mods.info import MaskMod, mask_name
from score_mods.masks.combinators import all_of
from score_mods.masks.document import document
from score_mods.registry import FACTORIES, make_mask

SKIPPED, PARTIAL, FULL = 0, 1, 2
_CELLS = {"utf": ("··", "▒▒", "██"), "ascii": ("..", "::", "##")}
_WIDEST = 32  # cells
_TOKENS_DRAWN = 64
# The palette of docs/pictures.py: blue for full, light blue for partial.
_COLORS = ("#eef1f4", "#9cc4ea", "#1f6fb4")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What there is to show about a mask. `blocks`: (rows, columns) of SKIPPED, PARTIAL, FULL."""

    name: str
    seq_len: int
    block_size: int
    blocks: Tensor
    kept_pairs: int

    def count(self, kind: int) -> int:
        return int((self.blocks == kind).sum())


def look_at(mask: MaskMod, *, seq_len: int, block_size: int) -> Picture:
    """Build the block mask of one sequence on CPU and count what it keeps."""
    block_mask = build_block_mask(mask, batch=1, q_len=seq_len, kv_len=seq_len, device="cpu", block_size=block_size)
    blocks = classify_blocks(block_mask)[0, 0]
    kept = int((blocks == FULL).sum()) * block_size**2
    for row, row_blocks in enumerate(blocks):
        kept += _pairs_in_partial_blocks(mask, row, row_blocks, seq_len, block_size)
    return Picture(name=mask_name(mask), seq_len=seq_len, block_size=block_size, blocks=blocks, kept_pairs=kept)


def classify_blocks(block_mask: BlockMask) -> Tensor:
    """SKIPPED, PARTIAL or FULL for each block pair: (batch, heads, query blocks, key blocks), int8."""
    blocks = torch.zeros_like(block_mask.kv_indices, dtype=torch.int8)
    lists = (
        (PARTIAL, block_mask.kv_num_blocks, block_mask.kv_indices),
        (FULL, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    for kind, number, indices in lists:
        if number is None or indices is None:
            continue
        listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
        blocks += torch.zeros_like(blocks).scatter_(-1, indices.long(), listed.to(torch.int8) * kind)
    return blocks


def _pairs_in_partial_blocks(mask: MaskMod, row: int, row_blocks: Tensor, seq_len: int, block_size: int) -> int:
    """Pairs that one row of partial blocks keeps, evaluated from its first to its last partial block only."""
    partial = (row_blocks == PARTIAL).nonzero().flatten()
    if not len(partial):
        return 0
    q_start, kv_start = row * block_size, int(partial[0]) * block_size
    q_len = min(block_size, seq_len - q_start)
    kv_len = min(int(partial[-1] + 1) * block_size, seq_len) - kv_start

    def there(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask(b, h, q_idx + q_start, kv_idx + kv_start)

    per_key = dense_mask(there, q_len=q_len, kv_len=kv_len, device="cpu")[0, 0].sum(dim=0)
    is_partial = (row_blocks == PARTIAL).repeat_interleave(block_size)[kv_start : kv_start + kv_len]
    return int(per_key[is_partial].sum())


def to_text(picture: Picture, *, encoding: str = "utf") -> str:
    """The block picture, its legend and the numbers, as lines of text. encoding: "utf" or "ascii"."""
    cells = _CELLS[encoding]
    times = "×" if encoding == "utf" else "x"
    blocks, merged = _shrunk(picture.blocks)
    seq_len, total = picture.seq_len, picture.blocks.numel()
    full, partial, skipped = (picture.count(kind) for kind in (FULL, PARTIAL, SKIPPED))
    causal_pairs = seq_len * (seq_len + 1) // 2
    each = f"one cell = {merged} {times} {merged} blocks, " if merged > 1 else ""
    lines = [
        f"{picture.name}: {seq_len} queries (down) {times} {seq_len} keys (across), {each}block = {picture.block_size}",
        "",
        *("  " + "".join(cells[kind] for kind in row) for row in blocks.tolist()),
        "",
        f"  {cells[FULL]} full {full}   {cells[PARTIAL]} partial {partial}   {cells[SKIPPED]} skipped {skipped}"
        f"   of {total} blocks: {skipped / total:.1%} skipped",
        f"  pairs kept {picture.kept_pairs:,}: {picture.kept_pairs / seq_len**2:.2%} of all, "
        f"{picture.kept_pairs / causal_pairs:.2%} of the causal ones; "
        f"{picture.kept_pairs / seq_len:,.1f} keys for a query on average",
    ]
    return "\n".join(lines)


def _shrunk(blocks: Tensor) -> tuple[Tensor, int]:
    """At most _WIDEST cells each way; a cell of several blocks is full or skipped if all of its blocks are."""
    merged = -(-max(blocks.shape) // _WIDEST)
    if merged == 1:
        return blocks, 1
    rows, columns = (-(-size // merged) for size in blocks.shape)
    cells = torch.empty(rows, columns, dtype=blocks.dtype)
    for row in range(rows):
        for column in range(columns):
            cell = blocks[row * merged : (row + 1) * merged, column * merged : (column + 1) * merged]
            cells[row, column] = cell[0, 0] if bool((cell == cell[0, 0]).all()) else PARTIAL
    return cells, merged


def draw(picture: Picture, mask: MaskMod, out: Path) -> None:
    """Draw the blocks, and the tokens of short sequences, into `out` (its ending chooses the format)."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError(f"--out needs matplotlib (pip install matplotlib): {error}") from error

    seq_len = picture.seq_len
    panels = 2 if seq_len <= _TOKENS_DRAWN else 1
    figure = Figure(figsize=(5.2 * panels, 5.8), layout="constrained")
    figure.suptitle(picture.name)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colors = ListedColormap(_COLORS)
    rows, columns = picture.blocks.shape
    axes[0].set_title(f"blocks of {picture.block_size}")
    axes[0].imshow(
        picture.blocks.numpy(),
        cmap=colors,
        vmin=SKIPPED,
        vmax=FULL,
        extent=(0, columns * picture.block_size, rows * picture.block_size, 0),
    )
    lines = [range(picture.block_size, seq_len, picture.block_size) if max(rows, columns) <= 64 else ()]
    if panels == 2:
        kept = dense_mask(mask, batch=1, q_len=seq_len, kv_len=seq_len, device="cpu")[0, 0]
        axes[1].set_title("tokens kept")
        axes[1].imshow(kept.int().numpy() * FULL, cmap=colors, vmin=SKIPPED, vmax=FULL, extent=(0, seq_len, seq_len, 0))
        lines.append(range(1, seq_len))
    for axis, borders in zip(axes, lines, strict=True):
        for at in borders:
            axis.axhline(at, color="white", linewidth=0.6)
            axis.axvline(at, color="white", linewidth=0.6)
        axis.set(xlabel="key j", ylabel="query t", xlim=(0, seq_len), ylim=(seq_len, 0))
        axis.xaxis.set_label_position("top")
        axis.xaxis.tick_top()
        axis.spines[:].set_visible(False)
    names = (("full", FULL), ("partial", PARTIAL), ("skipped", SKIPPED))
    legend = [Patch(color=_COLORS[kind], label=f"{name} ({picture.count(kind)})") for name, kind in names]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=150)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m score_mods.show",
        description="Show which blocks of a mask FlexAttention computes.",
        epilog="masks: " + "; ".join(_summary(name) for name in sorted(FACTORIES)),
    )
    parser.add_argument("mask", help='a name listed below, or "package.module:factory"')
    parser.add_argument("args", nargs="*", metavar="name=value", help="the factory's arguments, such as window=512")
    parser.add_argument("--seq-len", type=int, help="tokens of the sequence (default: 4096, or the documents' sum)")
    parser.add_argument("--block-size", type=int, default=128, help="queries and keys of a block (default: 128)")
    parser.add_argument("--documents", metavar="N,N,...", help="lengths of packed documents that the mask stays within")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw it as .png, .svg or .pdf")
    return parser


def _summary(name: str) -> str:
    law = (FACTORIES[name].__doc__ or "").partition(".")[0].partition("\n")[0]
    return f"{name} ({law})"


def _mask_args(pairs: Sequence[str]) -> dict[str, object]:
    args: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"mask arguments are given as name=value, got {pair!r}")
        if name in args:
            raise ValueError(f"mask argument {name!r} is given twice")
        try:
            args[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            args[name] = text
    return args


def _document_ids(text: str) -> Tensor:
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--documents takes lengths such as 1000,96,3000, got {text!r}") from error
    if min(lengths) < 1:
        raise ValueError(f"--documents takes lengths >= 1, got {text!r}")
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def _make(name: str, args: dict[str, object], document_ids: Tensor | None) -> MaskMod:
    if document_ids is None:
        if name == "document" and not args:
            raise ValueError("document needs --documents, the lengths of the packed documents, such as 1000,96,3000")
        return make_mask(name, **args)
    if name == "document" and not args:
        return document(document_ids)
    return all_of(make_mask(name, **args), document(document_ids))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on stderr for input that does not fit."""
    parser = _parser()
    given = parser.parse_intermixed_args(argv)
    try:
        document_ids = None if given.documents is None else _document_ids(given.documents)
        seq_len = given.seq_len
        if seq_len is None:
            seq_len = 4096 if document_ids is None else document_ids.shape[1]
        if seq_len < 1:
            raise ValueError(f"--seq-len must be >= 1, got {seq_len}")
        if document_ids is not None and document_ids.shape[1] != seq_len:
            raise ValueError(f"--documents add up to {document_ids.shape[1]} tokens, --seq-len is {seq_len}")
        mask = _make(given.mask, _mask_args(given.args), document_ids)
        picture = look_at(mask, seq_len=seq_len, block_size=given.block_size)
        encoding = "utf" if (sys.stdout.encoding or "").lower().startswith("utf") else "ascii"
        print(to_text(picture, encoding=encoding))
        if given.out is not None:
            draw(picture, mask, given.out)
            print(f"  drawn in {given.out}")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
