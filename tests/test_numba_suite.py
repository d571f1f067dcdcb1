"""Numba's own CUDA tests on the CPU backend: a few modules of them, and that the script which runs all of them sees.

The whole suite takes minutes: ``python -m tests.numba_suite``.
"""

import importlib
from collections import Counter

import pytest

from tests import numba_suite, numba_suite_rules
from tests.numba_suite_child import COPIED, SUITES, suite_folder

MODULES = {  # modules of the suite, with the number of tests that pass at least
    "cudadrv.test_cuda_array_slicing": 27,
    "cudapy.test_atomics": 25,
    "cudapy.test_frexp_ldexp": 4,
    "cudapy.test_idiv": 2,
    "cudapy.test_powi": 8,
    "cudapy.test_sync": 15,
    "cudapy.test_warp_ops": 15,
}

WRITTEN_HERE = """
import math
import unittest
import numpy as np
from numba import cuda
from numba.cuda.cudadrv import driver
from numba.cuda.testing import CUDATestCase, skip_on_cudasim, skip_unless_cudasim

@cuda.jit
def double(x):
    i = cuda.grid(1)
    if i < x.size:
        x[i] = 2 * x[i]

@cuda.jit
def refused(x):
    x[0] = open

class Tests(CUDATestCase):
    def doubled(self):
        x = np.arange(5)
        double[1, 32](x)
        return x

    @skip_on_cudasim("here is none")
    def test_pass(self):
        np.testing.assert_array_equal(self.doubled(), [0, 2, 4, 6, 8])

    def test_wrong(self):
        np.testing.assert_array_equal(self.doubled(), [0, 2, 4, 6, 7])

    def test_wrong_in_the_second_of_three(self):
        for last in 8, 7, 8:
            with self.subTest(last=last):
                self.assertEqual(self.doubled()[4], last)

    def test_unclear(self):
        math.sqrt(-1)

    def test_accepted(self):
        with self.assertRaises(ValueError):
            self.doubled()

    @unittest.expectedFailure
    def test_accepted_to_the_end(self):
        self.doubled()

    @unittest.expectedFailure
    def test_accepted_with_a_wrong_end(self):
        self.assertEqual(self.doubled()[4], 7)

    def test_refused(self):
        refused[1, 1](np.zeros(1))

    @unittest.expectedFailure
    def test_pass_refused_on_a_gpu_too(self):
        refused[1, 1](np.zeros(1))

    def test_refused_in_other_words(self):
        with self.assertRaises(ValueError) as raises:
            double[0, 32](np.zeros(1))
        self.assertIn("an invalid configuration argument", str(raises.exception))

    def test_refused_name(self):
        cuda.there_is_no_such_name(1)

    def test_refused_name_that_is_no_error_waited_for(self):
        with self.assertRaises(Exception):
            cuda.there_is_no_such_name(1)

    def test_not_applicable_driver(self):
        driver.driver.cuInit(0)

    @skip_unless_cudasim("not on a GPU")
    def test_not_applicable_simulator(self):
        pass
"""
RACES = """
import numpy as np
from numba import cuda
from numba.cuda.testing import CUDATestCase

@cuda.jit
def sum_of_all(x, total):
    total[0] += x[cuda.grid(1)]

class Tests(CUDATestCase):
    def test_runs(self):
        sum_of_all[1, 32](np.ones(32), np.zeros(1))
"""
ENDS = """
import os
import time
import unittest

class Tests(unittest.TestCase):
    def test_1_pass(self):
        pass

    def test_2_crash(self):
        os.abort()

    def test_3_crash_without_signal(self):
        os._exit(0)

    def test_4_hang(self):
        time.sleep(600)

    def test_5_pass(self):
        pass
"""


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_numbas_own_suite_are_never_wrong(module):
    records = numba_suite.run("numba", module, jobs=1)
    assert all(test.startswith(f"{module}.") for test in records)
    counts = Counter(record["class"] for record in records.values())
    assert counts["wrong"] == counts["crash"] == counts["unclear"] == counts["accepted"] == 0, records
    assert counts["pass"] >= MODULES[module]


def test_each_class_is_recognised(tmp_path):
    (tmp_path / "test_written_here.py").write_text(WRITTEN_HERE)
    records = numba_suite.run(str(tmp_path), jobs=1)
    assert len(records) == WRITTEN_HERE.count("def test_")
    for test, record in records.items():
        name = test.rpartition(".test_")[2].replace("not_applicable", "not applicable")
        assert name.startswith(record["class"]), (test, record["class"], record["reason"])


def test_a_crash_and_a_hang_count_for_their_test_and_end_nothing(tmp_path):
    (tmp_path / "test_ends.py").write_text(ENDS)
    records = numba_suite.run(str(tmp_path), jobs=1, seconds=2)
    verdicts = [record["class"] for record in records.values()]
    assert verdicts == ["pass", "crash", "crash", "crash", "pass"]
    assert "ended with -6" in records["test_ends.Tests.test_2_crash"]["reason"]
    assert records["test_ends.Tests.test_4_hang"]["outcome"] == "hang"


def test_a_module_that_cannot_be_imported_is_seen(tmp_path):
    (tmp_path / "test_broken.py").write_text("import there_is_no_such_package\n")
    records = numba_suite.run(str(tmp_path), jobs=1)
    assert {test: record["class"] for test, record in records.items()} == {"test_broken": "unclear"}


def test_the_program_prints_a_table_and_says_by_its_exit_code_what_it_has_seen(tmp_path, capsys):
    (tmp_path / "test_ends.py").write_text(ENDS)
    assert numba_suite.main(["--suite", str(tmp_path), "--only", "pass", "--json", str(tmp_path / "out.json")]) == 0
    assert "2 tests\n     2  pass\n     0  silently wrong\n" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists()
    assert numba_suite.main(["--suite", str(tmp_path), "--only", "test_2"]) == 1
    assert "\ncrash or hang:\n  test_ends.Tests.test_2_crash: the process ended with -6" in capsys.readouterr().out


def test_findings_of_the_sanitizer_are_printed(tmp_path, capsys):
    (tmp_path / "test_races.py").write_text(RACES)
    assert numba_suite.main(["--suite", str(tmp_path), "--sanitize"]) == 0
    assert "\nfindings of the sanitizer:\n  test_races.Tests.test_runs: global-race in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "there_is_no_such_test"], "no test of the suite has 'there_is_no_such_test' in its id"),
        (["--suite", "there/is/no/such/folder"], "no such folder; use numba, numba-cuda or a folder"),
        (["--json", "there/is/no/such/folder/file"], "is not a file in a folder that exists"),
        (["--jobs", "0"], "must be above 0"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        numba_suite.main(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_table_of_exceptions_names_tests_that_exist():
    folders = [folder for folder in map(suite_folder, SUITES) if folder]
    for pattern, kind, reason in numba_suite_rules.TABLE:
        assert kind in numba_suite_rules.CLASSES and reason
        parts = pattern.split(".")
        files = [folder / parts[0] / f"{parts[1].rstrip('*')}.py" for folder in folders]
        texts = [file.read_text() for file in files if file.exists()]
        if not texts and len(folders) < len(SUITES):
            continue  # a test of the other wheel
        assert any(all(word.strip("*") in text for word in parts[2:]) for text in texts), pattern


def test_numba_cudas_copies_are_of_modules_that_exist():
    for original in COPIED.values():
        importlib.import_module(original)
