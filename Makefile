PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo smoke test style quality docs llama-cpp torchao dist venv clean

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 11

demo: .venv/.demo ## prune a real SmolLM2-135M end to end and show the result
	$(BIN)/python examples/demo.py

SMOKE := tests/config tests/surgery/test_cut.py tests/saving/test_hub.py

smoke: .venv/.test ## in a minute: what is asked for, the cut of every family, a saved folder that reloads
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x -n 2 -m "not slow" $(SMOKE)

# Each worker of xdist gets one thread: the cores are shared already. Snippets of the docs go on with what those before
# them have left, so that a file of slow tests stays on one worker. Exit code 5 means that no test is marked slow.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: .venv/.test ## all tests: the fast ones, then the slow ones, on two workers
	$(BIN)/python -m pytest -n 2 -m "not slow" --junitxml=build/tests/fast.xml
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --junitxml=build/tests/slow.xml || test $$? -eq 5

style: .venv/.dev ## format and sort
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: .venv/.dev ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs ## build the site into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests that run a real llama.cpp are skipped without it.
llama-cpp: ## a real llama.cpp, as prebuilt binaries in an npm package
	npm install --no-save --no-package-lock --ignore-scripts --omit=optional \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

# In a folder of its own: where torchao is installed, transformers and peft import it, which every command waits for.
torchao: | $(BIN)/activate ## torchao, which the recipe of quantising needs
	$(BIN)/python -m pip install --no-deps --upgrade --target build/torchao torchao==0.18.0

dist: .venv/.release ## build wheel and sdist into dist/, and prune a model with the wheel alone
	BIN=$(BIN) .ci/dist

venv: .venv/.dev ## set up .venv with everything that the other targets need

clean: ## remove what the targets have made
	rm -rf .venv build dist site

# One stamp per extra: .venv/.test stands for `pip install -e ".[test]"`.
.venv/.%: pyproject.toml | $(BIN)/activate
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

# venv writes `activate` last, so an interrupted creation is made again.
$(BIN)/activate:
	$(PYTHON) -m venv .venv
