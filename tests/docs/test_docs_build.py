"""The site builds: no warning, no dead link, no name without a page. `make docs` also runs the tutorial."""

from __future__ import annotations

import subprocess
import sys

import pytest
from docs_pages import DOCS


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of CPU, on a busy machine more
def test_the_site_builds_without_a_warning(tmp_path):
    made = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"),
            *("-D", "nb_execution_mode=off", "-d", str(tmp_path / "doctrees")),
            *(str(DOCS), str(tmp_path / "html")),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "html" / "reference" / "mechanisms" / "infini.html").is_file()
    guide = (tmp_path / "html" / "guides" / "choosing-layers.html").read_text(encoding="utf-8")
    assert "../reference/commands/scan.html" in guide  # names link to their pages
