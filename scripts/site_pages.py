"""This module prepares the pages of the docs for the site that MkDocs builds (a hook of mkdocs.yml).

Pages are written for readers of the repository: the first page is README.md, and links may lead to any of its files.
On the site README.md, CHANGELOG.md and CONTRIBUTING.md are pages like those of docs/, and a link to a file that the
site lacks becomes the file's name. Notebooks are pages, too.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports] (only scripts/docs installs MkDocs)

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Pages of the site that are not in docs/, and the files of the repository that they show."""

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/, and those of notebooks (called by MkDocs)."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text_of(notebook)))
    return files


def text_of(notebook: Path) -> str:
    """Return a notebook as a page: its text, its code and what this shows, and a link to the notebook itself."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += map(shown, cell.get("outputs", []))
    return "\n\n".join([*parts, f"This page is the notebook [{notebook.name}]({notebook.name})."])


def shown(output: dict[str, Any]) -> str:
    """Return what a cell of a notebook has printed or drawn, for a page."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the code draws](data:image/png;base64,{''.join(data['image/png'].split())})"
    return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Return the text of a page with links that the site can follow (called by MkDocs)."""
    folder = "" if page.file.src_uri in PAGES else "docs"
    here = posixpath.dirname(page.file.src_uri)
    known = {file.src_uri for file in files}

    def followed(match: re.Match[str]) -> str:
        text, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, here, target))
        on_site = {source: name for name, source in PAGES.items()}.get(path, path.removeprefix("docs/"))
        if on_site in known:
            return f"[{text}]({posixpath.relpath(on_site, here or '.')}{anchor})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which does not exist")
        return text if path in text else f"{text} (`{path}`)"

    return PICTURE.sub(r"\1", LINK.sub(followed, markdown))
