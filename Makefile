SHELL := /bin/bash
BIN := .venv/bin
# What has torch; and where measurements of a GPU go, with flags as --only or --minutes.
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
GPU_OUT ?= docs/measurements
# Two test processes suit the smallest machine; `make test TEST_WORKERS=8 ARGS="-k pcl"` is possible.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu lint clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## install everything into .venv, system packages included (quick when nothing changed)
	@.ci/setup

demo: setup ## fetch CIFAR-10 and train the demo
	@$(BIN)/pcl-fast fetch cifar10
	@$(BIN)/pcl-fast train demo

test: setup ## run the tests
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

gpu: ## run every check and measurement of a GPU (up to 8 minutes; installs nothing)
	@$(PYTHON) -m pcl_fast profile gpu --out $(GPU_OUT) $(GPU_FLAGS)

lint: setup ## check style, formatting, types and layers
	@failed=0; \
	$(BIN)/ruff check || failed=1; \
	$(BIN)/ruff format --check || failed=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || failed=1; \
	$(BIN)/lint-imports || failed=1; \
	exit $$failed

clean: ## remove the environment and the caches, but neither data nor runs
	@rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
