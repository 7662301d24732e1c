# SPDX-License-Identifier: Apache-2.0
import threading

from hf_locmoe.distributed.counters import Traffic, TrafficLog


def test_sums_readings_and_differences():
    log = TrafficLog()
    log.add("all_to_all_single", 1, 1, 2, 10, 200)
    before = log.read()
    log.add("all_to_all_single", 1, 1, 2, 30, 400)
    log.add("all_reduce", 1, 2, 0, 5, 0)
    after = log.read()
    assert before["all_to_all_single"] == Traffic(1, 1, 2, 10, 200)
    assert after["all_to_all_single"] == Traffic(2, 2, 4, 40, 600)
    assert (after - before)["all_to_all_single"] == Traffic(1, 1, 2, 30, 400)
    assert after.total == Traffic(3, 4, 4, 45, 600)
    assert (after - before).total.bytes_inter_node == 400
    assert TrafficLog().read().total == Traffic()


def test_nothing_is_lost_between_threads():
    log = TrafficLog()

    def count():
        for _ in range(2000):
            log.add("all_to_all_single", 1, bytes_inter_node=3)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read().total == Traffic(calls=8000, bytes_inter_node=24000)
