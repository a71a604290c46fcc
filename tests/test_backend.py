"""Choosing a backend: by block, by environment, refused with the reason, replaced with one warning."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mtvit_ops
from mtvit_ops import _backend, _extension, _register, use_backend
from mtvit_ops.ops import class_attention, scatter_residual
from mtvit_ops.testing import offsets

PARENT = Path(mtvit_ops.__file__).parent.parent
CALL = "import torch; from mtvit_ops.ops import scatter_residual as f; x = torch.ones(2, 2)"


@pytest.fixture
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which Triton is there and CUDA is not."""
    found = {
        **_backend.available_backends(),
        "triton": _backend.Availability(True, "pretended"),
        "cuda": _backend.Availability(False, "no driver, say"),
    }
    monkeypatch.setattr(_backend, "available_backends", lambda: found)
    _backend.say_once.cache_clear()
    yield
    _backend.say_once.cache_clear()


def call() -> None:
    class_attention(torch.ones(1, 1, 2), torch.ones(3, 1, 2), offsets((3,)), 3)


def test_every_backend_has_a_reason() -> None:
    found = _backend.available_backends()
    assert tuple(found) == _backend.BACKENDS
    assert found["reference"].available
    assert all(entry.reason for entry in found.values())


def test_a_caller_may_change_what_it_got() -> None:
    _backend.available_backends().clear()
    assert tuple(_backend.available_backends()) == _backend.BACKENDS


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="use_backend: backend must be one of reference, cpp, triton, cuda, got 'tpu'"),
        _backend.use_backend("tpu"),
    ):
        pass


def test_unavailable_backend_says_why(triton_serves: None) -> None:
    with (
        pytest.raises(ValueError, match="'cuda' is not available: no driver, say"),
        _backend.use_backend("cuda"),
    ):
        pass


def test_blocks_nest_and_end(triton_serves: None) -> None:
    outside = _backend.preferred_backend()
    with _backend.use_backend("reference"):
        with _backend.use_backend("triton"):
            assert _backend.preferred_backend() == "triton"
        assert _backend.preferred_backend() == "reference"
        with pytest.raises(RuntimeError, match="inside"), _backend.use_backend("triton"):
            raise RuntimeError("inside")
        assert _backend.preferred_backend() == "reference"
    assert _backend.preferred_backend() == outside


def backends_of_gradient(asked: list[str | None], forward: str | None, backward: str | None) -> None:
    """Asks for the backend of each op that a gradient, worked out in another thread as on a GPU, runs."""
    x, rows = torch.ones(2, 2, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    with use_backend(forward) if forward else contextlib.nullcontext():
        total = scatter_residual(x, rows, torch.ones(1, 2, requires_grad=True)).sum()
    asked.clear()

    def work() -> None:
        with use_backend(backward) if backward else contextlib.nullcontext():
            total.backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("forward", "backward", "wanted"),
    [("reference", None, "reference"), ("reference", "cpp", "reference"), (None, "reference", "reference")],
    ids=["forward", "both", "backward"],
)
def test_a_gradient_in_another_thread_is_the_forwards(
    monkeypatch: pytest.MonkeyPatch, forward: str | None, backward: str | None, wanted: str
) -> None:
    if "cpp" in (forward, backward) and not _extension.has_extension():
        pytest.skip("the native extension is not built")
    asked: list[str | None] = []
    real = _backend.preferred_backend
    monkeypatch.setattr(_backend, "preferred_backend", lambda: asked.append(real()) or asked[-1])
    backends_of_gradient(asked, forward, backward)
    assert asked == [wanted]


