# make demo   set everything up, then four adaptive ViTs against the dense one on real photographs: trained ones, and DeiT-S
# make test   set everything up, then the tests; Triton's kernels are interpreted on the CPU in a run of their own
# make bench  set everything up, then the CPU benchmarks; BENCH=--smoke only proves that they run
# make fuzz   set everything up, then the native operators under sanitizers with drawn arguments, SECONDS=600 long
# make cuda   compile the CUDA kernels for every architecture, with NVIDIA's compiler from PyPI: no GPU, no CUDA toolkit
# make compat a wheel built here, tested under another PyTorch: TORCH=2.11.0 (gigabytes to fetch)
# make lint   ruff, mypy, clang-format
# make clean  remove the environment and everything built
# Needs Python >= 3.10 (PYTHON=... picks one) and a C++ compiler.

PYTHON ?= python3
SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/* tests/*.cpp)
NVCC := build/nvcc

# threads that wait asleep: on a shared machine, spinning ones slow everybody down, themselves included
export OMP_WAIT_POLICY ?= passive
# what runs against an installed wheel, without the checkout
COMPAT := ops nn methods reference test_native.py test_native_rows.py test_native_backward.py test_ragged.py \
	test_properties.py test_registration.py test_compile.py

TORCH ?= 2.11.0

.PHONY: demo test bench fuzz cuda compat lint clean setup
setup: $(VENV)/.built

demo: setup
	$(BIN)/mtvit-ops compare --trained checkpoints --out demo-output/trained
	$(BIN)/mtvit-ops compare --out demo-output

test: setup
	$(BIN)/python -m pytest tests -q -n 2 $(TESTS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/kernels tests/nn/test_triton_models.py -q -n 2 -k triton-cpu $(TESTS)

bench: setup
	OMP_WAIT_POLICY=active $(BIN)/python bench/run.py $(BENCH)

fuzz: setup
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS)

cuda: $(VENV)/.requirements $(NVCC)/.installed
	$(BIN)/python tools/cuda_report.py

# pytest, not python -m pytest: the checkout must not come before the wheel
compat: setup
	rm -rf build/wheel && MTVIT_OPS_BUILD_EXT=1 $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/pip install --quiet torch==$(TORCH) numpy pytest pytest-xdist hypothesis timm safetensors
	build/torch-$(TORCH)/bin/pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	OMP_NUM_THREADS=1 build/torch-$(TORCH)/bin/pytest $(addprefix tests/,$(COMPAT)) -q -n 2 -p no:cacheprovider $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

clean:
	rm -rf $(VENV) build demo-output *.egg-info mtvit_ops/_C.so mtvit_ops/_build*.so

$(VENV)/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {v[0]}.{v[1]}: set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --requirement requirements-dev.txt
	@touch $@

$(NVCC)/.installed: $(VENV)/.requirements requirements-cuda.txt
	$(PIP) install --quiet --upgrade --target $(NVCC) --requirement requirements-cuda.txt
	ln -sfn lib $(NVCC)/nvidia/cu13/lib64 # where nvcc looks for what it links
	@touch $@

# without the extension everything would be slow, and pip keeps the warning to itself: hence the 1
$(VENV)/.built: $(VENV)/.requirements $(NATIVE)
	MTVIT_OPS_BUILD_EXT=1 $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
