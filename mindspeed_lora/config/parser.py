"""From words on the command line to values by field name."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_lora.config.accepted import NO_EFFECT
from mindspeed_lora.config.features import NOT_BUILT, Feature
from mindspeed_lora.config.flags import Arity, Option, check_value, items
from mindspeed_lora.errors import Refused

HELP_FLAGS = ("--help", "-h")
_SWITCHED = ("true", "false")
"""Words that may stand behind a switch."""


@dataclass(frozen=True)
class Grammar:
    """The flags that one command knows."""

    options: Mapping[str, Option]
    """Flag name → option, for the command's own flags."""
    ignored: Mapping[str, Arity]
    """Flags of other commands that this one accepts without effect."""
    subcommands: Mapping[str, str] = field(default_factory=dict)
    """First words that make another command of the line → how that command is called."""

    @property
    def words(self) -> tuple[Option, ...]:
        """The options that words without a flag fill, in their order."""
        return tuple(option for option in self.options.values() if option.flag.is_word)

    def names(self) -> set[str]:
        """Every flag name, also those that have no effect or are refused."""
        return {*self.options, *self.ignored, *NO_EFFECT, *NOT_BUILT}


@dataclass
class Parsed:
    """What the command line says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Field name → value, of every flag that was given."""
    without_effect: list[str] = field(default_factory=list)
    """Names of the given flags that change nothing here."""


def parse_words(argv: Sequence[str], grammar: Grammar) -> Parsed:
    """Read the flags; a flag given twice takes its last value, an unknown one is refused."""
    if any(word.endswith("\r") for word in argv):
        raise Refused(
            "a word of the command ends with a carriage return: the script has Windows' line ends; take them out "
            "(sed -i 's/\\r$//' SCRIPT)"
        )
    parsed = Parsed()
    not_built: dict[str, tuple[Feature, list[str]]] = {}
    # What a line continuation in front of blanks leaves inside of a script's variable is no word of the user's.
    for name, words in _split([word for word in argv if word != "\\"], grammar):
        if name in grammar.options:
            option = grammar.options[name]
            parsed.values[option.dest] = _convert(option, words)
        elif _is_off(words) and _arity(name, grammar) == "0":
            continue
        elif name in NOT_BUILT and name not in grammar.ignored:
            not_built[name] = (NOT_BUILT[name], words)
        elif name not in parsed.without_effect:
            parsed.without_effect.append(name)
    _refuse_not_built(not_built)
    return parsed


def _split(argv: Sequence[str], grammar: Grammar) -> Iterable[tuple[str, list[str]]]:
    """Cut the command line into flags, each with its words.

    A switch may have one of the words True and False.
    """
    position, words_read = 0, 0
    unknown: list[str] = []
    while position < len(argv):
        name, equals, attached = argv[position].partition("=")
        if not name.startswith("--"):
            if words_read == len(grammar.words):
                raise Refused(_unexpected_word(argv, position, grammar))
            yield grammar.words[words_read].name, [argv[position]]
            words_read, position = words_read + 1, position + 1
            continue
        arity = _arity(name, grammar)
        if arity is None:
            unknown.append(name)
        end = _end_of_words(argv, position + 1, arity, bool(equals))
        words = [*([attached] if equals else []), *argv[position + 1 : end]]
        if len(words) > 1 and (arity == "1" or _begins_placeholder(words[0])):
            words = [" ".join(words)]
        if arity == "0" and words and words[0].lower() not in _SWITCHED:
            raise Refused(f"{name} is a switch and takes no value, but got {words[0]!r}")
        if arity in ("1", "+") and not words:
            known = " or ".join(grammar.options[name].flag.choices) if name in grammar.options else ""
            raise Refused(f"{name} needs a value{known and ': ' + known}")
        if arity is not None:
            yield name, words
        position = end
    if unknown:
        raise Refused(unknown_flags(unknown, grammar))


def _unexpected_word(argv: Sequence[str], position: int, grammar: Grammar) -> str:
    """The sentence for a word that no flag takes, with the command that it may have meant."""
    word = argv[position]
    near = difflib.get_close_matches(word, list(grammar.subcommands), n=1, cutoff=0.6)
    if near:
        return f"unexpected word {word!r}; did you mean {grammar.subcommands[near[0]]!r}?"
    before = f" after {argv[position - 1]}" if position else ""
    takes = " and ".join(option.label for option in grammar.words)
    rule = f"beside its flags this command takes {takes}" if takes else "every value belongs to a --flag"
    return f"unexpected word {word!r}{before}; {rule}"


