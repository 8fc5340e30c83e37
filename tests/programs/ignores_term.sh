#!/bin/bash
# Will not be asked to stop. Writes a line to the FIFO that the payload names when it has begun.
trap '' TERM
envelope=$(cat)
fifo=${envelope#*\"started\":\"}
echo started > "${fifo%%\"*}"
while :; do sleep 1000; done
