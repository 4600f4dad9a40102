# Everything a checkout can do. `make demo` and `make test` set up what they need, once, in .venv.
#
# On Linux pip fetches torch with CUDA, some gigabytes. A machine without a GPU is served by the CPU build:
#   make setup PIP_INSTALL_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP_INSTALL_FLAGS ?=
PYTEST_FLAGS ?=
NANO_FLAGS ?=
REPORT_FLAGS ?=

# Python 3.11 is what the pins were tested with; otherwise the newest that is new enough and can make environments.
FIND_PYTHON = for candidate in python3.11 python3.14 python3.13 python3.12 python3.10 python3; do \
	$$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$candidate; break; }; done

.DEFAULT_GOAL := help
.PHONY: help setup format docs examples wheel kernel-report ttsem interop browser ray npm-client schemathesis lm-eval lmms-eval demo test arm asan ubsan tsan fuzz lint nano eval-nano report report-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv and install the pinned versions

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*.* kernels/csrc/*/*)
	@python="$${PYTHON:-$$($(FIND_PYTHON))}"; \
	if [ -z "$$python" ]; then echo "error: no Python of 3.10 or newer with the venv module; install one, or name it: make PYTHON=..." >&2; exit 2; fi; \
	echo "setting up $(VENV) with $$python: once, a few minutes"; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

kernel-report: $(STAMP) ## compile the GPU kernels without a GPU: registers, spills, bounds; a minute
	$(BIN)/python -m tools.kernel_report $(REPORT_FLAGS)

# Another opinion on the GPU kernels: their tests, on what Triton's compiler makes of them, in bfloat16 too. Kernels in
# Gluon are skipped, and none waits for another by PTX: ttsem knows neither. It wants Python 3.12: an environment of its own.
TTSEM := .venv-ttsem
TTSEM_FLAGS ?=
TTSEM_PACKAGES = torch triton pytest pytest-timeout safetensors tiktoken Pillow ttsem
FIND_NEWER_PYTHON = for candidate in $(or $(PYTHON),python3.12 python3.13); do \
	$$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& { echo $$candidate; break; }; done

ttsem: $(TTSEM)/.set-up ## run the GPU kernels' tests in ttsem, without a GPU: bfloat16, bounds, races; five minutes
	TRITON_INTERPRET=0 QVL_DEPENDENT_LAUNCH=0 QVL_INT4_WGMMA=0 $(TTSEM)/bin/python -m ttsem.sanitize pytest tests/kernels/triton -q -p no:cacheprovider --timeout 1200 $(TTSEM_FLAGS)

$(TTSEM)/.set-up: constraints.txt
	@python="$$($(FIND_NEWER_PYTHON))"; \
	if [ -z "$$python" ]; then echo "error: ttsem needs Python 3.12 or 3.13 with the venv module, and $(if $(PYTHON),$(PYTHON) is not that,there is none here); install one, or name it: make ttsem PYTHON=..." >&2; exit 2; fi; \
	[ -x $(TTSEM)/bin/python ] || "$$python" -m venv $(TTSEM)
	$(TTSEM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt $(TTSEM_PACKAGES)
	@touch $@

# Checkpoints go to and come from the other projects that write this format. Each has an environment of its own, with
# the libraries of its time; auto-gptq has wheels for Python 3.8 to 3.12.
INTEROP := .venv-interop
INTEROP_FLAGS ?=
INTEROP_INSTALL = $(INTEROP)/$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS)
interop: $(STAMP) $(INTEROP)/.set-up ## exchange GPTQ checkpoints with auto-gptq, Optimum and GPTQModel: ten minutes
	$(BIN)/python -m tools.interop $(INTEROP_FLAGS)

$(INTEROP)/.set-up: tools/interop/auto-gptq.txt tools/interop/gptqmodel.txt
	@python="$${PYTHON:-$$($(FIND_PYTHON))}"; for name in auto-gptq gptqmodel; do \
	[ -x $(INTEROP)/$$name/bin/python ] || "$$python" -m venv $(INTEROP)/$$name || exit 2; done
	$(call INTEROP_INSTALL,auto-gptq) -r tools/interop/auto-gptq.txt
	$(call INTEROP_INSTALL,auto-gptq) --no-deps auto-gptq==0.7.1
	$(call INTEROP_INSTALL,gptqmodel) -r tools/interop/gptqmodel.txt
	BUILD_CUDA_EXT=0 $(call INTEROP_INSTALL,gptqmodel) --no-deps --no-build-isolation gptqmodel==7.7.0 torchao==0.18.0
	@touch $@

# Ray is large, and brings its own web server and telemetry: it has an environment of its own.
RAY := .venv-ray
RAY_FLAGS ?=
ray: $(RAY)/.set-up ## run the tests on Ray clusters of this machine: five minutes; ten kills each with QVL_KILLS=10
	RAY_USAGE_STATS_ENABLED=0 $(RAY)/bin/python -m pytest tests/cluster -q -p no:cacheprovider $(RAY_FLAGS)

$(RAY)/.set-up: pyproject.toml constraints.txt
	@python="$${PYTHON:-$$($(FIND_PYTHON))}"; [ -x $(RAY)/bin/python ] || "$$python" -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[ray,guided]' pytest pytest-timeout hypothesis jsonschema openai
	@touch $@

browser: $(STAMP) ## install what the tests of the page need besides a Chromium: playwright, and axe-core by npm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[browser]'
	npm install --silent --no-audit --no-fund --prefix build/npm axe-core@4.14.1

demo: $(STAMP) ## caption an image, answer a question, box an object: about a minute
	$(BIN)/qvl demo

# Each test computes in one thread, so a process a core, up to four, halves the time; files in order, as the first ones
# take longest. TEST_JOBS=0: in one process.
TEST_JOBS ?= auto
test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# A sanitizer's library must be loaded before Python; its flags reach every kernel source through QVL_CXXFLAGS.
# QVL_CHECKED: kernels compare sizes and indices at their entry, also where a wrong address is one of another tensor.
UNTRUSTED = tests/faults/test_untrusted_packed.py tests/faults/test_untrusted_checkpoint.py
SANITIZED = rm -rf build/$@ && QVL_CXXFLAGS='-DQVL_CHECKED -fsanitize=$(1) -fno-omit-frame-pointer -g' \
	$(BIN)/python setup.py -q build_ext --build-lib build/$@ --build-temp build/$@/objects \
	&& LD_PRELOAD="$$($${CXX:-g++} -print-file-name=$(2)) $$($${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 QVL_CPU_LIBRARY=$$(ls build/$@/qvl_kernels/_cpu*) \
	$(BIN)/python -m pytest tests/kernels $(UNTRUSTED) --ignore tests/kernels/triton -q $(PYTEST_FLAGS)

asan: $(STAMP) ## build the CPU kernels with AddressSanitizer and run their tests, and damaged checkpoints
	$(call SANITIZED,address,libasan.so)

ubsan: $(STAMP) ## the same with UndefinedBehaviorSanitizer
	$(call SANITIZED,undefined -fno-sanitize-recover=all,libubsan.so)

# On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
ARM_FLAGS ?=
arm: $(STAMP) ## build the CPU kernels for 64-bit ARM and compare its variants in an emulator: three minutes
	$(BIN)/python -m tools.cross_arm $(ARM_FLAGS)

FUZZ_SECONDS ?= 600
FUZZ_FLAGS ?=
fuzz: $(STAMP) ## feed random and damaged files and requests to it: 10 minutes, or FUZZ_SECONDS
	$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS) --keep build/fuzz/failures.jsonl $(FUZZ_FLAGS)

# 64 calls from 8 threads. Races inside torch's own libraries, which are not built for this, are left out (tsan.supp).
tsan: $(STAMP) ## build the CPU kernels with ThreadSanitizer and run an engine from 8 threads
	rm -rf build/$@ && QVL_CXXFLAGS='-DQVL_CHECKED -fsanitize=thread -fno-omit-frame-pointer -g' \
	$(BIN)/python setup.py -q build_ext --build-lib build/$@ --build-temp build/$@/objects \
	&& LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	TSAN_OPTIONS=suppressions=kernels/csrc/tsan.supp:ignore_noninstrumented_modules=1:halt_on_error=0:exitcode=66 \
	QVL_THREAD_CALLS=$${QVL_THREAD_CALLS:-64} QVL_CPU_LIBRARY=$$(ls build/$@/qvl_kernels/_cpu*) setarch -R \
	$(BIN)/python -m pytest tests/faults/test_threads.py -q -k 'mixed or dropped' --timeout 3000 $(PYTEST_FLAGS)

lint: $(STAMP) ## ruff, formatting, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports

format: $(STAMP) ## put every file into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The second run starts from the weights of the first and practices what they are weak at (docs/nano.md).
NANO_SECOND ?= --minutes 44 --rate 1e-3 --warmup 60 --decay-from 0 --probe 0 --weak 0.6 --chinese 0.35 --seed 2
nano: $(STAMP) ## train the small checkpoint, both runs: 3.5 hours on 2 cores, resumes after a stop
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[train]'
	$(BIN)/python -m tools.train_nano $(NANO_FLAGS)
	$(BIN)/python -m tools.train_nano --export runs/nano_first --plot docs/nano_curve.png
	$(BIN)/python -m tools.train_nano --folder runs/nano_second --from runs/nano_first $(NANO_SECOND)
	$(BIN)/python -m tools.train_nano --folder runs/nano_second --export qvl_runtime/nano

eval-nano: $(STAMP) ## score the small checkpoint and its Int4 sibling on 500 scenes that they never saw
	$(BIN)/python -m tools.eval_nano --int4 $(NANO_FLAGS)

examples: $(STAMP) ## run every script in examples/
	@mkdir -p out && for script in examples/*.py; do echo "== $$script"; (cd out && ../$(BIN)/python ../$$script) || exit 1; done

WHEEL_DIR := build/wheel

wheel: $(STAMP) ## build a wheel into dist/: manylinux on Linux, one for every Python of an architecture
	@rm -rf $(WHEEL_DIR) && mkdir -p dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[wheel]'
	$(BIN)/python -m build --wheel --no-isolation --outdir $(WHEEL_DIR) .
	@rm -f dist/qvl_runtime-*.whl
	@if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist $(WHEEL_DIR)/*.whl; \
	else cp $(WHEEL_DIR)/*.whl dist; fi
	@ls dist/*.whl

# What judges the server from outside: npm's client, schemathesis, and lm-eval's local-completions on a task of its own.
npm-client: $(STAMP) ## run the JavaScript client against the server: needs node and npm
	npm install --silent --no-fund --no-audit --prefix build/npm openai@7.55.0
	$(BIN)/python -m pytest tests/server/test_examples_of_server.py -q $(PYTEST_FLAGS)

SCHEMATHESIS := .venv-schemathesis
SCHEMATHESIS_FLAGS ?= --max-examples 30
schemathesis: $(STAMP) ## send requests made from /openapi.json to the server: a minute
	[ -x $(SCHEMATHESIS)/bin/schemathesis ] || { python3 -m venv $(SCHEMATHESIS) && $(SCHEMATHESIS)/bin/pip install --quiet schemathesis==4.32.5; }
	$(BIN)/python -m tools.schemathesis $(SCHEMATHESIS)/bin/schemathesis $(SCHEMATHESIS_FLAGS)

LM_EVAL := .venv-lm-eval
lm-eval: $(STAMP) ## let lm-eval score the server on a task of its own, and compare with the engine
	[ -d $(LM_EVAL)/lib ] || { $(BIN)/python -m venv $(LM_EVAL) && $(LM_EVAL)/bin/pip install --quiet $(PIP_INSTALL_FLAGS) -c constraints.txt torch && $(LM_EVAL)/bin/pip install --quiet 'lm_eval[api]==0.4.13'; }
	$(BIN)/python -m tools.lm_eval_server $(LM_EVAL)/bin/python

# lmms-eval 0.7.3 imports filelock._api, which the newest filelock does not have.
LMMS_EVAL := .venv-lmms-eval
lmms-eval: $(STAMP) ## let lmms-eval ask the server about images, and compare with the engine
	[ -d $(LMMS_EVAL)/lib ] || { $(BIN)/python -m venv $(LMMS_EVAL) && $(LMMS_EVAL)/bin/pip install --quiet $(PIP_INSTALL_FLAGS) -c constraints.txt torch && $(LMMS_EVAL)/bin/pip install --quiet 'lmms_eval==0.7.3' 'filelock<3.20'; }
	$(BIN)/python -m tools.lmms_eval_server $(LMMS_EVAL)/bin/python

docs: $(STAMP) ## build the documentation site into build/site, strictly
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

report: $(STAMP) ## measure this machine: benchmarks/results/<machine>-<date>/, under 40 minutes
	$(BIN)/python -m benchmarks.report

report-quick: $(STAMP) ## the same at the smallest sizes, to out/report: does it still run?
	$(BIN)/python -m benchmarks.report --quick

clean: ## remove the environment, builds, caches and outputs
	rm -rf $(VENV) $(TTSEM) $(INTEROP) $(SCHEMATHESIS) $(LM_EVAL) $(LMMS_EVAL) $(RAY) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