def _end_of_words(argv: Sequence[str], start: int, arity: Arity | None, has_value: bool) -> int:
    """Where the words of a flag end; an unquoted placeholder, ``your data path``, is one value."""
    end = next((at for at in range(start, len(argv)) if argv[at].startswith("--")), len(argv))
    if arity in ("+", "*", None) or end == start:
        return end
    if has_value:
        return start
    if arity == "0":
        return start + (argv[start].lower() in _SWITCHED)
    return end if _begins_placeholder(argv[start]) else start + 1


def _is_off(words: Sequence[str]) -> bool:
    """Whether a switch that has these words is off."""
    return [word.lower() for word in words] == ["false"]


def _begins_placeholder(word: str) -> bool:
    """Whether words that begin with this one stand in a script for what the user is to put there."""
    return word in ("your", "Your")


def _arity(name: str, grammar: Grammar) -> Arity | None:
    """None: there is no such flag."""
    if name in grammar.options:
        return grammar.options[name].arity
    if name in NOT_BUILT:
        return NOT_BUILT[name].arity
    return NO_EFFECT.get(name) or grammar.ignored.get(name)


def unknown_flags(names: Sequence[str], grammar: Grammar) -> str:
    """The sentence for unknown flags, each with the nearest of those that do something here, else of all."""
    if len(names) > 1:
        found = ((name, _nearest(name, grammar)) for name in dict.fromkeys(names))
        listed = (f"{name} ({near or 'nothing like it'})" for name, near in found)
        return f"unknown flags, with the nearest that are known: {', '.join(listed)}; --help lists all"
    near = _nearest(names[0], grammar)
    return f"unknown flag {names[0]}; " + (f"did you mean {near}?" if near else "--help lists the known ones")


def _nearest(name: str, grammar: Grammar) -> str:
    for known in (grammar.options, grammar.names()):
        near = difflib.get_close_matches(name.replace("_", "-"), list(known), n=3, cutoff=0.7)
        if near:
            return " or ".join(near)
    return ""


def _convert(option: Option, words: Sequence[str]) -> Any:
    """The value that the words stand for, checked."""
    if option.arity == "0":
        return not _is_off(words)
    convert = _convert_object if option.is_object else _convert_word
    values = tuple(convert(option, word) for word in words)
    value = values if option.arity in ("+", "*") else values[0]
    for item in items(value):
        check_value(option, item)
    return value


def _convert_object(option: Option, word: str) -> dict[str, Any]:
    """A JSON object of numbers by name."""
    kind = "integers" if option.item_type is int else "numbers"
    try:
        pairs = json.loads(word, object_pairs_hook=_Pairs)
    except ValueError:
        pairs = None
    if not isinstance(pairs, _Pairs) or not all(_is_number(value, option.item_type) for _, value in pairs):
        raise Refused(f'{option.name} {word}: expected a JSON object of names and {kind}, {{"q_proj": 8}}')
    if len(dict(pairs)) < len(pairs):
        raise Refused(f"{option.name} {word}: a name is there twice; give each once")
    return dict(pairs)


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object, duplicates included."""


def _is_number(value: object, kind: type) -> bool:
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return fits and math.isfinite(value)  # type: ignore[arg-type]


def _convert_word(option: Option, word: str) -> Any:
    if option.flag.choices or option.item_type is not str:
        word = _without_quotes(word)
    word = option.flag.same_as.get(word, word)
    try:
        value = option.item_type(word)
    except ValueError:
        kind = "an integer" if option.item_type is int else "a number"
        raise Refused(f"{option.name} {word}: expected {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{option.name} {word}: expected a finite number")
    return value


def _without_quotes(word: str) -> str:
    """A word without the quotes around it, which a shell leaves in place inside of an unquoted ``$VARIABLE``."""
    quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
    return word[1:-1] if quoted else word


def _refuse_not_built(given: Mapping[str, tuple[Feature, list[str]]]) -> None:
    """Refuse the flags of features that are not there, unless their values leave the feature off."""
    by_feature: dict[str, list[str]] = {}
    for name, (feature, words) in given.items():
        if not feature.is_off(words):
            by_feature.setdefault(feature.what, []).append(" ".join([name, *words]))
    for what, flags in by_feature.items():
        raise Refused(f"{', '.join(flags)}: {what}; leave the flag{'s' if len(flags) > 1 else ''} out")
