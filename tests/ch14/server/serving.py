"""A server in a process of its own, for tests: `serve.py` as a user starts it, on a free port of the loopback."""

from __future__ import annotations

import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACE = 200  # steps a second: a fast device leaves tests the time that a slow one does
TINY = ROOT / "data" / "tiny-gpt2.bin"


class Serving:
    """``serve.py`` with some options; ``with`` ends it. name: the model's."""

    def __init__(self, *options, weights=TINY, name="tiny", wait=True):
        command = [sys.executable, "ch14_mini_llm/serve.py", "--port=0", f"--weights={weights}", f"--name={name}"]
        self.process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.name, self.said, self._lines = name, [], queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        if wait:
            self.url = re.search(r"http://[^/ ]*", self.line("ready: "))[0]
            self.port = int(self.url.rpartition(":")[2])
            key = next((option[10:] for option in options if option.startswith("--api_key=")), "none")
            status, _, _ = self.request("/engine/pace", {"n": PACE}, headers={"Authorization": f"Bearer {key}"})
            assert status == 200

    def _listen(self):
        for line in self.process.stderr:
            self.said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def line(self, begin, seconds=240):
        """The first line that begins so."""
        end = time.monotonic() + seconds
        while True:
            line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            assert line is not None, f"the server has ended: {''.join(self.said)}"
            if line.startswith(begin):
                return line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self.process.stderr.close()

    def client(self, key="none", **options):
        """An `openai` client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)

    def request(self, path, body=None, method=None, headers=(), raw=None):
        """``(status, JSON or text, headers)`` of a request without any client's help."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **dict(headers)}
        asked = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                status, text, got = answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                status, text, got = error.code, error.read().decode(), error.headers
        return status, json.loads(text) if "json" in got.get("Content-Type", "") else text, got

    def events(self, path, body):
        """The raw events of a stream."""
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            return [line[6:].strip() for line in answer.read().decode().splitlines() if line.startswith("data: ")]

    def cut_off(self, body, after, path="/v1/completions"):
        """Send a request, and close the socket after so many bytes of the answer; 0: as soon as it is sent."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"
            connection.sendall("\r\n".join([*head, "", ""]).encode() + data)
            read = 0
            while read < after:
                read += len(connection.recv(after - read))

    def metrics(self):
        """{name: value}, labels in the name, without the prefix."""
        lines = self.request("/metrics")[1].splitlines()
        pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        return {name.removeprefix("mini_llm_"): float(value) for name, _, value in pairs}

    def rejected(self, found):
        """How many requests were answered with an error at once; those that came in are these and the accepted ones."""
        rejected = sum(value for name, value in found.items() if name.startswith("admission_rejections_total"))
        assert found["requests_received_total"] == found["requests_accepted_total"] + rejected
        return rejected

    def settle(self, seconds=5):
        """Wait until nothing runs, and return the metrics; all blocks are free or cached then."""
        end = time.monotonic() + seconds
        while True:
            found = self.metrics()
            if found["num_requests_running"] == found["num_requests_waiting"] == found["blocks_owned"] == 0:
                return found
            assert time.monotonic() < end, f"something runs that nobody waits for: {found}"
            time.sleep(0.02)
