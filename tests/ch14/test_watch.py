"""Chapter 14: the picture of a batch at work, fed with the scheduler's plans; no kernel runs here."""

import io
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_scheduler import Run

import common
from benchmarks import batching_plot
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.static import StaticScheduler
from ch14_mini_llm.terminal import Terminal, cut, width
from ch14_mini_llm.watch import MOST_ENDED, Watch

GOLDEN = """\
step 23   0 running   0 waiting   5 ended   19 tokens/s   2 preemptions
blocks □□□□□□□· 0 in use, 7 cached, 1 free   prefix hits 4 of 33 tokens
0 │▒███████ length
1 │▒▒███████████ length
2 │·▒▒██×··▒███×███ length
3 │   ··········▒███ length
4 │           ···▒████████ length
steps 1 to 23
· waiting   █ new token   ▒ prompt   × preempted"""

GOLDEN_STATIC = """\
step 16   0 running   0 waiting   3 ended   12 tokens/s
blocks ························ 0 in use, 0 cached, 40 free
0 │▒██░░░░░░░ length
1 │▒█████████ length
2 │··········▒█████ length
steps 1 to 16
· waiting   ░ padding   █ new token   ▒ prompt"""


class Stream(io.StringIO):
    encoding = "utf-8"

    def __init__(self, live=True, encoding="utf-8"):
        super().__init__()
        self.live, self.encoding = live, encoding

    def isatty(self):
        return self.live


class Watched(Run):
    """The scheduler's runs, with a picture. A step takes a tenth of a second. size: of the terminal."""

    def __init__(self, *sizes, stream=None, size=(80, 24), environ=None, **options):
        super().__init__(*sizes, **{"ahead": 1, **options})
        self.now = 0.0
        self.stream = stream or Stream(live=False)
        self.terminal = Terminal(self.stream, lambda: size, environ or {})
        self.watch = Watch(self.scheduler, self.terminal, lambda: self.now)

    def fetch(self):
        self.outputs = list(self.scheduler.outputs)
        super().fetch()

    def step(self):
        """As an engine has it: a step is planned, run and read, then looked at."""
        plan = super().step()
        outputs = list(self.outputs)
        if plan is not None and self.ahead == 1:
            super().step()
            outputs += self.outputs
        self.now += 0.1 * (plan is not None)
        self.watch.step(plan, outputs)
        return plan


def text(run, whole=True):
    return "\n".join(run.watch.picture(whole))


def test_the_picture_of_a_run():
    run = Watched(8, 4, max_batch=3, max_rows=9)
    for length, new in (5, 8), (7, 12), (6, 10):
        run.submit([length] * length, new)
    for _ in range(3):
        run.step()
    run.submit([8] * 5, 4)
    for _ in range(8):
        run.step()
    run.submit([8] * 10, 9)
    run.finish()
    assert text(run) == GOLDEN


def test_the_picture_of_a_static_batch_shows_padding():
    run = Watched(40, 4, max_batch=2, max_rows=20, kind=StaticScheduler)
    for length, new in (5, 3), (7, 10), (6, 6):
        run.submit([length] * length, new)
    run.finish()
    assert text(run) == GOLDEN_STATIC


def busy(n=40, **options):
    run = Watched(60, 4, max_batch=4, max_rows=12, **options)
    for number in range(n):
        run.submit([number] * (1 + number % 9), 3 + 5 * number % 17, priority=number % 7 == 0)
    return run


@pytest.mark.parametrize("columns", [1, 2, 5, 12, 20, 40, 80, 200])
@pytest.mark.parametrize("lines", [1, 2, 4, 7, 24])
@pytest.mark.parametrize("live", [True, False])
def test_it_fits_any_terminal(columns, lines, live):
    stream = Stream(live)
    run = busy(12, size=(columns, lines), stream=stream)
    run.finish()
    run.watch.close()
    assert all(width(line) < max(2, columns) for line in re.split("\n", stream.getvalue().replace("\r", "")))
    assert not live or len(run.watch.picture(whole=True)) < max(2, lines)


def test_many_sequences_show_those_that_run_and_say_how_many_do_not_fit():
    run = busy(40, size=(60, 14), stream=Stream())
    for _ in range(60):
        run.step()
    picture = text(run, whole=False).splitlines()
    ids = {int(match[1]) for line in picture if (match := re.match(r" *(\d+) │", re.sub(r"\x1b\[\d*m", "", line)))}
    assert len(picture) <= 13 and len(ids) == 8 and {s.id for s in run.scheduler.running} <= ids
    assert run.scheduler.waiting[0].id in ids and list(run.ends)[-1] in ids
    hidden = sum(map(int, re.findall(r"(\d+) more", picture[-2])))
    assert hidden == 40 - 8
    run.finish()


def test_only_so_many_ended_sequences_are_remembered():
    run = busy(MOST_ENDED + 30)
    run.finish()
    assert len(run.watch.rows) == MOST_ENDED and run.watch.ended == MOST_ENDED + 30
    assert "30 more ended" in text(run)


def test_an_abort_of_a_waiting_sequence_ends_its_row():
    run = Watched(60, 4, max_batch=1, max_rows=12)
    run.submit([1] * 4, 6)
    waits = run.submit([2] * 4, 6)
    run.step()
    run.step()
    run.scheduler.abort(waits)
    run.step()
    run.finish()
    assert "\n1 │·· abort\n" in text(run)


