PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
WORKERS ?= 2

.PHONY: book serve test slow check-site bench colab export check clean

book: .venv/ready export  ## Execute every chapter and build the site
	$(BIN)/jupyter-book build -W --keep-going .
	@echo "The book is ready: open $(CURDIR)/_build/html/index.html, or run 'make serve'."

serve:  ## Serve the built site on http://localhost:8000 and open it
	@(sleep 1; $(PYTHON) -m webbrowser -t http://localhost:8000 >/dev/null 2>&1) &
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

test: .venv/ready  ## The quick suite: no notebooks are run, no site is built; in WORKERS processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not site"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not site and not bad_input" --shape-check tests/blocks

check-site: .venv/ready  ## The built site in a headless browser
	$(BIN)/python -m pytest -q -m site tests/site

slow: .venv/ready  ## Everything marked slow
	$(BIN)/python -m pytest -q -m slow

bench: .venv/ready  ## Time and memory against other libraries, into benchmarks/README.md; hours on an idle machine, resumable. QUICK=1: minutes
	$(BIN)/pip install -q --no-deps -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/table.py $(if $(QUICK),--quick)

colab: .venv/ready  ## The Colab edition of each notebook, in _build/colab
	$(BIN)/python tools/colab.py

export: .venv/ready  ## Notebooks → package
	@$(BIN)/python tools/export.py

check: .venv/ready  ## Notebooks clean, package equal to what they export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/export.py
	git diff --exit-code -- nbs unet_course

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

clean:
	rm -rf _build
