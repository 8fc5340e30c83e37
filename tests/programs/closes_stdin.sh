#!/bin/sh
# Closes stdin before anything else.
exec 0<&-
echo '{"ok":true,"result":"stdin closed"}'
