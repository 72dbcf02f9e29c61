"""What all bodies of requests are made of: strict types, and lists that are read only as far as
they are right."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Item = TypeVar("Item")
# Read up to the first entry that is wrong: telling millions of them apart would stop all streams.
Many = Annotated[list[Item], Field(fail_fast=True)]
Ids = Annotated[Many[int], Field(max_length=2**20)]


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("message", message)
