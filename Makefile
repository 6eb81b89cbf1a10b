# The habits. `make serve` and `make test` set everything up by themselves; nothing else is needed first.
#
#   MODEL=    what to serve            ARGS=     more flags for serve, test, bench
#   PYTHON=   which python3 to use     VENV=     where the set-up goes
#   PEERS=    what bench-peers installs  WORKERS=  processes that run tests side by side

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

MODEL ?= smollm2-135m
ARGS ?=
PYTHON ?=
VENV ?= .venv
PEERS ?=
WORKERS ?= 2

# The set-up is repeated when what it depends on has changed, and otherwise costs nothing.
SETUP_INPUTS := pyproject.toml requirements/lock.txt requirements/torch.txt tools/setup.sh hatch_build.py \
	src/shuteye/native/build.py $(sort $(wildcard src/shuteye/native/csrc/*))
STAMP := $(VENV)/.set-up-$(shell { pwd; cat $(SETUP_INPUTS); } | sha256sum | cut -c1-16)

.PHONY: help setup lock bytecode serve test test-latest test-slow test-clients test-vllm test-ray test-gpu test-asan test-tsan chaos soak-ranks check bench bench-peers bench-sleep bench-fleet docs clean

help: ## Say what there is.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## Create .venv with everything in it; instant when nothing has changed.

$(STAMP):
	@PYTHON='$(PYTHON)' tools/setup.sh '$(VENV)' '$@'

lock: ## Renew requirements/lock.txt: the newest versions that pyproject.toml allows. Then: make test.
	tools/lock.sh '$(or $(PYTHON),python3)'

serve: setup ## Serve MODEL on 127.0.0.1:8000 with sleep mode, in development mode.
	SHUTEYE_SERVER_DEV_MODE=1 $(VENV)/bin/shuteye serve '$(MODEL)' --enable-sleep-mode $(ARGS)

# Two at a time, file by file: half of their time is waiting for processes that they start. A test itself computes on one thread.
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile

# Tests start hundreds of processes; where bytecode is not written by itself, each would compile the package again.
bytecode: setup
	@$(VENV)/bin/python -m compileall -q src

test: bytecode ## Run the tests that need neither minutes nor a GPU.
	$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu and not clients and not ray' $(ARGS)

test-latest: ## Run the tests on today's newest versions instead of the locked ones, in VENV-latest.
	@PYTHON='$(PYTHON)' tools/setup.sh --latest '$(VENV)-latest'
	$(VENV)-latest/bin/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu and not clients and not ray' $(ARGS)

test-slow: bytecode ## Run the tests that take minutes.
	$(VENV)/bin/python -m pytest -m 'slow and not gpu and not clients and not ray' $(ARGS)

test-clients: setup ## Run the clients that people use against the server, in environments of their own.
	tools/clients.sh '$(VENV)' "$${SHUTEYE_TEST_CLIENTS:-$$HOME/.cache/shuteye/clients}"
	$(VENV)/bin/python -m pytest -m clients $(ARGS)

test-vllm: setup ## Run vLLM's own HTTP tests against the server; ARGS names single files of tools/vllm_tests/files.toml.
	tools/vllm_tests/setup.sh '$(VENV)' "$${SHUTEYE_TEST_VLLM:-$$HOME/.cache/shuteye/vllm-tests}"
	$(VENV)/bin/python tools/vllm_tests/run.py "$${SHUTEYE_TEST_VLLM:-$$HOME/.cache/shuteye/vllm-tests}" $(ARGS)

# Each in a process of its own: Ray remembers the token of the first cluster that a process has spoken to.
test-ray: setup ## Run ranks on Ray, with Ray in an environment of its own; as root also on two machines made of namespaces.
	tools/ray.sh '$(VENV)' "$${SHUTEYE_TEST_RAY:-$$HOME/.cache/shuteye/ray}"
	for part in tests/executors/test_ray.py tests/executors/test_ray_machines.py tests/ray_serve; do \
	  "$${SHUTEYE_TEST_RAY:-$$HOME/.cache/shuteye/ray}/bin/python" -m pytest -m ray $$part $(ARGS) || exit; \
	done

test-gpu: setup ## Run the tests that need a CUDA device.
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)

chaos: setup ## Break a server in every known way for ten minutes; ARGS='--minutes 2 --seed 7'. Needs root.
	$(VENV)/bin/python tools/chaos $(ARGS)

soak-ranks: setup ## Faults at random on every layout of ranks, ten minutes each; SHUTEYE_SOAK_S=60 for less.
	SHUTEYE_SOAK_S=$${SHUTEYE_SOAK_S:-600} $(VENV)/bin/python -m pytest tests/executors/test_ranks_soak.py -m slow --timeout 0 $(ARGS)

# Python itself leaks by design, so leaks are not looked for; torch must be loaded after the sanitizer's runtime.
SANITIZE := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

test-asan: setup ## Run the tests of native kernels, groups of ranks and the decoder's parts under AddressSanitizer and UBSan.
	mkdir -p build
	$(VENV)/bin/python src/shuteye/native/build.py build/kernels-asan.so $(SANITIZE)
	$(VENV)/bin/python src/shuteye/native/build.py build/kernels-asan-emulated.so --emulated=tests/native/emulated $(SANITIZE)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 SHUTEYE_TEST_LIBRARY=$(CURDIR)/build/kernels-asan.so \
	  SHUTEYE_TEST_EMULATED=$(CURDIR)/build/kernels-asan-emulated.so \
	  $(VENV)/bin/python -m pytest tests/native tests/parallel/test_group.py \
	  tests/parallel/test_native_ranks.py -m 'not slow' --timeout 600 --deselect tests/native/test_pool.py::test_idle_workers_cost_no_cpu $(ARGS)

test-tsan: setup ## Run the ranks' groups under ThreadSanitizer, with suspended ranks and aborts at random.
	$(VENV)/bin/python -m pytest tests/parallel/test_stress.py $(ARGS)

check: setup ## Lint, format, types, and the direction of imports.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: setup ## Measure shuteye beside other engines; ARGS=--help says how.
	$(VENV)/bin/python benchmarks/serve.py $(ARGS)

bench-peers: setup ## Install those engines, or only PEERS, under ~/.cache/shuteye/peers.
	$(VENV)/bin/python benchmarks/install_peers.py $(PEERS)

bench-fleet: setup ## Measure many models behind one port.
	$(VENV)/bin/python benchmarks/fleet.py $(ARGS)

bench-sleep: setup ## Measure sleeping and waking on this machine.
	$(VENV)/bin/python benchmarks/sleep_wake.py $(ARGS)

docs: setup ## Write docs/reference/ from the code: commands, routes, metrics, errors.
	$(VENV)/bin/python tools/cli_reference.py
	$(VENV)/bin/python tools/server_reference.py
	$(VENV)/bin/python tools/module_list.py

clean: ## Remove the set-up and what the tools leave behind; models and images stay in ~/.cache.
	rm -rf '$(VENV)' '$(VENV)-latest' build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
