"""The hub: one process that all ranks talk to. It decides rounds, and never sees a weight. No torch."""
