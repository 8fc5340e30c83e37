echo '"over /dev/stdout"' > /dev/stdout
