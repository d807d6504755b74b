"""A hub of one repository, as clients of Hugging Face's hub see it: used by tests.

usage: hub.py FOLDER OWNER/NAME [--token TOKEN] [--rate BYTES]

Prints its address, and serves the folder's files at the commit that the file COMMIT in it names, until it is killed. With a token it answers
nobody else. RATE is bytes a second.
"""

import argparse
import hashlib
import http.server
import json
import pathlib
import re
import time

PIECE = 16 << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("repository")
    parser.add_argument("--token")
    parser.add_argument("--rate", type=int)
    arguments = parser.parse_args()

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            commit = (arguments.folder / "COMMIT").read_text().strip()
            if arguments.token and self.headers["authorization"] != f"Bearer {arguments.token}":
                return self.plain(401, b"no", {"x-error-code": "GatedRepo"})
            if found := re.fullmatch(f"/api/models/{arguments.repository}/revision/([^/]+)", self.path):
                revision = found[1]
                names = sorted(path.name for path in arguments.folder.iterdir() if path.name != "COMMIT")
                sha = revision if len(revision) == 40 else commit
                return self.plain(200, json.dumps({"sha": sha, "siblings": [{"rfilename": name} for name in names]}).encode(), {})
            found = re.fullmatch(f"/{arguments.repository}/resolve/[0-9a-f]{{40}}/([^/]+)", self.path)
            path = arguments.folder / found[1] if found else None
            if path is None or not path.is_file():
                return self.plain(404, b"", {"x-error-code": "RepoNotFound"})
            content = path.read_bytes()
            first, last = 0, len(content) - 1
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["range"] or ""):
                first, last = int(span[1]), min(int(span[2]), last)
            self.send_response(206 if span else 200)
            self.send_header("etag", '"' + hashlib.sha256(content).hexdigest() + '"')
            self.send_header("content-length", str(last + 1 - first))
            if span:
                self.send_header("content-range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            for at in range(first, last + 1, PIECE) if body else ():
                self.wfile.write(content[at : min(at + PIECE, last + 1)])
                time.sleep(PIECE / arguments.rate if arguments.rate else 0)

        def plain(self, status: int, content: bytes, headers: dict) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
