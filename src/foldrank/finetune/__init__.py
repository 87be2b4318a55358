"""Fine-tuning of checkpoints, to answer and to classify.

One direction: `settings` (what is asked), `rows` (files, data sets and the shipped tasks `stdlib_tasks` to rows, parted
into training and held out), `language` or `classification` (rows to token ids with labels, the model, its trainer and
what is measured), `finetune` (the story: measure, train, measure, save).
"""
