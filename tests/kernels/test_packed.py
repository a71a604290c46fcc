"""How work on a packed batch is numbered: every token in exactly one span, whatever the lengths."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import _backend
from mtvit_ops.testing import offsets

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from mtvit_ops.kernels._launch import work_list  # noqa: E402
from mtvit_ops.kernels._packed import find_span, span_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)
SPAN = 16


@triton.jit(do_not_specialize=["batch", "spans"])
def visits_kernel(cu_ptr, visits_ptr, batch, spans, SPAN: tl.constexpr, FLAT: tl.constexpr):
    image, place = find_span(tl.program_id(0), cu_ptr, batch, spans, SPAN, FLAT)
    first, length = span_of(cu_ptr, image)
    rows = place * SPAN + tl.arange(0, SPAN)
    visits = tl.load(visits_ptr + first + rows, mask=rows < length, other=0)
    tl.store(visits_ptr + first + rows, visits + 1, mask=rows < length)


CASES = {  # lengths, entries behind the last image, the bound on lengths
    "dense": ([40, 40, 37], 0, 40),
    "one-span": ([3, 16, 1], 0, 16),
    "edges": ([15, 16, 17, 0, 32, 33], 5, 48),
    "uneven": ([1, 100, 0, 0, 2, 16, 16], 0, 100),
    "empty-ends": ([0, 0, 70, 0], 9, 70),
    "loose-bound": ([3, 5, 20], 0, 10**6),
    "all-empty": ([0, 0], 4, 0),
    # more images than are looked at in one go
    "many": ([*[0] * 254, 1, 0, 2, 40], 0, 40),
}


@pytest.mark.parametrize("flat", [False, True], ids=["triton-cpu-by-image", "triton-cpu-by-tokens"])
@pytest.mark.parametrize(("lengths", "dead", "longest"), CASES.values(), ids=CASES)
def test_every_token_has_one_span(lengths: list[int], dead: int, longest: int, flat: bool) -> None:
    tokens, batch = sum(lengths) + dead, len(lengths)
    work = work_list(tokens, batch, longest, SPAN)
    items = tokens // SPAN + batch if flat else work.spans * batch
    assert (work.items == items) if flat == work.flat else (work.items <= items)
    visits = torch.zeros(tokens, dtype=torch.int32)
    visits_kernel[(items,)](offsets(lengths), visits, batch, work.spans, SPAN=SPAN, FLAT=flat)
    assert visits.tolist() == [1] * sum(lengths) + [0] * dead
