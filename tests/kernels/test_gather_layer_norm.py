"""Partial sums of the parameters' gradients, with fewer programs than a small batch would show."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import _backend
from mtvit_ops.ops import gather_layer_norm
from mtvit_ops.testing import assert_matches_formula, random_rows, random_tensor

pytest.importorskip("triton")
if _backend.triton_is_interpreted():
    from mtvit_ops.kernels import _launch

pytestmark = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)


@pytest.mark.parametrize("programs", [1, 3, 5], ids="triton-cpu-{}".format)
def test_programs_take_turns(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "BACKWARD_PROGRAMS", programs)
    assert _launch.partial_sums(13)[0] == programs
    rows = random_rows(60, 50, dead=2)  # 13 tiles of 4
    inputs = {"x": random_tensor(60, 384), "weight": random_tensor(384), "bias": random_tensor(384)}

    def formula(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        picked = torch.nn.functional.layer_norm(x[rows[:50].long()], (384,), weight, bias, 1e-6)
        return torch.cat((picked, picked.new_zeros(2, 384)))

    with _backend.use_backend("triton"):
        assert_matches_formula(lambda x, weight, bias: gather_layer_norm(x, rows, weight, bias), formula, inputs)
