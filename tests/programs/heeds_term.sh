#!/bin/bash
# Tidies up when it is asked to stop. Writes a line to the FIFO that the payload names when it has begun.
trap 'echo "tidied up" >&2; exit 0' TERM
envelope=$(cat)
fifo=${envelope#*\"started\":\"}
echo started > "${fifo%%\"*}"
sleep 1000 & wait
