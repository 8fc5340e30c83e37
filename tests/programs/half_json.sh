#!/bin/sh
# Stops in the middle of its reply.
printf '{"ok":true,"result":[1,2'
