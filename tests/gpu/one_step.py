"""One forward and backward of `impl="triton"` for a tool that watches a process:

compute-sanitizer --tool memcheck python -m tests.gpu.one_step
compute-sanitizer --tool racecheck python -m tests.gpu.one_step

Odd lengths, documents, all that the Hopper stages take and, with decay and a start state, the others. Prints "done".
"""

import torch

from scan_kernels import residual_linear_attention


def step(*, decay: bool, save_every: int) -> None:
    B, T, H, G, D = 2, 331, 4, 2, 128
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, device="cuda", dtype=torch.bfloat16)

    inputs = {"q": normal(B, T, H, D), "k": normal(B, T, G, D), "v": normal(B, T, G, D)}
    if decay:
        inputs |= {"decay": -normal(B, T, G).float().abs(), "initial_state": normal(B, G, 2 * D, D).float()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    # Chunks that no query reads among them.
    ids = (torch.arange(T, device="cuda") // 110).expand(B, T)
    o = residual_linear_attention(**inputs, window=100, document_ids=ids, impl="triton", save_every=save_every)
    grads = torch.autograd.grad(o, list(inputs.values()), normal(B, T, H, D))
    assert all(x.isfinite().all() for x in (o, *grads))


if __name__ == "__main__":
    step(decay=False, save_every=2)
    step(decay=True, save_every=0)
    torch.cuda.synchronize()
    print("done")
