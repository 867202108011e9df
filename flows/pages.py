"""Pages from templates of this folder; what is filled in is escaped where the page is HTML."""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render(template: str, **facts: Any) -> str:
    """A page, its template being `flows/TEMPLATE.jinja`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=not template.endswith(".md"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.jinja").render(**facts)
