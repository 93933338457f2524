"""TFRecord files and `tf.train.Example` messages, as TensorFlow defines them, without TensorFlow.

A record is framed as uint64 length, masked crc32c of the length, data, masked crc32c of the data,
all little endian (tensorflow/core/lib/io/record_writer.h). Reading trusts no length before its
checksum and never allocates more than the file holds.
"""

from __future__ import annotations

import functools
import struct
from typing import BinaryIO

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

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
    if len(header) != _HEADER.size:
        raise InputError(f"{where}: the file became shorter while it was read; {REPAIR}")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise InputError(f"{where}: wrong checksum of the record length; {REPAIR}")
    if length > available:  # before read() allocates it
        raise InputError(
            f"{where}: the record claims {length} bytes but {available} are left, "
            f"the file is truncated or damaged; {REPAIR}"
        )
    data = file.read(length)
    footer = file.read(_CRC.size)
    if len(data) != length or len(footer) != _CRC.size:
        raise InputError(f"{where}: the file became shorter while it was read; {REPAIR}")
    if masked_crc(data) != _CRC.unpack(footer)[0]:
        raise InputError(f"{where}: wrong checksum of the record data; {REPAIR}")
    return data


def compression(head: bytes) -> str | None:
    """How TensorFlow compressed a file that begins with these 12 bytes, if it did."""
    if len(head) < 12 or masked_crc(head[:8]) == int.from_bytes(head[8:], "little"):
        return None  # a record's length
    if head.startswith(b"\x1f\x8b\x08"):
        return "GZIP"
    # RFC 1950: deflate with a window of at most 32 KiB, and a header that 31 divides.
    if head[0] & 0x0F == 8 and head[0] >> 4 <= 7 and int.from_bytes(head[:2], "big") % 31 == 0:
        return "ZLIB"
    return None


@functools.cache
def example_class() -> type[message.Message]:
    """The message class of tensorflow/core/example/example.proto and feature.proto.

    Declared here, in a descriptor pool of its own, so that TensorFlow may live in the same process.
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="spinmeround_jax/example.proto", package="tensorflow", syntax="proto3"
    )

    def declare(parent: descriptor_pb2.DescriptorProto, name: str, number: int, kind: int | str,
                repeated: bool = False, **more: int) -> None:  # fmt: skip
        typed = {"type_name": kind, "type": kinds.TYPE_MESSAGE} if isinstance(kind, str) else {}
        label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        parent.field.add(name=name, number=number, label=label, **(typed or {"type": kind}), **more)

    scalars = {"Bytes": kinds.TYPE_BYTES, "Float": kinds.TYPE_FLOAT, "Int64": kinds.TYPE_INT64}
    for name, kind in scalars.items():
        declare(file.message_type.add(name=f"{name}List"), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(scalars, 1):
        type_name = f".tensorflow.{name}List"
        declare(feature, f"{name.lower()}_list", number, type_name, oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")  # map<string, Feature>
    entry.options.map_entry = True
    declare(entry, "key", 1, kinds.TYPE_STRING)
    declare(entry, "value", 2, ".tensorflow.Feature")
    declare(features, "feature", 1, ".tensorflow.Features.FeatureEntry", repeated=True)
    declare(file.message_type.add(name="Example"), "features", 1, ".tensorflow.Features")

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
