"""Level L1 for backends: autocast, loss scaling, compilation."""

from __future__ import annotations

import torch

from torchport.testing.checks import Checks, NotClaimed, require
from torchport.testing.device import Device, device_bench

FINE = 1.0 + 2.0**-12
"""A number that float32 holds exactly, and that both 16-bit formats round to 1."""

CHECKS = Checks("L1", device_bench)


def _claims(bench: Device, dtype: str) -> torch.dtype:
    if dtype not in bench.capabilities.autocast:
        raise NotClaimed(f"capabilities() does not declare autocast to {dtype}")
    found: torch.dtype = getattr(torch, dtype)
    return found


@CHECKS.each("autocast.{}", "under autocast, products are computed and given in {}", ("bfloat16", "float16"))
def autocast_computes_in_the_dtype(bench: Device, dtype: str) -> None:
    """Multiply a number that the format rounds; its dtype alone would not show in what it was computed."""
    wanted = _claims(bench, dtype)
    left = torch.full((2, 2), FINE, device=bench.device)
    right = torch.eye(2, device=bench.device)
    with bench.backend.autocast(wanted):
        product = left @ right
    require(product.dtype == wanted, f"the product has dtype {product.dtype}")
    values = product.float().cpu()
    require(values.eq(1).all().item(), f"{FINE} times one is {values.tolist()}: not rounded to {dtype}")
    after = left @ right
    require(after.dtype == torch.float32, f"after the context, products have dtype {after.dtype}")


@CHECKS.each("autocast.{}-gradients", "gradients through autocast to {} are float32", ("bfloat16", "float16"))
def gradients_keep_their_dtype(bench: Device, dtype: str) -> None:
    """Go backward through a linear layer."""
    wanted = _claims(bench, dtype)
    layer = torch.nn.Linear(8, 8, bias=False).to(bench.device)
    with bench.backend.autocast(wanted):
        loss = layer(torch.ones(4, 8, device=bench.device)).float().sum()
    loss.backward()
    gradient = layer.weight.grad
    assert gradient is not None
    require(gradient.dtype == torch.float32, f"the gradient has dtype {gradient.dtype}")
    require(gradient.cpu().eq(4).all().item(), "the gradient of a sum over 4 rows of ones is not 4")


@CHECKS.each("autocast.{}-off", "autocast to {} can be switched off inside", ("bfloat16", "float16"))
def autocast_can_be_switched_off(bench: Device, dtype: str) -> None:
    """Nest a context with `enabled=False`."""
    wanted = _claims(bench, dtype)
    left = torch.full((2, 2), FINE, device=bench.device)
    with bench.backend.autocast(wanted), bench.backend.autocast(wanted, enabled=False):
        product = left @ torch.eye(2, device=bench.device)
    require(product.dtype == torch.float32, f"the product has dtype {product.dtype}")


def _with_scaler(bench: Device) -> None:
    if not bench.capabilities.grad_scaler:
        raise NotClaimed("capabilities() does not declare grad_scaler")


@CHECKS("scaler.unscales", "the loss scaler gives the step unscaled gradients")
def scaler_unscales(bench: Device) -> None:
    """Step SGD through the scaler and compare with the step by hand."""
    _with_scaler(bench)
    scaler = bench.backend.grad_scaler(init_scale=1024.0)
    weight = torch.nn.Parameter(torch.ones(4, device=bench.device))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    torch.autograd.backward(scaler.scale((weight * 2).sum()))
    assert weight.grad is not None
    scaled = weight.grad.cpu().tolist()
    require(scaled == [2048.0] * 4, f"gradients of 2 times a scale of 1024 are {scaled}")
    scaler.step(optimizer)
    scaler.update()
    values = weight.detach().cpu().tolist()
    require(values == [0.5] * 4, f"1 - 0.25 x 2 gave {values}")
    require(scaler.get_scale() == 1024.0, f"the scale became {scaler.get_scale()}")


@CHECKS("scaler.skips", "the loss scaler skips the step of a gradient that overflowed, and lowers its scale")
def scaler_skips_overflow(bench: Device) -> None:
    """Give it an infinite gradient."""
    _with_scaler(bench)
    scaler = bench.backend.grad_scaler(init_scale=1024.0)
    weight = torch.nn.Parameter(torch.ones(4, device=bench.device))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    torch.autograd.backward(scaler.scale((weight * float("inf")).sum()))
    scaler.step(optimizer)
    scaler.update()
    require(weight.detach().cpu().eq(1).all().item(), "the step was not skipped")
    require(scaler.get_scale() == 512.0, f"the scale became {scaler.get_scale()} instead of 512")


@CHECKS("compile.same-result", "a function compiled by the backend's compiler gives what it gives uncompiled")
def compiled_gives_the_same(bench: Device) -> None:
    """Compile a small function and compare; fused operations round differently by about 2^-23."""
    if not bench.capabilities.compile:
        raise NotClaimed("capabilities() does not declare compile")

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x * 2 + 1).sum(dim=1)

    x = torch.linspace(-1, 1, 64, device=bench.device).view(8, 8)
    expected = function(x).cpu()
    actual = torch.compile(function, backend=bench.backend.compile_backend())(x).cpu()
    difference = (actual - expected).abs().max().item()
    require(difference <= 1e-5, f"the greatest difference is {difference:.1e}")
