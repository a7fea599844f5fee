#include "json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fail.h"
#include "memory.h"

enum { MAX_DEPTH = 128, MAX_DIGITS = 20 };

struct reader {
    const char *at, *end;
    int depth;
};

static _Noreturn void wrong(const char *why) { fail(UNUSABLE, "not JSON: %s", why); }

static void check_utf8(const unsigned char *p, const unsigned char *end) {
    while (p < end) {
        int more = *p < 0x80 ? 0 : *p >= 0xc2 && *p < 0xe0 ? 1 : (*p & 0xf0) == 0xe0 ? 2
                   : *p >= 0xf0 && *p < 0xf5 ? 3 : -1;
        if (more < 0 || end - p <= more)
            wrong("it is not UTF-8");
        for (int i = 1; i <= more; i++)
            if ((p[i] & 0xc0) != 0x80)
                wrong("it is not UTF-8");
        if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
            (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
            wrong("it is not UTF-8");
        p += more + 1;
    }
}

static void blanks(struct reader *in) {
    while (in->at < in->end && strchr(" \t\r\n", *in->at) && *in->at)
        in->at++;
}

static char peek(struct reader *in) {
    blanks(in);
    return in->at < in->end ? *in->at : 0;
}

static void word(struct reader *in, const char *wanted) {
    size_t length = strlen(wanted);
    if ((size_t)(in->end - in->at) < length || memcmp(in->at, wanted, length))
        wrong("an unknown word");
    in->at += length;
}

static unsigned four_digits(struct reader *in) {
    unsigned found = 0;
    if (in->end - in->at < 4)
        wrong("an escape ends early");
    for (int i = 0; i < 4; i++) {
        char c = *in->at++;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0)
            wrong("an escape without four digits");
        found = found * 16 + (unsigned)digit;
    }
    return found;
}

static char *put_utf8(char *out, unsigned code) {
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xc0 | code >> 6);
        *out++ = (char)(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        *out++ = (char)(0xe0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 0x3f));
        *out++ = (char)(0x80 | (code & 0x3f));
    } else {
        *out++ = (char)(0xf0 | code >> 18);
        *out++ = (char)(0x80 | (code >> 12 & 0x3f));
        *out++ = (char)(0x80 | (code >> 6 & 0x3f));
        *out++ = (char)(0x80 | (code & 0x3f));
    }
    return out;
}

