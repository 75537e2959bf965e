# Everything a developer or a user runs. `make run` and `make test` are all that a fresh clone needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What serving and training need, what the developers' tools also need, and what the site alone needs.
RUN_STAMP := $(VENV)/.installed-run
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# For pip, while it installs torch: such as an index of CPU builds, which are a tenth of the size.
TORCH_ARGS ?=
# For `make bench`, `make profile` and `make bench-peers`, such as --peers llama.cpp --rounds 5.
BENCH_ARGS ?=
PROFILE_ARGS ?=
PEERS_ARGS ?=
# Files are compiled when they are first imported, since most never are. Where the environment forbids Python to keep
# what it compiled, every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/pip install --progress-bar on --no-compile -c constraints.txt
SOURCES := proto adapters_store server trainer clients tests benchmarks examples scripts docs

.PHONY: help setup run run-encoder test test-slow test-deploy test-floors test-torch test-batched test-ahead test-store-faults test-adapterhub test-restarts test-hostile soak churn simulate conformance fuzz check format bench bench-peers profile examples proto openapi docs clean

help:
	@echo "make run      install server and trainer, serve the default model with the example tasks, print calls to try"
	@echo "make run-encoder  the same with a small encoder and tasks that read texts"
	@echo "make setup    install the developers' tools as well, and fetch the default model"
	@echo "make test     set up, run the tests"
	@echo "make test-slow  run the tests that take longest, which make test leaves out"
	@echo "make test-deploy  test what stands around a server, on the programs themselves"
	@echo "make test-floors  run most tests at the lowest versions that pyproject.toml allows"
	@echo "make test-torch  run the engine's tests on its backend in plain torch"
	@echo "make test-batched  the same with all rows at once; MANYHATS_DEVICE=cuda for a GPU"
	@echo "make test-ahead  the same row by row, each step launched before the one before it is collected"
	@echo "make test-store-faults  kill the adapter store, and fail its disk, at each of its I/O calls"
	@echo "make test-adapterhub  compare adapters on encoders with AdapterHub's library, which it installs apart"
	@echo "make test-restarts  kill a server in the middle of uploads under load, and start it again"
	@echo "make test-hostile  attack a server for ten minutes while well-behaved streams continue"
	@echo "make soak     keep a server busy with many tasks for ten minutes, and see that it stays as it was; SOAK_MINUTES=30"
	@echo "make churn    end 100,000 requests in every way, and see that nothing is left of any; CHURN_REQUESTS=1000"
	@echo "make simulate  a million simulated requests for 10,000 tasks on the real scheduler; SIMULATED_REQUESTS=10000"
	@echo "make conformance  run LangChain's tests, other frameworks, lm-eval, guidellm and npm's openai package on a server"
	@echo "make fuzz     fuzz the readers of config and weights; FUZZ_SECONDS=600"
	@echo "make check    set up, lint, types, generated code, docs/openapi.json, docs/models.md and the dashboard"
	@echo "make bench    set up, compare with transformers + bitsandbytes and PEFT; prints a table; BENCH_ARGS=--quick"
	@echo "make bench-peers  compare with llama.cpp, vLLM, transformers and PEFT on a quiet machine; PEERS_ARGS=--quick"
	@echo "make profile  set up, show where a step's time goes, beside what this machine could do; PROFILE_ARGS=--quick"
	@echo "make examples  train the example tasks again; prints how well they do"
	@echo "make proto    regenerate the gRPC code"
	@echo "make openapi  write docs/openapi.json anew"
	@echo "make docs     build the site in build/docs, from the pages in docs/ and from the sources; needs no torch"

