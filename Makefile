# The first two are each enough on a bare machine with Python 3.11+, make and gcc:
#
#   make serve   serve the embedded model on http://127.0.0.1:8000, prompts in store/   (ARGS="--port 9000" adds options)
#   make test    lint and run all tests
#   make keep    put what a results page is made of, from the run folders in runs/smollm2, into docs/runs
#   make race    set up the peers and race against them: a table of claims, exit 1 where one is missed (W=W1,W5: those lines)
#   make test-all, lint, lock, clean   the full counts; checks alone; new lock files; away with .venv and build
#   make results write docs/results.md anew from docs/runs   (ORIGINAL=FILE: the model's own file, for its size)
#
# TORCH_INDEX_URL=URL takes another build of PyTorch than pip takes by itself (pytorch.org lists them).

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(PIP) install --quiet --no-deps --require-hashes --only-binary :all:

EMBEDDED := smollm2-135m
LEVEL := w3g64
MODEL := models/$(EMBEDDED)
MANIFEST := $(MODEL)/promptstitch.json
STORE := store
RUNS := docs/runs

# Two files at a time, since most tests wait for something; threads that wait for each other leave the core to others.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Stamps: what stands in .venv already. A build of torch that was asked for by its index stays until another is.
TORCH_STAMP := $(if $(TORCH_INDEX_URL),$(VENV)/.torch-$(notdir $(TORCH_INDEX_URL)),$(firstword \
	$(wildcard $(VENV)/.torch*) $(VENV)/.torch))
SERVING := $(VENV)/.serving
DEVELOPING := $(VENV)/.developing

.PHONY: serve test test-all lint race keep results lock clean
.DELETE_ON_ERROR:

serve: $(SERVING) $(MANIFEST)
	$(BIN)/promptstitch serve $(MODEL) --level $(LEVEL) --store $(STORE) $(ARGS)

test: lint $(MANIFEST)
	$(PYTEST) $(ARGS)

test-all: lint $(MANIFEST)
	PROMPTSTITCH_FULL=1 $(PYTEST) $(ARGS)

lint: $(DEVELOPING)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

race: $(DEVELOPING) $(MANIFEST)
	$(BIN)/python -m bench.peers
	$(BIN)/python -m bench --checkpoint $(MODEL) --out runs/race.json $(if $(W),--only $(W)) $(ARGS)

keep:
	scripts/keep runs/smollm2 $(RUNS)/smollm2

results: $(SERVING)
	$(PIP) install --quiet 'matplotlib>=3.10'
	$(BIN)/promptstitch report $(RUNS) --out build/results $(if $(wildcard $(STORE)),--store $(STORE)) \
		$(if $(ORIGINAL),--original $(ORIGINAL))
	cp build/results/results.md docs/results.md

# After a change of the dependencies in pyproject.toml.
lock: $(DEVELOPING)
	scripts/lock

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; say where: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# First and by itself: a local build of torch carries no hash that a lock could know.
$(TORCH_STAMP): | $(BIN)/python
	rm -f $(VENV)/.torch*
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX_URL),--force-reinstall --index-url $(TORCH_INDEX_URL))
	touch $@

$(SERVING): requirements.lock pyproject.toml $(wildcard llama/kernels/*) $(TORCH_STAMP)
	@echo "Installing the packages of requirements.lock"
	$(LOCKED) -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(DEVELOPING): requirements-dev.lock $(SERVING)
	@echo "Installing the packages of requirements-dev.lock"
	$(LOCKED) -r requirements-dev.lock
	touch $@

$(MANIFEST): | $(SERVING)
	$(BIN)/promptstitch pull $(EMBEDDED) --to $(MODEL)
