"""What ranks tell of each other while one of them is late."""

from __future__ import annotations

import threading
import time

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.collectives import all_gather_objects, barrier
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.parallel.heartbeat import Heartbeat
from mindspeed_lora.parallel.whereabouts import waits_in
from tests.support.pool import WorkerPool


def watch_a_late_rank() -> list[str]:
    """Of rank 0: the collective that it is in, and the summary of all."""
    groups, _ = initialize_groups(ParallelConfig(distributed_timeout_minutes=0.05), seed=1)
    found: list[str] = []

    def look(heartbeat: Heartbeat) -> None:
        time.sleep(0.5)
        found.append(waits_in())
        found.append(heartbeat.summary())

    with Heartbeat(groups) as heartbeat:
        heartbeat.mark("reading rows", 7)
        thread = threading.Thread(target=look, args=(heartbeat,))
        if groups.rank == 0:
            thread.start()
        else:
            time.sleep(2.0)
        all_gather_objects(groups.rank, groups)
        if groups.rank == 0:
            thread.join()
        barrier(groups)
    destroy_groups()
    return found


def test_the_late_rank_is_named(workers: WorkerPool) -> None:
    collective, summary = workers.run(2, watch_a_late_rank)[0]
    assert collective == "all_gather_object over ranks 0-1"
    late, waiting = summary.split("; ")
    assert late.startswith("rank 1: in no collective: step 7, reading rows")
    assert waiting == "rank 0: waiting in all_gather_object over ranks 0-1 (step 7, reading rows)"
