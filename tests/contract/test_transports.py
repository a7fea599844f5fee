"""One suite for every transport: this machine, and a real ssh server in this process."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from ssh_home import Server

from edgekit.deploy import Transport, connect, lab
from edgekit.deploy.memory import MemoryTransport
from edgekit.deploy.transport import Ended
from edgekit.errors import TargetError, UsageError

pytestmark = pytest.mark.needs("asyncssh")
#: answers lines until one says "die"
ECHO = """import sys
for line in sys.stdin:
    if "die" in line:
        sys.exit("gone")
    print(line, end="", flush=True)
"""


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    made = Server(home)
    yield made
    made.cut()


@pytest.fixture(scope="module")
def board() -> Iterator[lab.Running]:
    try:
        up = lab.up("raspberry-pi-4", disk_mb=64)
    except UsageError as error:
        pytest.skip(str(error))
    yield up
    lab.down(str(up.port))


@pytest.fixture(params=["local", "ssh", "memory", pytest.param("board", marks=pytest.mark.devices)])
def transport(request) -> Iterator[Transport]:
    made: Transport
    if request.param == "memory":
        made = MemoryTransport()
    elif request.param == "local":
        made = connect("local")
    else:
        where = "server" if request.param == "ssh" else "board"
        made = connect(request.getfixturevalue(where).target)
    made.python = "python3" if request.param == "board" else sys.executable
    with made:
        yield made


def test_commands_run_with_their_arguments_as_they_are(transport) -> None:
    done = transport.run(["printf", "%s|", "a b", "$HOME", "'; rm x", ""], timeout_s=30)
    assert (done.code, done.stdout) == (0, b"a b|$HOME|'; rm x||")


def test_exit_codes_stdin_and_last_words_come_back(transport) -> None:
    done = transport.run(
        ["sh", "-c", "cat; echo oops >&2; exit 3"], stdin=b"\x00\xff", timeout_s=30
    )
    assert (done.code, done.stdout, done.last_words) == (3, b"\x00\xff", "oops")
    assert transport.run(["no-such-command-here"], timeout_s=30).code == 127


def test_what_does_not_end_is_not_waited_for(transport) -> None:
    with pytest.raises(TargetError, match=r"did not end within 1 s"):
        transport.run(["sleep", "30"], timeout_s=1)


def test_files_arrive_whole(transport, tmp_path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "model.bin").write_bytes(data)
    folder = transport.scratch()
    transport.push(tmp_path / "model.bin", f"{folder}/there.bin")
    there = transport.run(["sha256sum", f"{folder}/there.bin"], timeout_s=60).stdout
    assert there.decode().split()[0] == hashlib.sha256(data).hexdigest()
    mode = transport.run(["stat", "-c", "%a", folder], timeout_s=60).stdout
    assert mode == b"700\n", "others cannot look into it"
    with pytest.raises(TargetError, match=r"model\.bin|no-folder"):
        transport.push(tmp_path / "model.bin", "/no-folder/there.bin")


def test_conversations_answer_line_by_line_and_say_how_they_ended(transport) -> None:
    talk = transport.converse([transport.python, "-c", ECHO])
    assert talk.ask("one", timeout_s=30) == b"one\n"
    assert talk.ask("two", timeout_s=30) == b"two\n"
    with pytest.raises(TargetError, match="gone"):
        talk.ask("die", timeout_s=30)
    talk.close()
    talk.close()


def test_bytes_arrive_as_they_are_and_lines_are_waited_for(transport) -> None:
    count = (
        "import sys; data = sys.stdin.buffer.read(3_000_000); print(len(data), sum(data[::7]),"
        "flush=True); sys.stdin.read()"
    )
    talk, data = transport.converse([transport.python, "-c", count]), os.urandom(3_000_000)
    talk.write(data)
    assert talk.answer(timeout_s=60).split() == [b"3000000", b"%d" % sum(data[::7])]
    assert talk.line(0.2) is None
    talk.close()
    with pytest.raises(TargetError):
        talk.write(b"more")


def test_how_a_process_ended_is_said(transport) -> None:
    for command, code in ((["sh", "-c", "exit 5"], 5), (["no-such-command-here"], 127)):
        with pytest.raises(Ended) as caught:
            transport.converse(command).ask("hello", timeout_s=60)
        assert caught.value.code == code


def test_a_late_answer_is_not_the_next_ones(transport) -> None:
    late = """import sys, time
for number, line in enumerate(sys.stdin):
    time.sleep(2 - number)
    print(line, end="")
