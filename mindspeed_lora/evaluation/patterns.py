"""Answers found in generated text."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_STATED = re.compile(r"(?:answer is|answer:|答案是|答案为|答案：)\s*:?\s*", flags=re.IGNORECASE)


def first_letter(text: str, letters: tuple[str, ...]) -> str | None:
    """The first of the letters that stands for itself in a text: ``B``, ``(B)``, ``B.``, ``答案是B``."""
    alternatives = "".join(map(re.escape, letters))
    match = re.search(rf"(?<![A-Za-z])([{alternatives}])(?![A-Za-z])", text)
    return None if match is None else match.group(1)


def all_letters(text: str, letters: tuple[str, ...]) -> str:
    """The letters that stand in the first line of a text, in order, each once."""
    line = text.strip().partition("\n")[0]
    alternatives = "".join(map(re.escape, letters))
    # Several letters may stand side by side, but a word is none.
    groups = re.findall(rf"(?<![A-Za-z])[{alternatives}]+(?![A-Za-z])", line)
    return "".join(sorted(set("".join(groups))))


def stated(text: str) -> str | None:
    """What stands behind the last "the answer is" of a text, to the end of its line; None where there is none."""
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    return text[matches[-1].end() :].partition("\n")[0].strip().rstrip(".。").strip()


def last_number(text: str) -> str | None:
    """The number that a solution ends with: behind ``####``, behind "the answer is", else the last one."""
    if "####" in text:
        text = text.rpartition("####")[2]
    elif (said := stated(text)) is not None and _NUMBER.search(said):
        match = _NUMBER.search(said)
        return None if match is None else plain_number(match.group())
    found = _NUMBER.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """A number without thousands' commas, currency, and zeros behind the point."""
    number = text.replace(",", "").replace("$", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def normalised(text: str) -> str:
    """A short answer without case, outer punctuation and superfluous blanks."""
    return " ".join(text.strip().strip(".。,，\"'").lower().split())
