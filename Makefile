# Two commands do all the set-up: `make quickstart` to see it work, `make test` to work on it.

PYTHON ?= python3
WORKERS ?= 2
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
VENV := .venv
BIN := $(VENV)/bin
# By the environment, because pip hands that on to the isolated build too. The second name is that of pip 25.3 and later.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip
INPUTS := pyproject.toml constraints.txt

# Nothing is fetched while it runs, and nothing is written outside of the checkout. Spinning OpenMP threads on contended
# cores are several times slower than one thread each.
RUN := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false \
       HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$(CURDIR)/.cache/huggingface" \
       MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib"

.PHONY: quickstart test check sandbox format install install-dev clean

quickstart: install
	$(RUN) $(BIN)/apportion quickstart $(ARGS)

test: check sandbox
	$(RUN) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: install-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# What tests run untrusted programs in; from Debian where it is missing. Python finds a library without /sbin on PATH.
sandbox:
	@if command -v bwrap >/dev/null && $(PYTHON) -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null; then :; \
	elif [ -n "$(SUDO)" ] && ! command -v sudo >/dev/null; then \
	  echo "bubblewrap or libseccomp2 is missing: let root run apt-get install bubblewrap libseccomp2" >&2; exit 1; \
	else $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq bubblewrap libseccomp2; fi

format: install-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# The stamps are touched last, so that an installation that was cut short starts again.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: constraints.txt $(VENV)/.created
	$(PIP) install torch
	touch $@

$(VENV)/.installed: $(INPUTS) $(VENV)/.torch
	$(PIP) install --editable .
	touch $@

$(VENV)/.installed-dev: $(INPUTS) $(VENV)/.torch
	$(PIP) install --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .ruff_cache .hypothesis
