# Two commands: `make demo` runs the whole mission in miniature, `make test` the test suite. Both set up .venv first.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test slow fuzz clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/installed
	$(RUN) -m demo.run

# Tests that start processes spend most of their time waiting, so they run beside the others; their output comes last.
WAITING = tests/test_processes.py tests/test_not_lost.py tests/test_fsdp.py tests/test_other_systems.py

test: .venv/installed
	@$(RUN) -m pytest -q $(WAITING) > .waiting.log 2>&1 & waiting=$$!; trap "kill $$waiting" INT TERM; \
	$(RUN) -m pytest -q tests $(WAITING:%=--ignore=%); others=$$?; \
	wait $$waiting; waited=$$?; cat .waiting.log; exit $$((others + waited))

slow: .venv/installed              # the long campaigns: minutes to an hour
	$(RUN) -m pytest tests -q -m slow

fuzz: .venv/installed              # files and requests mutated by the thousand: some minutes
	$(RUN) -m pytest tests -q -m fuzz

clean:
	rm -rf .venv out
