"""No page points at nothing: files, headings, pictures; what lies outside is a well-formed address."""

from __future__ import annotations

import posixpath
from urllib.parse import urlparse

import pytest
from docs_pages import ROOT, anchors, links

FOR_THE_SITE = {"docs/index.md"}
"""Pages read on the site alone; the others are read on a forge too, where docs/reference does not exist."""


@pytest.fixture(scope="session")
def pages(reference, written) -> dict[str, str]:
    return written | {f"docs/reference/{name}": text for name, text in reference.items()}


def test_every_link_inside_leads_somewhere(pages):
    dead = []
    for page, text in pages.items():
        for link in links(text):
            if urlparse(link).scheme:
                continue
            path, _, anchor = link.partition("#")
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            )
            if target not in pages and not (ROOT / target).is_file():
                dead.append(f"{page}: {link}")
            elif anchor and anchor not in anchors(pages.get(target, "")):
                dead.append(f"{page}: {link} (no such heading)")
    assert not dead


def test_pages_of_the_repository_do_not_need_a_build(written):
    made = [
        f"{page}: {link}"
        for page, text in written.items()
        for link in links(text)
        if page not in FOR_THE_SITE and "reference/" in link and not urlparse(link).scheme
    ]
    assert not made


def test_every_link_outside_is_an_address(pages):
    for page, text in pages.items():
        for link in links(text):
            found = urlparse(link)
            assert not found.scheme or (found.scheme == "https" and "." in found.netloc), (
                f"{page}: {link}"
            )


def test_every_picture_names_the_command_that_made_it(written):
    """Each page with a figure says which analysis drew it."""
    for page, text in written.items():
        for figure in {
            link.split("figures/")[1].split("/")[0] for link in links(text) if link.endswith(".png")
        }:
            assert "analyses/" in text, f"{page}: {figure}"
