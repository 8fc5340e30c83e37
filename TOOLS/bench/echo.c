/* The echo program in C: one JSON object in, its "payload" out (the whole object where it has none).
 * It comes on stdin, or in the variable REQUEST_BODY from servers that give a program no stdin. CGI wants a header before
 * the answer (RFC 3875, 6.2). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LIMIT = 1 << 20 };
static char text[LIMIT + 1];

/* Length of the JSON object at `start`: up to the brace that closes it, braces in strings not counted. */
static size_t object_length(const char *start) {
    int depth = 0, quoted = 0;
    for (const char *c = start; *c; c++) {
        if (quoted) {
            if (*c == '\\' && c[1]) c++;
            else if (*c == '"') quoted = 0;
        } else if (*c == '"') quoted = 1;
        else if (*c == '{') depth++;
        else if (*c == '}' && --depth == 0) return (size_t)(c - start) + 1;
    }
    return strlen(start);
}

int main(void) {
    const char *body = getenv("REQUEST_BODY");
    if (body) strncpy(text, body, LIMIT);
    else text[fread(text, 1, LIMIT, stdin)] = '\0';
    const char *found = strstr(text, "\"payload\":{");
    const char *payload = found ? found + strlen("\"payload\":") : text;
    if (getenv("GATEWAY_INTERFACE")) printf("Content-Type: application/json\n\n");
    printf("{\"ok\":true,\"result\":%.*s}", (int)object_length(payload), payload);
    return 0;
}
