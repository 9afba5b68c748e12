import os
import signal
import subprocess
import sys
import threading

from launch.attempts import RecordFile, list_attempts, newest_checkpoint, read_attempt, read_record
from launch.liveness import State, identity, state_of
from launch.termination import hear_signals, is_heard


def test_a_record_is_replaced_in_place_and_keeps_its_size(tmp_path):
    path = tmp_path / "attempts" / "3" / "process-0.json"
    file = RecordFile(path)
    file.write({"schema": 1, "num_processes": 1, "ended": None, "message": "一" * 3000})
    size, number = path.stat().st_size, path.stat().st_ino
    file.write({"schema": 1, "num_processes": 1, "ended": {"code": 1}})
    assert (path.stat().st_size, path.stat().st_ino) == (size, number)
    assert list_attempts(tmp_path) == [3]
    assert read_attempt(tmp_path, 3) == {0: {"schema": 1, "num_processes": 1, "ended": {"code": 1}}}


def test_a_long_traceback_keeps_its_end(tmp_path):
    file = RecordFile(tmp_path / "process-0.json")
    file.write({"schema": 1, "traceback": "字" * 50_000 + "ValueError: the reason"})
    record = read_record(tmp_path / "process-0.json")
    assert record["traceback"].startswith("…")
    assert record["traceback"].endswith("ValueError: the reason")


def test_a_record_half_written_is_no_record(tmp_path):
    path = tmp_path / "process-0.json"
    assert read_record(path) is None
    path.write_text('{"schema": 1, "at')
    assert read_record(path) is None
    path.write_text('{"schema": 99}')
    assert read_record(path) is None


def test_the_newest_checkpoint_is_one_that_was_finished(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("4", "8", "12.unfinished"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "manifest.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == 4


def test_a_process_is_known_from_later_ones_of_its_number():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        name = identity(other.pid)
        assert state_of(name) is State.ALIVE
        os.kill(other.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED)
        assert state_of(name) is State.STOPPED
        assert state_of(name.rpartition("/")[0] + "/1") is State.GONE
        os.kill(other.pid, signal.SIGKILL)
    assert state_of(name) is State.GONE
    assert state_of(identity()) is State.ALIVE
    assert state_of(f"another boot/1/{os.getpid()}/1") is State.UNKNOWN
    assert state_of(None) is State.UNKNOWN


def test_signals_are_heard_while_the_main_thread_is_deep_in_a_library():
    heard, all_heard = [], threading.Event()

    def act(number):
        heard.append((number, threading.current_thread().name))
        if len(heard) == 2:
            all_heard.set()

    before = signal.getsignal(signal.SIGTERM)
    with hear_signals(act):
        assert is_heard()
        send = "import os, signal, sys; [os.kill(int(sys.argv[1]), n) for n in (signal.SIGTERM, signal.SIGUSR1)]"
        sender = threading.Thread(target=subprocess.run, args=([sys.executable, "-c", send, str(os.getpid())],))
        sender.start()
        # A lock is waited for in C; the handlers of Python would run only behind it.
        assert all_heard.wait(30)
        sender.join()
    assert {number for number, _ in heard} == {signal.SIGTERM, signal.SIGUSR1}
    assert {name for _, name in heard} == {"signals"}
    assert signal.getsignal(signal.SIGTERM) == before
    assert not is_heard()


def test_out_of_the_main_thread_nothing_is_heard_and_nothing_breaks():
    went = []

    def work():
        with hear_signals(lambda number: None):
            went.append(is_heard())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert went == [False]
