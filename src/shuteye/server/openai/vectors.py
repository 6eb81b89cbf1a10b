"""How vectors are written into an answer: as numbers, as base64, or as bytes, which a header tells apart.

The formats, dtypes and the header are vLLM's.
"""

from __future__ import annotations

import json
import sys
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel

from shuteye.errors import InvalidRequest
from shuteye.tasks.pool.requests import EmbeddingOutput, EmbedDtype

MAX_METADATA_BYTES = 60_000
"""Of the header beside bytes: clients take no lines of more than 64 kB."""

_TYPECODES: Mapping[int, str] = {1: "B", 2: "H", 4: "I"}
_SIZES: Mapping[EmbedDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


class VectorFields(BaseModel):
    """The fields that say how; `embed_dtype` and `endianness` are about base64 and bytes."""

    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] | None = None
    embed_dtype: EmbedDtype | None = None
    endianness: Literal["native", "big", "little"] | None = None

    @property
    def dtype(self) -> EmbedDtype:
        """What the engine is to give."""
        return "float32" if self.encoding_format in {None, "float"} else self.embed_dtype or "float32"

    @property
    def is_binary(self) -> bool:
        """Whether the body of the answer is the vectors themselves."""
        return self.encoding_format in {"bytes", "bytes_only"}

    def written(self, vector: EmbeddingOutput) -> list[float] | str:
        """One vector in JSON."""
        return b64encode(self._ordered(vector)).decode() if self.encoding_format == "base64" else vector.embedding

    def binary(self, vectors: Sequence[EmbeddingOutput], about: Mapping[str, Any]) -> Response:
        """All vectors, one after the other.

        Args:
            about: what the header says beside where each of them lies.

        Raises:
            InvalidRequest: the header would be too large.
        """
        rows = [self._ordered(each) for each in vectors]
        headers = None if self.encoding_format == "bytes_only" else {"metadata": self._metadata(rows, about)}
        return Response(b"".join(rows), headers=headers, media_type="application/octet-stream")

    def _metadata(self, rows: Sequence[bytes], about: Mapping[str, Any]) -> str:
        data, end = [], 0
        for index, row in enumerate(rows):
            start, end = end, end + len(row)
            data.append(
                {
                    "index": index,
                    "embed_dtype": self.dtype,
                    "endianness": self.endianness or "native",
                    "start": start,
                    "end": end,
                    "shape": [len(row) // _SIZES[self.dtype]],
                }
            )
        text = json.dumps({**about, "data": data})
        if len(text) > MAX_METADATA_BYTES:
            raise InvalidRequest(
                f"The header that says where each of {len(rows):,} vectors lies would have {len(text):,} bytes, more "
                "than clients take. Ask for 'bytes_only', or send fewer inputs.",
                param="encoding_format",
            )
        return text

    def _ordered(self, vector: EmbeddingOutput) -> bytes:
        if (self.endianness or "native") in {"native", sys.byteorder}:
            return vector.data
        numbers = array(_TYPECODES[_SIZES[vector.dtype]], vector.data)
        numbers.byteswap()
        return numbers.tobytes()
