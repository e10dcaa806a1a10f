#!/bin/sh
# Generates the gRPC code from the .proto files. The result is checked in; a test compares it.
set -eu
cd "$(dirname "$0")"
out=${1:-.}
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    everstep.proto rendezvous.proto
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" telemetry.proto
sed -i 's/^import \(everstep\|rendezvous\|telemetry\)_pb2/from . import \1_pb2/' "$out"/everstep_pb2*.py* "$out"/rendezvous_pb2*.py* "$out"/telemetry_pb2.py*
