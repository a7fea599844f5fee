#include "text.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

static void reserve(struct text *text, size_t more) {
    if (text->length + more + 1 <= text->room)
        return;
    size_t room = text->room ? text->room : 256;
    while (room < text->length + more + 1)
        room *= 2;
    char *bytes = take(room);
    if (text->length)
        memcpy(bytes, text->bytes, text->length);
    text->bytes = bytes;
    text->room = room;
}

void text_add(struct text *text, const char *bytes, size_t length) {
    reserve(text, length);
    memcpy(text->bytes + text->length, bytes, length);
    text->length += length;
    text->bytes[text->length] = 0;
}

void text_format(struct text *text, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, args);
    reserve(text, (size_t)length);
    vsnprintf(text->bytes + text->length, (size_t)length + 1, format, again);
    text->length += (size_t)length;
    va_end(args);
    va_end(again);
}

// Bytes of the character that begins here, 0 if it is none in UTF-8.
static size_t character(const unsigned char *p) {
    size_t more = *p < 0x80 ? 0 : *p >= 0xc2 && *p < 0xe0 ? 1 : (*p & 0xf0) == 0xe0 ? 2
                  : *p >= 0xf0 && *p < 0xf5 ? 3 : 4;
    if (more == 4 || (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
        (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    for (size_t i = 1; i <= more; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return more + 1;
}

void text_json_string(struct text *text, const char *value) {
    if (!value) {
        text_add(text, "null", 4);
        return;
    }
    text_add(text, "\"", 1);
    for (const char *p = value; *p; p++) {
        unsigned char c = (unsigned char)*p;
        size_t length = character((const unsigned char *)p);
        if (c == '"' || c == '\\')
            text_format(text, "\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            text_format(text, "\\u%04x", c);
        else if (!length)
            text_add(text, "?", 1); // of a text that was cut, or in another encoding
        else {
            text_add(text, p, length);
            p += length - 1;
        }
    }
    text_add(text, "\"", 1);
}

void text_json_number(struct text *text, double value) {
    char shown[40];
    if (!isfinite(value)) {
        text_add(text, "null", 4);
        return;
    }
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(shown, sizeof shown, "%.*g", digits, value);
        if (strtod(shown, NULL) == value)
            break;
    }
    // a number of a kind that has fractions says so, as in Python
    if (!strpbrk(shown, ".e"))
        strcat(shown, ".0");
    text_add(text, shown, strlen(shown));
}

void text_json_key(struct text *text, const char *name) {
    if (text->length && !strchr("[{\n", text->bytes[text->length - 1]))
        text_add(text, ", ", 2);
    if (name) {
        text_json_string(text, name);
        text_add(text, ": ", 2);
    }
}

void text_json_member(struct text *text, const char *name, const char *value) {
    text_json_key(text, name);
    text_json_string(text, value);
}

void text_json_member_number(struct text *text, const char *name, double value) {
    text_json_key(text, name);
    text_json_number(text, value);
}

void text_json_member_integer(struct text *text, const char *name, int64_t value) {
    text_json_key(text, name);
    text_format(text, "%lld", (long long)value);
}

void text_json_member_truth(struct text *text, const char *name, bool value) {
    text_json_key(text, name);
    text_format(text, "%s", value ? "true" : "false");
}
