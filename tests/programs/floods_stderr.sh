#!/bin/sh
# Writes 4 MiB of log between two words, then a reply.
echo "first words" >&2
head -c 4194304 /dev/zero | tr '\0' 'x' >&2
echo "last words" >&2
echo '{"ok":true,"result":1}'
