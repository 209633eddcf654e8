# make demo: install, train the default model on the toy stories, and print some
# make browser: a page that writes with the demo model, at http://127.0.0.1:8000; needs npm
# make finetune: teach that model the morals of its stories, and show what it knew before and after
PYTHON ?= python3
BIN := .venv/bin

.PHONY: browser demo finetune install test test-all

demo: install
	$(BIN)/python train.py --out_dir=out/demo --overwrite
	$(BIN)/python sample.py --out_dir=out/demo --num_samples=4 --temperature=0.7

finetune: install
	test -e out/demo/ckpt.pt || $(MAKE) demo
	$(BIN)/python finetune_lora.py --init_from=out/demo --dataset=moral --out_dir=out/demo-moral --overwrite

browser: install browser/node_modules/.package-lock.json
	test -e out/demo/ckpt.pt || $(MAKE) demo
	test -e out/demo/onnx/model.onnx || { $(BIN)/pip install -q onnxruntime && $(BIN)/python export_onnx.py --out_dir=out/demo; }
	$(BIN)/python serve.py

browser/node_modules/.package-lock.json: browser/package-lock.json
	cd browser && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

install: .venv/installed

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n auto --dist=loadfile -m "not slow" tests

# and what takes a C++ compiler, nvcc or minutes
test-all: test
	$(BIN)/python -m pytest -q -m slow tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q --no-compile -r requirements-dev.txt
	touch $@
