"""A page as one HTML file that needs nothing else, and as Markdown. Knows the page; knows no figure."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import Environment

from lab.report.page import GAP, Page, Table

NOTHING = "Nothing of this was measured."
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c1c1c; }
  h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
  th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
  td { overflow-wrap: anywhere; min-width: 4.5rem; }
  th { background: #f4f4f4; position: sticky; top: 0; }
  .gap { background: #fff1e0; color: #8a4b00; }
  .note, figcaption { color: #555; font-size: 13px; }
  svg { max-width: 100%; height: auto; }
  figure { margin: 1rem 0; }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% for line in page.text %}<p>{{ line }}</p>
{% endfor %}
{%- for section in page.sections %}
<h2>{{ section.title }}</h2>
{% for line in section.text %}<p>{{ line }}</p>
{% endfor %}
{%- for table in section.tables %}
<h3>{{ table.title }}</h3>
{% if table.rows %}<div class="wide"><table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if cell == gap %} class="gap"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>{% else %}<p class="gap">{{ nothing }}</p>{% endif %}
{% for note in table.notes %}<p class="note">{{ note }}</p>
{% endfor %}
{%- endfor %}
{%- for chart in section.charts %}
<figure>
<h3>{{ chart.title }}</h3>
{% if chart.svg %}{{ chart.svg | safe }}{% endif %}
{% if chart.caption %}<figcaption{% if not chart.svg %} class="gap"{% endif %}>{{ chart.caption }}</figcaption>
{% endif %}</figure>
{% endfor %}
{%- endfor %}
</body>
</html>
"""


def html(page: Page) -> str:
    """One file: style and drawings inside, no script, nothing fetched."""
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(page=page, gap=GAP, nothing=NOTHING) + "\n"


def markdown(page: Page) -> str:
    """The text and the tables; charts show what those hold."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: Page) -> Iterator[str]:
    yield f"# {page.title}"
    for line in page.text:
        yield from ("", line)
    for section in page.sections:
        yield from ("", f"## {section.title}")
        for line in section.text:
            yield from ("", line)
        for table in section.tables:
            yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"### {table.title}", "")
    if not table.rows:
        yield NOTHING
    else:
        yield _row(table.columns)
        yield _row(["---"] * len(table.columns))
        yield from map(_row, table.rows)
    for note in table.notes:
        yield from ("", note)


def _row(cells: object) -> str:
    assert isinstance(cells, list | tuple)
    return f"| {' | '.join(str(cell).replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"
