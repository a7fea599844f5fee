#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "fail.h"
#include "memory.h"

enum { PIECE = 1 << 16, MAX_LINE = 64 << 20 };
// A host that was cut off does not say so; one that lives says something every 5 s, at least while
// others would have to wait for it.
static const int64_t IDLE_NS = 20000000000, PATIENT_NS = 600000000000;

static struct wire wire;
static char *pending;
static size_t length, room;
static int64_t heard, idle_ns;

void wire_open(struct wire given) {
    wire = given;
    heard = clock_ns();
    idle_ns = PATIENT_NS;
}

void wire_be_strict(void) { idle_ns = IDLE_NS; }

static _Noreturn void gone(const char *why) {
    fprintf(stderr, "%s\n", why);
    wire.on_end();
    _exit(0);
}

static void heard_now(void) {
    heard = clock_ns();
    wire.on_heard();
}

static void read_more(void) {
    if (length > MAX_LINE)
        gone("a request is too long");
    if (room - length < PIECE) {
        room = length + 4 * PIECE;
        char *larger = realloc(pending, room);
        if (!larger)
            gone("no memory for a request");
        pending = larger;
    }
    ssize_t got = read(0, pending + length, PIECE);
    if (got < 0 && errno == EINTR)
        return;
    if (got <= 0)
        gone("the host has ended");
    length += (size_t)got;
    heard_now();
}

static void drop(size_t count) {
    length -= count;
    memmove(pending, pending + count, length);
}

bool wire_wait(int other, int wait_ms) {
    struct pollfd both[] = {{.fd = 0, .events = POLLIN}, {.fd = other, .events = POLLIN}};
    int ready = poll(both, other < 0 ? 1 : 2, wait_ms);
    if (ready > 0 && both[0].revents)
        read_more();
    else if (clock_ns() - heard > idle_ns)
        gone("the host fell silent");
    return ready > 0 && other >= 0 && both[1].revents;
}

char *wire_line(void) {
    size_t seen = 0;
    for (;;) {
        char *end = length > seen ? memchr(pending + seen, '\n', length - seen) : NULL;
        if (!end) {
            seen = length;
            wire_wait(-1, 1000);
            continue;
        }
        size_t size = (size_t)(end - pending);
        char *line = take_text(pending, size);
        drop(size + 1);
        seen = 0;
        if (line[strspn(line, " \t\r")])
            return line;
    }
}

void wire_bytes(void *target, size_t size) {
    char *out = target;
    while (size) {
        if (!length) {
            wire_wait(-1, 1000);
            continue;
        }
        size_t part = length < size ? length : size;
        memcpy(out, pending, part);
        drop(part);
        out += part;
        size -= part;
    }
}
