"""A study while it goes on: what is done, what trains, what waits."""

from pathlib import Path

from foldrank.compare.progress import unfinished_runs
from foldrank.compare.queue import queue_screen, read_queue

from ..called import Foldrank
from ..runs.logs import entries, here, write_run
from .studies import study_of, sweep_runs, write_study


def test_the_queue_of_a_study(foldrank: Foldrank, tmp_path: Path) -> None:
    study = study_of("dense", "cola")
    records = sweep_runs(study)
    folder = write_study(tmp_path / "study", study, records[:-2])
    log = list(entries(30))
    log[0] |= here()
    write_run(folder / "runs" / records[-1].id, iter(log), steps=60)
    queue = read_queue(folder)
    assert (queue.done, queue.failed) == (len(records) - 2, 0)
    assert [name for name, _ in queue.begun] == [records[-1].id]
    assert records[-2].id in queue.waiting
    shown = queue_screen(queue)
    assert "workers that train: 1" in shown
    assert "step 30 of 60" in shown
    assert foldrank("watch", folder).stdout.strip() == shown
    seen = foldrank("watch", folder, "--json").json
    assert (seen["done"], seen["failed"], seen["waiting"]) == (queue.done, 0, list(queue.waiting))
    assert seen["begun"] == [{"id": records[-1].id, "state": "running", "step": 30}]


def test_a_run_of_a_study_that_died_says_so(tmp_path: Path) -> None:
    study = study_of("dense", "cola")
    records = sweep_runs(study)
    folder = write_study(tmp_path / "study", study, records[:-1])
    log = [*entries(30), {"step": 30, "event": "stopped", "message": "full"}]
    write_run(folder / "runs" / records[-1].id, iter(log), steps=60)
    (unfinished,) = unfinished_runs(folder, [record.id for record in records[:-1]])
    assert (unfinished.id, unfinished.step) == (records[-1].id, 30)
    shown = queue_screen(read_queue(folder))
    assert "workers that train: 0" in shown
    assert "stopped: the same foldrank compare goes on with it" in shown
