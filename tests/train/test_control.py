"""Laws of what a process and its run tell each other."""

import sys
import threading
import time

import pytest

from t5pegasus.train.control import Control, Request


def test_requests_add_up_until_they_are_answered():
    control = Control()
    assert control.requests == Request(0)
    control.request(Request.STOP | Request.SAVE)
    control.request(Request.SAVE)
    assert control.requests == Request.STOP | Request.SAVE
    control.answer(Request.SAVE | Request.PROFILE)
    assert control.requests == Request.STOP


def test_no_request_is_lost_to_an_answer_at_the_same_time():
    control, ends = Control(), threading.Event()

    def answer():
        while not ends.is_set():
            control.answer(Request.SAVE)  # as the loop does at every step

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=answer) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(300):
            control.request(Request.STOP)
            time.sleep(0)
            assert control.requests == Request.STOP
            control.answer(Request.STOP)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_an_activity_that_failed_is_known_until_another_one_begins():
    control = Control()
    with pytest.raises(ValueError, match="torn"), control.doing("step", 3), control.doing("data"):
        raise ValueError("torn")
    assert str(control.failing) == "torn"
    assert (control.activity.name, control.activity.step, control.first_step) == ("start", 3, 3)
    with control.doing("save"):
        assert control.failing is None
    assert control.seconds.keys() == {"start", "step", "data", "save"}
