"""What keeps the interpreter honest: rounding to bfloat16 and products of it."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import _backend

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from mtvit_ops.kernels._math import dot, rounded  # noqa: E402

pytestmark = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, rounded(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = dot(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.zeros((N, N), tl.float32), "ieee")
    tl.store(out_ptr + at, product)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=["triton-cpu-bfloat16", "triton-cpu-float16"])
def test_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 2e-38])
    x = torch.cat((special, torch.randn(1016) * 100))
    out = torch.empty(1024, dtype=dtype)
    round_kernel[(1,)](x, out, N=1024)
    assert torch.equal(out, x.to(dtype))
    round_kernel[(1,)](torch.full((1024,), float("nan")), out, N=1024)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=["triton-cpu-bfloat16", "triton-cpu-float16"])
def test_multiplies_as_pytorch_does(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    product_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float())
