// What the requests of a host share. Each has one function that answers it: it writes the fields of
// a JSON object, of which the brackets are the desk's, or fails with what is said instead.
#pragma once
#include "child.h"
#include "json.h"
#include "place.h"
#include "text.h"

extern struct desk {
    struct place *place; // NULL until it is known
    const char *owner;   // who asks, for those who have to wait
} desk;

void answer_ok(struct text *answer); // each begins with it
void desk_change(void); // what is installed is about to be changed: nobody else may, from here on
void desk_listen(void); // takes what the host says meanwhile
void status_to_json(struct text *answer);
void roll_back(struct text *answer, bool beats);

typedef void answers(const struct json *request, struct text *answer);
answers do_begin, do_have, do_take, do_commit, do_keep; // receive.c
answers do_there, do_lay, do_read, do_call, do_start, do_ask, do_stop; // errands.c

// receive.c: what may not be installed fails.
void check_tries(const char *sha256);
void check_sequence(const char *file, bool allow_older);

// errands.c: processes by a name; an earlier one of that name is ended first.
struct child *errand_start(const char *id, const struct json *command,
                           const struct json *environment, const struct json *cpus);
void errand_end(const char *id);
void errands_open(void);
void errands_close(void); // ends all, removes what they left
