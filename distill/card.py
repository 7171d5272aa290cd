"""Model cards: a heading, a sentence, a table."""

from __future__ import annotations

from collections.abc import Mapping

DIGITS = (
    "1437 training digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, "
    "CC BY 4.0); the 360 held out were not used"
)
LICENCE = "weights Apache-2.0, as the code"


def model_card(name: str, lead: str, rows: Mapping[str, str], note: str = "") -> str:
    """A card in Markdown; a row with an empty answer is left out.

    >>> print(model_card("tiny", "A net.", {"data": "none", "cost": ""}))
    # tiny
    <BLANKLINE>
    A net.
    <BLANKLINE>
    | | |
    |---|---|
    | data | none |
    <BLANKLINE>
    """
    table = [f"| {key} | {value} |" for key, value in rows.items() if value]
    lines = [f"# {name}", "", lead, "", "| | |", "|---|---|", *table, *(["", note] if note else []), ""]
    return "\n".join(lines)
