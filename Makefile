# Everything a fresh machine needs: Python >= 3.10 and a C++ compiler. `make demo`, `make test`.
PYTHON ?= python3
VENV   := .venv
CONSTRAINTS := constraints.txt
BIN    := $(VENV)/bin
# A process of one thread for each core: with two threads each, the suite takes 1.45 times as long on two cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations=30
DEPS   := $(VENV)/.dependencies
BUILT  := $(VENV)/.difffast

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test suite test-oldest test-slow test-sanitized bench fidelity lint readme clean

install: $(BUILT)

# torch first and exactly as pinned: asked for loosely by another package, it would be the newest CUDA build.
$(DEPS): $(CONSTRAINTS) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit(f"difffast needs Python >= 3.10, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))" "$$(grep '^setuptools==' $(CONSTRAINTS))"
	$(BIN)/python -c 'import tomllib' 2>/dev/null || $(BIN)/python -m pip install --quiet tomli
	$(BIN)/python -c 'import sys; t = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli"); p = t.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["test"] + p["optional-dependencies"]["bench"]))' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r $(VENV)/requirements.txt
	touch $@

# Editable: Python files need no second installation, C++ sources do. A build that fails is an error here, so that no
# test of the extension is skipped for want of it.
$(BUILT): $(DEPS) setup.py $(shell find csrc -type f)
	DIFFFAST_BUILD_CPP=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: install
	$(BIN)/difffast demo --out out/demo

test: lint suite

suite: install
	$(PYTEST)

# The same suite with the oldest supported versions, in an environment of its own. What is built in place is the same
# stable-ABI library, whichever environment built it last.
test-oldest:
	$(MAKE) suite VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-slow: install
	$(PYTEST) -m slow

# The operators' C++ kernels, of each instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer: in a build
# of its own, which the normal one never sees. Python is not built for them: its interpreter's leaks are not looked for.
SANITIZED := build/sanitized
SANITIZE  := -fsanitize=address,undefined
CHECKED   := -O1 -g1 -fno-sanitize-recover=undefined -fno-omit-frame-pointer
test-sanitized: install
	mkdir -p $(SANITIZED)
	CXXFLAGS="$(CHECKED) $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	DIFFFAST_BUILD_CPP=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib \
	> $(SANITIZED)/log 2>&1 || { tail -n 40 $(SANITIZED)/log; exit 1; }
	printf '%s\n' emulated_amx avx2 baseline | xargs -P 2 -I SET \
	env DIFFFAST_INSTRUCTION_SET=SET $(BIN)/python tests/helpers/sanitized.py $(SANITIZED)/lib

bench: install
	$(BIN)/python bench/run.py --budget-minutes 14

fidelity: install
	$(BIN)/python bench/bench_fidelity.py --out bench/results

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

readme: install
	$(BIN)/python bench/tables.py

clean:
	rm -rf build out *.egg-info difffast/*.so
