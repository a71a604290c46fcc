"""The algorithms of csrc/cuda on threads of the CPU: what needs no GPU to be right is held to the op tests' tables."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mtvit_ops.reference import halting_step as halting_reference
from mtvit_ops.reference import token_select as select_reference
from mtvit_ops.testing import assert_equal, offsets

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # by MtvitDtype
BITS = (torch.int32, torch.int16, torch.int16, torch.int64)
# one thread that sorts everything, and a team that must wait for each other and has no room to sort;
# each also with the offsets by a launch of their own
MODES = {"alone": (0, 0), "alone-scanned": (0, 1), "team": (1, 0), "team-scanned": (1, 1)}

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Selection(ctypes.Structure):
    """MtvitSelection of csrc/cuda/kernels.h."""

    _fields_ = [
        *fields(POINTER, "scores rows cu_seqlens mask keep_counts"),
        *fields(LONG, "tokens batch keep"),
        ("threshold", ctypes.c_uint64),
        ("num_prefix_tokens", LONG),
        *fields(INT, "by_score return_dropped dtype"),
        *fields(LONG, "capacity dropped_capacity"),
        *fields(POINTER, "out out_cu dropped dropped_cu counts marks"),
    ]


class Halting(ctypes.Structure):
    """MtvitHalting of csrc/cuda/kernels.h."""

    _fields_ = [
        *fields(POINTER, "x rows cu_seqlens readout cumulative remainder ponder counters output"),
        *fields(LONG, "num_rows dim x_stride tokens batch num_readout"),
        *fields(FLOAT, "gate_scale gate_center bar"),
        *fields(INT, "last dtype"),
        *fields(POINTER, "new_cumulative new_remainder new_ponder score new_counters new_output next next_cu"),
        *fields(POINTER, "share going counts"),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("host") / "host.so"
    # no contraction: products and sums round one by one, as the kernels are built
    flags = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
    command = [str(COMPILER), *flags, "-I", str(CSRC), str(HERE / "cuda_host.cpp"), "-o", str(built)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(built))


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


class Guarded:
    """Results and scratch of a call, each between two words that nobody may write."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def new(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        whole = torch.full((size + 2,), -12345, dtype=dtype)
        self.held.append(whole)
        return whole[1:-1]

    def check(self) -> None:
        assert all(whole[0] == whole[-1] == -12345 for whole in self.held)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threshold_bits(threshold: float | None, dtype: torch.dtype) -> int:
    """As the binding rounds it: to float32 first."""
    if threshold is None:
        return 0
    number = torch.tensor(threshold, dtype=torch.float64)
    number = number if dtype == torch.float64 else number.float().to(dtype)
    width = 8 * dtype.itemsize
    return number.view(BITS[DTYPES.index(dtype)]).item() % (1 << width)


def host_select(library: ctypes.CDLL, mode: tuple[int, int], *arguments: Any) -> tuple[Tensor, ...]:
    """``token_select``, without the bound that only Triton needs, through the harness."""
    scores, rows, cu, mask, counts, keep, threshold, prefix, by_score, capacity, return_dropped, room = arguments
    given, batch = (mask if scores is None else scores), cu.shape[0] - 1
    tokens, dtype = given.shape[0], torch.float32 if scores is None else scores.dtype
    held = Guarded()
    out, out_cu, dropped_cu = held.new(capacity), held.new(batch + 1), held.new(batch + 1)
    dropped = held.new(room if return_dropped else 0)
    scratch = held.new(batch), held.new(tokens)
    call = Selection(
        *map(address, (scores, rows, cu, mask, counts)),
        *(tokens, batch, keep, threshold_bits(threshold, dtype), prefix),
        *(by_score, return_dropped, DTYPES.index(dtype), capacity, room),
        *map(address, (out, out_cu, dropped, dropped_cu, *scratch)),
    )
    library.host_token_select(ctypes.byref(call), *mode)
    held.check()
    return tuple(value.clone() for value in (out, out_cu, dropped, dropped_cu))


