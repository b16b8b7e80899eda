"""One rank in rounds and tasks: what it answers to each of the hub's messages."""