$(RUN_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@# torch first and alone: the rest then takes it as it is.
	$(PIP_INSTALL) $(TORCH_ARGS) torch
	$(PIP_INSTALL) --editable '.[train]'
	@touch $@

$(STAMP): $(RUN_STAMP)
	$(PIP_INSTALL) --editable '.[dev]'
	$(BIN)/python scripts/protoc.py
	@touch $@

$(DOCS_STAMP): pyproject.toml constraints.txt
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

setup: $(STAMP)
	$(BIN)/manyhats model fetch smollm2-135m-instruct

# The server fetches the model itself.
run: $(RUN_STAMP)
	$(BIN)/python examples/serve.py

run-encoder: $(RUN_STAMP)
	$(BIN)/python -m examples.encoder.serve

test: setup
	scripts/need_postgresql.sh
	scripts/need_chromium.sh
	@# A process for each processor, up to four: most tests keep one busy, and each process takes up to 2 GB.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: setup
	scripts/need_postgresql.sh
	scripts/need_chromium.sh
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 4 --dist worksteal

# One test at a time: each starts servers that keep the processors busy.
test-deploy: setup $(DOCS_STAMP)
	scripts/need_postgresql.sh
	scripts/need_chromium.sh
	scripts/need_proxies.sh
	scripts/need_prometheus.sh
	scripts/need_debootstrap.sh
	$(BIN)/python -m pytest -m deploy --timeout 900 tests/deploy

test-floors: setup
	cd tests && ../$(BIN)/python -m floors

# Plain torch computes one row at a time. A file goes to one process, which computes its golden answers once.
test-torch: setup
	$(BIN)/python -m pytest --backend torch --numprocesses auto --maxprocesses 4 --dist loadfile --timeout 900 tests/engine

# All rows at once in plain torch; with MANYHATS_DEVICE=cuda on a GPU.
test-batched: setup
	$(BIN)/python -m pytest --backend torch-batched --numprocesses auto --maxprocesses 4 --dist loadfile --timeout 900 tests/engine

# Row by row and one step ahead: a step's results come when they are asked for.
test-ahead: setup
	$(BIN)/python -m pytest --backend torch-ahead --numprocesses auto --maxprocesses 4 --dist loadfile --timeout 900 tests/engine

test-store-faults: $(STAMP)
	cd tests && ../$(BIN)/python -m store_faults

# AdapterHub's library needs another transformers, so it has an environment of its own, made at the first run.
test-adapterhub: setup
	ADAPTERHUB=1 TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python -m pytest tests/engine/test_adapterhub_library.py

test-restarts: setup
	cd tests && ../$(BIN)/python -m restart_under_load

test-hostile: setup
	cd tests && ../$(BIN)/python -m hostile_load

soak: setup
	cd tests && ../$(BIN)/python -m soak --minutes $${SOAK_MINUTES:-10}

churn: setup
	cd tests && ../$(BIN)/python -m churn --requests $${CHURN_REQUESTS:-100000}

simulate: $(STAMP)
	$(BIN)/python -m benchmarks.simulation --requests $${SIMULATED_REQUESTS:-1000000}

# Each program has an environment of its own in .conformance; TORCH_ARGS holds for the one that needs torch.
conformance: setup
	PYTHONPATH=tests TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python -m conformance

fuzz: $(STAMP)
	cd tests && ../$(BIN)/python -m fuzzing

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python scripts/generate_proto.py --check
	$(BIN)/python scripts/write_openapi.py --check
	$(BIN)/python scripts/write_models.py --check
	$(BIN)/python scripts/write_dashboard.py --check
	$(BIN)/buf lint proto

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: setup
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

profile: setup
	$(BIN)/python -m benchmarks.profile $(PROFILE_ARGS)

# Each peer has an environment of its own in .peers, made at the first run; TORCH_ARGS holds for vLLM's.
bench-peers: setup
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python -m benchmarks.peers $(PEERS_ARGS)

examples: setup
	$(BIN)/python -m examples.train_examples
	$(BIN)/python -m examples.encoder.train

proto: $(STAMP)
	$(BIN)/python scripts/generate_proto.py

openapi: $(STAMP)
	$(BIN)/python scripts/write_openapi.py

# Warnings are errors, links that lead nowhere among them.
docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build .conformance .deploy .peers .protoc .mypy_cache .ruff_cache .pytest_cache .hypothesis
