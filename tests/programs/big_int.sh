#!/bin/sh
# Writes a whole number beyond 2^53.
echo '{"ok":true,"result":9007199254740993}'
