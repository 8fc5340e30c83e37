/* Wraps the envelope in a protocol reply, in C. */
#include <stdio.h>

int main(void) {
    static char buffer[65536];
    size_t size;

    fputs("{\"ok\":true,\"result\":", stdout);
    while ((size = fread(buffer, 1, sizeof buffer, stdin)) > 0)
        fwrite(buffer, 1, size, stdout);
    fputs("}\n", stdout);
    return 0;
}
