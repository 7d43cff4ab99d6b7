"""Recording CUDA graphs, as far as it can be seen without a GPU."""

from __future__ import annotations

import gc
import threading

import pytest

from accel.runtime.cuda_graph import RECORDING


def test_no_search_for_garbage_within_a_recording() -> None:
    """The end of an old graph, found as garbage, would end the recording."""
    assert gc.isenabled()
    with RECORDING:
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), RECORDING:
        raise ZeroDivisionError
    assert gc.isenabled()


def test_one_recording_at_a_time() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def record() -> None:
        nonlocal inside, most
        for _ in range(200):
            with RECORDING:
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
