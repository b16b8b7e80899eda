"""Where bytes lie, and how they are copied: shards, streams, copy kernels, memory of other processes."""
