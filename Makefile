# make demo: everything from a fresh clone to a chart. make test: the lint check and all tests.
# make bench: every op beside its float counterpart. make peers: models beside ONNX Runtime, OpenVINO and torchao.
# make gpu: everything a GPU can say, in at most 9 minutes; ARGS="--only linear --minutes 3" for a part of it.
# make cuda: the CUDA kernels, with nvcc alone.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin

.PHONY: demo test bench peers cuda gpu lint install clean
demo: install
	$(BIN)/pyvit-accel demo

# A process for each core and a thread in each: most tests are too small to share. Those of speed run alone.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
test: lint .venv/packages
	$(ONE_THREAD) $(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal --ignore tests/test_speed.py
	$(BIN)/pytest -q tests/test_speed.py

# What the tests compare with, and Triton.
.venv/packages: .venv/installed
	$(BIN)/pip install -q -c constraints.txt triton transformers
	$(BIN)/pip install -q --no-deps -c constraints.txt timm torchvision
	touch $@

bench: install
	$(BIN)/pytest bench -q -o python_files='bench_*.py' -o python_functions='bench_*' \
	  --benchmark-group-by=func --benchmark-columns=min,median,rounds --benchmark-sort=name

peers: .venv-peers/installed
	$(PEERS)/pip install -q -c constraints.txt -r bench/requirements-peers.txt
	mkdir -p demo
	$(PEERS)/python bench/peers_cpu.py --models vit_tiny_patch16_224,vit_base_patch16_224 --batches 1,8 \
	  --json demo/peers_cpu.json --chart demo/peers_cpu.png

cuda:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) setup.py build_cuda

gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu $(ARGS)

lint: install
	$(BIN)/ruff check .

# Without build isolation: the extension is compiled against the torch it will run with.
install: .venv/installed
.venv/installed .venv-peers/installed: setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	PYVIT_ACCEL_EXT=cpu $(@D)/bin/pip install -q --no-build-isolation -c constraints.txt -e ".[cli,test]"
	touch $@

clean:
	rm -rf .venv .venv-peers build *.egg-info pyvit_accel/*.so
