"""Answers with whatever version of a bundle is active on this device, while versions come and go.

python3 serve.py NAME SOCKET       one JSON object of input arrays a line in, outputs a line out
"""

import json
import socketserver
import sys
import threading
import time
from pathlib import Path

import numpy as np

from edgekit_runtime import EdgeKitError, open_installed

session = open_installed(sys.argv[1])


class Answers(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            given = json.loads(line)
            inputs = {s.name: np.asarray(given[s.name], s.dtype) for s in session.inputs}
            answer = {name: out.tolist() for name, out in session.run(inputs).items()}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


def follow() -> None:
    """Move to what was activated since; it is loaded beside the calls that go on."""
    while True:
        time.sleep(1)
        try:
            session.refresh()
        except EdgeKitError as error:
            print(f"stays with the version it has: {error}", file=sys.stderr, flush=True)


Path(sys.argv[2]).unlink(missing_ok=True)
threading.Thread(target=follow, daemon=True).start()
with socketserver.ThreadingUnixStreamServer(sys.argv[2], Answers) as server:
    server.serve_forever()
