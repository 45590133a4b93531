"""The site of `make docs`: the Markdown files of the repository, and what they link to.

The site has the layout of the repository, so a relative link leads to the same place on the site
and on GitHub. A file of code gets a page with its text, a notebook one with its cells and outputs,
and a folder one with the names of its files. Figures and measurements are copied.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from nbconvert import MarkdownExporter
from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)")
QUOTED_FILE = re.compile(r"^(```\w+) (\S+)$", re.MULTILINE)
COPIED = {".csv", ".json", ".png", ".svg"}

#: What draws formulas and diagrams, from `make docs`, and the HTML that needs it.
SCRIPTS = {
    "mathjax.js": 'class="arithmatex"',
    "mermaid.js": 'class="mermaid"',
}


class GeneratedPage(File):
    """A page whose source is not Markdown, and whose text is generated."""

    def is_documentation_page(self) -> bool:
        return True


def code_page(path: Path) -> str:
    lexer = find_lexer_class_for_filename(path.name)
    language = lexer.aliases[0] if lexer else "text"
    text = path.read_text(encoding="utf-8")
    return f'# {path.name}\n\n`````{language} linenums="1"\n{text}\n`````\n'


def folder_page(path: Path) -> str:
    files = [p for p in path.rglob("*.*") if p.is_file() and p.suffix != ".pyc"]
    names = sorted(p.relative_to(path).as_posix() for p in files)
    return f"# {path.name}\n\n" + "".join(f"- `{name}`\n" for name in names)


def notebook_page(path: Path) -> str:
    exporter = MarkdownExporter(config={"ExtractOutputPreprocessor": {"enabled": False}})
    return exporter.from_filename(str(path))[0]


def site_file(path: Path, config: MkDocsConfig) -> File:
    """The file of the site for a file or a folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".md" or path.suffix in COPIED:
        return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    page = GeneratedPage(
        name,
        None,
        config.site_dir,
        config.use_directory_urls,
        dest_uri=f"{name}.html",
        inclusion=InclusionLevel.NOT_IN_NAV,
    )
    if path.suffix == ".ipynb":
        page.content_string = notebook_page(path)
    else:
        text = folder_page(path) if path.is_dir() else code_page(path)
        page.content_string = "---\nsearch:\n  exclude: true\n---\n" + text
    return page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the files of the repository in place of those of docs/."""
    pages = [
        path
        for pattern in ("*.md", "docs/**/*.md", "examples/*/README.md")
        for path in ROOT.glob(pattern)
    ]
    targets = {
        (page.parent / target).resolve()
        for page in pages
        for target in LINK.findall(page.read_text(encoding="utf-8"))
    }
    linked = {path for path in targets if path.is_relative_to(ROOT) and path.exists()}
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    scripts = [
        File.generated(config, f"scripts/{name}", abs_src_path=str(ROOT / "build/scripts" / name))
        for name in SCRIPTS
    ]
    of_repository = [site_file(path, config) for path in sorted({*pages, *linked})]
    return Files([*of_theme, *scripts, *of_repository])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Makes the name of a quoted file, which follows the language, the title of the block."""
    return QUOTED_FILE.sub(r'\1 title="\2"', markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Loads the scripts that a page needs."""
    for name, mark in SCRIPTS.items():
        if mark in html:
            html += f'<script src="{get_relative_url(f"scripts/{name}", page.url)}"></script>'
    return html
