# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What depends on time is in front, and what shares costly fixtures at the back: see tests/conftest.py.
TESTS := $(addprefix tests/,faults ports integration accelerator gpu conformance property sim unit conversion)

.PHONY: demo test soak check bench gpu clean setup peers

setup: $(VENV)/.ready

$(VENV)/.python: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	touch $@

# Installed editable: everstep/ has links to the other rooms, so a new file is found as soon as it is there.
$(VENV)/.ready: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --group check
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

# Frameworks whose checkpoints are converted: in an environment beside ours that lends it torch, so that ours has none.
peers: $(VENV)-peers/.ready

$(VENV)-peers/.ready: $(VENV)/.python pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> $$($(VENV)-peers/bin/python -c "import site; print(site.getsitepackages()[0])")/lent.pth
	$(VENV)-peers/bin/pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 $(VENV)-peers/bin/pip install --quiet --constraint constraints.txt --group peers
	touch $@

demo: setup
	$(BIN)/everstep demo

# `test` is what is run before each commit, `soak` the long schedules and what needs the frameworks whose checkpoints are
# converted. In two streams, since much of each is waiting. Without job control (set -m) a shell has what it starts in the
# background ignore SIGINT.
test: MARKED := not soak
soak: MARKED := soak
soak: peers
test soak: SHELL := /bin/bash
test soak: setup
	@rm -rf build/$@-claims; mkdir -p build/$@-claims; \
	run="$(BIN)/python -m pytest $(TESTS) --claims=build/$@-claims"; \
	set -m; nice -n 10 $$run -m "$(MARKED)" --from-the-back > build/$@-others.log 2>&1 & others=$$!; \
	trap "kill $$others 2>/dev/null" INT TERM; \
	$$run -m "$(MARKED)"; status=$$?; \
	wait $$others || status=$$?; cat build/$@-others.log; exit $$status

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p everstep

# The benchmarks compare with peers; torchft is optional and is named in the result when it is missing.
bench: setup peers
	$(BIN)/pip install --quiet --constraint constraints.txt --group test --group bench
	$(BIN)/python tests/bench/recovery.py --json
	$(BIN)/python tests/bench/overhead.py --json
	$(BIN)/python tests/bench/edit.py --json
	$(BIN)/python tests/bench/snapshot.py --json
	$(BIN)/python tests/bench/checkpoint.py --json
	$(BIN)/python tests/bench/control.py --json
	$(BIN)/python tests/bench/coordinator.py --json
	$(BIN)/python tests/bench/agreement.py --json
	$(BIN)/python tests/bench/after_loss.py --json
	$(BIN)/python tests/bench/slow.py --json
	$(BIN)/python tests/bench/scale_out.py --json
	$(BIN)/python tests/bench/migration.py --json
	$(BIN)/python tests/bench/convergence.py --json
	$(BIN)/python tests/bench/overlap.py --json

# Eight minutes at most on one GPU; says so and ends where there is none. GPU_PYTHON is an interpreter that has torch with
# CUDA and everstep's dependencies, where that is not the one that is set up here.
gpu: $(if $(GPU_PYTHON),,setup)
	$(or $(GPU_PYTHON),$(BIN)/python) tests/gpu/run.py

clean:
	rm -rf $(VENV) $(VENV)-peers build everstep.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
