# `make demo` from a fresh clone installs and runs; `make check` is what a change must pass.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

# Scripts in benchmarks/ that train each arm several times.
STUDIES := refined_linear_decay infinite_lr annealing_law adaptive_batch_size continual_ema hypergradient weight_average \
	ties baselines lcsc sparse_soup checkfree global_merge online_iterative_dpo apo d2o aligndistil paced_distillation \
	self_distillation unlearning
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.hf-ext-installed
RUNNABLE := $(VENV)/.hf-ext-runnable
# DeepSpeed for its test, beside the environment: accelerate and transformers import it in every process that can find
# it. Without dependencies, of which the environment has the others, and without its kernels, so that no compiler is used.
ASIDE := $(VENV)/aside
DEEPSPEED := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4
DEEPSPEED_READY := $(ASIDE)/.$(subst ==,-,$(firstword $(DEEPSPEED)))
# One thread per test process: with several at once more would only wait for one another. The tests of a module
# go to one process, so that what its fixtures train is trained once.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Tests that make models or batches by themselves, on the CPU, or compare with a run there.
OWN_MODELS := auto_model or autocast or fresh_process or without_this_package or save_and_load or classification \
	or tied_layers or shared_weight or start_disabling or base_that_peft or padding_tokens or trains_and_loads \
	or saved_model or killed or settings_are_the_parent or bf16_and_gradient_checkpointing
# What such a device has not: a compiler, scalers of gradients; and a test of a matrix product with the identity.
NOT_THERE := torch_compile or overflow or delta_weight_is

.DEFAULT_GOAL := help
.PHONY: help install demo test test-dist test-side effects bench compare docs sync new format lint types check clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) $(DEEPSPEED_READY) ## make $(VENV) with the library and its development tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the other packages then find a torch that satisfies them, and do not choose one themselves.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[dev,plot]"
	touch $(RUNNABLE) $@

$(DEEPSPEED_READY): | $(INSTALLED)
	rm -rf $(ASIDE)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-deps --target $(ASIDE) $(DEEPSPEED)
	touch $@

# What a user has: without the tools, and without the quantization packages, which slow every import of PEFT.
$(RUNNABLE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[plot]"
	touch $@

demo: $(RUNNABLE) ## fine-tune the embedded model for a minute or two
	$(BIN)/hf-ext train examples/quickstart.yaml

test: install ## the whole suite
	$(RUN_TESTS) -n $(JOBS) --dist loadscope $(PYTEST_ARGS)

test-dist: install ## only the tests that start several processes
	$(RUN_TESTS) -m distributed $(PYTEST_ARGS)

test-side: install ## the contracts on a second device, which holds what a GPU would refuse to mix
	HF_EXT_TEST_DEVICE=side $(RUN_TESTS) -n $(JOBS) tests/second_device/on_side.py tests/contracts/test_adapters.py \
		tests/contracts/test_layer_kinds.py tests/contracts/test_callbacks.py tests/contracts/test_trainers.py \
		-k "not ($(OWN_MODELS) or $(NOT_THERE))" $(PYTEST_ARGS)

effects: install ## methods against their baselines, as the methods' pages show them (two hours on one core)
	for study in $(STUDIES); do \
		$(BIN)/python benchmarks/$$study.py --out docs/assets/$$study.json || exit 1; \
	done
	for study in opcm rmm robust_weight_signature; do $(BIN)/python benchmarks/$$study.py || exit 1; done

bench: install ## the ratios of docs/benchmarks.md (a quiet machine, about an hour)
	$(BIN)/python benchmarks/initialization.py --out docs/assets/initialization.json
	$(BIN)/python benchmarks/training_step.py --model tiny-llama --out docs/assets/training_step_tiny.json
	$(BIN)/python benchmarks/training_step.py --model llama-100m --out docs/assets/training_step_100m.json
	$(BIN)/python benchmarks/training_step.py --model tiny-llama --rank 64 --methods lora,loldu --out docs/assets/loldu_step_tiny.json
	$(BIN)/python benchmarks/training_step.py --model llama-100m --rank 64 --methods lora,loldu --out docs/assets/loldu_step_100m.json
	$(BIN)/python benchmarks/loldu.py --out docs/assets/loldu.json
	$(BIN)/python benchmarks/bone.py --out docs/assets/bone.json
	$(BIN)/python benchmarks/eva.py --out docs/assets/eva.json
	$(BIN)/python benchmarks/lora_ga.py --out docs/assets/lora_ga.json
	$(BIN)/python benchmarks/qpissa.py --out docs/assets/qpissa.json
	$(BIN)/python benchmarks/callback_step.py --out docs/assets/callback_step.json
	$(BIN)/python benchmarks/trainer_step.py --out docs/assets/trainer_step.json
	$(BIN)/python benchmarks/start_up.py --out docs/assets/start_up.json
	$(BIN)/python benchmarks/sorsa_vs_lora.py --out docs/assets/sorsa_vs_lora

compare: install ## every adapter against LoRA and full fine-tuning (an hour and a half on one core)
	$(BIN)/hf-ext compare examples/compare.yaml

docs: install ## build the site into build/docs
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

sync: install ## write export lists and tables from the registry
	$(BIN)/python scripts/sync_registry.py

new: install ## scaffold a method: make new kind=adapter name=foo
	$(BIN)/python scripts/new_method.py "$(kind)" "$(name)"
	$(BIN)/python scripts/sync_registry.py

format: install ## rewrite the sources in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install ## ruff and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: install ## pyright
	$(BIN)/pyright

check: lint types ## all that a change must pass
	$(BIN)/python scripts/sync_registry.py --check
	$(MAKE) test

clean: ## remove what tools leave behind; the environment stays
	rm -rf build dist htmlcov .pytest_cache .ruff_cache .coverage* *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
