"""Puts the first screen of README.md into the home page of the site, with links that lead from there."""

from pathlib import Path


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The text of a page before it is rendered: a hook of mkdocs."""
    if page.file.src_uri != "README.md":
        return markdown
    text = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    first = text.partition("\n")[2].partition("<!-- home: end -->")[0]
    first = first.replace("](docs/README.md)", "](#where-to-read)").replace("](docs/", "](")
    return markdown.replace("<!-- home -->", first.replace("[changelog](CHANGELOG.md)", "changelog in the repository"))
