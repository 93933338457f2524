"""TFRecord files and `tf.train.Example` messages, as TensorFlow defines them, without TensorFlow.

A record is framed as uint64 length, masked crc32c of the length, data, masked crc32c of the data,
all little endian (tensorflow/core/lib/io/record_writer.h). A length is used only after its checksum was
checked, and never allocates more than the file holds.
"""

from __future__ import annotations

import functools
import struct
from typing import BinaryIO

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, text_format

from spinmeround_jax.files import InputError

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAME_OVERHEAD = _HEADER.size + _CRC.size  # bytes added to the data of each record

REPAIR = (
    "restore the shard, or delete it with its .index.npz and write it again "
    "(in training, data.skip_corrupt = True counts and skips such records)"
)


def masked_crc(data: bytes) -> int:
    """Rotated and offset crc32c, as in TensorFlow's crc32c.h."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """The bytes of one TFRecord holding `data`."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _CRC.pack(masked_crc(length)), data, _CRC.pack(masked_crc(data))))


def read_frame(file: BinaryIO, file_size: int, offset: int, where: str) -> bytes:
    """The data of the record framed at byte `offset` of `file`, which holds `file_size` bytes.

    Raises:
        InputError: starting with `where`, if the frame is cut or a checksum is wrong.
    """
    available = file_size - offset - FRAME_OVERHEAD
    if offset < 0 or available < 0:
        raise InputError(f"{where}: the file is truncated at {file_size} bytes; {REPAIR}")
    file.seek(offset)
    header = file.read(_HEADER.size)
    length, length_crc = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if masked_crc(header[:8]) != length_crc:
        raise InputError(f"{where}: wrong checksum of the record length; {REPAIR}")
    if length > available:  # before read() allocates it
        raise InputError(
            f"{where}: the record claims {length} bytes but {available} are left, "
            f"the file is truncated or damaged; {REPAIR}"
        )
    data, footer = file.read(length), file.read(_CRC.size)
    if _CRC.pack(masked_crc(data)) != footer:
        raise InputError(f"{where}: wrong checksum of the record data; {REPAIR}")
    return data


def compression(head: bytes) -> str | None:
    """TensorFlow's compression of a file that begins with these 12 bytes, if any."""
    if len(head) < 12 or masked_crc(head[:8]) == int.from_bytes(head[8:], "little"):
        return None  # the length of a record
    if head.startswith(b"\x1f\x8b\x08"):
        return "GZIP"
    # RFC 1950: deflate with a window of at most 32 KiB, and a header divisible by 31.
    if head[0] & 0x0F == 8 and head[0] >> 4 <= 7 and int.from_bytes(head[:2], "big") % 31 == 0:
        return "ZLIB"
    return None


_EXAMPLE = """
name: "spinmeround_jax/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: ".tensorflow.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: ".tensorflow.Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type_name: ".tensorflow.Feature" }
  }
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: ".tensorflow.Features.FeatureEntry" }
}
message_type { name: "Example" field { name: "features" number: 1 type_name: ".tensorflow.Features" } }
"""


@functools.cache
def example_class() -> type[message.Message]:
    """The message class of tensorflow/core/example/example.proto and feature.proto.

    It has a descriptor pool of its own, so that TensorFlow can be imported in the same process.
    """
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
