// Does the model compute here what it computed where the bundle was made?
#pragma once
#include "session.h"

struct golden {
    const char *output;
    bool ok;
    double max_abs, worst; // worst: max(|got - want| / allowed), good <= 1
    int64_t samples;
    const char *note;
};

// One for each output, in the order of the session's.
struct golden *golden_check(struct session *session);
