"""The documentation as a site: `make docs`. What is about the code is made from the code (`_ext/reference.py`)."""

import sys
from pathlib import Path

from foldrank import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "foldrank"
version = release = __version__
project_copyright = "the foldrank developers, Apache-2.0"

extensions = [
    "myst_nb",  # Markdown, and the notebooks with their outputs
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "reference",
]
exclude_patterns = ["_build", "_ext", "notebooks/*.py"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they are run by a test, and kept with their outputs
nb_merge_streams = True

default_role = "literal"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_custom_sections = [("Shape", "params_style")]
highlight_language = "none"
html_math_renderer = "mathml"  # by reference.py: a browser draws it, and no script is loaded

html_theme = "furo"
html_title = f"foldrank {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
