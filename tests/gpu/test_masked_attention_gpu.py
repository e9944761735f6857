"""The softmax branch by each backend, against dense float64 attention. `python -m pytest tests/gpu -m gpu`."""

from __future__ import annotations

import pytest
import torch

from flexrattn.masked_attention import KERNEL_OPTIONS, MaskedAttention, check_backend
from score_mods import all_of, build_block_mask, dense_mask, document, reference_attention, sliding_window
from tests.closeness import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", KERNEL_OPTIONS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("D", "T", "window"), [(64, 700, 100), (128, 1024, 512)])
def test_a_window_of_documents(backend, documents, D, T, window):
    try:
        check_backend(KERNEL_OPTIONS[backend], torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator("cuda").manual_seed(T)
    q, k, v, do = (torch.randn(2, T, heads, D, device="cuda", generator=generator).bfloat16() for heads in (8, 2, 2, 8))
    mask_mod = sliding_window(window)
    if documents:
        ids = (torch.arange(T, device="cuda") // 150).expand(2, T).contiguous()
        mask_mod = all_of(mask_mod, document(ids))
    sizes = {"q_len": T, "kv_len": T, "device": "cuda"} | ({"batch": 2} if documents else {})
    inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS[backend])).build()
    mask = build_block_mask(mask_mod, **sizes)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    o = inner(*given, attention_masks=mask, enable_gqa=True)
    found = dict(zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, given, do)), strict=True))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o = reference_attention(*exact, dense_mask(mask_mod, **sizes))
    wanted = dict(zip(found, (o, *torch.autograd.grad(o, exact, do.double())), strict=True))
    for name, x in found.items():
        assert relative_error(x, wanted[name]) < 0.01, name