def host_halting(library: ctypes.CDLL, mode: tuple[int, int], *arguments: Any) -> tuple[Tensor, ...]:
    """``halting_step`` of the reference, through the harness."""
    given, rows, cu, readout, *state, scale, center, eps, last = arguments
    x, sums, counters, output = given.float(), state[:3], state[3], state[4]
    num_rows, dim = x.shape
    batch, listed = cu.shape[0] - 1, num_rows if rows is None else rows.shape[0]
    held = Guarded()
    floats = [held.new(num_rows, torch.float32) for _ in range(4)]
    new_counters, new_output = held.new(num_rows), held.new(output.numel(), torch.float32)
    lists = held.new(listed), held.new(batch + 1)
    scratch = held.new(num_rows, torch.float32), held.new(listed), held.new(batch)
    call = Halting(
        *map(address, (x, rows, cu, readout, *sums, counters, output)),
        *(num_rows, dim, x.stride(0), listed, batch, readout.shape[0]),
        *(scale, center, 1.0 - eps, last, 0),
        *map(address, (*floats, new_counters, new_output, *lists, *scratch)),
    )
    library.host_halting_step(ctypes.byref(call), *mode)
    held.check()
    results = (*floats[:3], new_counters, new_output.reshape(output.shape), floats[3], *lists)
    return tuple(value.clone() for value in results)


