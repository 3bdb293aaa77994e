"""Sphinx configuration: offline, no remote resources, warnings are errors (`tox -e docs`)."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "numba-lion"
author = "numba-lion contributors"
copyright = "numba-lion contributors"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_reredirects",
]
exclude_patterns = ["_build", "_diagrams", "**.ipynb_checkpoints"]

# Old addresses lead to the pages that took over.
redirects = {"faq": "troubleshooting.html"}

html_theme = "furo"
html_title = "numba-lion"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#9a4a00", "color-brand-content": "#9a4a00"},
    "dark_css_variables": {"color-brand-primary": "#f0a35c", "color-brand-content": "#f0a35c"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Notebooks run again whenever anything that they import has changed.
sources = [p for folder in ("reference", "cpu_kernels", "cuda_kernels", "lion") for p in (ROOT / folder).rglob("*.py")]
sources += (ROOT / "docs" / "notebooks").glob("*.py")
digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources))).hexdigest()[:16]
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "notebooks" / digest)
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

dtypes = ("Float32", "Int32", "Int64", "Uint8", "Uint16", "Uint32")
array_names = {"Array", *(f"{dtype}Array" for dtype in dtypes)}
autodoc_type_aliases = {name: name for name in array_names}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]


ARRAY = re.compile(r"[\w.~]*ndarray\[[\w.~]*tuple\[[\w.~]*Any, \.\.\.\], [\w.~]*dtype\[[\w.~]*?(\w+)\]\]")


def with_named_arrays(app: Any, what: str, name: str, value: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Return a signature in which NumPy's arrays have the names that the sources give them."""

    def named(found: re.Match[str]) -> str:
        array = f"{found[1].capitalize()}Array"
        return array if array in array_names else "Array"

    texts = (text and ARRAY.sub(named, text) for text in (signature, returns))
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in texts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", with_named_arrays)
