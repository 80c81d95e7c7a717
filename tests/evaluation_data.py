"""Small files of documents and questions for the tests of evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("river", "stone", "bridge", "night", "market", "copper", "garden", "winter", "letter", "engine", "harbour")


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def documents(path: Path, count: int = 8, words: int = 120) -> Path:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=words)) + "." for _ in range(count)]
    return write_lines(path, [{"title": f"document {i}", "text": text} for i, text in enumerate(texts)])


def questions(path: Path, count: int = 12) -> Path:
    """Every context tells of one thing's place; two questions share a title."""
    rng = random.Random(2)
    records = []
    for number in range(count):
        thing, place = f"{rng.choice(WORDS)} number {number}", f"{rng.choice(WORDS)} hall {number}"
        records.append(
            {
                "id": f"q{number}",
                "title": f"title {number // 2}",
                "context": f"The {thing} stands in the {place}. {' '.join(rng.choices(WORDS, k=10))}.",
                "question": f"Where does the {thing} stand?",
                "answers": [f"in the {place}", place],
            }
        )
    return write_lines(path, records)
