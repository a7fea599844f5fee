// Errors: one line that says what was found and wanted, and the exit code it leads to.
// `fail` jumps to the innermost `trap`; memory taken since then goes with it.
#pragma once
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>

// Exit codes, the same as the Python runtime's.
enum { LIMIT = 1, UNUSABLE = 2, NO_TOOL = 3, TARGET = 4 };

struct fault {
    int code;
    bool next; // another variant of the bundle may do
    char text[640];
};

struct trap {
    jmp_buf here;
    struct trap *outer;
    void *memory;
    struct fault fault;
};

void trap_open(struct trap *trap);
void trap_close(struct trap *trap);

// trap_open(&trap);
// if (setjmp(trap.here)) { trap.fault says why } else { ...; trap_close(&trap); }

_Noreturn void fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void fail_next(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void fail_again(const struct fault *fault);

// Printable and on one line; at most `size` - 1 bytes, the middle left out.
void one_line(char *out, size_t size, const char *text);
// What the last system call said.
const char *system_error(void);
