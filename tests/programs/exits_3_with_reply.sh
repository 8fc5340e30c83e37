#!/bin/sh
# Fails, and yet sends a protocol reply.
echo '{"ok":false,"error":"no such model"}'
exit 3
