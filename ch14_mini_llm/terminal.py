"""Lines of text that are drawn anew in place, where there is a terminal; plain ANSI, no library."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAIN_SIZE = (100, 24)  # columns and lines where there is no terminal to ask


class Terminal:
    """A stream, and what is on it. live: it is a terminal. colour: it is, and NO_COLOR is not set.

    size: () -> (columns, lines), by default the terminal's own.
    """

    def __init__(self, stream, size: Callable[[], tuple[int, int]] | None = None, environ=os.environ) -> None:
        self._stream = stream
        self.live = stream.isatty() and environ.get("TERM") != "dumb"
        self.colour = self.live and not environ.get("NO_COLOR")
        self.size = size or self._ask
        self._drawn: list[int] = []  # the widths of the lines on the terminal

    def can_show(self, text: str) -> bool:
        """Whether the stream's encoding has all characters of ``text``."""
        try:
            text.encode(getattr(self._stream, "encoding", None) or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def draw(self, lines: list[str]) -> None:
        """Show ``lines`` where those of the last call stand; lines that are too long are cut."""
        columns = self.size()[0]
        lines = [cut(line, max(1, columns - 1)) for line in lines]  # some break a line behind the last column
        if self.live:
            hide = "" if self._drawn else "\x1b[?25l"  # the cursor
            self._write(hide + self._back() + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            self._drawn = list(map(width, lines))
        else:
            self._write("".join(f"{line}\n" for line in lines))

    def clear(self) -> None:
        """Take the lines away, for something else to be printed in their place."""
        if self._drawn:
            self._write(self._back() + "\x1b[J")
            self._drawn = []

    def end(self) -> None:
        """Leave what is drawn, and show the cursor again."""
        if self.live:
            self._write("\x1b[?25h")

    def _back(self) -> str:
        """What takes the cursor to the first line; a terminal that has become narrower has broken the long ones."""
        columns = max(1, self.size()[0])
        height = sum(max(1, -(-wide // columns)) for wide in self._drawn)
        return f"\x1b[{height}F" if height else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _ask(self) -> tuple[int, int]:
        columns = lines = 0
        if self.live:
            try:
                columns, lines = os.get_terminal_size(self._stream.fileno())
            except (OSError, ValueError):
                pass
        return (columns or 80, lines or 24) if self.live else tuple(shutil.get_terminal_size(PLAIN_SIZE))


def width(line: str) -> int:
    """The characters of a line that take room."""
    return len(ESCAPE.sub("", line))


def cut(line: str, columns: int) -> str:
    """A line of at most ``columns`` characters, its escapes not counted and left whole."""
    if width(line) <= columns:
        return line
    text, room = "", columns
    for piece in re.split(f"({ESCAPE.pattern})", line):
        if not ESCAPE.fullmatch(piece):
            piece = piece[:room]
            room -= len(piece)
        text += piece
    return text
