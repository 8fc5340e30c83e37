#!/bin/sh
# Fails without a word on stdout.
echo "it broke" >&2
exit 1
