# Kernel by Kernel. `make` alone lists the targets.
#
# Every target sets up what it needs in a virtual environment in .venv/, from the pins in pyproject.toml: once, and again
# when pyproject.toml changes. Nothing is installed outside it and nothing needs root. Variables, all optional:
#
#   PYTHON=python3.12   the interpreter .venv is made with: Python 3.11, 3.12 or 3.13
#   VENV=.venv          where the virtual environment is
#   PROMPT="Once upon"  text for ch14 and profile to go on with; or as ids: TOKENS=15496,11,612,318
#   MAX_NEW=64          how many tokens ch14 writes
#   WEIGHTS=FILE        another weight file for ch14 and profile
#   CH=09               the chapter that bench measures; all by default
#   ARGS="..."          more options: for ch14 (--temperature=0.8 --trace ...), for test (pytest's: tests/ch03, -x, -n 2 ...)
#   ARCH=sm_80          the GPU architecture to compile for: on a GPU it is used, without one the kernels are checked
#   EX=ch13/topk        the exercise that grade, hint, reset and solution are about; grade takes all by default
#   SEEDS=0:2000        the random kernels that fuzz tries
#   TORCH_INDEX=URL     where pip looks for torch, besides PyPI. PyPI's torch for Linux comes with 3 GB of CUDA libraries;
#                       TORCH_INDEX=https://download.pytorch.org/whl/cpu has the same version for the CPU only, 0.2 GB.
#                       Only `make test` needs torch, to compare with; ch14 does without.

PYTHON      ?=
TORCH_INDEX ?=
# Not from the environment, where ARCH and PROMPT often mean something else.
VENV    = .venv
PROMPT  =
TOKENS  = $(if $(KBK_PROMPT),,15496$(comma)11$(comma)612$(comma)318)
MAX_NEW = 64
WEIGHTS =
ARGS    =
ARCH    =
CH      =
EX      =
GIVE_UP =
SEEDS   = 0:2000
comma  := ,

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install

# Handed to the shell as variables, so that quotes and dollar signs in a prompt stay what they are.
export KBK_PROMPT  := $(value PROMPT)
export KBK_TOKENS  := $(TOKENS)
export KBK_WEIGHTS := $(value WEIGHTS)
export KBK_ARCH    := $(value ARCH)

.DEFAULT_GOAL := help
.NOTPARALLEL:
CHAPTERS = ch02 ch03 ch04 ch05 ch06 ch07 ch08 ch09 ch10 ch11 ch12 ch13
.PHONY: $(CHAPTERS) help ch14 profile grade hint progress reset solution autograder lab notebooks strip bench plots lessons test sanitize lint fuzz bench-gpt2 bench-cpu bench-sanitizer gpt2 setup plan clean

help: ## list the targets
	@echo "Kernel by Kernel: GPU kernels in Numba-CUDA, one by one, up to a GPT-2. The targets:"; echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 } \
		/^\$$\(CHAPTERS\):.*## / { printf "  make %-10s %s\n", "chNN", $$2 }' Makefile
	@echo; echo "Variables (PROMPT, MAX_NEW, ARCH, PYTHON, ...) are explained at the top of the Makefile."

ch14: setup ## generate text with GPT-2 made of the chapters' kernels (PROMPT="...", MAX_NEW=64, ARCH=sm_80)
	@. $(VENV)/plan.sh; [ -z "$$NOTE" ] || echo "==> $$NOTE"; \
	[ -z "$$CHECK" ] || { echo "==> compiling the kernels for $$CHECK"; $(PY) -m common.ptx_check --arch "$$CHECK"; }
	@. $(VENV)/plan.sh; [ -z "$$FORCE" ] || export NUMBA_FORCE_CUDA_CC="$$FORCE"; \
	set -- --max_new=$(MAX_NEW) --stats $(ARGS); \
	[ -z "$$KBK_WEIGHTS" ] || set -- --weights="$$KBK_WEIGHTS" "$$@"; \
	[ -z "$$KBK_TOKENS" ] || set -- --tokens="$$KBK_TOKENS" "$$@"; \
	[ -z "$$KBK_PROMPT" ] || set -- --prompt="$$KBK_PROMPT" "$$@"; \
	printf '==> %s\n' "$(PY) ch14_mini_llm/run.py $$*$${FORCE:+   (compiled for $$KBK_ARCH)}" >&2; \
	$(PY) ch14_mini_llm/run.py "$$@"

profile: setup ## show where the time of a forward pass goes, and its largest kernel (ARGS="--save=timeline.svg")
	@. $(VENV)/plan.sh; [ -z "$$FORCE" ] || export NUMBA_FORCE_CUDA_CC="$$FORCE"; \
	set -- $(ARGS); \
	[ -z "$$KBK_WEIGHTS" ] || set -- --weights="$$KBK_WEIGHTS" "$$@"; \
	[ -z "$$KBK_TOKENS" ] || set -- --tokens="$$KBK_TOKENS" "$$@"; \
	[ -z "$$KBK_PROMPT" ] || set -- --prompt="$$KBK_PROMPT" "$$@"; \
	$(PY) ch14_mini_llm/profile.py "$$@"

$(CHAPTERS): setup ## ch02 to ch13: run the demo of a chapter
	$(PY) -m chapters.$(notdir $(wildcard chapters/$@_*)) $(ARGS)

grade: $(VENV)/.grade setup ## grade the exercises (EX=ch13/topk for one; ARGS=--watch: again on each save)
	@$(PY) -m common.grade run $(EX) $(ARGS)

hint: $(VENV)/.grade ## the next hint for an exercise (EX=ch13/topk)
	@$(PY) -m common.grade hint $(EX)

progress: $(VENV)/.grade ## which exercises are solved
	@$(PY) -m common.grade progress