def test_rows_of_steps_that_overlap():
    run = busy(9, ahead=3)
    run.finish()
    assert run.watch.ended == 9


@pytest.mark.parametrize(
    "environ, live, coloured",
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True),
     ({"TERM": "dumb"}, False, False)],
)  # fmt: skip
def test_colour_only_where_it_is_wanted(environ, live, coloured):
    stream = Stream()
    run = busy(5, stream=stream, environ=environ)
    run.finish()
    run.watch.close()
    assert bool(re.search(r"\x1b\[\d+m", stream.getvalue())) == coloured
    assert ("\x1b[?25h" in stream.getvalue()) == live == ("\x1b" in stream.getvalue())


def test_a_stream_that_lacks_the_characters_gets_others():
    run = busy(5, stream=Stream(live=False, encoding="ascii"))
    run.finish()
    run.watch.close()
    assert run.stream.getvalue().isascii() and "p new token" not in run.stream.getvalue()
    assert "# new token" in run.stream.getvalue()


class Screen:
    """What a terminal shows of what `Terminal` writes: lines, and the cursor's."""

    def __init__(self):
        self.lines, self.row, self.hidden = [""], 0, False

    def feed(self, stream):
        for piece in re.findall(r"\x1b\[[?\d]*[A-Za-z]|\n|[^\x1b\n]+", stream):
            up = re.fullmatch(r"\x1b\[(\d+)F", piece)
            if up:
                self.row -= int(up[1])
                self.fresh = True
                assert self.row >= 0
            elif piece == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
                self.fresh = True
            elif piece in ("\x1b[K", "\x1b[J"):
                if piece == "\x1b[J":
                    self.lines[self.row :] = [""]
            elif piece.startswith("\x1b[?25"):
                self.hidden = piece.endswith("l")
            elif not piece.startswith("\x1b"):
                self.lines[self.row] = piece if self.fresh else self.lines[self.row] + piece
                self.fresh = False
        return self.lines

    fresh = True


def test_it_is_drawn_in_place_and_gives_way_to_results():
    stream = Stream()
    run = busy(6, stream=stream, environ={"NO_COLOR": "1"}, size=(70, 24))
    printed = 0
    while not run.scheduler.idle:
        run.step()
        if run.ends and len(run.ends) > printed:
            run.terminal.clear()
            stream.write(f"result {printed}\n")
            printed += 1
    run.watch.close()
    screen = Screen()
    lines = screen.feed(stream.getvalue())
    assert lines[:printed] == [f"result {number}" for number in range(printed)] and not screen.hidden
    assert lines[printed:] == [*run.watch.picture(whole=True), ""]


def test_a_line_is_cut_around_its_escapes():
    assert cut("\x1b[31mabc\x1b[0mdef", 4) == "\x1b[31mabc\x1b[0md" and cut("abc", 3) == "abc"
    assert cut("\x1b[31mabc\x1b[0m", 2) == "\x1b[31mab\x1b[0m"


def test_a_narrower_terminal_has_broken_the_lines():
    size = [80, 24]
    stream = Stream()
    terminal = Terminal(stream, lambda: tuple(size), {})
    terminal.draw(["x" * 70, "y"])
    size[0] = 40
    stream.truncate(0)
    terminal.draw(["z"])
    assert "\x1b[3F" in stream.getvalue()


def run_program(tmp_path, *arguments, lines=('{"prompt": "Hello", "max_new": 3}', '{"tokens": [5, 6], "max_new": 9}')):
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "ch14_mini_llm" / "run.py"), f"--batch={tmp_path / 'in.jsonl'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["--static"], ["--max_batch=1", "--block_size=4", "--num_blocks=4"]])
def test_the_program_prints_the_picture_once(tmp_path, arguments):
    done = run_program(tmp_path, "--watch", *arguments)
    plain = run_program(tmp_path)
    assert done.returncode == 0 and done.stdout == plain.stdout and "\x1b" not in done.stderr
    assert [json.loads(line)["error"] for line in done.stdout.splitlines()] == [None, None]
    assert done.stderr.count("new token") == 1 and re.search(r"^1 │·*▒+█{8} length$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, words",
    [(["--watch"], "--watch is given without --batch"), (["--static"], "--static is given without --batch"),
     (["--block_size=16"], "--block_size is given without --batch"),
     (["--batch=x", "--max_batch=0"], "max_batch is 0; it must be at least 1")],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(tmp_path, arguments, words):
    (tmp_path / "x").write_text('{"prompt": "Hello"}')
    command = [sys.executable, str(ROOT / "ch14_mini_llm" / "run.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.skipif(common.BACKEND == "gpu", reason="a GPU is given a step before the last is read: other steps")
@pytest.mark.parametrize("page", ["batching.md", "continuous_batching.md"])
def test_a_page_shows_what_its_command_shows(page):
    text = (ROOT / "ch14_mini_llm" / page).read_text(encoding="utf-8")
    assert "steps 1 to" in batching_plot.PICTURE.search(text)[0] and batching_plot.pictured(text) == text, "make plots"


def test_a_scheduler_without_a_cache_has_no_prefix_hits():
    run = busy(3, cache=False, kind=Scheduler)
    run.finish()
    assert "prefix hits" not in text(run)
