"""A hook of mkdocs: links from pages to files outside of ``docs/``.

In the repository they are relative paths. The site has no such files: there they lead to the repository where its
address is known (``REPO_URL``), and are plain text elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\[\]]*)\]\(\.\./([^()\s]+)\)")


def on_page_markdown(markdown: str, config: Any, **others: Any) -> str:
    """The text of a page as the site has it; called by mkdocs for each."""
    return without_outside_links(markdown, config.repo_url or "")


def without_outside_links(markdown: str, repo_url: str) -> str:
    """``[text](../path)`` as a link into the repository, or as its text."""
    if not repo_url:
        return _OUTSIDE.sub(r"\1", markdown)
    return _OUTSIDE.sub(rf"[\1]({repo_url.rstrip('/')}/blob/main/\2)", markdown)
