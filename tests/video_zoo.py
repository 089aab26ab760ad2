"""Small video pipelines of every supported kind; see zoo.py."""

from zoo import Row

ROWS: dict[str, Row] = {}
