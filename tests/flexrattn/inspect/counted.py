"""Counts the products that the portable kernels compute, under the interpreter. `test_scan.py` runs this file."""

import torch
from triton.runtime.interpreter import InterpreterBuilder

from flexrattn.inspect.scan import work
from scan_kernels import fused, residual_linear_attention
from scan_kernels.kernels import configs
from scan_kernels.kernels.launch import Config, Launch

counted = {"now": 0}
create_dot = InterpreterBuilder.create_dot


def count(self, a, b, *rest):
    counted["now"] += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
    return create_dot(self, a, b, *rest)


InterpreterBuilder.create_dot = count


def run(launch):
    counted["now"] = 0
    result = run_launch(launch)
    expected = work(launch)[0]
    print(launch.kernel.fn.__name__, counted["now"], expected)
    assert counted["now"] == expected, launch.kernel.fn.__name__
    return result


run_launch = Launch.run
# The interpreter's states: chunks of 16 rows, segments of 2.
plan = configs.Plan(16, 2, *(Config(num_warps=4, heads=heads) for heads in (1, 1, 2, 2, 1)))
configs.plan_for = lambda *_: plan
for name in ("forward", "backward"):
    function = getattr(fused, name)

    def launched(*args, function=function, **options):
        return function(*args, **options, run=run)

    setattr(fused, name, launched)
for feature_map, start, decays in (("softmax", False, False), ("identity", False, True), ("softmax", True, True)):
    shape = {"q": (1, 36, 4, 16), "k": (1, 36, 2, 16), "v": (1, 36, 2, 16)}
    inputs = {key: torch.randn(size, requires_grad=True) for key, size in shape.items()}
    if decays:
        inputs["decay"] = -torch.rand(1, 36, 2)
    state = torch.randn(1, 4, 32, 16) if start else None
    o = residual_linear_attention(
        **inputs, window=5, feature_map=feature_map, initial_state=state, impl="triton", save_every=2
    )
    o.sum().backward()
print("equal")
