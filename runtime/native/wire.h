// What the host says, on a stream that may end or fall silent: then this process ends, too.
#pragma once
#include <stdbool.h>
#include <stddef.h>

struct wire {
    void (*on_heard)(void);
    void (*on_end)(void); // before this process ends
};

void wire_open(struct wire wire);
// Another would have to wait for this process: a host that is silent for 20 s is taken for gone.
void wire_be_strict(void);
// The next line that is not empty, in memory of the caller's trap; empty ones say the host lives.
char *wire_line(void);
void wire_bytes(void *target, size_t size); // those that come next
// Wait at most `wait_ms` for `other` (-1: none), and for the host; whether `other` has something.
bool wire_wait(int other, int wait_ms);
