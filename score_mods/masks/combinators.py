from torch import Tensor

from score_mods.info import MaskInfo, MaskMod, check_takes_four, describe, mask_info


def all_of(*masks: MaskMod) -> MaskMod:
    """Keep what every one of `masks` keeps. One mask alone is returned as it is.

    Raises ValueError without masks, or for something that is no mask.
    """
    first, rest = _check("all_of", masks)
    if not rest:
        return first

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = first(b, h, q_idx, kv_idx)
        for mask in rest:
            kept = kept & mask(b, h, q_idx, kv_idx)
        return kept

    infos = [mask_info(mask) for mask in masks]
    known = [info for info in infos if info is not None]
    windows = [info.window for info in known if info.window is not None]
    # A bound of one part bounds what all keep; the bounds are the law if they are each part's law.
    info = MaskInfo(
        name="all_of",
        causal=any(info.causal for info in known),
        window=min(windows, default=None),
        documents=_distinct([ids for info in known for ids in info.documents]),
        exact=all(info is not None and info.exact for info in infos),
        parts=masks,
    )
    return describe(keep, info)


def any_of(*masks: MaskMod) -> MaskMod:
    """Keep what at least one of `masks` keeps. One mask alone is returned as it is.

    Raises ValueError without masks, or for something that is no mask.
    """
    first, rest = _check("any_of", masks)
    if not rest:
        return first

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = first(b, h, q_idx, kv_idx)
        for mask in rest:
            kept = kept | mask(b, h, q_idx, kv_idx)
        return kept

    infos = [mask_info(mask) for mask in masks]
    windows = [info.window if info is not None else None for info in infos]
    bounded = [window for window in windows if window is not None]
    # Only a bound that every part has bounds the union. It says nothing about what is kept inside: never exact.
    info = MaskInfo(
        name="any_of",
        causal=all(info is not None and info.causal for info in infos),
        window=max(bounded) if len(bounded) == len(masks) else None,
        documents=_in_every([info.documents if info is not None else () for info in infos]),
        parts=masks,
    )
    return describe(keep, info)


def _check(name: str, masks: tuple[MaskMod, ...]) -> tuple[MaskMod, tuple[MaskMod, ...]]:
    if not masks:
        raise ValueError(f"{name} needs at least one mask")
    for mask in masks:
        check_takes_four(mask, name)
    return masks[0], masks[1:]


# By identity: a tensor's own == compares elements.
def _distinct(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _in_every(groups: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    common = set.intersection(*({id(tensor) for tensor in group} for group in groups))
    return _distinct([tensor for tensor in groups[0] if id(tensor) in common])
