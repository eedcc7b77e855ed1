"""One JSON value, or why its bytes are none."""

import json
import re
from typing import Any

import orjson

from preprocess_data.readers.encoding import why_not_utf8
from preprocess_data.readers.records import InvalidRecord, quote

MAX_DIGITS = 4000  # of an integer; the time to parse one is quadratic
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_record(data: bytes) -> Any:
    """A JSON value, or an `InvalidRecord`.

    NaN and infinities, which JSON does not have, are read as null, and so are integers of more than MAX_DIGITS.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    if b"\0" in data:
        return InvalidRecord("NUL bytes", quote(data))
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=lambda name: None, parse_int=_parse_int)
        if _SURROGATE_ESCAPE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError:
        reason = why_not_utf8(data)
    except UnicodeEncodeError:  # Python reads it, the standard forbids it
        reason = "lone surrogate"
    except RecursionError:
        reason = "nested too deep"
    except ValueError:
        reason = "broken JSON"
    return InvalidRecord(reason, quote(data))


def _parse_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= MAX_DIGITS else None
