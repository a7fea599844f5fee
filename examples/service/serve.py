"""Answers with whatever version of a bundle is active on this device, while versions come and go.

python3 serve.py NAME SOCKET       one JSON object of input arrays a line in, outputs a line out
"""

import json
import socketserver
import sys
from pathlib import Path

import numpy as np

from edgekit_runtime import open_installed

session = open_installed(sys.argv[1])


class Answers(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            session.refresh()  # moves to a version activated since, which is loaded first
            given = json.loads(line)
            inputs = {s.name: np.asarray(given[s.name], s.dtype) for s in session.inputs}
            answer = {name: out.tolist() for name, out in session.run(inputs).items()}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


Path(sys.argv[2]).unlink(missing_ok=True)
with socketserver.UnixStreamServer(sys.argv[2], Answers) as server:
    server.serve_forever()
