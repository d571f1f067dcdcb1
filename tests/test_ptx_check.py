"""Compiling for a GPU that is not there, and what `make` decides about architectures.

The tests that compile need numba-cuda: `make ch14 ARCH=sm_80` installs it, and CI runs that first.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import archs, ptx_check
from common.archs import ARCHS, UsageError, parse_arch, plan
from common.backend import Probe, package_problem

ROOT = Path(__file__).resolve().parent.parent
needs_numba_cuda = pytest.mark.skipif(
    bool(package_problem()), reason=f"{package_problem().partition(':')[0]}; `make ch14 ARCH=sm_80` installs it"
)

KERNELS = '''
import common
from numba import cuda, float32, int32

@cuda.jit(device=True)
def twice(x):
    return x + x

@cuda.jit
def scale(x, out, factor, n):
    tile = cuda.shared.array((16, 17), float32)
    i = cuda.grid(1)
    tile[cuda.threadIdx.x, 0] = twice(cuda.shfl_down_sync(0xffffffff, x[i], 1))
    cuda.syncthreads()
    if i < n:
        out[i] = tile[cuda.threadIdx.x, 0] * factor

@cuda.jit
def double_it(x, n):
    i = cuda.grid(1)
    if i < n:
        x[i] = x[i] + x[i]

@cuda.jit
def gpu_refuses(x, n):
    row = [1, 2, 3]  # numba-cuda has no lists
    x[0] = row[n]

@cuda.jit
def idle(x):
    x[0] = 1
'''

GOOD = """
import sys
import numpy as np
from good_kernels import double_it, scale

assert sys.argv[1:] == ["--n", "16"], sys.argv
for dtype in (np.float32, np.float64):
    x = np.ones(16, dtype)
    double_it[1, 32](x, 16)
    double_it[1, 64](x, 3)  # the same types with another block: one entry
