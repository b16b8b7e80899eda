from array import array

from torch import Tensor

def unchanged(
    tensors: list[Tensor], offset: int, implementations: array[int], addresses: array[int], data_ptr: int
) -> bool: ...
