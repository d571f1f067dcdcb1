"""Run a program with the words of make's ARGS after its own arguments: what the Makefile's targets do.

    KBK_ARGS="-k 'one or two'" python common/make_args.py [--quiet] PROGRAM ARGUMENT ...

ARGS is text, cut into words as a shell does it: at blanks, tabs and newlines, except in '...' and "..." or behind a
backslash. That is all: nothing in it is run or replaced, no $VARIABLE, $(command), `command`, ~, * or #. The command
is shown on the standard error, so that it can be run again without make; --quiet leaves that out.

This file imports nothing but the standard library.
"""

import os
import shlex
import sys


def split(text):
    """The words of ARGS, a list. Raises ValueError for a quote that is not closed, or a backslash at the end."""
    return shlex.split(text)


def main(arguments):
    """Become the program; returns 2 after a one-line error if that is impossible."""
    show = arguments[:1] != ["--quiet"]
    command = arguments if show else arguments[1:]
    text = os.environ.get("KBK_ARGS", "")
    try:
        command = command + split(text)
    except ValueError as error:
        print(f"error: ARGS is {text!r}: {str(error).lower()}; close the quote, or put a backslash before it",
              file=sys.stderr)  # fmt: skip
        return 2
    if show:
        print(f"==> {shlex.join(command)}", file=sys.stderr, flush=True)
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"error: {command[0]} cannot be started ({error.strerror}); make clean, then try again", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
