#!/bin/sh
# Dies as a C program with a bad pointer does.
kill -SEGV $$
