PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo-w4

OLDEST := .venv-oldest
# Some machines set it for everything. Every process would then compile torch and transformers anew: seven seconds.
unexport PYTHONDONTWRITEBYTECODE

TEST_TOOLS := hypothesis pytest pytest-timeout pytest-xdist
# Two halves of the tests, of which who is done first takes over some: a module's tests, and what it makes for them, stay
# together, and nobody waits at the end.
PYTEST := -m pytest -n 2 --dist worksteal
# What meets other packages: models, folders and text as they come from them. All else is tested with the newest alone.
MEETING := $(addprefix tests/,architectures end_to_end eval kernels/test_triton_int.py \
  $(addprefix llmq/,adapters checkpoint cli data discovery formats inference))

.PHONY: install demo test quick slow coverage oldest lint format clean

install: $(STAMP)

# torch goes in first and alone, so that the build chosen by the machine's pip settings (here: CPU) is the one that
# everything after it finds already satisfied. Modules are compiled when they are imported: to compile all that is
# installed takes half a minute of one core.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev,eval]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/llmq quantize demo -o $(DEMO) --method gptq --bits 4 --group-size 128
	$(BIN)/llmq eval $(DEMO) --base demo

# Every test once. Counting the lines that run (`coverage`) takes a tenth more, and is for whoever asks.
test: $(STAMP)
	$(BIN)/python $(PYTEST)

# The fast lane with the oldest versions that pyproject.toml promises. torch is the same: of an older one only builds
# with gigabytes of CUDA are to be had. Left out: a test that makes the newest transformers look older; zamba2, whose tiny
# configuration transformers 5.16 itself cannot run; one of `llmq tune`, which numpy 2.0's warnings disturb.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST) -m "not slow" $(MEETING) \
	  -k "not (as_older_transformers or zamba2 or aria_text or wrong_results)"

$(OLDEST)/.installed: $(OLDEST)/.dependencies pyproject.toml
	$(OLDEST)/bin/python -m pip install --no-compile -c constraints-oldest.txt -e '.[eval,gpu]' $(TEST_TOOLS)
	touch $@

# Most of the work, and nothing in this folder is written: it can be done while another environment is installed.
$(OLDEST)/.dependencies: constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --no-compile "$(TORCH)"
	$(OLDEST)/bin/python -m pip install --no-compile -r constraints-oldest.txt
	touch $@

# The fast lane, under three minutes on two cores: all but what is marked slow.
quick: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow"

# The fast lane, counting the lines that it runs: a tenth slower.
coverage: $(STAMP)
	mkdir -p build
	$(BIN)/python -m slipcover --json --out build/coverage.json $(PYTEST) -m "not slow"
	$(BIN)/python scripts/coverage_by_package.py build/coverage.json

# What the fast lane leaves out.
slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
