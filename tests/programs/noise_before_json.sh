#!/bin/sh
# Chats on stdout before its reply.
echo 'loading [model] ...'
echo 'done.'
echo '{"ok":true,"result":"after the noise"}'
