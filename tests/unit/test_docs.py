"""The documents: pages, links, commands and quoted sentences are those of the project as it is."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READABLE = [*PAGES, *sorted(ROOT.glob("README*.md"))]
_FENCE = re.compile(r"^(```+|~~~+)[^\n]*\n.*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(
        r"^#{1,6} +(.+?) *$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    ):
        text = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", heading).replace("`", "").lower()
        kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        name = "".join(kept).replace(" ", "-")
        names.add(name if not found[name] else f"{name}-{found[name]}")
        found[name] += 1
    return names


class _SiteLoader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose ``!ENV`` is mkdocs' own."""


_SiteLoader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])


def site() -> Any:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _SiteLoader)


def pages_of(entry: Any) -> list[str]:
    """The files that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    named = Counter(pages_of(site()["nav"]))
    assert named == Counter(page.name for page in PAGES)


@pytest.mark.parametrize("page", READABLE, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        missing = not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file))
        if missing or not file.is_relative_to(ROOT):
            broken.append(target)
    assert not broken


def test_the_site_follows_links_out_of_docs() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from site_links import without_outside_links

    text = "See [the figures](../benchmarks/README.md) and [data](data.md#files)."
    assert without_outside_links(text, "") == "See the figures and [data](data.md#files)."
    linked = without_outside_links(text, "https://example.org/x/")
    assert linked.startswith(
        "See [the figures](https://example.org/x/blob/main/benchmarks/README.md) and [data]"
    )


def commands(page: Path) -> list[str]:
    """The blocks of code of a page, each with its language."""
    blocks: list[tuple[str, str]] = re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [f"{language}\n{text}" for language, text in blocks]


@pytest.mark.parametrize(
    ("english", "chinese"),
    [("docs/getting_started.md", "docs/getting_started.zh.md"), ("README.md", "README.zh.md")],
)
def test_both_languages_have_the_same_commands(english: str, chinese: str) -> None:
    assert commands(ROOT / english) == commands(ROOT / chinese) != []


def package_sentences() -> str:
    """The package's source with adjacent literals joined, so that a sentence over two lines is found."""
    sources = "\n".join(
        file.read_text(encoding="utf-8") for file in sorted((ROOT / "mindspeed_lora").rglob("*.py"))
    )
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", sources)


def test_quoted_sentences_are_said() -> None:
    """Each piece of a sentence in the first column stands in the package's source."""
    sources, unsaid = package_sentences(), []
    for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        for sentence in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            pieces = [piece.strip(" ;:()") for piece in sentence.split("…")]
            unsaid += [piece for piece in pieces if piece and piece not in sources]
    assert not unsaid


def test_named_flags_are_known() -> None:
    """Flags that the guides name in code are flags of a command."""
    from mindspeed_lora.config.commands import COMMANDS, grammar

    known = {name for command in COMMANDS for name in grammar(command).names()} | {"--help", "--config"}
    others = {"--standalone", "--tp", "--loader", "--saver", "--gpus", "--model"}
    unknown = []
    for name in (
        "getting_started.md",
        "getting_started.zh.md",
        "layouts.md",
        "troubleshooting.md",
        "python_api.md",
    ):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", (DOCS / name).read_text(encoding="utf-8")):
            if flag not in known | others:
                unknown.append(f"{name}: {flag}")
    assert not unknown
