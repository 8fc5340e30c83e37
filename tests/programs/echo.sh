#!/bin/bash
# Wraps the envelope in a protocol reply, in bash.
printf '{"ok":true,"result":'
cat
printf '}\n'
