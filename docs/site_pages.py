"""Adds the pages at the top of the repository, and the files that pages link to, to the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages with their links changed, and every other file that they link to."""
    for page in [*files.documentation_pages()]:
        page.content_string = _linked(page.content_string, ROOT / "docs", files, config)
    for source, target in PAGES.items():
        text = _linked((ROOT / source).read_text(), ROOT, files, config)
        files.append(File.generated(config, target, content=text))
    return files


def _linked(text: str, folder: Path, files: Files, config: MkDocsConfig) -> str:
    """Return a page with the links that leave its folder replaced by those of the site."""

    def inside(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        if not path.is_relative_to(ROOT) or not path.is_file():
            return link[1]  # reported as a broken link
        name = path.relative_to(ROOT).as_posix()
        place = PAGES.get(name, name.removeprefix("docs/"))
        if place not in PAGES.values() and files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
        return place

    return LINK.sub(inside, text)
