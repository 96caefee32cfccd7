"""Seeing a rewrite: one view of plain values, and writers that read it as page, picture, table and JSON."""
