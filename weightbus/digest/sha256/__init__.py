"""SHA-256 of tensors and modules, also of those that lie in shards on several ranks."""
