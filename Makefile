PYTHON ?= python3
BIN := .venv/bin
# else each process that a test starts compiles torch's sources anew, for three seconds
export PYTHONDONTWRITEBYTECODE :=

.PHONY: browser demo dpo finetune gpu grpo ppo help install lint test test-all test-quick torture

demo: install  ## install, train the default model on the toy stories, and print some
	$(BIN)/python train.py --out_dir=out/demo --overwrite
	$(BIN)/python sample.py --out_dir=out/demo --num_samples=4 --temperature=0.7

finetune: install  ## teach that model the morals of its stories, and show what it knew before and after
	test -e out/demo/ckpt.pt || $(MAKE) demo
	$(BIN)/python finetune_lora.py --init_from=out/demo --dataset=moral --out_dir=out/demo-moral --overwrite

dpo: install  ## teach it by pairs of answers how its stories should end; a minute
	test -e out/demo/ckpt.pt || $(MAKE) demo
	$(BIN)/python finetune_dpo.py --init_from=out/demo --beta=1 --rank=32 --max_iters=110 --eval_interval=55 --out_dir=out/demo-dpo --overwrite

grpo: install  ## or by a reward for its own samples, by GRPO; five minutes
	test -e out/demo/ckpt.pt || $(MAKE) demo
	$(BIN)/python finetune_ppo.py --init_from=out/demo --dtype=float32 --out_dir=out/demo-grpo --overwrite

ppo: install  ## or by PPO; five to six minutes
	test -e out/demo/ckpt.pt || $(MAKE) demo
	$(BIN)/python finetune_ppo.py --init_from=out/demo --baseline=value --max_iters=100 --eval_interval=25 --dtype=float32 --out_dir=out/demo-ppo --overwrite

browser: install browser/node_modules/.package-lock.json  ## a page that writes with the demo model, at http://127.0.0.1:8000; needs npm
	test -e out/demo/ckpt.pt || $(MAKE) demo
	test -e out/demo/onnx/model.onnx || { $(BIN)/pip install -q onnxruntime && $(BIN)/python export_onnx.py --out_dir=out/demo; }
	$(BIN)/python serve.py

install: .venv/installed  ## make .venv and install requirements.txt into it

# The grid with one choice of heads, tying and qk_norm: each norm, layout, position and MLP is in it. Of the tests that
# run train.py whole, which take seconds each, those of going on to the bit, the log and out_dir.
QUICK := (not combination or 2-True-True) \
	and not (uninterrupted and (adamw or bfloat16)) \
	and not (command_line or blows_up or as_fast or eval_only or init_from or whole_toy_story or chunked_loss_trains) \
	and not (resume_keeps or want_of_memory or lengthened or experts_stop)

test-quick: .venv/installed-dev  ## while you work on model.py or train.py: less than 40 seconds on two cores
	$(BIN)/python -m pytest -q -n auto --dist=worksteal -m "not slow" -k "$(QUICK)" \
		tests/test_model.py tests/test_optim.py tests/test_sample.py tests/test_train.py

test: .venv/installed-dev  ## everything but the slow tests, offline
	$(BIN)/python -m pytest -q -n auto --dist=worksteal -m "not slow" tests

test-all: test  ## and what takes a C++ compiler, nvcc, Chromium, Firefox or minutes
	$(BIN)/python -m pytest -q -n auto --dist=worksteal -m slow tests

COMPILED := --dtype=bfloat16 --compile=true
# A step of nanoGPT too where NANOGPT names a checkout of it
AGAINST := $(if $(NANOGPT),--against=$(NANOGPT))

gpu: .venv/installed-dev  ## with a CUDA GPU: its tests, then its tables; NANOGPT=FOLDER has a rival. Aims at 15 minutes, not measured
	$(BIN)/python -m pytest -q -m "not slow" tests/test_device.py tests/test_graphs.py tests/test_rmsnorm.py
	$(BIN)/python bench.py train configs/small.toml $(COMPILED) $(AGAINST)
	$(BIN)/python bench.py train configs/small.toml $(COMPILED) --norm=rmsnorm --optimizer=muon $(AGAINST)
	$(BIN)/python bench.py train configs/medium.toml $(COMPILED) --gradient_accumulation_steps=1 $(AGAINST)
	$(BIN)/python bench.py train configs/medium.toml $(COMPILED) --gradient_accumulation_steps=1 --norm=rmsnorm --optimizer=muon $(AGAINST)
	$(if $(NANOGPT),$(BIN)/python bench.py learning configs/small.toml --dtype=bfloat16 $(AGAINST))
	$(if $(NANOGPT),$(BIN)/python bench.py learning configs/medium.toml --gradient_accumulation_steps=1 --dtype=bfloat16 $(AGAINST))
	$(BIN)/python bench.py decode configs/small.toml --dtype=bfloat16
	$(BIN)/python bench.py rmsnorm
	$(BIN)/python train.py configs/small.toml --dataset=toy --max_iters=1 --out_dir=out/gpu-small --overwrite
	for n in 1 64; do for compile in false true; do $(BIN)/python sample.py --out_dir=out/gpu-small --dtype=bfloat16 \
		--num_samples=$$n --max_new_tokens=400 --compile=$$compile > out/gpu-small/text.txt \
		&& tail -n 2 out/gpu-small/text.txt || exit 1; done; done
	date +%T && $(BIN)/python train.py --out_dir=out/gpu --overwrite && date +%T

torture: .venv/installed-dev  ## 1,000 kills of running scripts and 500 damaged files: nothing may be lost; half an hour
	$(BIN)/python tests/torture.py

lint: .venv/installed-dev  ## ruff: what is wrong, and what `ruff format` would change
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

help:  ## print this
	@sed -n 's/^\([a-z -]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

browser/node_modules/.package-lock.json: browser/package-lock.json
	cd browser && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q --no-compile -r requirements-dev.txt
	touch $@
