// A process in a group of its own that is spoken to by lines, while the host is heard.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "json.h"

struct child;

// `environment` (an object) is added; `cpus` (a list) are its processors; NULL: none given.
// Fails with TARGET if it cannot be started. Lives until `child_end`.
struct child *child_start(const struct json *command, const struct json *environment,
                          const struct json *cpus);
void child_signal(struct child *child, int number); // its group
void child_say(struct child *child, const char *bytes, size_t size);
// Its next line without the line feed; "" at its end, NULL if none comes until `late_ns`.
char *child_line(struct child *child, int64_t late_ns);
// All it says to its end; NULL if that does not come in time.
char *child_rest(struct child *child, int64_t late_ns);
// Whether it has ended, within 5 s; `code` is negative for a signal.
bool child_code(struct child *child, int *code);
char *child_last_words(struct child *child); // on stderr
void child_end(struct child *child);
