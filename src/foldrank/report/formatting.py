"""Numbers as text, the same in every page, table and description of a chart."""

import math

MINUS = "\N{MINUS SIGN}"
"""As wide as plus."""

NONE = "\N{EN DASH}"
"""Where there is nothing to say."""


LARGEST_LOSS = 709.0
"""Above it the perplexity is no finite number."""


def loss(value: float) -> str:
    """A loss in nats per token."""
    return f"{value:.4f}"


def perplexity(loss: float) -> str:
    """Of a mean loss."""
    value = math.exp(loss) if loss < LARGEST_LOSS else math.inf
    return f"{value:,.2f}" if value < 1e9 else f"{value:.2e}"


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """A time."""
    return f"{value:,.1f}"


def short(value: float) -> str:
    """A large number in three digits: 3.97 M.

    >>> short(3_974_400), short(24_800_000_000), short(512)
    ('3.97 M', '24.8 G', '512')
    """
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            digits = value / size
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f} {letter}"
    return f"{value:.0f}"


def mebibytes(value: float) -> str:
    """Bytes for a person."""
    return f"{value / 2**20:,.1f} MiB"


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:.3g}"


def ratio(value: float) -> str:
    """How many times one thing is another, in two digits or whole.

    >>> ratio(0.204), ratio(9.87), ratio(1234.5)
    ('0.20', '9.9', '1,234')
    """
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """A share of one."""
    return f"{100 * fraction:.0f} %"


def signed(value: float) -> str:
    """A difference of losses, with its sign."""
    return f"{value:+.4f}".replace("-", MINUS)
