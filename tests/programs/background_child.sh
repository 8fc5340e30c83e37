#!/bin/bash
# Leaves a child of its own group behind, which holds stdout.
sleep 1000 &
echo '{"ok":true,"result":"left"}'
