# Everything is installed into .venv, with the versions of constraints.txt. Each target does its own
# set-up, which is repeated only when pyproject.toml, constraints.txt or a kernel in C changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo edge-demo test lint types protocol clean

help:
	@echo "make demo        a million devices train a voice assistant's language model, privately"
	@echo "make edge-demo   a server and eight device processes train over TLS"
	@echo "make test        the tests"
	@echo "make lint        ruff"
	@echo "make types       mypy"
	@echo "make protocol    the code of the device protocol, from client/protocol/device.proto"
	@echo "make clean       remove .venv, built kernels and caches (runs/ stays)"
	@echo
	@echo "Python 3.11 or newer is taken from PATH; PYTHON=/path/to/python3 names another."

demo: $(RUNTIME)
	@$(BIN)/sottovoce simulate

edge-demo: $(RUNTIME)
	@$(BIN)/python deploy/edge_demo.py

# One thread a process: two spinning ones slow each other down.
test: $(DEVELOP)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile

lint: $(DEVELOP)
	@$(BIN)/ruff check .

types: $(DEVELOP)
	@$(BIN)/mypy

$(RUNTIME): pyproject.toml constraints.txt $(wildcard client/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes, once"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --upgrade --constraint constraints.txt pip
	@$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

# `--group` needs the pip of constraints.txt, not the one that Python came with.
$(DEVELOP): $(RUNTIME)
	@$(PIP) install -qq --constraint constraints.txt --editable . --group dev
	@touch $@

# protoc names modules by folders: it has to see the file where it is installed.
PROTOCOL := sottovoce/client/protocol
protocol: $(DEVELOP)
	@mkdir -p build/$(PROTOCOL) && cp client/protocol/device.proto build/$(PROTOCOL)
	@$(BIN)/python -m grpc_tools.protoc --proto_path build --python_out build --pyi_out build \
	  --grpc_python_out build $(PROTOCOL)/device.proto
	@cp build/$(PROTOCOL)/device_pb2* client/protocol/

clean:
	rm -rf $(VENV) build dist client/native/_kernels*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
