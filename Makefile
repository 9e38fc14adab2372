# make demo: everything from a fresh clone to a chart. make test: the lint check and all tests.
# make bench: every op beside its float counterpart.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint install clean
demo: install
	$(BIN)/pyvit-accel demo

test: lint
	$(BIN)/pip install -q -c constraints.txt triton transformers
	$(BIN)/pip install -q --no-deps -c constraints.txt timm torchvision
	$(BIN)/pytest -q

bench: install
	$(BIN)/pytest bench -q -o python_files='bench_*.py' -o python_functions='bench_*' \
	  --benchmark-group-by=func --benchmark-columns=min,median,rounds --benchmark-sort=name

lint: install
	$(BIN)/ruff check .

# Without build isolation: the extension is compiled against the torch it will run with.
install: .venv/installed
.venv/installed: setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	PYVIT_ACCEL_EXT=cpu $(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[cli,test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info pyvit_accel/*.so
