"""The Hugging Face hub, as far as a download needs it, played by a local server."""

import hashlib
import http.server


class Hub(http.server.ThreadingHTTPServer):
    """Just enough of the Hugging Face hub: a folder's files under /repo/resolve/revision/, and a list of requests."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder, repo):
        self.folder, self.repo, self.asked = folder, repo, []
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if self.path == "/":
            return self.reply(200)
        self.server.asked.append(f"{self.command} {self.path}")
        commit = {"X_Repo_Commit": Hub.COMMIT}
        prefixes = [f"/{self.server.repo}/resolve/{revision}/" for revision in ("main", Hub.COMMIT)]
        prefix = next((prefix for prefix in prefixes if self.path.startswith(prefix)), None)
        if prefix is None:
            code = "RevisionNotFound" if self.path.startswith(f"/{self.server.repo}/") else "RepoNotFound"
            return self.reply(404, X_Error_Code=code)
        path = self.server.folder / self.path.removeprefix(prefix)
        if not path.is_file():
            return self.reply(404, X_Error_Code="EntryNotFound", **commit)
        body = path.read_bytes()
        return self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', **commit)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass
