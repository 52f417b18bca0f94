PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo-w4

OLDEST := .venv-oldest

.PHONY: install demo test quick coverage oldest lint format clean

install: $(STAMP)

# torch goes in first and alone, so that the build chosen by the machine's pip settings (here: CPU) is the one that
# everything after it finds already satisfied.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,eval]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/llmq quantize demo -o $(DEMO) --method gptq --bits 4 --group-size 128
	$(BIN)/llmq eval $(DEMO) --base demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# The fast lane, under two minutes on two cores: all but what is marked slow.
quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
