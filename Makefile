# Each target first makes the virtual environment if there is none.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: help demo demo-lm demo-lm-tiny test test-all lint types quick slow figures clean

help:
	@echo "make demo          train LoRA and full fine-tuning on the included reviews, and compare them"
	@echo "make demo-lm-tiny  train a small language model, and adapt it to tasks it has not seen"
	@echo "make test          lint, types, the quick tests"
	@echo "make test-all      the same and the slow tests"

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(READY)
	rm -rf runs/demo
	$(BIN)/lora compare --config recipes/demo.toml --run-dir runs/demo

demo-lm: demo-lm-tiny

# A model this small is as fast on one thread as on two.
demo-lm-tiny: export OMP_NUM_THREADS := 1
demo-lm-tiny: $(READY)
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
	$(BIN)/pytest -n 2 -m "not slow" -q

slow: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile -m slow -q

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
