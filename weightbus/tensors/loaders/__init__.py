"""An engine's own loading code, and what it would write, traced to boxes."""
