#!/bin/sh
# Fails after it has written a value that is no protocol reply.
echo '{"half_done":[1,2]}'
exit 3
