#!/bin/sh
# Answers without a look at its envelope.
echo '{"ok":true,"result":"unread"}'
