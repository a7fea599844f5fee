// A text that grows, and JSON written into it.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct text {
    char *bytes; // ends with a zero
    size_t length, room;
};

void text_add(struct text *text, const char *bytes, size_t length);
void text_format(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Values; `null` for what JSON has no number for, and for a NULL string.
void text_json_string(struct text *text, const char *value);
void text_json_number(struct text *text, double value); // the shortest that reads back the same
// ", " unless at the start of an object or list; then "name": if there is one.
void text_json_key(struct text *text, const char *name);
void text_json_member(struct text *text, const char *name, const char *value);
void text_json_member_number(struct text *text, const char *name, double value);
void text_json_member_integer(struct text *text, const char *name, int64_t value);
void text_json_member_truth(struct text *text, const char *name, bool value);
