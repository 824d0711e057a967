# Everything runs in one virtual environment. The first torch that is asked for decides which build is installed, so
# torch comes first, at the tested version.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
# Threads that wait must sleep: spinning makes a busy machine many times slower.
export OMP_WAIT_POLICY := passive

.PHONY: demo demo-gpu docs serve-demo test test-more test-portable test-portable-sample test-heavy test-long test-cross test-twin
.PHONY: coverage fuzz lint bench install

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

# Compile the example for this CPU, then draw with the bundle in a process that finds no compiler.
demo: install
	mkdir -p build
	$(BIN)/diffkiln compile examples/digits/spec.json -o build/digits --force
	PATH=/no-programs $(abspath $(BIN))/python examples/digits/draw.py build/digits build/digits.png

# Compile the example for an RTX 4090, which need not be here; neither must CUDA. Shows what the bundle needs of a machine.
demo-gpu: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cuda]'
	mkdir -p build
	$(BIN)/diffkiln compile examples/digits/spec-gpu.json -o build/digits-gpu --force
	$(BIN)/diffkiln inspect build/digits-gpu

# The documentation as a site, in build/site. A broken link or a missing reference fails.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

# Serve the example by two replicas of Ray Serve on this machine, and draw with them.
serve-demo: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	test -d build/served || $(BIN)/diffkiln compile examples/digits/spec.json -o build/served
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python examples/serving/demo.py

# A file of tests stays in one process, so that what its tests share is made once. If such a process ends, so does the run:
# its place is not taken in time by another one.
test: install
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile --durations 25

# What compares numbers, on CPUs that this one is made to look like: without AVX-512 and without AVX, with one thread and
# with four. About an hour on two cores; the sample, which continuous integration runs, takes minutes.
test-portable: install
	$(BIN)/python -m tests.portable

test-portable-sample: install
	$(BIN)/python -m tests.portable --sample

# What is heavier than `make test` allows, and each change needs all the same: the sample, Ray Serve, a browser (Debian's
# chromium), schemathesis against the server, a sample of engines for absent GPUs that are run on the CPU, and what many
# pipelines are made for, each beside diffusers' own. What measures time, or starts Ray and browsers, runs one by one.
test-more: test-portable-sample test-heavy

test-heavy: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[more]'
	command -v chromium > /dev/null || (apt-get update -q && apt-get install -y -q chromium)
	$(BIN)/python -m pytest -q -m "more or twin" --ignore tests/serving --ignore tests/evaluate \
		--numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile --durations 25
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest -q -m more tests/serving tests/evaluate --durations 10

# The rest of the engines for absent GPUs that are run on the CPU; `test-more` has a sample of them.
test-twin: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[twin]'
	$(BIN)/python -m pytest -q -m "twin or twin_all" tests/twins

# What takes longer than continuous integration has: every kind of pipeline, one by one.
test-long: install
	$(BIN)/python -m pytest -q -m long

# Every class and every call, an hour or more; what has a result is not measured again. Remove results to measure anew.
coverage: install
	DIFFKILN_TEST_CACHE=$${DIFFKILN_TEST_CACHE:-$(abspath build/coverage)} $(BIN)/python -m tests.coverage --missing

# Engines for GPUs that are not there. Its own environment has torch built with CUDA, some 7 GB; `===` asks for that very
# name, and not for a build of the same version without CUDA.
CROSS_VENV ?= .venv-cross
$(CROSS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CROSS_VENV)
	$(CROSS_VENV)/bin/pip install --quiet torch===$$(sed -n 's/^torch==//p' constraints.txt)
	$(CROSS_VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,cuda]'
	touch $@

test-cross: $(CROSS_VENV)/.installed
	$(CROSS_VENV)/bin/python -m pytest -q -m cross tests/cross

# Ten minutes, shared out among the harnesses; what is found lies in build/fuzz/found.
FUZZ_SECONDS ?= 600
fuzz: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	nice -n 10 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/cold_start.py
	$(BIN)/python benchmarks/steady_state.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/recovering.py
	$(BIN)/python benchmarks/schedules.py
	$(BIN)/python benchmarks/parts.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python benchmarks/serving.py
