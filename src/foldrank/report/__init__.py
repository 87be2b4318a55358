"""Reports: what they are made of, and how they are written. What a report says is its maker's (compare, runs).

blocks (text, tables, charts) -> `svg` (a chart's picture) -> `html`, `markdown`
"""
