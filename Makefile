# Every target sets up what it needs below .venv and can be run first, on a machine that has
# only python3 >= 3.11, make and (for the fast copies) a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Two tests at a time: much of what they do is waiting for processes to start. Tests of one vLLM
# file stay together, because they share engines.
TWO := -n 2 --dist worksteal
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
UV_VERSION := 0.13.8
NATIVE := $(wildcard hatch_build.py transfer/*.c transfer/*.h compression/*.c compression/*.h gpu/cuda/*.cuh)

.PHONY: help demo test test-vllm check coverage lint format bench bench-codecs gpu setup clean redis-server \
    operators-tools engines

# $(call install,ENVIRONMENT,WHAT). Nobody's torch is one for GPUs: that for other machines is found
# where pip is told to look for wheels, or else where uv knows it to be.
define install
@links="$$($(BIN)/python -m pip config get global.find-links 2>/dev/null)"; \
    if [ -n "$$links" ]; then set -- --find-links "$$links"; else set -- --torch-backend cpu; fi; \
    $(BIN)/uv pip install --quiet --python $(1)/bin/python "$$@" $(2)
endef

help:
	@echo "make demo      a real model skips its prefill in a second process"
	@echo "make test      all tests that need no GPU, with the engines' libraries"
	@echo "make test-vllm the part of them that runs vLLM engines"
	@echo "make check     the quick tests: unit, property, protocol"
	@echo "make coverage  all tests of the daemon and its client, with branch coverage"
	@echo "make lint      style, types, floors"
	@echo "make bench     transfer and look-up against floors measured in the same run"
	@echo "make gpu       on a GPU: kernels, tests and benchmark; what fails is in gpu.log"
	@echo "make bench-codecs  what codecs do to a model, how fast they are: docs/benchmarks/codecs.md"
	@echo "make clean     remove everything that was made here, the environments included"

demo: $(VENV)/hf.stamp
	$(BIN)/python deploy/demo/conversation.py

test: $(VENV)/hf.stamp $(VENV)/deploy.stamp $(VLLM)/vllm.stamp redis-server operators-tools
	$(BIN)/python -m pytest $(TWO) -m "not gpu" --ignore=tests/engine/vllm
	$(VLLM)/bin/python -m pytest $(TWO_FILES) -m "not gpu" tests/engine/vllm

test-vllm: $(VLLM)/vllm.stamp
	$(VLLM)/bin/python -m pytest $(TWO_FILES) -m "not gpu" tests/engine/vllm

check: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/unit tests/property tests/protocol

coverage: $(VENV)/dev.stamp $(VENV)/deploy.stamp redis-server operators-tools
	$(BIN)/python -m pytest -m "not gpu" --ignore=tests/engine --cov --cov-report=term

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/unit/test_repository.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp
	$(BIN)/kvstore bench transfer
	$(BIN)/kvstore bench lookup

bench-codecs: $(VENV)/hf.stamp
	$(BIN)/kvstore bench codec --write docs/benchmarks/codecs.md

# With the Python at hand: on a machine with a GPU it has the PyTorch and the CuPy for that.
gpu:
	PYTHONPATH=. $(PYTHON) tests/gpu/run.py

setup: $(VENV)/dev.stamp

# What tests need and `make lint` does not, outside the environment that `make lint` uses.
engines: $(VLLM)/vllm.stamp redis-server operators-tools

clean:
	rm -rf $(VENV) $(VLLM) build dist .coverage .coverage.* htmlcov transfer/_copy.so \
	    compression/_codecs.so
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what the targets need ---------------------------------------------------------

# An environment that works is kept as it is, whoever made it. Debian splits venv off python3.
$(VENV)/uv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "kvstore needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || $(PYTHON) -m venv --clear $(VENV) \
	    || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	         && apt-get update -qq && apt-get install -qq --yes python3-venv \
	         && $(PYTHON) -m venv --clear $(VENV); } \
	    || { echo "python3 cannot make a virtual environment; install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# kvstore itself, editable, with its C library, and the pinned tools.
$(VENV)/dev.stamp: $(VENV)/uv.stamp pyproject.toml $(NATIVE)
	$(call install,$(VENV),--group dev --editable .)
	@touch $@

# What tests of the Redis tier start servers and make certificates with.
redis-server:
	@{ { command -v redis-server || command -v valkey-server; } && command -v openssl; } >/dev/null \
	    || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	         && apt-get update -qq && apt-get install -qq --yes redis-server openssl; } \
	    || echo "no redis-server: tests of the Redis tier are skipped" >&2

# What tests of deploy/ and of the dashboard judge by: systemd's, Prometheus' and bubblewrap's
# tools, and a browser. Nothing of them is started as a service.
OPERATORS := systemd-analyze promtool bwrap chromium
operators-tools:
	@for tool in $(OPERATORS); do command -v $$tool >/dev/null || missing=1; done; \
	    [ -z "$$missing" ] \
	    || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
	         && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq --yes \
	             --no-install-recommends systemd prometheus bubblewrap chromium fonts-dejavu-core; } \
	    || echo "no $(OPERATORS): tests that judge by them are skipped" >&2

# Linters and schemas for deploy/, and what drives the browser.
$(VENV)/deploy.stamp: $(VENV)/dev.stamp
	$(call install,$(VENV),--group deploy-test)
	@touch $@

# The compiler of kernels needs no GPU.
$(VENV)/hf.stamp: $(VENV)/dev.stamp
	$(call install,$(VENV),--group hf-test)
	$(call install,$(VENV),--group cuda-test) \
	    || echo "no NVRTC: tests that compile kernels are skipped" >&2
	$(call install,$(VENV),--no-deps --group nixl-test) \
	    || echo "no NIXL: tests with the library are skipped" >&2
	@touch $@

# A vLLM engine for the CPU, in an environment of its own: it pins much of what it needs. What
# exists only for GPUs stays out.
$(VLLM)/vllm.stamp: $(VENV)/dev.stamp pyproject.toml tests/engine/vllm/excludes.txt $(NATIVE)
	@test -x $(VLLM)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(VLLM)
	$(call install,$(VLLM),--compile-bytecode --excludes tests/engine/vllm/excludes.txt \
	    --group vllm-test --editable .)
	@touch $@
