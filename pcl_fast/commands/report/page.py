"""A report as one page of HTML that needs nothing but itself."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pcl_fast.commands.report.tables import Cells

STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --back: #ffffff; --line: #d5d9e0; --soft: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ec; --back: #16191f; --line: #3a404b; --soft: #20242c; }
}
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: var(--text); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; }
th { background: var(--soft); } .figure { text-align: right; white-space: nowrap; }
figure { margin: 0.8rem 0; } figcaption, .note { font-size: 0.87rem; max-width: 60rem; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; padding: 6px;
  box-sizing: border-box; }
summary { cursor: pointer; margin: 0.8rem 0; }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG, and what it shows."""

    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, already HTML."""

    title: str
    body: str


def page(title: str, note: str, sections: Sequence[Section]) -> str:
    """The whole page; `title` and `note` are plain text."""
    parts = "\n".join(f"<h2>{escape(each.title)}</h2>\n{each.body}" for each in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{paragraph(note)}\n{parts}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f'<p class="note">{escape(text)}</p>'


def table(name: str, cells: Cells) -> str:
    """A table whose id is `name`; figures are on the right."""

    def row(tag: str, texts: Sequence[str]) -> str:
        classes = ["" if number < cells.words else ' class="figure"' for number in range(len(texts))]
        shown = zip(classes, texts, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{escape(text)}</{tag}>' for kind, text in shown)}</tr>"

    body = "\n".join(row("td", texts) for texts in cells.rows)
    head = row("th", cells.header)
    return (
        f'<div class="wide"><table id="{escape(name)}">\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(shown: Picture) -> str:
    """A picture within the page itself."""
    data = base64.b64encode(shown.png).decode()
    caption = escape(shown.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def folded(summary: str, body: str) -> str:
    """HTML that is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>"
