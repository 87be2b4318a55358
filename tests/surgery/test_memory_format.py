"""Weights column by column: the same model, the same files, another order in memory."""

import torch
from torch import nn

from foldrank.surgery.memory_format import to_column_major_


def test_nothing_but_the_order_in_memory_changes() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
    model = nn.Sequential(first, second).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    before, weights, outputs = list(model.parameters()), [p.clone() for p in model.parameters()], model(x)
    report = to_column_major_(model)
    assert (report.stored, report.skipped) == (("0",), {})
    assert [first.weight.stride(), second.weight.stride()] == [(1, 7), (7, 1)]
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    torch.testing.assert_close(model(x), outputs, rtol=1e-14, atol=1e-14)
    assert to_column_major_(model).stored == report.stored
    assert first.weight.stride() == (1, 7)


def test_a_shared_weight_stays() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    report = to_column_major_(nn.Sequential(embedding, nn.Linear(4, 5), nn.Linear(5, 4), head))
    assert report.stored == ("1",)
    assert report.skipped == {"3": "its weight is shared"}
    assert head.weight.stride() == (4, 1)
    assert report.summary() == "1 of 2 weights with more rows than columns lie column by column, skipped 3"
