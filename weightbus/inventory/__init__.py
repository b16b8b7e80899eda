"""All that a model computes with: which tensors an update feeds, and which it does not."""
