"""The weight routes of engines over HTTP."""
