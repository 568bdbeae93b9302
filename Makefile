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

test: .venv/installed
	$(RUN) -m pytest tests -q

slow: .venv/installed              # the long campaigns: minutes to an hour
	$(RUN) -m pytest tests -q -m slow

fuzz: .venv/installed              # files and requests mutated by the thousand: some minutes
	$(RUN) -m pytest tests -q -m fuzz

clean:
	rm -rf .venv out
