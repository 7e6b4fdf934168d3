"""Adapts pages of the repository to the site: its home page, and links to files that the site does not have."""

import re
from pathlib import Path


# Links that climb out of docs/, such as [figures](../examples/benchmarks/LOG.md#shapes).
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:README|CONTRIBUTING|CHANGELOG|examples/)[^)#]*)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The text of a page before it is rendered: a hook of mkdocs."""
    if page.file.src_uri == "README.md":
        text = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
        first = text.partition("\n")[2].partition("<!-- home: end -->")[0]
        first = first.replace("](docs/README.md)", "](#where-to-read)").replace("](docs/", "](")
        # The site has no pages for these files.
        first = first.replace(" · [Changelog](CHANGELOG.md) · [Citation](CITATION.cff)", "")
        return markdown.replace("<!-- home -->", first)
    return OUTSIDE.sub(r"\1, `\2`", markdown)