x = np.ones(16, np.float32)
scale[1, 16](x, x.copy(), np.float32(2), 16)
print("on stdout")
sys.exit(0)
"""


# --- architectures and the plan -----------------------------------------------------------------------


def test_known_architectures():
    assert parse_arch("sm_80") == (8, 0)
    assert parse_arch("sm_90a") == (9, 0, "a")
    assert parse_arch("sm_121") == (12, 1)
    assert len({parse_arch(name) for name in ARCHS}) == len(ARCHS)


@pytest.mark.parametrize("text", ["sm_8", "sm_81", "80", "8.0", "compute_80", "SM_80", "sm_80 ", "sm_90b", "$(x)"])
def test_unknown_architecture_lists_the_known(text):
    with pytest.raises(UsageError) as error:
        parse_arch(text)
    assert f"ARCH={text} " in str(error.value)
    assert all(f"  {name} " in str(error.value) for name in ARCHS)


def test_architecture_that_cuda_13_dropped():
    with pytest.raises(UsageError, match=r"ARCH=sm_70 is older .* sm_75"):
        parse_arch("sm_70")


def gpu(device="NVIDIA H100 80GB HBM3, sm_90", version=13000):
    return Probe(library="libcuda.so.1", init=0, count=1, version=version, devices=[device])


@pytest.mark.parametrize(
    ("arch", "found", "backend", "expected"),
    [
        ("", Probe(), "", {}),
        ("sm_80", Probe(), "", {"EXTRA": "gpu13", "CHECK": "sm_80"}),
        ("", gpu(), "", {"EXTRA": "gpu13"}),
        ("", gpu(version=12090), "", {"EXTRA": "gpu12"}),
        ("", gpu(version=11080), "", {}),  # numba-cuda cannot use that driver
        ("sm_80", gpu(version=11080), "", {"EXTRA": "gpu13", "CHECK": "sm_80"}),
        ("", gpu(), "cpu", {}),
        ("sm_80", gpu(), " CPU", {"EXTRA": "gpu13", "CHECK": "sm_80"}),
        ("sm_80", gpu(), "", {"EXTRA": "gpu13", "FORCE": "8.0"}),
        ("sm_80", gpu(version=12040), "gpu", {"EXTRA": "gpu12", "FORCE": "8.0"}),
        ("sm_90", gpu(), "", {"EXTRA": "gpu13", "FORCE": "9.0"}),
        ("sm_90a", gpu(), "", {"EXTRA": "gpu13"}),
        ("sm_100", gpu("NVIDIA B200, sm_100"), "", {"EXTRA": "gpu13", "FORCE": "10.0"}),
        ("sm_80", gpu("NVIDIA GeForce RTX 5090, sm_120"), "", {"EXTRA": "gpu13", "FORCE": "8.0"}),
    ],
)
def test_plan(arch, found, backend, expected):
    assert plan(arch, found, backend) == {"EXTRA": "", "CHECK": "", "FORCE": "", "NOTE": ""} | expected


@pytest.mark.parametrize(("arch", "device"), [("sm_100", "H100, sm_90"), ("sm_90a", "B200, sm_100")])
def test_plan_for_code_that_this_gpu_cannot_run(arch, device):
    todo = plan(arch, gpu(device))
    assert (todo["CHECK"], todo["FORCE"]) == (arch, "")
    assert f"this GPU is {device[-6:].strip(', ')} and cannot run {arch} code" in todo["NOTE"]


def run_archs(*arguments):
    """`archs.py` as `make` runs it on a fresh machine: no packages at all (-S), from another folder."""
    command = [sys.executable, "-I", "-S", str(ROOT / "common" / "archs.py"), *arguments]
    environ = {**os.environ, "MINI_BACKEND": "cpu"}
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True)


def test_plan_needs_no_package():
    done = run_archs("--arch", "sm_86")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "EXTRA=gpu13\nCHECK=sm_86\nFORCE=''\nNOTE=''\n"
    assert run_archs("--arch", "").stdout == "EXTRA=''\nCHECK=''\nFORCE=''\nNOTE=''\n"


def test_plan_refuses_an_unknown_architecture():
    done = run_archs("--arch", "sm_1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ARCH=sm_1 is not an architecture known here") and "sm_80" in done.stderr


def test_plan_quotes_for_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(archs, "_probe", lambda: gpu())
    monkeypatch.setenv("MINI_BACKEND", "")
    assert archs.main(["--arch", "sm_100"]) == 0
    shell = subprocess.run(["sh", "-c", capsys.readouterr().out + 'echo "$NOTE"'], capture_output=True, text=True)
    assert shell.stdout.startswith("this GPU is sm_90 and") and shell.stderr == ""


# --- recording ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with programs: `good.py` launches kernels, `bad.py` fails."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "good_kernels.py").write_text(KERNELS, encoding="utf-8")
    (folder / "good.py").write_text(GOOD, encoding="utf-8")
    (folder / "bad.py").write_text("import sys\nprint('words', file=sys.stderr)\nsys.exit(3)\n", encoding="utf-8")
    (folder / "without.py").write_text("import common\n", encoding="utf-8")
    return folder


def run_check(*arguments, cwd=ROOT, **environ):
    command = [sys.executable, "-m", "common.ptx_check", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "MINI_BACKEND": "cpu", **environ}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorded(programs, tmp_path_factory):
    """What a run of good.py recorded, by the kernels' names."""
    out = tmp_path_factory.mktemp("recorded") / "types.json"
    done = run_check("--record", out, "--program", f"{programs / 'good.py'} --n 16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "on stdout" in done.stderr
    return {entry["qualname"]: entry for entry in json.loads(out.read_text())}


def test_record_notes_types_place_and_name(recorded, programs):
    entry = recorded["scale"]
    assert entry["module"] == "good_kernels"
    line = KERNELS.splitlines().index("def scale(x, out, factor, n):") + 1
    assert entry["defined_at"] == f"{(programs / 'good_kernels.py').as_posix()}:{line}"
    array = ["array", "float32", 1, "C"]
    assert entry["types"] == [[array, array, ["scalar", "float32"], ["scalar", "int64"]]]


def test_record_has_one_entry_for_each_list_of_types(recorded):
    dtypes = [types[0][1] for types in recorded["double_it"]["types"]]
    assert dtypes == ["float32", "float64"]


def test_record_lists_kernels_that_were_not_launched(recorded):
    # good_kernels lies beside the program; the device function `twice` is part of `scale`
    assert set(recorded) == {"scale", "double_it", "gpu_refuses", "idle"}
    assert recorded["idle"]["types"] == []


@pytest.mark.parametrize(
    ("program", "words"),
    [("bad.py", "ended with exit code 3"), ("nowhere.py", "there is no file"), ("bad.py --x", "words")],
)
def test_record_of_a_failing_program(programs, tmp_path, program, words):
    done = run_check("--record", tmp_path / "types.json", "--program", f"{programs}/{program}")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "types.json").exists()


# --- compiling ----------------------------------------------------------------------------------------


