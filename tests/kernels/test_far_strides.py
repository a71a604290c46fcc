"""Heads that lie further apart than 32 bits count, as where each head's tokens are one block of a large buffer."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import _backend, use_backend
from mtvit_ops.testing import assert_equal, offsets, random_tensor

pytestmark = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)


@pytest.mark.parametrize("keys", [5, 260], ids=["triton-cpu-one-launch", "triton-cpu-two-launches"])
def test_attention_gradients_of_heads_far_apart(keys: int) -> None:
    apart = 2**30  # the third head starts at 2**31; of the buffer only what is written takes memory
    buffer = torch.empty(2 * apart + 12, dtype=torch.float16)
    q = buffer.as_strided((3, 3, 4), (4, apart, 1)).copy_(random_tensor(3, 3, 4))
    k, grad = random_tensor(keys, 3, 4, dtype=torch.float16), random_tensor(3, 3, 4, dtype=torch.float16)
    rest = offsets((3,)), offsets((keys,)), 3, keys, 0.5, None
    with use_backend("triton"):
        out, lse, _ = torch.ops.mtvit_ops.varlen_attention(q, k, k, *rest, 0)
        got, want = (
            torch.ops.mtvit_ops.varlen_attention_backward(grad, queries, k, k, out, lse, *rest)
            for queries in (q, q.contiguous())
        )
    for value, wanted in zip(got, want, strict=True):
        assert_equal("gradient", value, wanted)
