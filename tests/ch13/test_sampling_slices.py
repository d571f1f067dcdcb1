"""Chapter 13: the draw by many blocks is the draw by one, bit for bit; and the likeliest token of rows that take it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import cuda
from test_sampling_rows import MIXED, SIZES, Rows

from chapters.ch07_warp_reduce.argmax import argmax_reference
from chapters.ch13_llm_ops import sampling_rows
from chapters.ch13_llm_ops import sampling_slices as ch13

INF = np.float32(np.inf)


class Slices(Rows):
    """Rows whose tokens are chosen by the slices' kernels."""

    def draw(self, logits=None):
        a, logits, (n, vocab_size) = self.a, self.logits if logits is None else logits, (self.n, self.vocab_size)
        if not hasattr(self, "work"):
            sizes = ch13.slices_workspace(n, vocab_size)
            self.work = [cuda.to_device(np.zeros(shape, dtype)) for shape, dtype in sizes]
            n_best = ch13.slices_of(vocab_size)
            self.best = cuda.device_array((n, n_best + 3), np.float32), cuda.device_array((n, n_best + 3), np.int32)
        counts, masses, largest, *cut = self.work
        bins, n_best = (counts, masses, largest), ch13.slices_of(vocab_size)
        slices, shared = ch13.slices_launch(n, vocab_size), ch13.shared_slices_launch(n, vocab_size)
        which, filters = (a["active"], a["temperature"]), (a["top_k"], a["top_p"], a["min_p"])
        ch13.best_slices[slices](logits, *self.best, vocab_size)
        ch13.bin_rows[shared](logits, self.best[0], n_best, *which, a["top_p"], *bins, vocab_size)
        ch13.cut_rows[shared](logits, *bins, *which, *filters, *cut, vocab_size)
        ch13.pick_rows[ch13.pick_rows_launch(n)](
            logits, *self.best, n_best, *bins, *cut, self.chosen, *which, *filters, a["seed"], a["step"], vocab_size
        )  # fmt: skip
        assert not counts.copy_to_host().any() and not masses.copy_to_host().any()
        assert not cut[1].copy_to_host()[:, 2].any()
        return self.chosen.copy_to_host().tolist()


