"""The grader of the exercises: ``python -m common.grade``, or ``make grade EX=ch13/topk``.

An exercise is a folder ``chapters/chNN_…/exercises/NAME/`` (or ``ch14_mini_llm/exercises/NAME/``) with

=================  ==================================================================================================
``NAME.py``        what the student edits, between ``# --- your code begins ---`` and ``# --- your code ends ---``
``README.md``      the task: what, why, limits, how it is graded
``exercise.toml``  title, points by criterion, what builds on what, hints, the seconds that all calls may work
``solution.py``    the reference: the same file with the gaps filled
``grade.py``       the checks, written for pytest: a criterion is a function ``test_CRITERION(student)``
=================  ==================================================================================================

The student's file runs in a process of its own (`worker`, started by `process`), which gets inputs and gives results
and never has the expected answers, nor the reference, in reach; an endless loop or a crash costs that process only.
The checks run in the grader's process and compare. See `exercise` for the files, `student` for what a check can ask,
`plugin` for the points, `gradescope` for what teachers use.
"""

from .student import HALF, Wrong, check, random, same, shared_out

__all__ = ["HALF", "Wrong", "check", "random", "same", "shared_out"]
