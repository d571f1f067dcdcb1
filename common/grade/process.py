"""Processes of students: where they come from, how long they have worked, and how they end.

A `Nursery` is one process a backend that has imported everything; it forks a `Process` for each student's file, which
so costs milliseconds instead of a second. What counts of a process is its processor time without compiling
(`worker.Clock`): neither a slow disk, nor a busy machine, nor an empty kernel cache, makes a right answer late.
"""

import atexit
import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from .wire import pack, unpack
from .worker import PAGE, ROOT

IDLE_SECONDS = 60  # of a process that neither works nor waits for the processor
COMPILE_SECONDS = 1800  # by the clock on the wall, for one call's kernels: only a compiler that hangs takes longer
LARGEST = 1 << 30  # bytes of an answer
_nurseries = {}


class TooLong(Exception):
    """A call did not come to an end. kind: "work" (it has used up its time), "idle" (it waits), "compile"."""

    def __init__(self, kind):
        super().__init__(kind)
        self.kind = kind


class Ended(Exception):
    """The process is no more, or sends what is no answer."""


class Broken(Exception):
    """No process can be had: the grader's own trouble, not the student's."""


@dataclass(frozen=True)
class User:
    """Another user, as whom students' files run. cache: a folder for compiled kernels that is this user's own."""

    name: str
    uid: int
    gid: int
    cache: str


def processor_time(pid):
    """``(seconds that all threads of a process have worked, is it waiting?)``; raises ProcessLookupError."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            raise ProcessLookupError(pid) from None
    else:
        fields = data.rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in (b"S", b"D", b"T")
    done = subprocess.run(["ps", "-o", "time=,state=", "-p", str(pid)], capture_output=True, text=True)  # macOS
    if not done.stdout.strip():
        raise ProcessLookupError(pid)
    used, state = done.stdout.split()
    seconds = 0.0
    for part in used.replace("-", ":").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds, state[0] in "IST"


class Nursery:
    """The process that students' processes are forked from. backend: "cpu" or "gpu". user: None is the grader's own."""

    def __init__(self, backend, user=None):
        self.user = user
        self.socket, there = socket.socketpair()
        places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environ = os.environ | {"MINI_BACKEND": backend, "PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"}
        options = {}
        if user is not None:
            keep = ("PATH", "LANG", "LC_ALL", "MINI_BACKEND", "MINI_THREADS", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
            environ = {name: environ[name] for name in keep if name in environ}
            environ |= {"HOME": user.cache, "MINI_CACHE_DIR": user.cache}
            options = {"user": user.uid, "group": user.gid, "extra_groups": [], "umask": 0o077}
        self.output = tempfile.TemporaryFile()
        with there:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "common.grade.worker", str(there.fileno())], cwd=ROOT, env=environ,
                    pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
                    start_new_session=True, **options,
                )  # fmt: skip
            except OSError as error:
                whose = f" as the user {user.name}" if user else ""
                raise Broken(f"{sys.executable} cannot be started{whose}: {error.strerror}") from None

    def order(self, order, descriptors=()):
        """Send an order and wait for the reply, a dict. Raises `Ended` if the nursery is no more."""
        try:
            socket.send_fds(self.socket, [json.dumps(order).encode()], list(descriptors))
            reply = b""
            while not reply.endswith(b"\n"):
                part = self.socket.recv(1 << 16)
                if not part:
                    break
                reply += part
            return json.loads(reply)
        except (OSError, ValueError):
            self.process.kill()
            self.process.wait()
            self.output.seek(0)
            last = self.output.read()[-2000:].decode(errors="replace").strip().splitlines()
            raise Ended(f"the process that students' files run in cannot be had: {' '.join(last[-1:])}") from None

    def close(self):
        self.socket.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


def nursery(backend, user=None):
    """The nursery of a backend, started when it is first needed."""
    known = _nurseries.get((backend, user))
    if known is None or known.process.poll() is not None:
        known = _nurseries[backend, user] = Nursery(backend, user)
    return known


@atexit.register
def close_nurseries():
    """End all nurseries, and with them every process of a student's."""
    while _nurseries:
        _nurseries.popitem()[1].close()