static char *escaped(struct reader *in, char *out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char c = in->at < in->end ? *in->at++ : 0;
    const char *found = c ? strchr(names, c) : NULL;
    if (found) {
        *out++ = values[found - names];
        return out;
    }
    if (c != 'u')
        wrong("an unknown escape");
    unsigned code = four_digits(in);
    if (code >= 0xd800 && code < 0xdc00 && in->end - in->at >= 6 && in->at[0] == '\\' &&
        in->at[1] == 'u') {
        struct reader ahead = *in;
        ahead.at += 2;
        unsigned low = four_digits(&ahead);
        if (low >= 0xdc00 && low < 0xe000) {
            *in = ahead;
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
    }
    return put_utf8(out, code);
}

static void read_text(struct reader *in, struct json *value) {
    in->at++;
    const char *stop = in->at;
    while (stop < in->end && *stop != '"')
        stop += *stop == '\\' ? 2 : 1;
    if (stop >= in->end)
        wrong("a string that does not end");
    char *out = value->text = take((size_t)(stop - in->at) + 1); // escapes only get shorter
    while (in->at < stop) {
        char c = *in->at++;
        if ((unsigned char)c < 0x20)
            wrong("a control character in a string");
        if (c == '\\')
            out = escaped(in, out);
        else
            *out++ = c;
    }
    in->at = stop + 1;
    value->kind = J_TEXT;
    value->length = (size_t)(out - value->text);
}

static bool digits(struct reader *in) {
    const char *start = in->at;
    while (in->at < in->end && *in->at >= '0' && *in->at <= '9')
        in->at++;
    return in->at > start;
}

static void read_number(struct reader *in, struct json *value) {
    const char *start = in->at;
    in->at += *in->at == '-';
    const char *first = in->at;
    if (!digits(in) || (*first == '0' && in->at - first > 1))
        wrong("an unknown word");
    value->kind = J_INT;
    if (in->at < in->end && *in->at == '.') {
        in->at++;
        value->kind = J_FLOAT;
        if (!digits(in))
            wrong("a number ends early");
    }
    if (in->at < in->end && (*in->at == 'e' || *in->at == 'E')) {
        in->at++;
        if (in->at < in->end && (*in->at == '+' || *in->at == '-'))
            in->at++;
        value->kind = J_FLOAT;
        if (!digits(in))
            wrong("a number ends early");
    }
    value->length = (size_t)(in->at - start);
    value->text = take_text(start, value->length);
    value->number = strtod(value->text, NULL);
    if (value->kind == J_INT) {
        if (value->length > MAX_DIGITS)
            wrong("a number of more than 20 digits");
        value->integer = strtoll(value->text, NULL, 10);
        value->fits = value->integer != INT64_MAX && value->integer != INT64_MIN;
    }
}

static int by_text(const void *a, const void *b) {
    const struct json *one = *(struct json *const *)a, *two = *(struct json *const *)b;
    size_t shorter = one->length < two->length ? one->length : two->length;
    int order = memcmp(one->text, two->text, shorter);
    return order ? order : (one->length > two->length) - (one->length < two->length);
}

static void refuse_twins(const struct json *object) {
    const struct json **sorted = take_array(object->length, sizeof *sorted);
    for (size_t i = 0; i < object->length; i++)
        sorted[i] = &object->keys[i];
    qsort(sorted, object->length, sizeof *sorted, by_text);
    for (size_t i = 1; i < object->length; i++)
        if (!by_text(&sorted[i - 1], &sorted[i]))
            wrong("a key appears twice in one object");
}

static void read_value(struct reader *in, struct json *value);

static void grow(struct json *value, size_t *room) {
    if (value->length < *room)
        return;
    size_t wanted = *room ? *room * 2 : 8;
    struct json *items = take_array(wanted, sizeof *items);
    if (value->length)
        memcpy(items, value->items, value->length * sizeof *items);
    value->items = items;
    if (value->kind == J_OBJECT) {
        struct json *keys = take_array(wanted, sizeof *keys);
        if (value->length)
            memcpy(keys, value->keys, value->length * sizeof *keys);
        value->keys = keys;
    }
    *room = wanted;
}

static void read_members(struct reader *in, struct json *value, char end) {
    size_t room = 0;
    in->at++;
    if (++in->depth > MAX_DEPTH)
        wrong("it is nested too deeply");
    value->kind = end == '}' ? J_OBJECT : J_LIST;
    if (peek(in) == end) {
        in->at++;
        in->depth--;
        return;
    }
    for (;;) {
        grow(value, &room);
        if (value->kind == J_OBJECT) {
            if (peek(in) != '"')
                wrong("a key that is no string");
            read_text(in, &value->keys[value->length]);
            if (peek(in) != ':')
                wrong("a key without a value");
            in->at++;
        }
        read_value(in, &value->items[value->length++]);
        char c = peek(in);
        in->at++;
        if (c == end)
            break;
        if (c != ',')
            wrong("a list or object that does not end");
    }
    in->depth--;
    if (value->kind == J_OBJECT)
        refuse_twins(value);
}

static void read_value(struct reader *in, struct json *value) {
    switch (peek(in)) {
    case '{':
        read_members(in, value, '}');
        break;
    case '[':
        read_members(in, value, ']');
        break;
    case '"':
        read_text(in, value);
        break;
    case 'n':
        word(in, "null");
        break;
    case 't':
        word(in, "true");
        value->kind = J_BOOL;
        value->truth = true;
        break;
    case 'f':
        word(in, "false");
        value->kind = J_BOOL;
        break;
    case 0:
        wrong("it ends early");
    default:
        read_number(in, value);
    }
}

struct json *json_parse(const char *bytes, size_t size) {
    struct reader in = {bytes, bytes + size, 0};
    check_utf8((const unsigned char *)bytes, (const unsigned char *)bytes + size);
    struct json *value = take(sizeof *value);
    read_value(&in, value);
    blanks(&in);
    if (in.at != in.end)
        wrong("something follows it");
    return value;
}

struct json *json_get(const struct json *object, const char *key) {
    if (object->kind != J_OBJECT)
        return NULL;
    size_t length = strlen(key);
    for (size_t i = 0; i < object->length; i++)
        if (object->keys[i].length == length && !memcmp(object->keys[i].text, key, length))
            return &object->items[i];
    return NULL;
}

const char *json_kind_name(const struct json *value) {
    static const char *const names[] = {"null", "bool", "int", "float", "str", "list", "dict"};
    return names[value->kind];
}

const char *json_text(const struct json *object, const char *key) {
    const struct json *found = json_get(object, key);
    if (!found || found->kind != J_TEXT || strlen(found->text) != found->length)
        fail(UNUSABLE, "a request without %s", key);
    return found->text;
}

int64_t json_integer(const struct json *object, const char *key) {
    const struct json *found = json_get(object, key);
    if (!found || found->kind != J_INT || !found->fits)
        fail(UNUSABLE, "a request without %s", key);
    return found->integer;
}

const char *json_text_or(const struct json *object, const char *key, const char *otherwise) {
    const struct json *found = json_get(object, key);
    return !found || found->kind == J_NULL ? otherwise : json_text(object, key);
}

double json_number_or(const struct json *object, const char *key, double otherwise) {
    const struct json *found = json_get(object, key);
    return found && (found->kind == J_INT || found->kind == J_FLOAT) ? found->number : otherwise;
}

bool json_truth(const struct json *object, const char *key) {
    const struct json *found = json_get(object, key);
    return found && found->kind == J_BOOL && found->truth;
}
