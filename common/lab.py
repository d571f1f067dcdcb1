"""What the notebooks (``lab.ipynb``) share: checks of exercises that answer at once, and sections that need a GPU."""

from . import BACKEND, choice


def check(exercise, good, hint):
    """Print whether an exercise is solved, so that a notebook with unsolved exercises still runs to its end.

    exercise: its name. good: a bool, or a function without arguments that returns one; what it raises counts as not
    solved, and NotImplementedError as not tried. hint: a sentence for who has not solved it.
    """
    try:
        solved = bool(good() if callable(good) else good)
        seen = "" if solved else "not right yet"
    except NotImplementedError:
        solved, seen = False, "yours to write"
    except Exception as error:  # whatever a student's code raises belongs to the student
        solved, seen = False, f"not right yet: {type(error).__name__}: {error}"
    print(f"{exercise}: right" if solved else f"{exercise}: {seen}. Hint: {hint}")


def has_gpu(section):
    """True on the GPU backend; otherwise prints why ``section`` is left out, and returns False."""
    if BACKEND == "gpu":
        return True
    print(f"{section} needs an NVIDIA GPU and is left out here: {choice.reason}.")
    return False
