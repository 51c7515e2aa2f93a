"""A hook of MkDocs: pages that lie elsewhere in the repository join those of `docs/`, and links lead to them.

A page is written once, for GitHub, with links between files of the repository; on the site these are rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/papers/README.md": "papers.md",
    "tests/benchmarks/README.md": "benchmarks.md",
}
PICTURES = ["tests/benchmarks/headline.svg"]
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")  # not: addresses of the web, headings of the same page

_ROLE = re.compile(r":\w+:(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that lie outside of `docs/`."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for source in PICTURES:
        files.append(File.generated(config, Path(source).name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files of the repository into links between pages of the site, which are all in one folder."""
    places = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}
    here = Path(str(page.file.abs_src_path)).resolve().parent

    return _LINK.sub(lambda link: places.get((here / link[1]).resolve(), link[1]), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take Sphinx's roles away, by which docstrings name what they speak of: they are code here."""
    return _ROLE.sub("", html)