def expected(logits, how):
    how = {name: how[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step") if name in how}
    return sampling_rows.draw_row_reference(logits, how.pop("temperature", 1.0), **how)


@pytest.mark.parametrize("vocab_size", SIZES)
def test_it_is_the_draw_of_one_block(rng, vocab_size):
    rows = [how | {"seed": 2**64 - 1 - i, "step": i**7} for i, how in enumerate([*MIXED, {"min_p": 0.1}])]
    logits = rng.standard_normal((len(rows), vocab_size), dtype=np.float32).round(2) * 3  # with ties
    slices, one = Slices(logits, rows), Rows(logits, rows)
    for turn in range(2):
        got = slices.draw()
        assert got == one.draw()
        assert got == [expected(row, how | {"step": how["step"] + turn}) for row, how in zip(logits, rows)]
    assert slices.a["step"].copy_to_host().tolist() == [how["step"] + 2 for how in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries({
            "temperature": st.sampled_from([0.0, 1e-12, 0.01, 0.5, 1.0, 3.0, 1e6]), "top_k": st.integers(0, 120),
            "top_p": st.floats(0.01, 1.0), "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
            "seed": st.integers(0, 2**64 - 1), "step": st.integers(0, 2**40), "data": st.integers(0, 5),
        }),
        min_size=1, max_size=9,
    ),
    st.sampled_from([0, 1, 6]),
)  # fmt: skip
def test_random_settings(rows, digits):
    logits = (10 * np.random.default_rng(8).standard_normal((6, 101))).astype(np.float32).round(digits)
    pick = [row["data"] for row in rows]
    assert Slices(logits[pick], rows).draw() == [expected(logits[row["data"]], row) for row in rows]


def test_a_bin_with_more_tokens_than_there_is_room_for():
    """Equal logits: the lowest tokens stay; and thousands that a single bin cannot tell apart."""
    n = 2 * ch13.CANDIDATES + 905
    equal, close = np.zeros(n, np.float32), np.linspace(1, 1 + 1e-3, n, dtype=np.float32)
    logits = np.stack([equal, close, equal, close, close])
    rows = [{"top_k": 5, "seed": 3}, {"top_k": 3000}, {"top_p": 0.3, "seed": 1}, {"top_p": 0.6}]
    rows.append({"top_k": 9, "top_p": 0.5, "min_p": 0.9})
    for step in range(3):
        given = [row | {"step": step} for row in rows]
        got = Slices(logits, given).draw()
        assert got == [expected(row, how) for row, how in zip(logits, given)] and got[0] < 5


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("k", [40, 1000, 4000, 20_000])
def test_the_second_line_lies_in_any_of_the_bins_that_the_first_leaves(rng, spread, k):
    logits = (spread * rng.standard_normal((6, 20_000))).astype(np.float32)
    rows = [{"top_k": k, "top_p": p, "seed": seed} for seed, p in enumerate([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12])]
    rows[3]["min_p"] = 0.3
    assert Slices(logits, rows).draw() == [expected(row, how) for row, how in zip(logits, rows)]


@pytest.mark.parametrize("wrong", [-50.0, 50.0, -INF, INF])
def test_a_wrong_largest_logit_ends(rng, wrong):
    """No loop waits for what cannot be: a kernel on a GPU has no Ctrl-C."""
    n = 2 * ch13.CANDIDATES + 905
    batch = Slices(rng.standard_normal((4, n), dtype=np.float32), [{"top_k": 40}, {"top_p": 0.5}, {}, {"top_k": 3000}])
    batch.draw()
    a, (counts, _, largest, *cut) = batch.a, batch.work
    best = cuda.to_device(np.full((4, 1), wrong, np.float32)), cuda.to_device(np.zeros((4, 1), np.int32))
    which, filters, bins = (a["active"], a["temperature"]), (a["top_k"], a["top_p"], a["min_p"]), batch.work[:3]
    slices = ch13.shared_slices_launch(4, n)
    ch13.bin_rows[slices](batch.logits, best[0], 1, *which, a["top_p"], *bins, n)
    ch13.cut_rows[slices](batch.logits, *bins, *which, *filters, *cut, n)
    ch13.pick_rows[ch13.pick_rows_launch(4)](
        batch.logits, *best, 1, *bins, *cut, batch.chosen, *which, *filters, a["seed"], a["step"], n
    )
    assert largest.copy_to_host().tolist() == [wrong] * 4 and not counts.copy_to_host().any()


def test_what_is_no_number_or_infinite(rng):
    logits = rng.standard_normal((7, 5001), dtype=np.float32)
    logits[0] = np.nan
    logits[1] = -INF
    logits[2, 40:] = -INF
    logits[3, 7] = logits[3, 4000] = INF
    logits[4, ::2] = np.nan
    logits[5, 3] = 3e38
    logits[5, 4] = -3e38
    logits[6] *= 1e30
    for how in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}):
        rows = [how | {"seed": seed} for seed in range(7)]
        assert Slices(logits, rows).draw() == [expected(row, one) for row, one in zip(logits, rows)]


def test_rows_that_are_not_active_take_the_likeliest(rng):
    logits = rng.standard_normal((5, 5001), dtype=np.float32).round(1)
    rows = [{"active": r % 2, "step": 9, "seed": r, "temperature": 1.0 if r < 3 else 0.0} for r in range(5)]
    batch = Slices(logits, rows)
    got = batch.draw()
    likeliest = argmax_reference(logits).tolist()
    assert [got[r] for r in (0, 2, 3, 4)] == [likeliest[r] for r in (0, 2, 3, 4)]
    assert got[1] == expected(logits[1], rows[1])
    assert batch.a["step"].copy_to_host().tolist() == [9, 10, 9, 10, 9]


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    rows = [{"top_k": 7, "top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}]
    logits = rng.standard_normal((3, 2100), dtype=np.float32)
    assert Slices(logits, rows).draw() == [expected(row, how) for row, how in zip(logits, rows)]


def test_launches_refuse():
    for launch, sizes, named in (
        (ch13.slices_launch, (0, 8), "n_rows = 0"), (ch13.slices_launch, (1, 0), "vocab_size = 0"),
        (ch13.shared_slices_launch, (65536, 8), "n_rows = 65536"), (ch13.pick_rows_launch, (0,), "n_rows = 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            launch(*sizes)