"""
    talk = transport.converse([transport.python, "-u", "-c", late])
    with pytest.raises(TargetError, match="within 1 s"):
        talk.ask("one", timeout_s=1)
    with pytest.raises(TargetError):
        talk.ask("two", timeout_s=5)
    talk.close()


def test_nothing_that_a_command_started_is_left_behind() -> None:
    with connect("local") as here, pytest.raises(TargetError):
        here.run(["sh", "-c", "sleep 77.125 & sleep 77.126"], timeout_s=0.5)
    left = subprocess.run(["pgrep", "-f", "sleep 77.12[56]"], capture_output=True, check=False)
    assert left.stdout == b""


def test_closing_twice_does_nothing(transport) -> None:
    transport.close()
    transport.close()


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(TargetError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_an_unknown_host_key_is_refused_and_not_added(server) -> None:
    known = server.known_hosts.read_text()
    server.known_hosts.write_text("")
    said = one_line(lambda: connect(server.target))
    assert "not trusted" in said and "known_hosts" in said
    assert server.known_hosts.read_text() == ""
    server.known_hosts.write_text(known.replace("AAAA", "AAAB", 1))
    assert server.target in one_line(lambda: connect(server.target))
    other = server.new_key().export_public_key().decode().split()[:2]
    server.known_hosts.write_text(" ".join([known.split()[0], *other]) + "\n")
    assert "its host key is another" in one_line(lambda: connect(server.target))


def test_an_unknown_host_key_is_added_when_asked_for_but_a_changed_one_never(server) -> None:
    known = server.known_hosts.read_text()
    server.known_hosts.write_text("")
    with connect(server.target, accept_new_host_key=True) as made:
        assert made.run(["true"], timeout_s=30).code == 0
    assert server.known_hosts.read_text().split()[:3] == known.split()[:3]
    other = server.new_key().export_public_key().decode().split()[:2]
    server.known_hosts.write_text(" ".join([known.split()[0], *other]) + "\n")
    changed = server.known_hosts.read_text()
    one_line(lambda: connect(server.target, accept_new_host_key=True))
    assert server.known_hosts.read_text() == changed


def test_a_wrong_key_is_refused(server) -> None:
    server.new_key()
    assert "no key of ours is accepted" in one_line(lambda: connect(server.target))


def test_nobody_listening(server) -> None:
    server_target = server.target.replace(str(server.port), "1")
    assert server_target in one_line(lambda: connect(server_target))


def test_a_connection_that_is_cut_is_one_error(server, capfd) -> None:
    with connect(server.target) as made:
        assert made.run(["true"], timeout_s=30).code == 0
        threading.Timer(0.5, server.cut).start()
        assert server.target in one_line(lambda: made.run(["sleep", "20"], timeout_s=60))
        assert server.target in one_line(lambda: made.run(["true"], timeout_s=60))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "target",
    [
        "ftp://x",
        "pi@board",
        "ssh://",
        "ssh://x:port",
        "ssh://a@b/path",
        "ssh://x:0",
        "ssh://x#y",
        "local://",
        "",
    ],
)
def test_what_is_no_target_is_said(target) -> None:
    with pytest.raises(UsageError, match=r"ssh://user@host:port"):
        connect(target)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="takes no password") as caught:
        connect("ssh://me:hunter2@board")
    assert "hunter2" not in str(caught.value)


def test_a_name_that_no_host_can_have_is_one_line() -> None:
    assert "ssh://" in one_line(lambda: connect("ssh://" + "a" * 300))


def test_probing_over_ssh_makes_a_valid_profile(server) -> None:
    from edgekit.facts import this_machine
    from edgekit.measure.probe import probe_device
    from edgekit.profiles import profile_faults, profile_toml

    made = probe_device(server.target, python=sys.executable, profile_id="there", measured=False)
    assert profile_faults(profile_toml(made)) == []
    here = this_machine()
    assert (made.arch, made.cpu.cores, made.cpu.features) == (
        here.arch, here.cpu.cores, here.cpu.features
    )  # fmt: skip
    assert "onnxruntime" in made.engines and made.engines["onnxruntime"].version
    assert made.id == "there"


def test_a_target_that_cannot_be_written_to_is_read_and_says_why(
    tmp_path, monkeypatch, request
) -> None:
    from edgekit.measure.probe import probe_device
    from edgekit.observer import Observer

    notes: list[str] = []

    class Notes(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with monkeypatch.context() as there:
        there.setenv("TMPDIR", "/no-such-folder")  # what mktemp uses on the server
        server = Server(home)
    request.addfinalizer(server.cut)
    made = probe_device(server.target, python=sys.executable, observer=Notes())
    assert made.engines == {} and made.roofline is None and made.cpu.features
    assert any("cannot write there" in note for note in notes)
