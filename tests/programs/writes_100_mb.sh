#!/bin/sh
# Writes 100 MiB of nothing.
exec head -c 104857600 /dev/zero
