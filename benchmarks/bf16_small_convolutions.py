"""How wrong is the kernel gradient of a bf16 convolution on this CPU where the input is thinner than the kernel?

Run:  python benchmarks/bf16_small_convolutions.py
Prints one JSON line a shape: how many of 20 gradients were NaN, and the largest error of the others as a share of the
largest exact value, for torch as it is and with medssl's guard. A sound bf16 gradient has an error below 0.01.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from torch.nn import functional as F

from medssl.engine.bf16 import guard_convolutions

SHAPES = [(2, 4, 4), (2, 2, 2), (4, 4, 2), (3, 4, 4), (8, 8, 8)]
REPEATS = 20


def measure(shape: tuple[int, int, int], *, guarded: bool) -> dict[str, float]:
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 32, 3, padding=1, bias=False)
    if guarded:
        guard_convolutions(conv)
    x = torch.randn(24, 32, *shape)
    exact = conv.weight.detach().double().requires_grad_()
    output = F.conv3d(x.double(), exact, padding=1)
    direction = torch.randn(output.shape)
    output.backward(direction.double())
    assert exact.grad is not None
    bad, worst = 0, 0.0
    for _ in range(REPEATS):
        rubbish = [torch.full((1 << power,), float("nan")) for power in (12, 16, 18, 20, 22)]
        del rubbish  # so that memory which nobody writes holds NaN
        conv.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x)
        y.backward(direction.to(y.dtype))
        assert conv.weight.grad is not None
        error = (conv.weight.grad - exact.grad).abs().max() / exact.grad.abs().max()
        if torch.isfinite(error):
            worst = max(worst, float(error))
        else:
            bad += 1
    return {"nan_gradients": bad, "worst_error_of_the_rest": worst}


def main() -> None:
    print(json.dumps({"torch": torch.__version__, "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}))
    for shape in SHAPES:
        for guarded in (False, True):
            print(json.dumps({"input": shape, "guarded": guarded, **measure(shape, guarded=guarded)}))


if __name__ == "__main__":
    main()
