#!/bin/sh
# Writes what Python's json module writes, and JSON does not have.
echo '{"ok":true,"result":NaN}'
