"""Whether a site's tokens are a picture: its grid and prefix account for all of them."""

from __future__ import annotations

from .site import Site


def off_grid(site: Site, slug: str, *, prefix: bool = True) -> str | None:
    """Why a mechanism that needs a grid of the tokens finds none here, or None; without `prefix`, pixels alone fit."""
    grid = site.grid
    if grid is None:
        return f"{slug} needs the tokens' grid, which is not known here: give grid=(h, w) or (h, w, prefix)"
    if grid.prefix and not prefix:
        return f"{slug} has no place for the {grid.prefix} prefix tokens of this site's grid"
    tokens = grid.prefix + grid.h * grid.w
    if site.queries.isdigit() and tokens != int(site.queries):
        return f"{slug}: {site.queries} tokens are not a grid of {grid.h} x {grid.w} with {grid.prefix} before it"
    return None
