PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Each stamp is newer than what it was installed from, so a second call installs nothing.
DEMO := .venv/installed-for-demo
DEV := .venv/installed-for-development
PEERS := .venv/installed-for-comparison
SOURCES := pyproject.toml constraints.txt $(wildcard native/*.* native/isa/*)

.PHONY: demo test lint bench sanitize

demo: $(DEMO)
	$(BIN)/tersekv try

# One thread for each of the two test workers: torch would otherwise start one for every core in both.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	! grep -rnE '.{121}' native  # as ruff has it for Python
	$(BIN)/pyright

bench: $(PEERS)
	$(BIN)/tersekv bench encode
	$(BIN)/tersekv bench attend

# On a machine with a GPU and CUDA's compute-sanitizer: small cases of our kernels, and of no other's.
OURS := attend encode merge rotate repack
SMALL := (test_pages and (zeros or bf16/bf16)) or every_group or dense_attention or number_of_parts or any_precision or bit_for_bit or repack_is
sanitize:
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 $(OURS:%=--kernel-name kernel_substring=%) \
	    $(BIN)/python -m pytest -m gpu -n 0 -q tests/test_cuda_attend.py tests/test_cuda_chunk.py tests/test_cuda_encode.py \
	    tests/test_cuda_host.py -k "$(SMALL)" || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(DEMO): $(SOURCES) | $(BIN)/python
	@echo "installing tersekv and transformers into .venv (once, some minutes)"
	$(INSTALL) --editable ".[hf]"
	@touch $@

$(DEV): $(SOURCES) | $(BIN)/python
	@echo "installing the development set into .venv (once, some minutes)"
	$(INSTALL) --editable ".[hf,plots,eval,dev]"
	@touch $@ $(DEMO)

$(PEERS): pyproject.toml constraints.txt | $(DEV)
	@echo "compiling llama.cpp into .venv (once, some minutes)"
	$(INSTALL) --no-binary llama-cpp-python --editable ".[peers]"
	@touch $@
