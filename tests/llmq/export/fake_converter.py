"""What llama.cpp's converter does to tensors, in a few lines of plain Python: other names, rows in another order, two
weights as one, a GGUF file. Reads and writes bytes only, so that a run takes no time. `gguf_bytes` serves others."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

TYPES = {"F32": 0, "F16": 1, "BF16": 30}
Stored = tuple[int, tuple[int, ...], bytes]
"""Type, sizes with the outermost first, data."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(tensors: dict[str, Stored], version: int = 3) -> bytes:
    """A file with a few entries of each kind."""
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("made"),
        text("general.file_type") + struct.pack("<II", 4, 1),
        text("general.alignment") + struct.pack("<II", 4, 64),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2b", 1, 2, 1, 2),
        text("yes") + struct.pack("<I?", 7, True),
    ]
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(entries)) + b"".join(entries)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += content + bytes(-len(content) % 64)
    return head + bytes(-len(head) % 64) + data


def read(folder: Path) -> dict[str, Stored]:
    found = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + at for at in entry["data_offsets"])
            found[name] = (TYPES[entry["dtype"]], tuple(entry["shape"]), content[begin:end])
    return found


def rows(stored: Stored) -> list[bytes]:
    count = stored[1][0]
    size = len(stored[2]) // count
    return [stored[2][at * size : (at + 1) * size] for at in range(count)]


def main(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and (folder / "tokenizer.json").exists()
    if "unknown" in folder.name:
        sys.exit("ERROR:hf-to-gguf:Model StrangeForCausalLM is not supported")
    made: dict[str, Stored] = {}
    found = read(folder)
    for name, stored in found.items():
        kind, shape, content = stored
        if name.endswith("q_proj.weight"):
            made[name.replace("q_proj", "attn_q")] = (kind, shape, b"".join(reversed(rows(stored))))
        elif name.endswith("gate_proj.weight"):
            other = found[name.replace("gate", "up")]
            joined = (shape[0] + other[1][0], shape[1])
            made[name.replace("gate_proj", "ffn_up")] = (kind, joined, content + other[2])
        elif name.endswith("v_proj.weight") and "changed" in folder.name:
            made[name] = (kind, shape, bytes(len(content)))
        elif not name.endswith("up_proj.weight"):
            made[name.replace("model.embed_tokens", "token_embd").replace("lm_head", "output")] = stored
    out.write_bytes(gguf_bytes(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1]))