reset: $(VENV)/.grade ## an exercise as it was; your file is kept beside it (EX=ch13/topk)
	@$(PY) -m common.grade reset $(EX)

solution: $(VENV)/.grade ## the reference, once your own has passed, or with GIVE_UP=1 (EX=ch13/topk)
	@$(PY) -m common.grade solution $(EX) $(if $(GIVE_UP),--give-up)

autograder: $(VENV)/.grade ## for teachers: a zip for Gradescope in build/ (EX="ch13/topk ch14/kv_cache" for some)
	@$(PY) -m common.grade autograder build/autograder.zip $(EX)

lab: $(VENV)/.lab setup ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab chapters

notebooks: $(VENV)/.dev setup ## run all notebooks from top to bottom
	$(PY) -m pytest tests/test_lessons.py -k notebook $(ARGS)

strip: $(VENV)/.dev ## take the outputs out of the notebooks, before a commit
	$(PY) -m nbstripout --keep-id $(wildcard chapters/*/lab.ipynb)

bench: $(VENV)/.dev setup ## measure the ladders beside the library (CH=09 for one chapter), and the model beside its peers
	$(PY) benchmarks/ladders.py $(CH) $(ARGS)
	$(if $(CH),,$(PY) benchmarks/gpt2.py && $(PY) benchmarks/start_time.py)

bench-gpt2: $(VENV)/.dev setup ## measure the levels of the model beside transformers and torch.compile
	$(PY) benchmarks/gpt2.py $(ARGS)

plots: $(VENV)/.dev ## draw the plots of lessons and README and write their tables, from the committed figures
	$(PY) benchmarks/plots.py
	$(PY) benchmarks/gpt2_plot.py
	$(PY) benchmarks/readme.py
	$(PY) -m chapters.lessons

lessons: $(VENV)/.base ## write what the lessons take from the code: sources, links, the map of the book
	$(PY) -m chapters.lessons

test: $(VENV)/.dev setup ## run the tests (ARGS="-k softmax")
	$(PY) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev ## check the code's style with ruff
	$(PY) -m ruff check .

sanitize: $(VENV)/.dev setup ## run every kernel of the book under the sanitizer: races, bounds, barriers
	$(PY) -m pytest -n 2 --sanitize --one-size -k "not refuse" $(wildcard tests/ch??) $(ARGS)

fuzz: $(VENV)/.dev ## compare random kernels with an interpreter (SEEDS=0:2000)
	$(PY) -m tests.fuzz_kernels --backend --seeds $(SEEDS) $(ARGS)

bench-cpu: $(VENV)/.base ## measure the CPU backend beside NumPy and Numba's simulator
	$(PY) benchmarks/bench_cpu.py $(ARGS)

bench-sanitizer: $(VENV)/.base ## measure how many times slower each kernel runs under the sanitizer
	$(PY) benchmarks/sanitizer_cost.py $(ARGS)

gpt2: $(VENV)/.base ## fetch the real GPT-2 (548 MB) into data/gpt2-small.bin, which ch14 then uses
	$(PY) data/download_gpt2.py --out data/gpt2-small.bin $(ARGS)

# --- the virtual environment --------------------------------------------------------------------------
# Empty files in it say what has been installed: .venv-made, .base (what ch14 needs), .dev (the tests), .grade, .lab, .gpu12, .gpu13.

setup: plan $(VENV)/.base ## install what ch14 needs, and numba-cuda where there is a GPU for it
	@. $(VENV)/plan.sh; stamp="$(VENV)/.$$EXTRA"; \
	if [ -n "$$EXTRA" ] && [ -z "$$(find "$$stamp" -newer pyproject.toml 2>/dev/null)" ]; then \
		echo "==> installing numba-cuda and NVIDIA's compiler into $(VENV) (0.2 GB)"; \
		$(PIP) -e ".[$$EXTRA]" && touch "$$stamp"; \
	fi

plan: $(VENV)/.venv-made
	@$(PY) common/archs.py --arch "$$KBK_ARCH" > $(VENV)/plan.sh

$(VENV)/.base: pyproject.toml $(VENV)/.venv-made
	@echo "==> installing NumPy, Numba and the tokenizer into $(VENV) (0.1 GB)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.venv-made
	@echo "==> installing the tests' packages into $(VENV): torch is the large one, see TORCH_INDEX in the Makefile"
	@$(PIP) -e ".[dev]" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $(VENV)/.base $@

$(VENV)/.grade: pyproject.toml $(VENV)/.venv-made
	@echo "==> installing pytest into $(VENV), for the exercises"
	@$(PIP) -e ".[grade]"
	@touch $(VENV)/.base $@

$(VENV)/.lab: pyproject.toml $(VENV)/.venv-made
	@echo "==> installing JupyterLab and matplotlib into $(VENV)"
	@$(PIP) -e ".[lab]"
	@touch $(VENV)/.base $@

$(VENV)/.venv-made:
	@old=; bare=; found=; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		case $$version in 3.11|3.12|3.13) ;; *) old="$$old $$python is $$version,"; continue ;; esac; \
		$$python -c 'import ensurepip, venv' 2>/dev/null || { bare="$$python"; continue; }; \
		found=$$python; break; \
	done; \
	if [ -z "$$found" ]; then \
		if [ -n "$$bare" ]; then echo "error: $$bare cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2; \
		else echo "error: Python 3.11, 3.12 or 3.13 is needed;$${old:- none was found,} so install one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; fi; \
		exit 2; \
	fi; \
	echo "==> making a virtual environment in $(VENV) with $$found ($$($$found --version))"; \
	$$found -m venv $(VENV) && touch $@

clean: ## remove .venv and what tests and builds left behind
	@[ ! -e $(VENV)/.venv-made ] || rm -rf $(VENV)
	@rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
