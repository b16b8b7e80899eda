"""Decisions as data: boxes, what ranks hold and want, and a plan for each route. No torch, no I/O."""
