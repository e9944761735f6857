"""Look at a mask: `python -m score_mods.show sliding_window window=512 --seq-len 4096 [--out mask.png]`.

Prints which blocks FlexAttention computes and which it skips, how many pairs are kept and left to a linear branch, and
what that is in FLOPs and bytes; --out draws it.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Never

import torch
from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.block_masks import build_block_mask
from score_mods.counting import EVALUATED_PAIRS, FULL, PARTIAL, SKIPPED, classify_blocks, in_partial_blocks, reads_ahead
from score_mods.dense import dense_mask
from score_mods.info import MaskMod, mask_info, mask_name
from score_mods.masks.causal import causal
from score_mods.masks.combinators import all_of, in_documents
from score_mods.masks.document import document
from score_mods.registry import FACTORIES, make_mask
from score_mods.residual import Residual, residual_mask, residual_of

_CELLS = {"utf": ("··", "▒▒", "██"), "ascii": ("..", "::", "##")}
_WIDEST = 32  # cells
_GRID_DRAWN = 64  # tokens up to which each has lines around it
_PIXELS = 512  # of a picture of tokens
_ELEMENT_BYTES = 2  # of bf16 keys and values
# The palette of docs/pictures.py: blue is read by the softmax branch, orange by the linear one.
_COLORS = ("#eef1f4", "#9cc4ea", "#1f6fb4")
_LINEAR = "#ee9b33"
_NEITHER = "#eef1f4"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one layer, for FLOPs and bytes; by default those of the 3b model."""

    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            check_whole_number(name, getattr(self, name), at_least=1, meaning="of the layer")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    def flops(self, pairs: float) -> float:
        """Two products of head_dim multiply-adds a pair and head, a multiply-add as two."""
        return 4 * self.head_dim * self.heads * pairs

    @property
    def pair_bytes(self) -> int:
        """Of a key and its value, one KV head."""
        return 2 * self.head_dim * _ELEMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What there is to show about a mask of one sequence. `blocks`: (rows, columns) of SKIPPED, PARTIAL, FULL.

    readable_pairs: those that a causal layer may read, in its documents. residual: what a linear branch reads besides,
    or None and why_no_residual. cached_keys: the most keys that a decoder has to hold at a time; None for a mask that
    reads later keys.
    """

    name: str
    mask: MaskMod
    seq_len: int
    block_size: int
    blocks: Tensor
    kept_pairs: int
    readable_pairs: int
    residual: Residual | None
    why_no_residual: str
    cached_keys: int | None

    def count(self, kind: int) -> int:
        return int((self.blocks == kind).sum())

    @property
    def computed(self) -> int:
        return self.count(FULL) + self.count(PARTIAL)

    @cached_property
    def causal_blocks(self) -> int:
        rows, columns = self.blocks.shape
        return sum(min(row + 1, columns) for row in range(rows))


def look_at(mask: MaskMod, *, seq_len: int, block_size: int, told_by: MaskMod | None = None) -> Picture:
    """Build the block mask of one sequence on CPU and count what it keeps.

    told_by: the mask without its documents, which says what residual it leaves; `mask` by default.
    """
    block_mask = build_block_mask(mask, batch=1, q_len=seq_len, kv_len=seq_len, device="cpu", block_size=block_size)
    blocks = classify_blocks(block_mask)[0, 0]
    kept = int((blocks == FULL).sum()) * block_size**2
    last_reader = torch.full((seq_len,), -1)
    rows, columns = (blocks == FULL).nonzero(as_tuple=True)
    inside = torch.arange(block_size)
    _latest(last_reader, columns[:, None] * block_size + inside, (rows * block_size + block_size - 1)[:, None])
    for part in in_partial_blocks(mask, blocks, seq_len, block_size):
        kept += int(part.kept.sum())
        reader = torch.where(part.kept, (part.row[:, None] * block_size + inside)[:, :, None], -1).amax(dim=1)
        _latest(last_reader, part.column[:, None] * block_size + inside, reader)
    residual, why = None, ""
    try:
        residual = residual_of(mask if told_by is None else told_by)
    except ValueError as error:
        why = str(error).partition("linear branch: ")[2].partition(";")[0]
    return Picture(
        name=mask_name(mask),
        mask=mask,
        seq_len=seq_len,
        block_size=block_size,
        blocks=blocks,
        kept_pairs=kept,
        readable_pairs=_readable_pairs(mask, seq_len),
        residual=residual,
        why_no_residual=why,
        cached_keys=None if reads_ahead(mask if told_by is None else told_by) else _most_alive(last_reader),
    )


def _latest(last_reader: Tensor, key: Tensor, reader: Tensor) -> None:
    """last_reader[key] = the latest of it and `reader`; keys past the end are left out."""
    key, reader = torch.broadcast_tensors(key, reader)
    there = key < len(last_reader)
    last_reader.scatter_reduce_(0, key[there], reader[there], "amax")


def _most_alive(last_reader: Tensor) -> int:
    """The most keys j <= t that a query from t on still reads, over all t."""
    read = last_reader >= torch.arange(len(last_reader))
    begins = read.long()
    ends = torch.zeros(len(last_reader) + 1, dtype=torch.long)
    ends.scatter_add_(0, last_reader[read] + 1, torch.ones_like(last_reader[read]))
    return int((begins.cumsum(0) - ends[:-1].cumsum(0)).max())


def _readable_pairs(mask: MaskMod, seq_len: int) -> int:
    info = mask_info(mask)
    if info is None or not info.documents:
        return seq_len * (seq_len + 1) // 2
    ids = info.documents[0][0, :seq_len]
    lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    return int((lengths * (lengths + 1) // 2).sum())


def to_text(picture: Picture, *, heads: Heads | None = None, encoding: str = "utf") -> str:
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
        f"  {_residual_line(picture)}",
        *(f"  {line}" for line in _cost_lines(picture, heads or Heads(), causal_pairs)),
    ]
    return "\n".join(lines)


def _residual_line(picture: Picture) -> str:
    if picture.residual is None:
        return f"no linear branch beside it: {picture.why_no_residual}"
    left = picture.readable_pairs - picture.kept_pairs
    keys = f"t - {picture.residual.window + 1}"
    keys = f"{picture.residual.sinks} <= j <= {keys}" if picture.residual.sinks else f"j <= {keys}"
    return f"a linear branch reads the {left:,} pairs that are left, {left / picture.readable_pairs:.2%}: {keys}"


def _cost_lines(picture: Picture, heads: Heads, causal_pairs: int) -> list[str]:
    """Forward FLOPs beside causal attention, and bytes, of one layer and sequence."""
    of_block = picture.block_size**2
    needed, computed = heads.flops(picture.kept_pairs), heads.flops(picture.computed * of_block)
    causal_needed, causal_computed = heads.flops(causal_pairs), heads.flops(picture.causal_blocks * of_block)
    keys_of_head = min(picture.block_size, picture.seq_len) * picture.computed
    lines = [
        f"of one layer with {heads.heads} heads, {heads.kv_heads} KV heads of width {heads.head_dim}, bf16:",
        f"  forward FLOPs {_count(needed)}, in the computed blocks {_count(computed)}; "
        f"{_saved(needed, causal_needed)} (blocks: {_saved(computed, causal_computed)}) beside causal attention",
        f"  keys and values read by the blocks {_size(keys_of_head * heads.pair_bytes * heads.heads)}, "
        f"of {_size(picture.seq_len * heads.pair_bytes * heads.kv_heads)} that there are",
    ]
    if picture.cached_keys is None:
        lines.append("  no cache for decoding: queries read later keys")
    else:
        size = _size(picture.cached_keys * heads.pair_bytes * heads.kv_heads)
        lines.append(f"  cache for decoding {size} a sequence: at most {picture.cached_keys:,} keys are still needed")
    return lines


def _saved(flops: float, of: float) -> str:
    return f"{1 - flops / of:.1%} saved" if flops <= of else f"{flops / of - 1:.1%} more"


def _count(number: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}FLOP"
    return f"{number:.0f} FLOP"


def _size(number: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} bytes"


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


def read_shares(picture: Picture) -> tuple[Tensor, Tensor]:
    """How much of each cell of a picture of tokens the softmax and the linear branch read: two (cells, cells), 0 to 1.

    A cell is a pair of tokens, or as many as make at most 512 cells each way.
    """
    seq_len = picture.seq_len
    merged = -(-seq_len // _PIXELS)
    cells = -(-seq_len // merged)
    masks = [picture.mask]
    if picture.residual is not None:
        # What is left, from its definition; documents confine both.
        masks.append(all_of(residual_mask(picture.mask), _readable(picture.mask)))
    length = torch.full((cells,), merged)
    length[-1] = seq_len - (cells - 1) * merged
    shares = [_pairs_in_cells(mask, seq_len, merged) / (length[:, None] * length) for mask in masks]
    return shares[0], shares[1] if len(shares) == 2 else torch.zeros_like(shares[0])


def _pairs_in_cells(mask: MaskMod, seq_len: int, merged: int) -> Tensor:
    """Pairs kept in each cell of merged x merged tokens: (cells, cells)."""
    cells = -(-seq_len // merged)
    # Some rows of cells at a time, so that a long sequence needs no T x T matrix.
    each = max(1, EVALUATED_PAIRS // (seq_len * merged)) * merged
    strips = []
    for start in range(0, seq_len, each):
        kept = _strip(mask, start, min(each, seq_len - start), seq_len).float()
        rows = -(-len(kept) // merged)
        kept = torch.nn.functional.pad(kept, (0, cells * merged - seq_len, 0, rows * merged - len(kept)))
        strips.append(kept.view(rows, merged, cells, merged).sum(dim=(1, 3)))
    return torch.cat(strips)


def _readable(mask: MaskMod) -> MaskMod:
    info = mask_info(mask)
    return all_of(causal(), *(document(ids) for ids in (info.documents if info is not None else ())))


def _strip(mask: MaskMod, start: int, length: int, seq_len: int) -> Tensor:
    def there(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask(b, h, q_idx + start, kv_idx)

    return dense_mask(there, batch=1, q_len=length, kv_len=seq_len, device="cpu")[0, 0]


def draw(picture: Picture, out: Path) -> None:
    """Draw the tokens that each branch reads and the blocks, into `out` (its ending chooses the format)."""
    try:
        from matplotlib.colors import ListedColormap, to_rgb
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError(f"--out needs matplotlib (pip install matplotlib): {error}") from error

    seq_len = picture.seq_len
    softmax, linear = read_shares(picture)
    background, blue, orange = (torch.tensor(to_rgb(color)) for color in (_NEITHER, _COLORS[FULL], _LINEAR))
    # A cell of many tokens with a few that are read would hardly show.
    softmax, linear = softmax.sqrt(), linear.sqrt()
    both = (softmax + linear).clamp(min=1)
    softmax, linear = softmax / both, linear / both
    tokens = background + softmax[..., None] * (blue - background) + linear[..., None] * (orange - background)

    figure = Figure(figsize=(11, 6.5), layout=ConstrainedLayoutEngine(h_pad=0.1))
    figure.suptitle(picture.name if len(picture.name) < 90 else f"{picture.name[:87]}...")
    left, right = figure.subplots(1, 2)
    left.set_title("tokens: what each query reads")
    left.imshow(tokens.clamp(0, 1).numpy(), extent=(0, seq_len, seq_len, 0), interpolation="nearest")
    rows, columns = picture.blocks.shape
    covered = (0, columns * picture.block_size, rows * picture.block_size, 0)
    right.set_title(f"blocks of {picture.block_size}: what the kernel computes")
    right.imshow(
        picture.blocks.numpy(), cmap=ListedColormap(_COLORS), vmin=SKIPPED, vmax=FULL, extent=covered,
        interpolation="nearest",
    )  # fmt: skip
    lines = (
        range(1, seq_len) if seq_len <= _GRID_DRAWN else (),
        range(picture.block_size, seq_len, picture.block_size),
    )
    for axis, borders in zip((left, right), lines, strict=True):
        for at in borders if len(borders) <= _GRID_DRAWN else ():
            axis.axhline(at, color="white", linewidth=0.6)
            axis.axvline(at, color="white", linewidth=0.6)
        axis.set(xlabel="key j", ylabel="query t", xlim=(0, seq_len), ylim=(seq_len, 0))
        axis.xaxis.set_label_position("top")
        axis.xaxis.tick_top()
        axis.spines[:].set_visible(False)
    read = [Patch(color=_COLORS[FULL], label=f"softmax ({picture.kept_pairs / seq_len**2:.1%})")]
    if picture.residual is not None:
        share = (picture.readable_pairs - picture.kept_pairs) / seq_len**2
        read.append(Patch(color=_LINEAR, label=f"linear: the residual ({share:.1%})"))
    read.append(Patch(color=_NEITHER, label="neither" if picture.residual else "not read"))
    names = (("full", FULL), ("partial", PARTIAL), ("skipped", SKIPPED))
    kinds = [Patch(color=_COLORS[kind], label=f"{name} ({picture.count(kind)})") for name, kind in names]
    for axis, entries in ((left, read), (right, kinds)):
        axis.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False,
                    fontsize=9, columnspacing=1.2, handlelength=1.2)  # fmt: skip
    if picture.residual is None:
        figure.supxlabel(f"no linear branch beside it: {picture.why_no_residual}", fontsize=9, color="#59636e")
    figure.savefig(out, dpi=150)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m score_mods.show",
        description="Show which blocks of a mask are computed, what is left to a linear branch, and what it costs.",
        epilog="masks: " + "; ".join(_summary(name) for name in sorted(FACTORIES)),
    )
    parser.add_argument("mask", help='a name listed below, or "package.module:factory"')
    parser.add_argument("args", nargs="*", metavar="name=value", help="the factory's arguments, such as window=512")
    parser.add_argument("--seq-len", type=int, help="tokens of the sequence (default: 4096, or the documents' sum)")
    parser.add_argument("--block-size", type=int, default=128, help="queries and keys of a block (default: 128)")
    parser.add_argument("--heads", type=int, default=16, help="query heads of the layer (default: 16)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads (default: 4)")
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default: 128)")
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


def _make(name: str, args: dict[str, object], document_ids: Tensor | None) -> tuple[MaskMod, MaskMod | None]:
    """The mask within its documents, and the mask alone where there is one."""
    if name == "document" and not args:
        if document_ids is None:
            raise ValueError("document needs --documents, the lengths of the packed documents, such as 1000,96,3000")
        return document(document_ids), None
    mask = make_mask(name, **args)
    if document_ids is None:
        return mask, None
    starts = torch.searchsorted(document_ids, document_ids)
    positions = torch.arange(document_ids.shape[1])[None] - starts
    return in_documents(mask, document_ids=document_ids, positions=positions), mask


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, 130 when interrupted, or 2 with one line on stderr for input that does not fit."""
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
        if given.out is not None and (given.out.is_dir() or not given.out.suffix):
            raise ValueError(f"--out {given.out} names no picture: end it in .png, .svg or .pdf")
        heads = Heads(heads=given.heads, kv_heads=given.kv_heads, head_dim=given.head_dim)
        mask, alone = _make(given.mask, _mask_args(given.args), document_ids)
        picture = look_at(mask, seq_len=seq_len, block_size=given.block_size, told_by=alone)
        encoding = "utf" if (sys.stdout.encoding or "").lower().startswith("utf") else "ascii"
        print(to_text(picture, heads=heads, encoding=encoding))
        if given.out is not None:
            draw(picture, given.out)
            print(f"  drawn in {given.out}")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
