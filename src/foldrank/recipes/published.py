"""Validation perplexities on C4 as papers print them, by shipped recipe: what is known of a recipe before it is run.

Their evaluators divide by one batch too many and average batches, which makes a perplexity 0.7 to 3.3 % too low, and a
seed moves it by 0.2 at 60M (standard error over three). None was measured with this code.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A perplexity, after how many tokens, and who printed it."""

    perplexity: str
    tokens: str
    source: str


GALORE = "GaLore, arXiv 2403.03507"
COLA = "CoLA, arXiv 2502.10940"
CRNET = "CR-Net, arXiv 2509.18993"

_TOKENS = {"60m": "1.1B", "130m": "2.2B", "350m": "6.4B", "1b": "13.1B"}

_PERPLEXITIES = {
    ("dense", GALORE): ("34.06", "24.36 to 25.08", "18.80", "15.56"),
    ("lowrank", GALORE): ("78.18", "45.51", "37.41", "142.53"),
    ("cola", COLA): ("34.04", "24.48", "19.40", "15.52"),
    ("crnet", CRNET): ("32.76", "24.31", "18.95", "15.22"),
}

PUBLISHED: dict[str, Published] = {
    f"llama-{size}-{method}": Published(perplexity=perplexity, tokens=_TOKENS[size], source=source)
    for (method, source), perplexities in _PERPLEXITIES.items()
    for size, perplexity in zip(_TOKENS, perplexities, strict=True)
}
"""By the name of the recipe. GaLore's low rank is likely badly tuned."""
