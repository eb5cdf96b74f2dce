"""The files of one experiment's results: the record, and what is made from it."""

from __future__ import annotations

import logging
from pathlib import Path

from fastdml.errors import MissingExtra
from fastdml.files import write_atomically, writing
from fastdml.reproduce.plots import draw, out_of_date
from fastdml.reproduce.record import RECORD, Record, write_record
from fastdml.reproduce.tables import comma_separated, markdown

logger = logging.getLogger(__name__)

TABLE, CSV = "table.md", "table.csv"


def write_results(folder: Path, record: Record) -> list[Path]:
    """Writes reproduction.json, table.md, table.csv and the pictures into `folder`, which is made;
    pictures only where matplotlib is installed. One that the record has nothing for goes. Returns
    the paths. Raises InputError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / RECORD, record)
    write_atomically(folder / TABLE, markdown(record))
    write_atomically(folder / CSV, comma_separated(record))
    paths = [folder / name for name in (RECORD, TABLE, CSV)]
    with writing(folder):
        for path in out_of_date(folder, record):
            path.unlink(missing_ok=True)
    try:
        paths += draw(folder, record)
    except MissingExtra as missing:
        logger.warning("no pictures: %s", missing)
    return paths
