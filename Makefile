# The two commands of the README: `make demo` and `make test`. Both make .venv first.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SETTINGS := pyproject.toml runtime/pyproject.toml constraints.txt

.PHONY: demo test test-devices test-corpus check native clean

demo: .venv/demo.stamp
	$(BIN)/python examples/magika/demo.py

REQUIRE := onnxruntime,onnxruntime_qnn,openvino,nncf,litert,onnx2tf,litert_quantizer,torch,sklearn,ncnn,PIL,scipy,tensorflow,asyncssh,adbutils,keras,tf2onnx,litert_torch,coremltools,skl2onnx,skops,pnnx,ethosu,tflite_micro

# What measures runs alone; the rest shares the processors.
test: check
	EDGEKIT_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not measures and not devices' tests
	EDGEKIT_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest -m measures tests

# On emulated boards with a real sshd (edgekit lab): root on Debian or Ubuntu.
test-devices: .venv/dev.stamp
	EDGEKIT_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest -m devices tests

# Every public model of the corpus to every format: an hour or two.
test-corpus: .venv/dev.stamp
	$(BIN)/python benchmarks/corpus_matrix.py

# The runner for devices without Python, for this machine and for phones.
native:
	$(MAKE) -C runtime/native x86_64 aarch64

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "edgekit: no Python 3.11, 3.12 or 3.13 found; set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv

# Engines that need no other framework. ONNX -> TFLite (TensorFlow) is the extra tflite-convert.
.venv/demo.stamp: .venv/bin/python $(SETTINGS)
	@echo "installing into .venv (about a minute)"
	$(PIP) -e '.[onnx,openvino,litert]'
	@touch $@

.venv/dev.stamp: .venv/bin/python $(SETTINGS)
	@echo "installing everything the tests use into .venv (TensorFlow and PyTorch: some minutes)"
	$(PIP) -e '.[onnx,openvino,litert,tflite-convert,tensorflow,torch,torch-tflite,coreml,sklearn,qnn,ssh,adb,ethos-u,micro,dev]'
	$(PIP) --no-deps pnnx
	@touch $@ .venv/demo.stamp

clean:
	rm -rf .venv build dist out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
