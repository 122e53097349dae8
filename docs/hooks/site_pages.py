"""MkDocs hook: adds the pages that are made from files outside docs/.

These are the texts at the top of the repository, and the API pages. The API pages are found by walking quatro_ray/, so
that a module can move without a change here.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = "quatro_ray"
TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security_policy.md",
}
"""Where each text of the repository's top folder stands in the site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the API pages to the navigation."""
    pages: list[dict[str, str]] = [{title: _api_uri(title)} for title in _api_pages()]
    assert config.nav is not None
    config.nav.append({"API": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves."""
    for name, uri in TEXTS.items():
        files.append(File.generated(config, uri, content=_with_links_of_the_site((ROOT / name).read_text("utf-8"))))
    for title, modules in _api_pages().items():
        # the package itself is the page's title
        blocks = [f"::: {title}\n    options: {{heading_level: 1}}", *(f"::: {module}" for module in modules)]
        files.append(File.generated(config, _api_uri(title), content="\n\n".join(blocks) + "\n"))
    return files


def _api_pages() -> dict[str, list[str]]:
    """The modules of each page: one page for each package, and a first one for the modules outside of packages."""
    pages: dict[str, list[str]] = {PACKAGE: []}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        title = ".".join(parts[:2]) if len(parts) > 2 else PACKAGE
        modules = pages.setdefault(title, [])
        if parts[-1] not in ("__init__", "__main__"):
            modules.append(".".join(parts))
    return pages


def _api_uri(title: str) -> str:
    return f"api/{title.removeprefix(f'{PACKAGE}.')}.md"


def _with_links_of_the_site(text: str) -> str:
    """Links of the repository's texts to each other and into docs/, as links between pages of the site."""
    text = text.replace("](docs/", "](")
    for name, uri in TEXTS.items():
        text = text.replace(f"]({name}", f"]({uri}")
    return text
