# make run    set up .venv, train classical and tuned VQ-EMA and BA-VQ on the embedded data set, compare them
# make test   set up .venv, run the linter, the type checker and the tests, report coverage
PYTHON ?= python3
PY := .venv/bin/python
# As in train.py, for the tests, too: how long threads that wait spin before they sleep.
export GOMP_SPINCOUNT ?= 3000
QUICK := --dataset dead_leaves --hidden_dim 64 --latent_dim 8 --codebook_size 512 --epochs 4 --no_wandb

.PHONY: run test clean

run: .venv/run
	$(PY) train.py --quantizer vq_ema --vq_recipe classical --name quick_classical $(QUICK)
	$(PY) train.py --quantizer vq_ema --name quick_vq_ema $(QUICK)
	$(PY) train.py --quantizer ba_vq --entropy_weight 100 --name quick_ba_vq $(QUICK)
	$(PY) analysis.py experiments/quick_classical experiments/quick_vq_ema experiments/quick_ba_vq

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/mypy
	rm -f .coverage*
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 --dist worksteal tests
	-$(PY) -m coverage combine -q
	-$(PY) -m coverage report

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: .venv/run requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .coverage* .hypothesis __pycache__ */__pycache__
