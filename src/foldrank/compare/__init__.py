"""Studies: methods x corpora x sizes x learning rates x seeds on the same data in the same order, and what they show.

Data flows once, in one direction, through the files of a study's folder:

    study.yaml             what is asked (`study.py`), copied there when the study starts
      -> runs/ID/          one folder a run while it trains, as `foldrank pretrain` writes it (`worker.py`)
      -> records/ID.json   what is known of a run that finished or failed (`records.py`): the only thing read later
      -> analysis          tables made from study and records alone (`analysis.py`, with `statistics.py`)
      -> report.html, report.md (`report/`)

What to run next is a function of the study and its records (`plan.py`), so a study that is killed goes on where it was,
and any number of processes may work on one folder: a run belongs to whoever holds its lock (`worker.py`).
"""
