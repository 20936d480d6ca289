"""A Sphinx extension: code that names a mechanism, a metric, a probe or a command links to its page.

So the guides write `infini(segment=64)` or `mismatch scan` as on GitHub, where the pages of the reference do not exist.
The first mention on a page is linked, and none in a heading, in a link or in the reference itself.
"""

from __future__ import annotations

import re
from typing import Any

from command_pages import commands
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from mismatch.registry import mechanisms, metrics, probes

LOG = logging.getLogger(__name__)

PLAIN = {"heads", "linear", "mean", "memory", "random", "zero"}
"""Names that are words of a table as well: linked as a call only."""


def targets() -> dict[str, str]:
    """What code may say -> the page it means."""
    found = {f"mismatch {name}": f"reference/commands/{name}" for name in commands()}
    for registry in (metrics(), probes(), mechanisms()):
        for name in registry.names():
            found[name] = f"reference/{registry.kind}s/{name}"
    return found


def link(app: Sphinx, doctree: nodes.document, home: str) -> None:
    """Wrap the first mention of each name in a link to its page."""
    if home.startswith("reference/"):
        return
    known, seen = targets(), set()
    for node in [*doctree.findall(nodes.literal)]:
        text = node.astext()
        words = re.match(r"mismatch \w+", text) or re.fullmatch(r"(\w+)(?:\(.*\))?", text)
        name = words[words.lastindex or 0] if words else ""
        page = known.get(name)
        inside = isinstance(node.parent, (nodes.title, nodes.reference))
        if page is None or name in seen or inside or text in PLAIN:
            continue
        if page not in app.env.found_docs:
            LOG.warning("`%s` has no page %s", name, page, location=node)
        seen.add(name)
        address = app.builder.get_relative_uri(home, page)
        node.replace_self(nodes.reference("", "", node.deepcopy(), internal=True, refuri=address))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