def table(name: str) -> ModuleType:
    """The op tests' own module."""
    spec = importlib.util.spec_from_file_location(f"table_of_{name}", HERE / "ops" / f"test_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SELECT, HALT = table("token_select"), table("halting_step")


@pytest.fixture
def selects(library: ctypes.CDLL, mode: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function runs the harness."""
    monkeypatch.setattr(
        sys.modules["mtvit_ops.ops.token_select"],
        "TOKEN_SELECT",
        lambda *given: host_select(library, mode, *given[:-1]),
    )


@pytest.fixture
def halts(library: ctypes.CDLL, mode: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function runs the harness, with the gradient that the op has."""
    op: Any = sys.modules["mtvit_ops.ops.halting_step"]

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return host_halting(library, mode, *arguments)

        setup_context = staticmethod(op._setup_context)
        backward = staticmethod(op._backward)

    monkeypatch.setattr(op, "HALTING_STEP", Step.apply)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["ascending", "score"])
@pytest.mark.parametrize("case", SELECT.CASES.values(), ids=SELECT.CASES)
def test_token_select(
    case: Any, order: str, dtype: torch.dtype, selects: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    SELECT.test_matches_the_model(case, order, "cuda", "cpu", dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", HALT.CASES.values(), ids=HALT.CASES)
def test_halting_step(case: Any, dtype: torch.dtype, halts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    HALT.test_matches_the_rule(case, "cuda", "cpu", dtype, monkeypatch)


def test_a_sum_of_exactly_one_minus_eps_halts_without_weight(halts: None) -> None:
    HALT.test_a_sum_of_exactly_one_minus_eps_halts_without_weight("cuda", "cpu", torch.float32)


def draw(generator: random.Random) -> tuple[Any, ...]:
    """Arguments of ``token_select`` as a GPU may get them: counts and capacities that nobody has checked, too."""
    lengths = [generator.choice((0, 1, 2, 15, 16, 17, 40)) for _ in range(generator.randrange(5))]
    cu_seqlens = offsets(lengths)
    tokens = sum(lengths) + generator.choice((0, 0, 3))
    dtype = generator.choice(DTYPES)
    values = (0.0, -0.0, 1.0, -1.5, 0.25, float("inf"), -float("inf"), float("nan"), 3e-7)
    scores = torch.tensor([generator.choice(values) for _ in range(tokens)], dtype=dtype)
    mask = counts = threshold = None
    keep, prefix = -1, generator.choice((0, 0, 1, 3))
    rule = generator.randrange(4)
    if rule == 0:
        keep = generator.randrange(20)
    elif rule == 1:
        counts = torch.tensor([generator.randrange(-2, 45) for _ in lengths], dtype=torch.int32)
    elif rule == 2:
        threshold = generator.choice((0.0, -0.0, 0.3, float("inf"), -float("inf")))
    else:
        mask = torch.tensor([generator.random() < 0.5 for _ in range(tokens)], dtype=torch.bool)
    if rule == 3 and generator.random() < 0.5:
        scores = None
    rows = torch.randperm(tokens).int() if generator.random() < 0.5 else None
    room = [generator.choice((0, 1, tokens // 2, tokens, tokens + 5)) for _ in range(2)]
    dropped = generator.random() < 0.7
    by_score = generator.random() < 0.5
    return (
        *(scores, rows, cu_seqlens, mask, counts, keep, threshold, prefix),
        *(by_score, room[0], dropped, room[1] if dropped else 0),
    )


@pytest.mark.parametrize("seed", range(200))
def test_token_select_is_the_reference(seed: int, library: ctypes.CDLL) -> None:
    arguments = draw(random.Random(seed))
    wanted = select_reference.token_select(*arguments, 40)  # the longest drawn image
    for mode in MODES.values():
        got = host_select(library, mode, *arguments)
        for name, value, want in zip(("rows", "offsets", "dropped", "dropped offsets"), got, wanted, strict=True):
            assert_equal(f"{name}, {mode}", value, want)


@pytest.mark.parametrize("seed", range(50))
def test_halting_step_is_the_reference(seed: int, library: ctypes.CDLL) -> None:
    """Bit by bit but for the scores, whose exponential is the C library's here."""
    generator = random.Random(seed)
    lengths = [generator.choice((0, 1, 3, 17)) for _ in range(generator.randrange(4))]
    listed, num_rows = sum(lengths), sum(lengths) + generator.randrange(1, 6)
    rows = torch.cat((torch.randperm(num_rows)[:listed], torch.full((2,), -1))).int()
    x = torch.randn(num_rows, 3)
    x[:, 0] = torch.tensor([-3.0, 0.0, 2.0]).repeat(num_rows)[:num_rows]  # far from the bar, or at it to the bit
    eps = (0.01, 0.5)[seed % 2]
    cumulative = torch.rand(num_rows).mul(8).floor().div(8)
    state = cumulative, 1 - cumulative, torch.rand(num_rows), torch.arange(num_rows).int(), torch.randn(2, 3)
    readout, gate = torch.tensor([0, num_rows - 1]).int(), (1.0, 0.0, eps, seed % 3 == 0)
    arguments = (x, rows, offsets(lengths), readout, *state, *gate)
    wanted = halting_reference.halting_step(*arguments)
    for mode in MODES.values():
        got = host_halting(library, mode, *arguments)
        for place, (value, want) in enumerate(zip(got, wanted, strict=True)):
            if want.is_floating_point():
                torch.testing.assert_close(value, want, rtol=4 * torch.finfo(want.dtype).eps, atol=1e-6)
            else:
                assert_equal(f"result {place}, {mode}", value, want)


@pytest.mark.parametrize("seed", range(20))
def test_bad_offsets_touch_nothing_else(seed: int, library: ctypes.CDLL) -> None:
    """What they select is anybody's guess; the guards say that nothing else was written."""
    generator = random.Random(seed)
    cu_seqlens = torch.tensor([generator.randrange(-50, 150) for _ in range(4)], dtype=torch.int32)
    scores = torch.rand(40)
    for mode in MODES.values():
        for by_score in (False, True):
            for keep, threshold in ((7, None), (-1, 0.5)):
                rest = (None, None, keep, threshold, 1, by_score, 20, True, 20)
                host_select(library, mode, scores, None, cu_seqlens, *rest)


def keys_of(library: ctypes.CDLL, values: Tensor) -> list[int]:
    keys = (ctypes.c_uint64 * values.numel())()
    library.host_keys(DTYPES.index(values.dtype), ctypes.c_void_p(values.data_ptr()), LONG(values.numel()), keys)
    return list(keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_the_order_of_the_scores(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Every pattern of 16 bits; of wider dtypes, the special ones and many others."""
    bits = BITS[DTYPES.index(dtype)]
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15).to(bits).view(dtype)
    else:
        info, tiny = torch.iinfo(bits), torch.finfo(dtype).tiny
        special = torch.tensor([0.0, -0.0, 1.0, -1.0, tiny, -tiny, tiny / 2, float("inf"), -float("inf")], dtype=dtype)
        extremes = torch.tensor([info.min, info.max, info.min + 1, 1, -1, 0, info.max - 1], dtype=bits).view(dtype)
        values = torch.cat((special, extremes, torch.randint(info.min, info.max, (20000,), dtype=bits).view(dtype)))
    numbers, keys = values.double().tolist(), keys_of(library, values)
    width = (1 << 8 * dtype.itemsize) - 1
    assert all((key == width) == (number != number) for key, number in zip(keys, numbers, strict=True))
    known = sorted((-number, key) for key, number in zip(keys, numbers, strict=True) if number == number)
    assert known[0][1] > 0
    for (before, key), (after, next_key) in zip(known, known[1:]):
        assert (key < next_key) if before < after else (key == next_key)


def test_the_structures_are_the_headers() -> None:
    """Same fields in the same order as csrc/cuda/kernels.h."""
    text = (CSRC / "cuda" / "kernels.h").read_text()
    for name, structure in (("MtvitSelection", Selection), ("MtvitHalting", Halting)):
        body = text.split(f"struct {name} {{")[1].split("};")[0]
        lines = [line.partition("//")[0].strip().rstrip(";") for line in body.splitlines()]
        declared = [part.split()[-1].lstrip("*") for line in lines if line for part in line.split(",")]
        assert declared == [field[0] for field in structure._fields_]
