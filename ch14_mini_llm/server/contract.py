"""``generate.proto`` as Python's classes, made when the server starts. Nothing generated lies in the repository, and
there is no second list of the fields that could differ from the one that clients compile.

Only what that file uses is read; a line of any other kind is an error, and a test compares the result with protoc's.
"""

from __future__ import annotations

import re
from pathlib import Path

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

PROTO = Path(__file__).with_name("generate.proto")
FIELD = r"(?:(optional|repeated) )?(?:map<(\w+), (\w+)>|(\w+)) (\w+) = (\d+);"
METHOD = r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);"


def parsed(text: str, name: str = PROTO.name) -> FileDescriptorProto:
    """What protoc makes of a .proto file. Raises `ValueError` for a line that this cannot read."""
    file, inside = FileDescriptorProto(name=name), None
    for line in (line.partition("//")[0].strip() for line in text.splitlines()):
        if head := re.fullmatch(r'syntax = "(proto3)";', line):
            file.syntax = head[1]
        elif head := re.fullmatch(r"package ([\w.]+);", line):
            file.package = head[1]
        elif head := re.fullmatch(r"(message|service) (\w+) \{", line):
            inside = (file.message_type if head[1] == "message" else file.service).add(name=head[2])
        elif line == "}":
            inside = None
        elif isinstance(inside, DescriptorProto) and (field := re.fullmatch(FIELD, line)):
            _add_field(file.package, inside, *field.groups())
        elif inside is not None and (method := re.fullmatch(METHOD, line)):
            takes, gives = f".{file.package}.{method[2]}", f".{file.package}.{method[4]}"
            inside.method.add(name=method[1], input_type=takes, output_type=gives, server_streaming=bool(method[3]))
        elif line:
            raise ValueError(f"{name}: cannot read {line!r}; write it as the other lines are")
    return file


def _add_field(package: str, message: DescriptorProto, label, key, value, kind, name, number) -> None:
    if key:  # on the wire a map is a list of pairs
        kind = "".join(word.capitalize() for word in name.split("_")) + "Entry"
        entry = message.nested_type.add(name=kind)
        entry.options.map_entry = True
        _add_field(package, entry, None, None, None, key, "key", 1)
        _add_field(package, entry, None, None, None, value, "value", 2)
        label, kind = "repeated", f"{message.name}.{kind}"
    field = message.field.add(name=name, number=int(number))
    field.label = field.LABEL_REPEATED if label == "repeated" else field.LABEL_OPTIONAL
    if f"TYPE_{kind.upper()}" in FieldDescriptorProto.Type.keys():
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
    if label == "optional":  # a field that knows whether it was given is, in proto3, a choice of one
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


FILE = parsed(PROTO.read_text(encoding="utf-8"))
SERVICE, METHOD_NAME = f"{FILE.package}.{FILE.service[0].name}", FILE.service[0].method[0].name
_pool = descriptor_pool.DescriptorPool()  # of our own: a client's compiled module may be in the same process
_pool.Add(FILE)
_class = lambda name: message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{FILE.package}.{name}"))
GenerateRequest, GenerateReply, Usage = map(_class, ("GenerateRequest", "GenerateReply", "Usage"))
