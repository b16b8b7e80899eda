"""grid61: a digest that shards add up to (docs/digest.md).

``grid61`` holds the definition's integers, ``reference`` the readable implementation, ``cpu`` and ``cuda``
the fast ones over the same ``segments``; ``digester`` chooses between them.
"""

from weightbus.digest.digester import Digester, model_digest, sub_part, tensor_digest, why_not_copied
from weightbus.digest.fold import NameKeys, fold, fold_with
from weightbus.digest.grid61 import STABLE_SEED, Digest, P, combine, model_digest_of

__all__ = [
    "STABLE_SEED",
    "Digest",
    "Digester",
    "NameKeys",
    "P",
    "combine",
    "fold",
    "fold_with",
    "model_digest",
    "model_digest_of",
    "sub_part",
    "tensor_digest",
    "why_not_copied",
]
