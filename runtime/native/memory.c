#include "memory.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fail.h"

enum { ALIGNMENT = 64 };

struct block {
    struct block *before;
    size_t size;
};

static struct block *last;
static size_t taken;
size_t memory_limit = (size_t)8 << 30;

void *take(size_t size) {
    if (size > memory_limit || taken > memory_limit - size)
        fail(UNUSABLE, "it would take more than %zu MB of memory", memory_limit >> 20);
    size_t whole = (size + ALIGNMENT + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    struct block *block = aligned_alloc(ALIGNMENT, whole);
    if (!block)
        fail(LIMIT, "no memory for %zu bytes", size);
    block->before = last;
    block->size = size;
    last = block;
    taken += size;
    char *data = (char *)block + ALIGNMENT;
    memset(data, 0, size);
    return data;
}

void *take_array(size_t count, size_t size) {
    if (size && count > SIZE_MAX / size)
        fail(UNUSABLE, "%zu values of %zu bytes are too many", count, size);
    return take(count * size);
}

char *take_text(const char *bytes, size_t length) {
    char *copy = take(length + 1);
    memcpy(copy, bytes, length);
    return copy;
}

char *take_format(const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, args);
    char *text = take((size_t)length + 1);
    vsnprintf(text, (size_t)length + 1, format, again);
    va_end(args);
    va_end(again);
    return text;
}

void *memory_mark(void) { return last; }

void memory_release(void *mark) {
    while (last && last != mark) {
        struct block *before = last->before;
        taken -= last->size;
        free(last);
        last = before;
    }
}
