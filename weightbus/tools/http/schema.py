"""The bodies of requests and answers, as the OpenAPI page shows them.

What may be long is checked by msgspec, which stops at the first wrong value: pydantic makes an error of each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from weightbus.control import messages as m
from weightbus.storage.opened import short

MAX_FIELDS = 16


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"expected at most {MAX_FIELDS} fields, got {len(fields)}")
        return fields


def _by(kind: Any) -> PlainValidator:
    """Checks that a value is of a type that msgspec knows."""

    def check(value: Any) -> Any:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ValueError(short(error)) from error

    return PlainValidator(check)


_Name = Annotated[str, Meta(min_length=1, max_length=1024)]
_Manifest = dict[Annotated[str, Meta(max_length=1024)], Annotated[str, Meta(max_length=128)]]
_MODULES = Annotated[list[_Name], Meta(min_length=1, max_length=1024)] | None
_PAYLOADS = Annotated[list[str | dict[_Name, str]], Meta(min_length=1, max_length=4096)]
_MANIFESTS = _Manifest | Annotated[list[_Manifest], Meta(min_length=1, max_length=4096)]

Payload = str | dict[str, str]
Module = Annotated[str, Field(min_length=1, max_length=1024)]
Version = Annotated[int, Field(ge=0, lt=1 << 62)] | Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Modules = Annotated[Any, _by(_MODULES), WithJsonSchema(msgspec.json.schema(_MODULES))]
Payloads = Annotated[Any, _by(_PAYLOADS), WithJsonSchema(msgspec.json.schema(_PAYLOADS))]
Manifests = Annotated[Any, _by(_MANIFESTS), WithJsonSchema(msgspec.json.schema(_MANIFESTS))]


class UpdateFromDisk(_Body):
    """model_path: a directory that every rank can read. target_modules: null is all."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    flush_cache: bool = True
    target_modules: Modules = None
    load_format: Literal["auto", "safetensors"] | None = None
    weight_version: Version | None = None


class UpdateFromTensor(_Body):
    """serialized_named_tensors: base64 of safetensors bytes or, with the load_format ``shared``, of what
    ``weightbus.share_tensors`` makes on the ranks' host; or a map of modules to such; one for all ranks, or one
    for each. target_modules: null is the only module, or ``transformer``."""

    serialized_named_tensors: Payloads
    load_format: m.PayloadFormat | None = None
    target_modules: Modules = None
    flush_cache: bool = True
    weight_version: Version | None = None


class CheckTensors(_Body):
    """expected_named_tensors_sha256: digests by name, for all ranks; or a list of one such map, or of one for
    each rank."""

    target_module: Module
    expected_named_tensors_sha256: Manifests


class GetChecksum(_Body):
    """module_names: null is all."""

    module_names: Modules = None


class CheckWeights(_Body):
    """action: ``snapshot`` what is live, ``compare`` with the snapshot, or ``reset_tensors``, which overwrites
    all weights, so that a test can tell what an update has written."""

    action: Literal["snapshot", "compare", "reset_tensors"]


class Pause(_Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class Continue(_Body):
    pass


class Answer(BaseModel):
    success: bool
    message: str


class WeightVersion(BaseModel):
    weight_version: str | None
