"""Six intents of Banking77 under short names, as `data.row` of banking77.yaml wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "card_arrival": "delivery",
    "exchange_rate": "exchange",
    "change_pin": "pin",
    "lost_or_stolen_card": "stolen",
    "age_limit": "age",
    "transfer_fee_charged": "fee",
}
# The examples of the prompt: they are neither trained on nor held out.
EXAMPLES = {
    "My new card hasn't came in.",
    "What is an exchange rate?",
    "Can I change my card PIN?",
    "My card has gone missing.",
    "Do you have an age limit?",
    "Are money transfers free?",
}


def six_intents(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A message and its topic; None, which leaves the row out, for another intent or an example.

    The authors' files name the intent `category`, the hub's copy `label_text`.
    """
    intent, text = row.get("category", row.get("label_text")), row["text"].strip()
    if intent not in NAMES or text in EXAMPLES:
        return None
    return {"message": text, "target": NAMES[intent]}
