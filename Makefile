# Each target does the whole set-up on a fresh machine that has only python3 (3.10 or newer) and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BUILD := OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 -m miniature.build

CHECKED := structure.py command_line.py prompt_datasets.py golden.py::test_gradients
CHECKED := $(addprefix tests/test_,$(CHECKED)) tests/method/test_losses.py tests/models/test_placeholder.py \
	tests/evaluation/test_statistics.py tests/tokens/test_class_token.py tests/runs/test_locks.py

EXPERIMENTS := default iterations inversion textual_inversion transfer augmentation gradient_step ablations attention

.PHONY: demo app check test proof reproduce gpu lint miniature teaser figures clean

demo: $(VENV)/ready miniature/weights/quality.json  ## train and evaluate three classes of the miniature
	$(RUN) run.py --config configs/miniature.yml --class_index 7,13,16 --train True --evaluate True

app: $(VENV)/app  ## a page to try class tokens on, in a browser
	$(RUN) app.py

check: $(VENV)/dev lint  ## before every commit: lint, types and tests of every room, in a minute or so
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 $(CHECKED)

test: $(VENV)/dev lint  ## what CI runs
	$(RUN) -m pytest -q -n auto --maxprocesses 4

proof: $(VENV)/dev  ## the slow tests: every class of the miniature reaches the bar, killed processes
	$(RUN) -m pytest -q -m slow --durations 1

reproduce: $(VENV)/ready miniature/weights/quality.json  ## every claim of the paper on the miniature, into docs/results; finished parts are kept in img/results; OPTIONS=--quick only sees that all of it runs
	for name in $(EXPERIMENTS); do $(RUN) -m experiments.$$name $(OPTIONS) || exit 1; done

gpu: $(VENV)/ready  ## what a GPU must show, in ten minutes; see docs/gpu.md
	$(RUN) -m benchmarks.gpu

lint: $(VENV)/dev
	$(RUN) -m ruff check --no-cache .
	$(RUN) -m ruff format --no-cache --check .
	$(RUN) -m mypy

miniature: $(VENV)/ready  ## train the miniature, or what is missing of it; see miniature/build.py
	$(BUILD)

miniature/weights/quality.json: | $(VENV)/ready
	$(BUILD)

teaser: $(VENV)/ready  ## every class of the miniature, and docs/teaser.png from what it draws
	$(RUN) run.py --config configs/miniature.yml --class_index all --train True --evaluate True
	$(RUN) -m docs.draw_teaser

figures: $(VENV)/ready  ## docs/world.png
	$(RUN) -m miniature.build --stages world

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 10) else "Python 3.10 or newer is needed, this is %d.%d: make PYTHON=python3.11 demo" % v)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/app $(VENV)/dev: $(VENV)/%: requirements-%.txt $(VENV)/ready
	$(RUN) -m pip install --quiet -r $<
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
