# `make demo` and `make test` install everything they need on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test docs dist autoencoder clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(BIN)/lfm demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/mypy launch/*.py
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The manual, without a network; a warning is an error.
docs: $(VENV)/ready
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/docs/index.html"

# Build wheel and sdist, install the wheel into an environment of its own, and use it from an empty folder.
dist: $(VENV)/ready
	rm -rf build/dist build/lib build/bdist* build/wheel build/empty
	$(PYTHON) -m venv build/wheel/build
	build/wheel/build/bin/pip install -q build 'setuptools>=77' wheel
	build/wheel/build/bin/python -m build --no-isolation --outdir build/dist .
	$(PYTHON) -m venv build/wheel/lfm
	build/wheel/lfm/bin/pip install -q -c constraints.txt setuptools wheel torch
	build/wheel/lfm/bin/pip install -q -c constraints.txt --no-build-isolation "$$(ls build/dist/*.whl)[evaluate,ui]"
	mkdir -p build/empty
	cd build/empty && env -u PYTHONPATH sh -e ../../tests/support/installed_package.sh ../wheel/lfm/bin

# torch is installed first: the build of DeepSpeed imports it. Only in compat mode does an editable install take precedence
# over a folder `lfm` in the working directory, such as this clone seen from its parent folder.
$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation --config-settings editable_mode=compat \
		-e '.[docs,evaluate,s3,test,ui]'
	touch $@
	@echo "installed; for the commands in this shell: . $(VENV)/bin/activate"

# Train the autoencoder that comes with the package again: about half an hour on two cores.
autoencoder: $(VENV)/ready
	$(BIN)/lfm scenes build/autoencoder/scenes --num 6000 --seed 1
	$(BIN)/lfm scenes build/autoencoder/leaves --num 6000 --seed 1 --kind leaves
	$(BIN)/lfm shard build/autoencoder/scenes/images build/autoencoder/raw-scenes --image-size 64
	$(BIN)/lfm shard build/autoencoder/leaves/images build/autoencoder/raw-leaves --image-size 64
	$(BIN)/lfm autoencoder build/autoencoder/raw-scenes build/autoencoder/raw-leaves build/autoencoder/weights \
		--num-steps 3000 --precision bf16
	cp build/autoencoder/weights/config.json build/autoencoder/weights/*.safetensors lfm/assets/autoencoder

clean:
	rm -rf $(VENV) build dist demo *.egg-info
