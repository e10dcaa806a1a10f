#!/bin/sh
# Generates the gRPC code from everstep.proto. The result is checked in; a test compares it.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --python_out="${1:-.}" --pyi_out="${1:-.}" --grpc_python_out="${1:-.}" everstep.proto
sed -i 's/^import everstep_pb2/from . import everstep_pb2/' "${1:-.}/everstep_pb2_grpc.py"
