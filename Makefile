.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY) ## make the virtual environment with pinned versions

demo: $(READY) ## improve the bundled model on arithmetic and show the accuracy before and after
	$(BIN)/stateset-lightning fit --config configs/single_turn.yaml

demo-real: $(READY) ## improve a real chat model of 135 million parameters on messages to a shop; half an hour
	$(BIN)/python examples/small_chat_model/train.py

demo-tools: $(READY) ## a small model learns to call a calculator; two minutes
	$(BIN)/stateset-lightning fit --config examples/calculator/config.yaml

demo-game: $(READY) ## the bundled model learns a game of three turns; five minutes
	$(BIN)/stateset-lightning fit --config examples/multi_turn/config.yaml

check: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## style, types and the whole test suite, offline
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-long: $(READY) ## the tests that take minutes: every preset x aggregation on two ranks
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -m long

benchmark: $(READY) ## whole training steps side by side with TRL, and cost against its floor; three quarters of an hour
	$(BIN)/python benchmarks/compare_trl.py
	$(BIN)/python benchmarks/scaling.py

compare-algorithms: $(READY) ## what every preset learns on the bundled task, three seeds, and TRL; two hours, resumable
	$(BIN)/python benchmarks/compare_algorithms.py --trl-python $(BIN)/python

kill-test: $(READY) ## kill runs some 170 times and compare their ends with those of runs left alone; ten minutes
	$(BIN)/python benchmarks/kill_test.py --kills 50
	$(BIN)/python benchmarks/kill_test.py --kills 20 --precision bf16-mixed
	$(BIN)/python benchmarks/kill_test.py --kills 20 --ranks 2
	$(BIN)/python benchmarks/kill_test.py --kills 20 --everything
	$(BIN)/python benchmarks/kill_test.py --kills 40 --conversations
	$(BIN)/python benchmarks/kill_test.py --kills 20 --reference

saves-test: $(READY) ## stop runs of every way to save at every moment and compare their ends; a quarter of an hour
	$(BIN)/python benchmarks/saves.py --cases 400

large-files: $(READY) ## a million rows and five gigabytes from file to the first training step; five minutes
	$(BIN)/python benchmarks/large_files.py

ranks-test: $(READY) ## 1, 2 and 4 ranks give the same samples, gradients and weights, and a lost rank ends the run; ten minutes
	$(BIN)/python benchmarks/ranks.py

hostile: $(READY) ## rewards, servers, files, signals and disks that do what they should not, a thousand times; twenty minutes
	$(BIN)/python benchmarks/hostile/hostile.py

check-models: $(READY) ## every causal language model that transformers has: right, or refused; writes docs/models.md; half an hour, resumable
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/check_models.py --trl --page docs/models.md

fuzz: $(READY) ## a hundred thousand generated files, configs and reward results: read whole or refused in a line; half an hour
	STATESET_FUZZ=100 $(BIN)/python -m pytest -q -s -n 0 tests/test_fuzz.py

mutants: $(READY) ## break the maths, the resume and the packing in small ways and see that the tests notice; some minutes
	$(BIN)/python benchmarks/mutants.py

gpu-rehearsal: $(READY) ## the GPU check on a CPU, with small sizes and a stand-in for CUDA; some minutes
	PYTHON=$(BIN)/python benchmarks/gpu/check.sh rehearse

test-vllm: $(READY) ## train on a real vLLM server, which is killed once; needs VLLM_PYTHON, the python of vLLM's own environment
	$(BIN)/python benchmarks/vllm_run.py --vllm-python $(VLLM_PYTHON)

clean: ## remove the virtual environment, caches and runs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis runs *.egg-info

.PHONY: help install demo demo-real demo-tools demo-game check test test-long benchmark compare-algorithms kill-test saves-test ranks-test hostile check-models mutants gpu-rehearsal test-vllm clean