def test_without_numba_cuda(monkeypatch, capsys):
    monkeypatch.setattr(ptx_check, "package_problem", lambda: "numba-cuda is not installed: pip install x")
    assert ptx_check.main(["--arch", "sm_80"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the check compiles with numba-cuda, but numba-cuda is not installed: pip install")
    assert "gpu13" in message and message.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--arch", "sm_99"], []])
def test_usage_errors(arguments, capsys):
    assert ptx_check.main(arguments) == 2
    assert "sm_80" in capsys.readouterr().err


def test_reading_the_assembler_log():
    log = """ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 592 bytes cmem[0]
info    : used 31 registers, used 1 barriers, 0 stack, 2048 bytes smem, 592 bytes cmem[0], 0 bytes lmem"""
    assert ptx_check.read_assembler_log(log) == {"registers": 31, "shared": 2048, "spilled": 12}
    assert ptx_check.read_assembler_log("") == {"registers": None, "shared": None, "spilled": None}


def test_table_rows_line_up():
    row = {"kernel": "scale", "defined_at": "a.py:3", "lines": 100, "bytes": 2000, "seconds": 0.5}
    line = ptx_check.format_row(row | {"registers": 20, "shared": 0, "spilled": None})
    header = ptx_check.LAYOUT.format(*ptx_check.COLUMNS)
    assert len(line) == len(header) and line.split() == ["scale", "a.py:3", "100", "2000", "20", "0", "-", "0.50"]
    failed = ptx_check.format_row({"kernel": "k", "defined_at": "a.py:3", "error": "first\nsecond", "seconds": 1.0})
    assert failed.splitlines()[0].endswith("FAILED") and failed.splitlines()[1:] == ["    first", "    second"]


@needs_numba_cuda
def test_compiles_what_was_launched(programs, tmp_path):
    (tmp_path / "lone.py").write_text(GOOD.replace("good_kernels", "lone_kernels"), encoding="utf-8")
    used = KERNELS[: KERNELS.index("@cuda.jit\ndef gpu_refuses")]
    (tmp_path / "lone_kernels.py").write_text(used, encoding="utf-8")
    # The variable would turn the target into sm_75; the check must not listen to it.
    done = run_check("--arch", "sm_90a", "--program", f"{tmp_path / 'lone.py'} --n 16", NUMBA_FORCE_CUDA_CC="7.5")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "lone_kernels.py" in line]
    assert sorted(row[0] for row in rows) == ["double_it", "double_it", "scale"]
    scale = next(row for row in rows if row[0] == "scale")
    lines, size, registers, shared = map(int, scale[2:6])
    assert lines > 30 and size > 1000 and 4 < registers < 255
    assert shared >= 16 * 17 * 4
    assert done.stdout.splitlines()[-1] == f"3 kernels: all compile for sm_90a ({ARCHS['sm_90a']})"


@needs_numba_cuda
def test_target_is_the_architecture_asked_for(recorded, programs):
    code = f"""
import json, sys
sys.path.insert(0, {str(programs)!r})
import common
from common import ptx_check
seen = []
ptx_check.assemble = lambda ptx, cc: seen.append(ptx) or {{}}
assert not any("error" in row for row in ptx_check.compile_all([json.loads({json.dumps(recorded["scale"])!r})], (8, 6)))
print([line for line in seen[0].splitlines() if line.startswith(".target")][0], "shfl.sync" in seen[0])
"""
    environ = {**os.environ, "MINI_BACKEND": "ptx"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == ".target sm_86 True", done.stderr


@needs_numba_cuda
def test_a_kernel_that_fails_is_named_and_fails_the_check(programs):
    out = io.StringIO()
    types = [["array", "float32", 1, "C"], ["scalar", "int"]]
    kernels = [
        {"module": "good_kernels", "qualname": "gpu_refuses", "defined_at": "k.py:9", "types": [types]},
        {"module": "good_kernels", "qualname": "idle", "defined_at": "k.py:20", "types": []},
        {"module": "good_kernels", "qualname": "double_it", "defined_at": "k.py:4", "types": [types]},
    ]
    file = programs / "types.json"
    file.write_text(json.dumps(kernels), encoding="utf-8")
    done = run_check("--compile", file, "--arch", "sm_80", "--program", programs / "good.py", MINI_BACKEND="ptx")
    rows = ptx_check._print_table("sm_80", done.stdout.splitlines(), out)
    assert [row["kernel"] for row in rows if "error" in row] == ["gpu_refuses", "idle"]
    assert "was not launched" in rows[1]["error"] and rows[2]["registers"] > 0
    assert out.getvalue().count("FAILED") == 2


@needs_numba_cuda
def test_check_fails_where_a_kernel_was_never_launched(programs):
    done = run_check("--arch", "sm_80", "--program", f"{programs / 'good.py'} --n 16")
    assert done.returncode == 1
    assert "FAILED" in done.stdout and "was not launched" in done.stdout
    assert done.stdout.splitlines()[-1] == "5 kernels: 2 failed"


@needs_numba_cuda
def test_check_of_a_program_without_kernels_fails(programs):
    done = run_check("--arch", "sm_80", "--program", programs / "without.py", cwd=programs)
    assert done.returncode == 1 and "no kernel was launched" in done.stdout