class Process:
    """One process with a student's file: see `worker`.

    imports: names of modules that it imports before the file. Raises `Broken` if it cannot be started.
    """

    def __init__(self, file, backend, imports=(), user=None):
        self.worked = 0.0
        here, there = socket.socketpair()
        self.link = Connection(here.detach())
        self.output, page = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        page.truncate(PAGE.size)
        self.page = mmap.mmap(page.fileno(), PAGE.size)
        self.folder = tempfile.mkdtemp(prefix="graded-")
        if user is not None:  # a copy that is not the student's to change; what it writes goes beside it
            inner = Path(self.folder, "file")
            inner.mkdir()
            file = shutil.copyfile(file, inner / file.name)
            file.chmod(0o444)
            inner.chmod(0o755)
            os.chmod(self.folder, 0o711)
            work = Path(self.folder, "work")
            work.mkdir()
            os.chown(work, user.uid, user.gid)
        order = {
            "file": str(file), "folder": str(work if user is not None else self.folder), "imports": list(imports),
            "closed": user is not None,
        }  # fmt: skip
        with there, page:
            descriptors = [there.fileno(), self.output.fileno(), page.fileno()]
            try:
                self.nursery = nursery(backend, user)
                reply = self.nursery.order(order, descriptors)
            except Ended:  # an earlier student's file has ended it
                self.nursery = nursery(backend, user)
                try:
                    reply = self.nursery.order(order, descriptors)
                except Ended as error:
                    raise Broken(str(error)) from None
        self.pid, self.place = reply["child"], file.parent

    def work(self):
        """``(seconds worked without compiling, is it waiting?, is it compiling?)``."""
        left_out, stopped_at, stopped = PAGE.unpack_from(self.page)
        if stopped:
            return stopped_at, True, True
        try:
            seconds, waits = processor_time(self.pid)
        except ProcessLookupError:
            return 0.0, False, False
        return seconds - left_out, waits, False

    def ask(self, request, seconds):
        """Send a request; its answer. seconds: of work. Raises `TooLong` or `Ended`. `worked` then says how long."""
        try:
            self.link.send_bytes(pack(request))
        except OSError:
            raise Ended from None
        return self.hear(seconds)

    def hear(self, seconds):
        """The next message."""
        start = self.work()[0]
        last, since = -1.0, time.monotonic()  # the last time at which it had worked more than before
        compiling_since, pause = None, 0.001
        self.worked = 0.0
        try:
            while not self.link.poll(pause):
                pause = min(0.1, 2 * pause)
                now, (worked, waits, compiling) = time.monotonic(), self.work()
                self.worked = max(self.worked, worked - start)
                if compiling:
                    compiling_since = compiling_since or now
                    since = now
                    if now - compiling_since > COMPILE_SECONDS:
                        raise TooLong("compile")
                    continue
                if self.worked > seconds:
                    raise TooLong("work")
                if worked > last or not waits:
                    last, since = worked, now
                elif now - since > IDLE_SECONDS:
                    raise TooLong("idle")
            answer = unpack(self.link.recv_bytes(LARGEST))
            self.worked = max(self.worked, self.work()[0] - start)
            return answer
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            raise Ended(str(error)) from None

    def end(self, patience=5.0):
        """End the process, and all that it has started; returns its exit code if it ended by itself, else None."""
        self.link.close()
        code = None
        try:
            code = self.nursery.order({"end": self.pid, "patience": patience})["code"]
        except Ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        if self.nursery.user is not None:
            end_all_of(self.nursery)
        shutil.rmtree(self.folder, ignore_errors=True)
        return code

    def said(self):
        """What the process printed, its last lines."""
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - 4000))
        return self.output.read().decode(errors="replace")


def end_all_of(keep):
    """End every process of a nursery's user but the nursery itself: what a student's file has started, and hidden."""
    for _ in range(100):  # one that forks while it is looked for is met the next time
        others = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == keep.user.uid and int(entry.name) != keep.process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
                    others.append(entry)
        if not others:
            return
        time.sleep(0.01)