def test_the_replacement_is_said_once(triton_serves: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mtvit_ops"), _backend.use_backend("triton"):
        call()
        call()
    assert [record.getMessage() for record in caplog.records] == [
        "class_attention: the reference serves on CPU tensors, since triton does not serve CPU tensors"
    ]


def test_the_reference_asked_for_is_not_news(caplog: pytest.LogCaptureFixture) -> None:
    _backend.say_once.cache_clear()
    with caplog.at_level(logging.INFO, "mtvit_ops"), _backend.use_backend("reference"):
        call()
    assert not caplog.records


PREFERENCES = {  # block; what runs, what the warning says
    "none": (None, "native", None),
    "cpp": ("cpp", "native", None),
    "reference": ("reference", "reference", None),
    "triton": ("triton", "reference", "triton does not serve CPU tensors"),
}


def test_triton_serves_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it serves CPU tensors it is asked for by name, takes no float64, and has its values checked for it."""
    checked = []
    servers = {
        "cpp": _register.Server(lambda _: "native"),
        "triton": _register.Server(lambda _: "triton", _register._takes_no_float64, checks_values=False),
    }
    kernel = _register._dispatch("op", "CPU", servers, lambda _: "reference", checked.append)
    for block, argument, runs in (
        (None, torch.ones(1), "native"),
        ("triton", torch.ones(1), "triton"),
        ("triton", torch.ones(1).double(), "reference"),
    ):
        monkeypatch.setattr(_backend, "preferred_backend", lambda block=block: block)
        assert kernel(argument) == runs
    assert len(checked) == 2


ON_CUDA = {  # block, backends with a kernel; what runs, what the log says
    "triton-first": (None, "triton cuda", "triton", None),
    "cuda-asked-for": ("cuda", "triton cuda", "cuda", None),
    "cuda-without-triton": (None, "cuda", "cuda", None),
    "triton-refuses": (None, "refusing cuda", "cuda", None),
    "nothing": (None, "", "reference", "triton has no kernel for it and cuda has no kernel for it"),
    "refused-and-nothing-else": (None, "refusing", "reference", "too wide and cuda has no kernel for it"),
    "asked-for-and-not-there": ("cuda", "triton", "reference", "cuda has no kernel for it"),
    "cpp": ("cpp", "triton cuda", "reference", "cpp does not serve CUDA tensors"),
    "reference": ("reference", "triton cuda", "reference", None),
}


@pytest.mark.parametrize(("block", "kernels", "runs", "said"), ON_CUDA.values(), ids=ON_CUDA)
def test_who_serves_cuda_tensors(
    block: str | None,
    kernels: str,
    runs: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_backend, "preferred_backend", lambda: block)
    _backend.say_once.cache_clear()
    makers = {
        "triton": ("triton", _register.Server(lambda _: "triton")),
        "refusing": ("triton", _register.Server(lambda _: "triton", lambda _: "too wide")),
        "cuda": ("cuda", _register.Server(lambda _: "cuda")),
    }
    servers = dict(makers[name] for name in kernels.split())
    with caplog.at_level(logging.INFO, "mtvit_ops"):
        assert _register._dispatch("op", "CUDA", servers, lambda _: "reference", None)("argument") == runs
    wanted = [] if said is None else [f"op: the reference serves on CUDA tensors, since {said}"]
    assert [record.getMessage() for record in caplog.records] == wanted


CUDA_REASONS = {  # extension's error, built with CUDA, PyTorch's CUDA; what is wrong
    "no-extension": ("the native extension was not built", False, "13.0", "the native extension was not built"),
    "built-without": (None, False, "13.0", "was built without CUDA (MTVIT_OPS_WITH_CUDA=1"),
    "torch-without": (None, True, None, "this PyTorch is built without CUDA"),
    "good": (None, True, "13.0", None),
}


@pytest.mark.parametrize(("error", "built", "version", "said"), CUDA_REASONS.values(), ids=CUDA_REASONS)
def test_cuda_says_what_it_lacks(
    error: str | None, built: bool, version: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_with = SimpleNamespace(build_info=lambda: {"cuda": built})
    monkeypatch.setattr(_extension, "_load", lambda: error)
    monkeypatch.setattr(_extension, "build_module", lambda: built_with)
    monkeypatch.setattr(torch.version, "cuda", version)
    found = _extension.cuda_error()
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("variable", "available", "reason"),
    [("1", True, "interpreted on the CPU"), ("", False, "TRITON_INTERPRET=1 interprets the kernels")],
)
def test_triton_on_the_cpu(variable: str, available: bool, reason: str) -> None:
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this PyTorch has GPUs to serve")
    code = "import mtvit_ops; print(*mtvit_ops.available_backends()['triton'])"
    environment = {**os.environ, _backend.INTERPRETER_VARIABLE: variable}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=PARENT, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(str(available))
    assert reason in run.stdout


@pytest.mark.parametrize(("block", "runs", "warning"), PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize("refusal", [None, "it is full moon"])
def test_who_serves(
    block: str | None,
    runs: str,
    warning: str | None,
    refusal: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An op with a native kernel, which may refuse the arguments."""
    monkeypatch.setattr(_backend, "preferred_backend", lambda: block)
    _backend.say_once.cache_clear()
    checked = []
    servers = {"cpp": _register.Server(lambda _: "native", lambda _: refusal)}
    kernel = _register._dispatch("op", "CPU", servers, lambda _: "reference", checked.append)
    with caplog.at_level(logging.WARNING, "mtvit_ops"):
        found = kernel("argument")
    if runs == "native" and refusal is not None:
        runs, warning = "reference", refusal if block == "cpp" else None
    assert found == runs
    assert checked == (["argument"] if runs == "reference" else [])  # kernels check values on their own
    assert [warning in record.getMessage() for record in caplog.records] == ([True] if warning else [])


def test_native_value_errors_become_value_errors() -> None:
    def kernel(text: str) -> None:
        raise RuntimeError(text)

    run = _register._native("op", kernel)
    with pytest.raises(ValueError, match=r"^op: rows must lie in"):
        run("Exception raised from f: mtvit_ops value error: rows must lie in [0, 3), got 4\nframe #0")
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        run("out of memory")


ENVIRONMENT = {  # MTVIT_OPS_BACKEND; code; what it prints, or the error's end
    "reference": ("reference", "from mtvit_ops._backend import preferred_backend as p; print(p())", "reference", None),
    "empty": ("", "from mtvit_ops._backend import preferred_backend as p; print(p())", "None", None),
    "block-wins": (
        "nonsense",
        "import mtvit_ops\nwith mtvit_ops.use_backend('reference'): f(x, None, x, x[0]); print('ran')",
        "ran",
        None,
    ),
    "unknown": ("nonsense", "f(x, None, x, x[0])", "", "ValueError: MTVIT_OPS_BACKEND: backend must be one of"),
    "unavailable": (
        "cuda",
        "f(x, None, x, x[0])",
        "",
        "ValueError: MTVIT_OPS_BACKEND: backend 'cuda' is not available",
    ),
}


@pytest.mark.parametrize(("value", "code", "printed", "error"), ENVIRONMENT.values(), ids=ENVIRONMENT)
def test_environment(value: str, code: str, printed: str, error: str | None) -> None:
    if value == "cuda" and _backend.available_backends()["cuda"].available:
        pytest.skip("the cuda backend is available here")
    environment = {**os.environ, _backend.ENVIRONMENT_VARIABLE: value}
    found = subprocess.run(
        [sys.executable, "-c", f"{CALL}\n{code}"],
        env=environment,
        cwd=PARENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == printed, found.stderr
    assert (found.returncode == 0) == (error is None)
    assert error is None or error in found.stderr
