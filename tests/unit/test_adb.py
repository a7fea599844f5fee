"""What adb says of devices, by a server that says it: one line each, with what to do."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from edgekit.deploy import connect
from edgekit.errors import TargetError, UsageError

pytestmark = pytest.mark.needs("adbutils")
Tell = Callable[[str], None]


@pytest.fixture
def devices(monkeypatch) -> Iterator[Tell]:
    """`devices("SERIAL STATE ...")`: what the server lists from then on."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.getsockname()[1]))
    listed = [""]

    def answer(one: socket.socket) -> None:
        with one:
            request = one.recv(int(one.recv(4), 16)).decode()
            text = listed[0] if request.startswith("host:devices") else "failed to connect to it"
            if request == "host:version":
                text = "0029"
            one.sendall(f"OKAY{len(text):04x}{text}".encode())

    def serve() -> None:
        while True:
            try:
                answer(server.accept()[0])
            except (OSError, ValueError):
                return

    threading.Thread(target=serve, daemon=True).start()

    def tell(text: str) -> None:
        pairs = [one.split() for one in text.split(";") if one.strip()]
        listed[0] = "".join(f"{serial}\t{state}\n" for serial, state in pairs)

    yield tell
    server.close()


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("unauthorized", "accept the question"),
        ("offline", "plug it in again"),
        ("recovery", "start it normally"),
        ("strange", "adb calls its state 'strange'"),
    ],
)
def test_a_device_that_cannot_be_used_is_explained(devices, state, advice) -> None:
    devices(f"ABC {state}")
    for target in ("adb:ABC", "adb:"):
        with pytest.raises(TargetError, match=advice) as caught:
            connect(target)
        assert "\n" not in str(caught.value) and "ABC" in str(caught.value)


def test_several_devices_want_a_serial(devices) -> None:
    devices("ABC device; DEF device")
    with pytest.raises(UsageError, match="adb:SERIAL of ABC, DEF"):
        connect("adb:")
    with pytest.raises(TargetError, match="it sees: ABC, DEF"):
        connect("adb:XYZ")


def test_none_at_all(devices) -> None:
    with pytest.raises(TargetError, match="adb sees no device"):
        connect("adb:")
    with pytest.raises(TargetError, match="failed to connect"):
        connect("adb:10.0.0.7:5555")
    devices("10.0.0.7:5555 offline")
    with pytest.raises(TargetError, match="nothing answers there"):
        connect("adb:10.0.0.7:5555")


def test_the_only_one_is_taken(devices) -> None:
    devices("ABC device")
    assert connect("adb:").serial == "ABC"  # type: ignore[attr-defined]
