#include "fail.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

static struct trap *innermost;

void trap_open(struct trap *trap) {
    trap->outer = innermost;
    trap->memory = memory_mark();
    innermost = trap;
}

void trap_close(struct trap *trap) { innermost = trap->outer; }

static _Noreturn void throw(const struct fault *fault) {
    struct trap *trap = innermost;
    if (!trap) { // no trap is open only before main opened one
        fprintf(stderr, "%s\n", fault->text);
        abort();
    }
    trap->fault = *fault;
    innermost = trap->outer;
    memory_release(trap->memory);
    longjmp(trap->here, 1);
}

static _Noreturn void throw_text(int code, bool next, const char *format, va_list args) {
    char text[4096];
    struct fault fault = {.code = code, .next = next};
    vsnprintf(text, sizeof text, format, args);
    one_line(fault.text, sizeof fault.text, text);
    throw(&fault);
}

void fail(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    throw_text(code, false, format, args);
}

void fail_next(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    throw_text(code, true, format, args);
}

void fail_again(const struct fault *fault) {
    struct fault copy = *fault;
    throw(&copy);
}

void one_line(char *out, size_t size, const char *text) {
    size_t length = strlen(text), count = 0;
    size_t half = (size - 6) / 2;
    bool space = true; // leading white space goes
    for (size_t i = 0; i < length && count + 1 < size; i++) {
        if (length >= size && i == half) {
            memcpy(out + count, " ... ", 5);
            count += 5;
            i = length - half;
        }
        unsigned char c = (unsigned char)text[i];
        bool blank = c == ' ' || (c >= '\t' && c <= '\r');
        if (blank && space)
            continue;
        out[count++] = blank ? ' ' : (c < 0x20 || c == 0x7f) ? '?' : (char)c;
        space = blank;
    }
    while (count && out[count - 1] == ' ')
        count--;
    out[count] = 0;
}

const char *system_error(void) { return strerror(errno); }
