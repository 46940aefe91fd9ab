"""Where figures come from, in one line: for every picture and page."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from prunekit import __version__
from prunekit.report import numbers


def made_by() -> dict[str, str]:
    """Return the version and today's date, for documents."""
    return {"prunekit": __version__, "date": datetime.date.today().isoformat()}


def made() -> str:
    """Return the version and today's date, for people."""
    return "prunekit {prunekit}, {date}".format(**made_by())


def measured_on(data: str | None, split: str, images: int, seeds: Sequence[int] = ()) -> str:
    """Return the images that figures were measured on, and the seeds of what was measured."""
    what = f"{numbers.counted(images, 'image')} of {data} ({split})" if data is not None else "no images"
    drawn = ", ".join(map(str, seeds))
    return "; ".join(filter(None, (what, drawn and f"seed{'s' if len(seeds) > 1 else ''} {drawn}")))
