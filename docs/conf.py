"""The site: Sphinx reads Markdown (MyST) and runs the tutorial (myst-nb); Furo draws it. `make docs` builds it.

Sphinx with MyST is what scientific Python documents itself with and will be kept for the long run; the maintenance of
Material for MkDocs has ended. Nothing is fetched while building. A warning is an error, and so is a dead link inside.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS / "_ext"), str(DOCS.parent)]

import mismatch  # noqa: E402

project = "mismatch"
author = "the authors of mismatch"
copyright = "the authors of mismatch, Apache-2.0"
release = version = mismatch.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "reference_hook",
    "name_links",
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]
default_role = "code"  # one backtick in a docstring is code

nitpicky = True
nitpick_ignore_regex = [
    # Types of Python and of libraries: their pages are not here, and the build reads no network.
    (
        r"py:.*",
        r"(collections|contextlib|datetime|matplotlib|np|numpy|nn|os|pandas|pathlib|pd|tokenizers|torch|transformers"
        r"|types|typing)(\..*)?",
    ),
    (r"py:.*", r"bool|bytes|dict|float|frozenset|int|list|object|set|str|tuple|type|None|optional"),
    (r"py:class", r"[A-Z]\w+"),  # imported for type checkers only; errors are py:exc, and checked
    # Types inside the package that a result holds and that are no public names.
    (r"py:.*", r"mismatch\.(config|forward|mechanisms|models|runs|stages|surgery|texts)\..*"),
    (r"py:.*", r".*[\[~].*"),  # nested annotations that Sphinx does not take apart
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]

nb_execution_mode = "cache"  # runs again only when the notebook has changed
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"

html_theme = "furo"
html_title = f"mismatch {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3b528b", "color-brand-content": "#3b528b"},
    "dark_css_variables": {"color-brand-primary": "#8fb7e8", "color-brand-content": "#8fb7e8"},
}
