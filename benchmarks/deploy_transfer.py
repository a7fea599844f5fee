"""What a deploy costs beyond plain sftp of the same bytes, and what it sends the second time.

python benchmarks/deploy_transfer.py BUNDLE TARGET PYTHON [--rounds N]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from edgekit.cache import file_sha256
from edgekit.deploy import connect, install
from edgekit.deploy.chunks import chunks_of
from edgekit.observer import Observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("target")
    parser.add_argument("python")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    size, sha256 = args.bundle.stat().st_size, file_sha256(args.bundle)
    plain, ours = [], []
    with connect(args.target) as there:
        for number in range(args.rounds):
            start = time.monotonic()
            there.push(args.bundle, "/tmp/transfer.bin")
            plain.append(time.monotonic() - start)
            there.run(["rm", "/tmp/transfer.bin"], timeout_s=60)
            with install.Device(there, f"transfer{number}", python=args.python) as device:
                start = time.monotonic()
                pieces = chunks_of(args.bundle)
                device.ask("begin", file=f"1-{'0' * 32}.edgekit", sha256=sha256, size=size)
                install.send(args.bundle, pieces, device, sha256, Observer())
                ours.append(time.monotonic() - start)
            there.run(["sh", "-c", f"rm -rf ~/.local/share/edgekit/transfer{number}"], timeout_s=60)
    answer = {
        "size_bytes": size, "chunks": len(pieces), "sftp_s": plain, "deploy_s": ours,
        "ratio": statistics.median(ours) / statistics.median(plain),
    }  # fmt: skip
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
