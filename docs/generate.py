"""Write `docs/reference/` from the registries, the parser and the tables of the code. The build runs this file.

Nothing in that folder is kept in the repository: it is made at each build, so it cannot be out of date.
`python docs/generate.py` writes it without building the site. No weights are loaded and no model is run.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import md_text  # noqa: E402  (this and the next three are in docs/_ext)
from card_pages import card_pages  # noqa: E402
from code_pages import errors_page, models_page, module_page, python_page, table_page  # noqa: E402
from command_pages import command_pages  # noqa: E402

from mismatch.registry import mechanisms, metrics, probes  # noqa: E402

FOLDER = DOCS / "reference"
MADE = "<!-- Made by docs/generate.py at each build. Do not edit. -->\n\n"

ORDER = (
    "commands/index",
    "swap-text",
    "mechanisms/index",
    "metrics/index",
    "probes/index",
    "sites",
    "table",
    "run-folder",
    "errors",
    "models",
    "python",
)


def pages() -> dict[str, str]:
    """Path inside the folder -> Markdown."""
    made = {
        "index.md": index(),
        "swap-text.md": module_page("Swap text", "mismatch.spec"),
        "sites.md": module_page("Sites", "mismatch.forward.sites"),
        "table.md": table_page(),
        "run-folder.md": module_page("Run folder", "mismatch.runs.folder"),
        "errors.md": errors_page(),
        "models.md": models_page(),
        "python.md": python_page(),
    }
    for registry in (mechanisms(), metrics(), probes()):
        made |= card_pages(registry)
    return made | command_pages()


def index() -> str:
    """The first page, and the order of the others."""
    return "\n\n".join(
        [
            "# Reference",
            "These pages are made from the code whenever the site is built. `mismatch explain NAME` prints the "
            "same about a mechanism, a metric, a probe, a site or an error.",
            md_text.toctree(*ORDER),
        ]
    )


def write(folder: Path = FOLDER) -> list[Path]:
    """Write every page that changed, and remove what is no page any more."""
    made = {folder / name: f"{MADE}{text}\n" for name, text in pages().items()}
    for old in folder.rglob("*") if folder.exists() else ():
        if old.is_file() and old not in made:
            old.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [*made]


if __name__ == "__main__":
    print(f"{len(write())} pages in {FOLDER}")
