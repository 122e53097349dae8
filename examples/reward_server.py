"""A reward server in one file, without dependencies: 1 where the response equals the label, else 0.

    python examples/reward_server.py --port 8900

In the configuration, as one of the rewards:

    kind: http
    urls: ["http://127.0.0.1:8900"]

Put your own scoring into `reward`. With `--token-env NAME` it asks for the bearer token that the environment
variable NAME holds; set the same variable where the verifiers run, and `token_env: NAME` in the configuration.

The protocol is OpenRLHF's: POST {"prompts": […], "responses": […], "labels": […], "query": […], "metadata": […]},
lists of one length, answered by {"rewards": [number, …]}. `query` is prompt and response in one text.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_BODY_BYTES = 16 * 2**20


def reward(prompt: str, response: str, label: str, metadata: dict[str, str]) -> float:
    """Return 1 if the response equals the label, else 0. Replace this with your own scoring."""
    return float(response.strip() == label.strip())


def judge(body: Any) -> list[float]:
    """Score a request. Raises ValueError if the body does not have the expected shape."""
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    columns = [body.get(key) for key in ("prompts", "responses", "labels", "metadata")]
    if not all(isinstance(c, list) and len(c) == len(columns[0] or []) for c in columns):
        raise ValueError("prompts, responses, labels and metadata must be lists of one length")
    if not all(isinstance(text, str) for column in columns[:3] for text in column or []):
        raise ValueError("prompts, responses and labels must hold texts")
    return [reward(*row) for row in zip(*columns, strict=True)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are used again
    timeout = 30  # seconds for a client that stops in the middle of its request
    token: str | None = None

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._refuse(411, "Content-Length is needed")
        if int(length) > MAX_BODY_BYTES:
            return self._refuse(413, f"at most {MAX_BODY_BYTES} bytes")
        # read before anything is refused: closing on unread bytes can cost the client the answer
        content = self.rfile.read(int(length))
        if not self._may_ask():
            return self._refuse(401, "a bearer token is needed")
        try:
            rewards = judge(json.loads(content))
        except (ValueError, RecursionError) as error:
            return self._refuse(400, str(error))
        self._answer(200, {"rewards": rewards})

    def _may_ask(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        # takes as long for a nearly right token as for a wrong one
        return self.token is None or hmac.compare_digest(given, f"Bearer {self.token}".encode())

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # if the body was not read, no further request can follow it
        self._answer(status, {"error": why})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a line for each request has no use."""


class Server(ThreadingHTTPServer):
    daemon_threads = True  # Ctrl-C does not wait for clients
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8900, help="0: any free one")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the bearer token to ask for")
    args = parser.parse_args()
    if args.token_env:
        Handler.token = os.environ.get(args.token_env)
        if not Handler.token:
            parser.error(f"--token-env: {args.token_env} is not set or empty")
    elif args.host != "localhost" and not ipaddress.ip_address(args.host).is_loopback:
        parser.error(f"--host {args.host} lets other machines in: --token-env is needed too")
    with Server((args.host, args.port), Handler) as server:
        print(f"listening on http://{args.host}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
