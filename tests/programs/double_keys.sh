#!/bin/sh
# Says one thing twice.
echo '{"ok":true,"ok":false}'
