"""What W&B has written of a run, read back from its .wandb file: LevelDB's log format around protobuf messages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, HEADER = 32 * 1024, 7, struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = range(1, 5)


def messages(path: Path) -> Iterator[Any]:
    """Every whole message of the file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), FILE_HEADER, b""
    assert content[:4] == b":W&B"
    while position + HEADER.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:  # the end of a block is filled up
            position += left
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        part = content[position + HEADER.size : position + HEADER.size + length]
        position += HEADER.size + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def read_run(folder: Path) -> dict[str, Any]:
    """config, history (a dict a row), summary, tables by name, the exit code or None, and images by name."""
    (path,) = folder.glob("**/offline-run-*/run-*.wandb")
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "tables": {}, "images": {}, "exit": None}
    for message in messages(path):
        kind = message.WhichOneof("record_type")
        if kind == "run":
            found["run"] = message.run
            found["config"] |= _items(message.run.config.update)
        elif kind == "config":
            found["config"] |= _items(message.config.update)
        elif kind == "history":
            found["history"].append(_items(message.history.item))
        elif kind == "summary":
            found["summary"] |= _items(message.summary.update)
        elif kind == "exit":
            found["exit"] = message.exit.exit_code
    for row in found["history"]:
        for name, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "table-file":
                found["tables"][name] = json.loads((path.parent / "files" / value["path"]).read_text())
            elif isinstance(value, dict) and value.get("_type") == "image-file":
                found["images"][name] = path.parent / "files" / value["path"]
    return found


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *above, name = item.nested_key or [item.key]
        place = found
        for key in above:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return found
