// JSON as the manifest and the host's requests have it: UTF-8, no key twice, at most 128 deep.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum json_kind { J_NULL, J_BOOL, J_INT, J_FLOAT, J_TEXT, J_LIST, J_OBJECT };

struct json {
    enum json_kind kind;
    bool truth;
    bool fits;       // of J_INT: `integer` is exact
    int64_t integer; // of J_INT
    double number;   // of J_INT and J_FLOAT
    char *text;      // of J_TEXT, and the digits of J_INT; ends with a zero
    size_t length;   // of text, list or object
    struct json *items;
    struct json *keys; // J_TEXTs of an object, beside `items`
};

struct json *json_parse(const char *bytes, size_t size); // fails with UNUSABLE
struct json *json_get(const struct json *object, const char *key); // NULL without it
const char *json_kind_name(const struct json *value);

// What a request must have; fails with UNUSABLE.
const char *json_text(const struct json *object, const char *key);
int64_t json_integer(const struct json *object, const char *key);
// With a default where it is missing or null.
const char *json_text_or(const struct json *object, const char *key, const char *otherwise);
double json_number_or(const struct json *object, const char *key, double otherwise);
bool json_truth(const struct json *object, const char *key);
